"""Tables: what the paper prints, what was measured here, and the difference, with notes from the artefacts.

Reads only results already on disk (manifests, perplexities, zero-shot scores) and the published numbers.
"""

import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import pandas as pd

from obr import published as papers
from obr.errors import ObrError
from obr.recipe import Recipe

HEADINGS = {
    "wikitext2": "WikiText-2",
    "c4": "C4",
    "piqa": "PIQA",
    "boolq": "BoolQ",
    "hellaswag": "HellaSwag",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "winogrande": "WinoGrande",
}
DETAILS = ("bits_per_weight", "file_mb", "seconds", "relative_error", "sparsity")
HESSIANS = {
    "sequential": "of each block's inputs from the already compressed blocks before it",
    "cached": "of the rotated dense model",
}
EMPTY = "–"
ROW_HEADS = ("Model", "Method", "Bits", "Sparsity")
PANEL_COLUMNS = 9  # more than this beside the row heads is too small to read across a page


# --- Entries --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One recipe of a table or figure. `checkpoint` is the recipe whose folder holds its weights."""

    key: str
    label: str
    recipe: Recipe
    checkpoint: str
    published: dict | None


@dataclass(frozen=True)
class Metric:
    """One measured column: `published` is its name among the published metrics."""

    key: str
    heading: str
    published: str
    lower_is_better: bool


@dataclass
class Evidence:
    """Every artefact a table read, for its notes: what was measured, and what was quoted."""

    perplexity: list[tuple[str, str, dict]] = field(default_factory=list)  # model label, text, artefact
    zero_shot: list[tuple[str, dict]] = field(default_factory=list)  # task, artefact
    manifests: dict[tuple[str, str], dict] = field(default_factory=dict)  # by (model label, row label)
    quoted: list[tuple[str, pd.DataFrame]] = field(default_factory=list)  # model label: row label, its rows


@dataclass
class Table:
    """A table as numbers, with what is needed to print it.

    frame: one row per (model, recipe); scores in percent, perplexities as they are; NaN where there is none.
    """

    frame: pd.DataFrame
    notes: list[str]
    title: str = ""
    metrics: list[Metric] = field(default_factory=list)
    details: list[str] = field(default_factory=list)


def resolve_rows(entry: dict, recipes: dict) -> list[Row]:
    """The `rows` of a table or figure entry, each a recipe key or `{recipe, label?, published?}`.

    Raises:
        ObrError: no rows, or a recipe (or the one that its `weights` names) is not in the config.
    """
    if not entry.get("rows"):
        raise ObrError(f"Entry {entry.get('title', '')!r} has no rows; list recipe keys under `rows`.")
    rows = []
    for item in entry["rows"]:
        item = {"recipe": item} if isinstance(item, str) else item
        key = item["recipe"]
        checkpoint = recipes.get(key, {}).get("weights") or key
        for name in (key, checkpoint):
            if name not in recipes:
                raise ObrError(f"Recipe {name!r} is not in the config; known are {', '.join(sorted(recipes))}.")
        recipe = Recipe.parse(recipes[key], key)
        rows.append(Row(key, item.get("label") or recipe.label or key, recipe, checkpoint, item.get("published")))
    return rows


def model_label(models: dict, key: str) -> str:
    """The name a model is shown by. Raises ObrError if the config does not know it."""
    if key not in models:
        raise ObrError(f"Model {key!r} is not in the config; known are {', '.join(sorted(models))}.")
    return models[key].get("label") or key


def metrics_of(entry: dict) -> list[Metric]:
    """The measured columns of an entry: its texts, its tasks, and the tasks' mean if it wants one.

    Raises:
        ObrError: a mean is wanted of no tasks.
    """
    names = entry.get("published_metrics") or {}
    texts, tasks = entry.get("perplexity") or [], entry.get("zero_shot") or []
    texts = [texts] if isinstance(texts, str) else texts
    found = [Metric(t, HEADINGS.get(t, t), names.get(t, f"{t}_ppl"), True) for t in texts]
    found += [Metric(t, HEADINGS.get(t, t), names.get(t, t), False) for t in tasks]
    if entry.get("mean"):
        if not tasks:
            raise ObrError(f"Table {entry.get('title', '')!r} wants a mean of no tasks; list some in `zero_shot`.")
        # A mean over other tasks than the paper's six has no published counterpart.
        same = {names.get(t, t) for t in tasks} == set(papers.PAPER_TASKS)
        found.append(Metric("mean", "Mean", names.get("mean", papers.MEAN if same else ""), False))
    keys = [metric.key for metric in found]
    if len(set(keys)) < len(keys):
        raise ObrError(f"Entry {entry.get('title', '')!r} names a text or task twice: {', '.join(keys)}.")
    return found


