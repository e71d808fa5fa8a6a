"""Perplexity as GPTQ and its successors define it, with the model streamed block by block."""

import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from obr import data
from obr.checkpoint import CheckpointBlocks, versions
from obr.errors import ObrError
from obr.model import Blocks, load_tokenizer, run_block
from obr.recipe import Recipe

DEFINITION = (
    "exp of the mean next-token cross-entropy over non-overlapping windows of {seqlen} tokens of the whole text, "
    "tokenised once; {targets} targets a window, no context carried over, the last partial window dropped"
)


@torch.no_grad()
def perplexity(model, windows: Tensor, *, progress: bool = False) -> float:
    """Perplexity of a model over token windows.

    Args:
        model: a transformers causal LM of a known family, compressed or not; or Blocks, which may be streamed:
            one block is in memory at a time, and the hidden states of all windows.
        windows: (b, s) tokens; s - 1 are predicted in each.

    Raises:
        ObrError: the model gives NaN.
    """
    blocks = model if isinstance(model, Blocks) else Blocks(model)
    hidden, arguments = blocks.embed(windows)
    for index in tqdm(range(len(blocks)), desc="perplexity", unit="block", disable=not progress):
        block = blocks.load(index)
        for i, out in enumerate(run_block(block, hidden, arguments[index])):
            hidden[i] = out  # in place: one window's states exist twice, not all
    total = 0.0
    for states, window in zip(hidden, windows, strict=True):
        logits = blocks.logits(states)[0, :-1].float()
        total += float(F.cross_entropy(logits, window[1:].to(logits.device)))
    mean = total / len(windows)
    if mean != mean:
        raise ObrError(
            "The model gives NaN; it overflows in half precision (use dtype float32) or its weights are broken."
        )
    return float(torch.tensor(mean, dtype=torch.float64).exp())


def perplexity_stage(
    checkpoint: Path,
    text: Path,
    spec: dict,
    recipe: Recipe | None = None,
    dtype=None,
    device: str | None = None,
) -> dict:
    """The stage: perplexity of a checkpoint on a text.

    spec: {"seqlen", "tokens" (limit, or None), "bos"}. recipe: whose activation settings apply.
    """
    started = time.monotonic()
    blocks = CheckpointBlocks(checkpoint, recipe, dtype, device)
    tokenizer = load_tokenizer(checkpoint)
    tokens = data.tokenize(tokenizer, data.read_text(text), bos=spec.get("bos"))
    windows = data.evaluation_windows(tokens, spec["seqlen"], spec.get("tokens"))
    value = perplexity(blocks, windows, progress=True)
    seqlen = windows.shape[1]
    return {
        "value": value,
        "definition": DEFINITION.format(seqlen=seqlen, targets=seqlen - 1),
        "windows": len(windows),
        "seqlen": seqlen,
        "tokens": windows.numel(),
        "tokens_in_text": len(tokens),
        "setting": blocks.recipe.setting,
        "device": str(blocks.target),
        "dtype": str(blocks.dtype).removeprefix("torch."),
        "versions": versions(),
        "seconds": time.monotonic() - started,
    }
