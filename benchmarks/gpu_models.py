"""Parts of check_gpu.py that compress, evaluate and decode models; gpu_parts.py starts them."""

import csv
import gc
import json
import os
import resource
import shutil
import sys
import time
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml

import obr
from gpu_parts import ROOT, CutShort, Failed, LeftOut, Settings, tiny_model
from models import LLAMA_2_7B, SMOLLM2_135M, TINY, Inputs, write_inputs
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.planning.memory import memory
from obr.planning.tensor_sizes import Sizes
from obr.runtime.files import read_json

ROOM = 1.3  # times the plan that a peak on the device may be
NO_TRITON = "Triton is not installed, which packed weights on a GPU need"
APART = 0.05  # share by which a perplexity on the device may differ from the CPU's, as those of two processors do
FORMS = {  # of decoding: recipe of the checkpoint -> activations with which its weights are multiplied, packed
    "dense INT4": {"method": "rtn"},
    "50 % INT4": {"method": "magnitude"},
    "paired 4:8 INT4": {"method": "magnitude", "pattern": "paired 4:8"},
}


def large(s: Settings) -> str:
    """Two blocks of Llama-2-7B's shape: seconds of compression, its peak against the plan, and decoding."""
    sizes = {**(TINY if s.small else LLAMA_2_7B), "num_hidden_layers": 2}
    windows, seqlen = (2, 32) if s.small else (8, 2048)
    inputs = write_inputs(s.work, sizes, windows, seqlen)
    row = _compressed(s, inputs, {"method": "obr_gptq", "pattern": None}, windows, seqlen)
    speeds = {}
    for form, entry in FORMS.items():
        out = s.work / form.replace(" ", "_").replace("%", "").replace(":", "_")
        _compress(s, inputs, {**entry, "rotation": "none"}, out)
        speeds[form] = _decoded(s, out, form)
    best = max(speeds, key=lambda form: speeds[form][1] or 0)
    plain, packed = speeds[best]
    said = f"2 blocks in {row['seconds']:.0f} s, peak {row['peak_gb']:.3g} GB, planned {row['planned_gb']:.3g}; "
    said += f"16 bits {plain:.0f} tokens/s, "
    said += f"packed not decoded: {NO_TRITON}." if packed is None else f"{best} packed {packed:.0f}."
    if s.is_cuda and not s.small and row["ratio"] > ROOM:
        raise Failed(said)
    return said


def memory_of_stages(s: Settings) -> str:
    """Compression by each kind of method: peak memory on the device against the plan's."""
    sizes = {**(TINY if s.small else SMOLLM2_135M), "num_hidden_layers": 2 if s.small else 4}
    windows, seqlen = (2, 32) if s.small else (16, 512)
    inputs = write_inputs(s.work, sizes, windows, seqlen)
    methods = [{"method": name} for name in ("gptq", "sparsegpt_gptq", "obr_rtn", "obr_gptq")]
    methods.append({"method": "joint", "sweeps": 2})
    rows = [_compressed(s, inputs, entry, windows, seqlen) for entry in methods]
    worst = max(rows, key=lambda row: row["ratio"])
    text = f"At most {worst['ratio']:.2f} of the plan, by {worst['recipe']}."
    if s.small or not s.is_cuda:
        reason = "At small sizes constants exceed the plan" if s.is_cuda else "On a CPU the plan is of the host"
        return f"{len(rows)} methods ran. {reason}: nothing is held against it."
    if worst["ratio"] > ROOM:
        raise Failed(text)
    return text


