"""Figures of layer reports: the error of each layer's outputs, and the zeros that rounding makes."""

from itertools import cycle
from pathlib import Path

import pandas as pd
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from obr.config import paths
from obr.config.recipe import Option
from obr.report.figures.canvas import COLOURS, MARKERS, PAGE, Canvas, FigureInputs, handle, log_scale, new_canvas
from obr.report.table_rows import Row, read_artefact, require

LAYER_KINDS = ("q", "k", "v", "o", "gate", "up", "down")


def layer_error(source: FigureInputs) -> Canvas:
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
    sheet = new_canvas(cells * len(tables), across=4, height=1.5, sharey=True)
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
    """A checkpoint's layer report, with the layer's bare kind, of the blocks that the recipe compresses."""
    path = require(paths.path(results, "layers", model=model, recipe=row.checkpoint))
    layers = pd.read_csv(path)
    layers = layers[(layers["bits"] < 16) | (layers["sparsity"] > 0)]
    return layers.assign(kind=layers["layer"].map(_kind))


def allocation(source: FigureInputs) -> Canvas:
    """What was allocated to each layer: a panel per model and row, blocks across, kinds of layers down.

    A cell's colour is its option, and what is written in it the bits a weight that this takes.
    """
    panels = [(model, label, row) for model, label in source.labels.items() for row in source.rows]
    choices = [
        read_artefact(paths.path(source.results, "allocation", model=m, recipe=r.checkpoint)) for m, _, r in panels
    ]
    labels = list(dict.fromkeys(Option.parse(o, "option").label for choice in choices for o in choice["options"]))
    styles = {name: (COLOURS[i % len(COLOURS)], "" if i < len(COLOURS) else "//") for i, name in enumerate(labels)}
    sheet = new_canvas(len(panels), across=1, height=2.0)
    sheet.figure.set_figwidth(PAGE)
    for panel, (_, label, row), choice in zip(sheet.panels, panels, choices):
        options = [Option.parse(option, "option").label for option in choice["options"]]
        kinds = [k for k in LAYER_KINDS if k in {_kind(layer["layer"]) for layer in choice["layers"]}]
        for layer in choice["layers"]:
            place = (layer["block"], kinds.index(_kind(layer["layer"])))
            colour, hatch = styles[options[layer["option"]]]
            corner = (place[0] - 0.5, place[1] - 0.5)
            panel.add_patch(Rectangle(corner, 1, 1, facecolor=colour, hatch=hatch, edgecolor="white"))
            panel.text(*place, f"{layer['bits_per_weight']:.1f}", ha="center", va="center", fontsize=5, color="white")
        blocks = [layer["block"] for layer in choice["layers"]]
        panel.set(xlim=(min(blocks) - 0.5, max(blocks) + 0.5), ylim=(len(kinds) - 0.5, -0.5), xlabel="Block")
        panel.set_yticks(range(len(kinds)), kinds)
        panel.grid(False)
        panel.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        mean, loss, least = choice["bits_per_weight"], choice["loss"], _least_alike(choice)
        panel.set_title(f"{label}: {row.label}")
        alike = f", {least[1]:.4f} at best with the same for all ({least[0]})" if least else ""
        sheet.remarks.append(f"{label}, {row.label}: {mean:.3f} bits a weight, predicted loss {loss:.4f} nats{alike}")
    for name, (colour, hatch) in styles.items():
        sheet.handles.append(Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=name))
    return sheet


def _least_alike(choice: dict) -> tuple[str, float] | None:
    """The best option within the budget if all layers take the same one, and its predicted loss."""
    within = {k: u["loss"] for k, u in choice["uniform"].items() if u["bits_per_weight"] <= choice["bits"] + 1e-9}
    return min(within.items(), key=lambda pair: pair[1]) if within else None


def _kind(layer: str) -> str:
    """The bare kind of a layer: "q" of "self_attn.q_proj"."""
    return layer.rpartition(".")[2].removesuffix("_proj")


def natural_sparsity(source: FigureInputs) -> Canvas:
    """Zeros among the weights that were not pruned, by block: a panel per model and row, a line per kind of layer.

    The dashed line is the mean over all quantised weights, given with the published one beneath.
    """
    rows = [row for row in source.rows if row.recipe.method != "dense"]
    panels = [(model, label, row) for model, label in source.labels.items() for row in rows]
    sheet = new_canvas(len(panels), height=2.6, sharey=True)
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
        sheet.remarks.append(f"{label}, {row.label}: {mean:.2f} % of the quantised weights are zero (dashed){quoted}")
    for kind, colour, marker in zip(kinds, cycle(COLOURS), cycle(MARKERS)):
        sheet.handles.append(handle(kind, marker, color=colour, linestyle="-"))
    return sheet
