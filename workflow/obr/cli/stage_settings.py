"""What may stand after `--settings` and `--recipe`: keys and descriptions, read from the config's schema."""

import argparse
import difflib
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from obr.config.recipe_settings import settings_words
from obr.config.workflow import objection
from obr.errors import ObrError

SCHEMA = Path(__file__).parents[2] / "schemas" / "config.schema.yaml"
WIDTH = 110
# Sub-command -> where the schema describes its settings.
SECTIONS = {
    "download-model": "properties/models/additionalProperties",
    "download-text": "$defs/text_source",
    "download-documents": "$defs/text_source",
    "download-task": "properties/zero_shot/additionalProperties",
    "download-rotation": "properties/rotations/additionalProperties",
    "learn-rotation": "properties/rotations/additionalProperties",
    "calibrate": "properties/calibrations/additionalProperties",
    "generate": "properties/calibrations/additionalProperties",
    "mix": "properties/calibrations/additionalProperties",
    "gradients": "properties/gradients",
    "sensitivity": "properties/layer_options",
    "download-released": "$defs/recipe/properties/source",
    "kernels": "properties/kernels",
    "compress": "$defs/recipe",
    "allocate": "$defs/recipe",
    "released": "$defs/recipe",
}
BLOCKS = {"description": "the blocks that are measured, as a Python slice; null for all"}
# Keys that a stage's command line never has: they name tables' rows, or files that have a flag of their own.
ELSEWHERE = {
    "download-model": ("label", "published", "parameters", "sizes", "gated"),
    "download-task": ("text", "limit", "batch_tokens", "bos"),
}


def settings_help(command: str) -> str:
    """The keys of a sub-command's settings, one per line, with their descriptions; empty where it has none."""
    left_out = ELSEWHERE.get(command, ())
    lines = [line for name, line in _keys(command) if name.split(".")[0] not in left_out]
    return "\n".join(["settings, as KEY=VALUE:", *lines]) if lines else ""


def check_settings(command: str, entry: dict) -> None:
    """Refuse a key that the sub-command's settings do not have, and a value that the key does not take.

    Raises:
        ObrError: with the nearest key that they have, or with the value.
    """
    known = {name for name, _ in _keys(command)}
    for word in settings_words(entry):
        name = re.sub(r"\.\d+(?=\.|$)", ".0", word.partition("=")[0])
        places = {name, name.removesuffix(".0"), *(name[: dot.start()] for dot in re.finditer(r"\.", name))}
        if known and not places & known and not any(key.startswith(f"{name}.") for key in known):
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ObrError(f"{name} is no setting of {command}{hint} See obr {command} --help.")
    if known and (sentence := objection(entry, _schema_of(command))):
        raise ObrError(f"a setting of {command} cannot be: {sentence}")


def _schema_of(command: str) -> dict:
    """The part of the schema that the settings of a sub-command have to fit."""
    schema, node = _described(command)
    schema["$defs"]["learn"].pop("required")  # the calibration: its windows are given by --tokens
    if command == "sensitivity":
        blocks = schema["$defs"]["recipe"]["properties"]["blocks"]
        node = {"type": "object", "properties": {"options": node["additionalProperties"], "blocks": blocks}}
    return {**node, "$defs": schema["$defs"]}


def _described(command: str) -> tuple[dict, dict]:
    """(the whole schema, its node for a sub-command's settings)."""
    import yaml

    schema = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    node = schema
    for part in SECTIONS[command].split("/"):
        node = node[part]
    return schema, node


def _keys(command: str) -> list[tuple[str, str]]:
    """(key, its line of help) of all that the schema has for a sub-command; nothing where it has no settings."""
    if command not in SECTIONS:
        return []
    (schema, node), prefix = _described(command), ""
    if command == "sensitivity":
        prefix, node = "options.0.", node["additionalProperties"]["items"]
    found = list(_lines(schema, node, prefix))
    return [*found, ("blocks", _line("blocks", BLOCKS))] if command == "sensitivity" else found


def _lines(schema: dict, node: dict, prefix: str) -> Iterator[tuple[str, str]]:
    """(key with the keys around it, its line of help) of each key of a schema's node, those of mappings in turn."""
    node = _resolved(schema, node)
    for place, choice in enumerate(node.get("oneOf", [])):
        if "properties" in choice:
            if place:
                yield prefix, "    or"
            yield from _lines(schema, choice, prefix)
    for name, entry in node.get("properties", {}).items():
        entry, key = _resolved(schema, entry), f"{prefix}{name}"
        items = _resolved(schema, entry.get("items", {}))
        if "properties" in entry or any("properties" in choice for choice in entry.get("oneOf", [])):
            yield from _lines(schema, entry, f"{key}.")
        elif "properties" in items:
            yield from _lines(schema, items, f"{key}.0.")
        else:
            yield key, _line(f"{key}.0" if entry.get("type") == "array" else key, entry)


def _line(key: str, entry: dict) -> str:
    if "const" in entry:
        key += f"={entry['const']}"
    text = " ".join(entry.get("description", "").split())
    if "enum" in entry:
        text += f"; one of {', '.join(map(_spelled, entry['enum']))}"
    if entry.get("default") is not None:
        text += f" (default: {_spelled(entry['default'])})"
    return textwrap.fill(f"{key:<24} {text}", WIDTH, initial_indent="  ", subsequent_indent=" " * 27)


def _spelled(value) -> str:
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value)


def _resolved(schema: dict, node: dict) -> dict:
    """A node with what it refers to; its own keys win."""
    if "$ref" not in node:
        return node
    found = schema
    for part in node["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    return {**_resolved(schema, found), **{key: value for key, value in node.items() if key != "$ref"}}


class StageParser(argparse.ArgumentParser):
    """Of a stage: its help ends with the keys of its settings, which are read only then."""

    def format_help(self) -> str:
        keys = settings_help(self.prog.split()[-1])
        return f"{super().format_help()}\n{keys}\n" if keys else super().format_help()
