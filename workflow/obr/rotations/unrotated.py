"""What stands in the place of a rotation that a model's family does not take: nothing changes, and it says why."""

import sys

from obr.config.rotations import kind_held_by
from obr.models.architectures import Dimensions
from obr.rotations.base import Rotation
from obr.rotations.block_transforms import BlockTransforms


class Unrotated(Rotation):
    """No change of the model. options: `asked`, the kind that was asked for, and `reason`, why it is not done."""

    kind = "none"

    @classmethod
    def draw(cls, dimensions: Dimensions, seed: int = 0) -> "Unrotated":
        return cls(dimensions)

    def changes(self, index: int) -> BlockTransforms:
        return BlockTransforms()


def instead_of(asked: str, dimensions: Dimensions, published: bool = False) -> Unrotated | None:
    """What stands in the place of a rotation of this kind, said on stderr; None if the model takes it.

    asked: a kind, learner or file format. published: it is a format.
    """
    if asked == Unrotated.kind:
        return None
    reason = dimensions.objection(kind_held_by(asked), asked if published else None)
    if reason is None:
        return None
    print(f"obr: {asked} is not applied to {dimensions.family} models: {reason}.", file=sys.stderr, flush=True)
    return Unrotated(dimensions, options={"asked": asked, "reason": reason})
