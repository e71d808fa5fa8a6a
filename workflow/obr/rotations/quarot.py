"""QuaRot (Ashkboos et al., arXiv 2404.00456): Hadamard rotations made from a seed.

R1 is a randomised Hadamard matrix on the residual stream; R2, R3 and R4 are plain ones, per head on values and
o_proj, on queries and keys, and before down_proj. Sizes without a Hadamard matrix, such as 9 heads, take a
random orthogonal factor for their odd part.
"""

import torch

from obr.hadamard import Kronecker, hadamard, random_signs
from obr.layout import Dimensions
from obr.rotations.fold import Changes
from obr.rotations.rotation import Rotation


class QuaRot(Rotation):
    """Transforms: residual R1 (d), value R2 (m), heads (h m) which mixes heads, query_key R3 (m), down R4 (f)."""

    kind = "quarot"

    @classmethod
    def draw(cls, dimensions: Dimensions, seed: int = 0) -> "QuaRot":
        """The rotation for a model of these sizes. Raises ObrError for a size whose odd part is too large."""
        generator = torch.Generator().manual_seed(seed)
        residual = hadamard(dimensions.hidden, generator, "hidden size")
        residual.signs = random_signs(dimensions.hidden, generator)
        mixing = hadamard(dimensions.heads, generator, "head count")
        transforms = {
            "residual": residual,
            "value": hadamard(dimensions.head_dim, generator, "head dim"),
            "heads": Kronecker([*mixing.factors(), dimensions.head_dim]),
            "query_key": hadamard(dimensions.head_dim, generator, "head dim"),
            "down": hadamard(dimensions.intermediate, generator, "intermediate size"),
        }
        return cls(dimensions, transforms=transforms, seed=seed)

    def sizes(self) -> dict[str, int]:
        return {
            "residual": self.dimensions.hidden,
            "value": self.dimensions.head_dim,
            "heads": self.dimensions.heads * self.dimensions.head_dim,
            "query_key": self.dimensions.head_dim,
            "down": self.dimensions.intermediate,
        }

    def residual(self) -> Kronecker:
        return self.transforms["residual"]

    def changes(self, index: int) -> Changes:
        value = self.transforms["value"]
        return Changes(
            residual=self.residual(),
            value=value.matrix()[None],
            inputs={"o": self.transforms["heads"], "down": self.transforms["down"]},
            keys=self.transforms["query_key"],
        )
