"""Sizes in a model's config.json, for stages that only count: read without transformers."""

import json
from dataclasses import dataclass
from pathlib import Path

from obr.errors import ObrError, first_line

# Largest values that are built or counted; beyond them a number is a mistake that would fill the memory.
LARGEST = {"num_hidden_layers": 10_000, "max_window_layers": 10_000, "num_labels": 100_000}
LARGEST_SIZE = 2**31
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
OPTIONAL_SIZES = (
    "num_key_value_heads", "head_dim", "num_experts_per_tok", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
# Keys of a family's own for the number of experts in a block.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Experts:
    """Experts of a block: their number, how many a token is sent to, inner width of each, and that of the shared ones
    together, which every token passes (0 if there are none)."""

    number: int
    chosen: int
    width: int
    shared: int = 0


@dataclass(frozen=True)
class Latent:
    """Latent attention: ranks of the latent vectors of queries (0 if there is none) and of keys with values, channels
    of a head's queries and keys, how many of them RoPE turns, and channels of a head's values."""

    query_rank: int
    rank: int
    key_dim: int
    rotary: int
    value_dim: int


@dataclass(frozen=True)
class RawSizes:
    """Sizes in a config.json: hidden d, intermediate f, heads h, KV heads k, head dim m, blocks, vocabulary v.

    Those that the caller does not need may be None. f: of blocks without experts. m: of latent attention, that of
    values.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    blocks: int | None
    vocabulary: int | None
    experts: Experts | None = None
    latent: Latent | None = None

    def widths(self) -> dict[str, int]:
        """Input channels of the linear layers, by what they are called in messages."""
        found = {"q, k, v, up and gate": self.hidden, "o_proj": self.heads * self.head_dim}
        if self.latent:
            found |= {"q_b_proj": self.latent.query_rank or self.hidden, "kv_b_proj": self.latent.rank}
        if self.experts:
            found["down_proj of experts"] = self.experts.width
            found["down_proj of shared experts"] = self.experts.shared or self.experts.width
        return found if self.experts else found | {"down_proj": self.intermediate}


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

    raw: with what `architectures.with_defaults` adds, for families with a head_dim of their own.
    what: the model's name in messages. needed: keys that must be there; the others of SIZES may be missing.

    Raises:
        ObrError: a size is missing, or no positive whole number.
    """
    _check_numbers(raw, what)
    for key in needed:
        if raw.get(key) is None:
            raise ObrError(f"config.json of {what} has no {key}; add it, or choose another model.")
    hidden, intermediate, heads, blocks, vocabulary = (raw.get(key) for key in SIZES)
    latent = _latent(raw)
    head_dim = latent.value_dim if latent else raw.get("head_dim")
    return RawSizes(
        hidden, intermediate, heads, raw.get("num_key_value_heads") or heads, head_dim or max(1, hidden // heads),
        blocks, vocabulary, _experts(raw), latent,
    )  # fmt: skip


def _experts(raw: dict) -> Experts | None:
    number = next((raw[key] for key in EXPERTS if raw.get(key)), None)
    if number is None:
        return None
    width = raw.get("moe_intermediate_size") or raw["intermediate_size"]
    shared = raw.get("shared_expert_intermediate_size") or width * (raw.get("n_shared_experts") or 0)
    return Experts(number, raw.get("num_experts_per_tok") or 1, width, shared)


def _latent(raw: dict) -> Latent | None:
    if not raw.get("kv_lora_rank"):
        return None
    rotary = raw.get("qk_rope_head_dim") or 0
    keys, values = rotary + (raw.get("qk_nope_head_dim") or 0), raw.get("v_head_dim") or 0
    return Latent(raw.get("q_lora_rank") or 0, raw["kv_lora_rank"], keys, rotary, values)


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
