"""What a job costs: its work, counted, over the speed of a device.

Work is counted in operations, from the sizes of the model and the settings of the recipe; SPEEDS turns it into
seconds. The speeds of a CPU are those of one core of an AMD EPYC server, the speeds of a GPU an A100's by its
specification; timings of finished jobs correct them (see `plan`).
"""

from dataclasses import asdict, dataclass, replace

from obr.config.methods import METHODS
from obr.config.recipe import Option, Recipe
from obr.planning.tensor_sizes import Sizes

CLIP_PASSES = 12  # over a layer's weights, what the search for its rows' scales takes
JOINT_PASSES, JOINT_SWEEP = 26, 0.2  # of the method joint: products by its Hessian; of a sweep, beside a pass
OBR_PASSES = 4  # of conjugate gradients through a layer's Hessian, both of OBR's steps together
REFINE_PASSES = 30  # over a block's weights, of a step of refinement: straight-through rounding and Adam's update
RELEASED_PASSES = 18.0  # over all weights, what verifying and keeping a released checkpoint takes
STORED_PASSES = 6.0  # over all weights, what reading, rounding, packing and hashing them takes
GROUPS = 4  # of a block, each with a run of the calibration through it
# Of a whole block's work, what these runs take together: each stops at its group; or one for all groups.
GROUP_PASSES = {"group": 2.0, "block": 1.0}
# Of lm-eval's tasks: examples; tokens of an example, what its requests begin with counted once; tokens of them whose
# logits are needed. Of the six tasks of the paper, as SmolLM2's tokenizer cuts 600 examples.
TASKS = {
    "piqa": (1838, 51, 31),
    "boolq": (3270, 148, 1),
    "hellaswag": (10042, 94, 62),
    "arc_easy": (2376, 43, 16),
    "arc_challenge": (1172, 53, 21),
    "winogrande": (1267, 29, 14),
    "lambada_openai": (5153, 90, 2),
    "openbookqa": (500, 35, 21),
    "social_iqa": (1954, 45, 16),
}
OTHER_TASK = (200, 105, 61)  # four answers of a dozen words after a context of thirty
DIVERGENCE_LENGTH, DIVERGENCE_TOKENS = 512, 512  # on which divergences are measured; see `divergence`
WRITTEN = 6  # times the tokens of calibration windows is what a model computes that writes them, one at a time


@dataclass(frozen=True)
class Work:
    """What a job does: products in the model's dtype, products of inputs with themselves in float32, factors and
    solves in float32, elements passed over, bytes read, blocks run (each a handful of small kernels), a constant for
    its start, and bytes of weights read again, from the page cache."""

    products: float = 0
    grams: float = 0
    exact: float = 0
    elements: float = 0
    read: float = 0
    runs: float = 0
    start: float = 0
    loads: float = 0

    def seconds(self, speeds: dict, threads: int = 1) -> float:
        """At these speeds, what is counted in operations and elements on so many cores."""
        shared = sum(getattr(self, kind) / speeds[kind] for kind in ("products", "grams", "exact", "elements"))
        alone = (
            self.read / speeds["read"]
            + self.loads / speeds["loads"]
            + self.runs / speeds["runs"]
            + self.start * speeds["start"]
        )
        return shared / threads + alone


# Operations, elements, bytes and blocks a second; `start` multiplies the constants, which are a CPU's.
SPEEDS = {
    "cpu": {
        "products": 6.5e10,
        "grams": 6.5e10,
        "exact": 2.2e10,
        "elements": 1.8e8,
        "read": 3e8,
        "loads": 5e8,
        "runs": 1e4,
        "start": 1.0,
    },
    "cuda": {
        "products": 1e14,
        "grams": 1.6e13,
        "exact": 1.2e13,
        "elements": 2.5e10,
        "read": 1e9,
        "loads": 4e9,
        "runs": 1.2e3,
        "start": 1.5,
    },
}
# Of the kernel benchmark: kernels that the device has, seconds that clearing its caches takes, seconds to lay out a
# weight's element.
KERNELS = {"cpu": (11, 0.02, 3e-8), "cuda": (12, 1e-4, 1e-8)}


