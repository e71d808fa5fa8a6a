"""Figures for print: perplexity against size, sweeps over a recipe field, layer errors, kernel times.

A figure is an entry of the config; `kind` picks one function of KINDS, which draws what the artefacts hold.
"""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from obr.artefacts import (
    Row,
    metrics_of,
    model_label,
    number,
    read_manifest,
    read_perplexity,
    require,
    resolve_rows,
)
from obr.errors import ObrError
from obr.files import whole
from obr.published import Quotes

COLUMN, PAGE = 3.5, 7.0  # inches: one column of a two-column paper, and its whole width
# Okabe and Ito's palette, told apart by colour-blind readers; its yellow is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
METHODS = {
    "dense": ("Dense", "*"),
    "rtn": ("RTN", "o"),
    "gptq": ("GPTQ", "s"),
    "magnitude": ("Magnitude", "v"),
    "wanda": ("Wanda", "^"),
    "sparsegpt_gptq": ("SparseGPT+GPTQ", "D"),
    "obr_rtn": ("OBR (RTN)", "P"),
    "obr_gptq": ("OBR (GPTQ)", "X"),
}
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
SWEPT = {"sparsity": "Sparsity (%)", "alpha": "α", "bits": "Weight bits"}
LAYER_KINDS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass
class Sheet:
    """A figure being drawn: its panels, the handles of its one legend, and what it has to confess."""

    figure: Figure
    panels: list[Axes]
    handles: list[Line2D | Patch] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@dataclass
class Source:
    """What a kind draws from: the entry with its rows resolved, and where the artefacts lie."""

    entry: dict
    models: dict
    results: Path
    rows: list[Row]
    quotes: Quotes | None

    @property
    def labels(self) -> dict[str, str]:
        if not self.entry.get("models"):
            raise ObrError(f"Figure {self.entry.get('title', '')!r} has no models; list model keys.")
        return {key: model_label(self.models, key) for key in self.entry["models"]}


