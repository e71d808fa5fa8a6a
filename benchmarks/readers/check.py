"""Do other programs compute what was exported? Token by token, with log-probabilities.

    python benchmarks/readers/check.py [--model FOLDER] [--readers vllm llamacpp transformers4 transformers5]

`make check-readers` installs the readers, each in an environment of its own, and runs this. A model is compressed in
several ways and exported. Each reader continues three prompts by 32 greedy tokens. This package then computes the
same tokens from its own checkpoint, in float32. OUT/readers.md gets three figures: of how many tokens the choice is
the same, and the largest and the mean difference of a log-probability. The exit status is 1 where one differs by
more than its bound in LARGEST or WIDER, refuses what it should read, or reads what REFUSES or MISREADS name.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import obr
from obr.export.dispatch import export
from obr.models.architectures import Dimensions
from obr.models.loading import load_tokenizer
from obr.rotations import registry

ROOT = Path(__file__).resolve().parents[2]
ASK = ROOT / "benchmarks/readers/ask.py"
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a young engineer who",
    "In 1941 the President of the United States told Congress that",
)
TOKENS = 32
CASES = {
    "dense, 4 bits": {"method": "rtn"},
    "dense, rotated, 4 bits": {"method": "rtn", "rotation": "quarot_fused"},
    "30 % zeros, 4 bits": {"method": "magnitude", "sparsity": 0.3},
    "30 % zeros, rotated, 4 bits": {"method": "magnitude", "sparsity": 0.3, "rotation": "quarot_fused"},
    "dense, 3 bits": {"method": "rtn", "bits": 3},
    "dense, 8 bits": {"method": "rtn", "bits": 8},
    "dense, 8 bits, activations of 8 bits": {"method": "rtn", "bits": 8, "activations": {"bits": 8}},
    "mixture of experts, 4 bits": {"method": "rtn"},
}
THREE, EIGHT = "dense, 3 bits", "dense, 8 bits"
INT8, EXPERTS = "dense, 8 bits, activations of 8 bits", "mixture of experts, 4 bits"
# Reader -> its format, the dtype of the computation, and the largest difference of a log-probability. llama.cpp
# rounds activations to 8 bits, in blocks of 32.
LARGEST = {
    "transformers5": ("compressed-tensors", "float32", 1e-4),
    "transformers4": ("compressed-tensors", "float32", 1e-4),
    "vllm": ("compressed-tensors", "float16", 0.1),
    "llamacpp": ("gguf", "float32", 1.0),
}
# Activations that others round a little otherwise (docs/how-to/export.md); the model of 3 bits reacts to it most.
WIDER = {("transformers5", INT8): 3.0, ("transformers4", INT8): 3.0, ("vllm", INT8): 2.0, ("llamacpp", THREE): 3.0}
# What a reader refuses, and a part of what it says.
REFUSES = {("vllm", case): "not supported by CPUWNA16" for case in (THREE, EIGHT)}
if not torch.cpu._is_amx_tile_supported():
    REFUSES["vllm", EXPERTS] = "No WNA16 MoE backend supports"
# What a reader computes something else from, without a word: another packing of 3 bits.
MISREADS = {("transformers4", THREE)}
NO_FILE = {("gguf", INT8), ("gguf", EXPERTS)}  # the export refuses


def prepare(model: Path, out: Path, case: str) -> Path:
    """The checkpoint of a case, with its exports beside it."""
    folder, recipe = out / case.replace(" ", "-").replace(",", "").replace("%", "percent"), dict(CASES[case])
    if not folder.exists():
        tokenizer = load_tokenizer(model)
        loaded = mixture(len(tokenizer)) if case == EXPERTS else obr.load_model(model, device="cpu")
        if "rotation" in recipe:
            obr.rotate(loaded, registry.draw("quarot", Dimensions.of(loaded.config), fused=True))
        tokens = tokenizer(" ".join(PROMPTS))["input_ids"]
        obr.save(obr.compress(loaded, torch.tensor([tokens]), recipe, progress=False), folder, tokenizer)
    for form, place in places(folder).items():
        if not place.exists() and (form, case) not in NO_FILE:
            print(export(folder, form, place), flush=True)
    return folder


def mixture(vocabulary: int) -> MixtralForCausalLM:
    """A small mixture of experts with random weights, large enough that one token is clearly the likeliest."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.1,
        max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def places(folder: Path) -> dict[str, Path]:
    return {"compressed-tensors": folder.with_suffix(".ct"), "gguf": folder.with_suffix(".gguf")}


