"""Families of models: where a decoder keeps its blocks, its linear layers and its norms.

A family is one entry of FAMILIES; everything else reads the entry.
"""

from dataclasses import dataclass, field

from obr.errors import ObrError

# What a linear layer does in a block -> the group that it is in; in the order of Layout.groups.
GROUP_OF = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "up": "up_gate", "gate": "up_gate", "down": "down"}


@dataclass(frozen=True)
class Layout:
    """Module paths, from the model or (groups, norms, attention) from a block.

    groups: linear layers that read the same input: `qkv` in this order, `up_gate` up first; `o` reads the
    attention's output and `down` the gated product. norms: the norm that feeds a group. norm_offset: a norm's
    gain is its weight plus this. query_norm, key_norm: norms (m,) of every head between projection and RoPE.
    needs_bos: the family's models need a beginning-of-sequence (BOS) token in front of their input.
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
    norm_offset: float = 0.0
    query_norm: str | None = None
    key_norm: str | None = None
    needs_bos: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for names in self.groups.values() for name in names)

    @property
    def roles(self) -> dict[str, str]:
        """{q, k, v, o, up, gate, down: module path}."""
        return dict(zip(GROUP_OF, self.linears, strict=True))

    def group_of(self, linear: str) -> str:
        return next(group for group, names in self.groups.items() if linear in names)


# model_type of the configuration -> layout. All are pre-norm RMSNorm decoders with gated MLPs.
FAMILIES: dict[str, Layout] = {
    "llama": Layout(),
    "mistral": Layout(),
    "qwen2": Layout(),
    "qwen3": Layout(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
    "gemma": Layout(norm_offset=1.0, needs_bos=True),
    "granite": Layout(),
    "smollm3": Layout(),
}

# model_type -> why its folds would change what it computes.
REFUSED = {
    "gemma2": "it normalises a layer's output before adding it to the residual stream, which no rotation of the "
    "stream passes",
    "phi3": "it keeps queries, keys and values in one linear layer, and so gate and up; split them first",
    "cohere": "its norms subtract the mean, and attention and MLP run side by side",
    "stablelm": "its norms subtract the mean",
}
REFUSED |= dict.fromkeys(("gemma3", "gemma3_text", "olmo2", "olmo3", "glm4", "exaone4"), REFUSED["gemma2"])


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a model: hidden d, intermediate f, heads h, KV heads k, head dim m, number of blocks.

    normed_heads: whether queries and keys are normalised head by head, before RoPE.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    blocks: int
    normed_heads: bool = False

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
            normed_heads=FAMILIES.get(config.model_type, Layout()).key_norm is not None,
        )

    def rows(self) -> dict[str, int]:
        """Output rows of each linear layer, by role."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        d, f = self.hidden, self.intermediate
        return {"q": queries, "k": keys, "v": keys, "o": d, "up": f, "gate": f, "down": d}

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
    if family in REFUSED:
        raise ObrError(f"Model family {family!r} is not supported: {REFUSED[family]}; use {known}.")
    if any(hasattr(config, key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ObrError(f"Model family {family!r} is a mixture of experts, which is not supported; use {known}.")
    raise ObrError(
        f"Model family {family!r} is not known; use one of {known}, or add an entry to FAMILIES in architectures.py."
    )


def needs_bos(model_type: str) -> bool:
    """Whether models of a family need a BOS token in front of their input; False for unknown families."""
    return FAMILIES.get(model_type, Layout()).needs_bos
