"""Sizes in a model's config.json, for stages that only count: read without transformers."""

import json
from dataclasses import dataclass
from pathlib import Path

from obr.errors import ObrError, first_line

# Largest values that are built or counted; beyond them a number is a mistake that would fill the memory.
LARGEST = {"num_hidden_layers": 10_000, "max_window_layers": 10_000, "num_labels": 100_000}
LARGEST_SIZE = 2**31
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")
HEAD_DIMS = {
    "gemma": 256,
    "qwen3": 128,
    "gemma2": 256,
    "gemma3_text": 256,
    "glm4": 128,
}  # of families whose head_dim has a default of its own


@dataclass(frozen=True)
class RawSizes:
    """Sizes in a config.json: hidden d, intermediate f, heads h, KV heads k, head dim m, blocks, vocabulary v.

    Those that the caller does not need may be None.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    blocks: int | None
    vocabulary: int | None


def read_config(folder: Path, what: str | None = None) -> dict:
    """The contents of a folder's config.json. what: the model's name in messages. Raises ObrError."""
    what = what or str(folder)
    try:
        raw = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ObrError(
            f"{what} holds no model: config.json is missing or not JSON ({first_line(error)}); fetch the model again "
            "or choose another."
        ) from error
    if not isinstance(raw, dict):
        raise ObrError(
            f"config.json of {what} holds a JSON {type(raw).__name__}, not an object; choose another model."
        )
    return raw


def sizes_of(raw: dict, what: str, needed: tuple[str, ...] = SIZES) -> RawSizes:
    """The sizes in the contents of a config.json; transformers is not needed.

    what: the model's name in messages. needed: keys that must be there; the others of SIZES may be missing.

    Raises:
        ObrError: a size is missing, or no positive whole number.
    """
    _check_numbers(raw, what)
    for key in needed:
        if raw.get(key) is None:
            raise ObrError(f"config.json of {what} has no {key}; add it, or choose another model.")
    hidden, intermediate, heads, blocks, vocabulary = (raw.get(key) for key in SIZES)
    head_dim = raw.get("head_dim") or HEAD_DIMS.get(str(raw.get("model_type")))
    return RawSizes(
        hidden, intermediate, heads, raw.get("num_key_value_heads") or heads, head_dim or max(1, hidden // heads),
        blocks, vocabulary,
    )  # fmt: skip


def _check_numbers(raw: dict, what: str) -> None:
    """Raise ObrError at a size that is no whole number from 1 on, or one too large to be meant."""
    for key in (*SIZES, *OPTIONAL_SIZES, *LARGEST):
        value, largest = raw.get(key), LARGEST.get(key, LARGEST_SIZE)
        if value is None:
            continue
        least = 1 if key in (*SIZES, *OPTIONAL_SIZES) else 0
        if type(value) is not int or not least <= value <= largest:
            raise ObrError(
                f"{key} in config.json of {what} is {value!r}; it must be a whole number from {least} to {largest:,}."
            )
