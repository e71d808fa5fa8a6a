"""Tokens a second and resident memory of models that write text, one token at a time: packed weights beside bfloat16.

Before, the products of every packed layer of a checkpoint's first block are compared with those of its codes, in
whole numbers. Each model runs in a process of its own, whose resident memory is its own, and `generate` writes from
it. Before and after, the same threads read memory as fast as they can: no token can be written in less time than its
weights are read in, which is the bound. With one thread, time is the processor's that the process had, so that other
work on the machine slows nothing but memory; with several it is the clock's. Models are SmolLM2-135M as the demo
leaves it, and blocks of Llama-2-7B's shape with random weights, more than the caches hold.

    python benchmarks/decoding.py FOLDER KIND TOKENS THREADS    # one model; prints what was measured as JSON
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from layers import MODEL
from models import LLAMA_2_7B, write_model
from obr.checkpoints import packed_linear
from obr.checkpoints.format import CheckpointBlocks, read_manifest
from obr.checkpoints.packed_linear import PackedBlocks, PackedLinear
from obr.checkpoints.packed_linear import load as load_checkpoint
from obr.checkpoints.packing import unpack
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.data.token_windows import evaluation_windows
from obr.data.tokenize import read_text, tokenize
from obr.errors import ObrError
from obr.evaluation.perplexity import perplexity
from obr.kernels.int4 import packed_weight
from obr.models.loading import load_tokenizer
from timing import clock_of, machine

DENSE, PACKED = "bfloat16", "packed"
PROMPT = 8
# Random weights are rounded and pruned by their size alone: what multiplies them takes as long.
STACK = {
    "INT4, dense": {"method": "rtn", "clip": "minmax"},
    "INT4, 50 %": {"method": "magnitude", "clip": "minmax"},
    "INT4, paired 4:8": {"method": "magnitude", "pattern": "paired 4:8", "clip": "minmax"},
}
DEMO = {"INT4, dense": "gptq", "INT4, 50 %": "obr_gptq"}
TEXT, SEQLEN, TOKENS = "sotu_since_2000", 1024, 4096  # on which the demo's models are scored


def measure(
    results: Path | None,
    scratch: Path,
    threads: tuple[int, ...],
    tokens: int,
    blocks: int,
    sizes: dict = LLAMA_2_7B,
    apart: bool = True,
) -> list[dict]:
    """One row for each model, kind of weights and number of threads; perplexity of those that are real.

    results: of the demo; None leaves its models out. apart: in processes of their own, without which resident memory
    is that of all.
    """
    rows, run = [], in_a_process if apart else write_tokens
    if results is not None:
        folders = {DENSE: results / "models" / MODEL}
        folders |= {name: results / "compressed" / MODEL / recipe for name, recipe in DEMO.items()}
        windows = _windows(results)
        scores = {name: _score(folder, name, windows) for name, folder in folders.items()}
        rows += _subject("SmolLM2-135M", folders, threads, tokens, run, scores)
    folder = scratch / "stack"
    try:
        folders = write_stack(folder, {**sizes, "vocab_size": 512, "num_hidden_layers": blocks})
        subject = f"{blocks} x {sizes['hidden_size']} x {sizes['intermediate_size']}"
        rows += _subject(subject, folders, threads, tokens, run)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def write_stack(folder: Path, sizes: dict) -> dict[str, Path]:
    """A random model and its compressed forms, by kind of weights."""
    folders = {DENSE: folder / "model"}
    write_model(folders[DENSE], sizes)
    for number, (name, recipe) in enumerate(STACK.items()):
        folders[name] = folder / str(number)
        compress_stage(folders[DENSE], Recipe.parse(recipe), folders[name])
    return folders


def _windows(results: Path) -> Tensor:
    """The tokens (b, s) that the demo's models are scored on."""
    tokenizer = load_tokenizer(results / "models" / MODEL)
    return evaluation_windows(tokenize(tokenizer, read_text(results / "texts" / f"{TEXT}.txt")), SEQLEN, TOKENS)


def _score(folder: Path, name: str, windows: Tensor) -> float:
    """Perplexity of a model in the very form that is timed."""
    return perplexity(load(folder, DENSE if name == DENSE else PACKED), windows)


def _subject(
    subject: str,
    folders: dict[str, Path],
    threads: tuple[int, ...],
    tokens: int,
    run: Callable,
    scores: dict[str, float] | None = None,
) -> list[dict]:
    for name, folder in folders.items():
        if name != DENSE:
            check(folder)
    rows = []
    for count in threads:
        for name, folder in folders.items():
            found = run(folder, DENSE if name == DENSE else PACKED, tokens, count)
            score = (scores or {}).get(name)
            rows.append(
                {"subject": subject, "weights": name, "perplexity": score, **found, **machine(), "threads": count}
            )
    return rows


