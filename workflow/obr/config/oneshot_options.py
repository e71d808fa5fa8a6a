"""What `obr quantize` is asked for, and the recipe that its options and a base recipe make together."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from obr.config.config_files import DEFAULT, load_config, read_yaml
from obr.config.methods import METHODS, names_of
from obr.config.quantizer import check_choice
from obr.config.recipe import QUANTIZERS, Recipe
from obr.config.recipe_checks import DTYPES
from obr.config.recipe_origins import Origins, config_entry
from obr.config.schemes import scheme_entry
from obr.config.workflow import Config
from obr.errors import ObrError

# What differs from the defaults of a recipe where neither a recipe nor options are given.
BASE = {"method": "obr_gptq", "rotation": "quarot", "calibration": "wikitext2"}
BASE_ORIGIN = "default of obr quantize"
# Options that are fields of a recipe, of the same name.
FIELDS = (
    "method", "bits", "sparsity", "pattern", "group", "mask", "alpha", "column_order", "damp", "clip", "rotation",
    "seed", "calibration", "hessian",
)  # fmt: skip
OFFERED = tuple(name for name in METHODS if name != "dense" and not METHODS[name].adopted)  # methods of --method
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class OneShot:
    """The options of `obr quantize`; None where an option is not given. `obr.quantize` describes each."""

    model: str
    out: Path
    revision: str | None = None
    method: str | None = None
    bits: int | None = None
    sparsity: float | None = None
    pattern: str | None = None
    group: int | None = None
    mask: str | None = None
    alpha: float | None = None
    column_order: str | None = None
    damp: float | None = None
    clip: str | None = None
    activations: str | None = None
    activation_bits: int | None = None
    kv_bits: int | None = None
    rotation: str | None = None
    seed: int | None = None
    calibration: str | None = None
    samples: int | None = None
    seqlen: int | None = None
    hessian: str | None = None
    recipe: "str | dict | Recipe | None" = None
    evaluate: str | None = None
    configfile: Sequence[Path] = ()
    device: str = "auto"
    dtype: str | None = None
    activations_memory: float = 4096
    overwrite: bool = False

    def __post_init__(self):
        """Raise ObrError at what the parser of the command refuses, since `obr.quantize` has no parser before it."""
        check_choice(self.device, DEVICES, "device")
        if self.dtype is not None:
            check_choice(self.dtype, DTYPES, "dtype")
        memory = self.activations_memory
        if isinstance(memory, bool) or not isinstance(memory, int | float) or not 0 <= memory < float("inf"):
            raise ObrError(f"activations_memory is {memory!r}; it must be a number of MB from 0 on.")
        if self.seed is not None and (type(self.seed) is not int or self.seed < 0):
            raise ObrError(f"seed is {self.seed!r}; it must be a whole number from 0 on.")
        if self.recipe is not None and not isinstance(self.recipe, str | dict | Recipe):
            raise ObrError(f"recipe is {self.recipe!r}; give a name, a YAML file, a dictionary or an obr.Recipe.")

    @cached_property
    def config(self) -> Config:
        """The workflow's config, in which names are looked up; read when the first is."""
        if not self.configfile and not DEFAULT.is_file():
            raise ObrError(
                f"{DEFAULT} is not there to look names up in; give files, or name a config by --configfile."
            )
        return load_config(self.configfile)

    @property
    def config_name(self) -> str:
        """Of the config, in messages."""
        return " and ".join(map(str, self.configfile)) or "config.yaml"


def resolved_recipe(options: OneShot) -> tuple[Recipe, Origins]:
    """(recipe, where its values come from); rotation and calibration are still what the user named.

    Raises:
        ObrError: an option that would change nothing, one that contradicts another, or a value out of range.
    """
    if options.sparsity is not None and options.pattern is not None:
        raise ObrError(
            f"--sparsity {options.sparsity} and --pattern {options.pattern} are both given; a pattern sets the "
            "sparsity, so leave one of them out."
        )
    entry, origins = _base(options)
    for name in FIELDS:
        if (value := getattr(options, name)) is not None:
            entry[name], origins[name] = value, f"--{name}"
    for name in _not_taken(options, entry):
        entry.pop(name, None)
        origins.pop(name, None)
    if options.activations is not None:
        where = f"--activations of {options.config_name}"
        scheme = scheme_entry(options.config.raw, options.activations, where)
        entry = {key: value for key, value in entry.items() if key not in QUANTIZERS} | scheme
        origins |= dict.fromkeys(scheme, f"activations.{options.activations}")
    for flag, parts in (("activation_bits", ("activations", "o_inputs")), ("kv_bits", ("keys", "values"))):
        if (bits := getattr(options, flag)) is not None:
            for part in parts:
                if part != "o_inputs" or entry.get(part):  # by default those of the activations
                    entry[part], origins[part] = (
                        {**(entry.get(part) or {}), "bits": bits},
                        f"--{flag.replace('_', '-')}",
                    )
    if entry.get("method") in METHODS and METHODS[entry["method"]].adopted:
        raise ObrError(
            f"The recipe's method is {entry['method']!r}, which takes over a checkpoint that others made; run it by "
            "Snakemake."
        )
    if "calibration" not in entry:
        entry["calibration"], origins["calibration"] = BASE["calibration"], BASE_ORIGIN
    recipe = Recipe.parse(entry)
    if not reads_windows(recipe) and origins.get("calibration") == BASE_ORIGIN:
        entry.pop("calibration")
        origins.pop("calibration")
        recipe = Recipe.parse(entry)
    _refuse_idle(options, recipe)
    return recipe, Origins(entry, origins)


