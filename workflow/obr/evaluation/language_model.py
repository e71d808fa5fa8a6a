"""lm-eval's wrapper of a transformers model, with prompts that begin with the tokens that are asked for."""

from __future__ import annotations

import copy
from typing import Any

from lm_eval.models.huggingface import HFLM

from obr.errors import ObrError
from obr.evaluation.likelihood import log_likelihoods


class PlainLM(HFLM):
    """HFLM that puts the tokens `before` in front of prompts, adds no other, and counts truncated requests.

    HFLM tokenises the question alone and the question with the answer, both with the tokenizer's special tokens.
    It takes the second from the first's length on for the answer. A token added after each text then drops the
    first token of the answer.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, max_length: int | None, before: list[int]):
        if tokenizer.pad_token is None:
            tokenizer = copy.deepcopy(tokenizer)  # lm-eval gives it one; the caller's tokenizer stays as it is
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max_length,
            softmax_dtype="float32",
        )  # fmt: skip
        self.before, self.truncated = before, 0

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [(request.args, *self._encode_pair(*request.args)) for request in requests]
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

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
        if self.prefix_token_id is None:
            raise ObrError(
                f"a question of the task is empty and {type(self.tokenizer).__name__} has neither a BOS nor an "
                "EOS token to begin with: leave out such rows."
            )
        return [self.prefix_token_id]

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None):
        return log_likelihoods(self.model, requests, self.max_length, self.batch_size)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
