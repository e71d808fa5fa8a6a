"""How much memory a job takes, on the host and on a GPU.

On a GPU, weights are 16 bits and Hessians float32; hidden states lie on the host.
"""

from obr.config.methods import METHODS
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.planning.tensor_sizes import Sizes

LOGITS = 2.0**27  # bytes in float32 that exist at a time in zero-shot evaluation
END_PART = 2.0**22  # elements of embeddings or head that are rotated at a time, in float64, four times
STATES = 4.1e9  # bytes of hidden states in memory; more of them lie in files
# (matrices (n, n), weights (r, n), arrays of PART_ROWS rows) in float32 that exist at once at the points where a
# method holds most; one in 16 bits counts half. Tests count them.
PART_ROWS, PART_ARRAYS = 2048, 10
SOLVERS = {
    "gptq": [(3, 2.5, 0), (2, 6.5, 0)],
    "obr": [(3.5, 3.5, PART_ARRAYS), (2.5, 6.5, 0)],
    "joint": [(4.5, 2.5, 0), (3, 9, 0)],
    "joint, groups": [(4.5, 2.5, 0), (3, 12, 0)],  # of columns, with scales of their own
    # Not compiled: masks and rounded values exist beside all else.
    "joint on a GPU": [(4.5, 2.5, 0), (3, 13, 0)],
    "joint, groups on a GPU": [(4.5, 2.5, 0), (3, 16, 0)],
    "rounding": [(1, 6.5, 0)],
}


def solver_of(method: str, is_grouped: bool = False) -> str:
    """The entry of SOLVERS for a recipe's method, with scales for groups of columns or without.

    Raises:
        ObrError: the method's solver has no entry.
    """
    solver = METHODS[method].solver if method in METHODS else method
    solver = f"{solver}, groups" if is_grouped and solver == "joint" else solver
    if solver not in SOLVERS:
        raise ObrError(
            f"Method {method!r} has the solver {solver!r}, which plans have no memory for; "
            f"name one of {', '.join(map(repr, SOLVERS))} in its entry of METHODS."
        )
    return solver


def solver_bytes(method: str, rows: int, columns: int, part_rows: int = PART_ROWS, is_ordered: bool = False) -> float:
    """Of restoring layers with so many rows together and one Hessian; another one in the order of its diagonal."""
    weights, square = float(rows * columns), float(columns**2)
    most = max(
        4.0 * (squares * square + copies * weights + arrays * part_rows * columns)
        for squares, copies, arrays in SOLVERS[solver_of(method)]
    )
    return most + 4.0 * (square + weights / 4) * is_ordered


def folding(sizes: Sizes) -> float:
    """Bytes of a block as it is read and a rotation folded into it: in float32, one layer of it in float64, four
    times while it is turned."""
    return 4.0 * sizes.block + 32.0 * max(rows * columns for rows, columns in sizes.layers)


def reading_ends(sizes: Sizes, is_rotated: bool = True) -> float:
    """Bytes of embeddings and head in float32, as they are read, and of one of them as it is rotated or stored."""
    part = min(END_PART, sizes.ends / 2)
    return 4.0 * sizes.ends + (2.0 * sizes.ends + 32.0 * part if is_rotated else sizes.ends)


def compressing(
    sizes: Sizes, method: str, length: int, on_gpu: bool, is_rotated: bool = True, is_ordered: bool = False
) -> float:
    """Bytes on the device that compresses, but for hidden states: the ends as they are read; then the ends and, in
    turn, a block as it is read and folded, in float32 and one layer in float64; as it runs; and as its groups are
    restored."""
    element = 2 if on_gpu else 4
    d, f = sizes.hidden, sizes.passing
    loaded = folding(sizes) if is_rotated else element * sizes.block
    method = f"{method} on a GPU" if on_gpu and method.startswith("joint") else method
    running = element * sizes.block + 4.0 * max(sizes.inputs) ** 2 + element * length * (8 * d + 3 * f)
    groups = {(sum(rows for rows, _ in group), group[0][1]) for group in sizes.groups}
    solving = element * sizes.block + max(
        solver_bytes(method, rows, columns, is_ordered=is_ordered) for rows, columns in groups
    )
    return max(reading_ends(sizes, is_rotated), element * sizes.ends + max(loaded, running, solving))


