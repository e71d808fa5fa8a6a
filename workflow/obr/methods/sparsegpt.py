"""SparseGPT with GPTQ: mask and codes chosen in one sweep."""

from torch import Tensor

from obr.methods.gptq import BLOCK, gptq_sweep
from obr.methods.masks import SCORES, mask_from_scores


def sparsegpt_gptq(weight, hessian, mask, grid, *, sparsity=0.5, pattern=None, **_):
    """SparseGPT and GPTQ in one sweep; the mask is chosen on the way and written into `mask`.

    Unstructured: in each block of 128 columns the lowest scores over *all rows* go, so rows differ in
    sparsity, as in SparseGPT's code. With a pattern: group by group.
    """
    diagonal = hessian.inverse_factor.diagonal()

    def choose(block: Tensor, first: int) -> Tensor:
        scores = SCORES["sparsegpt"](block, inverse_factor_diagonal=diagonal[first : first + block.shape[1]])
        if pattern is not None:
            return mask_from_scores(scores, sparsity, pattern)
        threshold = scores.flatten().sort().values[int(scores.numel() * sparsity)]
        return scores > threshold

    every = pattern.group if pattern is not None else BLOCK
    return gptq_sweep(weight, hessian, grid, mask, choose=choose, choose_every=every)
