"""What a rotation does to one block: transforms by the places where they act."""

from dataclasses import dataclass, field

from torch import Tensor

from obr.errors import ObrError
from obr.models.architectures import kind_of, without_number
from obr.models.hadamard import Kronecker


@dataclass
class BlockTransforms:
    """What a rotation does to one block. Each part alone leaves what the block computes as it was.

    residual: R1 (d) orthogonal, on both sides of the residual stream; norm gains move into the weights.
    norms: by kind (qkv or latent, up_gate), factors (d,) of the norm's gain; all that read it are divided.
    shifts: by kind (as norms), offsets (d,) taken online off the norm's output, after the factors.
    value: P (1 or k, m, m), v -> v P, for all heads or for each KV head; o_proj takes P^-T.
    value_shift: (k, m) taken off the values before P; attention weights sum to one, so o_proj gives it back.
    products: by MLP, what precedes "up" in its role, factors (f,) of the gated product: rows of up_proj; down_proj
    is divided.
    key_scale: (k, m) factors of keys before RoPE; queries are divided.
    inputs: by kind of group, transforms online in front of its layers, whose weights take the dual; by "kind:n" of
    groups that read n channels, or by group ("shared.down", "experts.down" for all experts), where groups of a kind
    differ.
    keys, queries: (m) online after RoPE, on each head; queries None means an orthogonal `keys` for both.
    clips: by role (q … experts.3.down), logits (low, high) of shape (r, groups): how far LWC shrinks a row's range.
    limits: by role, (r, groups): the largest |weight| that AWQ's clipping leaves. clip_first: both act before
    the outputs of a layer are transformed, and not after.
    ranges: by role, or "keys" and "values", logits (low, high) of shape (1,), of activation quantisers.

    Clips, limits and ranges are no equivalences: the first two act if folds are asked to clip, the last if
    a recipe's clip_ratio is "learned".
    """

    residual: Kronecker | None = None
    norms: dict[str, Tensor] = field(default_factory=dict)
    shifts: dict[str, Tensor] = field(default_factory=dict)
    value: Tensor | None = None
    value_shift: Tensor | None = None
    products: dict[str, Tensor] = field(default_factory=dict)
    key_scale: Tensor | None = None
    inputs: dict[str, Kronecker] = field(default_factory=dict)
    keys: Kronecker | None = None
    queries: Kronecker | None = None
    clips: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    limits: dict[str, Tensor] = field(default_factory=dict)
    clip_first: bool = False
    ranges: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def input_of(self, group: str, columns: int) -> Kronecker | None:
        """The transform in front of a group's layers, which read so many channels.

        Raises:
            ObrError: it is of another size.
        """
        kind = kind_of(group)
        names = (f"{kind}:{columns}", without_number(group), kind)
        found = next((self.inputs[name] for name in names if name in self.inputs), None)
        if found is not None and found.columns != columns:
            raise ObrError(
                f"The rotation's transform before {group} has {found.columns} channels, but the layer reads "
                f"{columns}; the rotation was made for another model."
            )
        return found

    def folded_parts(self) -> list[str]:
        """What goes into the weights, by name."""
        parts = {"residual": self.residual, "value": self.value, "value_shift": self.value_shift}
        parts |= {"product": self.products or None, "key_scale": self.key_scale}
        return [n for n, part in parts.items() if part is not None] + [f"{group} norm" for group in self.norms]

    def online_parts(self) -> list[str]:
        """What is computed for every token, by name."""
        parts = [f"{group} inputs" for group in self.inputs] + [f"{group} shift" for group in self.shifts]
        return parts + (["queries and keys"] if self.keys is not None else [])
