"""Zero-shot accuracy of a causal language model on one task folder, as lm-eval measures it."""

from __future__ import annotations

import importlib.metadata
import math
import time
from pathlib import Path
from typing import Any

from obr.data.tokenize import require_bos, special_tokens, spell_tokens
from obr.errors import ObrError
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
    """Score `model` on the task without examples in the prompt; nothing is written, the model stays as it was.

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
    from lm_eval.evaluator import evaluate

    from obr.evaluation.language_model import PlainLM
    from obr.models.check.memory import check_finished
    from obr.models.read_only import check_attention, unchanged

    name = read_task(task_dir)["task"]
    _check_limit(limit, name)
    check_finished(model)
    check_attention(model)
    _check_head(model)
    before, started = _before(model, tokenizer, bos), time.perf_counter()
    with quiet(), unchanged(model):
        lm = PlainLM(model, tokenizer, batch_size, max_length, before)
        task = load_task(task_dir)
        # Not simple_evaluate, which would also seed the process's random generators and spend a second
        # on describing the machine; the scoring is this same call. bootstrap_iters=1 switches standard errors on;
        # those of a mean are computed, not drawn.
        found = evaluate(lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=1)
    return {
        "task": name,
        **_scores(found["results"][name], found["samples"][name], task),
        "n": found["n-samples"][name]["effective"],
        "limit": limit, "num_fewshot": 0, "bos": bos,
        "prompts": f"{spell_tokens(tokenizer, before)} before each prompt" if before else "no special tokens",
        **_bos_note(model, tokenizer, before),
        "batch_size": batch_size, "max_length": lm.max_length, "truncated": lm.truncated,
        "task_version": found["versions"][name],
        **{package: importlib.metadata.version(package) for package in ("lm_eval", "transformers", "torch")},
        "device": str(model.device), "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": round(time.perf_counter() - started, 3),
    }  # fmt: skip


def _check_limit(limit: int | None, task: str) -> None:
    if limit is not None and limit < 1:
        raise ObrError(f"limit {limit} for task {task} is not a number of rows: use 1 or more, or null for all.")


def _before(model: Any, tokenizer: Any, bos: bool | str | None) -> list[int]:
    """The token ids that `bos` puts before each prompt."""
    if bos not in (None, True, False, "tokenizer"):
        raise ObrError(f"bos {bos!r} is unknown: use null, true, false or tokenizer.")
    if bos == "tokenizer":
        return special_tokens(tokenizer)[0]
    wanted = needs_bos(model.config.model_type) if bos is None else bos
    return [require_bos(tokenizer)] if wanted else []


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
