"""Figures of perplexity: against bits per weight, and along a swept setting."""

from itertools import cycle

import numpy as np
from matplotlib.patches import Patch

from obr.config.methods import METHODS
from obr.errors import ObrError
from obr.report.figures.canvas import (
    COLOURS,
    MARKERS,
    Canvas,
    FigureInputs,
    activations,
    add_note,
    dense_lines,
    handle,
    log_scale,
    measured,
    new_canvas,
    only_text,
    place_ticks,
    published_handle,
    unique,
)
from obr.report.table_rows import Row, read_manifest

SWEPT = {"sparsity": "Sparsity (%)", "alpha": "α", "bits": "Weight bits"}


def perplexity_bits(source: FigureInputs) -> Canvas:
    """Perplexity against theoretical bits per weight: a panel per model, a colour per activation setting, or per
    value of the recipes' field `group_by`.

    The dense model is a dashed line; hollow points are published values, at `published_bits` of their row where it
    has some. Of a row with several seeds the mean is drawn, with a bar of one standard deviation to either side.
    Settings are set a little apart, since most recipes have the same size.
    """
    metric, sheet = only_text(source.entry), new_canvas(len(source.labels), height=3.0)
    compressed = [row for row in source.rows if row.recipe.method != "dense"]
    groups = [_group(row, source.entry.get("group_by")) for row in compressed]
    colours = dict(zip(dict.fromkeys(groups), cycle(COLOURS)))
    marks = _marks(compressed, groups)
    apart, dense = " (colours set a little apart)" if len(colours) > 1 else "", []
    for panel, (model, label) in zip(sheet.panels, source.labels.items()):
        panel.set(title=label, xlabel=f"Bits per weight{apart}", ylabel=f"{metric.heading} perplexity")
        dense += dense_lines(source, panel, model, metric)
        sizes = [_theoretical_bits(source, model, row) for row in compressed]
        for row, group, size, place in zip(compressed, groups, sizes, _apart(sizes, groups)):
            values = [measured(source, model, run, metric.key) for run in row.seeds]
            spread = np.std(values, ddof=1) if len(values) > 1 else None
            style = {"color": colours[group], "marker": marks[row.key][1], "linestyle": ""}
            panel.errorbar(place, np.mean(values), spread, capsize=2, **style)
            printed = source.quotes.value(model, row, metric.published)
            there = place if row.published_bits is None else place - size + row.published_bits
            panel.plot(there, printed, fillstyle="none", markersize=8, **style)
            add_note(sheet, f"{label}, {row.label}", float(np.mean(values)))
        log_scale(panel)
        printed_at = [row.published_bits for row in compressed if row.published_bits is not None]
        place_ticks(panel, [round(size, 2) for size in [*sizes, *printed_at]])
    sheet.handles += unique(dense)
    sheet.handles += [handle(name, marker, color="0.3") for name, marker in dict.fromkeys(marks.values())]
    sheet.handles += [Patch(color=c, label=group) for group, c in colours.items()]
    published_handle(sheet)
    return sheet


def _group(row: Row, field: str | None) -> str:
    if field is None:
        return activations(row)
    if not hasattr(row.recipe, field):
        raise ObrError(f"Recipes have no field {field!r} to group by; use method, mask, rotation or hessian.")
    value = str(getattr(row.recipe, field))
    return "not rotated" if (field, value) == ("rotation", "none") else value


def _theoretical_bits(source: FigureInputs, model: str, row: Row) -> float:
    return float(read_manifest(source.results, model, row)["bits_per_weight"]["theoretical"])


def _apart(sizes: list[float], groups: list[str]) -> list[float]:
    """Sizes moved a little: by the group that each belongs to, and within it where several are the same."""
    names, span = list(dict.fromkeys(groups)), max(1.0, min(1.5, max(sizes, default=0) - min(sizes, default=0)))
    places, seen = [], []
    for size, group in zip(sizes, groups):
        among, before = list(zip(sizes, groups)).count((size, group)), seen.count((size, group))
        seen.append((size, group))
        within = 0.02 * (before - (among - 1) / 2)
        places.append(size + span * (0.13 * (names.index(group) - (len(names) - 1) / 2) + within))
    return places


def _marks(rows: list[Row], groups: list[str]) -> dict[str, tuple[str, str]]:
    """(name, marker) by recipe: its method's, or its own where that is taken for its bits, sparsity and colour, or
    where layers have methods of their own."""
    spare = cycle(m for m in MARKERS if m not in {METHODS[row.recipe.method].marker for row in rows})
    own: dict[str, str] = {}  # markers by label, the same in every colour
    taken, marks = set(), {}
    for row, group in zip(rows, groups):
        place = (row.recipe.method, group, row.recipe.bits, row.recipe.sparsity)
        method = METHODS[row.recipe.method]
        marks[row.key] = (method.label, method.marker)
        if place in taken or row.recipe.allocation:
            marks[row.key] = (row.label, own.setdefault(row.label, next(spare)))
        taken.add(place)
    return marks


def sweep(source: FigureInputs) -> Canvas:
    """Perplexity against a recipe field (`x`): a panel per model, a line per value of `group_by`."""
    x, group_by = source.entry.get("x"), source.entry.get("group_by") or "method"
    if x not in SWEPT:
        raise ObrError(f"Sweep over {x!r} is not possible; set x to one of {', '.join(SWEPT)}.")
    metric, sheet, dense = only_text(source.entry), new_canvas(len(source.labels)), []
    lines = _sweep_lines(source.rows, x, group_by)
    styles = dict(zip(lines, zip(cycle(COLOURS), cycle(MARKERS))))
    for panel, (model, label) in zip(sheet.panels, source.labels.items()):
        panel.set(title=label, xlabel=SWEPT[x], ylabel=f"{metric.heading} perplexity")
        dense += dense_lines(source, panel, model, metric)
        for group, line in lines.items():
            colour, marker = styles[group]
            values = [measured(source, model, row, metric.key) for row in line.values()]
            printed = [source.quotes.value(model, row, metric.published) for row in line.values()]
            panel.plot(list(line), values, color=colour, marker=marker)
            panel.plot(list(line), printed, color=colour, marker=marker, fillstyle="none", linestyle=":")
            for row, value in zip(line.values(), values):
                add_note(sheet, f"{label}, {row.label}", value)
        log_scale(panel)
        place_ticks(panel, [place for line in lines.values() for place in line])
    sheet.handles += unique(dense)
    sheet.handles += [handle(g, marker, color=colour, linestyle="-") for g, (colour, marker) in styles.items()]
    published_handle(sheet)
    return sheet


def _sweep_lines(rows: list[Row], x: str, group_by: str) -> dict[str, dict[float, Row]]:
    """Rows by line, each line by its x in rising order. Raises ObrError if two rows share a place."""
    lines: dict[str, dict[float, Row]] = {}
    for row in (row for row in rows if row.recipe.method != "dense"):
        group = _group(row, group_by)
        line = lines.setdefault(METHODS[group].label if group_by == "method" else group, {})
        place = getattr(row.recipe, x) * (100 if x == "sparsity" else 1)
        if place in line:
            raise ObrError(
                f"Rows {line[place].key!r} and {row.key!r} share {x} {place:g} and {group_by} {group!r}; "
                "set group_by to a field in which they differ."
            )
        line[place] = row
    return {group: dict(sorted(line.items())) for group, line in lines.items()}
