"""Bytes that each stage holds on the simulated device at its peak, beside what the plan says of its GPU memory.

    python tests/helpers/device_memory.py TINY FOLDER [STAGE ...]

Of a random model in 16 bits, large enough that no constant counts. TINY: folder of helpers/tiny_model.py, for its
tokenizer and text. Writes FOLDER/report.json: {stage: {"peak", "planned", "deep"}}, "deep" for some: the peak of a
model with twice the blocks. A process of its own, as helpers/device_stages.py.
"""

import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import simulated_device

simulated_device.activate()  # before other libraries ask which devices there are

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from obr.calibration import collect_hessians  # noqa: E402
from obr.calibration.output_gradients import gradients  # noqa: E402
from obr.compression.stage import compress_stage  # noqa: E402
from obr.config.recipe import Option, Recipe  # noqa: E402
from obr.data import self_generated, token_windows  # noqa: E402
from obr.evaluation.stage import Wanted, evaluate_stage  # noqa: E402
from obr.methods import row_products  # noqa: E402
from obr.mixed_precision.sensitivity import measure_sensitivity  # noqa: E402
from obr.planning import learning_cost, memory, tensor_sizes  # noqa: E402
from obr.rotations import obtain  # noqa: E402
from obr.rotations.learning.registry import learn_rotation  # noqa: E402

WINDOWS, LENGTH, BLOCKS, VOCABULARY = 4, 128, 2, 1024
PART_ROWS = 128  # of products and tiles, which are as small beside the layers as on a real GPU
DEEP = ("hessian", "gradients", "compress obr_gptq sequential")  # of more blocks, too
CACHED = {"calibration": "c", "hessian": "cached", "rotation": "quarot"}
A4 = {"bits": 4}
RECIPES = {
    "rtn": {"method": "rtn", "rotation": "quarot"},
    "gptq": {"method": "gptq", **CACHED},
    "obr_gptq sequential": {"method": "obr_gptq", "calibration": "c", "hessian": "sequential", "rotation": "quarot"},
    "obr_gptq asymmetric": {"method": "obr_gptq", "calibration": "c", "hessian": "sequential", "asymmetry": 0.5},
    "joint": {"method": "joint", "sweeps": 1, **CACHED},
    "dense": {"method": "dense", "rotation": "quarot"},
}  # fmt: skip
END_TO_END = {"calibration": "c", "steps": 1, "batch": 2, "every": 1, "held_out": 1}
LEARNED = {
    "spinquant": {**END_TO_END, "quantise": {"activations": A4}},
    "ostquant": {**END_TO_END, "quantise": {"bits": 4, "activations": A4}},
    "flatquant": {"calibration": "c", "epochs": 1, "batch": 1, "held_out": 1,
                  "quantise": {"bits": 4, "activations": A4}},
    "omniquant": {"calibration": "c", "epochs": 1, "batch": 1, "held_out": 1,
                  "quantise": {"bits": 4, "clip": "learned"}},
    "awq": {"calibration": "c", "held_out": 1, "quantise": {"bits": 4}},
}  # fmt: skip


