"""Keys of a workflow's config that nothing reads where they stand: refused, since they would change nothing.

The JSON schema has one list of keys for all kinds of an entry. Here is which kind reads which of them. A key with
its default value is accepted, since Snakemake fills defaults in.
"""

from collections.abc import Iterator

from obr.config.methods import MASKS
from obr.config.recipe_checks import unread
from obr.errors import ObrError

# What every figure reads, and what each kind reads besides.
ALL_FIGURES = {"kind", "title", "mentions", "note"}
QUOTED = {"models", "rows", "perplexity", "seeds", "group_by", "published", "published_metrics"}
FIGURES = {
    "perplexity_bits": QUOTED,
    "sweep": QUOTED | {"x"},
    "layer_error": {"models", "rows"},
    "natural_sparsity": {"models", "rows", "published"},
    "allocation": {"models", "rows"},
    "kernels": {"device", "shapes", "kernels", "panels", "published"},
    "learning_curve": {"models", "rotations"},
}
# Of rotations: key -> its default, and the kinds, or formats of a file, that read it.
ROTATIONS = {
    "source": (None, ("file",)),
    "format": ("obr", ("file",)),
    "alpha": (0.5, ("file in smoothquant's format",)),
    "online_query_key": (False, ("file in ostquant's format",)),
}
DRAWN_OR_LEARNED = "drawn and learned rotations"
TABLES = {
    "title", "models", "rows", "perplexity", "zero_shot", "mean", "time", "seeds", "both_orders", "quoted",
    "mentions", "details", "published", "published_metrics", "note",
}  # fmt: skip


def check_effects(raw: dict) -> None:
    """Raise ObrError at a key that nothing reads. raw: a config that the schema accepts, defaults filled in."""
    for where, key, value, readers in _without_effect(raw):
        raise ObrError(f"{where}.{key} is {value!r}, which nothing reads: {key} is of {readers}; remove it.")


def _without_effect(raw: dict) -> Iterator[tuple[str, str, object, str]]:
    """(entry, key, value, what reads the key) of each key without an effect."""
    for name, entry in raw["figures"].items():
        read = ALL_FIGURES | FIGURES.get(entry.get("kind"), set(entry))
        for key in sorted(set(entry) - read):
            kinds = [kind for kind, keys in FIGURES.items() if key in keys]
            yield f"figures.{name}", key, entry[key], f"figures of kind {', '.join(kinds)}"
    for section in ("tables", "figures"):
        for name, entry in raw[section].items():
            yield from _of_rows(f"{section}.{name}", entry)
    for name, entry in raw["tables"].items():
        if entry.get("mean") and not entry.get("zero_shot"):
            yield f"tables.{name}", "mean", True, "tables with zero_shot"
        if entry.get("both_orders") and not entry.get("seeds"):
            yield f"tables.{name}", "both_orders", True, "tables with seeds"
    for name, entry in raw["rotations"].items():
        yield from _of_rotation(f"rotations.{name}", entry)
    for name, entry in raw["recipes"].items():
        if entry.get("activations") and entry.get("hessian_inputs") != "quantised":
            readers = "recipes with hessian_inputs: quantised; a row names the activations that it is evaluated with"
            yield f"recipes.{name}", "activations", entry["activations"], readers
        for key, readers in unread(entry).items():
            yield f"recipes.{name}", key, entry[key], readers
    for name, entry in raw["calibrations"].items():
        if entry.get("sampling") == "sequential" and entry.get("seed"):
            yield f"calibrations.{name}", "seed", entry["seed"], "sampling random and documents"
        if entry.get("reversed") and "text" not in entry:
            yield f"calibrations.{name}", "reversed", True, "windows of a text"
    for name, entry in raw["zero_shot"].items():
        if entry.get("text") and entry["source"].get("source") != "cloze":
            yield f"zero_shot.{name}", "text", entry["text"], "tasks of source cloze"
    yield from _of_overrides(raw)


def _of_rows(where: str, entry: dict) -> Iterator[tuple[str, str, object, str]]:
    """Keys of rows: seeds need those of the entry, and the others a figure or table that quotes."""
    kind = entry.get("kind", "table")
    for number, row in enumerate(entry.get("rows", [])):
        row = row if isinstance(row, dict) else {}
        place = f"{where}.rows[{number}]"
        if "published_bits" in row and (kind != "perplexity_bits" or "published" not in row):
            readers = "rows with published in figures of kind perplexity_bits"
            yield place, "published_bits", row["published_bits"], readers
        if "seeds" in row and not entry.get("seeds"):
            yield place, "seeds", row["seeds"], f"rows where {where}.seeds is given"
        if "published" in row and kind != "table" and "published" not in FIGURES.get(kind, ()):
            yield place, "published", row["published"], "tables and of figures that quote"


def _of_rotation(where: str, entry: dict) -> Iterator[tuple[str, str, object, str]]:
    kind = entry["kind"]
    kinds = (kind, f"file in {entry.get('format', 'obr')}'s format") if kind == "file" else (kind,)
    for key, (default, readers) in ROTATIONS.items():
        if key in ("source", "format") and "learn" in entry:
            continue  # a second config file that has a rotation learned cannot remove where the first found it
        if entry.get(key, default) != default and not set(kinds) & set(readers):
            yield where, key, entry[key], f"kind {readers[0]}"
    if kind == "file":
        for key, default in (("seed", 0), ("learn", None)):
            if entry.get(key, default) != default:
                yield where, key, entry[key], DRAWN_OR_LEARNED


def _of_overrides(raw: dict) -> Iterator[tuple[str, str, object, str]]:
    """Names that `overrides` replaces or leaves out and that the config does not have."""
    overrides = raw.get("overrides") or {}
    for key, section in (("calibrations", raw["calibrations"]), ("rotations", raw["rotations"]), ("masks", MASKS)):
        for name in sorted(set(overrides.get(key, {})) - set(section)):
            yield f"overrides.{key}", name, overrides[key][name], f"no {key} of this config"
    for section in ("tables", "figures"):
        for name, entry in overrides.get(section, {}).items():
            kind = raw[section].get(name, {}).get("kind", entry.get("kind"))
            figures = ALL_FIGURES | FIGURES.get(kind, set().union(*FIGURES.values()))
            for key in sorted(set(entry) - (TABLES if section == "tables" else figures)):
                yield (
                    f"overrides.{section}.{name}",
                    key,
                    entry[key],
                    f"no {section}{f' of kind {kind}' if kind else ''}",
                )
    for name in overrides.get("without", []):
        if name not in raw["tables"] and name not in raw["figures"]:
            yield "overrides", "without", name, "tables and figures of this config, which has none of that name"
