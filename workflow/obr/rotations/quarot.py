"""QuaRot (Ashkboos et al., arXiv 2404.00456): Hadamard rotations made from a seed.

R1 is a randomised Hadamard matrix on the residual stream; R2, R3 and R4 are plain ones, per head on values and
o_proj, on queries and keys, and before down_proj. Sizes without a Hadamard matrix, such as 9 heads, take a
random orthogonal factor for their odd part.
"""

import torch

from obr.hadamard import Kronecker, hadamard, random_signs
from obr.layout import Dimensions
from obr.rotations.fold import Rotation


def draw(dimensions: Dimensions, seed: int = 0) -> Rotation:
    """The rotation for a model of these sizes; the same for the same seed.

    Raises:
        ObrError: a size whose odd part is too large.
    """
    generator = torch.Generator().manual_seed(seed)
    residual = hadamard(dimensions.hidden, generator, "hidden size")
    residual.signs = random_signs(dimensions.hidden, generator)
    mixing = hadamard(dimensions.heads, generator, "head count")
    return Rotation(
        "quarot",
        seed,
        {
            "residual": residual,
            "value": hadamard(dimensions.head_dim, generator, "head dim"),
            "heads": Kronecker([*mixing.factors(), dimensions.head_dim]),
            "query_key": hadamard(dimensions.head_dim, generator, "head dim"),
            "down": hadamard(dimensions.intermediate, generator, "intermediate size"),
        },
    )