def random_model(tiny: Path, folder: Path, blocks: int) -> Path:
    """A Llama of random weights in bfloat16, with the tiny model's tokenizer."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=blocks,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for path in (tiny / "model").glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


class Stages:
    """The stages by name: functions of the folder to write to, which return the plan's bytes on the GPU."""

    def __init__(self, tiny: Path, folder: Path, blocks: int):
        self.tiny, self.folder = tiny, folder
        self.model = random_model(tiny, folder / "model", blocks)
        self.sizes = tensor_sizes.sizes_in(self.model)
        self.tokens, self.rotation = folder / "tokens.safetensors", folder / "rotation.safetensors"
        self.slopes = folder / "gradients.safetensors"
        spec = {"nsamples": WINDOWS, "seqlen": LENGTH, "seed": 0}
        token_windows.calibrate(self.model, tiny / "train.txt", spec, self.tokens)
        obtain.make({"kind": "quarot", "seed": 0}, self.model, self.rotation)
        self.named: dict[str, Callable] = {
            "hessian": self.hessian, "gradients": self.gradients, "sensitivity": self.sensitivity,
            **{f"compress {name}": self.compress(recipe) for name, recipe in RECIPES.items()},
            **{f"learn {name}": self.learn(name) for name in LEARNED},
            "evaluate": self.evaluate, "generate": self.generate,
        }  # fmt: skip

    def planned(self, rule: str, recipe: Recipe | None = None, length: int = LENGTH) -> float:
        return memory.memory(rule, self.sizes, WINDOWS * LENGTH, length, True, recipe)[1] * 1e9

    def hessian(self, out: Path) -> float:
        collect_hessians.hessian_stage(
            self.model, self.rotation, self.tokens, self.folder / "hessians", device="cuda"
        )
        return self.planned("hessian")

    def gradients(self, out: Path) -> float:
        gradients(
            self.model, self.rotation, self.tokens, self.folder / "gradients.safetensors", nsamples=2, device="cuda"
        )
        return self.planned("gradients")

    def sensitivity(self, out: Path) -> float:
        options = tuple(Option.parse(o, "o") for o in ({"method": "gptq"}, {"method": "joint", "sparsity": 0.5}))
        measure_sensitivity(
            self.model, self.rotation, self.tokens, self.folder / "hessians", self.slopes, options, out,
            device="cuda",
        )  # fmt: skip
        return self.planned("sensitivity")

    def compress(self, entry: dict) -> Callable[[Path], float]:
        def run(out: Path) -> float:
            recipe = Recipe.parse(entry)
            compress_stage(
                self.model, recipe, out, device="cuda",
                rotation=self.rotation if recipe.rotation != "none" else None,
                tokens=self.tokens if recipe.hessian == "sequential" else None,
                hessians=self.folder / "hessians" if recipe.needs_hessian and recipe.hessian == "cached" else None,
            )  # fmt: skip
            return self.planned("compress", recipe)

        return run

    def learn(self, name: str) -> Callable[[Path], float]:
        def run(out: Path) -> float:
            kind, learn = name.split()[0], LEARNED[name]
            entry = {"kind": kind, "seed": 0, "learn": learn}
            learn_rotation(entry, self.model, self.tokens, out / "rotation", "cuda", torch.bfloat16)
            learn = {**learn, "dtype": "bfloat16"}
            return learning_cost.memory(self.sizes, kind, learn, WINDOWS, LENGTH, True)[1] * 1e9

        return run

    def evaluate(self, out: Path) -> float:
        text = Wanted("perplexity", "heldout", self.tiny / "heldout.txt", {"seqlen": LENGTH, "tokens": 2 * LENGTH})
        checkpoint = self.folder / "compress obr_gptq sequential"
        evaluate_stage(checkpoint, [text], out / "s.json", recipe=Recipe.parse({"method": "dense"}), device="cuda")
        return self.planned("evaluate")

    def generate(self, out: Path) -> float:
        spec = {"nsamples": 2, "seqlen": LENGTH, "seed": 0, "generated": {"batch_size": 2}}
        self_generated.generate(self.model, spec, out / "tokens", "cuda")
        return self.planned("generate")


def peak(name: str, run: Callable[[Path], float], folder: Path) -> tuple[int, float]:
    """(bytes at the peak of a stage, bytes planned)."""
    out = folder / name
    out.mkdir(parents=True, exist_ok=True)
    gc.collect()
    with simulated_device.watched() as watch:
        planned = run(out)
    found = watch.peak - watch.before
    print(
        f"{name}: {found / 1e6:.1f} MB, planned {planned / 1e6:.1f}: {found / planned:.2f}",
        file=sys.stderr,
        flush=True,
    )
    return found, planned


def main(tiny: str, folder: str, *names: str) -> None:
    folder, found = Path(folder), {}
    row_products.PART["cuda"] = collect_hessians.TILE = PART_ROWS
    memory.LOGITS = 4.0 * LENGTH * VOCABULARY
    memory.solver_bytes.__defaults__ = (PART_ROWS, *memory.solver_bytes.__defaults__[1:])
    for depth in (BLOCKS, 2 * BLOCKS):
        stages = Stages(Path(tiny), folder / f"{depth} blocks", depth)
        gc.collect()
        gc.freeze()  # so that what is collected between stages is theirs
        for name in names or (stages.named if depth == BLOCKS else DEEP):
            most, planned = peak(name, stages.named[name], stages.folder)
            found.setdefault(name, {"peak": most, "planned": planned})
            if depth > BLOCKS:
                found[name]["deep"] = most
    (folder / "report.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
