"""What every kind of rotation is: parameters and fixed transforms, and how they change a model."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from obr.errors import ObrError
from obr.models.architectures import Dimensions, Layout, kind_of, prefix_of, without_number
from obr.models.hadamard import Kronecker
from obr.rotations import fold
from obr.rotations.block_transforms import BlockTransforms

ORTHOGONALITY = 1e-4  # largest |RᵀR - I| of a published rotation, learned in float32

ENDS = ("low", "high")
TIED = 1e-5  # relative difference up to which two scales count as one


@dataclass(frozen=True)
class Parameter:
    """What a parameter must be.

    shape: None stands for any size. must: orthogonal, invertible, scale (no zeros), or finite, as all must be.
    """

    shape: tuple[int | None, ...]
    must: str = "finite"


class Rotation(ABC):
    """Equivalent transforms of one model; each kind is a subclass.

    Args:
        dimensions: of the model. parameters: learned tensors by name; those of block i begin with `blocks.{i}.`.
        One of all experts of a block, such as `experts.up.limit`, has a row for each of them.
        transforms: fixed ones, shared by all blocks. seed: that it was drawn from, None if learned. options:
        plain data of the kind.

    clip: whether folds also shrink weights to the ranges that the rotation has learned for them. Only this
    makes a 16-bit model compute something else.
    """

    kind = ""

    def __init__(
        self,
        dimensions: Dimensions,
        parameters: dict[str, Tensor] | None = None,
        transforms: dict[str, Kronecker] | None = None,
        seed: int | None = None,
        options: dict | None = None,
    ):
        self.dimensions = dimensions
        self.parameters, self.transforms = parameters or {}, transforms or {}
        self.seed, self.options = seed, options or {}
        self.clip = False

    @classmethod
    @abstractmethod
    def draw(cls, dimensions: Dimensions, seed: int = 0) -> "Rotation":
        """Random valid parameters for a model of these sizes; the same for the same seed."""

    def expected(self) -> dict[str, Parameter]:
        """The parameters that there must be, no more and no fewer."""
        return {}

    def sizes(self) -> dict[str, int]:
        """Sizes of the fixed transforms that there must be."""
        return {}

    def residual(self) -> Kronecker | None:
        """R1 (d), if the kind rotates the residual stream."""
        return None

    @abstractmethod
    def changes(self, index: int) -> BlockTransforms:
        """What becomes of block `index`, as a differentiable function of `parameters`."""

    def parameter(self, index: int, name: str) -> Tensor | None:
        """A parameter of a block, None if this rotation has none of that name; "experts.3.…": one expert's row."""
        shared = without_number(name)
        tensor = self.parameters.get(f"blocks.{index}.{shared}")
        return tensor if tensor is None or shared == name else tensor[int(name.split(".")[1])]

    def present(self, everything: dict[str, Parameter], needed: tuple[str, ...] = ()) -> dict[str, Parameter]:
        """Of all parameters that a kind may have, those that are needed and those that there must be besides.

        Blocks are alike that have the same MLPs, dense or with experts: they have what the first of them has. An MLP
        that a block has nothing of needs nothing.
        """
        own: dict[str, set[str]] = {}
        for name in self.parameters:
            if name.startswith("blocks."):
                own.setdefault(name.split(".")[1], set()).add(name.split(".", 2)[2])
        alike: dict[frozenset[str], set[str]] = {}
        wanted = {}
        for index in map(str, range(self.dimensions.blocks)):
            mlps = frozenset(map(_mlp_of, own.get(index, ()))) - {None}
            there = {name for name in needed if not mlps or _mlp_of(name) in {None, *mlps}}
            wanted[index] = there | alike.setdefault(mlps, own.get(index, set()))
        return {n: p for n, p in everything.items() if n.split(".", 2)[2] in wanted[n.split(".")[1]]}

    def has_clips(self) -> bool:
        """Whether it has learned how far to shrink weights."""
        blocks = map(self.changes, range(self.dimensions.blocks))
        return any(changes.clips or changes.limits for changes in blocks)

    def to(self, device: "torch.device | str") -> "Rotation":
        """Itself, its tensors moved to a device."""
        self.parameters = {name: tensor.to(device) for name, tensor in self.parameters.items()}
        for transform in self.transforms.values():
            transform.to(device)
        return self

    @torch.no_grad()
    def fold_ends(self, model: nn.Module, layout: Layout) -> None:
        """Untie the embeddings, fold the final norm into the head, rotate embeddings and head (v, d), in place.

        Kinds that leave the residual stream as it is change nothing.
        """
        residual = self.residual()
        if residual is None:
            return
        embed, head, norm = (model.get_submodule(n) for n in (layout.embed, layout.head, layout.final_norm))
        folded = fold.fold_end(head.weight, residual, norm.weight + layout.norm_offset)
        if head.weight is embed.weight:
            head.weight = nn.Parameter(folded, requires_grad=False)
            model.config.tie_word_embeddings = False
        head.weight.data = folded
        embed.weight.data = fold.fold_end(embed.weight, residual)
        norm.weight.data = torch.full_like(norm.weight, 1 - layout.norm_offset)

    @torch.no_grad()
    def fold_block(self, block: nn.Module, index: int, layout: Layout) -> None:
        """Fold the transforms into wrapped block `index` and attach the online ones, in place."""
        changes, layout = self.changes(index), layout.in_block(block)
        state = dict(block.named_parameters())
        for role in layout.roles:  # one after the other: folded weights of all would take the block's memory again
            fold.assign(block, fold.fold_layer(state, changes, layout, role, self.clip))
        fold.assign(block, fold.fold_readers(state, changes, layout) | fold.fold_norms(state, changes, layout))
        fold.attach(block, changes, layout)

    def about(self) -> dict:
        """What a manifest says of it: kind, seed, what is in the weights, what stays online, and the options.

        key_scale_untied: by how much key scales differ within a pair of channels that RoPE turns together, if
        they do: to this extent the 16-bit model is not what it was.
        """
        parts = {"folded": BlockTransforms.folded_parts, "online": BlockTransforms.online_parts}
        blocks = [self.changes(index) for index in range(self.dimensions.blocks)]  # some have experts, others not
        about = {name: list(dict.fromkeys(p for block in blocks for p in of(block))) for name, of in parts.items()}
        about["clipped"] = self.clip
        rotary = self.dimensions.rotary or self.dimensions.head_dim
        untied = max(_untied(block.key_scale, rotary) for block in blocks)
        drift = {"key_scale_untied": untied} if untied > TIED else {}
        return {"kind": self.kind, "seed": self.seed} | about | drift | self.options

    def check(self, what: str) -> None:
        """Raise ObrError unless all parts are there, and each is what it must be for a model of these sizes."""
        self._check_blocks(what)
        expected, sizes = self.expected(), self.sizes()
        _check_names(set(self.parameters), set(expected), f"{what}: the {self.kind} rotation")
        for name, parameter in expected.items():
            check_parameter(self.parameters[name], parameter, f"{what}: {name}")
        _check_names(set(self.transforms), set(sizes), f"{what}: the {self.kind} rotation")
        for name, size in sizes.items():
            _check_transform(self.transforms[name], size, f"{what}: transform {name!r}")

    def _check_blocks(self, what: str) -> None:
        blocks = {int(name.split(".")[1]) for name in self.parameters if name.startswith("blocks.")}
        if blocks and blocks != set(range(self.dimensions.blocks)):
            raise ObrError(
                f"{what} is for {max(blocks) + 1} blocks ({len(blocks)} are in it), but the model has "
                f"{self.dimensions.blocks}; it was made for another model."
            )


