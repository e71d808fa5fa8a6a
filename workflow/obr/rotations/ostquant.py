"""OSTQuant (Hu et al., arXiv 2501.13987): learned rotations and scales, all of them in the weights.

Only a Hadamard transform before down_proj, and one on queries and keys if asked for, stays online.
"""

import torch

from obr.models.architectures import Dimensions, kind_of, prefix_of
from obr.models.hadamard import Kronecker
from obr.rotations.base import Parameter, Rotation, products
from obr.rotations.block_transforms import BlockTransforms
from obr.rotations.flatquant import random_scale
from obr.rotations.quarot import down_transforms, fixed_sizes
from obr.rotations.spinquant import fixed_transforms, random_hadamard


class OSTQuant(Rotation):
    """Parameters: R_res (d, d), x -> x R; and of block i, after `blocks.{i}.`, scales S that divide activations:

    R_ov (k, m, m), values after S_ov; S_ov (k, m), values; S_up_down (f), gated product; S_norm_qkv and
    S_norm_upgate (d), outputs of the norms; S_qk (k, m), the one that multiplies: keys, and divides queries,
    before RoPE. Transforms: down (f; `down:n` of layers that read n channels, where they differ), and query_key (m)
    if there is one. Experts have experts.S_up_down (e, f), shared ones shared.S_up_down (f). Latent attention has
    neither R_ov nor S_ov nor S_qk, and no query_key.
    """

    kind = "ostquant"

    @classmethod
    def draw(cls, dimensions: Dimensions, seed: int = 0) -> "OSTQuant":
        """Random Hadamard matrices and scales around one; key scales are equal within a RoPE pair.

        Where queries and keys are normalised with one gain for all heads, all heads have the same key scales.
        """
        generator = torch.Generator().manual_seed(seed)
        k, m = dimensions.kv_heads, dimensions.head_dim
        latent = dimensions.latent
        parameters = {"R_res": random_hadamard(dimensions.hidden, generator, "hidden size")}
        for index in range(dimensions.blocks):
            rotations = [random_hadamard(m, generator, "head dim") for _ in range(0 if latent else k)]
            block = {} if latent else {"R_ov": torch.stack(rotations), "S_qk": tied_key_scale(dimensions, generator)}
            block |= {
                name: random_scale(shape, generator) for name, shape in _scales(dimensions).items() if name != "S_qk"
            }
            parameters |= {f"blocks.{index}.{name}": tensor for name, tensor in block.items()}
        return cls(dimensions, parameters, fixed_transforms(dimensions), seed)

    def expected(self) -> dict[str, Parameter]:
        d, k, m = self.dimensions.hidden, self.dimensions.kv_heads, self.dimensions.head_dim
        block = {} if self.dimensions.latent else {"R_ov": Parameter((k, m, m), "orthogonal")}
        block |= {name: Parameter(shape, "scale") for name, shape in _scales(self.dimensions).items()}
        everything = {f"blocks.{i}.{name}": p for i in range(self.dimensions.blocks) for name, p in block.items()}
        return {"R_res": Parameter((d, d), "orthogonal")} | self.present(everything, tuple(block))

    def sizes(self) -> dict[str, int]:
        sizes = fixed_sizes(self.dimensions)
        return {name: n for name, n in sizes.items() if name != "query_key" or name in self.transforms}

    def residual(self) -> Kronecker:
        return Kronecker.right([self.parameters["R_res"]])

    def changes(self, index: int) -> BlockTransforms:
        own = {name: self.parameter(index, name) for name in ("R_ov", *_scales(self.dimensions))}
        return BlockTransforms(
            residual=self.residual(),
            norms={self.dimensions.entry: 1 / own["S_norm_qkv"], "up_gate": 1 / own["S_norm_upgate"]},
            value=None if self.dimensions.latent else own["R_ov"] / own["S_ov"][..., None],
            products={mlp: 1 / scale for mlp, scale in products(self, index, "S_up_down").items()},
            key_scale=own.get("S_qk"),
            inputs=down_transforms(self.transforms),
            keys=self.transforms.get("query_key"),
        )


def _scales(dimensions: Dimensions) -> dict[str, tuple[int, ...]]:
    heads = (dimensions.kv_heads, dimensions.head_dim)
    rows = {prefix_of(role): shape for role, shape in dimensions.row_shapes().items() if kind_of(role) == "up"}
    return {
        **{f"{prefix}S_up_down": shape for prefix, shape in rows.items()},
        **({} if dimensions.latent else {"S_qk": heads, "S_ov": heads}),
        "S_norm_qkv": (dimensions.hidden,),
        "S_norm_upgate": (dimensions.hidden,),
    }


def tied_key_scale(dimensions: Dimensions, generator: torch.Generator) -> torch.Tensor:
    """Random key scales (k, m), equal within each RoPE pair, and for all heads where norms need that."""
    heads = 1 if dimensions.normed_heads else dimensions.kv_heads
    return over_pairs(random_scale((heads, pairs_of(dimensions)), generator), dimensions).contiguous()


def pairs_of(dimensions: Dimensions) -> int:
    """Pairs of a head's channels that RoPE turns together."""
    return (dimensions.rotary or dimensions.head_dim) // 2


def over_pairs(scale: torch.Tensor, dimensions: Dimensions) -> torch.Tensor:
    """Scales (k, m) from those of RoPE pairs, (k or 1, pairs); channels that RoPE leaves alone get one."""
    whole = scale.repeat(1, 2)
    whole = torch.nn.functional.pad(whole, (0, dimensions.head_dim - whole.shape[1]), value=1.0)
    return whole.expand(dimensions.kv_heads, -1)
