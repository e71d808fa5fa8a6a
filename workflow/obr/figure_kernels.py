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


def kernels(source: Source) -> Sheet:
    """Median time (bars: quartiles) and dense-equivalent speed of each kernel, by shape; hollow is published."""
    device = source.entry.get("device")
    if not device:
        raise ObrError(f"Figure {source.entry.get('title', '')!r} names no device; set `device`, such as cpu.")
    times = pd.read_csv(require(source.results / "kernels" / f"{device}.csv"))
    wanted = source.entry.get("shapes")
    if wanted:
        unknown = sorted(set(wanted) - set(times["shape"]))
        if unknown:
            raise ObrError(
                f"The kernel benchmark has no shape {unknown[0]!r}; it has {', '.join(set(times['shape']))}."
            )
        times = times[times["shape"].isin(wanted)]
    shapes = list(dict.fromkeys(times["shape"]))
    printed = _published(source, shapes)
    timed = times[times["median_ms"].notna()]
    fastest = max(timed["tops_dense"].max(), printed["tops_dense"].max() if len(printed) else 0)
    unit, scale = ("Gop/s", 1000) if fastest < 1 else ("Top/s", 1)
    sheet = new_sheet(2, across=2, height=2.9)
    sheet.panels[0].set(ylabel="Median time (ms)")
    sheet.panels[1].set(ylabel=f"Dense-equivalent speed ({unit})")
    series = [(name, timed, "full") for name in dict.fromkeys(timed["kernel"])]
    series += [(name, printed, "none") for name in dict.fromkeys(printed["kernel"])]
    offsets = np.linspace(-0.36, 0.36, len(series)) if len(series) > 1 else [0.0]
    for (name, rows, fill), offset, colour, marker in zip(series, offsets, cycle(COLOURS), cycle(MARKERS)):
        part = rows[rows["kernel"] == name].groupby("shape").first().reindex(shapes)
        places = np.arange(len(shapes)) + offset
        spread = [part["median_ms"] - part["p25_ms"], part["p75_ms"] - part["median_ms"]]
        style = {"color": colour, "marker": marker, "linestyle": "", "fillstyle": fill}
        sheet.panels[0].errorbar(places, part["median_ms"], yerr=spread, capsize=2, **style)
        sheet.panels[1].plot(places, scale * part["tops_dense"], **style)
        sheet.handles.append(handle(name, marker, color=colour, fillstyle=fill))
    for panel in sheet.panels:
        _shape_axis(panel, shapes)
        log_scale(panel)
    for status, group in timed[timed["status"] != "ok"].groupby("status", sort=False):
        sheet.remarks.append(f"{', '.join(dict.fromkeys(group['kernel']))}: {status.removeprefix('ok, ')}")
    missing = times[times["median_ms"].isna()]
    for (name, reason), group in missing.groupby(["kernel", "status"], sort=False):
        where = "" if len(group) == len(shapes) else f" ({', '.join(group['shape'])})"
        sheet.remarks.append(f"{name}{where} not timed: {reason}")
    return sheet


def _published(source: Source, shapes: list[str]) -> pd.DataFrame:
    """Published latencies and dense-equivalent speeds of the shapes drawn, in the columns of the benchmark."""
    columns = ["shape", "kernel", "median_ms", "p25_ms", "p75_ms", "tops_dense"]
    filters = source.entry.get("published")
    if not filters or source.published is None:
        return pd.DataFrame(columns=columns)
    names = {shape["published"]: shape.get("name") for shape in source.shapes if shape.get("published")}
    found = select(source.published, **filters)
    found = found[found["model"].isin([name for name, shape in names.items() if shape in shapes])]
    wide = found[found["metric"].isin(["latency_ms", "tops"])].pivot_table(
        index=["model", "method"], columns="metric", values="value", aggfunc="first", sort=False
    )
    wide = wide.reindex(columns=["latency_ms", "tops"]).reset_index()
    rows = pd.DataFrame({"shape": wide["model"].map(names), "kernel": wide["method"] + " (published)"})
    rows = rows.assign(median_ms=wide["latency_ms"], tops_dense=wide["tops"])
    return rows.assign(p25_ms=rows["median_ms"], p75_ms=rows["median_ms"])[columns]


def _shape_axis(panel: Axes, shapes: list[str]) -> None:
    """Shapes as places along x, parted by lines so that each kernel's dots are seen to belong together."""
    names = [textwrap.fill(shape, 12, break_long_words=False) for shape in shapes]
    turned = sum(max(map(len, name.split("\n"))) + 2 for name in names) > 45
    panel.set_xticks(range(len(shapes)), names, rotation=40 if turned else 0, ha="right" if turned else "center")
    panel.set_xlim(-0.5, len(shapes) - 0.5)
    panel.grid(False, axis="x")
    for place in range(1, len(shapes)):
        panel.axvline(place - 0.5, color="0.85", linewidth=0.6, zorder=0)
