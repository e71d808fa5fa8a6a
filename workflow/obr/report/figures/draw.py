"""Figures for print: perplexity against size, sweeps over a recipe field, layer errors, kernel times.

A figure is an entry of the config; `kind` picks one function of KINDS, which draws what the artefacts hold.
"""

import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib

from obr.errors import ObrError
from obr.report.figures.canvas import (
    STYLE,
    Canvas,
    FigureInputs,
    add_legend,
    save,
)
from obr.report.figures.kernels import kernels
from obr.report.figures.layers import allocation, layer_error, natural_sparsity
from obr.report.figures.learning import learning_curve
from obr.report.figures.perplexity import perplexity_bits, sweep
from obr.report.published import Quotes, load, mentions
from obr.report.table_rows import entry_of, model_label, resolve_rows


def draw(config: dict, name: str, results: Path, published: Path, out_stem: Path) -> None:
    """Draw one figure of the config to `out_stem` + .pdf and .png (200 dpi).

    config: as read from its files, or the part that the figure needs: figures, recipes, activations and models, and
    for products kernels, whose shapes say what a product is called where it is published.

    Raises:
        ObrError: the kind is unknown, an artefact is missing (the sentence names the target to build), or the
            entry's rows cannot be distinguished in it.
    """
    entry, models = entry_of(config, "figures", name), config["models"]
    kind, shapes = entry.get("kind"), (config.get("kernels") or {}).get("shapes") or []
    if kind not in KINDS:
        raise ObrError(f"Figure kind {kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    rows = [] if kind in ("kernels", "learning_curve") else resolve_rows(entry, config)
    for model in entry.get("models") or []:
        model_label(models, model)
    quotes = Quotes(entry, models, rows, published) if rows else None
    mentioned, note = entry.get("mentions") or [], entry.get("note")
    numbers = load(published) if mentioned or entry.get("published") else None
    with matplotlib.rc_context(STYLE):
        source = FigureInputs(entry, models, Path(results), rows, quotes, numbers, shapes)
        sheet = KINDS[kind](source)
        sheet.remarks += mentions(numbers, mentioned, notes=False) if mentioned else []
        sheet.remarks += [note] if note else []
        if entry.get("title"):
            sheet.figure.suptitle(textwrap.fill(entry["title"], int(sheet.figure.get_figwidth() * 12)))
        add_legend(sheet)
        save(sheet.figure, Path(out_stem))


# --- Kinds --------------------------------------------------------------------------------------------


KINDS: dict[str, Callable[[FigureInputs], Canvas]] = {
    "perplexity_bits": perplexity_bits,
    "sweep": sweep,
    "layer_error": layer_error,
    "natural_sparsity": natural_sparsity,
    "kernels": kernels,
    "learning_curve": learning_curve,
    "allocation": allocation,
}
