"""Draws docs/pipeline.svg: the stages from model to table, and what each keeps. python docs/draw_pipeline.py"""

from html import escape
from pathlib import Path

PICTURE = Path(__file__).with_name("pipeline.svg")
STAGES = (
    ("model", "hub, PyPI, folder", "models/"),
    ("rotation", "QuaRot, SpinQuant…", "rotations/"),
    ("calibration", "windows of tokens", "calibration/"),
    ("Hessians", "XᵀX of layer inputs", "hessians/"),
    ("OBR", "prune and quantise", "compressed/"),
    ("evaluation", "perplexity, accuracy", "evaluations/"),
    ("report", "tables, figures", "tables/"),
)
BOX, GAP, HEIGHT = 136, 22, 64
STYLE = """text { font: 11.5px sans-serif; fill: #222; text-anchor: middle }
.name { font-size: 14px; font-weight: bold }
.kept { font-family: monospace; font-size: 11px; fill: #555 } rect { fill: #f4f6fa; stroke: #5b7aa8 }
path { fill: none; stroke: #5b7aa8; stroke-width: 1.5 }"""


def picture() -> str:
    width = len(STAGES) * (BOX + GAP) - GAP + 20
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + 46}" width="{width}">']
    parts.append(f"<title>Stages of the workflow, and the artefacts they keep</title><style>{STYLE}</style>")
    for i, (name, what, kept) in enumerate(STAGES):
        x = 10 + i * (BOX + GAP)
        middle = x + BOX / 2
        parts.append(f'<rect x="{x}" y="10" width="{BOX}" height="{HEIGHT}" rx="5"/>')
        parts.append(f'<text class="name" x="{middle:.0f}" y="37">{escape(name)}</text>')
        parts.append(f'<text x="{middle:.0f}" y="57">{escape(what)}</text>')
        parts.append(f'<text class="kept" x="{middle:.0f}" y="{HEIGHT + 30}">{escape(kept)}</text>')
        if i:
            y = 10 + HEIGHT / 2
            parts.append(f'<path d="M{x - GAP},{y:.0f} h{GAP - 3} m-6,-5 l6,5 l-6,5"/>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
