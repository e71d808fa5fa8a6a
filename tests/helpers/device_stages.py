"""Every stage on the simulated device beside the same stage on the CPU, and what happened on the device.

    python tests/helpers/device_stages.py TINY FOLDER [STAGE ...]

TINY: folder of helpers/tiny_model.py. Writes FOLDER/report.json: {stage: {"error", "equal", "difference", "watch",
"seconds"}}. A process of its own, since the device cannot be taken away again.

equal: whether all tensors are the same to the last bit. difference: largest of all tensors, beside its largest value.
"""

import csv
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import simulated_device

simulated_device.activate()  # before other libraries ask which devices there are

from helpers.zero_shot_tasks import PIQA, local_task  # noqa: E402
from obr.calibration.collect_hessians import hessian_stage  # noqa: E402
from obr.calibration.output_gradients import gradients  # noqa: E402
from obr.checkpoints import format  # noqa: E402
from obr.compression.in_memory import compress  # noqa: E402
from obr.compression.recompute import repeat  # noqa: E402
from obr.compression.stage import compress_stage  # noqa: E402
from obr.config.recipe import Option, Recipe  # noqa: E402
from obr.data import self_generated, token_windows  # noqa: E402
from obr.evaluation.perplexity import perplexity  # noqa: E402
from obr.evaluation.stage import Wanted, evaluate_stage  # noqa: E402
from obr.methods import row_products  # noqa: E402
from obr.mixed_precision.sensitivity import measure_sensitivity  # noqa: E402
from obr.models.loading import load_model  # noqa: E402
from obr.rotations import apply, obtain  # noqa: E402
from obr.rotations.learning.registry import learn_rotation  # noqa: E402
from obr.runtime import processor  # noqa: E402

F32 = torch.float32
A4 = {"bits": 4, "symmetric": False, "clip_ratio": 0.9}
KV4 = {"bits": 4, "symmetric": False, "group_size": "head"}
LEARNED = {"bits": 4, "symmetric": False, "group_size": "head", "clip_ratio": "learned"}
LOW = {"bits": 3}
END_TO_END = {"steps": 3, "batch": 2, "every": 2, "keep_every": 2, "held_out": 2}
ENTRIES = {
    "spinquant": {**END_TO_END, "quantise": {"activations": LOW, "keys": LOW, "values": LOW}},
    "spinquant rounded": {**END_TO_END, "momentum": 0.5, "loss": "kl_top", "top": 20, "gradients": "flowing",
                          "quantise": {"bits": 4, "activations": LOW}},
    "ostquant": {**END_TO_END, "quantise": {"bits": 4, "activations": LOW, "keys": LOW, "values": LOW}},
    "ostquant klt": {**END_TO_END, "start": "klt", "online_query_key": True, "top": 20, "renormalised": True,
                     "dtype": "bfloat16", "quantise": {"activations": LOW}},
    "flatquant": {"epochs": 2, "batch": 2, "held_out": 2, "quantise": {
        "bits": 4, "clip": "learned", "activations": {"bits": 4, "clip_ratio": "learned"}, "keys": LEARNED,
        "values": LEARNED}},
    "flatquant direct": {"epochs": 1, "batch": 2, "held_out": 2, "parametrisation": "direct", "start": "hadamard",
                         "dtype": "bfloat16", "quantise": {"bits": 4, "activations": {"bits": 4}}},
    "omniquant": {"epochs": 2, "batch": 2, "shifts": True, "held_out": 2,
                  "quantise": {"bits": 3, "clip": "learned", "activations": {"bits": 8}, "keys": KV4}},
    "smoothquant": {"held_out": 2, "quantise": {"bits": 8, "clip": "minmax", "activations": {"bits": 4}}},
    "awq": {"held_out": 2, "quantise": {"bits": 3, "clip": "learned"}},
}  # fmt: skip
SEARCHED = ("smoothquant", "awq")  # without gradients, so that the same bytes come out
SEQUENTIAL, CACHED = {"calibration": "c", "hessian": "sequential"}, {"calibration": "c", "hessian": "cached"}
RECIPES = {
    "dense": {"method": "dense"},
    "rtn": {"method": "rtn"},
    "rtn groups": {"method": "rtn", "group": 32},
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda", **CACHED},
    "wanda harmonic 2:4": {"method": "wanda", "mask": "wanda_harmonic", "pattern": "2:4", **CACHED},
    "gptq": {"method": "gptq", **CACHED, "refit": True},
    "gptq groups": {"method": "gptq", **CACHED, "group": 32, "refit": True},
    "sparsegpt_gptq": {"method": "sparsegpt_gptq", **CACHED},
    "sparsegpt_gptq 2:4": {"method": "sparsegpt_gptq", "pattern": "2:4", **CACHED},
    "sparsegpt_then_gptq": {"method": "sparsegpt_then_gptq", **CACHED},
    "obr_rtn": {"method": "obr_rtn", **CACHED, "column_order": "hessian"},
    "obr_gptq": {"method": "obr_gptq", **SEQUENTIAL, "rotation": "quarot"},
    "obr_gptq random": {"method": "obr_gptq", **CACHED, "mask": "random"},
    "obr_gptq asymmetric": {
        "method": "obr_gptq", **SEQUENTIAL, "asymmetry": 0.5, "held_out": 2, "hessian_inputs": "quantised",
        "activations": A4, "keys": KV4, "values": KV4,
    },
    "gptq whole block": {"method": "gptq", **SEQUENTIAL, "hessian_scope": "block"},
    "gptq refined": {"method": "gptq", **SEQUENTIAL, "refine_steps": 4, "held_out": 2, "activations": {"bits": 8},
                     "hessian_inputs": "quantised"},
    "joint groups": {"method": "joint", **CACHED, "sweeps": 2, "group": 32, "pattern": "2:4"},
    "joint": {"method": "joint", **CACHED, "sweeps": 2},
    "joint 2:4": {"method": "joint", "pattern": "2:4", **CACHED, "sweeps": 2},
    "joint paired": {"method": "joint", "pattern": "paired 4:8", **CACHED, "sweeps": 2},
    "joint layer": {
        "method": "joint", **CACHED, "sweeps": 2, "scope": "layer", "row_weights": "gradient", "bits": 3,
    },
    "joint 16 bits": {"method": "joint", "bits": 16, **CACHED, "sweeps": 2},
}  # fmt: skip
OPTIONS = tuple(Option.parse(o, "o") for o in ({"method": "gptq", "bits": 3}, {"method": "joint", "sparsity": 0.5}))


