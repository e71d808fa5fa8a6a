"""The recipes of `config/recipes/*.tsv`: one line per checkpoint, one column per field, an empty cell for a default.

Columns are fields of `Recipe`. Fields that are mappings have flat columns: `allocation_bits`, `allocation_options`,
`allocation_scope`, and `source`, `source_repo`, `source_revision`, `source_path`, `source_file`. The columns `recipe`
and `note` are the key and a remark for readers.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

from obr.config.recipe import Allocation, Recipe
from obr.errors import ObrError

KEY, NOTE = "recipe", "note"
SOURCES = ("source", "source_repo", "source_revision", "source_path", "source_file")


def read_sheets(folder: Path) -> dict[str, dict]:
    """{recipe: its entry} of all sheets of a folder, in the order of their names.

    Raises:
        ObrError: a sheet cannot be read, a column is unknown, a cell is not of its field's type, or a recipe is there
            twice; the sentence names file and line.
    """
    found: dict[str, dict] = {}
    for sheet in sorted(folder.glob("*.tsv")):
        for place, recipe, entry in _lines(sheet):
            if recipe in found:
                raise ObrError(f"{place}: recipe {recipe!r} is there before; give each recipe one line.")
            found[recipe] = entry
    return found


def _lines(sheet: Path):
    """(file and line, recipe, entry) of each line of a sheet."""
    try:
        with sheet.open(encoding="utf-8", newline="") as file:
            lines = [line for line in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if line]
    except (OSError, UnicodeDecodeError) as error:
        raise ObrError(f"{sheet} cannot be read ({error}); correct the file.") from error
    header = lines[0] if lines else []
    readers = {column: _reader(column, sheet) for column in header if column not in (KEY, NOTE)}
    if KEY not in header or len(set(header)) < len(header):
        raise ObrError(f"{sheet} has the columns {', '.join(header)}; give each once, {KEY} among them.")
    for number, cells in enumerate(lines[1:], start=2):
        place = f"{sheet} line {number}"
        if len(cells) != len(header):
            raise ObrError(f"{place} has {len(cells)} cells under {len(header)} columns; separate them by tabs.")
        given = {column: cell.strip() for column, cell in zip(header, cells, strict=True) if cell.strip()}
        entry = {column: readers[column](cell, place) for column, cell in given.items() if column in readers}
        yield place, given.get(KEY, ""), _nested(entry)


def _nested(entry: dict) -> dict:
    """With flat columns put into the mappings that they belong to."""
    found = {}
    for column, value in entry.items():
        outer, _, inner = column.partition("_")
        if column == "source":
            found.setdefault("source", {})["source"] = value
        elif outer in ("allocation", "source") and inner:
            found.setdefault(outer, {})[inner] = value
        else:
            found[column] = value
    return found


def _reader(column: str, sheet: Path) -> Callable:
    """What makes a cell of this column a value. Raises ObrError at an unknown column."""
    types = {name: _plain(hint) for name, hint in get_type_hints(Recipe).items()}
    types |= {f"allocation_{name}": _plain(hint) for name, hint in get_type_hints(Allocation).items()}
    types |= dict.fromkeys(("activations", "allocation_options", *SOURCES), str)
    kind = types.get(column)
    if kind is None:
        known = ", ".join(sorted(name for name, found in types.items() if found))
        raise ObrError(f"{sheet} has the unknown column {column!r}; known are {KEY}, {NOTE}, {known}.")
    return lambda cell, place: _value(cell, kind, f"{place}: {column}")


def _plain(hint) -> type | None:
    """The type of a cell of a field: int, float, bool or str; None for a field that no cell holds."""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 and kinds[0] in NAMES else None


NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _value(cell: str, kind: type, where: str):
    try:
        return {"true": True, "false": False}[cell] if kind is bool else kind(cell)
    except (ValueError, KeyError):
        raise ObrError(
            f"{where} is {cell!r}, which is not {NAMES[kind]}; correct it, or leave the cell empty."
        ) from None