def _compressed(s: Settings, inputs: Inputs, entry: dict, windows: int, seqlen: int) -> dict[str, Any]:
    """One row: seconds and peak of a compression, rotated and sequential, and what the plan says of it."""
    recipe = Recipe.parse({**entry, "calibration": "random", "rotation": "quarot", "hessian": "sequential"})
    before = _allocated(s)
    if s.is_cuda:
        torch.cuda.reset_peak_memory_stats(s.device)
    start = time.perf_counter()
    _compress(s, inputs, recipe.to_dict(), s.work / "compressed")
    seconds = time.perf_counter() - start
    sizes = Sizes.of(read_json(inputs.model / "config.json"), "the model")
    planned = memory("compress", sizes, windows * seqlen, seqlen, s.is_cuda, recipe)[1 if s.is_cuda else 0]
    peak = torch.cuda.max_memory_allocated(s.device) / 1e9 - before if s.is_cuda else _resident()
    row = {"recipe": entry["method"], "seconds": seconds, "peak_gb": peak, "planned_gb": planned}
    row["ratio"] = peak / planned
    if s.is_cuda:
        row["reserved_gb"] = torch.cuda.max_memory_reserved(s.device) / 1e9
    s.keep(row)
    return row


def _allocated(s: Settings) -> float:
    """GB on the device that are in use, models that nothing refers to left out; 0 without a GPU."""
    gc.collect()  # models hold themselves by their hooks
    return torch.cuda.memory_allocated(s.device) / 1e9 if s.is_cuda else 0.0


