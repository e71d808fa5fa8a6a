"""The methods and masks: one entry each, read by recipes, restoration, figures and checks.

A new method is an entry of METHODS and a function in `obr.methods`; a new mask is an entry of MASKS and a function in
`obr.methods.masks`. Nothing else lists them.
"""

from dataclasses import KW_ONLY, dataclass


@dataclass(frozen=True)
class Mask:
    """A score by which weights are removed, computed by the function of its name in `obr.methods.masks`.

    needs_hessian: the score reads a layer's Hessian. needs_harmonic: it reads column norms weighted by sequence.
    """

    needs_hessian: bool = True
    needs_harmonic: bool = False


MASKS = {
    "magnitude": Mask(needs_hessian=False),
    "wanda": Mask(),
    "wanda_harmonic": Mask(needs_harmonic=True),
    "sparsegpt": Mask(),
    "random": Mask(needs_hessian=False),
}
ANY_MASK = tuple(MASKS)


@dataclass(frozen=True)
class Method:
    """How a layer becomes pruned and quantised.

    label, marker: of its rows in figures; the marker is matplotlib's.
    function: in `obr.methods`, `Layer -> Solution`; None if nothing is computed.
    prunes: it removes weights. data_free: its weights do not depend on calibration data.
    grouped: groups of columns may have scales of their own.
    masks: masks that a recipe may choose; the first is the default.
    finds_mask: the function chooses the mask while it computes.
    rows_differ: without a pattern, rows of a layer differ in sparsity, so that layers are solved one by one.
    ordered: columns are treated one after the other, so that their order matters.
    reads_alpha: the recipe's alpha says how many columns are treated first.
    layer_scope: without a pattern, the rows of a layer may share its zeros, by the recipe's scope: layer.
    adopted: others computed the weights; a checkpoint of theirs is read.
    solver: what plans count as its work and memory, an entry of `planning.memory.SOLVERS`: "rounding" for all that
    takes no Hessian's inverse, "gptq", "obr" or "joint".
    column_sweeps: how often GPTQ goes over a layer's columns in it, which plans count besides.
    """

    label: str
    marker: str
    function: str | None
    prunes: bool = False
    data_free: bool = False
    grouped: bool = False
    masks: tuple[str, ...] = ()
    finds_mask: bool = False
    rows_differ: bool = False
    ordered: bool = False
    reads_alpha: bool = False
    layer_scope: bool = False
    adopted: bool = False
    _: KW_ONLY
    solver: str
    column_sweeps: int = 0


METHODS = {
    "dense": Method("Dense", "*", None, data_free=True, solver="rounding"),
    "rtn": Method("RTN", "o", "round_to_nearest", data_free=True, grouped=True, solver="rounding"),
    "gptq": Method("GPTQ", "s", "round_by_gptq", grouped=True, ordered=True, solver="gptq", column_sweeps=1),
    "magnitude": Method(
        "Magnitude",
        "v",
        "round_to_nearest",
        prunes=True,
        data_free=True,
        grouped=True,
        masks=("magnitude",),
        solver="rounding",
    ),
    "wanda": Method(
        "Wanda",
        "^",
        "round_to_nearest",
        prunes=True,
        grouped=True,
        masks=("wanda", "wanda_harmonic"),
        solver="rounding",
    ),
    "sparsegpt_gptq": Method(
        "SparseGPT+GPTQ",
        "D",
        "sparsegpt_gptq",
        prunes=True,
        finds_mask=True,
        rows_differ=True,
        ordered=True,
        solver="gptq",
        column_sweeps=1,
    ),
    "sparsegpt_then_gptq": Method(
        "SparseGPT, then GPTQ",
        "<",
        "sparsegpt_then_gptq",
        prunes=True,
        grouped=True,
        finds_mask=True,
        rows_differ=True,
        ordered=True,
        solver="gptq",
        column_sweeps=2,
    ),
    "obr_rtn": Method(
        "OBR (RTN)",
        "P",
        "obr_rtn",
        prunes=True,
        grouped=True,
        masks=("wanda", *ANY_MASK),
        ordered=True,
        reads_alpha=True,
        solver="obr",
    ),
    "obr_gptq": Method(
        "OBR (GPTQ)",
        "X",
        "obr_gptq",
        prunes=True,
        grouped=True,
        masks=("wanda", *ANY_MASK),
        ordered=True,
        reads_alpha=True,
        solver="obr",
        column_sweeps=1,
    ),
    "joint": Method(
        "Joint", "h", "prune_and_round", prunes=True, grouped=True, finds_mask=True, layer_scope=True, solver="joint"
    ),
    # What the authors of a checkpoint computed; it is read, not made.
    "released": Method("Released", "p", None, prunes=True, data_free=True, adopted=True, solver="rounding"),
    # What another program computed and stored in its own format.
    "external": Method(
        "External", "d", None, prunes=True, data_free=True, grouped=True, adopted=True, solver="rounding"
    ),
}


def names_of(property: str) -> str:
    """The methods that have a property, as a sentence names them.

    Example:
        >>> names_of("reads_alpha")
        'obr_rtn or obr_gptq'
    """
    return " or ".join(name for name, method in METHODS.items() if getattr(method, property))
