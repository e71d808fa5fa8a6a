"""SpinQuant (Liu et al., arXiv 2405.16406): learned R1 and R2, Hadamard R3 and R4 online.

R1 rotates the residual stream, R2 the values of each layer (one matrix for all heads, undone in o_proj): both
are in the weights. R3 is on queries and keys after RoPE, R4 before down_proj. Nothing mixes heads.
"""

import torch

from obr.models.architectures import Dimensions
from obr.models.hadamard import Kronecker, hadamard, random_signs
from obr.rotations.base import Parameter, Rotation
from obr.rotations.block_transforms import BlockTransforms
from obr.rotations.quarot import down_transforms, fixed_sizes


class SpinQuant(Rotation):
    """Parameters: R1 (d, d), blocks.{i}.R2 (m, m), for x -> x R. Transforms: query_key R3 (m), down R4 (f).

    `down:n` is of layers that read n channels, where they differ. Attention that caches a latent vector has
    neither R2 nor R3.
    """

    kind = "spinquant"

    @classmethod
    def draw(cls, dimensions: Dimensions, seed: int = 0) -> "SpinQuant":
        """Random Hadamard matrices, where learning starts."""
        generator = torch.Generator().manual_seed(seed)
        parameters = {"R1": random_hadamard(dimensions.hidden, generator, "hidden size")}
        for index in range(0 if dimensions.latent else dimensions.blocks):
            parameters[f"blocks.{index}.R2"] = random_hadamard(dimensions.head_dim, generator, "head dim")
        return cls(dimensions, parameters, fixed_transforms(dimensions), seed)

    def expected(self) -> dict[str, Parameter]:
        d, m = self.dimensions.hidden, self.dimensions.head_dim
        blocks = range(0 if self.dimensions.latent else self.dimensions.blocks)
        heads = {f"blocks.{i}.R2": Parameter((m, m), "orthogonal") for i in blocks}
        return {"R1": Parameter((d, d), "orthogonal")} | heads

    def sizes(self) -> dict[str, int]:
        return fixed_sizes(self.dimensions)

    def residual(self) -> Kronecker:
        return Kronecker.right([self.parameters["R1"]])

    def changes(self, index: int) -> BlockTransforms:
        value = self.parameter(index, "R2")
        return BlockTransforms(
            residual=self.residual(),
            value=None if value is None else value[None],
            inputs=down_transforms(self.transforms),
            keys=self.transforms.get("query_key"),
        )


def random_hadamard(n: int, generator: torch.Generator, what: str) -> torch.Tensor:
    """D M (n, n), float64: a Hadamard matrix, or its next of kin, with random signs of its rows."""
    transform = hadamard(n, generator, what)
    transform.signs = random_signs(n, generator)
    return transform.matrix()


def fixed_transforms(dimensions: Dimensions) -> dict[str, Kronecker]:
    """R3 (m) and R4 (f): plain Hadamard transforms, the same for every model of these sizes."""
    generator = torch.Generator().manual_seed(0)
    what = {"query_key": "head dim"}
    return {
        n: hadamard(size, generator, what.get(n, "intermediate size")) for n, size in fixed_sizes(dimensions).items()
    }
