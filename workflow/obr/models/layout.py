"""What a family of models declares: where a decoder keeps blocks, linear layers, experts and norms."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from obr.config.rotations import DRAWN

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
EVERY = DRAWN  # kinds of rotations; a new kind is taken by the families that do not list theirs


def kind_of(name: str) -> str:
    """The kind of a group ("experts.3.down" -> "down"), or what a role's layer does ("experts.3.up" -> "up").

    Example:
        >>> kind_of("experts.3.down"), kind_of("qkv")
        ('down', 'qkv')
    """
    return name.rpartition(".")[2]


def prefix_of(name: str) -> str:
    """What precedes the kind: "experts.3." of "experts.3.down", "" of "down"."""
    return name[: -len(kind_of(name))]


def without_number(name: str) -> str:
    """The name that all experts share: "experts.down" of "experts.3.down", others as they are.

    Example:
        >>> without_number("experts.3.down"), without_number("shared.down")
        ('experts.down', 'shared.down')
    """
    first, _, rest = name.partition(".")
    return f"experts.{rest.partition('.')[2]}" if first == "experts" and rest[:1].isdigit() else name


def _intermediate(config) -> dict[str, int]:
    return {"": config.intermediate_size}


@dataclass(frozen=True)
class Layout:
    """Module paths, from the model or (groups, norms, attention, fused, readers, experts) from a block.

    groups: linear layers that read the same input: `qkv` in this order, `up_gate` up first; `o` reads the
    attention's output and `down` the gated product. A group "name.kind" is one more of a kind. Layers that a block
    does not have are left out of it.
    norms: by kind, the norm that feeds a group. norm_offset: a norm's gain is its weight plus this. query_norm,
    key_norm: norms between projection and RoPE, (m,) of every head or of all heads together.
    fused: {path of a linear layer: names of the parts, stacked by rows, that groups name as layers below it}.
    readers: by kind of group, matrices that read the same input and stay at 16 bits, such as a router.
    experts: where transformers keeps the fused weights of experts. widths: of a configuration, the input widths of
    down layers, the most common first, by what precedes "down" in the group's name, "experts." for all experts.
    rotations: kinds that the family takes. unrotated: why it does not take the others. ruled_out_by: settings with
    which the family takes none.
    needs_bos: the family's models need a beginning-of-sequence (BOS) token in front of their input.
    adds_plainly: attention, then the MLP add what they put out to the residual stream, as it is.
    latent: attention caches a latent vector in place of keys and values. head_dim: the setting with the width of a
    head's output. default_head_dim: of configurations without head_dim; None for hidden over heads. partial_rotary:
    RoPE may turn a part of a head's channels.
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
    widths: Callable[[object], dict[str, int]] = _intermediate
    rotations: tuple[str, ...] = EVERY
    unrotated: str = ""
    ruled_out_by: tuple[str, ...] = ()
    adds_plainly: bool = True
    latent: bool = False
    head_dim: str = "head_dim"
    default_head_dim: int | None = None
    partial_rotary: bool = False
    logit_divisor: str | None = None
    logit_factor: str | None = None
    logit_softcap: str | None = None
    stored: tuple[tuple[str, str], ...] = ()
    resolved: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        """The paths of all linear layers, group by group."""
        return tuple(name for names in self.groups.values() for name in names)

    @property
    def roles(self) -> dict[str, str]:
        """{q, k, v, o, up, gate, down: module path}; of a group "name.kind" the roles begin with "name."."""
        found = {}
        for group, names in self.groups.items():
            prefix, kind = prefix_of(group), kind_of(group)
            found |= {f"{prefix}{part}": name for part, name in zip(PARTS[kind], names, strict=True)}
        return found

    def group_of(self, linear: str) -> str:
        """The name of a layer's group."""
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
        missing = [name for name in ("query_norm", "key_norm") if not _has(block, getattr(self, name))]
        norms: dict[str, None] = dict.fromkeys(missing)
        return replace(self, groups=groups, readers=readers, experts=experts, resolved=True, **norms)

    def _present(self, block: "nn.Module", names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if _has(block, name) or _has(block, self.unfused(name)))

    def unfused(self, linear: str) -> str:
        """Where transformers keeps a layer: the path of the fused one that it is a part of, or its own."""
        parent, _, part = linear.rpartition(".")
        return parent if part in self.fused.get(parent, ()) else linear


def _has(block: "nn.Module", path: str | None) -> bool:
    if path is None:
        return False
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True
