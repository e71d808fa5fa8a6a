"""Token weights: how much the language-model loss feels an error that a token's inputs cause in a group of layers.

The loss that methods minimise is `tr(D H Dᵀ)`, H = Σ_t w_t x_t x_tᵀ. With w_t the mean over output channels of
(∂L/∂y_tr)² that is what a Fisher matrix whose blocks are one multiple of the same matrix says of an error D: the
Hessian of GuidedQuant (arXiv 2505.07004), with one group of channels for all layers that read the same input.
"""

import torch
from torch import Tensor

from obr.calibration.output_gradients import pass_back
from obr.errors import ObrError
from obr.models.blocks import Blocks
from obr.models.hidden_states import MemoryBudget


def token_weights(
    blocks: Blocks, tokens: Tensor, share: float, room: MemoryBudget | None = None, progress: bool = True
) -> dict[tuple[int, str], Tensor]:
    """{(block, group): (b, s) float32, mean 1}: `1 - share + share w / mean(w)`, w the tokens' squared gradients.

    Gradients are of the dense model. They take one pass forward and one backward, as `squared_gradients` does, before
    anything is compressed.

    Args:
        blocks: of the dense model. tokens: (b, s). share: 0 for tokens that count alike, 1 for gradients alone.

    Raises:
        ObrError: gradients that are not finite, or all zero.
    """
    groups = {name: group for group, names in blocks.layout.groups.items() for name in names}
    found: dict[tuple[int, str], Tensor] = {}

    def take(layer: str, window: int, gradient: Tensor) -> None:
        index, _, name = layer.partition(".")
        key = (int(index), groups[name])
        if key not in found:
            found[key] = torch.zeros(tokens.shape, device=gradient.device)
        found[key][window] += gradient.square().sum(1)

    pass_back(blocks, tokens, take, room, progress)
    return {key: _mixed(squares, share, key) for key, squares in found.items()}


def _mixed(squares: Tensor, share: float, key: tuple[int, str]) -> Tensor:
    mean = squares.mean()
    if not bool(mean.isfinite() & (mean > 0)):
        raise ObrError(
            f"Block {key[0]} {key[1]} has gradients that are not finite, or all zero; "
            "use dtype float32 or bfloat16, or set token_weights to 0."
        )
    return squares.div_(mean).mul_(share).add_(1 - share)
