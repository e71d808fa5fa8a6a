"""Oddities of the published tables, each found by computing: notes for the tables that quote them.

A check is a function `(frame, quoted) -> sentences`, listed in CHECKS. `frame` holds all published numbers,
`quoted` those that a table quotes, with a further column `subject`: what for, such as "Llama-2-7B: OBR".
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from obr.report.published import MEAN, PAPER_TASKS, SETTING, load

# A mean rounded to 0.01 of six values rounded to 0.01 is at most this far from theirs.
MEAN_TOLERANCE = 0.0101
PERPLEXITY = "wikitext2_ppl"


def recomputed_means(frame: pd.DataFrame) -> pd.DataFrame:
    """Each printed zero-shot mean beside the mean of its six printed tasks.

    Only settings with all six tasks and a printed mean appear. Columns: those of SETTING, then `printed`,
    `mean`, `difference` (printed - mean) and `flagged` (the difference is more than rounding).
    """
    wanted = frame[frame["metric"].isin([*PAPER_TASKS, MEAN])]
    wide = wanted.pivot_table(index=SETTING, columns="metric", values="value", aggfunc="first", sort=False)
    wide = wide.reindex(columns=[*PAPER_TASKS, MEAN]).dropna()
    result = pd.DataFrame({"printed": wide[MEAN], "mean": wide[list(PAPER_TASKS)].mean(axis=1)})
    result["difference"] = result["printed"] - result["mean"]
    result["flagged"] = result["difference"].abs() > MEAN_TOLERANCE
    return result.reset_index()


def notes(frame: pd.DataFrame, quoted: list[tuple[str, pd.DataFrame]]) -> list[str]:
    """What is odd about the quoted numbers, each sentence once, in the order of CHECKS.

    quoted: pairs of a subject and its rows of `frame`.
    """
    if not quoted:
        return []
    rows = pd.concat([rows.assign(subject=subject) for subject, rows in quoted])
    rows = rows.drop_duplicates([*SETTING, "metric", "note", "subject"])
    return list(dict.fromkeys(sentence for check in CHECKS for sentence in check(frame, rows)))


def everything(frame: pd.DataFrame) -> dict[str, list[str]]:
    """The oddities of every table of the paper that has some, by its name."""
    found = {}
    for table, rows in frame[frame["source"] == "obr"].groupby("table", sort=False):
        quoted = [(_named(setting), part) for setting, part in rows.groupby(SETTING, sort=False)]
        sentences = notes(frame, quoted)
        if sentences:
            found[table] = sentences
    return found


def markdown(published: Path) -> str:
    """The oddities of all of the paper's tables, computed from the file of printed numbers."""
    parts = ["# Oddities of the published tables\n\nEach was found by computing from the printed numbers."]
    for table, sentences in everything(load(published)).items():
        parts.append(f"## {table}\n\n" + "\n".join(f"- {sentence}" for sentence in sentences))
    return "\n\n".join(parts) + "\n"


def _named(setting: tuple) -> str:
    of = dict(zip(SETTING, setting))
    bits = f" W{of['w_bits']}A{of['a_bits']}KV{of['kv_bits']}" if of["kv_bits"] else ""
    return f"{of['model']}: {of['method']}{bits}"


def _short(table: str) -> str:
    """ "Table 1" of "OBR Table 1 / exp_quarot.jpg"."""
    found = re.search(r"(Table|Figure) \d+\w?", table)
    return found[0] if found else table


def _same(frame: pd.DataFrame, row, columns: list[str]) -> pd.DataFrame:
    """The rows of `frame` that agree with `row` in these columns."""
    for column in columns:
        frame = frame[frame[column] == getattr(row, column)]
    return frame


# --- Means --------------------------------------------------------------------------------------------


def wrong_means(frame: pd.DataFrame, quoted: pd.DataFrame) -> Iterator[str]:
    """A printed mean that is not the mean of the six tasks beside it: where else it stands, or which task
    would have to be misprinted."""
    printed = quoted.loc[quoted["metric"] == MEAN, [*SETTING, "subject"]].drop_duplicates()
    for bad in _flagged(frame).merge(printed).itertuples():
        text = f"{bad.subject}: the paper prints a mean of {bad.printed:.2f}, its six tasks give {bad.mean:.2f}"
        yield f"{text}{_where_else(frame, bad) or _misprint(frame, bad)}."


def _flagged(frame: pd.DataFrame) -> pd.DataFrame:
    means = recomputed_means(frame)
    return means[means["flagged"]]


