"""A recipe on the command line: `method=obr_gptq bits=4 sparsity=0.5 activations.bits=4`."""

import json
import shlex
from collections.abc import Sequence

from obr.config.recipe import Recipe
from obr.errors import ObrError

SHOWN = ("bits", "sparsity")  # also where they are the defaults of the method


def spelled(entry: dict) -> list[str]:
    """The settings of a recipe as words of a command: its method, bits and sparsity, and what differs from defaults.

    Fields of a field have a dot, as `activations.bits=4`. Values are JSON, and strings stand without quotes where
    they cannot be mistaken for anything else.

        >>> spelled({"method": "obr_gptq", "bits": 4, "sparsity": 0.5, "pattern": None, "keys": {"bits": 8}})
        ['method=obr_gptq', 'bits=4', 'keys.bits=8', 'sparsity=0.5']
    """
    usual = Recipe(method=entry["method"]).to_dict()
    found = [f"method={_text(entry['method'])}"]
    for key, value in sorted(entry.items()):
        if key == "method" or (value == usual.get(key) and not (key in SHOWN and value)):
            continue
        if isinstance(value, dict):
            inner = usual[key] if isinstance(usual.get(key), dict) else {}
            differ = [name for name in sorted(value) if name not in inner or value[name] != inner[name]]
            found += [f"{key}.{name}={_text(value[name])}" for name in differ]
        else:
            found.append(f"{key}={_text(value)}")
    return found


def command_line(entry: dict) -> str:
    """`spelled`, quoted for a shell."""
    return shlex.join(spelled(entry))


def parse_settings(words: Sequence[str]) -> dict:
    """The recipe's entry of such words, or of one JSON object.

    Raises:
        ObrError: a word is no setting, or a setting is given twice.
    """
    if len(words) == 1 and words[0].lstrip().startswith("{"):
        return _object(words[0])
    found: dict = {}
    for word in words:
        key, equals, text = word.partition("=")
        outer, _, name = key.partition(".")
        place = found.setdefault(outer, {}) if name else found
        if not equals or not key or not isinstance(place, dict) or (name or outer) in place:
            raise ObrError(f"{word!r} is no setting of a recipe, or one that is given twice; write KEY=VALUE.")
        place[name or outer] = _value(text)
    return found


def _object(text: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ObrError(f"the recipe is not JSON ({error}); write KEY=VALUE, or correct it.") from error
    return value


def _text(value) -> str:
    if isinstance(value, str) and _value(value) == value:
        return value
    return json.dumps(value, sort_keys=True)


def _value(text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
