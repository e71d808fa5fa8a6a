"""The workflow's configuration: cross-references resolved and checked, and what follows for the jobs.

The JSON schema checks keys, types and ranges; here is what a schema cannot say.
"""

import json
import math
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from obr.config import missing_inputs, overrides
from obr.config.effects import check_effects
from obr.config.model_sizes import sizes_of
from obr.config.paths import below
from obr.config.pattern import Pattern
from obr.config.quantizer import check_choice
from obr.config.recipe import Recipe
from obr.config.rotations import DRAWN, LEARNED
from obr.config.schemes import (
    SIXTEEN_BITS_SCHEME,
    check_defined,
    check_scheme,
    checkpoint_entry,
    evaluated_entry,
    recipes_of_row,
    requested_scores,
    rows_of,
    scores_of,
)
from obr.errors import ObrError, printable

# Artefacts of each row's weights that a kind of figure reads besides its scores.
READ_BY_FIGURES = {"allocation": ["allocation"], "layer_error": ["layers"], "natural_sparsity": ["layers"]}


class Config:
    """A validated config with recipes resolved.

    Args:
        raw: the parsed YAML, defaults filled in.

    Raises:
        ObrError: a name that nothing defines, or a recipe that cannot be; the sentence names it.
    """

    def __init__(self, raw: dict):
        self.raw = raw
        raw.setdefault("layer_options", {})
        raw.setdefault("activations", {}).setdefault(SIXTEEN_BITS_SCHEME, {})
        check_effects(raw)
        self._check_overrides()
        overrides.transpose(raw)
        overrides.shrink(raw)
        self.results = raw["results"]
        self._check_seeds()
        overrides.multiply(raw)
        self.recipes = {key: checkpoint_entry(raw, key) for key in raw["recipes"]}
        self.parsed = {key: Recipe.parse(entry, f"recipes.{key}") for key, entry in self.recipes.items()}
        for key, entry in raw["activations"].items():
            check_scheme(entry, f"activations.{key}")
        for key, recipe in self.parsed.items():
            if recipe.rotation != "none":
                self._defined("rotations", recipe.rotation, f"recipes.{key}.rotation")
            if recipe.calibration:
                self._defined("calibrations", recipe.calibration, f"recipes.{key}.calibration")
            self._check_dtype(key, recipe)
        for key, entry in raw["rotations"].items():
            self._check_rotation(f"rotations.{key}", entry)
        for key, entry in raw["perplexity"].items():
            self._defined("texts", entry["text"], f"perplexity.{key}.text")
        for key, entry in raw["calibrations"].items():
            self._check_calibration(f"calibrations.{key}", entry)
        for key, entry in raw["zero_shot"].items():
            if entry.get("text"):
                self._defined("texts", entry["text"], f"zero_shot.{key}.text")
        self._select_models()
        missing_inputs.leave_out(raw)
        for section in ("tables", "figures"):
            for key, entry in raw[section].items():
                self._check_entry(f"{section}.{key}", entry)

    def _check_overrides(self) -> None:
        """What `overrides` puts in place of other names must be defined."""
        overrides = self.raw.get("overrides") or {}
        for section in ("models", "perplexity", "zero_shot"):
            for name in overrides.get(section, []):
                self._defined(section, name, f"overrides.{section}")
        for section in ("calibrations", "rotations"):
            for key, name in overrides.get(section, {}).items():
                self._defined(section, name, f"overrides.{section}.{key}")

    def _check_seeds(self) -> None:
        """What `seeds` of a table multiplies must be there before it is multiplied."""
        for key, entry in self.raw["tables"].items():
            if entry.get("seeds"):
                self._check_entry(f"tables.{key}", entry)

    def _check_dtype(self, key: str, recipe: Recipe) -> None:
        """Raise ObrError if a recipe's compression reads shared statistics that are computed in another dtype."""
        shared = recipe.shared
        if not shared or recipe.dtype in (None, self.raw.get("dtype")):
            return
        raise ObrError(
            f"recipes.{key}.dtype is {recipe.dtype!r}, but its {shared[0]} are computed once for all recipes, in the "
            f"config's dtype, which is {self.raw.get('dtype') or 'null'}; set that dtype, or leave the recipe's out."
        )

    def options_of(self, key: str) -> str:
        """The key of layer_options that the allocation of a recipe names."""
        return self.raw["recipes"][key]["allocation"]["options"]

    def _defined(self, section: str, name: str, where: str) -> None:
        check_defined(self.raw[section], section, name, where)

    def _check_rotation(self, where: str, entry: dict) -> None:
        if "learn" in entry:
            check_choice(entry["kind"], LEARNED, f"{where}.learn is given, and {where}.kind")
            self._defined("calibrations", entry["learn"]["calibration"], f"{where}.learn.calibration")
        elif entry["kind"] in LEARNED and entry["kind"] not in DRAWN:
            raise ObrError(f"{where}.kind is {entry['kind']!r}, which must be learned; add learn.")
        else:
            check_choice(entry["kind"], (*DRAWN, "file"), f"{where}.kind")

    def _check_calibration(self, where: str, entry: dict) -> None:
        kinds = [kind for kind in ("text", "generated", "mix") if kind in entry]
        if len(kinds) != 1:
            raise ObrError(f"{where} has {' and '.join(kinds) or 'no source'}; give one of text, generated and mix.")
        if "text" in entry:
            self._defined("texts", entry["text"], f"{where}.text")
        elif (bos := entry.get("bos")) is not None and (bos != "window" or "mix" in entry):
            raise ObrError(
                f"{where}.bos is {json.dumps(bos)}, which is of windows of a text; leave it out"
                f"{', or use window' if 'generated' in entry else ''}."
            )
        elif entry.get("sampling") == "documents":
            raise ObrError(f"{where}.sampling is 'documents', but its windows are of no text; drop it, or give text.")
        for name in entry.get("mix", []):
            self._defined("calibrations", name, f"{where}.mix")
            if "mix" in self.raw["calibrations"][name]:
                raise ObrError(f"{where}.mix names {name!r}, itself a mixture; name what that is mixed of.")
            part, each = self.raw["calibrations"][name], -(-entry.get("nsamples", 128) // len(entry["mix"]))
            if part.get("seqlen", 2048) != entry.get("seqlen", 2048) or part.get("nsamples", 128) < each:
                raise ObrError(
                    f"{where} takes {each} windows of {entry.get('seqlen', 2048)} tokens from {name!r}, which has "
                    f"{part.get('nsamples', 128)} of {part.get('seqlen', 2048)}; correct nsamples or seqlen."
                )

    def _select_models(self) -> None:
        only = self.raw.get("only_models")
        if not only:
            return
        only = [only] if isinstance(only, str) else only
        for name in only:
            self._defined("models", name, "only_models")
        for section in ("tables", "figures"):
            for key, entry in list(self.raw[section].items()):
                if "models" in entry:
                    entry["models"] = [model for model in entry["models"] if model in only]
                    if not entry["models"]:
                        del self.raw[section][key]
        if not self.raw["tables"] and not self.raw["figures"]:
            raise ObrError(f"only_models is {', '.join(only)}, of which no table or figure is; name others, or null.")

    def _check_entry(self, where: str, entry: dict) -> None:
        if entry.get("kind") == "kernels" and not entry.get("device"):
            raise ObrError(f"{where} draws kernels but names no device; add device: cpu or cuda.")
        for model in entry.get("models", []):
            self._defined("models", model, f"{where}.models")
        for recipe, scheme in self.rows(entry, where):
            self._defined("activations", scheme, f"{where}.rows: activations of {recipe}")
            if entry.get("kind") == "allocation" and not self.raw["recipes"][recipe].get("allocation"):
                raise ObrError(f"{where} draws allocations, but recipe {recipe!r} has none; list recipes with one.")
        texts = entry.get("perplexity", [])
        for name in [texts] if isinstance(texts, str) else texts:
            self._defined("perplexity", name, f"{where}.perplexity")
        for name in entry.get("zero_shot", []):
            self._defined("zero_shot", name, f"{where}.zero_shot")
        for name in entry.get("rotations", []):
            self._defined("rotations", name, f"{where}.rotations")
            if "learn" not in self.raw["rotations"][name]:
                raise ObrError(f"{where}.rotations names {name!r}, which is not learned here; it has no curve.")

    def weight_entry(self, recipe: str) -> str:
        """JSON of what decides a recipe's checkpoint."""
        return json.dumps(self.parsed[recipe].decisive(), sort_keys=True)

    def evaluated(self, recipe: str, scheme: str) -> Recipe:
        """A recipe as its checkpoint is evaluated under an activation scheme."""
        return Recipe.parse(evaluated_entry(self.raw, recipe, scheme), f"recipe {recipe} with activations {scheme}")

    def evaluation_entry(self, recipe: str, scheme: str) -> str:
        """JSON of what decides how a recipe's checkpoint is evaluated under an activation scheme."""
        entry = self.evaluated(recipe, scheme).to_dict()
        entry.pop("label")
        return json.dumps(entry, sort_keys=True)

    def rows(self, entry: dict, where: str = "the entry") -> list[tuple[str, str]]:
        """(recipe, activation scheme) of an entry's rows, where a row has several seeds those of all; rows that only
        quote have none.

        Raises:
            ObrError: a recipe that the config does not define. where: the entry's place, in messages.
        """
        for row in entry.get("rows", []):
            for key in recipes_of_row(row):
                self._defined("recipes", key, f"{where}.rows")
        return rows_of(self.raw, entry)

    def recipes_of(self, model: str) -> list[str]:
        """Recipes whose checkpoints some table or figure asks of the model, each once."""
        entries = [*self.raw["tables"].values(), *self.raw["figures"].values()]
        return list(dict.fromkeys(row for e in entries if model in e.get("models", []) for row, _ in self.rows(e)))

    def artefacts(self, entry: dict) -> Iterator[str]:
        """The files that a table or figure is made of, below the results folder."""
        if entry.get("kind") == "kernels":
            yield below("kernels", device=entry["device"])
        for model in entry.get("models", []):
            for rotation in entry.get("rotations", []):
                yield below("learning_curve", rotation=rotation, model=model)
            for recipe, scheme in self.rows(entry):
                names = {"model": model, "recipe": recipe}
                if any(scores_of(entry).values()):
                    yield below("evaluation", **names, activations=scheme)
                for artefact in ["manifest", *READ_BY_FIGURES.get(entry.get("kind"), ())]:
                    yield below(artefact, **names)

    @cached_property
    def scores(self) -> dict[tuple[str, str, str], dict[str, list[str]]]:
        """What tables and figures ask of each (model, recipe, activation scheme); see `requested_scores`."""
        return requested_scores(self.raw)

    def measured_calibration(self, key: str) -> str:
        """The windows on which a recipe's options are measured: those of its calibration, in the order drawn."""
        name = self.parsed[key].calibration
        drawn = name.removesuffix(overrides.REVERSED)
        return drawn if drawn in self.raw["calibrations"] else name

    def measured_blocks(self, options: str, rotation: str, calibration: str) -> str | None:
        """The blocks to measure: those of the recipes whose allocations choose from it, all if these differ."""
        found = {
            recipe.blocks
            for key, recipe in self.parsed.items()
            if recipe.allocation is not None
            and self.options_of(key) == options
            and (recipe.rotation, self.measured_calibration(key)) == (rotation, calibration)
        }
        return found.pop() if len(found) == 1 else None

    def check_widths(self, model: str, config: dict) -> None:
        """Raise ObrError if a recipe's pattern does not divide a layer of the model with this config.json."""
        check_widths(config, self.patterns_of(model), model)

    def patterns_of(self, model: str) -> dict[str, str | None]:
        """The patterns that the model's layers are given, by recipe, or by option of a recipe's allocation."""
        patterns = {}
        for key in self.recipes_of(model):
            recipe = self.parsed[key]
            patterns |= {f"{key}, {option.label}": option.pattern for option in recipe.options} or {
                key: recipe.pattern
            }
        return patterns


def check_widths(config: dict, patterns: dict[str, str | None], model: str) -> None:
    """Raise ObrError if a pattern, given by recipe, does not divide the width of one of the model's layers.

    config: the contents of a transformers config.json, as for `sizes_of`; sizes that cannot be are refused too.
    """
    sizes = sizes_of(config, model, ("hidden_size", "intermediate_size", "num_attention_heads"))
    for recipe, pattern in patterns.items():
        for layer, width in sizes.widths().items() if pattern else ():
            Pattern.parse(pattern).check_width(width, f"{layer} of {model} (recipe {recipe})")


def check_paths(section: dict, where: str) -> None:
    """Raise ObrError if a source of kind `path` names something that is not there."""
    for key, entry in section.items():
        source = entry.get("source")
        fields = source if isinstance(source, dict) else entry
        if fields.get("source") != "path":
            continue
        for name in filter(None, (fields.get("path") or fields.get("file"), fields.get("examples"))):
            path = os.path.expandvars(name)
            if "$" in path:
                raise ObrError(f"{where}.{key}: {name} names an environment variable that is not set; set it.")
            if not Path(os.path.expanduser(path)).exists():
                raise ObrError(f"{where}.{key}: {path} does not exist; correct the path or use another source.")


def objection(raw: dict, schema: dict) -> str | None:
    """One sentence for what the JSON schema has against a config, its deepest reason; None if nothing."""
    from jsonschema.exceptions import best_match

    error = best_match(_validator(schema).iter_errors(raw))
    if error is None:
        return None
    where = ".".join(map(str, error.absolute_path)) or "the config"
    if "propertyNames" in error.absolute_schema_path and error.validator == "pattern":
        what = f"{error.instance!r} cannot be a name; use letters, digits, '.', '_' and '-', a letter or digit first"
    elif error.validator == "type" and type(error.instance) is int and "string" in error.validator_value:
        what = f"{error.message}; put it in quotes, since YAML reads 2:4 as {2 * 60 + 4}"
    elif error.validator == "type" and type(error.instance) is float and "integer" in error.validator_value:
        what = f"{error.message}; write it without a point"
    else:
        what = f"{error.message}; the schema, workflow/schemas/config.schema.yaml, describes every key"
    return printable(f"{where}: {what}.")


def _validator(schema: dict):
    """JSON Schema's validator, stricter: a whole number has no point, and a number is finite."""
    from jsonschema import Draft202012Validator, validators

    types = Draft202012Validator.TYPE_CHECKER
    strict = types.redefine_many(
        {
            "integer": lambda _, value: type(value) is int,
            "number": lambda _, value: types.is_type(value, "number") and math.isfinite(value),
        }
    )
    return validators.extend(Draft202012Validator, type_checker=strict)(schema)