def _compress(s: Settings, inputs: Inputs, entry: dict, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    recipe = Recipe.parse({"calibration": "random", **entry})
    rotation = inputs.rotation if recipe.rotation != "none" else None
    tokens = inputs.tokens if recipe.needs_hessian else None
    compress_stage(inputs.model, recipe, out, rotation=rotation, tokens=tokens, device=s.device)


def _resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _decoded(s: Settings, folder: Path, form: str) -> tuple[float, float | None]:
    """(tokens a second at 16 bits, packed), and one row; packed logits must be those of the unpacked model.

    Without Triton a GPU decodes no packed weights: None.
    """
    activations = None if s.is_cuda else {"method": "rtn", "activations": {"bits": 8}}
    prompt = torch.arange(1, 9, device=s.device)[None]
    logits, speeds, row = [], [], {"recipe": "decoding", "form": form}
    can_pack = not s.is_cuda or find_spec("triton") is not None
    for packed in (False, True) if can_pack else (False,):
        before = _allocated(s)
        model = obr.load(folder, activations, _dtype(), s.device, packed=packed)
        prefix = "packed_" if packed else ""
        if s.is_cuda:
            row[f"{prefix}weights_gb"] = _allocated(s) - before
        with torch.no_grad():
            logits.append(model(prompt).logits.float())
            speeds.append(_tokens_a_second(s, model, prompt))
        row[f"{prefix}tokens_s"] = speeds[-1]
        model = None
    if not can_pack:
        s.keep({**row, "remark": NO_TRITON})
        return speeds[0], None
    apart = float((logits[1] - logits[0]).norm() / logits[0].norm())
    s.keep({**row, "apart": apart})
    if not apart < 0.05:
        raise Failed(f"{form}: packed and unpacked logits are {apart:.3g} of their norm apart.")
    return speeds[0], speeds[1]


def _dtype() -> torch.dtype:
    """Of decoding: Triton's interpreter multiplies matrices of bfloat16 as if their bits were whole numbers."""
    return torch.float16 if os.environ.get("TRITON_INTERPRET") == "1" else torch.bfloat16


def _tokens_a_second(s: Settings, model, prompt: torch.Tensor) -> float:
    """Of an answer to a short prompt, after one that warms up."""
    count = 4 if s.small else 64
    for _ in range(2):
        _wait(s)
        start = time.perf_counter()
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        _wait(s)
        seconds = time.perf_counter() - start
    return count / seconds


def _wait(s: Settings) -> None:
    if s.is_cuda:
        torch.cuda.synchronize(s.device)


def trees(s: Settings) -> str:
    """Zero-shot scores by prompt trees, streamed and in memory, against lm-eval's HFLM; they must be equal."""
    import zero_shot

    model = write_inputs(s.work, TINY if s.small else {**SMOLLM2_135M, "num_hidden_layers": 8}, 2, 32).model
    rows = zero_shot.measure(model, [], 4 if s.small else 64, (1, 4) if s.small else (1, 16), 1, s.device)
    for row in rows:
        s.keep(row)
    slower = {row["evaluation"]: row["ratio"] for row in rows}
    return (
        "Equal scores; times over the streamed one's: " + ", ".join(f"{n} {v:.2f}" for n, v in slower.items()) + "."
    )


def tiny(s: Settings) -> str:
    """The workflow on a tiny model on the device and on a CPU: one table, row by row."""
    variables = {"OBR_TINY": tiny_model(s), "OBR_TESTS": str(ROOT / "tests")}
    tables = []
    for device in dict.fromkeys((s.device, "cpu")):
        results = s.work / device.replace(":", "")
        _snakemake(s, ROOT / "tests/config.yaml", device, results, "tables/zero_shot.csv", variables)
        tables.append(_rows(results / "tables/zero_shot.csv"))
    return _beside(s, tables[0], tables[-1])


def demo(s: Settings) -> str:
    """SmolLM2's demo on the device, its table beside the CPU's: of results/demo, else of docs/results/demo.md."""
    results, config = s.work / "results", ROOT / "config/experiments/demo.yaml"
    if s.small:
        _snakemake(s, config, s.device, results, "tables/demo.csv", {}, "--dry-run")
        raise LeftOut("Its jobs were planned, not run: it downloads a model and is left out at small sizes.")
    _snakemake(s, config, s.device, results, "tables/demo.csv", {})
    own = ROOT / "results/demo/tables/demo.csv"
    reference = _rows(own) if own.exists() else _markdown(ROOT / "docs/results/demo.md")
    return _beside(s, _rows(results / "tables/demo.csv"), reference)


def _snakemake(
    s: Settings, config: Path, device: str, results: Path, target: str, variables: dict, *options: str
) -> None:
    """Make one file of a workflow's results on a device. Raises Failed if it cannot, CutShort if it is not in time.

    The parameters are a workflow's; variables, options: of the environment and of Snakemake.
    """
    changed = {**yaml.safe_load(config.read_text(encoding="utf-8")), "results": str(results), "device": device}
    path = s.work / f"{results.name}.yaml"
    path.write_text(yaml.safe_dump(changed), encoding="utf-8")
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "all"]
    command += ["--directory", str(s.work), "--configfile", str(path), *options, "--", str(results / target)]
    binaries = str(Path(sys.executable).parent)
    environment = {**os.environ, **variables, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    try:
        status = s.run(command, target, env=environment)
    except CutShort:
        raise CutShort(f"{target} on {device} was not finished in time.") from None
    if status:
        raise Failed(f"{target} could not be made on {device}; the log says why.")


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _markdown(path: Path) -> list[dict[str, str]]:
    """The first table of a page, with the names of columns up to their first blank."""
    lines = [line.strip("| \n") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip(" *") for cell in line.split(" | ")] for line in lines]
    names = [name.split(" ")[0].rstrip(",") for name in cells[0]]
    return [dict(zip(names, row, strict=False)) for row in cells[2:] if len(row) == len(names)]


def _beside(s: Settings, here: list[dict], there: list[dict]) -> str:
    """One row a row of both tables, in their order. Raises Failed where perplexities are too far apart or missing."""
    shares = []
    for one, other in zip_longest(here, there, fillvalue={}):
        found, expected = (_perplexity(row) for row in (one, other))
        apart = abs(found / expected - 1) if found and expected else None
        shares.append(apart)
        name = " ".join(one.get(key) or "" for key in ("label", "setting"))
        s.keep({"row": name, "device": found, "cpu": expected, "apart": apart, "all": json.dumps(one)})
    missing, worst = shares.count(None), max((share for share in shares if share is not None), default=0.0)
    text = f"{len(shares) - missing} perplexities, at most {100 * worst:.2f} % apart from the CPU's"
    if missing or not shares or worst > APART:
        raise Failed(f"{text}; {missing} rows have none on one side.")
    return f"{text}."


def _perplexity(row: dict) -> float | None:
    """That of a row of a table's CSV file, or of the documentation's table."""
    for name in ("heldout_ours", "sotu_ours", "perplexity"):
        if row.get(name):
            return float(row[name].replace(",", ""))
    return None