def ask(reader: str, folder: Path, prompts: Path, environments: Path) -> dict | str:
    """What a reader answers, or the last line of what it said instead."""
    form, dtype, _ = LARGEST[reader]
    out = folder.with_suffix(f".{reader}.json")
    python = sys.executable if reader == "transformers5" else environments / reader / "bin/python"
    command = [python, ASK, reader.rstrip("45"), places(folder)[form], prompts, out, "--dtype", dtype]
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if not out.exists():
        done = subprocess.run(list(map(str, command)), env=plain, encoding="utf-8", capture_output=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return lines[-1].removeprefix("[rank0]:").strip()[:200] if lines else f"exit status {done.returncode}"
    return json.loads(out.read_text(encoding="utf-8"))


@torch.no_grad()
def compare(model, prompts: list[list[int]], answer: dict) -> tuple[int, int, float, float]:
    """(tokens that this package would choose, tokens in all, largest and mean difference of a log-probability)."""
    same, differences = 0, []
    for prompt, tokens, logprobs in zip(prompts, answer["tokens"], answer["logprobs"], strict=True):
        logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        ours, chosen = logits.double().log_softmax(-1), torch.tensor(tokens)
        same += int((ours.argmax(-1) == chosen).sum())
        differences.append(ours.gather(1, chosen[:, None])[:, 0] - torch.tensor(logprobs, dtype=torch.float64))
    found = torch.cat(differences).abs()
    return same, len(found), float(found.max()), float(found.mean())


def judge(reader: str, case: str, answer: dict | str, compared) -> tuple[list[str], bool]:
    """(cells of the table, whether the reader did what is expected of it): agree within its bound, or refuse.

    compared: the function that compares an answer with this package's, as `compare` does.
    """
    _, dtype, bound = LARGEST[reader]
    refusal = REFUSES.get((reader, case))
    if isinstance(answer, str):
        return [reader, dtype, f"refused: {answer}", "", ""], refusal is not None and refusal in answer
    same, total, largest, mean = compared(answer)
    cells = [f"{reader} {answer['version']}", dtype, f"{same} of {total}", f"{largest:.1e}", f"{mean:.1e}"]
    if (reader, case) in MISREADS:
        return cells, largest > bound
    return cells, refusal is None and largest <= WIDER.get((reader, case), bound)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "results/demo/models/smollm2-135m")
    parser.add_argument("--readers", nargs="+", default=list(LARGEST), choices=LARGEST)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--environments", type=Path, default=ROOT / ".readers")
    parser.add_argument("--out", type=Path, default=ROOT / "results/readers")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer, asked = load_tokenizer(options.model), options.out / "prompts.json"
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    asked.write_text(json.dumps({"prompts": prompts, "tokens": TOKENS}), encoding="utf-8")
    lines = ["| checkpoint | reader | dtype | same tokens | largest difference | mean |"]
    lines += ["| --- | --- | --- | --: | --: | --: |"]
    failed = 0
    for case in options.cases:
        folder = prepare(options.model, options.out, case)
        model = obr.load(folder, device="cpu")
        for reader in options.readers:
            if (LARGEST[reader][0], case) in NO_FILE:
                continue
            answer = ask(reader, folder, asked, options.environments)
            cells, fine = judge(reader, case, answer, lambda told, model=model: compare(model, prompts, told))
            lines.append(f"| {case} | {' | '.join(cells)} |")
            print(lines[-1] if fine else f"{lines[-1]} <-- not as expected", flush=True)
            failed += not fine
    lines += ["", f"On {platform.processor() or platform.machine()}, {os.cpu_count()} cores."]
    (options.out / "readers.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
