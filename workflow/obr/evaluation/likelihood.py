"""Log-likelihoods of answers: by a model in memory, or by blocks of which one is in memory at a time.

Both compute what several requests begin with once; see `prompt_trees`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from obr.evaluation.block_pass import run
from obr.evaluation.prompt_trees import Batch, Request, Tree, batches_of, joined, scores, trees_of
from obr.models.blocks import Blocks
from obr.models.hidden_states import MemoryBudget

BATCH_TOKENS = 2048  # that pass through a block at a time
CHUNK = 2**25  # numbers of logits in float32 that exist at a time
# Rotary embeddings whose frequencies depend on the length of the sequence, beyond the length in this setting.
LENGTH_DEPENDENT = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}

# Of the hidden size: pairs of tokens, between which attention costs what a block's products cost for a token. A block
# of a Llama has 12 d² weights, so 24 d² operations for a token; attention between two tokens takes 4 d. Half of 6 d,
# since attention with a mask is slower than products.
PAIRS = 3

Likelihood = tuple[float, bool]


def log_likelihoods(
    model: nn.Module, requests: Sequence[Request], max_length: int, batch_size: int = 1
) -> list[Likelihood]:
    """Of each request: the summed log-probability of its answer, and whether greedy decoding gives that answer.

    Args:
        model: a transformers causal LM.
        requests: contexts of one token or more, and answers of 1 to `max_length` tokens.
        max_length: in tokens; a context and answer that are longer lose their beginning.
        batch_size: the least number of answers in one forward pass, as far as there are so many.

    Log-probabilities are computed in float32. They are those of each context and answer alone, up to the rounding of
    sums. Where a model's attention has a window and a request does not fit in it, the request is scored alone.
    """
    window = getattr(model.config, "sliding_window", None) or max_length
    beyond = _length_dependent(model.config)

    def alone(length: int) -> bool:
        return length > window or beyond(length)

    found: list[Likelihood] = [(0.0, False)] * len(requests)
    trees = trees_of(requests, max_length, BATCH_TOKENS, PAIRS * model.config.hidden_size, alone)
    for batch, single in _by_answers(trees, batch_size, alone):
        for number, likelihood in _in_memory(model, batch, single):
            found[number] = likelihood
    return found


def _length_dependent(config) -> Callable[[int], bool]:
    """Whether the position embeddings of a sequence of so many tokens are those of its length alone."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # of blocks of each kind, in Gemma 3
    rope = next((part for part in kinds if part.get("rope_type") in LENGTH_DEPENDENT), None)
    if rope is None:
        return lambda length: False
    key = LENGTH_DEPENDENT[rope["rope_type"]]
    limit = rope.get(key) or getattr(config, key)
    return lambda length: length > limit


def _by_answers(trees: Sequence[Tree], batch_size: int, alone: Callable[[int], bool]) -> Iterator[tuple[Batch, bool]]:
    """(batch of one row, whether it is one request alone, for which the model's own mask serves)."""
    rows: list[Tree] = []
    for tree in (tree for tree in trees if not alone(len(tree.last))):
        rows.append(tree)
        if sum(len(row.answers) for row in rows) >= batch_size:
            yield Batch([joined(rows)]), False
            rows = []
    if rows:
        yield Batch([joined(rows)]), False
    # From short to long: dynamic frequencies stay those of the longest sequence until a short one comes.
    for tree in sorted((tree for tree in trees if alone(len(tree.last))), key=len):
        yield Batch([tree]), True


@torch.no_grad()
def _in_memory(model: nn.Module, batch: Batch, alone: bool) -> Iterator[tuple[int, Likelihood]]:
    device = model.device
    logits = model(
        batch.tokens.to(device),
        attention_mask=None if alone else batch.mask(model.dtype, device),
        position_ids=batch.positions.to(device),
        logits_to_keep=torch.tensor(batch.scored, device=device),
        use_cache=False,
    ).logits[0]
    return scores(batch, lambda places: logits, len(batch.scored))


