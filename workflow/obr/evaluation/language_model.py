"""Models that lm-eval asks for log-likelihoods: one that keeps its questions, one that knows the answers already."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from lm_eval.api.model import LM
from lm_eval.models.utils import resolve_max_length

from obr.errors import ObrError
from obr.evaluation.likelihood import Likelihood
from obr.evaluation.prompt_trees import Request


class _Collected(Exception):
    """Ends an evaluation of lm-eval once its requests are known."""


class _LogLikelihoods(LM):
    """Refuses what is not asked by `loglikelihood`."""

    def loglikelihood_rolling(self, requests: list) -> list[float]:
        raise ObrError("tasks of output type loglikelihood_rolling are not scored: choose another task.")

    def generate_until(self, requests: list) -> list[str]:
        raise ObrError("tasks of output type generate_until are not scored: choose another task.")


class KnownAnswers(_LogLikelihoods):
    """Gives the log-likelihoods of a task's requests, computed before, in their order.

    asked: the (context, continuation) of each.
    """

    def __init__(self, likelihoods: list[Likelihood], asked: list[tuple[str, str]]):
        super().__init__()
        self.likelihoods, self.asked = likelihoods, asked

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[Likelihood]:
        """The likelihoods that were computed before. Raises ObrError for another number of requests."""
        if len(requests) != len(self.likelihoods):
            raise ObrError(f"a task asks {len(requests)} questions, but {len(self.likelihoods)} were scored.")
        if [request.args for request in requests] != self.asked:
            raise ObrError(
                "a task asks other questions each time, since its functions draw at random: choose another."
            )
        return self.likelihoods


class PlainLM(_LogLikelihoods):
    """Puts the tokens `before` in front of prompts, adds no other, and counts truncated requests.

    lm-eval's own model tokenises the question alone and the question with the answer, both with the tokenizer's
    special tokens. It takes the second from the first's length on for the answer. A token added after each text then
    drops the first token of the answer.

    Args:
        config: of the model, which names its longest prompt.
        max_length: in tokens, instead of the model's own.
    """

    def __init__(self, tokenizer: Any, config: Any, max_length: int | None = None, before: list[int] | None = None):
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_length or resolve_max_length(config, tokenizer)
        self.before, self.truncated, self.collected = before or [], 0, []

    def requests(self, evaluate: Callable[[LM], Any]) -> list[Request]:
        """The requests, in tokens, that an evaluation of lm-eval makes of this model; it ends there."""
        with contextlib.suppress(_Collected):
            evaluate(self)
        return self.collected

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[Likelihood]:
        """Collect the requests of a task and end its evaluation."""
        self.collected = [(request.args, *self._encode_pair(*request.args)) for request in requests]
        raise _Collected

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # Spaces at the end of the question belong to the answer, as in lm-eval.
        question = _encode(self.tokenizer, context.rstrip())
        both = _encode(self.tokenizer, context + continuation)
        after = both[len(question) :]
        if not question:
            begin = self.before or self._start()
            after = after[len(begin) :] if after[: len(begin)] == begin else after
            question = begin
        elif question[: len(self.before)] != self.before:
            question = self.before + question
        if not after:
            raise ObrError(f"answer {continuation[:40]!r} adds no token to its question: leave out such rows.")
        if len(after) > self.max_length:
            raise ObrError(
                f"answer {continuation[:40]!r} is {len(after)} tokens long and at most {self.max_length} can be "
                "scored: raise max_length."
            )
        # One more fits: the last token is predicted, never read.
        self.truncated += len(question) + len(after) > self.max_length + 1
        return question, after

    def _start(self) -> list[int]:
        """The token before an answer without a question, as in lm-eval: BOS, or EOS if there is no BOS."""
        begin = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        if begin == [None, None]:
            raise ObrError(
                f"a question of the task is empty and {type(self.tokenizer).__name__} has neither a BOS nor an "
                "EOS token to begin with: leave out such rows."
            )
        return [next(token for token in begin if token is not None)]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
