"""SparseGPT with GPTQ: mask and codes chosen in one sweep, or codes in a second one."""

from dataclasses import replace

from torch import Tensor

from obr.methods.gptq import BLOCK, gptq_sweep
from obr.methods.grid import Grid
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


def sparsegpt_then_gptq(layer: Layer) -> Solution:
    """SparseGPT alone first, then GPTQ on the weights that it has left; what is pruned stays zero.

    The order in which llm-compressor applies the two. Scales are those of the pruned rows. The second sweep rounds
    weights that have absorbed all of the pruning.
    """
    pruned = sparsegpt_gptq(replace(layer, grid=Grid(None, 16)))
    grid = layer.grid.of_other(pruned.weight, layer.recipe.clip, layer.hessian.diagonal)
    return gptq_sweep(replace(layer, weight=pruned.weight, mask=pruned.mask, grid=grid))
