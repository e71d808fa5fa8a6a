"""Zero-shot accuracy of a causal language model on one task folder, as lm-eval measures it."""

from __future__ import annotations

import copy
import importlib.metadata
import math
import time
from pathlib import Path
from typing import Any

from obr.data.tokenize import require_bos, special_tokens, spell_tokens
from obr.errors import ObrError
from obr.evaluation.likelihood import log_likelihoods
from obr.evaluation.lm_eval_tasks import METRICS
from obr.evaluation.tasks import load_task, quiet, read_task
from obr.models.architectures import needs_bos
from obr.runtime.files import finite


def zero_shot(
    model: Any,
    tokenizer: Any,
    task_dir: Path,
    *,
    limit: int | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
    bos: bool | str | None = None,
) -> dict:
    """Score `model` on the task without examples in the prompt; nothing is written and no network is used. The model
    is left as it was.

    `limit` takes only the first rows. `max_length` (tokens) defaults to the model's own; longer prompts
    lose their beginning, BOS included, and are counted under "truncated". Log-likelihoods are summed in float32
    whatever the model's dtype, or long answers would tie. Accuracies and standard errors are fractions; "value" is
    acc_norm where the task has it, else acc, as in the paper. A task of output type loglikelihood has one answer a
    question, right if greedy decoding gives it. Its "perplexity" is that of whole answers, as lm-eval reports it:
    exp of the mean negative log-likelihood of an answer.

    bos: which special tokens are put before a prompt.
        None: as in the released evaluation, which uses lm-eval 0.4.2 and 0.4.4: none, but a beginning-of-sequence
            (BOS) token for Gemma.
        True: a BOS token. False: none.
        "tokenizer": those that the tokenizer adds before a text, which is lm-eval's default since 0.4.9.2.
    No special token is put after a prompt or an answer. A BOS that the prompt begins with is not doubled.

    Raises ObrError when the task folder is damaged, an answer does not fit `max_length`, the head is tied
    in the configuration only, a log-likelihood is not finite, or `bos` asks for a token that the tokenizer lacks.
    """
    from lm_eval.evaluator import evaluate

    from obr.models.check.memory import check_finished
    from obr.models.read_only import unchanged

    name = read_task(task_dir)["task"]
    if limit is not None and limit < 1:
        raise ObrError(f"limit {limit} for task {name} is not a number of rows: use 1 or more, or null for all.")
    check_finished(model)
    _check_head(model)
    before = _before(model, tokenizer, bos)
    started = time.perf_counter()
    with quiet(), unchanged(model):
        lm = _language_model(model, tokenizer, batch_size, max_length, before)
        task = load_task(task_dir)
        # Not simple_evaluate, which would also seed the process's random generators and spend a second
        # on describing the machine; the scoring is this same call.
        found = evaluate(
            lm,
            {"tasks": {name: task}},
            limit=limit,
            bootstrap_iters=1,  # switches standard errors on; those of a mean are computed, not drawn
        )
    seconds = time.perf_counter() - started

    return {
        "task": name,
        **_scores(found["results"][name], found["samples"][name], task),
        "n": found["n-samples"][name]["effective"],
        "limit": limit,
        "num_fewshot": 0,
        "bos": bos,
        "prompts": f"{spell_tokens(tokenizer, before)} before each prompt" if before else "no special tokens",
        **_bos_note(model, tokenizer, before),
        "batch_size": batch_size,
        "max_length": lm.max_length,
        "truncated": lm.truncated,
        "task_version": found["versions"][name],
        **{package: importlib.metadata.version(package) for package in ("lm_eval", "transformers", "torch")},
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": round(seconds, 3),
    }


def _before(model: Any, tokenizer: Any, bos: bool | str | None) -> list[int]:
    """The token ids that `bos` puts before each prompt."""
    if bos not in (None, True, False, "tokenizer"):
        raise ObrError(f"bos {bos!r} is unknown: use null, true, false or tokenizer.")
    if bos == "tokenizer":
        return special_tokens(tokenizer)[0]
    wanted = needs_bos(model.config.model_type) if bos is None else bos
    return [require_bos(tokenizer)] if wanted else []


def _language_model(model: Any, tokenizer: Any, batch_size: int, max_length: int | None, before: list[int]) -> Any:
    from lm_eval.models.huggingface import HFLM

    class PlainLM(HFLM):
        """HFLM that puts `before` in front of prompts, adds no other special token, and counts truncated requests.

        HFLM tokenises the question alone and the question with the answer, both with the tokenizer's special tokens.
        It takes the second from the first's length on for the answer. A token added after each text then drops the
        first token of the answer.
        """

        truncated = 0

        def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            pairs = [(request.args, *self._encode_pair(*request.args)) for request in requests]
            return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            # Spaces at the end of the question belong to the answer, as in lm-eval.
            question = _encode(self.tokenizer, context.rstrip())
            both = _encode(self.tokenizer, context + continuation)
            after = both[len(question) :]
            if not question:
                begin = before or self._start()
                after = after[len(begin) :] if after[: len(begin)] == begin else after
                question = begin
            elif question[: len(before)] != before:
                question = before + question
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

    if tokenizer.pad_token is None:
        # lm-eval gives it one; the caller's tokenizer stays as it is.
        tokenizer = copy.deepcopy(tokenizer)
    return PlainLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        max_length=max_length,
        softmax_dtype="float32",
    )


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _bos_note(model: Any, tokenizer: Any, before: list[int]) -> dict:
    """{"note": sentence} for a model that needs a BOS token and gets none; else {}."""
    family = model.config.model_type
    if not needs_bos(family) or (before and before[0] == tokenizer.bos_token_id):
        return {}
    return {
        "note": f"{family} models need a BOS token in front and the prompts have none, so the values are not "
        "meaningful; leave bos out"
    }


def _perplexity(samples: list[dict]) -> dict:
    likelihoods = [likelihood for sample in samples for likelihood, _ in sample["filtered_resps"]]
    try:
        value = math.exp(-sum(likelihoods) / len(likelihoods))
    except OverflowError:
        value = math.inf
    return finite("perplexity", value, "perplexity_status")


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


def _scores(results: dict, samples: list[dict], task: Any) -> dict:
    """Accuracies with their standard errors, which of them counts, and the perplexity of a task that has one."""
    _check_finite(samples, task.config.task)

    # lm-eval writes "N/A" for the standard error of a single row.
    def number(key: str) -> float | None:
        value = results.get(f"{key},none")
        return None if value in (None, "N/A") else float(value)

    scores = {key: number(key) for metric in METRICS for key in (metric, f"{metric}_stderr")}
    metric = "acc" if scores["acc_norm"] is None else "acc_norm"
    scores |= {"metric": metric, "value": scores[metric], "stderr": scores[f"{metric}_stderr"]}
    scores["output_type"] = task.OUTPUT_TYPE
    return scores | (_perplexity(samples) if task.OUTPUT_TYPE == "loglikelihood" else {})