def _not_taken(options: OneShot, entry: dict) -> list[str]:
    """Fields that the options rule out: another size of zeros, another method; and options that the method does not
    take, which `_refuse_idle` names."""
    method = METHODS.get(entry.get("method"))
    found = {
        "pattern": options.sparsity is not None and options.pattern is None,
        "sparsity": options.pattern is not None and options.sparsity is None,
    }
    for name in ("pattern", "sparsity", "mask") if method is not None else ():
        is_taken = method.prunes if name != "mask" else not method.masks or entry.get("mask") in method.masks
        is_by_option = options.method is not None or getattr(options, name) is not None
        found[name] = found.get(name, False) or (is_by_option and not is_taken)
    return [name for name, ruled_out in found.items() if ruled_out]


def reads_windows(recipe: Recipe) -> bool:
    """Whether calibration windows are read: cached Hessians are collected for all methods, to measure errors by."""
    return recipe.needs_hessian or recipe.hessian == "cached"


def _base(options: OneShot) -> tuple[dict, dict[str, str]]:
    """(fields, {field: where it comes from}) of the recipe that the options change."""
    given = options.recipe
    if given is None:
        return dict(BASE), dict.fromkeys(BASE, BASE_ORIGIN)
    if isinstance(given, Recipe | dict):
        entry, origin = dict(given) if isinstance(given, dict) else given.to_dict(), "the recipe given"
    elif Path(given).is_file() or Path(given).suffix in (".yaml", ".yml"):
        entry, origin = read_yaml(Path(given)), str(given)
    else:
        return config_entry(options.config, str(given), options.config_name)
    entry = {key: value for key, value in entry.items() if value is not None}
    return entry, dict.fromkeys(entry, origin)


def _refuse_idle(options: OneShot, recipe: Recipe) -> None:
    """Raise ObrError at an option that is given and would change nothing."""
    method, named = METHODS[recipe.method], f"method {recipe.method}"
    if recipe.allocation is not None:
        chosen = "the recipe's allocation chooses it layer by layer; take a recipe without one"
        idle = dict.fromkeys(("method", "bits", "sparsity", "pattern"), chosen)
    else:
        idle = {}
    if not recipe.prunes and recipe.allocation is None:
        idle |= dict.fromkeys(("sparsity", "pattern"), f"{named} removes no weights; choose another method")
    if options.mask is not None and recipe.allocation is None and options.mask not in method.masks:
        choices = f"takes the mask {' or '.join(method.masks)}" if method.masks else "has no mask to choose"
        idle["mask"] = f"{named} {choices}; choose another method or mask"
    if recipe.allocation is None and not method.reads_alpha:
        idle["alpha"] = f"{named} does not read it; use {names_of('reads_alpha')}"
    if recipe.allocation is None and not method.ordered:
        idle["column_order"] = f"{named} treats all columns alike; use {names_of('ordered')}"
    if not recipe.needs_hessian:
        idle["damp"] = f"{named} reads no Hessian; choose another method"
    if recipe.bits == 16:
        idle["clip"] = "weights of 16 bits have no scales; use fewer bits"
    if not reads_windows(recipe):
        reason = f"{named} reads no calibration windows; choose another method"
        idle |= dict.fromkeys(("calibration", "samples", "hessian"), reason)
        if options.evaluate is None:
            idle["seqlen"] = reason
    for name, reason in idle.items():
        if (value := getattr(options, name)) is not None:
            raise ObrError(f"--{name} {value} would change nothing, since {reason}, or leave it out.")
