"""What every figure is drawn on and with: its sheet and source, its style, axes, legend and files."""

import textwrap
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from obr.config.methods import METHODS
from obr.errors import ObrError
from obr.report.published import Quotes
from obr.report.table_rows import Metric, Row, metrics_of, model_label, read_perplexity, value_of
from obr.runtime.files import atomic_write

COLUMN, PAGE = 3.5, 7.0  # inches: one column of a two-column paper, and its whole width
REMARK_LINE = 0.13  # inches: the height of a line of 7-point text
# Okabe and Ito's palette, which colour-blind readers can distinguish; its yellow is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "figure.titlesize": 9,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "lines.linewidth": 1.2,
    "lines.markersize": 5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.5,
    "pdf.fonttype": 42,  # embeds TrueType fonts, which publishers ask for
}


@dataclass
class Canvas:
    """A figure being drawn: its panels, the handles of its one legend, and the notes for its caption."""

    figure: Figure
    panels: list[Axes]
    handles: list[Line2D | Patch] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@dataclass
class FigureInputs:
    """What a kind draws from: the entry with its rows resolved, and where the artefacts lie.

    published: all published numbers, where the entry quotes without rows. shapes: of the kernel benchmark.
    """

    entry: dict
    models: dict
    results: Path
    rows: list[Row]
    quotes: Quotes | None
    published: pd.DataFrame | None = None
    shapes: list[dict] = field(default_factory=list)

    @property
    def labels(self) -> dict[str, str]:
        """{model: its label} in the order of the entry. Raises ObrError if the entry has no models."""
        if not self.entry.get("models"):
            raise ObrError(f"Figure {self.entry.get('title', '')!r} has no models; list model keys.")
        return {key: model_label(self.models, key) for key in self.entry["models"]}


def new_canvas(count: int, across: int = 3, height: float = 2.2, sharey: bool = False) -> Canvas:
    """`count` panels, row by row: one column wide if there is one panel, else a page."""
    across = min(count, across)
    down = -(-count // across)
    width, below = (COLUMN, 1.1) if count == 1 else (PAGE, 0.8)  # room for the legend
    figure = Figure(figsize=(width, height * down + below), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=sharey).flatten()
    for spare in axes[count:]:
        spare.set_axis_off()
    return Canvas(figure, list(axes[:count]))


def only_text(entry: dict) -> Metric:
    """The one text of a figure, as a metric. Raises ObrError if there is none, or several."""
    metrics = [m for m in metrics_of({**entry, "zero_shot": [], "mean": False}) if m.lower_is_better]
    if len(metrics) != 1:
        raise ObrError(f"Figure {entry.get('title', '')!r} needs one text in `perplexity`, not {len(metrics)}.")
    return metrics[0]


def activations(row: Row) -> str:
    """The part of a setting that the weights' bits leave: "A4KV4", or that nothing else is quantised."""
    setting = row.recipe.setting
    rest = setting[setting.index("A") :]
    return "weights only" if rest == "A16KV16" else rest


def log_scale(panel: Axes, drawn: list[Axes] | None = None) -> None:
    """A logarithmic y axis where the values span more than a decade, with plain numbers for ticks."""
    lines = [line for axes in drawn or [panel] for line in axes.get_lines() if len(line.get_xdata())]
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in lines] or [np.zeros(0)])
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size or values.max() <= 10 * values.min():
        return
    panel.set_yscale("log")
    decades = np.log10(values.max() / values.min())
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3.5 else (1,)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def handle(label: str, marker: str, linestyle: str = "", **style: Any) -> Line2D:
    """An entry of the legend."""
    return Line2D([], [], label=label, marker=marker, linestyle=linestyle, **style)


DENSE = {"color": "0.4", "linewidth": 1}


def dense_lines(source: FigureInputs, panel: Axes, model: str, metric: Metric) -> list[Line2D]:
    """A dashed line at the perplexity of the uncompressed model, a dotted one where it is published; the legend's
    entries for the lines that were drawn."""
    entries = []
    for row in (row for row in source.rows if row.recipe.method == "dense"):
        panel.axhline(measured(source, model, row, metric.key), linestyle="--", zorder=1, **DENSE)
        entries.append(handle(METHODS["dense"].label, "", "--", **DENSE))
        printed = source.quotes.value(model, row, metric.published)
        if np.isfinite(printed):
            panel.axhline(printed, linestyle=":", zorder=1, **DENSE)
            entries.append(handle(f"{METHODS['dense'].label}, published", "", ":", **DENSE))
    return entries


def unique(handles: list[Line2D]) -> list[Line2D]:
    """One legend entry of each label, in the order of their first."""
    return list({entry.get_label(): entry for entry in handles}.values())


def measured(source: FigureInputs, model: str, row: Row, text: str) -> float:
    """A perplexity from its artefact."""
    return value_of(read_perplexity(source.results, model, row, text))


def place_ticks(panel: Axes, values: list[float]) -> None:
    """Ticks at the values themselves, with half a step of air, while they are few enough to be read."""
    values = sorted(set(values))
    if len(values) == 1:
        panel.set_xlim(values[0] - 0.5, values[0] + 0.5)
    span = values[-1] - values[0]
    if len(values) <= 8 and all(b - a > span / 10 for a, b in pairwise(values)):
        panel.set_xticks(values, [f"{value:g}" for value in values])
    panel.margins(x=0.12)


def published_handle(sheet: Canvas) -> None:
    """The legend's entry for hollow points, if any are drawn."""
    hollow = [line for p in sheet.panels for line in p.get_lines() if line.get_fillstyle() == "none"]
    if any(np.isfinite(np.asarray(line.get_ydata(), dtype=float)).any() for line in hollow):
        sheet.handles.append(handle("hollow: published", "o", fillstyle="none", color="0.3"))


def add_note(sheet: Canvas, what: str, value: float) -> None:
    """A remark on a value that cannot be drawn."""
    if not np.isfinite(value):
        sheet.remarks.append(f"{what}: perplexity {value}, not shown")


def add_legend(sheet: Canvas) -> None:
    """One legend below all panels; remarks stand over it, wrapped to the figure's width.

    Remarks of more than three lines make the figure higher, so that panels keep their size.
    """
    width, height = sheet.figure.get_size_inches()
    title = "\n".join(textwrap.fill(remark, int(width * 17)) for remark in sheet.remarks)
    sheet.figure.set_figheight(height + REMARK_LINE * max(0, title.count("\n") + 1 - 3))
    longest = max((len(handle.get_label()) for handle in sheet.handles), default=1)
    columns = max(1, int(width * 17 / (longest + 8)))
    sheet.figure.legend(
        handles=sheet.handles,
        loc="outside lower center",
        ncols=min(columns, max(1, len(sheet.handles))),
        frameon=False,
        title=title or None,
    )


def save(figure: Figure, stem: Path) -> None:
    """Write `stem` + .pdf and .png."""
    for suffix, metadata in (("pdf", {"CreationDate": None}), ("png", {})):
        with atomic_write(stem.with_name(f"{stem.name}.{suffix}")) as partial:
            figure.savefig(partial, format=suffix, dpi=200, metadata=metadata)
