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
from obr.rotations.block_transforms import BlockTransforms

BLOCKS = (16, 32, 64, 128)


class QuaRot(Rotation):
    """Transforms: residual R1 (d), value R2 (m), heads (h m) which mixes heads, query_key R3 (m), down R4 (f).

    With the option `block` there is no `heads`, with `fused` only residual and value. `down:n` is of layers that read
    n channels, where they differ. Attention that caches a latent vector has neither value, heads nor query_key.
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
        transforms = {"residual": residual}
        if not dimensions.latent:
            mixing = hadamard(dimensions.heads, generator, "head count")
            transforms |= {
                "value": transform(dimensions.head_dim, "head dim"),
                "heads": Kronecker([*mixing.factors(), dimensions.head_dim]),
                "query_key": transform(dimensions.head_dim, "head dim"),
            }
        transforms["down"] = transform(dimensions.intermediate, "intermediate size")
        transforms |= {f"down:{n}": transform(n, "intermediate size") for n in dimensions.other_widths}
        options = ({"block": block} if block else {}) | ({"fused": True} if fused else {})
        rotation = cls(dimensions, transforms=transforms, seed=seed, options=options)
        rotation.transforms = {name: transforms[name] for name in rotation.sizes()}
        return rotation

    def sizes(self) -> dict[str, int]:
        sizes, latent = {"residual": self.dimensions.hidden}, self.dimensions.latent
        if not latent:
            sizes["value"] = self.dimensions.head_dim
        if self.options.get("fused"):
            return sizes
        if not self.options.get("block") and not latent:
            sizes["heads"] = self.dimensions.heads * self.dimensions.head_dim
        return sizes | fixed_sizes(self.dimensions)

    def residual(self) -> Kronecker:
        return self.transforms["residual"]

    def changes(self, index: int) -> BlockTransforms:
        value, inputs = self.transforms.get("value"), {}
        if "heads" in self.transforms:
            inputs["o"] = self.transforms["heads"]
        return BlockTransforms(
            residual=self.residual(),
            value=None if value is None else value.matrix()[None],
            inputs=inputs | down_transforms(self.transforms),
            keys=self.transforms.get("query_key"),
        )


def fixed_sizes(dimensions: Dimensions) -> dict[str, int]:
    """Sizes of R3 (query_key) and of R4 (down; "down:n" for groups that read n channels, where they differ)."""
    keys = {} if dimensions.latent else {"query_key": dimensions.head_dim}
    return keys | {"down": dimensions.intermediate} | {f"down:{n}": n for n in dimensions.other_widths}


def down_transforms(transforms: dict[str, Kronecker]) -> dict[str, Kronecker]:
    """Those before down_proj, as `BlockTransforms.inputs` has them."""
    return {name: transform for name, transform in transforms.items() if name.split(":")[0] == "down"}
