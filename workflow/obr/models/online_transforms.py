"""Online transforms: modules that compute at run time beside a model's own layers, saved in the checkpoint."""

import torch
from torch import Tensor, nn

from obr.errors import ObrError
from obr.models.hadamard import Constants, Kronecker


class Shift(Constants):
    """x (..., n) -> x - offset (n,): what OmniQuant takes off the inputs of a layer (arXiv 2308.13137).

    Subtracted in float32 or wider: the layer's bias holds the exact offset.
    """

    def __init__(self, offset: Tensor):
        super().__init__()
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) minus the offset, computed in float32 or better."""
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        return (work - self.offset.to(work)).to(x.dtype)

    def held_in(self, dtype: torch.dtype, device: torch.device | str | None = None) -> "Shift":
        """A copy in this dtype."""
        return Shift(self.offset.to(device, dtype, copy=True))

    def spec(self) -> dict:
        """Plain data, read by `from_spec`."""
        return {"type": "shift"}

    @classmethod
    def from_spec(cls, spec: dict, tensors: dict[str, Tensor], prefix: str = "") -> "Shift":
        """The shift that `spec` describes; tensors: with its offset below `prefix`."""
        return cls(tensors[f"{prefix}offset"])


class Range(Constants):
    """Learned factors (1,) of a token's smallest and largest value, between which its grid lies."""

    def __init__(self, low: Tensor, high: Tensor):
        super().__init__()
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def held_in(self, dtype: torch.dtype, device: torch.device | str | None = None) -> "Range":
        """A copy in this dtype."""
        return Range(self.low.to(device, dtype, copy=True), self.high.to(device, dtype))

    def spec(self) -> dict:
        """Plain data, read by `from_spec`."""
        return {"type": "range"}

    @classmethod
    def from_spec(cls, spec: dict, tensors: dict[str, Tensor], prefix: str = "") -> "Range":
        """The range that `spec` describes; tensors: with its bounds below `prefix`."""
        return cls(tensors[f"{prefix}low"], tensors[f"{prefix}high"])


ONLINE = {"kronecker": Kronecker, "shift": Shift, "range": Range}


def specs(block: nn.Module) -> dict[str, dict]:
    """{path: spec} of every online module of a block."""
    return {name: m.spec() for name, m in block.named_modules() if isinstance(m, tuple(ONLINE.values()))}


def from_spec(spec: dict, tensors: dict[str, Tensor], prefix: str = "") -> nn.Module:
    """The online module that `spec` and the tensors named `prefix`… describe.

    Raises:
        ObrError: a type that this version does not know.
    """
    kind = spec.get("type", "kronecker")
    if kind not in ONLINE:
        raise ObrError(f"Online transform of type {kind!r} is not known; update the package, or compress again.")
    return ONLINE[kind].from_spec(spec, tensors, prefix)
