"""The methods: from a layer's dense weights to pruned and quantised ones, errors compensated.

Every method is a function `(weight, hessian, mask, grid, **options) -> weight`, listed in METHODS. The objective is
`tr((W - Ŵ) H (W - Ŵ)ᵀ)`, H the Hessian of the layer's inputs.

Sources: OBR, arXiv 2509.11177 (the signs of its equations 9 and 10 are corrected: the compensation is added);
GPTQ, arXiv 2210.17323; SparseGPT, arXiv 2301.00774; Wanda, arXiv 2306.11695.
"""

from collections.abc import Callable

from torch import Tensor

from obr.methods.gptq import gptq, round_to_nearest
from obr.methods.joint import joint
from obr.methods.obr import obr_gptq, obr_rtn
from obr.methods.sparsegpt import sparsegpt_gptq

# (weight (r, n), Hessian, mask (r, n), Grid, **options) -> weight (r, n)
METHODS: dict[str, Callable[..., Tensor]] = {
    "rtn": round_to_nearest,
    "gptq": gptq,
    "magnitude": round_to_nearest,
    "wanda": round_to_nearest,
    "sparsegpt_gptq": sparsegpt_gptq,
    "obr_rtn": obr_rtn,
    "obr_gptq": obr_gptq,
    "joint": joint,
}
