"""Prompts and their answers as trees of tokens, so that what several of them begin with is computed once.

Multiple-choice tasks score several answers after the same context, or one answer after several contexts that begin
alike. Scored one by one, each answer has its context computed again, which is most of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Request = tuple[object, list[int], list[int]]  # anything, tokens of the context, tokens of the answer


@dataclass(frozen=True)
class Answer:
    """request: its number. places: the nodes of the tree whose logits predict its tokens."""

    request: int
    tokens: list[int]
    places: list[int]


@dataclass
class Tree:
    """Token sequences that begin alike. A node is a token; the nodes above it are the tokens before it.

    Nodes are in depth-first order: those below node i are i + 1 to ends[i] - 1. positions: of each token behind the
    beginning of its sequence.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    last: list[int] = field(default_factory=list)  # nodes of the sequence that was added last

    def __len__(self) -> int:
        return len(self.tokens)

    def shared(self, tokens: Sequence[int]) -> int:
        """How many tokens the sequence and the last one begin with in common."""
        pairs = zip(self.last, tokens, strict=False)
        return next(
            (i for i, (node, token) in enumerate(pairs) if self.tokens[node] != token), _shorter(self, tokens)
        )

    def add(self, request: int, tokens: Sequence[int], answer: list[int]) -> None:
        """Add a sequence and its answer; sequences come in lexicographic order."""
        shared = self.shared(tokens)
        self.last = self.last[:shared] + list(range(len(self), len(self) + len(tokens) - shared))
        self.tokens += tokens[shared:]
        self.positions += range(shared, len(tokens))
        self.ends += [0] * (len(tokens) - shared)
        for node in self.last:
            self.ends[node] = len(self)
        self.answers.append(Answer(request, answer, self.last[-len(answer) :]))


def _shorter(tree: Tree, tokens: Sequence[int]) -> int:
    return min(len(tree.last), len(tokens))


def trees_of(
    requests: Sequence[Request],
    max_length: int,
    most: int,
    pairs: float,
    apart: Callable[[int], bool] = lambda length: False,
) -> list[Tree]:
    """Trees of all requests. A request joins a tree where that saves more than it costs.

    It saves the computation of the tokens that are shared. It costs attention between tokens that do not see each
    other, which is computed and masked.

    Args:
        requests: contexts of one token or more, and answers of 1 to `max_length` tokens.
        max_length: in tokens; a context and answer that are longer lose their beginning.
        most: tokens of a tree of several requests.
        pairs: of tokens, between which attention costs as much as all else that a block computes for a token.
        apart: whether requests of so many tokens get trees of their own.

    Example:
        >>> requests = [("", [5, 6, 7], [1]), ("", [5, 6, 8], [2])]  # text, tokens of the context, of the answer
        >>> [tree] = trees_of(requests, max_length=64, most=100, pairs=64)
        >>> tree.tokens, tree.positions
        ([5, 6, 7, 8], [0, 1, 2, 2])
    """
    read = [
        ((context + answer)[-(max_length + 1) : -1], answer, number)
        for number, (_, context, answer) in enumerate(requests)
    ]
    trees: list[Tree] = []
    for tokens, answer, number in sorted(read, key=lambda one: one[0]):
        alone = not trees or apart(len(tokens)) or apart(len(trees[-1].last))
        if alone or not _joins(trees[-1], tokens, most, pairs):
            trees.append(Tree())
        trees[-1].add(number, tokens, answer)
    return trees


def _joins(tree: Tree, tokens: Sequence[int], most: int, pairs: float) -> bool:
    shared = tree.shared(tokens)
    size = len(tree) + len(tokens) - shared
    return size <= most and shared * pairs > size**2 - len(tree) ** 2 - len(tokens) ** 2


def joined(trees: Sequence[Tree]) -> Tree:
    """Several trees as one sequence of tokens, in which none sees another."""
    forest = Tree()
    for tree in trees:
        start = len(forest)
        forest.tokens += tree.tokens
        forest.positions += tree.positions
        forest.ends += [start + end for end in tree.ends]
        forest.answers += [Answer(a.request, a.tokens, [start + p for p in a.places]) for a in tree.answers]
    return forest


