"""Families of models: one entry of FAMILIES each, a `Layout`; everything else reads the entry."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from obr.config.model_sizes import EXPERTS
from obr.config.rotations import WITHOUT_MLPS, kind_held_by
from obr.errors import ObrError
from obr.models.layout import EVERY, GROUP_OF, KIND_OF, PARTS, Layout, kind_of, prefix_of, without_number

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "EVERY", "FAMILIES", "GROUP_OF", "KIND_OF", "PARTS", "REFUSED", "Dimensions", "Layout", "kind_of", "prefix_of",
    "without_number",
]  # fmt: skip

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
    experts="mlp.experts", readers={"up_gate": ("mlp.gate",)}, widths=lambda c: {"experts.": c.intermediate_size}
)
_SHARED = {
    "shared.up_gate": ("mlp.shared_experts.up_proj", "mlp.shared_experts.gate_proj"),
    "shared.down": ("mlp.shared_experts.down_proj",),
}
_MLP = {"up_gate": ("mlp.up_proj", "mlp.gate_proj"), "down": ("mlp.down_proj",)}


def _with_shared(config) -> dict[str, int]:
    width = config.moe_intermediate_size
    return {"experts.": width, "shared.": width * config.n_shared_experts, "": config.intermediate_size}


# Multi-head latent attention: queries from a latent vector of their own in larger models.
_LATENT = replace(
    _EXPERTS,
    groups={
        "latent": ("self_attn.q_a_proj", "self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"),
        "query_up": ("self_attn.q_b_proj",), "latent_up": ("self_attn.kv_b_proj",), "o": ("self_attn.o_proj",),
        **_MLP, **_SHARED,
    },
    norms={"latent": "input_layernorm", "up_gate": "post_attention_layernorm"}, latent=True, head_dim="v_head_dim",
    widths=_with_shared,
)  # fmt: skip
_AFTER = Layout(norms={}, rotations=(), unrotated=AFTER_LAYERS, adds_plainly=False)
_PARALLEL = Layout(
    norms={"qkv": "input_layernorm", "up_gate": "input_layernorm"}, rotations=(), logit_factor="logit_scale",
    adds_plainly=False, unrotated="its norms subtract the mean, and attention and MLP read the same norm",
)  # fmt: skip

# model_type of the configuration -> layout. All are decoders with RMSNorm or LayerNorm, and gated MLPs.
FAMILIES: dict[str, Layout] = {
    "llama": Layout(),
    "mistral": Layout(),
    "qwen2": Layout(),
    "qwen3": Layout(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm", default_head_dim=128),
    "gemma": Layout(norm_offset=1.0, needs_bos=True, default_head_dim=256),
    "granite": Layout(logit_divisor="logits_scaling"),
    "smollm3": Layout(),
    "gemma2": Layout(
        norms=_GEMMA_NORMS, norm_offset=1.0, needs_bos=True, rotations=UNTURNED, unrotated=AFTER_LAYERS,
        adds_plainly=False, logit_softcap="final_logit_softcapping", default_head_dim=256,
    ),
    "gemma3_text": Layout(
        norms=_GEMMA_NORMS, norm_offset=1.0, needs_bos=True, rotations=UNTURNED, unrotated=AFTER_LAYERS,
        adds_plainly=False, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm",
        logit_softcap="final_logit_softcapping", default_head_dim=256,
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
        partial_rotary=True, adds_plainly=False, default_head_dim=128,
    ),
    "glm": Layout(
        groups={**_ATTENTION, **_FUSED_MLP}, fused={"mlp.gate_up_proj": ("gate_proj", "up_proj")},
        rotations=("quarot", "spinquant", "flatquant"), unrotated="RoPE turns neighbouring channels",
        partial_rotary=True, default_head_dim=128,
    ),
    "seed_oss": Layout(default_head_dim=128),
    "exaone4": _AFTER,
    "cohere": _PARALLEL,
    "cohere2": _PARALLEL,
    "mixtral": replace(
        _EXPERTS,
        stored=(
            (".block_sparse_moe.", ".mlp."), (".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj."),
        ),
    ),
    "olmoe": replace(
        _EXPERTS, ruled_out_by=("clip_qkv",), query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"
    ),
    "qwen2_moe": replace(
        _EXPERTS,
        groups={
            **_ATTENTION, **_MLP, "shared.up_gate": ("mlp.shared_expert.up_proj", "mlp.shared_expert.gate_proj"),
            "shared.down": ("mlp.shared_expert.down_proj",),
        },
        readers={"up_gate": ("mlp.gate", "mlp.shared_expert_gate")},
        widths=lambda c: {
            "experts.": c.moe_intermediate_size, "shared.": c.shared_expert_intermediate_size,
            "": c.intermediate_size,
        },
    ),
    "qwen3_moe": replace(
        _EXPERTS, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm",
        widths=lambda c: {"experts.": c.moe_intermediate_size, "": c.intermediate_size},
    ),
    "glm4_moe": replace(
        _EXPERTS, groups={**_ATTENTION, **_MLP, **_SHARED}, partial_rotary=True,
        query_norm="self_attn.q_norm", key_norm="self_attn.k_norm",
        widths=_with_shared,
    ),
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
}  # fmt: skip

# model_type -> why its models are not read.
REFUSED = {
    "gemma3": "it reads images beside text; save its language model alone, of type gemma3_text",
    "stablelm": "its norms subtract the mean and have biases",
}


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a model: hidden d, intermediate f, heads h, KV heads k, head dim m, number of blocks.

    normed_heads: whether queries and keys are normalised before RoPE. family: a key of FAMILIES.
    places: (what precedes "down", input width) of all down layers, f first; () for f alone. experts: of a block.
    rotary: channels of a head that RoPE turns, 0 for all. latent: attention caches a latent vector. query_rank: width
    of the queries' latent vector, 0 if there is none. ruled_out: the setting with which the model takes no rotation.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    blocks: int
    normed_heads: bool = False
    family: str = "llama"
    places: tuple[tuple[str, int], ...] = ()
    experts: int = 0
    rotary: int = 0
    latent: bool = False
    query_rank: int = 0
    ruled_out: str | None = None

    @classmethod
    def of(cls, config: "PreTrainedConfig") -> "Dimensions":
        """Those of a transformers configuration; of an unknown family as if it were Llama's."""
        heads, layout = config.num_attention_heads, FAMILIES.get(config.model_type, Layout())
        head_dim = getattr(config, layout.head_dim, None) or config.hidden_size // heads
        places = tuple((prefix, width) for prefix, width in layout.widths(config).items() if width)
        return cls(
            hidden=config.hidden_size,
            intermediate=places[0][1],
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            blocks=config.num_hidden_layers,
            normed_heads=layout.key_norm is not None,
            family=config.model_type,
            places=places,
            experts=next((n for key in EXPERTS if (n := getattr(config, key, None))), 0) if layout.experts else 0,
            rotary=_rotary(config, head_dim) if layout.partial_rotary else 0,
            latent=layout.latent,
            query_rank=(getattr(config, "q_lora_rank", None) or 0) if layout.latent else 0,
            ruled_out=next((key for key in layout.ruled_out_by if getattr(config, key, None)), None),
        )

    @property
    def other_widths(self) -> tuple[int, ...]:
        """Input widths of down layers beside `intermediate`."""
        return tuple(dict.fromkeys(n for _, n in self.places if n != self.intermediate))

    @property
    def entry(self) -> str:
        """The kind of the group that reads what enters a block."""
        return "latent" if self.latent else "qkv"

    @property
    def downs(self) -> dict[str, int]:
        """{group of down layers, "experts.down" for those of all experts: their input width}."""
        return {f"{prefix}down": width for prefix, width in self.places or (("", self.intermediate),)}

    def rows(self) -> dict[str, int | None]:
        """Output rows of each linear layer, by role; None where a rank decides. Experts have equal ones."""
        return {role: shape[-1] for role, shape in self.row_shapes().items()}

    def row_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """{role: (output rows,)} of each linear layer, of experts (experts, rows); None where a rank decides."""
        queries, keys, d = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden
        attention = {"q": (queries,), "k": (keys,), "v": (keys,)}
        if self.latent:
            attention = {role: (None,) for kind in ("latent", "query_up", "latent_up") for role in PARTS[kind]}
        found: dict[str, tuple[int | None, ...]] = {**attention, "o": (d,)}
        for group, width in self.downs.items():
            prefix, number = prefix_of(group), (self.experts,) if group.startswith("experts.") else ()
            found |= {f"{prefix}{role}": (*number, n) for role, n in (("up", width), ("gate", width), ("down", d))}
        return found

    def columns(self) -> dict[str, int]:
        """Input columns of each group's layers, "experts.down" for those of all experts."""
        attention = {self.entry: self.hidden, "o": self.heads * self.head_dim}
        queries = {"query_up": self.query_rank} if self.query_rank else {}
        return {**attention, **queries, "up_gate": self.hidden, **self.downs}

    def roles(self) -> list[str]:
        """The roles of `rows`, those of experts one by one: "experts.3.up"."""
        found = []
        for role in self.rows():
            numbers = range(self.experts) if role.startswith("experts.") else ()
            found += [f"experts.{e}.{kind_of(role)}" for e in numbers] or [role]
        return found

    def objection(self, kind: str, published: str | None = None) -> str | None:
        """Why the model does not take rotations of a kind; None if it does. published: the format of such a file."""
        return _objection(self.family, self.ruled_out, kind, published)


