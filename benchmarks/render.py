"""The Markdown page of the measurements, from the CSV files of a folder; figures beside it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

import joint
import plots
from obr.runtime.files import write_text
from timing import counted

SPREAD = "Seconds are medians, the least and the most in brackets."


def render(out: Path) -> str:
    """Write `benchmarks.md` and the figures of every CSV file that is there; returns the page."""
    frames = {name: pd.read_csv(out / f"{name}.csv") for name in TABLES if (out / f"{name}.csv").exists()}
    parts = ["# Benchmarks", SPREAD]
    for name, frame in frames.items():
        title, table = TABLES[name]
        parts += [f"## {title}", _machine(frame), table(frame)]
        if name in plots.PLOTS:
            plots.draw(name, frame, out / name)
            parts.append(f"![{title}]({name}.png)")
    page = "\n\n".join(parts) + "\n"
    write_text(page, out / "benchmarks.md")
    return page


def _machine(frame: pd.DataFrame) -> str:
    *fewer, most = sorted(frame["threads"].unique())
    threads = " and ".join([*map(str, fewer), counted(most, "thread")])
    first = frame.iloc[0]
    return f"{first['cpu']}, {counted(first['cores'], 'core')}, {threads}, torch {first['torch']}."


def _markdown(rows: list[dict]) -> str:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + " :-- |" + " --: |" * (len(names) - 1)]
    lines += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _seconds(row: pd.Series, name: str) -> str:
    value, low, high = (_three_figures(row[f"{name}{part}_s"]) for part in ("", "_min", "_max"))
    return value if low == high else f"{value} ({low}–{high})"


def _three_figures(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"


def _restoration(frame: pd.DataFrame) -> str:
    rows = [
        {
            "Layer": row["layer"], "Rows × columns": f"{row['rows']} × {row['columns']}",
            "Method": plots.NAMES[row["method"]], "Threads": row["threads"],
            "Loop over rows (s)": _seconds(row, "loop") + ("*" if row["loop_rows_timed"] < row["rows"] else ""),
            "All rows at once (s)": _seconds(row, "ours"), "Ratio": f"{row['ratio']:.1f}",
            "Relative error": f"{row['relative_error']:.4f}", "Error to the loop's": f"{row['error_ratio']:.5f}",
        }
        for _, row in frame.iterrows()
    ]  # fmt: skip
    note = ""
    if (frame["loop_rows_timed"] < frame["rows"]).any():
        note = f"\n\n\\* {frame['loop_rows_timed'].min()} rows timed and scaled; factors and GPTQ's sweep in full."
    return _markdown(rows) + note


def _joint(frame: pd.DataFrame) -> str:
    rows = [
        {"Method": name, "Error, OBR_GPTQ's = 1": f"{mean['error_ratio']:.3f}", "Time": f"{mean['time_ratio']:.2f}"}
        for name, mean in joint.means(frame).iterrows()
    ]
    return f"Geometric means over {frame['layer'].nunique()} layers, 4 bits, 50 % zeros.\n\n{_markdown(rows)}"


def _stages(frame: pd.DataFrame) -> str:
    rows = [{"Stage": plots.STAGES[row["stage"]], "Seconds": _seconds(row, "time")} for _, row in frame.iterrows()]
    seconds = frame.set_index("stage")["time_s"]
    first = frame.iloc[0]
    return (
        f"{first['model']}, {first['tokens']:,} tokens, {first['layers']} layers.\n\n{_markdown(rows)}\n\n"
        f"Restoration takes {seconds['restoration'] / seconds['passes']:.2f} times the forward passes; "
        f"the sequential run peaks at {first['sequential_peak_mb']:.0f} MB of resident memory."
    )


def _memory(frame: pd.DataFrame) -> str:
    rows = []
    for stage, part in frame.groupby("stage", sort=False):
        peaks = part.set_index("blocks")["peak_mb"]
        rows.append(
            {"Stage": stage, **{f"{counted(blocks, 'block')} (MB)": f"{peak:.0f}" for blocks, peak in peaks.items()},
             "Most to least": f"{peaks.max() / peaks.min():.3f}"}
        )  # fmt: skip
    return _markdown(rows)


def _scaling(frame: pd.DataFrame) -> str:
    rows = []
    for varied, part in frame.groupby("varied", sort=False):
        slopes = [np.nan, *(np.diff(np.log(part["time_s"])) / np.diff(np.log(part["size"])))]
        for (_, row), slope in zip(part.iterrows(), slopes, strict=True):
            rows.append(
                {"Varied": varied, "Of": plots.subject(row), "Size": row["size"], "Seconds": _seconds(row, "time"),
                 "Slope": "" if np.isnan(slope) else f"{slope:.2f}"}
            )  # fmt: skip
    return _markdown(rows)


def _large(frame: pd.DataFrame) -> str:
    rows = [
        {
            "Stage": row["stage"],
            "Peak (GiB)": f"{row['peak_mb'] * 1e6 / 2**30:.2f}",
            "Seconds": f"{row['seconds']:.0f}",
        }
        for _, row in frame.iterrows()
    ]
    return f"{counted(frame['blocks'].iloc[0], 'block')}, {frame['model_gb'].iloc[0]:.1f} GB.\n\n{_markdown(rows)}"


def _products(frame: pd.DataFrame) -> str:
    parts = []
    for (kind, tokens, threads), part in frame.groupby(["layer_kind", "tokens", "threads"], sort=False):
        rows = [
            {
                "Kernel": row["kernel"], "Bits a weight": f"{row['bits_per_weight']:.2f}",
                "Milliseconds": _milliseconds(row), "Of the bound": f"{row['of_bound']:.0%}",
                "Times int4 unstructured": f"{row['times_packed']:.2f}",
            }
            for _, row in part.iterrows()
        ]  # fmt: skip
        size = f"{kind}, {part['rows'].iloc[0]} × {part['columns'].iloc[0]}"
        speed = f"memory is read at {part['read_gb_s'].iloc[0]:.1f} GB/s"
        parts.append(
            f"{size}, {counted(tokens, 'token')}, {counted(threads, 'thread')}; {speed}:\n\n{_markdown(rows)}"
        )
    return "\n\n".join(parts)


def _decoding(frame: pd.DataFrame) -> str:
    parts = []
    for (subject, threads), part in frame.groupby(["subject", "threads"], sort=False):
        rows = [
            {
                "Weights": row["weights"], **_perplexity(row), "Linear layers (MB)": f"{row['linear_mb']:.1f}",
                "Milliseconds a token": _milliseconds(row), "Tokens a second": f"{row['tokens_s']:.1f}",
                "Of the bound": f"{row['of_bound']:.0%}",
                "Resident (MB)": f"{row['resident_mb'] - row['before_mb']:.0f}",
            }
            for _, row in part.iterrows()
        ]  # fmt: skip
        speed = f"memory is read at {part['read_gb_s'].min():.1f} to {part['read_gb_s'].max():.1f} GB/s"
        parts.append(f"{subject}, {counted(threads, 'thread')}; {speed}:\n\n{_markdown(rows)}")
    return "\n\n".join(parts)


def _perplexity(row: pd.Series) -> dict[str, str]:
    return {} if pd.isna(row["perplexity"]) else {"Perplexity": f"{row['perplexity']:.2f}"}


def _zero_shot(frame: pd.DataFrame) -> str:
    rows = [
        {
            "Evaluation": row["evaluation"], "Tokens read": f"{row['tokens']:,}", "Seconds": _seconds(row, "time"),
            "Time, streamed = 1": f"{row['ratio']:.2f}",
        }
        for _, row in frame.iterrows()
    ]  # fmt: skip
    first = frame.iloc[0]
    return f"{first['model']}, {first['requests']} prompts with an answer, float32.\n\n{_markdown(rows)}"


def _milliseconds(row: pd.Series) -> str:
    value, low, high = (f"{1e3 * row[f'time{part}_s']:.3g}" for part in ("", "_min", "_max"))
    return f"{value} ({low}–{high})"


TABLES: dict[str, tuple[str, Callable[[pd.DataFrame], str]]] = {
    "restoration": ("Solver against the loop over rows", _restoration),
    "joint": ("The joint method against OBR_GPTQ", _joint),
    "stages": ("Time by stage", _stages),
    "memory": ("Peak resident memory against depth", _memory),
    "scaling": ("How the time grows", _scaling),
    "products": ("Products with weights larger than the caches", _products),
    "decoding": ("Writing text, one token at a time", _decoding),
    "zero_shot": ("Zero-shot evaluation against lm-eval's own model", _zero_shot),
    "large": ("A model of Llama-2-7B's shape", _large),
}
