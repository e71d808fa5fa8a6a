"""Families of models: where a decoder keeps its blocks, its linear layers, its experts and its norms.

A family is one entry of FAMILIES; everything else reads the entry.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from obr.errors import ObrError

if TYPE_CHECKING:
    from torch import nn

# What a linear layer does in a block -> the group that it is in; in the order of Layout.groups.
GROUP_OF = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "up": "up_gate", "gate": "up_gate", "down": "down"}
# Kind of a group -> what its layers do, in their order. Latent attention compresses queries, and keys with values.
PARTS = {
    "qkv": ("q", "k", "v"), "o": ("o",), "up_gate": ("up", "gate"), "down": ("down",),
    "latent": ("query_latent", "latent"), "query_up": ("query_up",), "latent_up": ("latent_up",),
}  # fmt: skip
KIND_OF = {part: kind for kind, parts in PARTS.items() for part in parts}
EVERY = ("quarot", "spinquant", "flatquant", "ostquant", "scaling")  # kinds of rotations
ORTHOGONAL = ("quarot", "spinquant")


def kind_of(name: str) -> str:
    """The kind of a group ("experts.3.down" -> "down"), or what a role's layer does ("experts.3.up" -> "up")."""
    return name.rpartition(".")[2]


def _intermediate(config) -> tuple[int, ...]:
    return (config.intermediate_size,)