def compress(sizes: Sizes, recipe: Recipe, tokens: int, length: int) -> Work:
    """Compressing a model by a recipe, calibrated on `tokens` tokens in windows of `length`."""
    chosen = recipe.chosen(sizes.blocks)
    sizes, whole = replace(sizes, blocks=len(chosen)), sizes
    weights, blocks = sizes.block * sizes.blocks, sizes.blocks
    products, grams, exact, elements = 0.0, 0.0, 0.0, STORED_PASSES * weights
    if recipe.bits < 16 and recipe.method != "dense":
        fits = 2 if recipe.group and recipe.method == "gptq" else 1  # of all groups at once, then on the way
        elements += fits * weights * (CLIP_PASSES if recipe.clip in ("mse", "hessian") else 2)
    quadratic = float(sum(rows * columns**2 for rows, columns in sizes.layers)) * blocks
    cubic = float(sum(n**3 for n in sizes.inputs)) * blocks
    method = METHODS[recipe.method]
    if method.column_sweeps:
        exact += 4 / 3 * cubic + quadratic * method.column_sweeps
    if method.solver == "obr":
        steps = (recipe.sparsity > 0) + (recipe.bits < 16)
        exact += OBR_PASSES / 2 * steps * 2 * quadratic
    if recipe.column_order != "given":  # weights and Hessians moved, there and back
        elements += 2 * weights + 2 * float(sum(n**2 for n in sizes.inputs)) * blocks
    if method.solver == "joint":
        exact += 8 / 3 * cubic + JOINT_PASSES * quadratic
        elements += weights * JOINT_SWEEP * recipe.sweeps
        exact += (4 / 3 * cubic + quadratic) * (not recipe.sparsity)  # the sweep of GPTQ that it starts from, too
    if recipe.needs_hessian and recipe.hessian == "sequential":
        passed = replace(sizes, blocks=chosen[-1] + 1)  # blocks before the first chosen are run once
        products += GROUP_PASSES[recipe.hessian_scope] * sizes.forward(tokens, length) + passed.forward(
            tokens, length
        )
        grams = sizes.hessians(tokens)
    groups = GROUPS if recipe.hessian_scope == "group" else 1
    runs = (groups + 1) * blocks * tokens / length if products else 0.0
    if recipe.needs_dense:  # the dense blocks run, too; drifts, and the steps to the targets
        products, grams, runs = 2 * products, 2 * grams, 2 * runs
        exact += 4 * quadratic + (8 / 3 * cubic if method.solver == "joint" else 0.0)
    if recipe.refine_steps:
        passes = refinement(sizes, recipe, tokens, length)
        products, elements, runs = products + passes.products, elements + passes.elements, runs + passes.runs
    if recipe.token_weights:  # once forward and back through the dense model, before
        passes = gradients(whole, tokens, length)
        products, runs = products + passes.products, runs + passes.runs
    if recipe.attention_weights:  # queries, keys and scores once more
        products += 0.3 * passed.forward(tokens, length)
        runs += 0.5 * blocks * tokens / length
    # column by column, each some small kernels
    runs += 0.1 * method.column_sweeps * blocks * sum(columns for _, columns in sizes.layers)
    return Work(products, grams, exact, elements, 2.0 * (whole.block * whole.blocks + whole.ends), runs, 6)


def refinement(sizes: Sizes, recipe: Recipe, tokens: int, length: int) -> Work:
    """Block-wise refinement: the dense blocks run once more, and of each step three passes and an update."""
    seen, steps = tokens, recipe.refine_steps
    looks = 11 * recipe.held_out * length if recipe.held_out else 2 * tokens
    products = sizes.forward(seen, length) + (4 * steps * length + 2 * looks) / length * sizes.forward(length, length)
    elements = float(REFINE_PASSES * steps * sizes.block * sizes.blocks)
    return Work(products, 0, 0, elements, 0, (4 * steps + 2 * looks / length) * sizes.blocks, 0)


def released(sizes: Sizes) -> Work:
    """Verifying a released checkpoint beside its base model; both are read at 16 bits."""
    weights = float(sizes.block * sizes.blocks)
    return Work(elements=RELEASED_PASSES * weights, read=4.0 * (weights + sizes.ends), start=6)


def hessian(sizes: Sizes, tokens: int, length: int) -> Work:
    """Collecting cached Hessians."""
    products, runs = sizes.forward(tokens, length), sizes.blocks * tokens / length
    return Work(products, sizes.hessians(tokens), 0, 0, 2.0 * (sizes.block * sizes.blocks + sizes.ends), runs, 5.5)


def gradients(sizes: Sizes, tokens: int, length: int) -> Work:
    """Output gradients: forward, once more where the gradients pass back, and back through activations alone."""
    products = 3 * (sizes.forward(tokens, length) + sizes.logits(tokens))
    read = 2.0 * (2 * sizes.block * sizes.blocks + sizes.ends)
    return Work(products, 0, 0, 0, read, 4 * sizes.blocks * tokens / length, 5.5)


def sensitivity(sizes: Sizes, options: list[Option], tokens: int = DIVERGENCE_TOKENS) -> Work:
    """Restoring a model, from cached Hessians, at each option, and running one changed model a layer."""
    exact = elements = runs = 0.0
    for option in options:
        entry = {"calibration": "given", "hessian": "cached", "sweeps": 0, **asdict(option)}
        work = compress(sizes, Recipe.parse(entry), 0, 1)
        exact += work.exact + 2.0 * sizes.blocks * sum(rows * columns**2 for rows, columns in sizes.layers)
        elements += work.elements - STORED_PASSES * sizes.block * sizes.blocks
        runs += work.runs
    read = 2.0 * (sizes.block * sizes.blocks + sizes.ends) + hessian_bytes(sizes)
    models = sizes.blocks * len(sizes.layers) * len({option.prunes for option in options})
    products = models * (sizes.forward(tokens, DIVERGENCE_LENGTH) / 2 + sizes.logits(tokens))
    runs += models * sizes.blocks / 2 * tokens / DIVERGENCE_LENGTH
    return Work(products, 0, exact, elements, read, runs, 5.5)


