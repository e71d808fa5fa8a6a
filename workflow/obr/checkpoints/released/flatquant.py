"""Checkpoints of FlatQuant's front end (Sun et al., arXiv 2410.09426): transforms beside the weights folded for them.

The residual stream is not transformed. Norms have weights, with the scales of the transforms merged. A linear layer
is in a module with its learned clips: `q_proj.linear.weight`, `q_proj.clip_factor_w_max`,
`q_proj.act_quantizer.clip_factor_a_max`. A transform is stored as its matrices and their inverse transposes. A matrix
that was learned directly is stored twice: `o_trans.linear.weight` equals `o_trans.matrix`.
"""

import re
from dataclasses import replace

import torch
from torch import Tensor, nn

from obr.checkpoints.released.reader import Part, Reader
from obr.checkpoints.released.state import StateDict
from obr.errors import ObrError
from obr.models.blocks import StreamedBlocks
from obr.models.hadamard import Kronecker
from obr.rotations import fold
from obr.rotations.base import check_parameter
from obr.rotations.block_transforms import BlockTransforms
from obr.rotations.flatquant import FlatQuant as Rotation
from obr.rotations.published_files import check_dual, flatquant_names

PAIRED = ("qkv", "up_gate", "down")  # groups with a left and a right matrix
NEEDED = (*(f"{group}.{side}" for group in PAIRED for side in ("left", "right")), "o.heads")
LINEAR = re.compile(r"(.*_trans)\.matrix")  # a matrix that is stored twice where it was learned directly


class FlatQuant(Reader):
    """FlatQuant's layout, saved after `reparameterize_model` and without `separate_vtrans`.

    Transforms, clips and ranges are the parameters of the rotation of the same name. The first block of the file
    determines which optional ones all blocks have. Weights are not clipped again.
    """

    kind = "flatquant"
    buffers = re.compile(r"\.weight_quantizer\.(maxq|scale|zero)$|rotary_emb\.inv_freq$")

    def __init__(self, state: StateDict, blocks: StreamedBlocks):
        self.rotation, self.duals = Rotation(blocks.dimensions), {}
        self.everything = self.rotation.everything()
        super().__init__(state, blocks)
        self._read_parameters()

    def weight(self, linear: str) -> tuple[str, ...]:
        return (f"{linear}.weight",) if linear == self.layout.head else (f"{linear}.linear.weight",)

    def parts(self) -> list[Part]:
        norms = [Part((f"{norm}.weight",), (self.blocks.dimensions.hidden,)) for norm in self.norms()]
        parameters = [part for index in range(len(self.blocks)) for part in self._transforms(index).values()]
        return [*self._ends().values(), *self.linear_parts(), *norms, *parameters]

    def fill_ends(self) -> None:
        model, layout = self.blocks.model, self.layout
        for path, part in self._ends().items():
            model.get_submodule(path).weight = nn.Parameter(self.take(part.names).float(), requires_grad=False)
        if self.blocks.config.tie_word_embeddings:
            model.get_submodule(layout.head).weight = model.get_submodule(layout.embed).weight
        gain = self.gain(layout.final_norm).float()
        model.get_submodule(layout.final_norm).weight = nn.Parameter(gain, requires_grad=False)

    def gain(self, norm: str) -> Tensor:
        return self.take((f"{norm}.weight",))

    def changes(self, index: int) -> BlockTransforms:
        changes = self.rotation.changes(index)
        dual = self.duals.get((index, "keys"))
        return changes if dual is None else replace(changes, queries=Kronecker.right([dual]))

    def about(self) -> dict:
        return self.rotation.about()

    def likeness(self, index: int, block: nn.Module) -> dict[str, float]:
        """Raises ObrError if v_proj was folded without vcache_trans: separate_vtrans has the same names."""
        base, changes, roles = self.blocks.load(index), self.rotation.changes(index), self.layout.roles

        def cosine(role: str, changes: BlockTransforms) -> float:
            own = block.get_submodule(roles[role]).weight
            weight, _ = fold.fold_linear(role, base.get_submodule(roles[role]).weight, None, changes, clip=True)
            return float(torch.cosine_similarity(weight.flatten(), own.flatten(), dim=0))

        found = {path: cosine(role, changes) for role, path in roles.items()}
        if changes.value is not None and cosine("v", replace(changes, value=None)) > found[roles["v"]]:
            raise ObrError(
                f"{self.state.folder}: block {index} {roles['v']} was folded without vcache_trans (separate_vtrans), "
                "which is not read; give a checkpoint that was made without that option."
            )
        return found

    def _ends(self) -> dict[str, Part]:
        """{path: part} of embeddings and head, one tensor where the base model ties them."""
        layout = self.layout
        embed, head = (f"{layout.embed}.weight",), self.weight(layout.head)
        if self.blocks.config.tie_word_embeddings:
            embed = head = (*head, *embed)
        shape = tuple(self.blocks.model.get_submodule(layout.embed).weight.shape)
        return {layout.embed: Part(embed, shape), layout.head: Part(head, shape)}

    def _transforms(self, index: int) -> dict[str, Part]:
        """{parameter: part} of a block: the needed ones, and the optional ones that the first block has."""
        files = {new: old for old, new in flatquant_names().items()}
        there = {_unit(name) for name, old in files.items() if any(n in self.state for n in self._names(0, old))}
        shapes = {name: self.everything[f"blocks.{index}.{name.removesuffix('.dual')}"].shape for name in files}
        return {
            name: Part(self._names(index, old), shapes[name], stored=False)
            for name, old in files.items()
            if _unit(name) in {*NEEDED, *there}
        }

    def _names(self, index: int, name: str) -> tuple[str, ...]:
        full = f"{self.layout.blocks}.{index}.{name}"
        free = LINEAR.fullmatch(full)
        return (f"{free[1]}.linear.weight", full) if free else (full,)

    def _read_parameters(self) -> None:
        """All transforms, checked by the names that the file gives them."""
        for index in range(len(self.blocks)):
            parts = self._transforms(index)
            for name, part in parts.items():
                tensor, what = self.take(part.names).float(), f"{self.state.folder}: {part.names[-1]}"
                if name.endswith(".dual"):
                    self.duals[index, name.removesuffix(".dual")] = tensor
                else:
                    check_parameter(tensor, self.everything[f"blocks.{index}.{name}"], what)
                    self.rotation.parameters[f"blocks.{index}.{name}"] = tensor
            for name in (name for i, name in self.duals if i == index):
                what = f"{self.state.folder}: {parts[f'{name}.dual'].names[-1]}"
                check_dual(self.rotation.parameter(index, name), self.duals[index, name], what)
        self.rotation.clip = self.rotation.has_clips()


def _unit(name: str) -> str:
    """The name that a matrix shares with its dual, and one end of a range with the other."""
    return re.sub(r"\.dual$|_(low|high)$", "", name)
