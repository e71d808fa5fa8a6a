"""Draws docs/package.svg: the packages of `obr` on their floors, with arrows to what each imports.

python docs/draw_package.py [--check]    --check: exit with status 1 if the picture is not that of the imports
"""

import ast
import sys
from html import escape
from pathlib import Path

from obr.runtime import code_digest

PACKAGE = code_digest.ROOT
PICTURE = Path(__file__).with_name("package.svg")
WIDTH, BOX, HEIGHT, GAP = 1000, 225, 62, 44  # of the picture, a box, its height, and between floors, in pixels
STYLE = """text { font: 13px sans-serif; fill: #222 } .name { font-weight: bold }
.about { font-size: 10.5px; fill: #555 }
rect { fill: #f4f6fa; stroke: #5b7aa8 } path { fill: none; stroke: #7d8ca8; stroke-width: 1.2 }
marker path { fill: #7d8ca8; stroke: none }"""
HEAD = """<marker id="head" markerWidth="8" markerHeight="8" refX="1" refY="4" orient="auto">
<path d="M1,1 L8,4 L1,7 z"/></marker>"""


def imports() -> dict[str, set[str]]:
    """{package: packages that it imports}, `__main__` and the names of the package left out."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        own = relative.parts[0].removesuffix(".py")
        if own.startswith("__"):
            continue
        names = [name.split(".")[1] for name in code_digest._imports(relative.as_posix()) if "." in name]
        found.setdefault(own, set()).update(name for name in names if name != own)
    return found


def floors(arrows: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each package: one above the highest that it imports."""
    found: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in found:
            found[name] = 1 + max(map(floor, arrows[name]), default=0)
        return found[name]

    for name in arrows:
        floor(name)
    return found


def direct(arrows: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that are left once those are taken away that others imply."""

    def reached(name: str) -> set[str]:
        return set().union(*({other} | reached(other) for other in arrows[name]))

    return [
        (name, other)
        for name in arrows
        for other in sorted(arrows[name])
        if not any(other in reached(between) for between in arrows[name] - {other})
    ]


def about(name: str) -> list[str]:
    """The first sentence of a package's docstring, in lines that fit a box."""
    path = PACKAGE / name / "__init__.py"
    text = ast.get_docstring(ast.parse((path if path.exists() else PACKAGE / f"{name}.py").read_text("utf-8")))
    lines, words = [""], text.split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".").split()
    for word in words:
        if len(lines[-1]) + len(word) > 34:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines[:3]


def arrow(start: tuple[float, float], end: tuple[float, float], lane: float | None) -> str:
    """A path from the bottom of a box to the top of another. lane: where it passes the floors between, if any."""
    (x, y), (to_x, to_y) = start, end
    if lane is None:
        middle = (y + to_y) / 2
        route = f"M{x:.0f},{y:.0f} C{x:.0f},{middle:.0f} {to_x:.0f},{middle:.0f} {to_x:.0f},{to_y - 7:.0f}"
    else:
        above, below = y + GAP / 2, to_y - GAP / 2
        route = f"M{x:.0f},{y:.0f} C{x:.0f},{above:.0f} {lane:.0f},{y:.0f} {lane:.0f},{above + 30:.0f} "
        route += f"L{lane:.0f},{below - 30:.0f} "
        route += f"C{lane:.0f},{to_y:.0f} {to_x:.0f},{below:.0f} {to_x:.0f},{to_y - 7:.0f}"
    return f'<path d="{route}" marker-end="url(#head)"/>'


def boxes(floor: dict[str, int]) -> dict[str, tuple[float, float]]:
    """The upper left corner of each package's box, in pixels."""
    top, places = max(floor.values()), {}
    for i in range(1, top + 1):
        names = sorted(name for name in floor if floor[name] == i)
        left = (WIDTH - len(names) * BOX - (len(names) - 1) * 40) / 2
        places |= {name: (left + k * (BOX + 40), 20 + (top - i) * (HEIGHT + GAP)) for k, name in enumerate(names)}
    return places


def drawn_arrows(
    arrows: dict[str, set[str]], floor: dict[str, int], places: dict[str, tuple[float, float]]
) -> list[str]:
    """Paths of the arrows: those to the next floor straight, the others beside the boxes of the floors between."""
    paths, lanes = [], {-1: 0, 1: 0}
    for name, other in direct(arrows):
        (x, y), (to_x, to_y) = places[name], places[other]
        lane = None
        if between := [places[n][0] for n in floor if floor[other] < floor[n] < floor[name]]:
            side = -1 if to_x < x else 1
            edge = max(between) + BOX if side > 0 else min(between)
            lanes[side] += 1
            lane = edge + side * 16 * lanes[side]
        leaving, entering = (0.5, 0.5) if lane is None else (0.5 + 0.3 * side, 0.5 - 0.25 * side)
        start, end = (x + leaving * BOX, y + HEIGHT), (to_x + entering * BOX, to_y)
        paths.append(arrow(start, end, lane))
    return paths


def picture() -> str:
    """The SVG, the same for the same imports."""
    arrows = imports()
    floor = floors(arrows)
    places = boxes(floor)
    height = 40 + max(floor.values()) * (HEIGHT + GAP) - GAP
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}">']
    parts.append(f"<title>Packages of obr; each imports those below it</title><style>{STYLE}</style>{HEAD}")
    parts += drawn_arrows(arrows, floor, places)
    for name, (x, y) in places.items():
        parts.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX}" height="{HEIGHT}" rx="5"/>')
        parts.append(f'<text class="name" x="{x + 8:.0f}" y="{y + 17:.0f}">{name}</text>')
        for k, line in enumerate(about(name)):
            parts.append(f'<text class="about" x="{x + 8:.0f}" y="{y + 32 + 12 * k:.0f}">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(
            PICTURE.read_text("utf-8") != picture() and "docs/package.svg is outdated; run docs/draw_package.py."
        )
    PICTURE.write_text(picture(), encoding="utf-8")