# --- Artefacts ------------------------------------------------------------------------------------


def read_artefact(path: Path) -> dict:
    """One JSON artefact. Raises ObrError, naming the target to build, if it is missing or damaged."""
    require(path)
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise ObrError(f"{path} is not valid JSON; delete it and build it with `snakemake {path}`.") from None


def require(path: Path) -> Path:
    """`path` itself. Raises ObrError, naming the target to build, if there is no such file."""
    if not Path(path).is_file():
        raise ObrError(f"{path} is missing; build it with `snakemake {path}`.")
    return path


def read_manifest(results: Path, model: str, row: Row) -> dict:
    return read_artefact(Path(results) / "compressed" / model / row.checkpoint / "manifest.json")


def read_perplexity(results: Path, model: str, row: Row, text: str) -> dict:
    return read_artefact(Path(results) / "perplexity" / model / row.key / f"{text}.json")


def read_zero_shot(results: Path, model: str, row: Row, task: str) -> dict:
    return read_artefact(Path(results) / "zero_shot" / model / row.key / f"{task}.json")


def number(value) -> float:
    return float("nan") if value is None else float(value)


# --- Building -------------------------------------------------------------------------------------


def build(entry: dict, recipes: dict, models: dict, results: Path, published: Path) -> Table:
    """Gather one table of the config.

    The frame holds, for each (model, recipe): `model, model_label, recipe, label, method, setting, sparsity`
    (as asked for: a fraction or a pattern), then `{metric}_paper, {metric}_ours, {metric}_stderr` (zero-shot
    only) and `{metric}_delta` (ours - paper) for each text, task and `mean`, then the details asked for.

    Raises:
        ObrError: a recipe, model or detail is unknown, an artefact is missing (the sentence names the target
            to build), or a published filter is misspelt or ambiguous.
    """
    rows, metrics, details = resolve_rows(entry, recipes), metrics_of(entry), list(entry.get("details") or [])
    for name in details:
        if name not in DETAILS:
            raise ObrError(f"Detail {name!r} is unknown; choose from {', '.join(DETAILS)}.")
    labels = {key: model_label(models, key) for key in entry.get("models") or []}
    if not labels:
        raise ObrError(f"Table {entry.get('title', '')!r} has no models; list model keys under `models`.")
    quotes, evidence = papers.Quotes(entry, models, rows, published), Evidence()
    records = []
    for model, label in labels.items():
        for row in rows:
            record = _head(model, label, row)
            record |= _measured(metrics, results, model, label, row, evidence)
            record |= _quoted(metrics, quotes, model, label, row, evidence, record)
            if details or row.recipe.method != "dense":
                manifest = read_manifest(results, model, row)
                evidence.manifests[label, row.label] = manifest
                record |= _details(details, manifest)
            records.append(record)
    notes = _notes(entry, metrics, evidence, quotes.frame)
    return Table(_ordered(records, metrics), notes, entry.get("title", ""), metrics, details)


def _head(model: str, label: str, row: Row) -> dict:
    recipe = row.recipe
    names = {"model": model, "model_label": label, "recipe": row.key, "label": row.label}
    asked = recipe.pattern or recipe.sparsity
    return names | {"method": recipe.method, "setting": recipe.setting, "sparsity": asked}


def _measured(metrics, results, model, label, row, evidence: Evidence) -> dict:
    """`{metric}_ours` and `{metric}_stderr` of one (model, recipe); accuracies in percent."""
    record, scores = {}, []
    for metric in metrics:
        if metric.lower_is_better:
            artefact = read_perplexity(results, model, row, metric.key)
            evidence.perplexity.append((label, metric.key, artefact))
            record[f"{metric.key}_ours"] = number(artefact["value"])
        elif metric.key != "mean":
            artefact = read_zero_shot(results, model, row, metric.key)
            evidence.zero_shot.append((metric.key, artefact))
            scores.append((100 * number(artefact["value"]), 100 * number(artefact.get("stderr"))))
            record[f"{metric.key}_ours"], record[f"{metric.key}_stderr"] = scores[-1]
        else:  # comes last, when all its tasks are read; NaN if one of them is
            values, errors = zip(*scores)
            record["mean_ours"] = sum(values) / len(values)
            record["mean_stderr"] = sum(e**2 for e in errors) ** 0.5 / len(errors)
    return record