@torch.no_grad()
def check(folder: Path) -> None:
    """Raise ObrError unless the packed layers of the first block multiply the checkpoint's codes exactly."""
    packed, plain = PackedBlocks(folder, eight_bits(folder), device="cpu"), CheckpointBlocks(folder, device="cpu")
    block, twin = packed.load(0), plain.load(0)
    for name in packed.layout.linears:
        layer, codes = block.get_submodule(name), unpack(twin.get_submodule(name).packed).codes
        x = torch.randn(3, codes.shape[1], generator=torch.Generator().manual_seed(0))
        rounded = packed_weight.quantize(x, layer.activations, layer.range)
        exact = (rounded.q[:, : codes.shape[1]].double() - rounded.zero[:, None]) @ codes.double().T
        if not torch.equal(layer.kernel.weight.integers(rounded).double(), exact):
            raise ObrError(f"{name} of {folder} is multiplied wrongly; nothing is timed.")


def in_a_process(folder: Path, kind: str, tokens: int, threads: int) -> dict[str, float]:
    """What `write_tokens` finds in a process of its own. Raises ObrError if that fails."""
    command = [sys.executable, __file__, folder, kind, tokens, threads]
    done = subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8")
    if done.returncode:
        raise ObrError(f"Writing text with {folder} failed under the benchmark: {done.stderr.strip()[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def write_tokens(folder: Path, kind: str, tokens: int, threads: int) -> dict[str, float]:
    """What one model takes: seconds a token, bytes of its weights, resident memory, and the speed of memory.

    resident_mb: of the process that has written; before_mb: of the same before the model was loaded.
    """
    torch.set_num_threads(threads)
    clock = clock_of(threads)
    before, reads = resident(), [read_speed(threads, clock)]
    model = load(folder, kind)
    seconds = written(model, tokens, clock)
    packed_linear.return_freed_memory()
    after = resident()  # not sooner: weights that are mapped come into memory as they are used
    fastest = median([*reads, read_speed(threads, clock)])
    bytes_ = weight_bytes(model)
    taken = median(seconds)
    return {
        "tokens_s": 1 / taken, "time_s": taken, "time_min_s": min(seconds), "time_max_s": max(seconds),
        "weights_mb": bytes_ / 1e6, "linear_mb": linear_bytes(model) / 1e6, "resident_mb": after, "before_mb": before,
        "read_gb_s": fastest / 1e9, "of_bound": bytes_ / fastest / taken,
    }  # fmt: skip


def load(folder: Path, kind: str):
    """A raw model in bfloat16, or a checkpoint's packed weights by 8-bit activations, the rest in bfloat16."""
    if kind == DENSE:
        from obr import load_model

        return load_model(folder, torch.bfloat16, "cpu")
    return load_checkpoint(folder, eight_bits(folder), torch.bfloat16, "cpu", packed=True)


def eight_bits(folder: Path) -> Recipe:
    """A checkpoint's recipe with activations of 8 bits."""
    return Recipe.parse(read_manifest(folder)["recipe"] | {"activations": {"bits": 8}})


@torch.inference_mode()
def written(model: nn.Module, tokens: int, clock: Callable[[], float]) -> list[float]:
    """Seconds of each token but the first two."""
    ends: list[float] = []
    hook = model.register_forward_hook(lambda *_: ends.append(clock()))
    prompt = torch.arange(1, PROMPT + 1)[None]
    options = {"max_new_tokens": tokens + 3, "min_new_tokens": tokens + 3, "do_sample": False, "pad_token_id": 0}
    model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    hook.remove()
    return [later - sooner for sooner, later in pairwise(ends[2:])]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that a token passes: all linear layers, the head included."""
    return linear_bytes(model) + model.get_output_embeddings().weight.nbytes


def linear_bytes(model: nn.Module) -> int:
    """Bytes of the blocks' linear layers, masks and scales included."""
    total = 0
    for module in model.get_decoder().layers.modules():
        if isinstance(module, PackedLinear):
            total += module.kernel.bytes
        elif isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.ndim == 2:
            total += module.weight.nbytes
    return total


def read_speed(threads: int, clock: Callable[[], float], repeats: int = 5) -> float:
    """Bytes a second, median of reads of 256 MB."""
    memory = torch.ones(1 << 28, dtype=torch.uint8)
    times = []
    for _ in range(repeats):
        start = clock()
        packed_weight.read_memory(memory, threads)
        times.append(clock() - start)
    return memory.nbytes / median(times)


def resident() -> float:
    """Resident memory of this process, in 10^6 bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    place, kind, tokens, threads = sys.argv[1:]
    print(json.dumps(write_tokens(Path(place), kind, int(tokens), int(threads))))
