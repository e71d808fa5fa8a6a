"""Figures of layer reports: the error of each layer's outputs, and the zeros that rounding makes."""

from itertools import cycle
from pathlib import Path

import pandas as pd
from matplotlib.ticker import MaxNLocator

from obr.artefacts import Row, require
from obr.sheet import COLOURS, MARKERS, Sheet, Source, handle, log_scale, new_sheet

LAYER_KINDS = ("q", "k", "v", "o", "gate", "up", "down")


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
    sheet = new_sheet(cells * len(tables), across=4, height=1.5, sharey=True)
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
    log_scale(sheet.panels[0], sheet.panels)
    sheet.figure.supylabel("Relative squared output error", fontsize=8)
    for row, colour, marker in zip(rows, cycle(COLOURS), cycle(MARKERS)):
        sheet.handles.append(handle(row.label, marker, color=colour, linestyle="-"))
    return sheet


def _layers(results: Path, model: str, row: Row) -> pd.DataFrame:
    """A checkpoint's layer report, with the layer's bare kind ("q" of "self_attn.q_proj")."""
    path = require(results / "compressed" / model / row.checkpoint / "layers.csv")
    layers = pd.read_csv(path)
    return layers.assign(kind=layers["layer"].str.split(".").str[-1].str.removesuffix("_proj"))


def natural_sparsity(source: Source) -> Sheet:
    """Zeros among the weights that were not pruned, by block: a panel per model and row, a line per kind of layer.

    The dashed line is the mean over all weights, told with the published one beneath.
    """
    rows = [row for row in source.rows if row.recipe.method != "dense"]
    panels = [(model, label, row) for model, label in source.labels.items() for row in rows]
    sheet = new_sheet(len(panels), height=2.6, sharey=True)
    kinds: list[str] = []
    for panel, (model, label, row) in zip(sheet.panels, panels):
        panel.set(title=f"{label}: {row.label}" if len(rows) > 1 else label, xlabel="Block", ylabel="Zeros (%)")
        layers = _layers(source.results, model, row)
        weights, kept = layers["rows"] * layers["columns"], 1 - layers["sparsity"]
        zeros = 100 * (layers["zeros"] - layers["sparsity"]) / kept
        kinds = [kind for kind in LAYER_KINDS if kind in set(layers["kind"])]
        for kind, colour, marker in zip(kinds, cycle(COLOURS), cycle(MARKERS)):
            part = layers["kind"] == kind
            every = max(1, part.sum() // 6)
            panel.plot(layers["block"][part], zeros[part], color=colour, marker=marker, markevery=every)
        mean = float((zeros * weights * kept).sum() / (weights * kept).sum())
        panel.axhline(mean, color="0.4", linestyle="--", linewidth=1, zorder=1)
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        printed = source.quotes.value(model, row, "natural_sparsity_pct")
        quoted = "" if printed != printed else f", {printed:.2f} % published"
        sheet.remarks.append(f"{label}, {row.label}: {mean:.2f} % of all weights are zero (dashed){quoted}")
    for kind, colour, marker in zip(kinds, cycle(COLOURS), cycle(MARKERS)):
        sheet.handles.append(handle(kind, marker, color=colour, linestyle="-"))
    return sheet