def _quoted(metrics, quotes, model, label, row, evidence: Evidence, measured: dict) -> dict:
    """`{metric}_paper` and `{metric}_delta` of one (model, recipe)."""
    record = {}
    for metric in metrics:
        chosen = quotes.rows(model, row, metric.published)
        if chosen is not None:
            evidence.quoted.append((f"{label}: {row.label}", chosen))
        record[f"{metric.key}_paper"] = quotes.value(model, row, metric.published)
        record[f"{metric.key}_delta"] = measured[f"{metric.key}_ours"] - record[f"{metric.key}_paper"]
    return record


def _details(details: list[str], manifest: dict) -> dict:
    bits = manifest.get("bits_per_weight") or {}
    read = {
        "bits_per_weight_theoretical": bits.get("theoretical"),
        "bits_per_weight_file": bits.get("file"),
        "file_mb": number(manifest.get("file_bytes")) / 1e6,
        "seconds": manifest.get("seconds"),
        "relative_error": manifest.get("relative_error"),
        "sparsity_measured": manifest.get("sparsity"),
    }
    return {column: number(read[column]) for detail in details for column in _detail_columns(detail)}


def _detail_columns(detail: str) -> list[str]:
    if detail == "bits_per_weight":
        return ["bits_per_weight_theoretical", "bits_per_weight_file"]
    return ["sparsity_measured"] if detail == "sparsity" else [detail]


def _ordered(records: list[dict], metrics: list[Metric]) -> pd.DataFrame:
    """Paper, ours, standard error, delta side by side for each metric; details last."""
    frame = pd.DataFrame(records)
    parts = [f"{m.key}_{part}" for m in metrics for part in ("paper", "ours", "stderr", "delta")]
    parts = [column for column in parts if column in frame]
    head = list(frame.columns[:7])
    return frame[head + parts + [c for c in frame.columns if c not in {*head, *parts}]]


# --- Notes ----------------------------------------------------------------------------------------


def _notes(entry: dict, metrics: list[Metric], evidence: Evidence, frame: pd.DataFrame | None) -> list[str]:
    notes = [entry["note"]] if entry.get("note") else []
    notes += _perplexity_notes(evidence) + _zero_shot_notes(evidence)
    mean = next((m for m in metrics if m.key == "mean"), None)
    if mean:
        text = f"Mean: plain mean of the {len(entry['zero_shot'])} tasks, taken as independent for its error"
        six = "" if mean.published else "; not the paper's six tasks, so no printed mean stands beside it"
        notes.append(f"{text}{six}.")
    meanings = {
        "bits_per_weight": "Bits per weight: of the compressed linear layers, in theory / in the file.",
        "file_mb": "File: the whole checkpoint, embeddings included, in MB of 10⁶ bytes.",
        "relative_error": "Relative error: squared error of the layers' outputs on the calibration data over "
        "their squared norm; mean over the layers.",
    }
    notes += [text for detail, text in meanings.items() if detail in (entry.get("details") or [])]
    notes += _compression_notes(evidence) + _origin_notes(evidence)
    if frame is not None:
        notes += papers.errata(frame, evidence.quoted)
    return notes + papers.remarks(evidence.quoted)


def _perplexity_notes(evidence: Evidence) -> list[str]:
    variants = defaultdict(dict)
    for model, text, artefact in evidence.perplexity:
        facts = tuple(artefact.get(k) for k in ("definition", "windows", "seqlen", "tokens"))
        variants[text].setdefault(facts, {})[model] = None
    notes = []
    for text, found in variants.items():
        for (definition, windows, seqlen, tokens), models in found.items():
            whose = f" ({', '.join(models)})" if len(found) > 1 else ""
            definition = str(definition).rstrip(".")
            notes.append(
                f"{HEADINGS.get(text, text)} perplexity{whose}: {definition}; {windows:,} windows of "
                f"{seqlen:,} tokens, {tokens:,} tokens in all."
            )
    return notes


def _zero_shot_notes(evidence: Evidence) -> list[str]:
    facts = {}
    for task, artefact in evidence.zero_shot:
        share = "" if artefact.get("limit") is None else "the first "
        facts[f"{HEADINGS.get(task, task)} {artefact['metric']} of {share}{artefact['n']:,}"] = None
    if not facts:
        return []
    return [f"Zero-shot: accuracy in percent ± standard error; {', '.join(facts)} examples."]


def _compression_notes(evidence: Evidence) -> list[str]:
    calibrations, hessians = defaultdict(dict), defaultdict(dict)
    for (_, label), manifest in evidence.manifests.items():
        calibration = manifest.get("calibration")
        if calibration:
            name = manifest["recipe"].get("calibration")
            calibrations[f"{name}, {calibration['tokens']:,} tokens"][label] = None
            hessians[manifest["recipe"].get("hessian")][label] = None
    notes = [f"Calibration: {text}{_whose(calibrations, labels)}." for text, labels in calibrations.items()]
    for kind, labels in hessians.items():
        notes.append(f"Hessians: {kind}, {HESSIANS.get(kind, 'of unknown origin')}{_whose(hessians, labels)}.")
    return notes