def draw(entry: dict, recipes: dict, models: dict, results: Path, published: Path, out_stem: Path) -> None:
    """Draw one figure of the config to `out_stem` + .pdf and .png (200 dpi).

    Raises:
        ObrError: the kind is unknown, an artefact is missing (the sentence names the target to build), or the
            entry's rows cannot be told apart in it.
    """
    kind = entry.get("kind")
    if kind not in KINDS:
        raise ObrError(f"Figure kind {kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    rows = [] if kind == "kernels" else resolve_rows(entry, recipes)
    for model in entry.get("models") or []:
        model_label(models, model)
    quotes = Quotes(entry, models, rows, published) if rows else None
    with matplotlib.rc_context(STYLE):
        sheet = KINDS[kind](Source(entry, models, Path(results), rows, quotes))
        if entry.get("title"):
            sheet.figure.suptitle(textwrap.fill(entry["title"], int(sheet.figure.get_figwidth() * 12)))
        _legend(sheet)
        _save(sheet.figure, Path(out_stem))


# --- Kinds --------------------------------------------------------------------------------------------


def perplexity_bits(source: Source) -> Sheet:
    """Perplexity against theoretical bits per weight: a panel per model, a colour per activation setting.

    The dense model is a dashed line; hollow points are published values. Settings are set a little apart, since
    most recipes have the same size.
    """
    metric, sheet = _only_text(source.entry), _sheet(len(source.labels), height=3.0)
    compressed = [row for row in source.rows if row.recipe.method != "dense"]
    colours = dict(zip(dict.fromkeys(map(_activations, compressed)), cycle(COLOURS)))
    marks = _marks(compressed)
    for panel, (model, label) in zip(sheet.panels, source.labels.items()):
        panel.set(title=label, xlabel="Bits per weight", ylabel=f"{metric.heading} perplexity")
        _dense_lines(source, panel, model, metric.key)
        sizes = [_theoretical_bits(source, model, row) for row in compressed]
        for row, place in zip(compressed, _apart(sizes, list(map(_activations, compressed)))):
            value = _perplexity(source, model, row, metric.key)
            style = {"color": colours[_activations(row)], "marker": marks[row.key][1], "linestyle": ""}
            panel.plot(place, value, **style)
            printed = source.quotes.value(model, row, metric.published)
            panel.plot(place, printed, fillstyle="none", markersize=8, **style)
            _confess(sheet, f"{label}, {row.label}", value)
        _scale(panel)
        _ticks(panel, [round(size, 2) for size in sizes])
    sheet.handles += _dense_handles(source.rows)
    sheet.handles += [_handle(name, marker, color="0.3") for name, marker in dict.fromkeys(marks.values())]
    sheet.handles += [Patch(color=c, label=group) for group, c in colours.items()]
    _published_handle(sheet)
    return sheet


def _theoretical_bits(source: Source, model: str, row: Row) -> float:
    return float(read_manifest(source.results, model, row)["bits_per_weight"]["theoretical"])


def _apart(sizes: list[float], groups: list[str]) -> list[float]:
    """Sizes moved a little: by the group that each belongs to, and within it where several are the same."""
    names, span = list(dict.fromkeys(groups)), max(1.0, max(sizes, default=0) - min(sizes, default=0))
    places, seen = [], []
    for size, group in zip(sizes, groups):
        among, before = list(zip(sizes, groups)).count((size, group)), seen.count((size, group))
        seen.append((size, group))
        within = 0.02 * (before - (among - 1) / 2)
        places.append(size + span * (0.13 * (names.index(group) - (len(names) - 1) / 2) + within))
    return places


def _marks(rows: list[Row]) -> dict[str, tuple[str, str]]:
    """(name, marker) by recipe: its method's, or its own where that is taken within its colour."""
    spare = cycle(m for m in MARKERS if m not in {METHODS[row.recipe.method][1] for row in rows})
    taken, marks = set(), {}
    for row in rows:
        place = (row.recipe.method, _activations(row))
        marks[row.key] = METHODS[row.recipe.method] if place not in taken else (row.label, next(spare))
        taken.add(place)
    return marks


def sweep(source: Source) -> Sheet:
    """Perplexity against a recipe field (`x`): a panel per model, a line per value of `group_by`."""
    x, group_by = source.entry.get("x"), source.entry.get("group_by") or "method"
    if x not in SWEPT:
        raise ObrError(f"Sweep over {x!r} is not possible; set x to one of {', '.join(SWEPT)}.")
    metric, sheet = _only_text(source.entry), _sheet(len(source.labels))
    lines = _sweep_lines(source.rows, x, group_by)
    styles = dict(zip(lines, zip(cycle(COLOURS), cycle(MARKERS))))
    for panel, (model, label) in zip(sheet.panels, source.labels.items()):
        panel.set(title=label, xlabel=SWEPT[x], ylabel=f"{metric.heading} perplexity")
        _dense_lines(source, panel, model, metric.key)
        for group, line in lines.items():
            colour, marker = styles[group]
            values = [_perplexity(source, model, row, metric.key) for row in line.values()]
            printed = [source.quotes.value(model, row, metric.published) for row in line.values()]
            panel.plot(list(line), values, color=colour, marker=marker)
            panel.plot(list(line), printed, color=colour, marker=marker, fillstyle="none", linestyle=":")
            for row, value in zip(line.values(), values):
                _confess(sheet, f"{label}, {row.label}", value)
        _scale(panel)
        _ticks(panel, [place for line in lines.values() for place in line])
    sheet.handles += _dense_handles(source.rows)
    sheet.handles += [_handle(g, marker, color=colour, linestyle="-") for g, (colour, marker) in styles.items()]
    _published_handle(sheet)
    return sheet


def _sweep_lines(rows: list[Row], x: str, group_by: str) -> dict[str, dict[float, Row]]:
    """Rows by line, each line by its x in rising order. Raises ObrError if two rows share a place."""
    lines: dict[str, dict[float, Row]] = {}
    for row in (row for row in rows if row.recipe.method != "dense"):
        if not hasattr(row.recipe, group_by):
            raise ObrError(f"Recipes have no field {group_by!r} to group by; use method, mask, rotation or hessian.")
        group = getattr(row.recipe, group_by)
        line = lines.setdefault(METHODS[group][0] if group_by == "method" else str(group), {})
        place = getattr(row.recipe, x) * (100 if x == "sparsity" else 1)
        if place in line:
            raise ObrError(
                f"Rows {line[place].key!r} and {row.key!r} share {x} {place:g} and {group_by} {group!r}; "
                "set group_by to a field in which they differ."
            )
        line[place] = row
    return {group: dict(sorted(line.items())) for group, line in lines.items()}


def layer_error(source: Source) -> Sheet:
    """Relative error of the layers' outputs by block: a panel per kind of layer, a line per recipe.

    Rows on one checkpoint are drawn once; the dense model, which has no error, not at all.
    """
    by_checkpoint: dict[str, Row] = {}
    for row in (row for row in source.rows if row.recipe.method != "dense"):
        by_checkpoint.setdefault(row.checkpoint, row)
    rows = list(by_checkpoint.values())
    tables = {model: [_layers(source.results, model, row) for row in rows] for model in source.labels}
    found = list(dict.fromkeys(kind for layers in tables.values() for t in layers for kind in t["kind"]))
    kinds = [k for k in LAYER_KINDS if k in found] + [k for k in found if k not in LAYER_KINDS]
    cells = 4 * -(-len(kinds) // 4)  # each model begins on a new line of four panels
    sheet = _sheet(cells * len(tables), across=4, height=1.5, sharey=True)
    for i, (model, label) in enumerate(source.labels.items()):
        panels = sheet.panels[cells * i : cells * (i + 1)]
        for panel, kind in zip(panels, kinds):
            panel.set_title(f"{label}: {kind}" if len(tables) > 1 else kind)
            for layers, colour, marker in zip(tables[model], cycle(COLOURS), cycle(MARKERS)):
                part = layers[layers["kind"] == kind]
                every = max(1, len(part) // 6)
                panel.plot(part["block"], part["relative_error"], color=colour, marker=marker, markevery=every)
            panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        for panel in panels[max(0, len(kinds) - 4) : len(kinds)]:
            panel.set_xlabel("Block")
        for panel in panels[len(kinds) :]:
            panel.set_axis_off()
        for row, layers in zip(rows, tables[model]):
            if layers["relative_error"].isna().all():
                sheet.remarks.append(f"{label}, {row.label}: compressed without calibration data, no error known")
    _scale(sheet.panels[0], sheet.panels)
    sheet.figure.supylabel("Relative squared output error", fontsize=8)
    for row, colour, marker in zip(rows, cycle(COLOURS), cycle(MARKERS)):
        sheet.handles.append(_handle(row.label, marker, color=colour, linestyle="-"))
    return sheet


def _layers(results: Path, model: str, row: Row) -> pd.DataFrame:
    """A checkpoint's layer report, with the layer's bare kind ("q" of "self_attn.q_proj")."""
    path = require(results / "compressed" / model / row.checkpoint / "layers.csv")
    layers = pd.read_csv(path)
    return layers.assign(kind=layers["layer"].str.split(".").str[-1].str.removesuffix("_proj"))


def kernels(source: Source) -> Sheet:
    """Median time (bars: quartiles) and dense-equivalent speed of each kernel, by shape."""
    device = source.entry.get("device")
    if not device:
        raise ObrError(f"Figure {source.entry.get('title', '')!r} names no device; set `device`, such as cpu.")
    times = pd.read_csv(require(source.results / "kernels" / f"{device}.csv"))
    sheet = _sheet(2, across=2, height=2.9)
    timed = times[times["median_ms"].notna()]
    shapes, names = list(dict.fromkeys(times["shape"])), list(dict.fromkeys(timed["kernel"]))
    slow = timed["tops_dense"].max() < 1
    unit, scale = ("Gop/s", 1000) if slow else ("Top/s", 1)
    sheet.panels[0].set(ylabel="Median time (ms)")
    sheet.panels[1].set(ylabel=f"Dense-equivalent speed ({unit})")
    offsets = np.linspace(-0.32, 0.32, len(names)) if len(names) > 1 else [0.0]
    for name, offset, colour, marker in zip(names, offsets, cycle(COLOURS), cycle(MARKERS)):
        part = timed[timed["kernel"] == name].drop_duplicates("shape").set_index("shape").reindex(shapes)
        places = np.arange(len(shapes)) + offset
        spread = [part["median_ms"] - part["p25_ms"], part["p75_ms"] - part["median_ms"]]
        style = {"color": colour, "marker": marker, "linestyle": ""}
        sheet.panels[0].errorbar(places, part["median_ms"], yerr=spread, capsize=2, **style)
        sheet.panels[1].plot(places, scale * part["tops_dense"], **style)
        sheet.handles.append(_handle(name, marker, color=colour))
    for panel in sheet.panels:
        _shape_axis(panel, shapes)
        _scale(panel)
    missing = times[times["median_ms"].isna()]
    for (name, reason), group in missing.groupby(["kernel", "status"], sort=False):
        where = "" if len(group) == len(shapes) else f" ({', '.join(group['shape'])})"
        sheet.remarks.append(f"{name}{where} not timed: {reason}")
    return sheet


def _shape_axis(panel: Axes, shapes: list[str]) -> None:
    """Shapes as places along x, parted by lines so that each kernel's dots are seen to belong together."""
    names = [textwrap.fill(shape, 12, break_long_words=False) for shape in shapes]
    turned = sum(max(map(len, name.split("\n"))) + 2 for name in names) > 45
    panel.set_xticks(range(len(shapes)), names, rotation=40 if turned else 0, ha="right" if turned else "center")
    panel.set_xlim(-0.5, len(shapes) - 0.5)
    panel.grid(False, axis="x")
    for place in range(1, len(shapes)):
        panel.axvline(place - 0.5, color="0.85", linewidth=0.6, zorder=0)


KINDS: dict[str, Callable[[Source], Sheet]] = {
    "perplexity_bits": perplexity_bits,
    "sweep": sweep,
    "layer_error": layer_error,
    "kernels": kernels,
}


# --- Parts --------------------------------------------------------------------------------------------


def _sheet(count: int, across: int = 3, height: float = 2.2, sharey: bool = False) -> Sheet:
    """`count` panels, row by row: one column wide if there is one panel, else a page."""
    across = min(count, across)
    down = -(-count // across)
    figure = Figure(figsize=(COLUMN if count == 1 else PAGE, height * down + 0.8), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=sharey).flatten()
    for spare in axes[count:]:
        spare.set_axis_off()
    return Sheet(figure, list(axes[:count]))


def _only_text(entry: dict):
    metrics = [m for m in metrics_of({**entry, "zero_shot": [], "mean": False}) if m.lower_is_better]
    if len(metrics) != 1:
        raise ObrError(f"Figure {entry.get('title', '')!r} needs one text in `perplexity`, not {len(metrics)}.")
    return metrics[0]


def _activations(row: Row) -> str:
    """The part of a setting that the weights' bits leave: "A4KV4", or that nothing else is quantised."""
    rest = row.recipe.setting.removeprefix(f"W{row.recipe.bits}")
    return "weights only" if rest == "A16KV16" else rest


def _scale(panel: Axes, drawn: list[Axes] | None = None) -> None:
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


def _handle(label: str, marker: str, linestyle: str = "", **style) -> Line2D:
    return Line2D([], [], label=label, marker=marker, linestyle=linestyle, **style)


def _dense_handles(rows: list[Row]) -> list[Line2D]:
    dense = any(row.recipe.method == "dense" for row in rows)
    return [_handle(METHODS["dense"][0], "", "--", color="0.4", linewidth=1)] if dense else []


def _dense_lines(source: Source, panel: Axes, model: str, text: str) -> None:
    for row in (row for row in source.rows if row.recipe.method == "dense"):
        panel.axhline(_perplexity(source, model, row, text), color="0.4", linestyle="--", linewidth=1, zorder=1)


def _perplexity(source: Source, model: str, row: Row, text: str) -> float:
    return number(read_perplexity(source.results, model, row, text)["value"])


def _ticks(panel: Axes, values: list[float]) -> None:
    """Ticks at the values themselves, with half a step of air, while they are few enough to be read."""
    values = sorted(set(values))
    if len(values) == 1:
        panel.set_xlim(values[0] - 0.5, values[0] + 0.5)
    span = values[-1] - values[0]
    if len(values) <= 8 and all(b - a > span / 15 for a, b in pairwise(values)):
        panel.set_xticks(values, [f"{value:g}" for value in values])
    panel.margins(x=0.12)


def _published_handle(sheet: Sheet) -> None:
    hollow = [line for p in sheet.panels for line in p.get_lines() if line.get_fillstyle() == "none"]
    if any(np.isfinite(np.asarray(line.get_ydata(), dtype=float)).any() for line in hollow):
        sheet.handles.append(_handle("hollow: published", "o", fillstyle="none", color="0.3"))


def _confess(sheet: Sheet, what: str, value: float) -> None:
    if not np.isfinite(value):
        sheet.remarks.append(f"{what}: perplexity {value}, not shown")


def _legend(sheet: Sheet) -> None:
    """One legend below all panels; remarks stand over it, wrapped to the figure's width."""
    width = sheet.figure.get_figwidth()
    title = "\n".join(textwrap.fill(remark, int(width * 17)) for remark in sheet.remarks)
    longest = max((len(handle.get_label()) for handle in sheet.handles), default=1)
    columns = max(1, int(width * 17 / (longest + 8)))
    sheet.figure.legend(
        handles=sheet.handles,
        loc="outside lower center",
        ncols=min(columns, max(1, len(sheet.handles))),
        frameon=False,
        title=title or None,
    )


def _save(figure: Figure, stem: Path) -> None:
    for suffix, metadata in (("pdf", {"CreationDate": None}), ("png", {})):
        with whole(stem.with_name(f"{stem.name}.{suffix}")) as partial:
            figure.savefig(partial, format=suffix, dpi=200, metadata=metadata)
