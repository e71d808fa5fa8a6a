"""Settings on the command line: `method=obr_gptq bits=4 sparsity=0.5 activations.bits=4`."""

import json
import re
import shlex
from collections.abc import Sequence

from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.runtime.files import parse_object

SHOWN = ("bits", "sparsity")  # also where they are the defaults of the method
KEY = re.compile(r"(?!\d+$)(?!\{)[^.=\s]+")  # of a mapping that is written with dots; "{" begins an object


def as_arguments(entry: dict) -> list[str]:
    """The settings of a recipe as words of a command: its method, bits and sparsity, and what differs from defaults.

    Fields of a field have a dot, as `activations.bits=4`. Values are JSON, and strings stand without quotes where
    they cannot be mistaken for anything else.

        >>> as_arguments({"method": "obr_gptq", "bits": 4, "sparsity": 0.5, "pattern": None, "keys": {"bits": 8}})
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
    """`as_arguments`, quoted for a shell."""
    return shlex.join(as_arguments(entry))


def settings_words(entry: dict) -> list[str]:
    """The settings of any entry of the config as words of a command.

    Keys of a mapping in a mapping follow a dot, as do the places of a list's items, counted from 0.

        >>> settings_words({"seqlen": 512, "source": {"repo": "a/b"}, "mix": ["c4", "wikitext2"]})
        ['mix.0=c4', 'mix.1=wikitext2', 'seqlen=512', 'source.repo=a/b']
    """
    if not all(KEY.fullmatch(key) for key in entry):
        return [_text(entry)]
    return [word for key in sorted(entry) for word in _words(key, entry[key])]


def settings_line(entry: dict) -> str:
    """`settings_words`, quoted for a shell."""
    return shlex.join(settings_words(entry))


def _words(name: str, value) -> list[str]:
    if isinstance(value, dict) and value and all(KEY.fullmatch(key) for key in value):
        inner = [(key, value[key]) for key in sorted(value)]
    elif isinstance(value, list) and value:
        inner = list(enumerate(value))
    else:
        return [f"{name}={_text(value)}"]
    return [word for key, item in inner for word in _words(f"{name}.{key}", item)]


def parse_settings(words: Sequence[str]) -> dict:
    """The entry of such words, or of one JSON object.

    Raises:
        ObrError: a word is no setting, or a setting is given twice.
    """
    if len(words) == 1 and words[0].lstrip().startswith("{"):
        return _object(words[0])
    found: dict = {}
    for word in words:
        key, equals, text = word.partition("=")
        *outer, name = key.split(".")
        place = found
        for part in outer:
            place = place.setdefault(part, {}) if isinstance(place, dict) else None
        if not equals or not all((*outer, name)) or not isinstance(place, dict) or name in place:
            raise ObrError(f"{word!r} is no setting, or one that is given twice; write KEY=VALUE.")
        place[name] = _value(text)
    return _with_lists(found)


def _with_lists(value):
    """Mappings whose keys are the places of a list's items as lists, at any depth."""
    if not isinstance(value, dict):
        return value
    if value and set(value) == {str(place) for place in range(len(value))}:
        return [_with_lists(value[str(place)]) for place in range(len(value))]
    return {key: _with_lists(item) for key, item in value.items()}


def _object(text: str) -> dict:
    try:
        return parse_object(text)
    except (ValueError, RecursionError) as error:
        raise ObrError(f"the settings are not JSON ({error}); write KEY=VALUE, or correct it.") from error


def _text(value) -> str:
    if isinstance(value, str) and value.isprintable() and _value(value) == value:
        return value
    return json.dumps(value, sort_keys=True)


def _value(text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
