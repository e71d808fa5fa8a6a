"""Learning block by block: what enters and leaves each, and the loop that descends on one block's error.

Blocks are read from disk one at a time, and hidden states may lie in a file: a model need not fit in memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil, isfinite

import torch
from torch import Tensor, nn
from torch.func import functional_call

from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.models.architectures import Layout, kind_of, without_number
from obr.models.blocks import StreamedBlocks, run_block
from obr.models.hidden_states import HiddenStates
from obr.models.layers import set_quantizers
from obr.rotations import fold
from obr.rotations.base import Rotation
from obr.rotations.learning import straight_through
from obr.rotations.learning.run import LearningRun
from obr.runtime.progress import Progress


@dataclass
class Place:
    """A block where it is learned.

    block: wrapped and otherwise as downloaded, float32; plain: its tensors by name. arguments: that it is called
    with besides hidden states. inputs, targets: what enters and leaves it at 16 bits, a window (1, s, d) each, those
    learned from first. own: what enters the quantised block, the same as inputs unless the learner has it
    otherwise.
    """

    task: LearningRun
    index: int
    block: nn.Module
    layout: Layout
    arguments: dict
    inputs: HiddenStates
    own: HiddenStates
    targets: HiddenStates

    def __post_init__(self):
        self.plain = {name: p.detach() for name, p in self.block.named_parameters()}
        self.learned_from = range(len(self.task.windows))
        self.held_out = range(len(self.task.windows), len(self.inputs))

    def weights(self, group: str) -> dict[str, Tensor]:
        """Plain weights (r, n) of a group's layers, by path; of a kind that a norm feeds, those of all its groups."""
        paths = self.layout.of_kind(group) if group in self.layout.norms else self.layout.groups[group]
        return {path: self.plain[f"{path}.weight"] for path in paths}

    def downs(self) -> list[str]:
        """The groups of down layers: of the dense MLP, or of each expert and the shared ones."""
        return [group for group in self.layout.groups if kind_of(group) == "down"]

    def rows(self) -> dict[str, tuple[int, ...]]:
        """{role: (output rows,)} of the block's layers; of all experts together (experts, rows)."""
        found = {}
        for role, path in self.layout.roles.items():
            shared, rows = without_number(role), len(self.plain[f"{path}.weight"])
            found[shared] = (rows,) if shared == role else (self.task.dimensions.experts, rows)
        return found

    def parameters(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """A block's parameters under the names that they have in a rotation."""
        return {f"blocks.{self.index}.{name}": tensor for name, tensor in own.items()}

    def __call__(self, rotation: Rotation, states: Tensor) -> Tensor:
        """The output (b, s, d) of the folded and quantised block, with gradients on the rotation's parameters.

        Weights are clipped, and all quantised, as the task says.
        """
        recipe, changes = self.task.recipe, rotation.changes(self.index)
        new = fold.fold_block(self.plain, changes, self.layout, recipe.clip == "learned", torch.float32)
        fold.attach(self.block, changes, self.layout)
        set_quantizers(self.block, self.layout, recipe)
        straight_through.swap(self.block, straight_through.ste_range)
        for path in self.layout.linears:
            new[f"{path}.weight"] = quantised_weight(new[f"{path}.weight"], recipe)
            self._give_bias(path, new)
        with products(self.task):
            out = functional_call(self.block, new, (states,), self.arguments)
        return (out[0] if isinstance(out, tuple) else out).float()

    def _give_bias(self, path: str, new: dict[str, Tensor]) -> None:
        """Shifts need a bias, which the plain layer may lack."""
        linear = self.block.get_submodule(path)
        if linear.bias is None and f"{path}.bias" in new:
            linear.bias = nn.Parameter(torch.zeros_like(new[f"{path}.bias"]), requires_grad=False)

    def loss(self, rotation: Rotation, windows: list[int]) -> Tensor:
        """Mean squared error of the quantised block's output against the 16-bit block's."""
        states, targets = (torch.cat([of[i] for i in windows]) for of in (self.own, self.targets))
        return (self(rotation, states) - targets).square().mean()

    @torch.no_grad()
    def look(self, rotation: Rotation, step: int, loss: float | None = None) -> dict:
        """A line of the curve, with the mean loss over the held-out windows."""
        losses = [self.loss(rotation, [window]) for window in self.held_out]
        total = sum(torch.stack(losses).tolist())  # at once: a GPU is waited for
        row = {"block": self.index, "step": step, "loss": loss, "held_out": total / len(self.held_out)}
        row = {name: value for name, value in row.items() if value is not None}
        self.task.report(row)
        return row

    @torch.no_grad()
    def observe(self, observers: dict[str, Callable[[Tensor], None]]) -> None:
        """Call `observers[group]` with each (…, n) that the group's layers read in the plain block.

        The name of a kind that a norm feeds, such as up_gate, is of what the norm puts out.
        """
        norms, hooks = self.layout.norms, []
        linears = {g: self.block.get_submodule(self.layout.groups[g][0]) for g in observers if g not in norms}
        for group, linear in linears.items():
            linear.observer = observers[group]
        for kind in observers.keys() & norms:
            take = observers[kind]
            norm = self.block.get_submodule(norms[kind])
            hooks.append(norm.register_forward_hook(lambda _module, _inputs, out, take=take: take(out)))
        try:
            for window in self.learned_from:
                with products(self.task):
                    run_block(self.block, self.inputs[window], self.arguments)
        finally:
            for linear in linears.values():
                linear.observer = None
            for hook in hooks:
                hook.remove()


# What a learner does in a block: its parameters, by the names after `blocks.{i}.`, and lines of the curve.
LearnBlock = Callable[[Place], tuple[dict[str, Tensor], list[dict]]]


def learn_blocks(
    task: LearningRun, kind: type[Rotation], learn: LearnBlock, own_inputs: bool = False
) -> tuple[Rotation, list[dict]]:
    """Learn a rotation of this kind, one block after the other; finished blocks are kept for a restart.

    own_inputs: quantised blocks read what those before them put out, as in evaluation; otherwise all read the
    16-bit model's states.
    """
    source = StreamedBlocks(task.model, None, torch.float32, task.device)
    learned, note = task.kept.read() or ({}, {"block": 0, "curve": []})
    finished, curve = note["block"], note["curve"]
    if finished < len(source):
        with Progress("learning", len(source)) as shown:
            for place in _places(task, source, own_inputs, kind, learned):
                if place.index < finished:
                    shown.resume()
                else:
                    parameters, rows = learn(place)
                    learned |= {name: p.detach().cpu() for name, p in place.parameters(parameters).items()}
                    curve += rows
                    task.kept.write(learned, {"block": place.index + 1, "curve": curve})
                    shown.block()
                del place  # before the next block is loaded
    return kind(task.dimensions, learned), curve


def _places(
    task: LearningRun, source: StreamedBlocks, own_inputs: bool, kind: type[Rotation], learned: dict[str, Tensor]
) -> Iterator[Place]:
    """Every block in turn with its states; `learned` must hold a block's parameters when the next is asked for."""
    windows = torch.cat([task.windows, task.held_out])
    room = replace(task.room, megabytes=task.megabytes / (3 if own_inputs else 2))  # inputs, targets, own inputs
    inputs, arguments = source.embed(windows, room)
    targets = HiddenStates(len(inputs), inputs.shape, inputs.dtype, source.device, room)
    own = source.embed(windows, room)[0] if own_inputs else None
    for index in range(len(source)):
        place = Place(
            task, index, source.load(index), source.layout_at(index), arguments[index], inputs,
            inputs if own is None else own, targets,
        )  # fmt: skip
        with torch.no_grad(), products(task):
            for window, states in enumerate(inputs):
                targets[window] = run_block(place.block, states, arguments[index]).float()
        yield place
        if own is not None:
            rotation = _rotation_of(place, kind, learned)
            with torch.no_grad():
                for window, states in enumerate(own):
                    own[window] = place(rotation, states)
        inputs, targets = targets, inputs
        place = None


def _rotation_of(place: Place, kind: type[Rotation], learned: dict[str, Tensor]) -> Rotation:
    """What has been learned in a block, on the device where the block is."""
    own = {name: p for name, p in learned.items() if name.startswith(f"blocks.{place.index}.")}
    return kind(place.task.dimensions, own).to(place.inputs.device)


@contextmanager
def products(task: LearningRun) -> Iterator[None]:
    """Products of matrices in the task's dtype."""
    with torch.autocast(torch.device(task.device).type, task.dtype, enabled=task.dtype != torch.float32):
        yield


def quantised_weight(weight: Tensor, recipe: Recipe) -> Tensor:
    """Weight (r, n) on its rows' grids, with gradients through minmax ranges; a searched range passes them on."""
    if recipe.clip == "mse":
        return straight_through.ste_weight(weight, recipe.bits, "mse")
    return straight_through.ste_range_weight(weight, recipe.bits)


def descend(
    place: Place,
    kind: type[Rotation],
    parameters: Callable[[], dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch: int,
    factor: Callable[[float], float] = lambda done: 1.0,
) -> list[dict]:
    """Descend on a block's error; returns lines of the curve, before the first epoch and after each.

    Seven parameters: data, and the settings of the optimiser.

    parameters: makes the block's parameters of what the optimiser changes. batch: windows a step. factor: of the
    learning rates, by the part of the steps that is done. What is descended on is loss / loss.detach(), so that
    blocks of small and of large outputs take the same steps.

    Raises:
        ObrError: nothing is quantised, so that there is no error, or the error becomes infinite.
    """
    check_quantises(place.task)
    count, step = len(place.learned_from), 0
    steps, rates = epochs * ceil(count / batch), [group["lr"] for group in optimizer.param_groups]

    def rotation() -> Rotation:
        return kind(place.task.dimensions, place.parameters(parameters()))

    rows = [place.look(rotation(), 0)]
    for epoch in range(epochs):
        losses = []
        for windows in _order(count, place.task.seed, place.index, epoch).split(batch):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor(step / steps)
            loss = place.loss(rotation(), windows.tolist())
            losses.append(float(loss.detach()))
            if not isfinite(losses[-1]):
                raise ObrError(f"Block {place.index}: the loss is {losses[-1]} at step {step}; use a smaller lr.")
            optimizer.zero_grad()
            (loss / loss.detach()).backward()
            optimizer.step()
            step += 1
        rows.append(place.look(rotation(), step, sum(losses) / len(losses)))
    return rows


def check_quantises(task: LearningRun) -> None:
    """Raise ObrError if the task quantises nothing."""
    recipe = task.recipe
    parts = (recipe.activations, recipe.o_inputs or recipe.activations, recipe.queries, recipe.keys, recipe.values)
    if recipe.bits == 16 and all(part.bits == 16 for part in parts):
        raise ObrError("learn.quantise leaves everything at 16 bits, where nothing is to be learned; set its bits.")


def _order(count: int, seed: int, block: int, epoch: int) -> Tensor:
    """A random order (count,) of windows, the same whenever this epoch of this block is run."""
    generator = torch.Generator().manual_seed((seed * 10_007 + block) * 10_007 + epoch)
    return torch.randperm(count, generator=generator)


def largest_inputs(place: Place, groups: tuple[str, ...]) -> dict[str, Tensor]:
    """max|X| (n,) of each channel of what the groups read; experts without tokens are left out."""
    largest: dict[str, Tensor] = {}

    def observer(group: str) -> Callable[[Tensor], None]:
        def observe(x: Tensor) -> None:
            found = x.float().abs().flatten(0, -2).amax(0)
            largest[group] = torch.maximum(largest[group], found) if group in largest else found

        return observe

    place.observe({group: observer(group) for group in groups})
    return largest


def stacked(found: dict[str, Tensor], task: LearningRun, default: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Tensors by group or role; those of experts, such as "experts.3.down", as rows of one, "experts.down".

    default: of the name of an expert's tensor that is missing, since the expert gets no tokens.
    """
    joined = {name: tensor for name, tensor in found.items() if without_number(name) == name}
    for shared in dict.fromkeys(without_number(name) for name in found if name not in joined):
        names = [f"experts.{e}.{shared.removeprefix('experts.')}" for e in range(task.dimensions.experts)]
        joined[shared] = torch.stack([found[name] if name in found else default(name) for name in names])
    return joined
