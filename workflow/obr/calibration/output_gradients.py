"""Output gradients: how much the language-model loss feels an error in each output channel of each linear layer.

G_r = mean over tokens of (∂L/∂y_r)², L the cross-entropy summed over the tokens of a window, y the layer's output.
With A = mean over tokens of x xᵀ, the layer's inputs, half of Σ_r G_r d_r A d_rᵀ is the rise of the loss in nats a
token that an error d (r, n) of the layer's weights is expected to cause: the factored Fisher matrix of K-FAC (Martens
& Grosse, arXiv 1503.05671), here with the text's own next tokens and the diagonal of its output side alone.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from obr.data import token_windows
from obr.errors import BROKEN_FILE, ObrError, first_line
from obr.models import dtypes
from obr.models.blocks import Blocks, run_block, run_copy
from obr.models.hidden_states import HiddenStates, MemoryBudget
from obr.rotations import apply
from obr.runtime.files import atomic_write
from obr.runtime.progress import Progress

WINDOWS, LENGTH = 8, 512  # as many windows, each cut to so many tokens, are enough for means of squares
FLOOR = 1e-6  # of the mean weight: a channel that no loss was seen to feel is still one to be kept


def squared_gradients(
    blocks: Blocks, tokens: Tensor, room: MemoryBudget | None = None, progress: bool = True
) -> tuple[dict[str, Tensor], float]:
    """({"0.self_attn.q_proj": (r,) …}, loss): G of every linear layer, not normalised, and the mean loss in nats.

    One pass forward, which keeps what enters each block, and one backward, which runs each block again with
    gradients of its activations (not of its weights). At any time one block is loaded, with the graph of one window:
    0.8 GB and about 0.5 GB for a 7B model in float32, beside the ends. What enters the blocks takes blocks × b × s ×
    d × 4 bytes, 2.1 GB for a 7B model and 8 × 512 tokens; beyond `room` it lies in files.

    Args:
        blocks: of the dense model, rotated if what is to be compressed is. tokens: (b, s).

    Raises:
        ObrError: tokens that the model does not have, or gradients that are not finite.
    """
    found: dict[str, Tensor] = {}

    def take(layer: str, _window: int, gradient: Tensor) -> None:
        total = found.setdefault(layer, torch.zeros(gradient.shape[1], device=gradient.device))
        total.add_(gradient.square().sum(0))

    loss, rows = pass_back(blocks, tokens, take, room, progress)
    for name, count in rows.items():
        found.setdefault(name, torch.zeros(count, device=blocks.device))  # experts that got no tokens
    found = {name: total / tokens.numel() for name, total in found.items()}
    finite = torch.stack([values.isfinite().all() for values in found.values()]).tolist()
    for name, is_finite in zip(found, finite, strict=True):
        if not is_finite:
            raise ObrError(f"Layer {name} has gradients that are not finite; use dtype float32 or bfloat16.")
    return found, loss / tokens[:, 1:].numel()


def pass_back(
    blocks: Blocks,
    tokens: Tensor,
    take: Callable[[str, int, Tensor], None],
    room: MemoryBudget | None = None,
    progress: bool = True,
) -> tuple[float, dict[str, int]]:
    """Call `take("0.self_attn.q_proj", window, gradient (s, r))` for every layer that a window
    reaches, the last block's first. Returns the loss, summed over all tokens, and {layer: r} of all layers.

    The gradient is that of a window's summed loss by the layer's outputs, in float32. tokens: (b, s).
    """
    room = room or MemoryBudget()
    share = replace(room, megabytes=room.megabytes / (len(blocks) + 1))
    entering, arguments = _entering(blocks, tokens, share, progress)
    slopes, loss = _loss_slopes(blocks, entering.pop(), tokens.to(blocks.device))
    rows: dict[str, int] = {}
    with Progress("output gradients, backward", len(blocks), progress) as shown:
        for index in reversed(range(len(blocks))):
            block = blocks.load(index)
            linears = {f"{index}.{n}": block.get_submodule(n) for n in blocks.layout.in_block(block).linears}
            rows |= {name: len(linear.weight) for name, linear in linears.items()}
            _backward(block, linears, entering.pop(), arguments[index], slopes, take)
            shown.block()
    return loss, rows


@torch.no_grad()
def _entering(
    blocks: Blocks, tokens: Tensor, room: MemoryBudget, progress: bool
) -> tuple[list[HiddenStates], list[dict]]:
    """(what enters each block and, last, leaves the last, what each is called with besides)."""
    hidden, arguments = blocks.embed(tokens, room)
    entering = [hidden]
    with Progress("output gradients, forward", len(blocks), progress) as shown:
        for index in range(len(blocks)):
            entering.append(run_copy(blocks.load(index), entering[-1], arguments[index], room))
            shown.block()
    return entering, arguments


def _loss_slopes(blocks: Blocks, leaving: HiddenStates, tokens: Tensor) -> tuple[HiddenStates, float]:
    """(gradient of each window's summed loss by what leaves the last block, written over that; the sum of all)."""
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)  # no number yet: a GPU is waited for
    for window in range(len(leaving)):
        states = leaving[window].clone().requires_grad_()
        with torch.enable_grad():
            logits = blocks.logits(states)[0, :-1].float()
            loss = F.cross_entropy(logits, tokens[window, 1:], reduction="sum")
        leaving[window] = torch.autograd.grad(loss, states)[0]
        total += loss.detach()
    return leaving, float(total)


