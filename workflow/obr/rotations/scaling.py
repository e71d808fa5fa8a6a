"""Scales of single channels, all in the weights: SmoothQuant (arXiv 2211.10438), AWQ (2306.00978) and
OmniQuant's learned equivalent transformation (2308.13137), whose shifts of a norm's output stay online.
"""

import torch
from torch import Tensor

from obr.errors import ObrError
from obr.models.architectures import KIND_OF, Dimensions, kind_of, prefix_of
from obr.rotations.base import Parameter, Rotation, clip_parameters, pairs, products
from obr.rotations.block_transforms import BlockTransforms
from obr.rotations.flatquant import random_scale
from obr.rotations.ostquant import tied_key_scale


class Scaling(Rotation):
    """Parameters of block i, after `blocks.{i}.`; any may be absent, in all blocks alike:

    qkv.scale, up_gate.scale (d), o.scale (k, m), down.scale (f): divide what the group reads; its weights are
    multiplied. qkv.shift, up_gate.shift (d), o.shift (k, m): taken off before that. key.scale (k, m): divides
    queries and multiplies keys before RoPE. {role}.clip_low, {role}.clip_high, {role}.limit (r, groups): what
    clipping of weights has learned, as in BlockTransforms.

    Experts have experts.down.scale (e, f) and the like, shared ones shared.down.scale (f). Latent attention has
    latent.scale and latent.shift in place of qkv's, and neither o.scale, o.shift nor key.scale.
    """

    kind = "scaling"

    @classmethod
    def draw(cls, dimensions: Dimensions, seed: int = 0) -> "Scaling":
        """Every scale and shift there is, random; key scales are equal within a RoPE pair."""
        generator = torch.Generator().manual_seed(seed)
        rotation = cls(dimensions, seed=seed)
        for name, parameter in rotation.everything().items():
            if name.endswith("key.scale"):
                rotation.parameters[name] = tied_key_scale(dimensions, generator)
            elif parameter.must == "scale":
                rotation.parameters[name] = random_scale(parameter.shape, generator)
            elif name.endswith("shift"):
                shift = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                rotation.parameters[name] = shift / 10
        return rotation

    def everything(self) -> dict[str, Parameter]:
        """All parameters that this kind may have."""
        sizes = self.dimensions
        d, heads = (sizes.hidden,), (sizes.kv_heads, sizes.head_dim)
        shapes: dict[str, tuple[int, ...]] = {sizes.entry: d, "up_gate": d}
        shapes |= {} if sizes.latent else {"o": heads, "key": heads}
        shifts = [group for group in shapes if group != "key"]
        for group, width in sizes.downs.items():
            shapes[group] = (sizes.experts, width) if group.startswith("experts.") else (width,)
        block = {f"{group}.scale": Parameter(shape, "scale") for group, shape in shapes.items()}
        block |= {f"{group}.shift": Parameter(shapes[group]) for group in shifts}
        block |= clip_parameters(sizes, None)
        block |= {f"{role}.limit": Parameter((*rows, None)) for role, rows in sizes.row_shapes().items()}
        return {f"blocks.{i}.{name}": p for i in range(sizes.blocks) for name, p in block.items()}

    def expected(self) -> dict[str, Parameter]:
        return self.present(self.everything())

    def check(self, what: str) -> None:
        super().check(what)
        columns = self.dimensions.columns()
        for name, tensor in self.parameters.items():
            role, _, part = name.split(".", 2)[2].rpartition(".")
            if part not in ("clip_low", "clip_high", "limit"):
                continue
            kind = KIND_OF[kind_of(role)]
            read = columns.get(kind if kind == "up_gate" else f"{prefix_of(role)}{kind}")
            if read is not None and read % tensor.shape[-1]:
                raise ObrError(
                    f"{what}: {name} has {tensor.shape[-1]} groups, which do not divide the {read} columns of the "
                    "layer; it was made for another model."
                )

    def changes(self, index: int) -> BlockTransforms:
        get = lambda name: self.parameter(index, name)  # noqa: E731
        kinds = (self.dimensions.entry, "up_gate")
        norms = {kind: 1 / get(f"{kind}.scale") for kind in kinds if get(f"{kind}.scale") is not None}
        shifts = {kind: get(f"{kind}.shift") for kind in kinds if get(f"{kind}.shift") is not None}
        value = get("o.scale")
        limits = {role: get(f"{role}.limit") for role in self.dimensions.roles()}
        return BlockTransforms(
            norms=norms,
            shifts={group: shift * norms[group] if group in norms else shift for group, shift in shifts.items()},
            value=None if value is None else torch.diag_embed(1 / value),
            value_shift=get("o.shift"),
            products={mlp: 1 / scale for mlp, scale in products(self, index, "down.scale").items()},
            key_scale=get("key.scale"),
            clips=pairs(self, index, "clip"),
            limits={role: limit for role, limit in limits.items() if limit is not None},
        )


def smoothing_scale(largest: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """SmoothQuant's s (n,) = max|X|^alpha / max|W|^(1 - alpha), which divides the inputs (arXiv 2211.10438, eq. 4).

    largest: (n,) of |input|, channel by channel. weights: (r, n) of all layers that read the input.
    """
    heaviest = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
    scale = largest.float().pow(alpha) / heaviest.clamp(min=1e-5).pow(1 - alpha)
    return scale.clamp(min=1e-5)
