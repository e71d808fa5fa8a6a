"""Zero-shot accuracy of a causal language model on one task folder, as lm-eval measures it."""

from __future__ import annotations

import importlib.metadata
import math
import time
from pathlib import Path
from typing import Any

from obr.data.tokenize import require_bos, special_tokens, tokens_as_text
from obr.errors import ObrError
from obr.evaluation.likelihood import Likelihood, log_likelihoods
from obr.evaluation.lm_eval_tasks import METRICS
from obr.evaluation.tasks import FEWSHOT_SEED, load_task, quiet, read_task
from obr.models import dtypes
from obr.models.architectures import needs_bos
from obr.models.blocks import StreamedBlocks
from obr.models.check.memory import check_finished
from obr.models.read_only import check_attention, unchanged
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
    """Score `model` on the task; nothing is written, the model stays as it was.

    The keyword parameters are settings of the task. `limit` takes only the first rows. `max_length` (tokens) is the
    model's own by default; longer prompts lose their beginning, BOS included, and count under "truncated". Log-
    likelihoods are summed in float32 whatever the model's dtype, or long answers would tie. Accuracies and standard
    errors are fractions; "value" is acc_norm where the task has it, else acc, as in the paper. A task of output
    type loglikelihood has one answer a question, right if greedy decoding gives it. Its "perplexity" is that of
    whole answers, as lm-eval reports it: exp of the mean negative log-likelihood of an answer.

    bos: which special tokens are put before a prompt.
        None: as in the released evaluation, which uses lm-eval 0.4.2 and 0.4.4: none, but a beginning-of-sequence
            (BOS) token for Gemma.
        True: a BOS token. False: none.
        "tokenizer": those that the tokenizer adds before a text, which is lm-eval's default since 0.4.9.2.
    No special token is put after a prompt or an answer. A BOS that the prompt begins with is not doubled.

    Raises ObrError when the task folder is damaged, an answer does not fit `max_length`, the head is tied
    in the configuration only, the attention leaves out quantisers, a log-likelihood is not finite, or `bos` asks for
    a token that the tokenizer lacks.
    """
    check_finished(model)
    check_attention(model)
    _check_head(model)
    started = time.perf_counter()
    run = TaskRun(task_dir, model.config, tokenizer, limit, bos, max_length)
    _check_number("batch_size", batch_size, run.name)
    about = {"batch_size": batch_size, "device": str(model.device), "dtype": dtypes.name_of(model.dtype)}
    with unchanged(model):
        found = log_likelihoods(model, run.requests, run.max_length, batch_size)
    return run.result(found) | about | {"seconds": round(time.perf_counter() - started, 3)}


def streamed_about(blocks: StreamedBlocks, batch_tokens: int) -> dict:
    """How log-likelihoods are computed, for the artefact."""
    return {"batch_tokens": batch_tokens, "device": str(blocks.target), "dtype": dtypes.name_of(blocks.dtype)}


class TaskRun:
    """The evaluation of a model on a task: requests to begin with, and what the artefact holds in the end.

    Args:
        config, tokenizer: of the model. The others are parameters of `zero_shot`.

    Attributes:
        requests: (request, tokens of the context, tokens of the answer) of each answer.
        max_length: in tokens, of a context and answer.

    Raises:
        ObrError: as `zero_shot`.
    """

    def __init__(
        self, task_dir: Path, config: Any, tokenizer: Any, limit: int | None = None,
        bos: bool | str | None = None, max_length: int | None = None,
    ):  # fmt: skip
        from obr.evaluation.language_model import PlainLM

        record = read_task(task_dir)
        self.name, self.limit, self.bos = record["task"], limit, bos
        self.shots = record.get("num_fewshot", 0)
        _check_number("limit", limit, self.name)
        _check_number("max_length", max_length, self.name)
        before = _before(config, tokenizer, bos)
        with quiet():
            self.task = load_task(task_dir)
            lm = PlainLM(tokenizer, config, max_length, before)
            self.requests = lm.requests(self._evaluate)
        self.max_length = lm.max_length
        self.about = {
            "prompts": f"{tokens_as_text(tokenizer, before)} before each prompt" if before else "no special tokens",
            **_bos_note(config, tokenizer, before),
            "max_length": lm.max_length, "truncated": lm.truncated,
        }  # fmt: skip

    def _evaluate(self, lm: Any) -> dict:
        from lm_eval.evaluator import evaluate

        self.task.set_fewshot_seed(FEWSHOT_SEED)  # the same examples whenever it is asked
        # Not simple_evaluate, which would also seed the process's random generators and spend a second
        # on describing the machine; the scoring is this same call. bootstrap_iters=1 switches standard errors on;
        # those of a mean are computed, not drawn.
        return evaluate(lm, {"tasks": {self.name: self.task}}, limit=self.limit, bootstrap_iters=1)

    def result(self, likelihoods: list[Likelihood]) -> dict:
        """What the artefact holds. likelihoods: of the requests, in their order."""
        from obr.evaluation.language_model import KnownAnswers

        with quiet():
            found = self._evaluate(KnownAnswers(likelihoods, [asked for asked, _, _ in self.requests]))
        return {
            "task": self.name,
            **_scores(found["results"][self.name], found["samples"][self.name], self.task),
            "n": found["n-samples"][self.name]["effective"],
            "limit": self.limit, "num_fewshot": self.shots, "bos": self.bos,
            **self.about,
            "task_version": found["versions"][self.name],
            **{package: importlib.metadata.version(package) for package in ("lm_eval", "transformers", "torch")},
        }  # fmt: skip


def _check_number(name: str, value: int | None, task: str) -> None:
    if value is not None and (type(value) is not int or value < 1):
        raise ObrError(f"{name} {value!r} for task {task} is no whole number from 1 on: correct it, or leave it out.")


def _before(config: Any, tokenizer: Any, bos: bool | str | None) -> list[int]:
    """The token ids that `bos` puts before each prompt."""
    if bos not in (None, True, False, "tokenizer"):
        raise ObrError(f"bos {bos!r} is unknown: use null, true, false or tokenizer.")
    if bos == "tokenizer":
        return special_tokens(tokenizer)[0]
    wanted = needs_bos(config.model_type) if bos is None else bos
    return [require_bos(tokenizer)] if wanted else []


def _bos_note(config: Any, tokenizer: Any, before: list[int]) -> dict:
    """{"note": sentence} for a model that needs a BOS token and gets none; else {}."""
    family = config.model_type
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
    # transformers ties them when such a model is saved and loaded, so that it would not be the one that was scored.
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
