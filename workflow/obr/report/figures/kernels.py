"""Figures of the kernel benchmark, with published times beside ours."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from obr.config import paths
from obr.errors import ObrError
from obr.report.figures.canvas import Canvas, FigureInputs, handle, new_canvas
from obr.report.published import select
from obr.report.table_rows import require

# What a panel shows -> (label, unit, column of the benchmark's file, published metric).
PANELS = {
    "time": ("Median time", "ms", "median_ms", "latency_ms"),
    "speed": ("Dense-equivalent speed", "{}op/s", "tops_dense", "tops"),
    "operations": ("Operations carried out", "Gop", "gop", "gflop"),
    "memory": ("Weight in memory", "MiB", "mib", "memory_mb"),
    "bound": ("Share of the read bound", "%", "percent", None),
}
DRAWN = [column for _, _, column, _ in PANELS.values()]
# Whose kernel -> its bars, distinguished by lightness; black whiskers can be seen on each.
PYTORCH, OWN, PUBLISHED = "PyTorch", "this package", "published"
FILLS = {
    PYTORCH: {"facecolor": "#D3E3F1"},
    OWN: {"facecolor": "#5B93C2"},
    PUBLISHED: {"facecolor": "white", "hatch": "//////"},
}
ROW, APART = 0.125, 0.6  # inches of a bar with its gap, where a page has room for all; rows between two shapes
HEIGHT = 7.6  # inches of a page, beside title, axis and legend
TEXT = 6.5  # points, of what stands beside bars of that height
ROOM = 1.35  # of the longest bar, for the numbers at the ends


@dataclass(frozen=True)
class _Bar:
    """One kernel at one shape in the row `y`, with its values by column."""

    y: float
    name: str
    whose: str
    values: pd.Series

    def of(self, panel: str) -> float:
        """NaN where it has none."""
        return float(self.values[PANELS[panel][2]])


def kernels(source: FigureInputs) -> Canvas:
    """Bars of each kernel, grouped by shape: median time, with quartiles as whiskers, and bytes of the weight.

    `panels` of the entry says what is drawn instead. A tick in the bar of a time is the time in which the weight's
    bytes can be read. Kernels without a value are named below, with the reason.
    """
    chosen = source.entry.get("panels") or ["time", "memory"]
    ours = _ours(source)
    shapes = list(dict.fromkeys(ours["shape"]))
    headings, bars = _rows(ours, _published(source, shapes), shapes, chosen)
    rows = len(headings) * (1 + APART) + len(bars)
    row = min(ROW, HEIGHT / max(rows, 1))
    sheet = new_canvas(len(chosen), across=len(chosen), height=max(1.2, row * rows + 0.6), sharey=True)
    sheet.figure.get_layout_engine().set(w_pad=0.14)  # small text is wider at the resolution of a screen
    for name, panel in zip(chosen, sheet.panels):
        _draw(panel, name, bars, TEXT * row / ROW)
        _row_axis(panel, headings, bars, TEXT * row / ROW)
    drawn = {bar.whose for bar in bars}
    sheet.handles += [_patch(name) for name in FILLS if name in drawn]
    sheet.handles += _time_handles(bars) if "time" in chosen else []
    sheet.remarks += _remarks(ours, shapes)
    return sheet


def _rows(
    ours: pd.DataFrame, printed: pd.DataFrame, shapes: list[str], chosen: list[str]
) -> tuple[dict[str, float], list[_Bar]]:
    """(row of each shape's heading, bars) from the top: a shape's heading, PyTorch's kernels, ours, published ones.

    Kernels without a value in any of the chosen panels are left out.
    """
    ours = ours.assign(whose=[_whose(name) for name in ours["kernel"]])
    found = pd.concat([frame for frame in (ours, printed.assign(whose=PUBLISHED)) if len(frame)])
    found = found[found[[PANELS[name][2] for name in chosen]].notna().any(axis=1)]
    headings, bars, y = {}, [], 0.0
    for shape in shapes:
        here = found[found["shape"] == shape]
        if here.empty:
            continue
        headings[shape] = y
        for whose in FILLS:
            for _, values in here[here["whose"] == whose].iterrows():
                y += 1
                bars.append(_Bar(y, values["kernel"], whose, values))
        y += 1 + APART
    return headings, bars


def _whose(kernel: str) -> str:
    return OWN if kernel.startswith("packed") or kernel.endswith("(CUTLASS)") else PYTORCH


def _draw(panel: Axes, name: str, bars: list[_Bar], size: float) -> None:
    """The bars that have a value in this panel, each with its number at its end. size: of the numbers, in points."""
    drawn = [bar for bar in bars if np.isfinite(bar.of(name))]
    small = name == "speed" and max((bar.of(name) for bar in drawn), default=1.0) < 1
    scale = 1000.0 if small else 1.0
    reads = [_read_ms(bar) for bar in drawn if name == "time" and _read_ms(bar) is not None]
    _value_axis(panel, name, [scale * bar.of(name) for bar in drawn], reads, "G" if small else "T")
    for bar in drawn:
        length = scale * bar.of(name)
        panel.barh(bar.y, length, height=0.84, edgecolor="black", linewidth=0.5, zorder=2, **FILLS[bar.whose])
        end = max(length, _whiskers(panel, bar)) if name == "time" else length
        place = {"xytext": (2.5, 0), "textcoords": "offset points", "va": "center_baseline", "fontsize": size}
        panel.annotate(_spelled(length), (end, bar.y), zorder=4, **place)


def _spelled(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _whiskers(panel: Axes, bar: _Bar) -> float:
    """Draw the quartiles of a time, and the time in which the weight's bytes can be read; the upper quartile."""
    low, high = float(bar.values["p25_ms"]), float(bar.values["p75_ms"])
    if (bound := _read_ms(bar)) is not None:
        panel.plot([bound, bound], [bar.y - 0.42, bar.y + 0.42], color="black", linewidth=1.6, zorder=3)
    if not np.isfinite(high):
        return 0.0
    middle = bar.of("time")
    spread = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
    panel.errorbar(middle, bar.y, xerr=spread, color="black", linewidth=0.8, capsize=1.8, capthick=0.8, zorder=3)
    return high


def _read_ms(bar: _Bar) -> float | None:
    percent = bar.of("bound")
    return bar.of("time") * percent / 100 if np.isfinite(percent) else None


def _value_axis(panel: Axes, name: str, lengths: list[float], ticks: list[float], prefix: str) -> None:
    """From zero, or logarithmic where the bars span more than a decade; with room for the ticks and the numbers."""
    label, unit, *_ = PANELS[name]
    unit = unit.format(prefix)
    least, most = min(lengths, default=0), max(lengths, default=0)
    if not lengths:
        panel.set_xticks([])
    elif name == "bound" or most <= 10 * least:
        panel.set_xlim(0, most * ROOM)
    else:
        panel.set_xscale("log")
        low, unit = min([least / 4, *(tick / 1.5 for tick in ticks)]), f"{unit}, log scale"
        panel.set_xlim(low, most * (most / low) ** (ROOM - 1))
        panel.xaxis.set_major_locator(LogLocator(subs=(1,)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel(f"{label}\n({unit})")


def _row_axis(panel: Axes, headings: dict[str, float], bars: list[_Bar], size: float) -> None:
    """Kernels as labels of their rows, with the shape above each group."""
    names = dict(sorted([*((y, shape) for shape, y in headings.items()), *((bar.y, bar.name) for bar in bars)]))
    panel.set_yticks(list(names), list(names.values()), fontsize=size)
    for y, label in zip(names, panel.get_yticklabels()):
        label.set_fontweight("bold" if y in headings.values() else "normal")
    panel.tick_params(axis="y", length=0)
    panel.grid(False, axis="y")
    panel.set_axisbelow(True)
    panel.set_ylim(max(names, default=0) + 0.7, -0.7)


def _patch(whose: str) -> Patch:
    return Patch(label=whose, edgecolor="black", linewidth=0.5, **FILLS[whose])


def _time_handles(bars: list[_Bar]) -> list:
    timed = [bar for bar in bars if np.isfinite(bar.of("time")) and bar.whose != PUBLISHED]
    handles = [handle("quartiles", "|", "-", color="black", linewidth=0.8)] if timed else []
    if any(_read_ms(bar) is not None for bar in timed):
        handles.append(handle("time to read the weight", "|", color="black", markeredgewidth=1.6, markersize=7))
    return handles


def _ours(source: FigureInputs) -> pd.DataFrame:
    """The benchmark's lines of the entry's device, shapes and kernels."""
    device = source.entry.get("device")
    if not device:
        raise ObrError(f"Figure {source.entry.get('title', '')!r} names no device; set `device`, such as cpu.")
    times = pd.read_csv(require(paths.path(source.results, "kernels", device=device)))
    for column in ("gop", "weight_bytes", "of_bound", "caution"):
        if column not in times:
            times[column] = np.nan
    times = times.assign(mib=times["weight_bytes"] / 2**20, percent=100 * times["of_bound"])
    for key, column in (("shapes", "shape"), ("kernels", "kernel")):
        wanted, there = source.entry.get(key), list(dict.fromkeys(times[column]))
        unknown = sorted(set(wanted or []) - set(there))
        if unknown:
            raise ObrError(f"The kernel benchmark has no {column} {unknown[0]!r}; it has {', '.join(there)}.")
        times = times[times[column].isin(wanted)] if wanted else times
    return times


def _remarks(times: pd.DataFrame, shapes: list[str]) -> list[str]:
    """What a reader must know of the kernels' times, and why others have none; kernels of one reason together."""
    times = times.assign(timed=times["median_ms"].notna())
    reasons: dict[tuple, list[str]] = {}
    for (name, status, timed), group in times[times["status"] != "ok"].groupby(
        ["kernel", "status", "timed"], sort=False
    ):
        reason = f": {status.removeprefix('ok, ')}" if timed else f" {status}"
        reasons.setdefault((reason, tuple(group["shape"])), []).append(name)
    remarks = []
    for (reason, where), names in reasons.items():
        place = "" if len(where) == len(shapes) else f" ({', '.join(where)})"
        remarks.append(f"{', '.join(names)}{place}{reason}")
    return remarks + _cautions(times[times["timed"]])


def _cautions(timed: pd.DataFrame) -> list[str]:
    """What is said of the caches, with the kernels' names unless it concerns all of them."""
    remarks = []
    for caution, group in timed.dropna(subset="caution").groupby("caution", sort=False):
        names = [f"{name} ({', '.join(part['shape'])})" for name, part in group.groupby("kernel", sort=False)]
        remarks.append(caution if len(group) == len(timed) else f"{', '.join(names)}: {caution}")
    return remarks


def _published(source: FigureInputs, shapes: list[str]) -> pd.DataFrame:
    """Published values of the shapes drawn, in the columns of the benchmark."""
    columns = ["shape", "kernel", *DRAWN, "p25_ms", "p75_ms"]
    filters = source.entry.get("published")
    if not filters or source.published is None:
        return pd.DataFrame(columns=columns, dtype=float)
    names = {shape["published"]: shape.get("name") for shape in source.shapes if shape.get("published")}
    found = select(source.published, **filters)
    found = found[found["model"].isin([name for name, shape in names.items() if shape in shapes])]
    metrics = {metric: column for _, _, column, metric in PANELS.values() if metric}
    wide = found[found["metric"].isin(metrics)].pivot_table(
        index=["model", "method"], columns="metric", values="value", aggfunc="first", sort=False
    )
    wide = wide.rename(columns=metrics).reindex(columns=DRAWN).reset_index()
    wide = wide.assign(shape=wide["model"].map(names), kernel=wide["method"] + " (published)")
    return wide.assign(p25_ms=np.nan, p75_ms=np.nan)[columns]