def perplexity(sizes: Sizes, tokens: int, length: int) -> Work:
    """A perplexity; every token passes through the quantisers of each layer."""
    elements = float(tokens * sizes.blocks) * (4 * sizes.hidden + 2 * sizes.passing)
    products = sizes.forward(tokens, length) + sizes.logits(tokens)
    runs = sizes.blocks * tokens / length
    return Work(products, 0, 0, elements, 2.0 * sizes.block * sizes.blocks, runs, 5.5)


def generation(sizes: Sizes, tokens: int, length: int, batch: int) -> Work:
    """Windows that a model writes, token by token; documents end early, and every step reads all weights."""
    drawn = WRITTEN * max(tokens, batch * length)
    products = sizes.forward(drawn, length) + sizes.logits(drawn)
    return Work(products, 0, 0, 0, 2.0 * (sizes.block * sizes.blocks + sizes.ends), sizes.blocks * drawn / batch, 7)


def zero_shot_tokens(task: str, limit: int | None) -> tuple[int, int, int]:
    """(tokens that are read, tokens whose logits are needed, tokens of an example) of a zero-shot task."""
    examples, length, scored = TASKS.get(task, OTHER_TASK)
    examples = min(examples, limit or examples)
    return examples * length, examples * scored, length


def zero_shot(sizes: Sizes, task: str, limit: int | None, batch_tokens: int) -> Work:
    """A zero-shot task; every token passes through the quantisers of each layer."""
    tokens, scored, length = zero_shot_tokens(task, limit)
    elements = float(tokens * sizes.blocks) * (4 * sizes.hidden + 2 * sizes.passing)
    products = sizes.forward(tokens, length) + sizes.logits(scored)
    runs = sizes.blocks * tokens / batch_tokens
    return Work(products, 0, 0, elements, 2.0 * (sizes.block * sizes.blocks + sizes.ends), runs, 10)


def evaluation(sizes: Sizes, texts: list[tuple[int, int]], tasks: list[tuple[str, int | None, int]]) -> Work:
    """All texts (tokens, window) and tasks (name, rows, tokens at a time) in one pass: the blocks are read once."""
    parts = [perplexity(sizes, tokens, length) for tokens, length in texts]
    parts += [zero_shot(sizes, *task) for task in tasks]
    sums = {kind: sum(getattr(part, kind) for part in parts) for kind in ("products", "elements", "runs")}
    start = 5.5 + (3.0 if tasks else 0.0) + 1.5 * len(tasks)  # lm-eval's import, then each task's rows
    return Work(read=max((part.read for part in parts), default=0.0), start=start, **sums)


def evaluated_tokens(texts: list[tuple[int, int]], tasks: list[tuple[str, int | None, int]]) -> tuple[int, int]:
    """(tokens of all texts and tasks, tokens that pass through a block at a time) of an evaluation."""
    tokens = sum(tokens for tokens, _ in texts) + sum(zero_shot_tokens(name, limit)[0] for name, limit, _ in tasks)
    return tokens, max([length for _, length in texts] + [length for *_, length in tasks], default=1)


# Seconds of the stages that do not depend on a model's size, on a CPU; downloads come on top.
CONSTANT = {
    "calibrate": 7.0,
    "mix": 4.0,
    "check_model": 0.1,
    "allocate": 1.5,
    "download_rotation": 6.0,
    "download_text": 2.0,
    "download_documents": 40.0,
    "download_task": 2.0,
    "download_model": 7.0,
    "download_released": 12.0,
    "table": 0.8,
    "figure": 2.2,
    "errata": 5.0,
}


def checkpoint_bytes(sizes: Sizes, recipe: Recipe) -> float:
    """Of a packed checkpoint: codes, masks, scales, and embeddings and head at 16 bits.

    The checkpoint of a dense recipe without a rotation refers to the blocks of the model.
    """
    if recipe.method == "dense" and recipe.rotation == "none":
        return 2.0 * sizes.ends
    weights, rows = sizes.block * sizes.blocks, sizes.blocks * sum(r for r, _ in sizes.layers)
    untied = 1.0 if recipe.rotation != "none" else 0.5
    scales = 4.0 * rows if recipe.bits < 16 and recipe.group is None else 0.0  # groups' are in the bits a weight
    return weights * recipe.bits_per_weight / 8 + scales + 2 * untied * sizes.ends


def hessian_bytes(sizes: Sizes) -> float:
    """Of the cached Hessians of a model: one triangle and the harmonic norms of each, in float32."""
    return 2.0 * sizes.blocks * sum(n * (n + 3) for n in sizes.inputs)
