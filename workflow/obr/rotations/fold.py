"""Folding orthogonal transforms and norms into the weights of a model, in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from obr.errors import ObrError
from obr.hadamard import Kronecker
from obr.layout import Dimensions, Layout


@dataclass
class Rotation:
    """A set of orthogonal transforms, by name:

    residual: R1 (d), folded on both sides of the residual stream.
    value: R2 (m), folded into each head of v_proj and, with `heads`, into o_proj.
    heads: (h), online before o_proj, mixes heads; identity on the channels of a head.
    query_key: R3 (m), online on queries and keys after RoPE.
    down: R4 (f), online before down_proj.
    """

    kind: str
    seed: int
    transforms: dict[str, Kronecker]

    def check(self, dimensions: Dimensions, what: str) -> None:
        """Raise ObrError unless every transform has the size that the model needs, and is orthogonal."""
        sizes = {
            "residual": dimensions.hidden,
            "value": dimensions.head_dim,
            "heads": dimensions.heads * dimensions.head_dim,
            "query_key": dimensions.head_dim,
            "down": dimensions.intermediate,
        }
        for name, transform in self.transforms.items():
            if transform.columns != sizes.get(name):
                raise ObrError(
                    f"{what}: transform {name!r} has size {transform.columns}, but the model needs "
                    f"{sizes.get(name)}; it was made for another model."
                )
            probe = torch.randn(4, transform.columns, generator=torch.Generator().manual_seed(0))
            lengths = transform(probe).norm(dim=1) / probe.norm(dim=1)
            if not torch.allclose(lengths, torch.ones(4), atol=1e-3):
                raise ObrError(
                    f"{what}: transform {name!r} is not orthogonal (it scales by {float(lengths[0]):.4f}); "
                    "the file is broken or is not a rotation."
                )

    @torch.no_grad()
    def fold_ends(self, model: nn.Module, layout: Layout) -> None:
        """Untie the embeddings, fold the final norm into the head, rotate embeddings and head (v, d)."""
        embed, head = model.get_submodule(layout.embed), model.get_submodule(layout.head)
        if head.weight is embed.weight:
            head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
            model.config.tie_word_embeddings = False
        fold_norm(model.get_submodule(layout.final_norm), [head])
        rotate_inputs(head, self.transforms["residual"])
        embed.weight.data = _in_double(embed.weight, self.transforms["residual"])

    @torch.no_grad()
    def fold_block(self, block: nn.Module, layout: Layout) -> None:
        """Fold norms and transforms into a wrapped block and attach the online ones."""
        linears = {g: [block.get_submodule(n) for n in names] for g, names in layout.groups.items()}
        for group, norm in layout.norms.items():
            fold_norm(block.get_submodule(norm), linears[group])
        residual, value = self.transforms["residual"], self.transforms["value"]
        for linear in linears["qkv"] + linears["up_gate"]:
            rotate_inputs(linear, residual)
        for linear in linears["o"] + linears["down"]:
            rotate_outputs(linear, residual)
        # Each head's values are rotated by R2, and o_proj undoes that and the online mixing of the heads.
        v, o, down = linears["qkv"][2], linears["o"][0], linears["down"][0]
        rotate_outputs(v, per_head(value, v.weight.shape[0]))
        rotate_inputs(o, per_head(value, o.weight.shape[1]))
        rotate_inputs(o, self.transforms["heads"])
        rotate_inputs(down, self.transforms["down"])
        o.transform, down.transform = self.transforms["heads"], self.transforms["down"]
        block.get_submodule(layout.attention).key_value_quantizer.transform = self.transforms["query_key"]


def per_head(transform: Kronecker, columns: int) -> Kronecker:
    """The transform applied to each head of `columns` channels: I ⊗ transform."""
    return Kronecker([columns // transform.columns, *transform.factors()], None)


def fold_norm(norm: nn.Module, linears: list[nn.Module]) -> None:
    """Move an RMSNorm's weight (d,) into the columns of the linear layers it feeds."""
    gain = norm.weight.double()
    for linear in linears:
        linear.weight.data = (linear.weight.double() * gain).to(linear.weight)
    norm.weight.data = torch.ones_like(norm.weight)


def rotate_inputs(linear: nn.Module, transform: Kronecker) -> None:
    """The layer now expects its input transformed: W (r, n) -> W Mᵀ."""
    linear.weight.data = _in_double(linear.weight, transform)


def rotate_outputs(linear: nn.Module, transform: Kronecker) -> None:
    """The layer now gives its output transformed: rows of W (r, n), and its bias (r,)."""
    linear.weight.data = _in_double(linear.weight.T, transform).T.contiguous()
    if linear.bias is not None:
        linear.bias.data = _in_double(linear.bias, transform)


def _in_double(x: Tensor, transform: Kronecker) -> Tensor:
    return transform(x.double()).to(x)