class Stages:
    """The stages by name: functions (device, folder to write to) -> tensors to compare, or None for the folder's."""

    def __init__(self, tiny: Path, folder: Path):
        self.tiny, self.folder, self.model = tiny, folder, tiny / "model"
        self.tokens, self.rotation = folder / "tokens.safetensors", folder / "rotation.safetensors"
        spec = {"nsamples": 8, "seqlen": 64, "seed": 0}
        token_windows.calibrate(self.model, tiny / "train.txt", spec, self.tokens)
        obtain.make({"kind": "quarot", "seed": 0}, self.model, self.rotation)
        self.task = local_task(folder, "piqa", PIQA)
        self.named: dict[str, Callable] = {
            "hessian": self.hessian, "gradients": self.gradients, "sensitivity": self.sensitivity,
            **{f"compress {name}": self.compress(recipe) for name, recipe in RECIPES.items()},
            **{f"learn {name}": self.learn(name) for name in ENTRIES},
            "evaluate": self.evaluate, "verify": self.verify, "generate": self.generate, "in memory": self.in_memory,
        }  # fmt: skip

    def made(self, stage: str) -> Path:
        """What the stage has made on the CPU."""
        return self.folder / stage / "cpu"

    def hessian(self, device: str, out: Path) -> None:
        hessian_stage(self.model, None, self.tokens, out, F32, device)

    def gradients(self, device: str, out: Path) -> None:
        gradients(self.model, None, self.tokens, out / "gradients.safetensors", nsamples=4, dtype=F32, device=device)

    def sensitivity(self, device: str, out: Path) -> dict:
        found = measure_sensitivity(
            self.model, None, self.tokens, self.made("hessian"), self.made("gradients") / "gradients.safetensors",
            OPTIONS, out, dtype=F32, device=device,
        )  # fmt: skip
        return {"losses": torch.tensor([layer["losses"] for layer in found["layers"]])}

    def compress(self, recipe: dict) -> Callable:
        parsed = Recipe.parse(recipe)

        def run(device: str, out: Path) -> dict:
            sequential = parsed.hessian == "sequential"
            manifest = compress_stage(
                self.model, parsed, out, dtype=F32, device=device,
                rotation=self.rotation if parsed.rotation != "none" else None,
                tokens=self.tokens if sequential and parsed.needs_hessian else None,
                hessians=self.made("hessian") if not sequential and parsed.needs_hessian else None,
                gradient_file=self.made("gradients") / "gradients.safetensors" if parsed.needs_gradients else None,
            )  # fmt: skip
            tensors = {"error": torch.tensor(manifest["relative_error"] or 0.0)}
            if parsed.method == "joint":  # a change of the last bit is another basin
                return tensors
            for path in sorted(out.glob("*.safetensors")):
                tensors |= {f"{path.stem} {name}": tensor for name, tensor in load_file(path).items()}
            return tensors

        return run

    def learn(self, name: str) -> Callable:
        def run(device: str, out: Path) -> dict | None:
            entry = {"kind": name.split()[0], "seed": 0, "learn": {"calibration": "c", **ENTRIES[name]}}
            learn_rotation(entry, self.model, self.tokens, out / "rotation.safetensors", device)
            if name in SEARCHED:
                return None
            with open(out / "rotation.csv", encoding="utf-8", newline="") as file:
                return {"held out": torch.tensor([float(row["held_out"]) for row in csv.DictReader(file)])}

        return run

    def evaluate(self, device: str, out: Path) -> dict:
        recipe = Recipe.parse({**RECIPES["obr_gptq"], "activations": A4, "keys": KV4, "values": KV4})
        wanted = [
            Wanted("perplexity", "heldout", self.tiny / "heldout.txt", {"seqlen": 64, "tokens": 512}),
            Wanted("zero_shot", "piqa", self.task, {"limit": 4, "batch_tokens": 64}),
        ]
        checkpoint = self.made("compress obr_gptq")
        found = evaluate_stage(checkpoint, wanted, out / "s.json", recipe=recipe, dtype=F32, device=device)
        value = found["perplexity"]["heldout"]["value"]
        return {"perplexity": torch.tensor(value), "accuracy": torch.tensor(found["zero_shot"]["piqa"]["value"])}

    def verify(self, device: str, out: Path) -> dict:
        from obr.compression.recompute import Places

        places = Places(self.model, self.rotation, self.tokens)
        found = repeat(self.made("compress obr_gptq"), 4, places, device)
        return {"differing": torch.tensor([layer.differing for layer in found])}

    def generate(self, device: str, out: Path) -> None:
        spec = {"nsamples": 2, "seqlen": 24, "seed": 0, "generated": {"batch_size": 2}}
        self_generated.generate(self.model, spec, out / "tokens.safetensors", device, F32)

    def in_memory(self, device: str, out: Path) -> dict:
        windows = token_windows.load_tokens(self.tokens)[0]
        model = apply.rotate(load_model(self.model, F32, device), "quarot")
        allocation = {"bits": 3.2, "options": [option.__dict__ for option in OPTIONS]}
        recipe = {"method": "joint", "sweeps": 1, "allocation": allocation, "activations": A4}
        model = compress(model, windows[:4], recipe, progress=False)
        before = perplexity(model, windows[4:])
        loaded = format.load(self.made("compress obr_gptq"), dtype=F32, device=device)
        with torch.no_grad():
            logits = loaded(windows[:1].to(device)).logits
        return {"perplexity": torch.tensor([before, perplexity(loaded, windows[4:])]), "logits": logits.cpu()}


