"""Log-likelihoods of answers, where answers to one question share the computation of that question.

Multiple-choice tasks score several answers after the same context. Scored one by one, each answer has its context
computed again, which is most of the work. Here the answers are branches of one sequence.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Request = tuple[object, list[int], list[int]]  # anything, tokens of the context, tokens of the answer


def log_likelihoods(
    model: nn.Module, requests: Sequence[Request], max_length: int, batch_size: int = 1
) -> list[tuple[float, bool]]:
    """Of each request: the summed log-probability of its answer, and whether greedy decoding gives that answer.

    Args:
        model: a transformers causal LM.
        requests: contexts of one token or more, and answers of 1 to `max_length` tokens.
        max_length: in tokens; a context and answer that are longer lose their beginning.
        batch_size: the least number of answers in one forward pass, as far as there are so many.

    Log-probabilities are computed in float32. They are those of each context and answer alone, up to the rounding of
    sums. Where a model's attention has a window and a question does not fit in it, its answers are scored one by one.
    """
    found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    window = getattr(model.config, "sliding_window", None) or max_length + 1
    for batch in _batches(_by_context(requests, max_length), batch_size, window):
        for answer, likelihood in zip(batch.answers, _scored(model, batch), strict=True):
            found[answer.request] = likelihood
    return found


@dataclass(frozen=True)
class _Answer:
    """request: its number. rows: places in the packed sequence whose logits predict its tokens."""

    request: int
    tokens: list[int]
    rows: list[int]


@dataclass
class _Batch:
    """Contexts with their answers, packed into one sequence.

    Of each of its tokens: the position that it has behind its own context; the number of its context; and of its
    branch, 0 for a context's own tokens.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    answers: list[_Answer] = field(default_factory=list)
    alone: bool = False  # a single answer, for which the model's own mask serves

    def append(self, context: Sequence[int], answers: list[tuple[int, list[int]]]) -> None:
        number = self.contexts[-1] + 1 if self.contexts else 0
        last = self._extend(context, 0, number, 0)[-1]
        for branch, (request, tokens) in enumerate(answers, start=1):
            # The last token is predicted and never read.
            rows = [last, *self._extend(tokens[:-1], len(context), number, branch)]
            self.answers.append(_Answer(request, tokens, rows))

    def _extend(self, tokens: Sequence[int], first: int, context: int, branch: int) -> range:
        start = len(self.tokens)
        self.tokens += tokens
        self.positions += range(first, first + len(tokens))
        self.contexts += [context] * len(tokens)
        self.branches += [branch] * len(tokens)
        return range(start, len(self.tokens))

    def mask(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(s, s), what is added to scores: 0 for what comes before a token in its own context and branch."""
        positions, contexts, branches = (
            torch.tensor(numbers, device=device) for numbers in (self.positions, self.contexts, self.branches)
        )
        seen = (contexts == contexts[:, None]) & (positions <= positions[:, None])
        seen &= (branches == 0) | (branches == branches[:, None])
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)


def _by_context(requests: Sequence[Request], max_length: int) -> dict[tuple[int, ...], list[tuple[int, list[int]]]]:
    """Answers, with the numbers of their requests, by the tokens of the context that are left to them."""
    groups = defaultdict(list)
    for number, (_, context, answer) in enumerate(requests):
        kept = (context + answer)[-(max_length + 1) : -len(answer)]
        groups[tuple(kept)].append((number, answer))
    return groups


def _batches(
    groups: dict[tuple[int, ...], list[tuple[int, list[int]]]], batch_size: int, window: int
) -> Iterator[_Batch]:
    """window: tokens of a context and answer up to which every token attends to all before it."""
    batch = _Batch()
    for context, answers in groups.items():
        if len(context) + max(len(tokens) for _, tokens in answers) - 1 > window:
            for answer in answers:
                single = _Batch(alone=True)
                single.append(context, [answer])
                yield single
            continue
        batch.append(context, answers)
        if len(batch.answers) >= batch_size:
            yield batch
            batch = _Batch()
    if batch.answers:
        yield batch


@torch.no_grad()
def _scored(model: nn.Module, batch: _Batch) -> Iterator[tuple[float, bool]]:
    device = model.device
    rows = torch.tensor([row for answer in batch.answers for row in answer.rows], device=device)
    logits = model(
        torch.tensor([batch.tokens], device=device),
        attention_mask=None if batch.alone else batch.mask(device, model.dtype)[None, None],
        position_ids=torch.tensor([batch.positions], device=device),
        logits_to_keep=rows,
        use_cache=False,
    ).logits[0]
    parts = torch.log_softmax(logits, dim=-1, dtype=torch.float32).split([len(a.rows) for a in batch.answers])
    for answer, part in zip(batch.answers, parts, strict=True):
        tokens = torch.tensor(answer.tokens, device=device)
        likelihood = part.gather(-1, tokens[:, None]).sum()
        yield float(likelihood), bool((part.argmax(-1) == tokens).all())
