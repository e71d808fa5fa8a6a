"""The function of each method and mask; config.methods lists their names and properties.

A method is a function `Layer -> Solution` that changes nothing it is given. The objective of all is
`tr((W - Ŵ) H (W - Ŵ)ᵀ)`, with H the Hessian of the layer's inputs.

Sources: OBR, arXiv 2509.11177 (the signs of its equations 9 and 10 are corrected: the compensation is added);
GPTQ, arXiv 2210.17323; SparseGPT, arXiv 2301.00774; Wanda, arXiv 2306.11695.
"""

from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from obr.config.methods import MASKS, METHODS
from obr.methods import gptq, joint, masks, obr, rounding, sparsegpt
from obr.methods.layer import Layer, Solution

MODULES = (rounding, gptq, obr, sparsegpt, joint)


def _defined(name: str, modules: tuple[ModuleType, ...]) -> Callable:
    """The function of this name that one of the modules defines."""
    (found,) = [vars(m)[name] for m in modules if getattr(vars(m).get(name), "__module__", None) == m.__name__]
    return found


FUNCTIONS: dict[str, Callable[[Layer], Solution]] = {
    name: _defined(method.function, MODULES) for name, method in METHODS.items() if method.function
}
# Of each mask: (weight (r, n), Hessian, seed) -> scores (r, n), of which the lowest are pruned.
SCORES: dict[str, Callable[..., Tensor]] = {name: _defined(name, (masks,)) for name in MASKS}
