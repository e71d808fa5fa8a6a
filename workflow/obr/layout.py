"""Families of models: where a decoder keeps its blocks, its linear layers and its norms.

A family is one entry of FAMILIES; everything else reads the entry.
"""

from dataclasses import dataclass, field

from obr.errors import ObrError


@dataclass(frozen=True)
class Layout:
    """Module paths, from the model or (groups, norms, attention) from a block.

    groups: linear layers that read the same input, in the order in which a block computes them; `o` reads the
    attention's output and `down` the gated product. norms: the norm that feeds a group.
    """

    blocks: str = "model.layers"
    embed: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    groups: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "o": ("self_attn.o_proj",),
            "up_gate": ("mlp.up_proj", "mlp.gate_proj"),
            "down": ("mlp.down_proj",),
        }
    )
    norms: dict[str, str] = field(
        default_factory=lambda: {"qkv": "input_layernorm", "up_gate": "post_attention_layernorm"}
    )

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for names in self.groups.values() for name in names)

    def group_of(self, linear: str) -> str:
        return next(group for group, names in self.groups.items() if linear in names)


# model_type of the configuration -> layout. All four are pre-norm RMSNorm decoders with gated MLPs.
FAMILIES: dict[str, Layout] = {
    "llama": Layout(),
    "mistral": Layout(),
    "qwen2": Layout(),
    "qwen3": Layout(),
}


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a model: hidden d, intermediate f, heads h, KV heads k, head dim m, number of blocks."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    blocks: int

    @classmethod
    def of(cls, config) -> "Dimensions":
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            blocks=config.num_hidden_layers,
        )

    def columns(self) -> dict[str, int]:
        """Input columns of each group's layers."""
        return {
            "qkv": self.hidden,
            "o": self.heads * self.head_dim,
            "up_gate": self.hidden,
            "down": self.intermediate,
        }


def layout_of(config) -> Layout:
    """The layout of a transformers configuration.

    Raises:
        ObrError: the family is not known; mixtures of experts are refused by name.
    """
    family = config.model_type
    if family in FAMILIES:
        return FAMILIES[family]
    known = ", ".join(FAMILIES)
    if any(hasattr(config, key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ObrError(f"Model family {family!r} is a mixture of experts, which is not supported; use {known}.")
    raise ObrError(
        f"Model family {family!r} is not known; use one of {known}, or add an entry to FAMILIES in layout.py."
    )
