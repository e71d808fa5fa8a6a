"""QuaRot (Ashkboos et al., arXiv 2404.00456): Hadamard rotations made from a seed.

R1 is a randomised Hadamard matrix on the residual stream; R2, R3 and R4 are plain ones, per head on values and
o_proj, on queries and keys, and before down_proj. Sizes without a Hadamard matrix, such as 9 heads, take a
random orthogonal factor for their odd part.

How strong a rotation is needed is the question of `block`: with it each is block diagonal, of Hadamard matrices of
that size, so that no channel is mixed with more than so many, and heads are not mixed. With `fused` only R1 and R2
are there, which weights take: any software runs that model, but keys and the inputs of down_proj are as they were.
"""

import torch

from obr.errors import ObrError
from obr.models.architectures import Dimensions
from obr.models.hadamard import Kronecker, block_hadamard, hadamard, random_signs
from obr.rotations.base import Rotation
from obr.rotations.fold import BlockTransforms

INPUTS = {"o": "heads", "down": "down"}  # group -> the transform before its layers
BLOCKS = (16, 32, 64, 128)


class QuaRot(Rotation):
    """Transforms: residual R1 (d), value R2 (m), heads (h m) which mixes heads, query_key R3 (m), down R4 (f).

    With the option `block` there is no `heads`, with `fused` only residual and value.
    """

    kind = "quarot"

    @classmethod
    def draw(cls, dimensions: Dimensions, seed: int = 0, block: int | None = None, fused: bool = False) -> "QuaRot":
        """The rotation for a model of these sizes.

        block: of BLOCKS; None for whole Hadamard matrices. What is narrower than a block is mixed as a whole.
        fused: without the transforms that are computed for every token.

        Raises:
            ObrError: a size whose odd part is too large, or that blocks do not divide.
        """
        if block not in (None, *BLOCKS):
            choices = ", ".join(map(str, BLOCKS))
            raise ObrError(f"Rotation quarot has Hadamard blocks of {block!r}; choose one of {choices}, or null.")
        generator = torch.Generator().manual_seed(seed)

        def transform(n: int, what: str) -> Kronecker:
            whole = block is None or n <= block
            return hadamard(n, generator, what) if whole else block_hadamard(n, block, what)

        residual = transform(dimensions.hidden, "hidden size")
        residual.signs = random_signs(dimensions.hidden, generator)
        mixing = hadamard(dimensions.heads, generator, "head count")
        transforms = {
            "residual": residual,
            "value": transform(dimensions.head_dim, "head dim"),
            "heads": Kronecker([*mixing.factors(), dimensions.head_dim]),
            "query_key": transform(dimensions.head_dim, "head dim"),
            "down": transform(dimensions.intermediate, "intermediate size"),
        }
        options = ({"block": block} if block else {}) | ({"fused": True} if fused else {})
        rotation = cls(dimensions, transforms=transforms, seed=seed, options=options)
        rotation.transforms = {name: transforms[name] for name in rotation.sizes()}
        return rotation

    def sizes(self) -> dict[str, int]:
        sizes = {"residual": self.dimensions.hidden, "value": self.dimensions.head_dim}
        if self.options.get("fused"):
            return sizes
        if not self.options.get("block"):
            sizes["heads"] = self.dimensions.heads * self.dimensions.head_dim
        return sizes | {"query_key": self.dimensions.head_dim, "down": self.dimensions.intermediate}

    def residual(self) -> Kronecker:
        return self.transforms["residual"]

    def changes(self, index: int) -> BlockTransforms:
        value = self.transforms["value"]
        return BlockTransforms(
            residual=self.residual(),
            value=value.matrix()[None],
            inputs={group: self.transforms[name] for group, name in INPUTS.items() if name in self.transforms},
            keys=self.transforms.get("query_key"),
        )