def tensors_in(folder: Path) -> dict:
    return {
        f"{path.name} {n}": t for path in sorted(folder.rglob("*.safetensors")) for n, t in load_file(path).items()
    }


def compared(one: dict, other: dict) -> tuple[bool, float]:
    """(equal to the last bit, largest difference beside the largest value of its tensor)."""
    if one.keys() != other.keys() or any(one[n].shape != other[n].shape for n in one):
        return False, float("inf")
    equal, worst = True, 0.0
    for name, tensor in one.items():
        equal &= torch.equal(tensor, other[name])
        if tensor.numel():
            wide, also = tensor.double(), other[name].double()
            worst = max(worst, float((wide - also).abs().max() / wide.abs().max().clamp_min(1e-30)))
    return equal, worst


def main(tiny: str, folder: str, *names: str) -> None:
    """Run the stages, each on the CPU first."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stages, report = Stages(Path(tiny), folder), {}
    gc.collect()
    gc.freeze()  # so that what is collected between stages is theirs
    # So that the arithmetic is the same: products of the same shapes and in the same dtype.
    os.environ[processor.VARIABLE] = "float32"
    row_products.PART["cuda"] = row_products.PART["cpu"]
    for name, run in stages.named.items():
        if names and name not in names:
            continue
        results, entry = {}, {"error": None}
        for device in ("cpu", "cuda"):
            out = folder / name / device
            out.mkdir(parents=True, exist_ok=True)
            started = time.process_time()
            gc.collect()  # models hold themselves by their hooks
            try:
                with simulated_device.watched() as watch:
                    found = run(device, out)
            except Exception:
                entry["error"] = traceback.format_exc()
                break
            entry[f"seconds {device}"] = round(time.process_time() - started, 2)
            results[device] = tensors_in(out) if found is None else found
        entry["watch"] = watch.to_dict()
        if len(results) == 2:
            entry["equal"], entry["difference"] = compared(results["cpu"], results["cuda"])
        report[name] = entry
        told = {key: value for key, value in entry.items() if key != "watch"}
        print(name, told, file=sys.stderr, flush=True)
        (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
