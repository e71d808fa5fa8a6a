"""Checkpoints of QuaRot's and SpinQuant's front ends: rotated models whose linear layers are wrapped.

Embeddings and head are rotated. Every linear layer, the head included, is in a wrapper that shares its parameters.
The file has them as `q_proj.weight` and `q_proj.module.weight`, or once if its writer leaves out shared tensors.
`had_K` is the Hadamard matrix of an online transform whose size is no power of two.
"""

import re
from abc import abstractmethod

import torch
from torch import Tensor, nn

from obr.checkpoints.released.reader import Part, Reader
from obr.checkpoints.released.state import StateDict
from obr.errors import ObrError
from obr.models.blocks import StreamedBlocks
from obr.models.hadamard import Kronecker, hadamard
from obr.rotations.block_transforms import BlockTransforms

EPSILON = 1e-5  # of QuaRot's norms, whatever the model's own
HADAMARD = 1e-2  # largest |H Hᵀ / K - I| of a stored Hadamard matrix (K, K)


class Wrapped(Reader):
    """The part that both layouts share."""

    online = ("down",)  # groups with a Hadamard transform in front
    buffers = re.compile(r"\.(quantizer|out_quantizer|k_quantizer)\.(maxq|scale|zero)$|rotary_emb\.inv_freq$")

    def __init__(self, state: StateDict, blocks: StreamedBlocks):
        super().__init__(state, blocks)
        sizes = blocks.dimensions
        self.keys = self._sylvester(sizes.head_dim, "head dim")
        self.inputs = self._inputs()
        blocks.config.tie_word_embeddings = blocks.model.config.tie_word_embeddings = False

    def parts(self) -> list[Part]:
        self.ends = self._ends()
        return [*self.ends.values(), *self.linear_parts(), *self.norm_parts(), *self._hadamard_parts()]

    @abstractmethod
    def norm_parts(self) -> list[Part]:
        """The norms' tensors, as the layout has them."""

    def fill_ends(self) -> None:
        model, norm = self.blocks.model, self.layout.final_norm
        for path, part in self.ends.items():
            weight = nn.Parameter(self.take(part.names).float(), requires_grad=False)
            model.get_submodule(path).weight = weight
        model.get_submodule(norm).weight = nn.Parameter(self.gain(norm), requires_grad=False)

    def gain(self, norm: str) -> Tensor:
        """Of a norm whose weight is folded into the layers that read it."""
        return torch.full((self.blocks.dimensions.hidden,), 1 - self.layout.norm_offset)

    def changes(self, index: int) -> BlockTransforms:
        return BlockTransforms(inputs=self.inputs, keys=self.keys)

    def about(self) -> dict:
        online = self.changes(0).online_parts()
        return {"kind": self.kind, "seed": None, "folded": ["residual", "value"], "online": online, "clipped": False}

    def _ends(self) -> dict[str, Part]:
        """{path: part} of embeddings and head. Where the base model ties them, one may stand for both."""
        layout, model = self.layout, self.blocks.model
        embed, head = (f"{layout.embed}.weight",), self.weight(layout.head)
        if self.blocks.config.tie_word_embeddings and not any(name in self.state for name in head):
            head = embed
        elif self.blocks.config.tie_word_embeddings and embed[0] not in self.state:
            embed = head
        shape = tuple(model.get_submodule(layout.embed).weight.shape)
        return {layout.embed: Part(embed, shape), layout.head: Part(head, shape)}

    def _hadamard_names(self, path: str) -> list[str]:
        return [f"{self.layout.blocks}.{i}.{path}.had_K" for i in range(len(self.blocks))]

    def _hadamard_parts(self) -> list[Part]:
        """Those that the file holds."""
        paths = (self.layout.groups[group][0] for group in self.online)
        names = [name for path in paths for name in self._hadamard_names(path) if name in self.state]
        return [Part((name,), self.state.shape(name), stored=False) for name in names]

    def _inputs(self) -> dict[str, Kronecker]:
        """Of each group with one. That of o_proj mixes heads."""
        sizes, found = self.blocks.dimensions, {}
        for group in self.online:
            size, rest = (sizes.heads, [sizes.head_dim]) if group == "o" else (sizes.intermediate, [])
            found[group] = Kronecker([*self._factors(self.layout.groups[group][0], size), *rest])
        return found

    def _sylvester(self, size: int, what: str) -> Kronecker:
        if size & (size - 1):
            raise ObrError(
                f"{self.state.folder}: {self.kind} needs a {what} that is a power of two, but the base model's is "
                f"{size}; give the base model that the checkpoint was made from."
            )
        return hadamard(size, torch.Generator(), what)

    def _factors(self, path: str, size: int) -> list[Tensor | None]:
        """Factors of the Hadamard transform (size) in front of a layer, with the file's own matrix if it has one.

        Raises:
            ObrError: matrices that differ between blocks, are none, or do not fit; or a size that is no power of two
                without a matrix, since there are many.
        """
        folder, names = self.state.folder, self._hadamard_names(path)
        there = [name for name in names if name in self.state]
        if not there and size & (size - 1):
            raise ObrError(
                f"{folder} has no {path}.had_K, but {size} is no power of two; which Hadamard matrix it was folded "
                "with is not known."
            )
        if not there:
            return self._sylvester(size, path).factors()
        if len(there) < len(names):
            raise ObrError(
                f"{folder} has no {next(name for name in names if name not in there)!r}; it is not a whole released "
                "checkpoint of this model."
            )
        given = self._hadamard_matrix(there[0])
        if any(not torch.equal(given, self._hadamard_matrix(name)) for name in there[1:]):
            raise ObrError(f"{folder}: the had_K of {path} differ between blocks, which no rotation here has.")
        order, rest = given.shape[0], size // given.shape[0]
        if order * rest != size or rest & (rest - 1):
            raise ObrError(f"{folder}: {path}.had_K does not divide {size} by a power of two; it is broken.")
        more = hadamard(rest, torch.Generator(), path).factors() if rest > 1 else []
        return [given / order**0.5, *more]

    def _hadamard_matrix(self, name: str) -> Tensor:
        """A stored matrix (K, K) of +1 and -1, float64."""
        matrix = self.state.read(name).double()
        error = torch.inf
        if matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]:
            product = matrix @ matrix.T / matrix.shape[0]
            error = float((product - torch.eye(len(matrix), dtype=product.dtype)).abs().max())
        if not error < HADAMARD:
            raise ObrError(
                f"{self.state.folder}: {name} {tuple(matrix.shape)} is no Hadamard matrix (off by {error:.1e}); "
                "download it again."
            )
        return matrix