def _mlp_of(name: str) -> str | None:
    """Which MLP a parameter is of: "experts", "shared", "" for the dense one; None for what is no MLP's own."""
    first, _, rest = name.partition(".")
    if first in ("experts", "shared"):
        return first
    return "" if first in ("up", "gate", "down") and rest else None


def clip_parameters(dimensions: Dimensions, groups: int | None) -> dict[str, Parameter]:
    """{role}.clip_low and {role}.clip_high (r, groups) of every linear layer; groups None: any number."""
    rows = dimensions.row_shapes()
    return {f"{role}.clip_{end}": Parameter((*rows[role], groups)) for role in rows for end in ENDS}


def range_parameters(dimensions: Dimensions) -> dict[str, Parameter]:
    """{role}.range_low and {role}.range_high (1,) of every activation quantiser."""
    numbers = {role: shape[:-1] for role, shape in dimensions.row_shapes().items()}
    numbers |= {} if dimensions.latent else {"keys": (), "values": ()}
    return {f"{role}.range_{end}": Parameter((*number, 1)) for role, number in numbers.items() for end in ENDS}


def pairs(rotation: Rotation, index: int, what: str) -> dict[str, tuple[Tensor, Tensor]]:
    """{role: (low, high)} of a block's "clip" or "range" parameters."""
    found = {}
    for role in (*rotation.dimensions.roles(), "keys", "values"):
        low, high = (rotation.parameter(index, f"{role}.{what}_{end}") for end in ENDS)
        if low is not None:
            found[role] = (low, high)
    return found


