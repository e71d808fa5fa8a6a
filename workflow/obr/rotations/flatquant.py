"""FlatQuant (Sun et al., arXiv 2410.09426): invertible Kronecker transforms in front of each group of layers.

The residual stream is as it was. A scale c before each transform is folded into the norm, or the rows of
up_proj, in front of it; the value transform goes into v_proj and o_proj; all others stay online.

Experts read one input, transformed once for all of them. The transforms before their down layers are one pair of
matrices for all experts of a block, as in FlatQuant's code for DeepSeek-V3, behind scales of each expert's own.
"""

from math import isqrt

import torch
from torch import Tensor

from obr.models.architectures import Dimensions
from obr.models.hadamard import Kronecker, random_orthogonal
from obr.rotations.base import Parameter, Rotation, clip_parameters, pairs, products, range_parameters
from obr.rotations.block_transforms import BlockTransforms


def paired(dimensions: Dimensions) -> dict[str, int]:
    """Groups with a left and a right matrix, and their input channels; "experts.down" for those of all experts."""
    return {group: columns for group, columns in dimensions.columns().items() if group != "o"}


class FlatQuant(Rotation):
    """Parameters of block i, after `blocks.{i}.`:

    qkv.left (a, a), qkv.right (b, b), qkv.scale (d), likewise up_gate and down (f): x -> (x c)(L ⊗ R).
    o.heads (h, h): X (h, m) -> OᵀX. value (m, m): v -> v P. keys (m, m): k -> k P, q -> q P^-T after RoPE.
    {role}.clip_low, {role}.clip_high (r, 1), {role}.range_low, {role}.range_high (1,), for q … down and the
    latter for keys and values too: logits of learned clipping. Scales, value, keys and clips may be absent.

    Of experts, `experts.` and the role, as in experts.down.scale (e, f); of shared ones, shared.down.scale (f).
    Latent attention has latent.left … in place of qkv.left, neither value nor keys, and query_up.left and .right
    before the layer that reads the queries' latent vector.
    """

    kind = "flatquant"

    @classmethod
    def draw(cls, dimensions: Dimensions, seed: int = 0) -> "FlatQuant":
        """Well-conditioned random matrices, scales around one, clips at the 0.982 where learning starts."""
        generator = torch.Generator().manual_seed(seed)
        rotation = cls(dimensions, seed=seed)
        for name, parameter in rotation.everything().items():
            shape = parameter.shape
            if parameter.must == "invertible":
                rotation.parameters[name] = random_invertible(shape[0], generator)
            elif parameter.must == "scale":
                rotation.parameters[name] = random_scale(shape, generator)
            elif None not in shape:  # rows that a rank of latent attention decides
                rotation.parameters[name] = torch.full(shape, 4.0)
        return rotation

    def everything(self) -> dict[str, Parameter]:
        """All parameters that this kind may have."""
        m, sizes = self.dimensions.head_dim, self.dimensions
        block = {"o.heads": Parameter((sizes.heads,) * 2, "invertible")}
        for group, columns in paired(sizes).items():
            left, right = factor_pair(columns)
            block[f"{group}.left"] = Parameter((left, left), "invertible")
            block[f"{group}.right"] = Parameter((right, right), "invertible")
            if group != "query_up":
                number = (sizes.experts,) if group.startswith("experts.") else ()
                block[f"{group}.scale"] = Parameter((*number, columns), "scale")
        block |= {} if sizes.latent else {name: Parameter((m, m), "invertible") for name in ("value", "keys")}
        block |= clip_parameters(sizes, 1) | range_parameters(sizes)
        return {f"blocks.{i}.{name}": p for i in range(sizes.blocks) for name, p in block.items()}

    def expected(self) -> dict[str, Parameter]:
        matrices = [f"{group}.{side}" for group in paired(self.dimensions) for side in ("left", "right")]
        return self.present(self.everything(), (*matrices, "o.heads"))

    def changes(self, index: int) -> BlockTransforms:
        inputs = {}
        for group in paired(self.dimensions):
            matrices = [self.parameter(index, f"{group}.{side}") for side in ("left", "right")]
            if matrices[0] is not None:  # dense blocks have no experts, the others no dense MLP
                inputs[group] = Kronecker.right(matrices)
        inputs["o"] = Kronecker.right([self.parameter(index, "o.heads"), self.dimensions.head_dim])
        scales = {kind: self.parameter(index, f"{kind}.scale") for kind in (self.dimensions.entry, "up_gate")}
        value, keys = self.parameter(index, "value"), self.parameter(index, "keys")
        keys = None if keys is None else Kronecker.right([keys])
        return BlockTransforms(
            norms={kind: scale for kind, scale in scales.items() if scale is not None},
            value=None if value is None else value[None],
            products=products(self, index, "down.scale"),
            inputs=inputs,
            keys=keys,
            queries=None if keys is None else keys.dual(),
            clips=pairs(self, index, "clip"),
            clip_first=True,
            ranges=pairs(self, index, "range"),
        )


def factor_pair(n: int) -> tuple[int, int]:
    """(a, b) with a b = n and a <= b, as close as can be; of one parity where n allows it, as FlatQuant has it.

    That is Fermat's search for A² - n = B², a = A - B, b = A + B.
    """
    step = 1 if n % 4 == 2 else 2  # twice an odd number is no difference of squares
    for a in range(isqrt(n), 0, -1):
        if n % a == 0 and (step == 1 or (n // a - a) % step == 0):
            return a, n // a
    raise AssertionError("one divides every number")


def random_invertible(n: int, generator: torch.Generator) -> Tensor:
    """U diag(s) V (n, n), float64, singular values s within a factor of about two of one."""
    left, right = random_orthogonal(n, generator), random_orthogonal(n, generator)
    return left * random_scale((n,), generator) @ right


def random_scale(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Positive numbers within a factor of about two of one, float64."""
    return (torch.rand(shape, generator=generator, dtype=torch.float64) * 1.4 - 0.7).exp()