class QuaRot(Wrapped):
    """QuaRot's layout (arXiv 2404.00456): norms have one element, heads are mixed in front of o_proj."""

    kind = "quarot"
    online = ("o", "down")

    def __init__(self, state: StateDict, blocks: StreamedBlocks):
        super().__init__(state, blocks)
        blocks.config.rms_norm_eps = EPSILON

    def norm_parts(self) -> list[Part]:
        """The placeholders that are there."""
        names = [f"{norm}.weight" for norm in self.norms() if f"{norm}.weight" in self.state]
        for name in names:
            if torch.Size(self.state.shape(name)).numel() > 1:
                raise ObrError(
                    f"{self.state.folder}: {name.removesuffix('.weight')} has a weight, so its model was not rotated "
                    "as QuaRot does it."
                )
        return [Part((name,), self.state.shape(name), stored=False) for name in names]


class SpinQuant(Wrapped):
    """SpinQuant's layout (arXiv 2405.16406): norms have weights of one, nothing is online in front of o_proj."""

    kind = "spinquant"

    def norm_parts(self) -> list[Part]:
        return [Part((f"{norm}.weight",), (self.blocks.dimensions.hidden,), stored=False) for norm in self.norms()]

    def gain(self, norm: str) -> Tensor:
        weight = self.take((f"{norm}.weight",))
        if not bool((weight == 1).all()):
            raise ObrError(
                f"{self.state.folder}: {norm} has a weight other than one, so its model was not rotated as SpinQuant "
                "does it."
            )
        return super().gain(norm)
