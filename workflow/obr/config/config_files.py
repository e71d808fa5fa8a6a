"""The workflow's configuration read from its files, without Snakemake: merged, checked, defaults filled in."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path

from obr.config.recipe_sheets import read_sheets
from obr.config.schemes import check_defined
from obr.config.workflow import Config, objection
from obr.errors import ObrError, first_line

PROJECT = Path(__file__).parents[3]
DEFAULT = PROJECT / "config.yaml"
FOLDER = PROJECT / "config"
SCHEMA = PROJECT / "workflow/schemas/config.schema.yaml"
# What names mean, whichever experiment uses them; recipes are in sheets beside these files.
DEFINITIONS = tuple(
    FOLDER / f"{name}.yaml" for name in ("models", "datasets", "rotations", "activations", "layer_options", "kernels")
)


def load_config(files: Sequence[Path] = ()) -> Config:
    """The configuration of the workflow, as Snakemake has it with `--configfile FILE ...`.

    files: merged in their order, mappings key by key, over the project's own files.

    Raises:
        ObrError: a file cannot be read, or the schema or `Config` refuses what is in it.
    """
    over: dict = {}
    for file in files:
        merge(over, read_yaml(file))
    return Config(layered(over))


def layered(over: dict) -> dict:
    """What is given on the command line, laid over the project's files, with the schema's defaults.

    The lowest layer are the sheets of recipes. Then come the definitions, config.yaml, the experiments that are
    named, and what is given.

    Raises:
        ObrError: a file cannot be read, or the schema refuses what is in it.
    """
    raw: dict = {}
    for file in (*DEFINITIONS, DEFAULT):
        merge(raw, read_yaml(file))
    merge(raw, deepcopy(over))
    for file in experiment_files(raw):
        merge(raw, read_yaml(file))
    merge(raw, deepcopy(over))
    add_recipes(raw)
    check_overridden(raw)
    schema = read_yaml(SCHEMA)
    _fill_defaults(raw, schema)
    if sentence := objection(raw, schema):
        raise ObrError(sentence)
    return raw


def experiment_files(raw: dict) -> list[Path]:
    """The files of the experiments that a config names: a list, or one name.

    Raises:
        ObrError: there is no file of that name in config/experiments.
    """
    names, folder = raw.get("experiments"), FOLDER / "experiments"
    names = [names] if isinstance(names, str) else names if isinstance(names, list) else []  # or the schema objects
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    for name in names:
        check_defined(known, "config/experiments", name, "experiments")
    return [folder / f"{name}.yaml" for name in names]


def check_overridden(raw: dict) -> None:
    """Raise ObrError if `overrides` changes a table or figure that neither the config nor any experiment has."""
    overrides, sections = raw.get("overrides"), ("tables", "figures")
    if not isinstance(overrides, dict) or not all(isinstance(overrides.get(s, {}), dict) for s in sections):
        return  # none, or what the schema objects to
    for section in sections:
        known = set(raw.get(section) or {})
        if set(overrides.get(section, {})) <= known:
            continue
        for path in sorted((FOLDER / "experiments").glob("*.yaml")):
            known |= set(read_yaml(path).get(section, {}))
        for name in overrides[section]:
            check_defined(sorted(known), f"the config and its experiments' {section}", name, f"overrides.{section}")


def add_recipes(raw: dict) -> None:
    """Lay a config's recipes over those of the sheets, in place."""
    own = raw.get("recipes", {})
    if isinstance(own, dict):  # the schema refuses anything else
        raw["recipes"] = merge(read_sheets(FOLDER / "recipes"), own)


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file.

    Raises:
        ObrError: the file cannot be read, holds anything else, or has a key twice or one that is no text.
    """
    import yaml

    try:
        value = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_loader(path))
    except OSError as error:
        raise ObrError(f"{path} cannot be read ({error.strerror}); correct the path.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ObrError(f"{path} is not YAML in UTF-8 ({first_line(error)}); correct the file.") from error
    if not isinstance(value, dict):
        raise ObrError(f"{path} holds a YAML {type(value).__name__}, not a mapping; correct the file.")
    return value


def _loader(path: Path):
    """YAML's safe loader, which takes each key of a mapping once: YAML itself lets the last of several win."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        def construct_mapping(self, node, deep=False):
            known = set()
            for key, _ in node.value:
                place = f"{path} line {key.start_mark.line + 1}"
                if not key.tag.endswith((":str", ":merge")):
                    raise ObrError(f"{place}: YAML reads the key {key.value} as no text; put it in quotes.")
                if key.value in known:
                    raise ObrError(f"{place}: {key.value!r} is there twice; leave one of them out.")
                known.add(key.value)
            return super().construct_mapping(node, deep=deep)

    return Loader


def merge(under: dict, over: dict) -> dict:
    """Lay one configuration over another in place, as Snakemake does: mappings key by key, all else replaced."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            merge(under[key], value)
        else:
            under[key] = value
    return under


def _fill_defaults(raw: dict, schema: dict) -> None:
    """Set the schema's defaults in place, as snakemake.utils.validate does."""
    from jsonschema import Draft202012Validator, validators

    check = Draft202012Validator.VALIDATORS["properties"]

    def properties(validator, subschemas, instance, parent) -> Iterable:
        if isinstance(instance, dict):
            for key, subschema in subschemas.items():
                if "default" in subschema:
                    instance.setdefault(key, deepcopy(subschema["default"]))
        yield from check(validator, subschemas, instance, parent)

    filling = validators.extend(Draft202012Validator, {"properties": properties})
    for _ in filling(schema).iter_errors(raw):  # `objection` reports errors, once everything is filled in
        pass
