"""What learning a rotation costs: its work and, for learning through the whole model, its memory.

Learning through the whole model holds one block at a time. Each step reads every block twice, forward and back.
"""

from obr.config.rotations import LEARNERS
from obr.planning.cost_model import CLIP_PASSES, Work
from obr.planning.memory import STATES
from obr.planning.tensor_sizes import Sizes

BATCH_TOKENS = 2048  # that pass through a block at a time, unless `micro_batch` says how many windows
LOGITS = 512  # tokens whose logits exist at a time
# Passes over all weights in a step that folds them again: of learning block by block; forward, back and for the
# gradient, of learning through the whole model.
FOLDED, STREAMED_FOLDS = 6, 6
# Products of all weights with a rotation of the residual stream in such a step: forward, twice on the way back, and
# the two gradients.
RESIDUAL_FOLDS = 5
# Copies of a block in float32 that learning block by block holds: of scales that are searched; of transforms that are
# learned, with the graph of the folded and rounded weights; the same with clips. SAMPLES: windows a search keeps.
SEARCHED, FOLDED_GRAPH, CLIPPED_GRAPH, SAMPLES = 3.0, 5.2, 7.2, 16


def is_streamed(kind: str) -> bool:
    """Whether this kind learns through the whole model."""
    return LEARNERS[kind].steps is not None


def learning(sizes: Sizes, kind: str, learn: dict, windows: int, length: int) -> Work:
    """Learning a rotation by the `learn` of its entry, from all but the held-out ones of these windows."""
    counted = _streamed if is_streamed(kind) else _blockwise
    return counted(sizes, kind, {**LEARNERS[kind].defaults, **learn}, windows, length)