@dataclass(frozen=True)
class Layout:
    """Module paths, from the model or (groups, norms, attention, fused, readers, experts) from a block.

    groups: linear layers that read the same input: `qkv` in this order, `up_gate` up first; `o` reads the
    attention's output and `down` the gated product. A group "name.kind" is one more of a kind. Layers that a block
    does not have are left out of it.
    norms: by kind, the norm that feeds a group. norm_offset: a norm's gain is its weight plus this. query_norm,
    key_norm: norms (m,) of every head between projection and RoPE.
    fused: {path of a linear layer: names of the parts, stacked by rows, that groups name as layers below it}.
    readers: by kind of group, matrices that read the same input and stay at 16 bits, such as a router.
    experts: where transformers keeps the fused weights of experts. widths: of a configuration, the input widths of
    down layers, the most common first.
    rotations: kinds that the family takes. unrotated: why it does not take the others. ruled_out_by: settings with
    which the family takes none.
    needs_bos: the family's models need a beginning-of-sequence (BOS) token in front of their input.
    adds_plainly: attention, then the MLP add what they put out to the residual stream, as it is.
    latent: attention caches a latent vector in place of keys and values. head_dim: the setting with the width of a
    head's output. partial_rotary: RoPE may turn a part of a head's channels.
    logit_divisor, logit_factor, logit_softcap: settings that scale logits, and that bound them by tanh.
    stored: (name in files, name in the model): parts of tensors' names that differ.
    resolved: these are the groups of one block.
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
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    readers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    experts: str | None = None
    widths: Callable[[object], tuple[int, ...]] = _intermediate
    rotations: tuple[str, ...] = EVERY
    unrotated: str = ""
    ruled_out_by: tuple[str, ...] = ()
    adds_plainly: bool = True
    latent: bool = False
    head_dim: str = "head_dim"
    partial_rotary: bool = False
    logit_divisor: str | None = None
    logit_factor: str | None = None
    logit_softcap: str | None = None
    stored: tuple[tuple[str, str], ...] = ()
    resolved: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for names in self.groups.values() for name in names)

    @property
    def roles(self) -> dict[str, str]:
        """{q, k, v, o, up, gate, down: module path}; of a group "name.kind" the roles begin with "name."."""
        found = {}
        for group, names in self.groups.items():
            prefix, kind = group[: -len(kind_of(group))], kind_of(group)
            found |= {f"{prefix}{part}": name for part, name in zip(PARTS[kind], names, strict=True)}
        return found

    def group_of(self, linear: str) -> str:
        return next(group for group, names in self.groups.items() if linear in names)

    def of_kind(self, *kinds: str) -> list[str]:
        """The layers of all groups of these kinds."""
        return [name for group, names in self.groups.items() if kind_of(group) in kinds for name in names]

    def in_block(self, block: "nn.Module") -> "Layout":
        """The layout of one block: without layers that it does not have, with a group for each of its experts."""
        if self.resolved:
            return self
        groups = {group: self._present(block, names) for group, names in self.groups.items()}
        groups = {group: names for group, names in groups.items() if names}
        experts = self.experts if self.experts and _has(block, self.experts) else None
        for number in range(block.get_submodule(experts).num_experts if experts else 0):
            path = f"{experts}.{number}"
            groups[f"experts.{number}.up_gate"] = (f"{path}.up_proj", f"{path}.gate_proj")
            groups[f"experts.{number}.down"] = (f"{path}.down_proj",)
        readers = {kind: tuple(n for n in names if _has(block, n)) for kind, names in self.readers.items()}
        return replace(self, groups=groups, readers=readers, experts=experts, resolved=True)

    def _present(self, block: "nn.Module", names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if _has(block, name) or _has(block, self.unfused(name)))

    def unfused(self, linear: str) -> str:
        """Where transformers keeps a layer: the path of the fused one that it is a part of, or its own."""
        parent, _, part = linear.rpartition(".")
        return parent if part in self.fused.get(parent, ()) else linear


def _has(block: "nn.Module", path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


AFTER_LAYERS = "it normalises what a layer puts out before adding it to the residual stream"
# Kinds that leave the residual stream as it is.
UNTURNED = ("flatquant", "scaling")
_FUSED_MLP = {"up_gate": ("mlp.gate_up_proj.up_proj", "mlp.gate_up_proj.gate_proj"), "down": ("mlp.down_proj",)}
_ATTENTION = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
}
_GEMMA_NORMS = {"qkv": "input_layernorm", "up_gate": "pre_feedforward_layernorm"}
_EXPERTS = Layout(
    experts="mlp.experts", readers={"up_gate": ("mlp.gate",)}, rotations=ORTHOGONAL,
    unrotated="the inner channels of its experts are their own, for which these kinds have no parameters",
)  # fmt: skip
_SHARED = {
    "shared.up_gate": ("mlp.shared_experts.up_proj", "mlp.shared_experts.gate_proj"),
    "shared.down": ("mlp.shared_experts.down_proj",),
}
_MLP = {"up_gate": ("mlp.up_proj", "mlp.gate_proj"), "down": ("mlp.down_proj",)}
# Multi-head latent attention: queries from a latent vector of their own in larger models.
_LATENT = replace(
    _EXPERTS,
    groups={
        "latent": ("self_attn.q_a_proj", "self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"),
        "query_up": ("self_attn.q_b_proj",), "latent_up": ("self_attn.kv_b_proj",), "o": ("self_attn.o_proj",),
        **_MLP, **_SHARED,
    },
    norms={"latent": "input_layernorm", "up_gate": "post_attention_layernorm"}, latent=True, head_dim="v_head_dim",
    widths=lambda c: (c.moe_intermediate_size, c.moe_intermediate_size * c.n_shared_experts, c.intermediate_size),
)  # fmt: skip
_AFTER = Layout(norms={}, rotations=(), unrotated=AFTER_LAYERS, adds_plainly=False)

# model_type of the configuration -> layout. All are decoders with RMSNorm or LayerNorm, and gated MLPs.
FAMILIES: dict[str, Layout] = {
    "llama": Layout(),
    "mistral": Layout(),
    "qwen2": Layout(),
    "qwen3": Layout(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
    "gemma": Layout(norm_offset=1.0, needs_bos=True),
    "granite": Layout(logit_divisor="logits_scaling"),
    "smollm3": Layout(),
    "gemma2": Layout(
        norms=_GEMMA_NORMS, norm_offset=1.0, needs_bos=True, rotations=UNTURNED, unrotated=AFTER_LAYERS,
        adds_plainly=False, logit_softcap="final_logit_softcapping",
    ),
    "gemma3_text": Layout(
        norms=_GEMMA_NORMS, norm_offset=1.0, needs_bos=True, rotations=UNTURNED, unrotated=AFTER_LAYERS,
        adds_plainly=False, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm",
        logit_softcap="final_logit_softcapping",
    ),
    "phi3": Layout(
        groups={
            "qkv": ("self_attn.qkv_proj.q_proj", "self_attn.qkv_proj.k_proj", "self_attn.qkv_proj.v_proj"),
            "o": ("self_attn.o_proj",),
            **_FUSED_MLP,
        },
        fused={"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")},
        partial_rotary=True,
    ),
    "olmo2": _AFTER,
    "olmo3": _AFTER,
    "glm4": Layout(
        groups={**_ATTENTION, **_FUSED_MLP}, fused={"mlp.gate_up_proj": ("gate_proj", "up_proj")},
        rotations=("flatquant",), unrotated=f"{AFTER_LAYERS}, and RoPE turns neighbouring channels",
        partial_rotary=True, adds_plainly=False,
    ),
    "cohere": Layout(
        norms={"qkv": "input_layernorm", "up_gate": "input_layernorm"}, rotations=(), logit_factor="logit_scale",
        adds_plainly=False,
        unrotated="its norms subtract the mean, and attention and MLP read the same norm",
    ),
    "mixtral": replace(
        _EXPERTS,
        stored=(
            (".block_sparse_moe.", ".mlp."), (".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj."),
        ),
    ),
    "olmoe": replace(_EXPERTS, ruled_out_by=("clip_qkv",)),
    "qwen2_moe": replace(
        _EXPERTS,
        groups={
            **_ATTENTION, **_MLP, "shared.up_gate": ("mlp.shared_expert.up_proj", "mlp.shared_expert.gate_proj"),
            "shared.down": ("mlp.shared_expert.down_proj",),
        },
        readers={"up_gate": ("mlp.gate", "mlp.shared_expert_gate")},
        widths=lambda c: (c.moe_intermediate_size, c.shared_expert_intermediate_size, c.intermediate_size),
    ),
    "qwen3_moe": replace(
        _EXPERTS, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm",
        widths=lambda c: (c.moe_intermediate_size, c.intermediate_size),
    ),
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
}  # fmt: skip

# model_type -> why its models are not read.
REFUSED = {
    "gemma3": "it reads images beside text; save its language model alone, of type gemma3_text",
    "stablelm": "its norms subtract the mean and have biases",
    "exaone4": "some of its blocks have no RoPE, which no test here covers",
}


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a model: hidden d, intermediate f, heads h, KV heads k, head dim m, number of blocks.

    normed_heads: whether queries and keys are normalised head by head, before RoPE. family: a key of FAMILIES.
    widths: all input widths of down layers, f first; () for f alone. rotary: channels of a head that RoPE turns, 0
    for all. latent: attention caches a latent vector. ruled_out: the setting with which the model takes no rotation.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    blocks: int
    normed_heads: bool = False
    family: str = "llama"
    widths: tuple[int, ...] = ()
    rotary: int = 0
    latent: bool = False
    ruled_out: str | None = None

    @classmethod
    def of(cls, config) -> "Dimensions":
        heads, layout = config.num_attention_heads, FAMILIES.get(config.model_type, Layout())
        head_dim = getattr(config, layout.head_dim, None) or config.hidden_size // heads
        widths = tuple(dict.fromkeys(layout.widths(config)))
        return cls(
            hidden=config.hidden_size,
            intermediate=widths[0],
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            blocks=config.num_hidden_layers,
            normed_heads=layout.key_norm is not None,
            family=config.model_type,
            widths=widths,
            rotary=_rotary(config, head_dim) if layout.partial_rotary else 0,
            latent=layout.latent,
            ruled_out=next((key for key in layout.ruled_out_by if getattr(config, key, None)), None),
        )

    @property
    def other_widths(self) -> tuple[int, ...]:
        """Input widths of down layers beside `intermediate`."""
        return tuple(n for n in self.widths if n != self.intermediate)

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

    def objection(self, kind: str) -> str | None:
        """Why the model does not take rotations of a kind; None if it does."""
        layout = FAMILIES.get(self.family, Layout())
        if self.ruled_out:
            return f"its setting {self.ruled_out} acts between values and o_proj"
        return None if kind in layout.rotations else layout.unrotated

    def learning_objection(self) -> str | None:
        """Why no rotation of the model can be learned; None if one can."""
        if FAMILIES.get(self.family, Layout()).experts:
            return "no rotation is learned through experts; use kind quarot, or spinquant drawn from a seed"
        return None


def _rotary(config, head_dim: int) -> int:
    """Channels of a head that RoPE turns."""
    return int(head_dim * (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0))


def layout_of(config) -> Layout:
    """The layout of a transformers configuration.

    Raises:
        ObrError: the family is not known, or is refused by name.
    """
    family = config.model_type
    if family in FAMILIES:
        return FAMILIES[family]
    known = ", ".join(FAMILIES)
    if family in REFUSED:
        raise ObrError(f"Model family {family!r} is not supported: {REFUSED[family]}; use {known}.")
    raise ObrError(
        f"Model family {family!r} is not known; use one of {known}, or add an entry to FAMILIES in architectures.py."
    )


def needs_bos(model_type: str) -> bool:
    """Whether models of a family need a BOS token in front of their input; False for unknown families."""
    return FAMILIES.get(model_type, Layout()).needs_bos
