"""A model quantised by another program, in that program's own environment, with its time and memory beside it.

    .peers/gptqmodel/bin/python benchmarks/peers/make.py gptqmodel MODEL WINDOWS OUT --bits 4 --group 128

MODEL is a folder with config.json and safetensors, WINDOWS a file of windows as `obr calibrate` writes it.
Computed in float32, as this project does on a CPU: half precision is five times slower on processors without it.
OUT gets the checkpoint and made.json: program with version, settings, seconds, threads, processor.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path

PACKAGES = {"llmcompressor": "llmcompressor", "gptqmodel": "GPTQModel", "autoround": "auto-round"}
NAMES = {"llmcompressor": "llm-compressor", "gptqmodel": "GPTQModel", "autoround": "AutoRound"}
SETTINGS = ("bits", "group", "sparsity", "observer", "ordered", "iters", "form")


def llmcompressor(model: Path, windows, out: Path, options) -> None:
    """GPTQ with its defaults: columns in static order, a minmax observer; SparseGPT before it if weights go."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = {"num_bits": options.bits, "type": "int", "symmetric": True, "observer": options.observer}
    weights |= {"strategy": "group", "group_size": options.group} if options.group else {"strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    steps = [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    if options.sparsity:
        from llmcompressor.modifiers.pruning import SparseGPTModifier

        steps.insert(0, SparseGPTModifier(sparsity=options.sparsity, mask_structure="0:0", ignore=["lm_head"]))
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in windows.tolist()]
    oneshot(
        model=loaded, dataset=Dataset.from_list(rows), recipe=steps, max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows), shuffle_calibration_samples=False,
    )  # fmt: skip
    loaded.to(torch.float16).save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


def gptqmodel(model: Path, windows, out: Path, options) -> None:
    """GPTQ as GPTQModel has it: with one scale a row columns in their own order, unless told otherwise."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it starts one, and then asks for two
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    # Its own order of columns, within groups, is only for groups.
    order = {"desc_act": options.ordered, "act_group_aware": bool(options.group) and not options.ordered}
    settings = QuantizeConfig(bits=options.bits, group_size=options.group or -1, **order)
    loaded = GPTQModel.load(str(model), settings, device="cpu", dtype=torch.float32)
    loaded.quantize([{"input_ids": row[None], "attention_mask": row[None] * 0 + 1} for row in windows], batch_size=1)
    loaded.save(str(out))


def autoround(model: Path, windows, out: Path, options) -> None:
    """Rounding learned by signed gradient descent."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model, dtype="auto"),
        AutoTokenizer.from_pretrained(model),
    )
    rounding = AutoRound(
        loaded, tokenizer, bits=options.bits, group_size=options.group or -1, sym=True, iters=options.iters,
        nsamples=len(windows), seqlen=windows.shape[1], batch_size=4, device_map="cpu",
        dataset=[{"input_ids": row[None], "attention_mask": row[None] * 0 + 1} for row in windows],
    )  # fmt: skip
    rounding.quantize_and_save(str(out), format=options.form)
    for folder in [path for path in out.iterdir() if path.is_dir()]:  # it makes one of its own, named by its settings
        for path in folder.iterdir():
            path.rename(out / path.name)
        folder.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=PACKAGES)
    for name in ("model", "windows", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=None, help="columns that share a scale; default: a row")
    parser.add_argument("--sparsity", type=float, default=0.0, help="llmcompressor: SparseGPT before GPTQ")
    parser.add_argument("--observer", default="memoryless_minmax", help="llmcompressor: how a scale is found")
    parser.add_argument("--ordered", action="store_true", help="gptqmodel: columns in the order of the Hessian")
    parser.add_argument("--iters", type=int, default=200, help="autoround: steps a block")
    parser.add_argument("--form", default="auto_round", help="autoround: the format that is written")
    options = parser.parse_args()
    from safetensors.torch import load_file

    (windows,) = (tensor for tensor in load_file(options.windows).values() if tensor.ndim == 2)
    started = time.monotonic()
    globals()[options.program](options.model, windows, options.out, options)
    made = {
        "program": f"{NAMES[options.program]} {importlib.metadata.version(PACKAGES[options.program])}",
        "settings": {key: value for key, value in vars(options).items() if key in SETTINGS},
        "tokens": windows.numel(),
        "seconds": round(time.monotonic() - started, 1),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "processor": platform.processor() or platform.machine(),
    }
    (options.out / "made.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