def _whose(groups: dict, labels: dict) -> str:
    return f" ({', '.join(labels)})" if len(groups) > 1 else ""


def _origin_notes(evidence: Evidence) -> list[str]:
    """Devices and library versions, as recorded by the runs themselves."""
    evaluations = [a for *_, a in evidence.perplexity] + [a for _, a in evidence.zero_shot]
    devices = {a["device"]: None for a in evaluations if a.get("device")}
    versions = defaultdict(dict)
    for artefact in [*evaluations, *evidence.manifests.values()]:
        for library, version in (artefact.get("versions") or {}).items():
            versions[library][str(version)] = None
    notes = [f"Evaluated on {' and '.join(devices)}."] if devices else []
    listed = ", ".join(f"{library} {' and '.join(found)}" for library, found in sorted(versions.items()))
    return [*notes, f"Versions: {listed}."] if listed else notes


# --- Printing -------------------------------------------------------------------------------------


@dataclass
class Column:
    """A printed column; `group` is the heading it shares with its neighbours, '' for none."""

    group: str
    heading: str
    cells: list[str]
    bold: list[bool] | None = None
    left: bool = False


def write(table: Table, out_stem: Path) -> None:
    """Write `out_stem` + .csv (all digits), .md and .tex (rounded, best compressed value in bold).

    The LaTeX file is a whole table environment; it needs the packages booktabs and graphicx.
    """
    stem = Path(out_stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    columns = _columns(table)
    _write_whole(stem.with_name(stem.name + ".csv"), table.frame.to_csv(index=False))
    _write_whole(stem.with_name(stem.name + ".md"), _markdown(table, columns))
    _write_whole(stem.with_name(stem.name + ".tex"), _latex(table, columns, stem.name))


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _columns(table: Table) -> list[Column]:
    """What is printed, left to right; columns without a single value are left out."""
    frame = table.frame
    repeated = frame["model"].duplicated()
    columns = [
        Column("", "Model", ["" if again else m for again, m in zip(repeated, frame["model_label"])], left=True),
        Column("", "Method", list(frame["label"]), left=True),
        Column("", "Bits", list(frame["setting"]), left=True),
        Column("", "Sparsity", [_asked_sparsity(s) for s in frame["sparsity"]]),
    ]
    for metric in table.metrics:
        columns += _metric_columns(frame, metric)
    columns += [_detail_column(frame, detail) for detail in table.details]
    return [c for c in columns if any(cell not in ("", EMPTY) for cell in c.cells)]


def _asked_sparsity(sparsity: float | str) -> str:
    if isinstance(sparsity, str):
        return sparsity
    return f"{100 * sparsity:g}%" if sparsity else EMPTY


def _metric_columns(frame: pd.DataFrame, metric: Metric) -> list[Column]:
    """Ours alone, or paper, ours and delta where anything is published."""
    key, heading = metric.key, f"{metric.heading} {'↓' if metric.lower_is_better else '↑'}"
    errors = frame.get(f"{key}_stderr", pd.Series(float("nan"), index=frame.index))
    cells = [_score(v) + (f" ± {e:.2f}" if pd.notna(e) else "") for v, e in zip(frame[f"{key}_ours"], errors)]
    ours = Column("", heading, cells, _best(frame, f"{key}_ours", metric))
    if frame[f"{key}_paper"].isna().all():
        return [ours]
    ours.group, ours.heading = heading, "ours"
    paper = [EMPTY if pd.isna(v) else _score(v) for v in frame[f"{key}_paper"]]
    delta = [EMPTY if pd.isna(v) else f"{v:+.2f}".replace("-", "−") for v in frame[f"{key}_delta"]]
    best = _best(frame, f"{key}_paper", metric)
    return [Column(heading, "paper", paper, best), ours, Column(heading, "Δ", delta)]


def _score(value: float) -> str:
    return f"{value:.2f}" if not abs(value) >= 1e5 else f"{value:.1e}"


def _best(frame: pd.DataFrame, column: str, metric: Metric) -> list[bool]:
    """The best compressed recipe of each model; none where there is nothing to compare with."""
    values = frame[column].where(frame["method"] != "dense").round(2)
    groups = values.groupby(frame["model"])
    best = groups.transform("min" if metric.lower_is_better else "max")
    return list((values == best) & (groups.transform("count") > 1))


def _detail_column(frame: pd.DataFrame, detail: str) -> Column:
    formats = {
        "bits_per_weight": ("Bits per weight", "{:.2f}"),
        "file_mb": ("File (MB)", "{:,.1f}"),
        "seconds": ("Time (s)", "{:,.0f}"),
        "relative_error": ("Relative error", "{:.4f}"),
        "sparsity": ("Zeros (%)", "{:.2f}"),
    }
    heading, style = formats[detail]
    scale = 100 if detail == "sparsity" else 1
    parts = [[EMPTY if pd.isna(v) else style.format(scale * v) for v in frame[c]] for c in _detail_columns(detail)]
    return Column("", heading, [EMPTY if set(cell) == {EMPTY} else " / ".join(cell) for cell in zip(*parts)])


def _markdown(table: Table, columns: list[Column]) -> str:
    headings = [f"{c.group} {c.heading}".strip() for c in columns]
    lines = [headings, [":--" if c.left else "--:" for c in columns]]
    for i in range(len(table.frame)):
        cells = [c.cells[i].replace("|", "\\|") for c in columns]
        lines.append([f"**{cell}**" if c.bold and c.bold[i] else cell for c, cell in zip(columns, cells)])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "\n".join(f"- {note}" for note in table.notes)
    title = f"**{table.title}**\n\n" if table.title else ""
    return f"{title}{body}\n\n{notes}\n"


def _latex(table: Table, columns: list[Column], name: str) -> str:
    models = list(table.frame["model"])
    panels = "\n  \\par\\medskip\n".join(_latex_panel(panel, models) for panel in _panels(columns))
    notes = "\n".join(f"  {escape_latex(note)}" for note in table.notes)
    return rf"""% Needs \usepackage{{booktabs,graphicx}}.
\begin{{table}}[tp]
  \centering
  \caption{{{escape_latex(table.title)}}}
  \label{{tab:{name}}}
{panels}
  \par\smallskip\raggedright\scriptsize
{notes}
\end{{table}}
"""


def _panels(columns: list[Column]) -> list[list[Column]]:
    """The columns cut into stacked parts that stay readable on a page; each repeats the heads of its rows."""
    heads = [c for c in columns if c.heading in ROW_HEADS]
    panels, places = [], 0
    for _, group in groupby(columns[len(heads) :], key=lambda c: c.group or id(c)):
        group = list(group)
        if not panels or places + len(group) > PANEL_COLUMNS:
            panels, places = [*panels, list(heads)], 0
        panels[-1] += group
        places += len(group)
    return panels or [heads]


def _latex_panel(columns: list[Column], models: list[str]) -> str:
    body = []
    for i, model in enumerate(models):
        if i and model != models[i - 1]:
            body.append(r"\midrule")
        cells = [(c, escape_latex(c.cells[i])) for c in columns]
        bold = [rf"\textbf{{{cell}}}" if c.bold and c.bold[i] else cell for c, cell in cells]
        body.append(" & ".join(bold) + r" \\")
    indented = "\n".join(f"    {line}" for line in [*_latex_head(columns), r"\midrule", *body])
    return rf"""  \resizebox{{\ifdim\width>\linewidth\linewidth\else\width\fi}}{{!}}{{%
  \begin{{tabular}}{{{"".join("l" if c.left else "r" for c in columns)}}}
    \toprule
{indented}
    \bottomrule
  \end{{tabular}}}}"""


def _latex_head(columns: list[Column]) -> list[str]:
    """One heading line, or two with rules where metrics have sub-columns."""
    headings = " & ".join(escape_latex(c.heading) for c in columns) + r" \\"
    spans, rules, stop = [], [], 0
    for name, group in groupby(columns, key=lambda c: c.group):
        start, width = stop + 1, len(list(group))
        stop += width
        if name:
            spans.append(rf"\multicolumn{{{width}}}{{c}}{{{escape_latex(name)}}}")
            rules.append(rf"\cmidrule(lr){{{start}-{stop}}}")
        else:
            spans += [""] * width
    return [" & ".join(spans) + r" \\", " ".join(rules), headings] if rules else [headings]


def escape_latex(text: str) -> str:
    """`text` with LaTeX's special characters, and the signs that tables use, as commands."""
    commands = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "−": r"$-$",
        "Δ": r"$\Delta$",
        "α": r"$\alpha$",
        "↓": r"$\downarrow$",
        "↑": r"$\uparrow$",
        "–": "--",
        "…": r"\ldots{}",
        "⁶": r"$^6$",
    }
    return "".join(commands.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