def _objection(family: str, ruled_out: str | None, kind: str, published: str | None) -> str | None:
    layout = FAMILIES.get(family, Layout())
    if ruled_out:
        return f"its setting {ruled_out} acts between values and o_proj"
    if kind not in layout.rotations:
        return layout.unrotated
    if layout.experts and published not in (None, *WITHOUT_MLPS):
        return f"files of {published} name the layers of dense models; learn the rotation here"
    return None


def objection_to_file(raw: dict, published: str) -> str | None:
    """Why the model of a config.json with the contents `raw` takes no rotation from a file of this format."""
    family = str(raw.get("model_type"))
    ruled_out = next((key for key in FAMILIES.get(family, Layout()).ruled_out_by if raw.get(key)), None)
    return _objection(family, ruled_out, kind_held_by(published), published)


def with_defaults(raw: dict) -> dict:
    """The contents of a config.json with the head_dim that transformers gives the family where there is none."""
    family = str(raw.get("model_type"))
    default = FAMILIES[family].default_head_dim if family in FAMILIES else None
    return raw if default is None or raw.get("head_dim") else {**raw, "head_dim": default}


def _rotary(config, head_dim: int) -> int:
    """Channels of a head that RoPE turns."""
    return int(head_dim * (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0))


def layout_of(config: "PreTrainedConfig") -> Layout:
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
