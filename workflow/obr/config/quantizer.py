"""Settings of the quantisers of activations, queries, keys and values."""

from dataclasses import dataclass, fields

from obr.errors import ObrError


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


def build_settings(cls, entry: dict, what: str):
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(entry) - known)
    if unknown:
        raise ObrError(f"{what} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}.")
    return cls(**entry)


def check_choice(value, choices, what: str) -> None:
    if value not in choices:
        raise ObrError(f"{what} is {value!r}; choose one of {', '.join(map(str, choices))}.")
