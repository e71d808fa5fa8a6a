"""The papers' printed numbers as data: reading them, and finding one."""

import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from obr.errors import ObrError

if TYPE_CHECKING:
    from obr.report.table_rows import Row

# The six zero-shot tasks whose plain mean the paper prints as `zeroshot_avg`.
PAPER_TASKS = ("piqa", "boolq", "hellaswag", "arc_easy", "arc_challenge", "winogrande")
MEAN = "zeroshot_avg"
# The nine of OSTQuant's README table, whose plain mean it prints as `zeroshot9_avg`.
OSTQUANT_TASKS = (*PAPER_TASKS, "lambada_openai", "openbookqa", "social_iqa")
MEANS = {frozenset(PAPER_TASKS): MEAN, frozenset(OSTQUANT_TASKS): "zeroshot9_avg"}
SETTING = ["source", "table", "model", "rotation", "method", "w_bits", "a_bits", "kv_bits", "sparsity"]
COLUMNS = [*SETTING, "metric", "value", "note"]
# What a column may hold besides '' for unknown; errors name the second.
FORMS = {
    "w_bits": (r"\d+(\.\d+)?", "a number of bits"),
    "a_bits": (r"\d+(\.\d+)?", "a number of bits"),
    "kv_bits": (r"\d+(\.\d+)?", "a number of bits"),
    "sparsity": (r"0(\.\d+)?|\d+:\d+", "a fraction below 1 or a pattern N:M"),
}


def load(path: Path) -> pd.DataFrame:
    """The published numbers: `value` a float (nan where nan is printed), all else text, '' for unknown.

    A further column, `printed`, holds the value as it stands in the file, digits and all.

    Raises:
        ObrError: the file is missing, its columns are others, or a value, bit width or sparsity is not one.
    """
    path = Path(path)
    if not path.is_file():
        raise ObrError(f"The published numbers {path} are missing; restore the file or correct the path.")
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if list(frame.columns) != COLUMNS:
        raise ObrError(f"{path} has the columns {', '.join(frame.columns)}; it needs {', '.join(COLUMNS)}.")
    for line, text in enumerate(frame["value"], start=2):
        try:
            float(text)
        except ValueError:
            raise ObrError(f"{path} line {line}: {text!r} is not a number; correct the value.") from None
    for column, (form, what) in FORMS.items():
        for line, text in enumerate(frame[column], start=2):
            if text and not re.fullmatch(form, text):
                raise ObrError(f"{path} line {line}: {column} {text!r} is not {what}; correct it.")
    return frame.assign(printed=frame["value"], value=frame["value"].map(float))


def select(frame: pd.DataFrame, **filters: str | float) -> pd.DataFrame:
    """The rows where every filtered column equals its value; `note` need only contain it.

    Numbers are compared as text, so `w_bits=4` and `w_bits="4"` are the same. A value that occurs nowhere in
    its column is taken for a misspelling (a `metric` excepted: not every one is published).

    Raises:
        ObrError: an unknown column, or a value that the column does not hold.
    """
    chosen = frame
    for column, value in filters.items():
        if column not in COLUMNS[:-2] + ["note"]:
            raise ObrError(
                f"Published numbers have no column {column!r}; filter by {', '.join(SETTING)}, metric, note."
            )
        if column == "note":
            hits = frame["note"].str.contains(str(value), regex=False)
        else:
            hits = frame[column] == str(value)
        if column != "metric" and not hits.any():
            known = "" if column == "note" else f"; it has {', '.join(sorted(set(frame[column]) - {''})[:12])} …"
            raise ObrError(f"No published number has {column} {str(value)!r}{known}; correct the filter.")
        chosen = chosen[hits.loc[chosen.index]]
    return chosen


def lookup(frame: pd.DataFrame, **filters: str | float) -> float | None:
    """The one published value that the filters leave, or None where nothing is published.

    Raises:
        ObrError: the filters leave several different values, or are wrong in themselves (see `select`).
    """
    return _single(select(frame, **filters), filters)