class Batch:
    """Trees that are computed at a time, one a row; the rows are padded to the longest tree.

    tokens, positions: (b, s). ends: (b, s), of a padding token the place behind it, so that only it sees itself.
    """

    def __init__(self, trees: Sequence[Tree]):
        self.shape = (len(trees), max(map(len, trees)))
        self.tokens, self.positions = (torch.zeros(self.shape, dtype=torch.long) for _ in range(2))
        self.ends = torch.arange(1, self.shape[1] + 1).repeat(len(trees), 1)
        for row, tree in enumerate(trees):
            for name in ("tokens", "positions", "ends"):
                getattr(self, name)[row, : len(tree)] = torch.tensor(getattr(tree, name))
        self.answers = [
            Answer(a.request, a.tokens, [row * self.shape[1] + p for p in a.places])
            for row, tree in enumerate(trees)
            for a in tree.answers
        ]
        self.scored = sorted({place for answer in self.answers for place in answer.places})

    @property
    def depth(self) -> int:
        """Tokens of its longest sequence."""
        return int(self.positions.max()) + 1

    def mask(self, dtype: torch.dtype, device: torch.device, window: int | None = None) -> Tensor:
        """(b, 1, s, s), what is added to attention scores: 0 where a token sees another, else the least number.

        A token sees itself and the tokens above it in its tree.
        window: the positions that a token sees, its own among them; None for all.
        """
        places, ends = torch.arange(self.shape[1], device=device), self.ends.to(device)
        seen = (places <= places[:, None]) & (places[:, None] < ends[:, None, :])
        if window is not None:
            positions = self.positions.to(device)
            seen &= positions[:, None, :] > positions[:, :, None] - window
        zeros = torch.zeros(seen.shape, dtype=dtype, device=device)
        return zeros.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def batches_of(trees: Sequence[Tree], most: int, alike: Callable[[int], bool] = lambda depth: False) -> list[Batch]:
    """Batches of at most `most` tokens, padding included, or of one tree; trees of like lengths go together.

    alike: whether trees with so many tokens go only with trees of the same length.
    """
    batches: list[Batch] = []
    rows: list[Tree] = []
    for tree in sorted(trees, key=len, reverse=True):  # the largest first, so that memory runs out at once or never
        full = (len(rows) + 1) * len(rows[0]) > most if rows else False
        if rows and (full or (alike(len(rows[0])) and len(tree) != len(rows[0]))):
            batches.append(Batch(rows))
            rows = []
        rows.append(tree)
    return [*batches, Batch(rows)] if rows else batches


def scores(batch: Batch, logits: Callable[[Tensor], Tensor], chunk: int) -> Iterator[tuple[int, tuple[float, bool]]]:
    """(number of the request, (log-likelihood, whether greedy decoding gives the answer)) of each answer.

    logits: of n places of the flattened batch (n, v), at most `chunk` at a time. Log-probabilities are computed in
    float32.
    """
    row_of = {place: row for row, place in enumerate(batch.scored)}
    rows = torch.tensor([row_of[place] for answer in batch.answers for place in answer.places])
    tokens = torch.tensor([token for answer in batch.answers for token in answer.tokens])
    found, greedy = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.bool)
    for start, places in enumerate(torch.tensor(batch.scored).split(chunk)):
        logs = torch.log_softmax(logits(places), dim=-1, dtype=torch.float32)
        inside = (rows >= start * chunk) & (rows < (start + 1) * chunk)
        at, wanted = (part[inside].to(logs.device) for part in (rows - start * chunk, tokens))
        found[inside] = logs[at, wanted].cpu()
        greedy[inside] = (logs.argmax(-1)[at] == wanted).cpu()
    lengths = [len(answer.tokens) for answer in batch.answers]
    for answer, part, hits in zip(batch.answers, found.split(lengths), greedy.split(lengths), strict=True):
        yield answer.request, (float(part.sum()), bool(hits.all()))
