"""Rows whose local files are not there: left out of tables and figures, if the configuration says so."""

from obr.config.schemes import recipes_of_row
from obr.errors import ObrError
from obr.runtime.hub import local_path


def leave_out(raw: dict) -> None:
    """With `skip_missing`, drop rows whose rotation or released checkpoint is a local file that is not there.

    A row stays only if the files of all models of its table are there. A note under the table names each row that
    is left out. Tables and figures without any row are dropped.
    """
    if not raw.get("skip_missing"):
        return
    for section in ("tables", "figures"):
        for key, entry in list(raw[section].items()):
            kept, gone = [], {}
            for row in entry.get("rows", []):
                missing = [name for recipe in recipes_of_row(row) for name in _missing(raw, recipe, entry["models"])]
                if missing:
                    gone[recipes_of_row(row)[0]] = missing
                else:
                    kept.append(row)
            if not gone:
                continue
            if not any(map(recipes_of_row, kept)):
                del raw[section][key]
                continue
            entry["rows"] = kept
            if section == "tables":
                named = "; ".join(f"{recipe} ({', '.join(dict.fromkeys(files))})" for recipe, files in gone.items())
                entry["note"] = " ".join(filter(None, (entry.get("note"), f"Left out, files not found: {named}.")))


def _missing(raw: dict, recipe: str, models: list[str]) -> list[str]:
    """The local files of a recipe that are not there, for any of the models."""
    entry = raw["recipes"].get(recipe, {})
    rotation = raw["rotations"].get(entry.get("rotation"), {})
    sources = [source for source in (rotation.get("source"), entry.get("source")) if isinstance(source, dict)]
    found = []
    for name in (source.get("path") or "" for source in sources if source.get("source") == "path"):
        for model in models:
            try:
                local_path(name.replace("{model}", model))
            except ObrError:
                found.append(name.replace("{model}", model))
    return found