def _where_else(frame: pd.DataFrame, bad) -> str:
    same = frame[(frame["metric"] == MEAN) & (frame["source"] == bad.source) & (frame["model"] == bad.model)]
    same = same[(same["value"] == bad.printed) & (same["rotation"] != bad.rotation)]
    return "".join(
        f"; {row.printed} is the mean of {row.method} on {row.rotation} in {_short(row.table)}"
        for row in same.drop_duplicates("table").itertuples()
    )


def _misprint(frame: pd.DataFrame, bad) -> str:
    """The task, or tasks, whose printed digits need the fewest changes for the mean to come right."""
    if abs(bad.difference) < 0.1:
        return ""
    rows = _same(frame, bad, SETTING).set_index("metric")
    tasks = rows.loc[list(PAPER_TASKS), "value"]
    needed = {task: value + 6 * bad.difference for task, value in tasks.items()}
    changes = {t: sum(a != b for a, b in zip(f"{tasks[t]:.2f}", f"{n:.2f}")) for t, n in needed.items()}
    fewest = [task for task in changes if changes[task] == min(changes.values())]
    each = " or ".join(f"{task} {needed[task]:.2f} instead of {tasks[task]:.2f}" for task in fewest)
    return f"; {each} would bear it out"


def repeated_means(frame: pd.DataFrame, quoted: pd.DataFrame) -> Iterator[str]:
    """A quoted mean without its tasks that repeats one which its own tasks do not bear out."""
    printed = quoted[quoted["metric"] == MEAN]
    same = printed.merge(_flagged(frame), on=["source", "model", "rotation"], suffixes=("", "_bad"))
    for row in same[(same["value"] == same["printed_bad"]) & (same["table"] != same["table_bad"])].itertuples():
        yield (
            f"{row.subject}: the printed mean {row.printed} repeats that of {_short(row.table_bad)}, "
            f"whose six tasks give {row.mean:.2f}."
        )


def fractions(frame: pd.DataFrame, quoted: pd.DataFrame) -> Iterator[str]:
    """A value printed as a fraction among percentages; the data hold it times 100."""
    means = recomputed_means(frame)
    for _, rows in quoted[quoted["note"].str.contains('printed "0.', regex=False)].groupby(level=0):
        row = rows.iloc[0]
        text = re.search(r'printed "(0\.\d+)"', row["note"])[1]
        if not np.isclose(row["value"], 100 * float(text)):
            continue
        sentence = f"{row['subject']}: {row['metric']} is printed as {text}, a fraction among percentages"
        for mean in means.merge(rows[SETTING].drop_duplicates()).itertuples():
            spoilt = mean.mean + (float(text) - row["value"]) / 6
            sentence += (
                f"; with {row['value']:.2f} the six tasks give the printed mean {mean.printed:.2f} "
                f"(with {text}: {spoilt:.2f})"
            )
        yield f"{sentence}."


# --- Comparisons --------------------------------------------------------------------------------------


def _calibration(notes_: pd.Series) -> pd.Series:
    return notes_.str.extract(r"calibration set (\w+)")[0].fillna("wikitext2")


def printed_twice(frame: pd.DataFrame, quoted: pd.DataFrame) -> Iterator[str]:
    """The same setting of the paper with another value in another of its tables."""
    key = ["model", "method", "source", "w_bits", "a_bits", "kv_bits", "sparsity", "metric", "set"]
    known, mine = (_of_the_paper(rows).assign(set=lambda f: _calibration(f["note"])) for rows in (frame, quoted))
    pairs = mine.merge(known, on=key, suffixes=("", "_other"))
    pairs = pairs[(pairs["value"] != pairs["value_other"]) & (pairs["table"] != pairs["table_other"])]
    for (subject, metric), rows in pairs.groupby(["subject", "metric"], sort=False):
        first = rows.iloc[0]
        places = rows.drop_duplicates("table_other").groupby("printed_other", sort=False)["table_other"]
        elsewhere = "; ".join(f"{value} in {' and '.join(map(_short, tables))}" for value, tables in places)
        yield f"{subject}: {metric} is {first['printed']} in {_short(first['table'])}, but {elsewhere}."


def _of_the_paper(rows: pd.DataFrame) -> pd.DataFrame:
    """Its perplexities and means on QuaRot, and those of the uncompressed models, read as printed."""
    rows = rows[(rows["source"] == "obr") & rows["metric"].isin([PERPLEXITY, MEAN])]
    rows = rows[(rows["method"] == "FP16") | (rows["rotation"] == "quarot")]
    return rows[~rows["note"].str.contains("DIGITISED")]


