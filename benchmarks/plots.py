"""Figures for print of the measurements, as PDF and PNG."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from obr.report.figures.canvas import COLOURS, MARKERS, PAGE, STYLE
from obr.runtime.files import atomic_write
from timing import counted

STAGES = {
    "passes": "Rotation and forward passes",
    "Hessians": "Rotation, forward passes, Hessians",
    "restoration": "Restoration, cached Hessians",
    "sequential": "Raw model to checkpoint, sequential",
}
NAMES = {"obr_gptq": "OBR_GPTQ", "obr_rtn": "OBR_RTN"}


def draw(name: str, frame: pd.DataFrame, stem: Path) -> None:
    """Draw one measurement to `stem`.pdf, .svg and .png (300 dpi)."""
    with matplotlib.rc_context({**STYLE, "axes.axisbelow": True}):
        figure = PLOTS[name](frame)
        for suffix in ("pdf", "png", "svg"):
            with atomic_write(stem.with_suffix(f".{suffix}")) as partial:
                figure.savefig(partial, format=suffix, dpi=300)


def _figure(height: float, columns: int = 1, width: float = PAGE, **options) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False, **options)[0]


def ratio(frame: pd.DataFrame) -> Figure:
    """How many times as long the loop over rows takes, one group of bars a shape."""
    kinds = list(frame.groupby(["method", "threads"]).groups)
    shapes = frame[["layer", "rows", "columns"]].drop_duplicates()
    figure, (axes,) = _figure(2.8)
    width = 0.8 / len(kinds)
    for i, (method, threads) in enumerate(kinds):
        part = shapes.merge(frame[(frame["method"] == method) & (frame["threads"] == threads)])
        places = np.arange(len(shapes)) + (i - (len(kinds) - 1) / 2) * width
        shade = 0.45 if threads < frame["threads"].max() else 0.0
        colour = shade + (1 - shade) * np.array(to_rgb(COLOURS[list(NAMES).index(method)]))
        low = part["loop_min_s"] / part["ours_max_s"]
        high = part["loop_max_s"] / part["ours_min_s"]
        spread = [(part["ratio"] - low).clip(lower=0), (high - part["ratio"]).clip(lower=0)]
        bars = axes.bar(
            places, part["ratio"], width * 0.92, color=colour, yerr=spread,
            error_kw={"linewidth": 0.7, "capsize": 1.5, "alpha": 0.7},
            label=f"{NAMES[method]}, {counted(threads, 'thread')}",
        )  # fmt: skip
        axes.bar_label(bars, [f"{value:.0f}×" for value in part["ratio"]], padding=2, label_type="edge")
    labels = [f"{s['layer']}\n{s['rows']} × {s['columns']}" for _, s in shapes.iterrows()]
    axes.set_xticks(range(len(shapes)), labels)
    axes.set_ylabel("Time of the loop over rows ÷ ours")
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)
    figure.legend(loc="outside upper center", ncols=len(kinds), frameon=False)
    return figure


def stages(frame: pd.DataFrame) -> Figure:
    """Seconds of each stage."""
    figure, (axes,) = _figure(1.9)
    frame = frame.iloc[::-1]
    spread = [frame["time_s"] - frame["time_min_s"], frame["time_max_s"] - frame["time_s"]]
    bars = axes.barh([STAGES[s] for s in frame["stage"]], frame["time_s"], 0.65, color=COLOURS[0], xerr=spread,
                     error_kw={"linewidth": 0.8, "capsize": 2})  # fmt: skip
    axes.bar_label(bars, [f"{value:.3g} s" for value in frame["time_s"]], padding=4)
    axes.set_xlabel(f"Seconds for {frame['layers'].iloc[0]} layers and {frame['tokens'].iloc[0]:,} tokens")
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.1)
    return figure


def memory(frame: pd.DataFrame) -> Figure:
    """Peak memory of each stage against depth, from zero, so that flat looks flat."""
    figure, (axes,) = _figure(2.6)
    for i, (stage, part) in enumerate(frame.groupby("stage", sort=False)):
        look = {"marker": MARKERS[i], "markersize": 8 - 1.5 * i, "fillstyle": "none", "color": COLOURS[i]}
        axes.plot(part["blocks"], part["peak_mb"], **look, label=stage)  # smaller on larger: stages may coincide
    axes.set_ylim(0, frame["peak_mb"].max() * 1.15)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(FixedLocator(sorted(frame["blocks"].unique())))
    axes.set_xlabel("Blocks of the model")
    axes.set_ylabel("Peak resident memory (MB)")
    axes.legend(frameon=False, loc="lower center", ncols=2)
    return figure


# Slopes: products of matrices grow with rows and tokens, with the columns' square, factorisations with their cube.
REFERENCES = {"rows": {1: "--"}, "columns": {2: "--", 3: ":"}, "tokens": {1: "--"}}


def scaling(frame: pd.DataFrame) -> Figure:
    """Seconds against size, both logarithmic, with lines of the slopes to expect."""
    groups = list(frame.groupby("varied", sort=False))
    figure, panels = _figure(2.5, len(groups))
    for axes, (varied, part), colour in zip(panels, groups, COLOURS, strict=False):
        spread = [part["time_s"] - part["time_min_s"], part["time_max_s"] - part["time_s"]]
        axes.errorbar(part["size"], part["time_s"], spread, marker="o", markersize=3.5, color=colour, capsize=1.5)
        last = part.iloc[-1]
        for slope, dashes in REFERENCES[varied].items():
            line = last["time_s"] * (part["size"] / last["size"]) ** slope
            axes.plot(part["size"], line, dashes, color="0.4", linewidth=0.9, label=f"slope {slope}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(part["size"].tolist()))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
        axes.set_xlabel(varied.capitalize())
        axes.set_title(subject(last))
        axes.legend(frameon=False)
    panels[0].set_ylabel("Seconds")
    return figure


def subject(row: pd.Series) -> str:
    """What a row of the scaling table times: the solver at a fixed width or height, or a Hessian."""
    if row["varied"] == "tokens":
        return f"Hessian, {row['columns']} columns"
    fixed = f"{row['columns']} columns" if row["varied"] == "rows" else f"{row['rows']} rows"
    return f"{NAMES[row['of']]}, {fixed}"


def products(frame: pd.DataFrame) -> Figure:
    """Milliseconds of a product of one token, a panel a weight, beside the time in which its bytes can be read."""
    frame = frame[frame["tokens"] == 1]
    frame = frame.assign(value=1e3 * frame["time_s"], bound=1e3 * frame["of_bound"] * frame["time_s"])
    frame = frame.assign(low=1e3 * frame["time_min_s"], high=1e3 * frame["time_max_s"], name=frame["kernel"])
    sizes = frame["rows"].astype(str) + " × " + frame["columns"].astype(str)
    return _beside_bounds(frame.assign(panel=sizes), "Milliseconds (black: the weight's bytes are read)")


def decoding(frame: pd.DataFrame) -> Figure:
    """Tokens a second of each model and form of its weights, beside what reading its weights would allow."""
    frame = frame.assign(value=frame["tokens_s"], bound=frame["tokens_s"] / frame["of_bound"])
    frame = frame.assign(low=1 / frame["time_max_s"], high=1 / frame["time_min_s"], name=frame["weights"])
    return _beside_bounds(frame.assign(panel=frame["subject"]), "Tokens a second (black: its weights are read)")


def _beside_bounds(frame: pd.DataFrame, label: str) -> Figure:
    """Bars of `value` by `name`, a panel for each `panel`, a colour for each number of threads, marks at `bound`."""
    panels, names = list(dict.fromkeys(frame["panel"])), list(dict.fromkeys(frame["name"]))
    counts = sorted(frame["threads"].unique())
    figure, axes = _figure(1.2 + 0.2 * len(names) * len(counts), len(panels), sharey=True)
    height = 0.8 / len(counts)
    for area, title in zip(axes, panels, strict=True):
        for i, count in enumerate(counts):
            part = frame[(frame["panel"] == title) & (frame["threads"] == count)].set_index("name").reindex(names)
            places = np.arange(len(names)) + (i - (len(counts) - 1) / 2) * height
            spread = [part["value"] - part["low"], part["high"] - part["value"]]
            bars = area.barh(places, part["value"], 0.9 * height, color=COLOURS[i], xerr=spread,
                             error_kw={"linewidth": 0.7, "capsize": 1.5, "alpha": 0.6},
                             label=counted(count, "thread"))  # fmt: skip
            area.bar_label(bars, ["" if np.isnan(v) else f"{v:.3g}" for v in part["value"]], padding=3, fontsize=6)
            area.vlines(part["bound"], places - 0.45 * height, places + 0.45 * height, color="black", linewidth=1.5)
        area.set(title=title, xlabel=label)
        area.margins(x=0.15)
        area.set_xlim(left=0)
        area.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(counts), frameon=False)
    return figure


PLOTS: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "restoration": ratio,
    "stages": stages,
    "memory": memory,
    "scaling": scaling,
    "products": products,
    "decoding": decoding,
}
