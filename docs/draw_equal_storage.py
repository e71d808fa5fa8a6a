"""Draws docs/results/equal-storage/comparison.svg from comparison.csv beside it: perplexity at 3.0 bits per weight.

    python docs/draw_equal_storage.py

One panel for each setting, one line for each method, one point for each run.
"""

from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from obr.report.figures.canvas import COLOURS, MARKERS, PAGE, STYLE
from obr.runtime.files import atomic_write

FOLDER = Path(__file__).parent / "results" / "equal-storage"
DENSE = 26.98  # perplexity of the dense model on the same tokens
METHODS = ("OBR_GPTQ, 4 bits, 50 % zeros", "joint, 4 bits, 50 % zeros", "GPTQ, 3 bits", "joint, 3 bits", "mixed")
TICKS = (27, 40, 60, 100, 200, 500, 1000)


def draw(frame: pd.DataFrame) -> Figure:
    """The figure of runs with panel, method, options, perplexity."""
    panels, methods = frame["panel"].unique(), METHODS[::-1]
    options = list(frame["options"].unique())
    figure = Figure(figsize=(PAGE, 2.4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        for number, option in enumerate(options):
            part = frame[(frame["panel"] == panel) & (frame["options"] == option)]
            heights = [methods.index(method) + 0.22 * (1 - number) for method in part["method"]]
            axes.scatter(part["perplexity"], heights, s=18, color=COLOURS[number], marker=MARKERS[number])
        axes.axvline(DENSE, color="black", linewidth=0.8, linestyle=":")
        axes.set(title=panel, xlabel="perplexity", xscale="log", xlim=(25, frame["perplexity"].max() * 1.2))
        if panel != panels[0]:
            axes.set_xlim(25, 110)
        axes.xaxis.set_major_locator(FixedLocator(TICKS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yticks(range(len(methods)), methods)
    for number, option in enumerate(options):
        figure.axes[0].scatter([], [], s=18, color=COLOURS[number], marker=MARKERS[number], label=option)
    figure.legend(loc="outside lower center", ncols=len(options), frameon=False)
    return figure


def main() -> None:
    style = {**STYLE, "axes.axisbelow": True, "svg.hashsalt": "comparison", "svg.fonttype": "path"}
    with matplotlib.rc_context(style), atomic_write(FOLDER / "comparison.svg") as partial:
        figure = draw(pd.read_csv(FOLDER / "comparison.csv", encoding="utf-8"))
        figure.savefig(partial, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
