"""Zero-shot accuracy of a causal language model on one task folder, as lm-eval measures it."""

from __future__ import annotations

import copy
import importlib.metadata
import math
import time
from pathlib import Path
from typing import Any

from obr.errors import ObrError
from obr.likelihood import log_likelihoods
from obr.tasks import load_task, quiet, read_task


def zero_shot(
    model: Any,
    tokenizer: Any,
    task_dir: Path,
    *,
    limit: int | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
) -> dict:
    """Score `model` on the task without examples in the prompt; nothing is written and no network is used.

    `limit` takes only the first rows. `max_length` (tokens) defaults to the model's own; longer prompts
    lose their beginning and are counted under "truncated". Log-likelihoods are summed in float32 whatever
    the model's dtype, or long answers would tie. Accuracies and standard errors are fractions; "value" is
    acc_norm where the task has it, else acc, as in the paper.

    Raises ObrError when the task folder is damaged, an answer does not fit `max_length`, the head is tied
    in the configuration only, or a log-likelihood is not finite.
    """
    from lm_eval.evaluator import evaluate

    name = read_task(task_dir)["task"]
    if limit is not None and limit < 1:
        raise ObrError(f"limit {limit} for task {name} is not a number of rows: use 1 or more, or null for all.")
    _check_head(model)
    started = time.perf_counter()
    was_training = model.training
    with quiet():
        lm = _language_model(model, tokenizer, batch_size, max_length)
        try:
            # Not simple_evaluate, which would also seed the process's random generators and spend a second
            # on describing the machine; the scoring is this same call.
            found = evaluate(
                lm,
                {"tasks": {name: load_task(task_dir)}},
                limit=limit,
                bootstrap_iters=1,  # switches standard errors on; those of a mean are computed, not drawn
            )
        finally:
            model.train(was_training)
    seconds = time.perf_counter() - started

    _check_finite(found["samples"][name], name)
    scores = _scores(found["results"][name])
    metric = "acc" if scores["acc_norm"] is None else "acc_norm"
    return {
        "task": name,
        **scores,
        "metric": metric,
        "value": scores[metric],
        "stderr": scores[f"{metric}_stderr"],
        "n": found["n-samples"][name]["effective"],
        "limit": limit,
        "num_fewshot": 0,
        "batch_size": batch_size,
        "max_length": lm.max_length,
        "truncated": lm.truncated,
        "task_version": found["versions"][name],
        **{package: importlib.metadata.version(package) for package in ("lm_eval", "transformers", "torch")},
        "device": str(model.device),
        "seconds": round(seconds, 3),
    }


def _language_model(model: Any, tokenizer: Any, batch_size: int, max_length: int | None) -> Any:
    from lm_eval.models.huggingface import HFLM

    class CountingLM(HFLM):
        """HFLM that counts the requests it will have to cut, which it otherwise only logs."""

        truncated = 0

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            before, after = super()._encode_pair(context, continuation)
            if not 0 < len(after) <= self.max_length:
                raise ObrError(
                    f"answer {continuation[:40]!r} is {len(after)} tokens long, between 1 and "
                    f"{self.max_length} can be scored: raise max_length."
                )
            # One more fits: the last token is predicted, never read.
            self.truncated += len(before) + len(after) > self.max_length + 1
            return before, after

        def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None):
            return log_likelihoods(self.model, requests, self.max_length, self.batch_size)

    if tokenizer.pad_token is None:
        # lm-eval gives it one; the caller's tokenizer stays as it is.
        tokenizer = copy.deepcopy(tokenizer)
    return CountingLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        max_length=max_length,
        softmax_dtype="float32",
    )


def _check_head(model: Any) -> None:
    # lm-eval calls tie_weights(), which would overwrite a head that has since been given weights of its own.
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(model.config, "tie_word_embeddings", False) and head.weight is not embedding.weight:
        raise ObrError(
            "the model's configuration ties head and embedding but their weights differ: "
            "set config.tie_word_embeddings to false."
        )


def _check_finite(samples: list[dict], task: str) -> None:
    broken = sum(
        not all(math.isfinite(likelihood) for likelihood, _ in sample["filtered_resps"]) for sample in samples
    )
    if broken:
        raise ObrError(
            f"{broken} of {len(samples)} questions of task {task} got a log-likelihood that is not a finite "
            "number: the model is broken, look at its layer report or evaluate it in float32."
        )


def _scores(results: dict) -> dict:
    # lm-eval writes "N/A" for the standard error of a single row.
    def number(key: str) -> float | None:
        value = results.get(f"{key},none")
        return None if value in (None, "N/A") else float(value)

    return {key: number(key) for metric in ("acc", "acc_norm") for key in (metric, f"{metric}_stderr")}