def borrowed_rows(frame: pd.DataFrame, quoted: pd.DataFrame) -> Iterator[str]:
    """A perplexity, and nearly the mean too, that also stand for another model of the same method."""
    paper = _of_the_paper(frame).drop_duplicates([*SETTING, "metric"])
    wide = paper.pivot(index=SETTING, columns="metric", values="value").reset_index()
    mine = wide.merge(quoted[[*SETTING, "subject"]].drop_duplicates())
    twins = mine.merge(wide, on=["method", PERPLEXITY], suffixes=("", "_other"))
    twins = twins[(twins["model"] != twins["model_other"]) & ((twins[MEAN] - twins[f"{MEAN}_other"]).abs() < 0.02)]
    for row in twins.to_dict("records"):
        bits = "W{w_bits_other}A{a_bits_other}KV{kv_bits_other}".format(**row)
        yield (
            f"{row['subject']}: {row[PERPLEXITY]:.2f} / {row[MEAN]:.2f} is also printed in "
            f"{_short(row['table_other'])} for {row['model_other']} at {bits} "
            f"({row[PERPLEXITY]:.2f} / {row[f'{MEAN}_other']:.2f})."
        )


def worse_with_more_bits(frame: pd.DataFrame, quoted: pd.DataFrame) -> Iterator[str]:
    """A perplexity that is worse than that of the same method with fewer bits of activations, in its table."""
    same = ["source", "table", "model", "rotation", "method", "w_bits", "sparsity", "metric"]
    mine = quoted[(quoted["source"] == "obr") & (quoted["metric"] == PERPLEXITY) & (quoted["a_bits"] != "")]
    pairs = mine.merge(frame[frame["a_bits"] != ""], on=same, suffixes=("", "_other"))
    fewer = pairs["a_bits_other"].astype(float) < pairs["a_bits"].astype(float)
    for row in pairs[fewer & (pairs["value_other"] < pairs["value"])].itertuples():
        yield (
            f"{row.subject}: perplexity {row.printed} with {row.a_bits}-bit activations, but {row.printed_other} "
            f"with {row.a_bits_other}-bit ones."
        )


def rounding_beats_gptq(frame: pd.DataFrame, quoted: pd.DataFrame) -> Iterator[str]:
    """OBR with plain rounding printed with a better perplexity than OBR with GPTQ."""
    same = [*(c for c in SETTING if c != "method"), "metric", "set"]
    of = {name: rows[rows["metric"] == PERPLEXITY] for name, rows in (("mine", quoted), ("all", frame))}
    of = {name: rows.assign(set=_calibration(rows["note"])) for name, rows in of.items()}
    gptq, rtn = of["mine"][of["mine"]["method"] == "OBR_GPTQ"], of["all"][of["all"]["method"] == "OBR_RTN"]
    pairs = gptq.merge(rtn, on=same, suffixes=("", "_rtn"))
    for row in pairs[pairs["value_rtn"] < pairs["value"]].itertuples():
        yield f"{row.subject}: perplexity {row.printed}, worse than OBR_RTN's {row.printed_rtn}."


def best_alpha(frame: pd.DataFrame, quoted: pd.DataFrame) -> Iterator[str]:
    """Which alpha has the best printed numbers, where it is not the 0.50 that the paper uses."""
    swept = quoted[quoted["method"].str.contains("alpha=")].drop_duplicates([*SETTING, "metric"])
    for (model, metric), rows in swept.groupby(["model", "metric"], sort=False):
        values = rows.set_index(rows["method"].str.extract(r"alpha=([\d.]+)")[0])["value"]
        best = values.idxmin() if metric == PERPLEXITY else values.idxmax()
        if metric in (PERPLEXITY, MEAN) and "0.50" in values and best != "0.50":
            yield (
                f"{model}: the best {metric} is printed at alpha {best} ({values[best]:.2f}), "
                f"not at the 0.50 used elsewhere ({values['0.50']:.2f})."
            )


