"""SparseGPT with GPTQ: mask and codes chosen in one sweep."""

from torch import Tensor

from obr.methods.gptq import BLOCK, gptq_sweep
from obr.methods.layer import Layer, Solution
from obr.methods.masks import mask_from_scores, saliency


def sparsegpt_gptq(layer: Layer) -> Solution:
    """SparseGPT and GPTQ in one sweep; the mask is chosen on the way.

    Unstructured: in each block of 128 columns the lowest scores over *all rows* go, so rows differ in
    sparsity, as in SparseGPT's code. With a pattern: group by group.
    """
    diagonal = layer.hessian.inverse_factor.diagonal()
    sparsity, pattern = layer.recipe.sparsity, layer.pattern

    def choose(block: Tensor, first: int) -> Tensor:
        scores = saliency(block, diagonal[first : first + block.shape[1]])
        if pattern is not None:
            return mask_from_scores(scores, sparsity, pattern)
        threshold = scores.flatten().sort().values[int(scores.numel() * sparsity)]
        return scores > threshold

    return gptq_sweep(layer, choose=choose, choose_every=pattern.group if pattern is not None else BLOCK)
