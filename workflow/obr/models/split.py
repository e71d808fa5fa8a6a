"""Layers that transformers keeps fused, taken apart: one linear layer for each that the family's entry names.

A block of experts has their weights in two tensors, (experts, 2 f, d) and (experts, d, f). Apart, they have the names
that files of checkpoints use, such as `experts.3.up_proj`.
"""

import torch
from torch import Tensor, nn

from obr.models.architectures import Layout
from obr.models.tensor_files import TensorFiles


class FusedLinear(nn.Module):
    """Linear layers that read the same input; their outputs are joined as one layer's, in their order."""

    def __init__(self, parts: dict[str, nn.Linear]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """(..., all parts' rows) of x (..., n)."""
        return torch.cat([part(x) for part in self.children()], -1)


class Expert(nn.Module):
    """A gated MLP: gate and up (f, d), down (d, f)."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act_fn: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        """(t, d) of x (t, d)."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Stands in for the fused experts of transformers: each is a module of its own, named by its number.

    observer: called with what the experts read: states (t, d), and the numbers and weights (t, k) of the k experts
    that the router chose for each token.
    """

    def __init__(self, fused: nn.Module):
        super().__init__()
        self.num_experts = fused.num_experts
        self.observer = None
        for number in range(self.num_experts):
            gate, up = fused.gate_up_proj[number].chunk(2)
            self.add_module(str(number), Expert(gate, up, fused.down_proj[number], fused.act_fn))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(t, d): the weighted sum of what each token's experts put out."""
        if self.observer is not None:
            self.observer(hidden_states, top_k_index, top_k_weights)
        out = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self.children()):
            tokens, place = torch.where(top_k_index == number)
            if len(tokens):
                found = expert(hidden_states[tokens]) * top_k_weights[tokens, place, None]
                out = out.index_add(0, tokens, found.to(out.dtype))
        return out


def take_apart(block: nn.Module, layout: Layout) -> None:
    """Replace a block's fused layers by their parts, in place; what is apart already stays as it is.

    The parts are views of the fused weights.
    """
    for path, names in layout.fused.items():
        fused = block.get_submodule(path)
        if not isinstance(fused, FusedLinear):
            sizes = _rows(block, layout, names, len(fused.weight))
            weights = fused.weight.split(sizes)
            biases = [None] * len(names) if fused.bias is None else fused.bias.split(sizes)
            parts = {n: _linear(w, b) for n, w, b in zip(names, weights, biases, strict=True)}
            block.set_submodule(path, FusedLinear(parts))
    if layout.experts and _is_fused(block, layout.experts):
        block.set_submodule(layout.experts, Experts(block.get_submodule(layout.experts)))


def follow(files: TensorFiles, layout: Layout, blocks: nn.ModuleList) -> None:
    """Name a folder's tensors as blocks have them whose fused layers are apart, whichever way the files keep them.

    Parts of a fused tensor are read alone. What remains of a shape that does not fit goes to the last part.
    """
    for old, new in layout.stored:
        for name in [name for name in files.files if old in name]:
            files.rename(name, name.replace(old, new))
    for index, block in enumerate(blocks):
        prefix = f"{layout.blocks}.{index}."
        for path, names in layout.fused.items():
            ends = [0]
            for name in names[:-1]:
                ends.append(ends[-1] + len(block.get_submodule(f"{path}.{name}").weight))
            rows = [slice(*ends[i : i + 2]) if i + 1 < len(ends) else slice(ends[i], None) for i in range(len(ends))]
            for part in ("weight", "bias"):
                if f"{prefix}{path}.{part}" in files.files:
                    parts = {f"{prefix}{path}.{n}.{part}": (r,) for n, r in zip(names, rows, strict=True)}
                    files.split(f"{prefix}{path}.{part}", parts)
        if layout.experts and f"{prefix}{layout.experts}.gate_up_proj" in files.files:
            _follow_experts(files, f"{prefix}{layout.experts}")


def _follow_experts(files: TensorFiles, path: str) -> None:
    """Of one block, whose files have the experts' weights fused."""
    experts, rows, _ = files.headers[f"{path}.gate_up_proj"][0]
    halves = {"gate_proj": slice(0, rows // 2), "up_proj": slice(rows // 2, None)}
    numbers = range(experts)
    files.split(
        f"{path}.gate_up_proj", {f"{path}.{e}.{n}.weight": (e, half) for e in numbers for n, half in halves.items()}
    )
    down = f"{path}.down_proj"
    if down in files.files:
        files.split(
            down, {f"{path}.{e}.down_proj.weight": (e, slice(None)) for e in range(files.headers[down][0][0])}
        )


def take_model_apart(model: nn.Module, layout: Layout) -> None:
    """`take_apart` for all blocks of a model."""
    for block in model.get_submodule(layout.blocks):
        take_apart(block, layout)


def _is_fused(block: nn.Module, path: str) -> bool:
    try:
        return not isinstance(block.get_submodule(path), Experts)
    except AttributeError:  # a block without experts
        return False


def _rows(block: nn.Module, layout: Layout, names: tuple[str, ...], rows: int) -> list[int]:
    """Rows of each part: queries have as many as o_proj has columns, keys and values share the rest; else alike."""
    if len(names) != len(layout.groups["qkv"]):
        return [rows // len(names)] * len(names)
    queries = block.get_submodule(layout.groups["o"][0]).weight.shape[1]
    return [queries, (rows - queries) // 2, (rows - queries) // 2]


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer that has these tensors themselves, not copies."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear.eval()