def weak_baseline(frame: pd.DataFrame, quoted: pd.DataFrame) -> Iterator[str]:
    """Whether "quant-only" means rounding to nearest, to judge by tables that print RTN and GPTQ apart."""
    methods = set(quoted.loc[quoted["source"] == "obr", "method"])
    first = frame[frame["metric"] == PERPLEXITY]
    if "QuaRot(quant-only)" in methods or "QuaRot (quantisation only)" in methods:
        mine = first[(first["method"] == "QuaRot (quantisation only)") & (first["w_bits"] == "4")]["printed"]
        both = first[(first["table"] == "OBR Table 7")].set_index("method")["printed"]
        if len(mine) and {"RTN", "GPTQ"} <= set(both.index):
            near = min(("RTN", "GPTQ"), key=lambda m: abs(float(both[m]) - float(mine.iloc[0])))
            yield (
                f"QuaRot(quant-only) is {near}: Figure 1a prints {mine.iloc[0]} for it at 4 bits, Table 7 "
                f"{both['RTN']} for RTN and {both['GPTQ']} for GPTQ."
            )
    if "FlatQuant(quant-only)" in methods:
        theirs = first[(first["table"] == "FlatQuant README Table 1") & (first["w_bits"] == "4")]
        mine = first[(first["method"] == "FlatQuant(quant-only)") & (first["w_bits"] == "4")].set_index("model")[
            "value"
        ]
        apart = {}
        for method in ("RTN", "GPTQ"):
            values = theirs[theirs["method"] == f"FlatQuant ({method})"].set_index("model")["value"]
            apart[method] = (mine - values).abs().dropna().max()
        near = min(apart, key=apart.get)
        yield (
            f"FlatQuant(quant-only) at 4 bits is {near}: within {apart[near]:.2f} of the {near} column of its "
            f"authors' own table, {max(apart.values()):.2f} from its other."
        )


def odd_digits(frame: pd.DataFrame, quoted: pd.DataFrame) -> Iterator[str]:
    """A perplexity or mean of the paper printed with more decimals than the others of its table."""
    rows = quoted[(quoted["source"] == "obr") & quoted["metric"].isin([PERPLEXITY, MEAN])]
    for row in rows[rows["printed"].str.contains(r"\.\d{3}")].itertuples():
        yield f"{row.subject}: {row.metric} {row.printed} has three decimals where the table has two."


def two_speedups(frame: pd.DataFrame, quoted: pd.DataFrame) -> Iterator[str]:
    """The same product's speed-up over FP16 in two figures of the paper."""
    if not (quoted["metric"].isin(["latency_ms", "tops", "speedup"]) & (quoted["source"] == "obr")).any():
        return
    times = frame[(frame["source"] == "obr") & (frame["metric"] == "latency_ms")]
    wide = times.pivot_table(index=["model", "table"], columns="method", values="value", aggfunc="first").dropna()
    ratio = wide["FP16-Dense"] / wide["INT4-Sparse 2:4"]
    for shape, found in ratio.groupby("model"):
        if len(found) > 1:
            each = " and ".join(f"{value:.2f} in {_short(table)}" for (_, table), value in found.items())
            yield f"{shape}: the sparse kernel's speed-up over FP16 is {each}; they are two measurements."


# --- Equations ----------------------------------------------------------------------------------------


def printed_sign(frame: pd.DataFrame, quoted: pd.DataFrame) -> Iterator[str]:
    """What the sign of the paper's equations 9 and 10 does, on a layer of correlated inputs."""
    if ((quoted["source"] == "obr") & quoted["method"].str.startswith("OBR")).any():
        none, minus, plus = sign_errors()
        yield (
            "The paper's equations 9 and 10 subtract the compensation where equation 8 and the released code add it: "
            f"on a pruned layer of 64 correlated inputs the relative error is {none:.2f} without compensation, "
            f"{minus:.2f} with the printed sign, {plus:.2f} with the other, which is used here."
        )


def sign_errors(n: int = 64, rows: int = 32, seed: int = 0) -> tuple[float, float, float]:
    """Relative output error of a half-pruned layer: uncompensated, with the sign as printed, with a plus.

    H (n, n) is of inputs that share a few directions; the smaller half of each row is removed, and the rest
    moved by -/+ H_RR^-1 H_RE w_E (equation 9).
    """
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(4 * n, 8)) @ random.normal(size=(8, n)) + 2 * random.normal(size=(4 * n, n))
    hessian, weight = inputs.T @ inputs, random.normal(size=(rows, n))
    losses = np.zeros(3)
    for row in weight:
        gone = np.argsort(np.abs(row))[: n // 2]
        kept = np.setdiff1d(np.arange(n), gone)
        moved = np.linalg.solve(hessian[np.ix_(kept, kept)], hessian[np.ix_(kept, gone)] @ row[gone])
        for i, sign in enumerate((0, -1, 1)):
            error = row.copy()
            error[kept] = -sign * moved
            losses[i] += error @ hessian @ error
    return tuple(losses / np.einsum("ri,ij,rj", weight, hessian, weight))


CHECKS = (
    wrong_means,
    repeated_means,
    fractions,
    printed_twice,
    borrowed_rows,
    worse_with_more_bits,
    rounding_beats_gptq,
    best_alpha,
    weak_baseline,
    odd_digits,
    two_speedups,
    printed_sign,
)
