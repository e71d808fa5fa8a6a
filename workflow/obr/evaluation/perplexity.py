"""Perplexity as GPTQ and its successors define it, with the model streamed block by block."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from obr.data import token_windows, tokenize
from obr.errors import ObrError
from obr.evaluation.block_pass import run
from obr.models import dtypes
from obr.models.blocks import Blocks, StreamedBlocks, check_windows
from obr.models.hidden_states import MemoryBudget
from obr.models.read_only import ReadOnlyBlocks, unchanged
from obr.runtime.files import finite
from obr.runtime.provenance import versions

DEFINITION = (
    "exp of the mean next-token cross-entropy over non-overlapping windows of {seqlen} tokens of the whole text, "
    "tokenised once; {targets} targets a window, no context carried over, the last partial window dropped; {special}"
)


DENSE = "W16A16KV16"  # setting of a model as it is
TOKENS = 1024  # whose logits, a vocabulary wide each, exist at a time


@torch.no_grad()
def perplexity(
    model: "nn.Module | Blocks", windows: Tensor, *, room: MemoryBudget | None = None, progress: bool = False
) -> float:
    """Perplexity of a model over token windows, in evaluation mode. The model is left as it was.

    Args:
        model: a transformers causal LM of a known family, compressed or not; or Blocks, which may be streamed:
            one block is in memory at a time.
        windows: (b, s) tokens; s - 1 are predicted in each. For a family that needs a BOS token in front of its
            input, as Gemma does, make them with `evaluation_windows(..., bos_token_id=...)`.
        room: for the hidden states of all windows.

    Returns infinity where the mean cross-entropy is more than a float's exponent holds.

    Raises:
        ObrError: `obr.models.check` refuses the model, windows have fewer than two tokens, or the model gives NaN.

    Example:
        >>> windows = obr.evaluation_windows(tokenizer(text, return_tensors="pt")["input_ids"][0], 128, 1024)
        >>> 1 < obr.perplexity(obr.load_model("path/to/model"), windows) < 1000
        True
    """
    if isinstance(model, Blocks):
        return _perplexity(model, windows, room, progress)
    blocks = ReadOnlyBlocks(model)
    with unchanged(model):
        return _perplexity(blocks, windows, room, progress)


def _perplexity(blocks: Blocks, windows: Tensor, room: MemoryBudget | None, progress: bool) -> float:
    return run(blocks, [Windows(blocks, windows)], room, "perplexity" if progress else None)[0]


class Windows:
    """Token windows (b, s) of a text as a part of a pass through a model's blocks; its result is the perplexity.

    Raises:
        ObrError: no windows of two tokens or more, or tokens that the model does not have.
    """

    def __init__(self, blocks: Blocks, windows: Tensor):
        check_windows(windows)
        self.blocks, self.windows = blocks, windows
        blocks.forget_length()
        _, self.given = blocks.entering(windows[:1])  # good for any window
        if windows.shape[1] < 2:
            raise ObrError(f"Windows have {windows.shape[1]} token, of which none is predicted; give two or more.")
        self.shapes = [(1, windows.shape[1])] * len(windows)

    def entering(self) -> Iterator[Tensor]:
        """The hidden states (1, s, d) that enter the first block, window by window."""
        return (self.blocks.entering(window[None])[0] for window in self.windows)

    def arguments(self, index: int, piece: int, states: Tensor) -> dict:
        """Keyword arguments of block `index`, the same for all windows."""
        return self.given[index]

    def finish(self, states: Iterator[Tensor]) -> float:
        """Raises ObrError if the model gives NaN."""
        losses = [_loss(self.blocks, out, window) for out, window in zip(states, self.windows, strict=True)]
        mean = sum(torch.stack(losses).tolist()) / len(self.windows)
        if mean != mean:
            raise ObrError(
                "The model gives NaN; it overflows in half precision (use dtype float32) or its weights are broken."
            )
        return float(torch.tensor(mean, dtype=torch.float64).exp())


def _loss(blocks: Blocks, states: Tensor, window: Tensor) -> Tensor:
    """Mean cross-entropy, float64, of a window's tokens (s,) but the first, from its last hidden states (1, s, d)."""
    total = torch.zeros((), dtype=torch.float64, device=states.device)  # no number yet: a GPU is waited for
    targets = window[1:].to(states.device)
    for part, wanted in zip(states[:, :-1].split(TOKENS, dim=1), targets.split(TOKENS), strict=True):
        total += F.cross_entropy(blocks.logits(part)[0].float(), wanted, reduction="sum")
    return total / len(targets)


class TextRun:
    """The evaluation of a model on a text: windows to begin with, and what the artefact holds in the end.

    Args:
        blocks: of the model.
        spec: {"seqlen", "tokens" (limit, or None), "bos"}, "bos" as of `data.tokenize`.
        setting: of the quantisation.
    """

    def __init__(self, blocks: StreamedBlocks, tokenizer, text: Path, spec: dict, setting: str):
        self.blocks, self.tokenizer, self.setting, self.bos = blocks, tokenizer, setting, spec.get("bos")
        read = tokenize.read_text(text)
        tokens = tokenize.tokenize(tokenizer, read, self.bos)
        self.windows = token_windows.evaluation_windows(
            tokens, spec["seqlen"], spec.get("tokens"), tokenize.window_bos(tokenizer, self.bos)
        )
        self.length = len(tokens)
        self.note = tokenize.doubts(self.windows, tokenizer, blocks.config.to_dict(), read)

    def result(self, value: float) -> dict:
        """What the artefact holds. value: the perplexity.

        JSON has no infinity: an infinite perplexity has "value" None and "status" "inf", every other one "status"
        "finite". "note" is there where the value is doubtful, see `tokenize.doubts`.
        """
        windows, seqlen = self.windows, self.windows.shape[1]
        special = _special(self.tokenizer, self.bos)
        return {
            **finite("value", value),
            "definition": DEFINITION.format(seqlen=seqlen, targets=seqlen - 1, special=special),
            "bos": self.bos,
            **self.note,
            "windows": len(windows),
            "seqlen": seqlen,
            "tokens": windows.numel(),
            "tokens_in_text": self.length,
            "setting": self.setting,
            "device": str(self.blocks.target),
            "dtype": dtypes.name_of(self.blocks.dtype),
            "versions": versions(),
        }


def _special(tokenizer, bos: bool | str | None) -> str:
    """Which special tokens are added to a text, in words."""
    if bos == "window":
        return "every window begins with a BOS token, which is one of its tokens"
    before, after = tokenize.special_tokens(tokenizer) if bos is None else ([tokenizer.bos_token_id] * bos, [])
    places = ((before, "once, before the text"), (after, "once, after the text"))
    spelled = [f"{tokenize.tokens_as_text(tokenizer, ids)} {place}" for ids, place in places if ids]
    return " and ".join(spelled) or "no special tokens"
