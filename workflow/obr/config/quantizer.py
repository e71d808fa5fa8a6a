"""Settings of the quantisers of activations, queries, keys and values."""

from collections.abc import Collection
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral, Real
from types import NoneType
from typing import TypeVar, get_args, get_type_hints

from obr.errors import ObrError

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class QuantizerSettings:
    """Dynamic (per-token) quantisation of activations, keys or values.

    group_size None: one scale for all channels of a token; "head": one for the channels of each head.
    clip_ratio shrinks the range before scaling; "learned": by factors that come with the rotation.
    """

    bits: int = 16
    symmetric: bool = True
    group_size: int | str | None = None
    clip_ratio: float | str = 1.0

    @classmethod
    def parse(cls, entry: "dict | QuantizerSettings | None", what: str) -> "QuantizerSettings":
        """Settings from a config entry; 16 bits from None.

        Raises:
            ObrError: an unknown key, or a value out of range. what: the entry's name in the message.
        """
        if isinstance(entry, QuantizerSettings):
            return entry
        settings = build_settings(cls, entry or {}, what)
        if settings.bits not in range(2, 17):
            raise ObrError(f"{what}: bits {settings.bits} is out of range; use 2 to 15, or 16 for none.")
        ratio, group = settings.clip_ratio, settings.group_size
        if ratio != "learned" and (isinstance(ratio, str) or not 0 < ratio <= 1):
            raise ObrError(f"{what}: clip_ratio {ratio} must lie in (0, 1], or be learned.")
        if group not in (None, "head") and (isinstance(group, str) or group < 1):
            raise ObrError(f"{what}: group_size {group} must be positive, head, or null.")
        return settings


SIXTEEN_BITS = QuantizerSettings()


# A plain type of a field -> (the values that it takes, numpy's among them, and their name in messages).
PLAIN = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
    bool: (bool, "true or false"),
}


def build_settings(cls: type[Settings], entry: dict, what: str) -> Settings:
    """A dataclass from a config entry. Raises ObrError at an unknown key or a value of another type."""
    if not isinstance(entry, dict):
        raise ObrError(f"{what} is {entry!r}, which is not a mapping; correct it.")
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(entry) - known)
    if unknown:
        raise ObrError(f"{what} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}.")
    for key, hint in get_type_hints(cls).items():
        if entry.get(key) is not None:
            _check_type(entry[key], get_args(hint) or (hint,), f"{what}.{key}")
    return cls(**entry)


def _check_type(value, kinds: tuple, what: str) -> None:
    """Raise ObrError unless a value has one of a field's types, or is the mapping that a dataclass is built from."""
    kinds = tuple(kind for kind in kinds if kind is not NoneType)
    if all(kind in PLAIN for kind in kinds):
        fits = any(isinstance(value, PLAIN[kind][0]) and (kind is bool) == isinstance(value, bool) for kind in kinds)
        wanted = " or ".join(PLAIN[kind][1] for kind in kinds)
    elif all(is_dataclass(kind) for kind in kinds):
        fits, wanted = isinstance(value, (dict, *kinds)), "a mapping"
    else:
        return
    if not fits:
        raise ObrError(f"{what} is {value!r}, which is not {wanted}; correct it.")


def check_choice(value: object, choices: Collection, what: str) -> None:
    """Raise ObrError unless a value is one of the choices. what: its name in the message."""
    if value not in choices:
        raise ObrError(f"{what} is {value!r}; choose one of {', '.join(map(str, choices))}.")