def _single(chosen: pd.DataFrame, filters: dict) -> float | None:
    values = chosen["value"].drop_duplicates()
    if len(values) > 1:
        asked = ", ".join(f"{k}={v}" for k, v in filters.items())
        apart = [c for c in [*SETTING, "metric", "note"] if chosen[c].nunique() > 1]
        raise ObrError(
            f"{len(values)} different published values match {asked}; add a filter by {' or '.join(apart)}."
        )
    return None if chosen.empty else float(values.iloc[0])


def remarks(quoted: list[tuple[str, pd.DataFrame]]) -> list[str]:
    """The notes that stand beside the quoted numbers, each once, with the numbers it is about."""
    subjects = defaultdict(dict)
    for subject, rows in quoted:
        for row in rows[rows["note"] != ""].itertuples():
            subjects[row.note][f"{subject}, {row.metric}"] = None
    sentences = []
    for note, about in subjects.items():
        whose = "; ".join(about) if len(about) <= 2 else f"{len(about)} of the quoted numbers"
        sentences.append(f"Published ({whose}): {note}.")
    return sentences


def mentions(frame: pd.DataFrame, filters: list[dict], notes: bool = True) -> list[str]:
    """Published numbers that have no cell, as sentences.

    filters: each finds one number, or several of one kind. notes: say what one must know about them, too.
    """
    sentences = []
    for one in filters:
        for row in select(frame, **one).itertuples():
            about = f" ({row.note})" if row.note and notes else ""
            what = row.metric.replace("_", " ")
            sentences.append(f"Printed in {row.table}: {row.model}, {row.method}: {what} {row.printed}{about}.")
    return list(dict.fromkeys(sentences))


class Quotes:
    """The published numbers that belong to a table's or figure's rows.

    rows: objects with `key` and `published`, the row's own filters or None where nothing is to be quoted.
    `entry["published"]` holds filters common to all rows, `models[m]["published"]` a model's printed name.

    Raises:
        ObrError: a row's filters match nothing, whatever the model and metric.
    """

    def __init__(self, entry: dict, models: dict, rows: list, path: Path):
        self.common, self.models = entry.get("published") or {}, models
        quoting = [row for row in rows if row.published is not None]
        self.frame = load(path) if quoting else None
        self.printed = {}  # all metrics of one (model, row)
        for row in quoting:
            self._check(row)
            for model in entry.get("models") or []:
                filters = self._filters(model, row)
                if "model" in filters:
                    self.printed[model, row.key] = select(self.frame, **filters)

    def _check(self, row) -> None:
        filters = {**self.common, **row.published}
        if select(self.frame, **filters).empty:
            asked = ", ".join(f"{k}={v}" for k, v in filters.items())
            raise ObrError(f"Nothing is published for row {row.key!r} under {asked}; correct the filter.")

    def _filters(self, model: str, row: "Row") -> dict:
        name = self.models[model].get("published")
        return {**self.common, **({"model": name} if name else {}), **row.published}

    def rows(self, model: str, row: "Row", metric: str) -> pd.DataFrame | None:
        """The published rows behind one number; None where row or model has no published counterpart.

        Raises:
            ObrError: they hold different values (see `lookup`).
        """
        printed = self.printed.get((model, row.key))
        if printed is None:
            return None
        chosen = printed[printed["metric"] == metric]
        if len(chosen) > 1:
            _single(chosen, self._filters(model, row) | {"metric": metric})
        return chosen

    def any(self, model: str, row: "Row") -> bool:
        """Whether anything is published for a row."""
        printed = self.printed.get((model, row.key))
        return printed is not None and not printed.empty

    def setting(self, model: str, row: "Row") -> dict:
        """The bits and the sparsity that are published for a row, as a table's frame holds them."""
        first = self.printed[model, row.key].iloc[0]
        bits = f"W{first['w_bits']}A{first['a_bits']}KV{first['kv_bits']}" if first["w_bits"] else ""
        sparsity = first["sparsity"]
        return {"setting": bits, "sparsity": sparsity if ":" in sparsity else float(sparsity or 0)}

    def value(self, model: str, row: "Row", metric: str) -> float:
        """One published number, NaN where nothing (or nan) is printed."""
        chosen = self.rows(model, row, metric)
        return float("nan") if chosen is None or chosen.empty else float(chosen["value"].iloc[0])
