"""Zero-shot evaluation: streamed and in memory, against lm-eval's own model at several batch sizes.

All score the same requests in one process, in turns, in float32. Streamed evaluation reads its blocks from disk, and
the time of that counts; the others get a model in memory. Unequal results are refused.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM

from obr.errors import ObrError
from obr.evaluation.likelihood import BATCH_TOKENS, PAIRS, log_likelihoods, streamed_log_likelihoods
from obr.evaluation.prompt_trees import Request, trees_of
from obr.evaluation.tasks import download_task
from obr.evaluation.zero_shot import TaskRun
from obr.models.blocks import StreamedBlocks
from obr.models.loading import load_model, load_tokenizer
from timing import alternately, clock_of, machine, summary

REAL = {"piqa": "piqa_validation", "arc_easy": "arc_easy_test", "winogrande": "winogrande_xl_validation"}
NATS = 1e-3  # between two log-likelihoods of an answer


def measure(
    model: Path, tasks: list[Path], limit: int, batches: tuple[int, ...], repeats: int, device: str = "cpu"
) -> list[dict]:
    """Rows (evaluation, seconds, tokens that it reads, ratio to the streamed one), in float32 on the device.

    tasks: folders of tasks; none for made-up questions. limit: rows of each. batches: of lm-eval's model.
    """
    requests = [r for task in tasks for r in _requests(model, task, limit)] if tasks else _made(limit)
    whole, tokenizer = load_model(model, device=device), load_tokenizer(model)
    length = whole.config.max_position_embeddings
    blocks = partial(StreamedBlocks, model, dtype=torch.float32, device=device)
    functions: dict[str, Callable] = {
        "streamed": lambda: streamed_log_likelihoods(blocks(), requests, length),
        "in memory": lambda: log_likelihoods(whole, requests, length, 8),
    }
    for batch in batches:
        judge = HFLM(
            pretrained=whole, tokenizer=tokenizer, batch_size=batch, max_length=length, softmax_dtype="float32"
        )
        functions[f"lm-eval, batch {batch}"] = partial(judge._loglikelihood_tokens, requests, disable_tqdm=True)
    with torch.no_grad():
        seconds, results = alternately(functions, repeats, clock_of(machine()["threads"]))
    _check_equal(results)
    flat = sum(len(context) + len(answer) - 1 for _, context, answer in requests)
    trees = sum(map(len, trees_of(requests, length, BATCH_TOKENS, PAIRS * whole.config.hidden_size)))
    base = summary("time", seconds["streamed"])["time_s"]
    rows = []
    for name, taken in seconds.items():
        times = summary("time", taken)
        rows.append(
            {"model": model.name, "evaluation": name, **times, "ratio": times["time_s"] / base,
             "tokens": flat if name.startswith("lm-eval") else trees, "requests": len(requests), **machine()}
        )  # fmt: skip
    return rows


def real_tasks(scratch: Path) -> list[Path]:
    """Folders of the tasks whose rows lie in $OBR_DATA/data/tasks; none where it is not set."""
    if "OBR_DATA" not in os.environ:
        return []
    for task, file in REAL.items():
        source = {"source": "path", "task": task, "file": f"$OBR_DATA/data/tasks/{file}.jsonl"}
        download_task(source, scratch / "tasks" / task)
    return [scratch / "tasks" / task for task in REAL]


def _requests(model: Path, folder: Path, limit: int) -> list[Request]:
    """The first rows of a task, in tokens."""
    config = StreamedBlocks(model, device="cpu").config
    return TaskRun(folder, config, load_tokenizer(model), limit).requests


def _made(count: int) -> list[Request]:
    """Questions of random tokens with four answers each."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(1, 512, (length,), generator=generator).tolist()

    return [("", context, draw(8)) for context in (draw(24) for _ in range(count)) for _ in range(4)]


def _check_equal(results: dict[str, list[tuple[float, bool]]]) -> None:
    reference = results["streamed"]
    for name, found in results.items():
        apart = max(abs(a - b) for (a, _), (b, _) in zip(found, reference, strict=True))
        if apart > NATS:
            raise ObrError(f"{name} and streamed evaluation are {apart:.2g} nats apart, and must be equal.")