def _backward(
    block: nn.Module,
    linears: dict[str, nn.Module],
    entering: HiddenStates,
    arguments: dict,
    slopes: HiddenStates,
    take: Callable[[str, int, Tensor], None],
) -> None:
    """Call `take(layer, window, gradient (s, r))` for these layers; `slopes` move to what enters the block."""
    current = [0]
    hooks = [linear.register_forward_hook(partial(_watch, take, name, current)) for name, linear in linears.items()]
    try:
        for window in range(len(entering)):
            current[0] = window
            states = entering[window].clone().requires_grad_()
            with torch.enable_grad():
                out = run_block(block, states, arguments)
            slopes[window] = torch.autograd.grad(out, states, slopes[window])[0]
    finally:
        for hook in hooks:
            hook.remove()


def _watch(take: Callable, name: str, current: list[int], _module: nn.Module, _inputs: tuple, output: Tensor) -> None:
    """Call `take(name, current window, gradient (t, r))` once the gradient of the output is known."""
    window = current[0]
    output.register_hook(lambda gradient: take(name, window, gradient.reshape(-1, gradient.shape[-1]).float()))


def row_weights(gradient: Tensor) -> Tensor:
    """G (r,) as weights of a layer's rows, whose mean is 1; none is quite zero."""
    mean = gradient.mean()
    return (gradient / mean).clamp_min(FLOOR) if mean > 0 else torch.ones_like(gradient)


def gradients(
    model: Path,
    rotation: Path | None,
    tokens: Path,
    out: Path,
    *,
    nsamples: int = WINDOWS,
    seqlen: int = LENGTH,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    megabytes: float = MemoryBudget.megabytes,
) -> dict:
    """The stage: write G of every linear layer, not normalised, to the safetensors file `out`; returns its notes.

    One parameter per flag of `obr gradients`.

    tokens: file of calibration windows, of which the first `nsamples` are taken, and of each the first `seqlen`
    tokens; fewer where there are fewer, as the notes tell. megabytes: of memory for hidden states, see
    `MemoryBudget`.
    """
    windows, about = token_windows.load_tokens(tokens)
    windows = windows[:nsamples, :seqlen]
    blocks = apply.open_blocks(model, rotation, dtype, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    found, loss = squared_gradients(blocks, windows, MemoryBudget(megabytes, out.parent))
    notes = {
        "calibration": about, "windows": len(windows), "seqlen": windows.shape[1], "tokens": windows.numel(),
        "loss": loss, "device": str(blocks.target), "dtype": dtypes.name_of(blocks.dtype), "blocks": len(blocks),
    }  # fmt: skip
    tensors = {name: found[name].cpu() for name in sorted(found)}
    with atomic_write(out) as partial_file:
        save_file(tensors, partial_file, metadata={"gradients": json.dumps(notes, sort_keys=True)})
    return notes


def load(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict]:
    """({"0.self_attn.q_proj": (r,) …}, notes) as the stage wrote them. Raises ObrError if the file is broken."""
    try:
        with safe_open(path, framework="pt") as file:
            notes = json.loads(file.metadata()["gradients"])
            return {name: file.get_tensor(name).to(device) for name in file.keys()}, notes  # noqa: SIM118
    except BROKEN_FILE as error:
        raise ObrError(
            f"{path} is not a whole file of output gradients ({first_line(error)}); delete and rebuild it."
        ) from error
