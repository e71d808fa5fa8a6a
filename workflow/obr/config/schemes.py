"""Entries of a config with their names resolved: a checkpoint's recipe, and a recipe under an activation scheme."""

from collections.abc import Iterable

from obr.config.quantizer import check_choice
from obr.config.recipe import QUANTIZERS, Recipe
from obr.errors import ObrError

SIXTEEN_BITS_SCHEME = "a16"  # there in every config: activations, keys and values stay at 16 bits
SCHEME_FIELDS = (*QUANTIZERS, "online", "dtype")  # what a scheme may set of a recipe


def check_defined(names: Iterable[str], section: str, name: str, where: str) -> None:
    """Raise ObrError if a section, with these names, does not define the one that stands at `where`."""
    names = list(names)
    if name not in names:
        raise ObrError(
            f"{where} is {name!r}, which {section} does not define; it defines {', '.join(names) or 'none'}."
        )


def scheme_of(raw: dict, row: str | dict) -> str:
    """The activation scheme of a row: its own, else that of its recipe, else "a16"."""
    own = None if isinstance(row, str) else row.get("activations")
    recipe = row if isinstance(row, str) else row["recipe"]
    return own or raw["recipes"][recipe].get("activations") or SIXTEEN_BITS_SCHEME


def checkpoint_entry(raw: dict, key: str) -> dict:
    """A recipe's entry with the options that its allocation names, and the quantisers that its Hessians see.

    Raises:
        ObrError: the config has no such recipe, or what the recipe names is not defined.
    """
    check_defined(raw["recipes"], "recipes", key, "the recipe")
    entry = dict(raw["recipes"][key])
    if allocation := entry.get("allocation"):
        options = raw.get("layer_options") or {}
        check_defined(options, "layer_options", allocation["options"], f"recipes.{key}.allocation.options")
        entry["allocation"] = {**allocation, "options": options[allocation["options"]]}
    if scheme := entry.pop("activations", None):
        found = scheme_entry(raw, scheme, f"recipes.{key}.activations")
        entry |= {name: value for name, value in found.items() if name in QUANTIZERS}
    return entry


def evaluated_entry(raw: dict, key: str, scheme: str) -> dict:
    """A recipe's entry as its checkpoint is evaluated under a scheme, whose fields replace those of the recipe."""
    return under_scheme(checkpoint_entry(raw, key), raw, scheme, f"the activations of recipe {key}")


def under_scheme(entry: dict, raw: dict, scheme: str, where: str) -> dict:
    """The entry of a recipe with the fields of an activation scheme in place of its own quantisers."""
    return {name: value for name, value in entry.items() if name not in QUANTIZERS} | scheme_entry(raw, scheme, where)


def check_scheme(entry: dict, where: str) -> None:
    """Raise ObrError if a scheme sets what is no field of one, or to what cannot be."""
    for name in entry:
        check_choice(name, SCHEME_FIELDS, f"a key of {where}")
    Recipe.parse({"method": "rtn", **entry}, where)


def scheme_entry(raw: dict, scheme: str, where: str) -> dict:
    """The fields of an activation scheme. Raises ObrError if the config does not define it."""
    schemes = {SIXTEEN_BITS_SCHEME: {}, **(raw.get("activations") or {})}
    check_defined(schemes, "activations", scheme, where)
    return dict(schemes[scheme])


def recipes_of_row(row: str | dict) -> list[str]:
    """The recipes that a row of a table or figure names, with those of all its seeds; none if it only quotes."""
    if isinstance(row, str):
        return [row]
    return [row["recipe"], *(row.get("variants") or [])] if "recipe" in row else []


def rows_of(raw: dict, entry: dict) -> list[tuple[str, str]]:
    """(recipe, activation scheme) of a table's or figure's rows, where a row has several seeds those of all."""
    found = []
    for row in entry.get("rows", []):
        if names := recipes_of_row(row):
            row = {"recipe": row} if isinstance(row, str) else row
            found += [(key, scheme_of(raw, row)) for key in row.get("variants") or names]
    return found


def scores_of(entry: dict) -> dict[str, list[str]]:
    """The texts ("perplexity") and tasks ("zero_shot") of a table or figure."""
    texts = entry.get("perplexity") or []
    return {
        "perplexity": [texts] if isinstance(texts, str) else list(texts),
        "zero_shot": entry.get("zero_shot") or [],
    }


def requested_scores(raw: dict) -> dict[tuple[str, str, str], dict[str, list[str]]]:
    """What tables and figures ask of each (model, recipe, activation scheme): texts and tasks, as `scores_of`."""
    found: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for entry in [*raw["tables"].values(), *raw["figures"].values()]:
        wanted = scores_of(entry)
        for model in entry.get("models", []):
            for recipe, scheme in rows_of(raw, entry):
                known = found.setdefault((model, recipe, scheme), {kind: [] for kind in wanted})
                for kind, names in wanted.items():
                    known[kind] += [name for name in names if name not in known[kind]]
    return found
