"""Where each value of a recipe comes from: the config's recipe, its activation scheme, or the default."""

from dataclasses import dataclass, fields

from obr.config.recipe import Recipe
from obr.config.schemes import evaluated_entry
from obr.config.workflow import Config
from obr.errors import ObrError


@dataclass(frozen=True)
class Origins:
    """given: {field: value} before the checks of `Recipe.parse`. named: {field: where that value comes from}."""

    given: dict
    named: dict[str, str]

    def of(self, recipe: Recipe, field: str, value: object) -> str:
        """Where a field's value in the checked recipe comes from, such as "default"."""
        if field == "sparsity" and recipe.pattern:
            return "follows from the pattern"
        if field in self.named and (isinstance(value, dict) or self.given[field] == value):
            return self.named[field]
        if field not in self.named and value == Recipe(recipe.method).to_dict()[field]:
            return "default"
        return f"follows from the {'allocation' if recipe.allocation else 'method'}"

    def lines(self, recipe: Recipe) -> list[str]:
        """The recipe as YAML: one field per line, each with a comment on where its value comes from."""
        found = [(f.name, recipe.to_dict()[f.name]) for f in fields(Recipe)]
        found = [(name, value) for name, value in found if value is not None]
        texts = [f"{name}: {_flow(value)}" for name, value in found]
        width = max(len(text) for text in texts if len(text) < 60)
        return [
            f"{text.ljust(width)}  # {self.of(recipe, name, value)}"
            for text, (name, value) in zip(texts, found, strict=True)
        ]


def _flow(value) -> str:
    """A value as YAML on one line."""
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=1e9, sort_keys=False).removesuffix("...\n").strip()


def referred(config: Config, recipe: Recipe) -> list[str]:
    """The entries of the config that a recipe names, as comments: its rotation and its calibration."""
    names = [("rotations", recipe.rotation), ("calibrations", recipe.calibration)]
    return [
        f"# {section}.{name}: {_flow(config.raw[section][name])}"
        for section, name in names
        if name in config.raw.get(section, {})
    ]


def config_entry(config: Config, name: str, where: str, scheme: str | None = None) -> tuple[dict, dict[str, str]]:
    """(fields, {field: the entry that it stands in}) of a recipe of the config.

    scheme: the activation scheme that it is evaluated with; None for what its checkpoint depends on alone. where: the
    config's name in messages.

    Raises:
        ObrError: the config has no recipe, or no scheme, of that name.
    """
    if name not in config.recipes:
        close = [key for key in config.recipes if name in key or key in name][:8] or list(config.recipes)[:8]
        raise ObrError(
            f"{name} is neither a YAML file nor a recipe of {where}, which has {len(config.recipes)}, such as "
            f"{', '.join(close)}; obr recipes list prints them all."
        )
    own = config.raw["recipes"][name]
    entry = evaluated_entry(config.raw, name, scheme) if scheme else config.recipes[name]
    entry = {key: value for key, value in entry.items() if value is not None and key != "source"}
    named = scheme or own.get("activations")
    of_scheme = config.raw["activations"][named] if named else {}
    return entry, {
        key: f"recipes.{name}" if own.get(key) is not None and key not in of_scheme else f"activations.{named}"
        for key in entry
    }


def listing(config: Config) -> list[str]:
    """The recipes of a config, one per line: name, method, bits, zeros, rotation, calibration, label."""
    rows = [("recipe", "method", "bits", "zeros", "rotation", "calibration", "label")]
    for key, recipe in config.parsed.items():
        zeros = recipe.pattern or (f"{100 * recipe.sparsity:g} %" if recipe.sparsity else "-")
        bits = recipe.setting.partition("A")[0].removeprefix("W")
        rows.append(
            (key, recipe.method, bits, zeros, recipe.rotation, recipe.calibration or "-", recipe.label or "-")
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
