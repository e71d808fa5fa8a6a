"""Puts tables and figures of a run into a page of the docs: python docs/publish.py RESULTS PAGE --tables NAME …

The page's text stays; what lies between its two comment lines is replaced: each table with its notes, and each
figure. Notes that all tables share come once, at the end. CSV files and pictures go to a folder beside the page.
"""

import argparse
import shutil
import sys
from pathlib import Path

BEGIN, END = "<!-- published: docs/publish.py -->", "<!-- end of published -->"


def parts_of(table: str) -> tuple[str, str, list[str]]:
    """(title, rows, notes) of a table in Markdown, as the report stage writes it."""
    title, rows, notes = (table.strip() + "\n\n\n").split("\n\n")[:3]
    return title.strip("* "), rows, [line for line in notes.splitlines() if line.startswith("- ")]


def published(results: Path, folder: Path, tables: list[str], figures: list[str]) -> str:
    """The Markdown of tables and figures; copies CSV files and pictures to the folder."""
    folder.mkdir(exist_ok=True)
    found = {name: parts_of((results / f"tables/{name}.md").read_text(encoding="utf-8")) for name in tables}
    shared = [note for note in next(iter(found.values()))[2] if all(note in notes for *_, notes in found.values())]
    lines = []
    for name, (title, rows, notes) in found.items():
        shutil.copy(results / f"tables/{name}.csv", folder)
        own = [note for note in notes if note not in shared]
        lines += [f"## {title}", "", rows, "", *own, f"- [{name}.csv]({folder.name}/{name}.csv)", ""]
    if figures:
        lines += ["## Figures", ""]
    for name in figures:
        shutil.copy(results / f"figures/{name}.png", folder)
        lines += [f"![{name}]({folder.name}/{name}.png)", ""]
    return "\n".join([*lines, "## Notes of all tables", "", *shared, ""])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of the run's results")
    parser.add_argument("page", type=Path, help="page of the docs with the two comment lines")
    parser.add_argument("--tables", nargs="+", required=True, help="names of tables, in the order of the page")
    parser.add_argument("--figures", nargs="*", default=[], help="names of figures, in the order of the page")
    args = parser.parse_args(argv)
    text = args.page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        sys.exit(f"{args.page} needs the line {BEGIN!r} and behind it the line {END!r}, each once.")
    missing = [p for p in (*(f"tables/{t}.md" for t in args.tables), *(f"figures/{f}.png" for f in args.figures))
               if not (args.results / p).is_file()]  # fmt: skip
    if missing:
        sys.exit(f"{args.results} has no {', '.join(missing)}; run the workflow that makes them first.")
    new = published(args.results, args.page.with_suffix(""), args.tables, args.figures)
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    args.page.write_text(f"{before}{BEGIN}\n\n{new}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