@torch.no_grad()
def streamed_log_likelihoods(
    blocks: Blocks,
    requests: Sequence[Request],
    max_length: int,
    batch_tokens: int = BATCH_TOKENS,
    room: MemoryBudget | None = None,
    progress: bool = False,
) -> list[Likelihood]:
    """As `log_likelihoods`, of all requests at once, with each block loaded once.

    Args:
        blocks: those of the model. One is in memory at a time.
        batch_tokens: the most tokens that pass through a block at a time. A longer request passes alone.
        room: for the hidden states of all requests.
        progress: whether it is shown.

    Raises:
        ObrError: tokens that the model does not have, or no room for the hidden states.
    """
    answers = Answers(blocks, requests, max_length, batch_tokens)
    return run(blocks, [answers], room, "zero-shot" if progress else None)[0]


class Answers:
    """Requests as a part of a pass through a model's blocks; its result is their log-likelihoods.

    The arguments are those of `streamed_log_likelihoods`.
    """

    def __init__(self, blocks: Blocks, requests: Sequence[Request], max_length: int, batch_tokens: int):
        self.blocks, self.count = blocks, len(requests)
        beyond = _length_dependent(blocks.config)
        trees = trees_of(requests, max_length, batch_tokens, PAIRS * blocks.config.hidden_size, beyond)
        self.batches = batches_of(trees, batch_tokens, beyond)
        self.shapes = [batch.shape for batch in self.batches]
        self.calls = _Calls(blocks, self.batches, beyond) if self.batches else None

    def entering(self) -> Iterator[Tensor]:
        """The hidden states (b, s, d) that enter the first block, batch by batch."""
        return (self.blocks.entering(batch.tokens)[0] for batch in self.batches)

    def arguments(self, index: int, piece: int, states: Tensor) -> dict:
        """Keyword arguments of block `index` for batch `piece`."""
        return self.calls.of(index, self.batches[piece], states)

    def finish(self, states: Iterator[Tensor]) -> list[Likelihood]:
        """(log-likelihood, whether greedy decoding gives the answer) of each request, from the last hidden states."""
        found: list[Likelihood] = [(0.0, False)] * self.count
        chunk = max(1, CHUNK // self.blocks.model.get_submodule(self.blocks.layout.head).weight.shape[0])
        for batch, out in zip(self.batches, states, strict=True):
            logits = partial(_logits, self.blocks, out.flatten(0, 1))
            for number, likelihood in scores(batch, logits, chunk):
                found[number] = likelihood
        return found


def _logits(blocks: Blocks, rows: Tensor, places: Tensor) -> Tensor:
    return blocks.logits(rows[places.to(rows.device)][None])[0]


class _Calls:
    """The keyword arguments with which blocks are called for a batch.

    The model's own forward makes them for one sequence; position embeddings are then taken at a batch's positions,
    and the mask is the batch's own.
    """

    def __init__(self, blocks: Blocks, batches: Sequence[Batch], beyond: Callable[[int], bool]):
        depths = {batch.depth for batch in batches}
        usual = max((depth for depth in depths if not beyond(depth)), default=0)
        self.length = {depth: depth if beyond(depth) else usual for depth in depths}
        # From short to long: dynamic frequencies stay those of the longest sequence until a short one comes.
        blocks.forget_length()
        self.made = {length: self._made(blocks, length) for length in sorted(set(self.length.values()))}

    @staticmethod
    def _made(blocks: Blocks, length: int) -> list[tuple[dict, int | None]]:
        """(arguments for a sequence, window) of each block."""
        _, arguments = blocks.entering(torch.zeros(1, length, dtype=torch.long))
        return [({**given, "attention_mask": None}, _window(given.get("attention_mask"))) for given in arguments]

    def of(self, index: int, batch: Batch, states: Tensor) -> dict:
        """Of block `index`, for the batch's states (b, s, d)."""
        given, window = self.made[self.length[batch.depth]][index]
        positions = batch.positions.to(states.device)
        call = {name: _at(value, positions) for name, value in given.items()}
        return call | {"attention_mask": batch.mask(states.dtype, states.device, window)}


def _window(mask: Tensor | None) -> int | None:
    """How many positions a token sees, by the model's own mask of a sequence (1, 1, s, s); None for all before it."""
    if mask is None:
        return None
    last = mask[0, 0, -1]
    seen = int((last if last.dtype == torch.bool else last == 0).sum())
    return None if seen == len(last) else seen


def _at(value, positions: Tensor):
    """What is given to a block for the positions 0, 1, 2 … (1, s, …), for other positions (b, t)."""
    if isinstance(value, (tuple, list)):
        return type(value)(_at(part, positions) for part in value)
    return value[0][positions] if isinstance(value, Tensor) else value