def _blockwise(sizes: Sizes, kind: str, learn: dict, windows: int, length: int) -> Work:
    """Block by block: forward and backward take three times what forward takes. Every step folds the block again."""
    batch, weights = learn.get("batch", 1), float(sizes.block * sizes.blocks)
    steps = learn["epochs"] * max(1, (windows - learn.get("held_out", 4)) // batch)
    tokens = steps * batch * length
    elements = 3 * tokens * sizes.blocks * (4.0 * sizes.hidden + 2.0 * sizes.intermediate) + FOLDED * steps * weights
    products = 3 * sizes.forward(tokens, length) + sizes.forward(2 * windows * length, length)
    return Work(products, 0, 0, elements, 2.0 * (weights + sizes.ends), 3 * sizes.blocks * steps, 7)


def _streamed(sizes: Sizes, kind: str, learn: dict, windows: int, length: int) -> Work:
    """Through the whole model: forward, and forward again with gradients, which take another pass for activations
    and one more for weights that are folded again. The residual stream is turned at its four places in every block,
    or the rotation is folded into rounded weights."""
    steps, batch, held_out = learn["steps"], learn["batch"], learn.get("held_out", 4)
    weights, tokens, looks = (
        float(sizes.block * sizes.blocks),
        steps * batch * length,
        steps // learn.get("every", 10),
    )
    looked = (looks + 1) * held_out * length
    rounds = learn.get("quantise", {}).get("bits", 16) < 16
    passes = 4 if rounds or kind == "ostquant" else 3
    elements = passes * tokens * sizes.blocks * (4.0 * sizes.hidden + 2.0 * sizes.intermediate)
    products = passes * sizes.forward(tokens, length) + sizes.forward(looked, length)
    products += 3 * sizes.logits(tokens) + sizes.logits(looked)
    if _imitates(kind, learn):  # the 16-bit model, once for each window
        taught = (min(steps * batch, windows - held_out) + held_out) * length
        products += sizes.forward(taught, length) + sizes.logits(tokens + looked)
    if rounds:
        products += 2.0 * (RESIDUAL_FOLDS * steps + looks) * weights * sizes.hidden
    else:
        products += 8.0 * (passes * tokens + looked) * sizes.blocks * sizes.hidden**2
    if rounds or kind == "ostquant":  # SpinQuant folds two layers of 16-bit weights alone
        elements += (STREAMED_FOLDS * steps + 3 * looks) * weights
    if rounds and learn["quantise"].get("clip", "mse") == "mse":  # one search a pass forward
        elements += CLIP_PASSES * (steps + looks) * weights
    loads = 2.0 * weights * (2 * steps + looks)
    runs = 3.0 * sizes.blocks * steps * batch / _at_once(learn, length)
    return Work(products, 0, 0, elements, 2.0 * (weights + sizes.ends), runs, 7, loads)


def _at_once(learn: dict, length: int) -> int:
    """Windows that pass through a block at a time."""
    return min(learn["batch"], learn.get("micro_batch") or max(1, BATCH_TOKENS // length))


def _imitates(kind: str, learn: dict) -> bool:
    """Whether the loss is the distance to the 16-bit model."""
    return kind == "ostquant" or learn.get("loss") == "kl_top"


def states_of(sizes: Sizes, kind: str, learn: dict, windows: int, length: int) -> float:
    """Bytes of hidden states: what enters each block in a step, and what leaves the 16-bit model for every window.

    Block by block: what enters and leaves the block, and for OmniQuant what enters the quantised one.
    """
    if not is_streamed(kind):
        return 4.0 * (3 if kind == "omniquant" else 2) * windows * length * sizes.hidden
    batch = learn.get("batch", LEARNERS[kind].batch)
    kept = batch * (sizes.blocks + 1) + (windows if _imitates(kind, learn) else 0)
    return 4.0 * kept * length * sizes.hidden


def _in_a_block(sizes: Sizes, kind: str, learn: dict, windows: int, length: int) -> float:
    """Bytes that learning block by block holds besides the ends: copies of a block, and what windows leave in it."""
    if LEARNERS[kind].batch is None:  # it searches
        return 4.0 * (SEARCHED * sizes.block + min(SAMPLES, windows) * length * (2 * sizes.hidden + sizes.passing))
    quantised = learn.get("quantise", {})
    copies = CLIPPED_GRAPH if quantised.get("clip") == "learned" else FOLDED_GRAPH
    flowing = any(quantised.get(part, {}).get("bits", 16) < 16 for part in ("activations", "keys", "values"))
    width = 30 * sizes.hidden + 9 * sizes.passing if flowing else 15 * sizes.hidden + 5 * sizes.passing
    return 4.0 * (copies * sizes.block + learn["batch"] * length * width)


def memory(sizes: Sizes, kind: str, learn: dict, windows: int, length: int, on_gpu: bool) -> tuple[float, float]:
    """(host, GPU) peak in GB of learning.

    Through the whole model: a block in float32, its folded weights, and their gradients; in 16 bits once more where
    products do. Beside them the graph of the tokens that pass at a time, or of one layer's fold; or, before the way
    back, the head as it is used and some logits. The rotation with its gradient and what its step takes.
    Hidden states lie on the host.
    """
    learn = {**LEARNERS[kind].defaults, **learn}
    states = min(states_of(sizes, kind, learn, windows, length), STATES)
    if not is_streamed(kind):
        model = 2.0 * sizes.ends + _in_a_block(sizes, kind, learn, windows, length)
        if on_gpu:
            return 2.4 + (states + 2 * sizes.block) / 1e9, model / 1e9
        return 0.9 + (model + states) / 1e9, 0.0
    rounds, tokens = learn.get("quantise", {}).get("bits", 16) < 16, _at_once(learn, length) * length
    flowing = kind == "ostquant" or learn.get("gradients") == "flowing"
    half = 2 if learn.get("dtype") in ("bfloat16", "float16") else 0
    weights = (12.0 if rounds or kind == "ostquant" else 9.0) + half
    width = 30 * sizes.hidden + 9 * sizes.intermediate if flowing else 15 * sizes.hidden + 5 * sizes.intermediate
    fold = 4.0 * (10 if rounds else 6) * max(rows * columns for rows, columns in sizes.layers)
    imitates = _imitates(kind, learn)
    head = (half or 4) * sizes.ends / 2 * (1 + imitates) + 4.0 * min(LOGITS, tokens) * sizes.vocabulary * 6
    passing = max(weights * sizes.block + max(4.0 * tokens * width, fold), 4.0 * sizes.block + head)
    model = 2.0 * sizes.ends + passing + 4 * 6.0 * sizes.hidden**2
    if on_gpu:
        return 2.4 + (states + 2 * sizes.block) / 1e9, model / 1e9
    return 0.5 + (model + states) / 1e9, 0.0