def products(rotation: Rotation, index: int, name: str) -> dict[str, Tensor]:
    """{what precedes "up" in a role: the parameter (f,) of this name} of each MLP of a block that has one."""
    prefixes = [prefix_of(role) for role in rotation.dimensions.roles() if kind_of(role) == "up"]
    found = {prefix: rotation.parameter(index, f"{prefix}{name}") for prefix in prefixes}
    return {prefix: tensor for prefix, tensor in found.items() if tensor is not None}


def _untied(scale: Tensor | None, rotary: int) -> float:
    """Largest relative difference of key scales (k, m) within a RoPE pair, channels i and i + r/2 of the first r."""
    if scale is None:
        return 0.0
    first, second = scale[:, :rotary].detach().chunk(2, dim=1)
    return float((second / first - 1).abs().max())


def _check_names(there: set[str], expected: set[str], what: str) -> None:
    if there != expected:
        missing, unexpected = sorted(expected - there), sorted(there - expected)
        raise ObrError(f"{what} lacks {missing[:3]} and has {unexpected[:3]} too many; it is another model's.")


def check_parameter(tensor: Tensor, parameter: Parameter, what: str) -> None:
    """Raise ObrError unless a tensor is what a parameter must be. what: its name in messages."""
    sizes = zip(tensor.shape, parameter.shape, strict=False)
    if tensor.ndim != len(parameter.shape) or any(e not in (None, n) for n, e in sizes):
        raise ObrError(
            f"{what} has shape {tuple(tensor.shape)}, but the model needs {parameter.shape}; "
            "it was made for another model."
        )
    if not tensor.isfinite().all():
        raise ObrError(f"{what} has values that are not finite; the file is broken.")
    if parameter.must == "scale" and not (tensor != 0).all():
        raise ObrError(f"{what} is a scale with zeros in it, which nothing undoes; the file is broken.")
    if parameter.must == "orthogonal":
        wide = tensor.double()
        error = float((wide.mT @ wide - torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)).abs().max())
        if error > ORTHOGONALITY:
            raise ObrError(f"{what} is not orthogonal (RᵀR is {error:.1e} off); the file is broken or no rotation.")
    if parameter.must == "invertible":
        ratio = float(torch.linalg.cond(tensor.double()).max())
        if not ratio < 1e8:
            raise ObrError(f"{what} has condition number {ratio:.1e} and cannot be undone; the file is broken.")


def _check_transform(transform: Kronecker, size: int, what: str) -> None:
    if transform.columns != size:
        raise ObrError(
            f"{what} has size {transform.columns}, but the model needs {size}; it was made for another model."
        )
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, size, generator=generator, dtype=torch.float64).to(transform.device)
    lengths = transform(probe).norm(dim=1) / probe.norm(dim=1)
    if not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-3):
        raise ObrError(
            f"{what} is not orthogonal (it scales by {float(lengths[0]):.4f}); "
            "the file is broken or is not a rotation."
        )
