"""Figures of the kernel benchmark, with published times beside ours."""

import textwrap
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from obr.artefacts import require
from obr.errors import ObrError
from obr.published import select
from obr.sheet import COLOURS, MARKERS, Sheet, Source, handle, log_scale, new_sheet

# What a panel shows -> (label, column of the benchmark's file, published metric).
PANELS = {
    "time": ("Median time (ms)", "median_ms", "latency_ms"),
    "speed": ("Dense-equivalent speed ({}op/s)", "tops_dense", "tops"),
    "operations": ("Operations carried out ({}op)", "gop", "gflop"),
    "memory": ("Weight in memory (MiB)", "mib", "memory_mb"),
    "bound": ("Share of the read bound (%)", "percent", None),
}
DRAWN = [column for _, column, _ in PANELS.values()]


def kernels(source: Source) -> Sheet:
    """Median time (bars: quartiles) and dense-equivalent speed of each kernel, by shape; hollow is published.

    `panels` of the entry says what else is drawn: operations, the weight's bytes, the share of the read bound.
    """
    chosen = source.entry.get("panels") or ["time", "speed"]
    ours = _ours(source)
    shapes = list(dict.fromkeys(ours["shape"]))
    printed = _published(source, shapes)
    series = [(name, ours, "full") for name in dict.fromkeys(ours["kernel"])]
    series += [(name, printed, "none") for name in dict.fromkeys(printed["kernel"])]
    series = [s for s in series if any(_has(s, PANELS[name][1]) for name in chosen)]
    looks = list(zip(cycle(COLOURS), cycle(MARKERS), range(len(series))))
    sheet = new_sheet(len(chosen), across=2 if len(chosen) == 2 else 3, height=2.9)
    for name, panel in zip(chosen, sheet.panels):
        _draw(panel, name, [(*s, *look[:2]) for s, look in zip(series, looks)], shapes)
    for (name, _, fill), (colour, marker, _) in zip(series, looks):
        sheet.handles.append(handle(name, marker, color=colour, fillstyle=fill))
    sheet.remarks += _remarks(ours, shapes)
    return sheet


def _has(series: tuple, column: str) -> bool:
    kernel, rows = series[:2]
    return bool(rows.loc[rows["kernel"] == kernel, column].notna().any())


def _draw(panel: Axes, name: str, series: list[tuple], shapes: list[str]) -> None:
    """Those of the series (name, rows, fill, colour, marker) that have values of this panel, beside each other."""
    label, column, _ = PANELS[name]
    series = [s for s in series if _has(s, column)]
    most = max((rows.loc[rows["kernel"] == kernel, column].max() for kernel, rows, *_ in series), default=1.0)
    unit, scale = ("G", 1000.0) if name == "speed" and most < 1 else ("T" if name == "speed" else "G", 1.0)
    panel.set(ylabel=label.format(unit))
    reach = min(0.32, 0.06 * (len(series) - 1))  # to either side of a shape's place; 0.5 is the line between two
    offsets = np.linspace(-reach, reach, len(series))
    for (kernel, found, fill, colour, marker), offset in zip(series, offsets):
        part = found[found["kernel"] == kernel].groupby("shape").first().reindex(shapes)
        places, values = np.arange(len(shapes)) + offset, scale * part[column].astype(float)
        style = {"color": colour, "marker": marker, "linestyle": "", "fillstyle": fill}
        spread = [values - part["p25_ms"], part["p75_ms"] - values] if name == "time" else None
        panel.errorbar(places, values, yerr=spread, capsize=2, **style)
    log_scale(panel)
    if panel.get_yscale() == "linear":
        panel.set_ylim(bottom=0)
    _shape_axis(panel, shapes)


def _ours(source: Source) -> pd.DataFrame:
    """The benchmark's lines of the entry's device, shapes and kernels."""
    device = source.entry.get("device")
    if not device:
        raise ObrError(f"Figure {source.entry.get('title', '')!r} names no device; set `device`, such as cpu.")
    times = pd.read_csv(require(source.results / "kernels" / f"{device}.csv"))
    for column in ("gop", "weight_bytes", "of_bound"):
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
    """What is to be known of a kernel's times, and why others have none; kernels of one reason together."""
    said: dict[tuple, list[str]] = {}
    for (name, status), group in times[times["status"] != "ok"].groupby(["kernel", "status"], sort=False):
        timed = bool(group["median_ms"].notna().any())
        said.setdefault((status.removeprefix("ok, "), timed, tuple(group["shape"])), []).append(name)
    remarks = []
    for (reason, timed, where), names in said.items():
        place = "" if len(where) == len(shapes) else f" ({', '.join(where)})"
        remarks.append(f"{', '.join(names)}{place}{'' if timed else ' not timed'}: {reason}")
    return remarks


def _published(source: Source, shapes: list[str]) -> pd.DataFrame:
    """Published values of the shapes drawn, in the columns of the benchmark."""
    columns = ["shape", "kernel", *DRAWN, "p25_ms", "p75_ms"]
    filters = source.entry.get("published")
    if not filters or source.published is None:
        return pd.DataFrame(columns=columns, dtype=float)
    names = {shape["published"]: shape.get("name") for shape in source.shapes if shape.get("published")}
    found = select(source.published, **filters)
    found = found[found["model"].isin([name for name, shape in names.items() if shape in shapes])]
    metrics = {metric: column for _, column, metric in PANELS.values() if metric}
    wide = found[found["metric"].isin(metrics)].pivot_table(
        index=["model", "method"], columns="metric", values="value", aggfunc="first", sort=False
    )
    wide = wide.rename(columns=metrics).reindex(columns=DRAWN).reset_index()
    wide = wide.assign(shape=wide["model"].map(names), kernel=wide["method"] + " (published)")
    return wide.assign(p25_ms=np.nan, p75_ms=np.nan)[columns]


def _shape_axis(panel: Axes, shapes: list[str]) -> None:
    """Shapes as places along x, parted by lines so that each kernel's dots are seen to belong together."""
    names = [textwrap.fill(shape, 12, break_long_words=False) for shape in shapes]
    room = 128 * panel.get_position().width  # letters that fit beside each other
    turned = sum(max(map(len, name.split("\n"))) + 2 for name in names) > room
    panel.set_xticks(range(len(shapes)), names, rotation=40 if turned else 0, ha="right" if turned else "center")
    panel.set_xlim(-0.5, len(shapes) - 0.5)
    panel.grid(False, axis="x")
    for place in range(1, len(shapes)):
        panel.axvline(place - 0.5, color="0.85", linewidth=0.6, zorder=0)
