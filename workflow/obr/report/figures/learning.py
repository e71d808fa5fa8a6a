"""Figures of how rotations were learned: the loss on what is learned from, and on held-out windows."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from obr.config import paths
from obr.errors import ObrError
from obr.report.figures.canvas import COLOURS, MARKERS, Canvas, FigureInputs, handle, log_scale, new_canvas
from obr.report.table_rows import require

LINES = {"loss": "learned from", "held_out": "held out"}


def learning_curve(source: FigureInputs) -> Canvas:
    """The loss by step, or by block before and after its steps: a panel per model and rotation."""
    names = source.entry.get("rotations") or []
    if not names:
        raise ObrError(f"Figure {source.entry.get('title', '')!r} has no rotations; list keys of learned ones.")
    panels = [(model, name) for model in source.labels for name in names]
    sheet, drawn = new_canvas(len(panels)), {}
    for panel, (model, name) in zip(sheet.panels, panels):
        curve = pd.read_csv(require(paths.path(source.results, "learning_curve", rotation=name, model=model)))
        panel.set(title=f"{source.labels[model]}\n{name}", ylabel="Loss")
        drawn |= _by_block(panel, curve) if "block" in curve else _by_step(panel, curve)
        log_scale(panel)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for label, (colour, marker) in drawn.items():
        sheet.handles.append(handle(label, marker, color=colour, linestyle="-"))
    return sheet


def _by_step(panel: Axes, curve: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Draw both losses; returns {label: (colour, marker)} of what is drawn."""
    drawn = {}
    for (column, label), colour, marker in zip(LINES.items(), COLOURS, MARKERS):
        if column in curve:
            part = curve.dropna(subset=[column])
            panel.plot(part["step"], part[column], color=colour, marker=marker)
            drawn[label] = (colour, marker)
    panel.set_xlabel("Step")
    return drawn


def _by_block(panel: Axes, curve: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Draw what the first and the last look at each block's held-out windows gave."""
    looks = curve.dropna(subset=["held_out"]).groupby("block")["held_out"]
    drawn = {}
    for label, ends, colour, marker in zip(
        ("held out, before", "held out, after"), (looks.first(), looks.last()), COLOURS[2:], MARKERS[2:]
    ):
        panel.plot(ends.index, ends, color=colour, marker=marker, markevery=max(1, len(ends) // 6))
        drawn[label] = (colour, marker)
    panel.set_xlabel("Block")
    return drawn