def states_of(rule: str, sizes: Sizes, tokens: int, on_gpu: bool, recipe: Recipe | None = None) -> float:
    """Bytes of the hidden states of so many tokens; what is more than STATES lies in a file while the job runs."""
    copies = {"generate": 0, "released": 0, "gradients": sizes.blocks + 2}.get(rule, 1)
    if sizes.experts and rule in ("compress", "hessian"):  # beside what enters a block, what enters its experts
        copies += 1 + sizes.experts.chosen
    copies *= _copies(recipe)
    if recipe and recipe.token_weights:  # what enters each block, as for gradients
        copies = max(copies, sizes.blocks + 2)
    return (2.0 if on_gpu else 4.0) * tokens * sizes.hidden * copies


def _copies(recipe: Recipe | None) -> int:
    """Models that the calibration windows pass through; with held-out windows that judge, no window more."""
    return 2 if recipe and recipe.runs_dense else 1


def _passing_back(sizes: Sizes, length: int, element: int) -> float:
    """Bytes of a backward pass, but for what enters the blocks: a block's graph and the logits', twice."""
    graph = 4.0 * length * (20 * sizes.hidden + 6 * sizes.passing + 3 * sizes.vocabulary)
    return element * sizes.ends + max(folding(sizes), 2 * element * sizes.block + graph)


def _refining(sizes: Sizes, length: int, element: int) -> float:
    """Bytes of the refinement of a block: it and the dense one, its integers, their gradients, Adam's two moments and
    a copy of the best in float32, its weights as they are computed and their gradients, and the graph."""
    graph = 4.0 * length * (20 * sizes.hidden + 6 * sizes.passing)
    return element * sizes.ends + (2 * element + 5 * 4.0 + 6 * 4.0) * sizes.block + graph


def memory(
    rule: str, sizes: Sizes, tokens: int, length: int, on_gpu: bool, recipe: Recipe | None = None
) -> tuple[float, float]:
    """(host, GPU) peak of a job in GB.

    recipe: of a compression. With targets out of the dense model its blocks run beside the compressed ones, on states
    of their own. Learning has a formula in `learning_cost`.
    """
    element = 2 if on_gpu else 4
    ends, block = element * sizes.ends, element * sizes.block
    all_hessians = 4.0 * sum(n**2 for n in sizes.inputs)
    states = min(states_of(rule, sizes, tokens, on_gpu, recipe), STATES)
    if rule == "sensitivity":  # all Hessians of a block, and its layers at two references in float32
        largest = max(compressing(sizes, method, length, on_gpu) for method in ("gptq", "joint"))
        model, base = largest + all_hessians - 4.0 * max(sizes.inputs) ** 2 + 8.0 * sizes.block, 0.9
    elif rule == "compress":
        method, is_rotated = ("obr_gptq", True)
        if recipe:
            method, is_rotated = solver_of(recipe.method, bool(recipe.group)), recipe.rotation != "none"
        is_ordered = recipe is not None and recipe.column_order != "given"
        model, base = compressing(sizes, method, length, on_gpu, is_rotated, is_ordered), 0.9
        if recipe and recipe.hessian_scope == "block":  # those of the groups that are still to come
            model += (all_hessians - 4.0 * min(sizes.inputs) ** 2) * (1 + recipe.needs_dense)
        if recipe and recipe.runs_dense:
            model += block + (4.0 * max(sizes.inputs) ** 2 if recipe.needs_dense else 0.0)
        if recipe and recipe.refine_steps:
            model = max(model, _refining(sizes, length, element))
        if recipe and recipe.token_weights:  # found before anything is compressed
            model = max(model, _passing_back(sizes, length, element))
    elif rule == "gradients":  # beside what enters each block, up to the room for it
        model, base = max(reading_ends(sizes), _passing_back(sizes, length, element)), 0.8
    elif rule == "hessian":
        model, base = max(reading_ends(sizes), ends + max(folding(sizes), 2 * block + all_hessians)), 0.8
    elif rule == "released":  # the file's ends beside the base model's, a block beside the base model's
        model, base = 1.5 * ends + 3 * block, 0.9
    elif rule == "evaluate":  # ends at 16 bits, the head again as it is used, a block and what passes through it
        passing = element * length * (8 * sizes.hidden + 3 * sizes.passing)
        model, base = (2 + element / 2) * sizes.ends + block + passing + 3 * LOGITS, 1.2
        if on_gpu:  # the next block is read meanwhile, and unpacked layer by layer
            model += block + 8.0 * max(rows * columns for rows, columns in sizes.layers)
        else:
            model += block
    elif rule == "generate":
        model, base = ends + element * sizes.block * sizes.blocks + 8.0 * length * sizes.vocabulary, 1.2
    else:
        return (1.8 if rule == "calibrate" else 0.6), 0.0
    if on_gpu:
        return base + 1.5 + (block + states) / 1e9, model / 1e9
    return base + (model + states) / 1e9, 0.0
