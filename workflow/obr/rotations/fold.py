"""Folding equivalent transforms into the weights of a block or of the ends of a model.

Everything here computes new tensors from old ones and changes nothing: with gradients on a rotation's
parameters, the folded weights carry them on, so that learning and folding share one implementation.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from obr.errors import ObrError
from obr.models.architectures import KIND_OF, Layout, kind_of, prefix_of
from obr.models.hadamard import Kronecker, inverse_transposed
from obr.models.online_transforms import Range, Shift
from obr.rotations.block_transforms import BlockTransforms

END_PART = 1 << 22  # elements of embeddings or head that are rotated at a time
READS_RESIDUAL, WRITES_RESIDUAL = ("qkv", "up_gate", "latent"), ("o", "down")


@torch.no_grad()
def fold_end(
    weight: Tensor, residual: Kronecker, gain: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Embeddings or head (v, d) on a rotated residual stream, a new tensor. gain: (d,) of the norm before a head.

    Some rows are computed at a time: in float64 a large vocabulary takes more than a block of the model.
    """
    new = torch.empty_like(weight)
    step = max(1, END_PART // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = weight[first : first + step].to(dtype)
        new[first : first + step] = residual(rows if gain is None else rows * gain.to(dtype))
    return new


def fold_block(
    state: Mapping[str, Tensor],
    changes: BlockTransforms,
    layout: Layout,
    clip: bool = False,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """The block's weights, biases and norms that `changes` alters, by the names they have in `state`.

    state: the state of a plain block, `named_parameters` for one. clip: shrink weights to their learned
    range too. dtype: of the arithmetic; results have the dtype of what they replace.

    Raises:
        ObrError: key scales that norms of queries and keys do not let through.
    """
    new = {}
    for role in layout.roles:
        new |= fold_layer(state, changes, layout, role, clip, dtype)
    return new | fold_readers(state, changes, layout, dtype) | fold_norms(state, changes, layout, dtype)


def fold_layer(
    state: Mapping[str, Tensor],
    changes: BlockTransforms,
    layout: Layout,
    role: str,
    clip: bool = False,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Weight and bias of one layer as `fold_block` gives them, by name."""
    path, new = layout.roles[role], {}
    weight, bias = state[f"{path}.weight"], state.get(f"{path}.bias")
    gain, kind = None, KIND_OF[kind_of(role)]
    if changes.residual is not None and kind in layout.norms:
        gain = state[f"{layout.norms[kind]}.weight"].to(dtype) + layout.norm_offset
    wide, scale_keys = None if bias is None else bias.to(dtype), layout.key_norm is None
    folded, folded_bias = fold_linear(role, weight.to(dtype), wide, changes, gain, clip, scale_keys)
    new[f"{path}.weight"] = folded.to(weight.dtype)
    if folded_bias is not None:
        new[f"{path}.bias"] = folded_bias.to(weight.dtype)
    return new


def fold_readers(
    state: Mapping[str, Tensor], changes: BlockTransforms, layout: Layout, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Matrices that read the norms' outputs and stay at 16 bits, such as routers, as `fold_block` gives them."""
    new = {}
    for kind, paths in layout.readers.items():
        for path in paths:
            weight = state[f"{path}.weight"]
            folded = weight.to(dtype)
            if changes.residual is not None:
                folded = changes.residual(
                    folded * (state[f"{layout.norms[kind]}.weight"].to(dtype) + layout.norm_offset)
                )
            if kind in changes.norms:
                folded = folded / changes.norms[kind].to(folded)
            new[f"{path}.weight"] = folded.to(weight)
    return new


def fold_norms(
    state: Mapping[str, Tensor], changes: BlockTransforms, layout: Layout, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Gains of a block's norms as `fold_block` gives them, by name. Raises ObrError as `fold_block`."""
    new = {}
    for group, norm in layout.norms.items():
        gain = state[f"{norm}.weight"].to(dtype) + layout.norm_offset
        if changes.residual is not None:
            gain = torch.ones_like(gain)
        if group in changes.norms:
            gain = gain * changes.norms[group].to(gain)
        new[f"{norm}.weight"] = (gain - layout.norm_offset).to(state[f"{norm}.weight"].dtype)
    if changes.key_scale is not None and layout.key_norm is not None:
        new |= _fold_head_norms(state, changes.key_scale, layout, dtype)
    return new


def fold_linear(
    role: str,
    weight: Tensor,
    bias: Tensor | None,
    changes: BlockTransforms,
    gain: Tensor | None = None,
    clip: bool = False,
    scale_keys: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Weight (r, n) and bias (r,) of the layer with this role: its inputs, then its outputs.

    Seven parameters: a weight with its bias, and one transform per side.

    role: also of a group "name.kind", whose layers do what those of the kind do.
    gain: (n,) of the norm in front, if that is to be folded. scale_keys: whether key scales go into the rows
    of q and k.
    """
    weight, bias = _fold_inputs(role, weight, bias, changes, gain)
    clips, product = (changes.clips.get(role), changes.limits.get(role)), changes.products.get(prefix_of(role))
    role, kind = kind_of(role), KIND_OF[kind_of(role)]
    if clip and changes.clip_first:
        weight = clip_learned(weight, *clips)
    if changes.residual is not None and kind in WRITES_RESIDUAL:
        weight, bias = _outputs(weight, bias, changes.residual)
    if role == "v":
        if changes.value_shift is not None:
            bias = _plus(bias, -changes.value_shift.flatten())
        if changes.value is not None:
            weight, bias = _outputs(weight, bias, lambda x: per_head(x, changes.value))
    if role == "up" and product is not None:
        weight, bias = _outputs(weight, bias, lambda x: x * product.to(x))
    if role in ("q", "k") and changes.key_scale is not None and scale_keys:
        scale = changes.key_scale.to(weight)
        scale = scale if role == "k" else 1 / scale
        weight, bias = _outputs(weight, bias, lambda x: scale_heads(x, scale))
    if clip and not changes.clip_first:
        weight = clip_learned(weight, *clips)
    return weight, bias


def _fold_inputs(
    role: str, weight: Tensor, bias: Tensor | None, changes: BlockTransforms, gain: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The layer as it reads changed inputs; a shift of them goes into the bias."""
    prefix, group = prefix_of(role), KIND_OF[kind_of(role)]
    if gain is not None:
        weight = weight * gain
    if changes.residual is not None and group in READS_RESIDUAL:
        weight = changes.residual(weight)
    if group in changes.norms:
        weight = weight / changes.norms[group].to(weight)
    if group in changes.shifts:
        bias = _plus(bias, weight @ changes.shifts[group].to(weight))
    if role == "o" and changes.value_shift is not None:
        bias = _plus(bias, (scale_heads(weight, changes.value_shift)).sum(1))
    if role == "o" and changes.value is not None:
        weight = per_head(weight, inverse_transposed(changes.value))
    if kind_of(role) == "down" and prefix in changes.products:
        weight = weight / changes.products[prefix].to(weight)
    if (transform := changes.input_of(f"{prefix}{group}", weight.shape[1])) is not None:
        weight = transform.dual()(weight)
    return weight, bias


def per_head(x: Tensor, matrices: Tensor) -> Tensor:
    """x (..., heads m) @ P, head by head; matrices: (1 or k, m, m), each serving as many heads in a row."""
    matrices = matrices.to(x)
    heads = x.unflatten(-1, (len(matrices), -1, matrices.shape[-1])).movedim(-3, 0)  # (k, ..., heads a matrix, m)
    # One product a matrix. Broadcast over the leading dimensions, its gradient would exist once for each of them.
    turned = heads.flatten(1, -2) @ matrices
    return turned.view(heads.shape).movedim(0, -3).flatten(-3)


def scale_heads(x: Tensor, scale: Tensor) -> Tensor:
    """x (..., heads m) times the scale (k, m) of each head's KV head."""
    return (x.unflatten(-1, (len(scale), -1, scale.shape[-1])) * scale.to(x)[:, None]).flatten(-3)


def clip_learned(weight: Tensor, logits: tuple[Tensor, Tensor] | None, limit: Tensor | None = None) -> Tensor:
    """Weight (r, n) within its learned range.

    logits: (low, high) of (r, groups): a group lies between sigmoid(low) min and sigmoid(high) max of itself.
    limit: (r, groups), the largest magnitude.
    """
    if logits is not None:
        low, high = (torch.sigmoid(x.to(weight))[..., None] for x in logits)
        values = weight.unflatten(1, (low.shape[1], -1))
        bottom, top = values.amin(-1, keepdim=True) * low, values.amax(-1, keepdim=True) * high
        weight = torch.minimum(torch.maximum(values, bottom), top).flatten(1)
    if limit is not None:
        values, limit = weight.unflatten(1, (limit.shape[1], -1)), limit.to(weight)[..., None]
        weight = torch.minimum(torch.maximum(values, -limit), limit).flatten(1)
    return weight


def _outputs(weight: Tensor, bias: Tensor | None, transform) -> tuple[Tensor, Tensor | None]:
    """The layer with its outputs transformed: rows of the weight (r, n), and its bias (r,)."""
    return transform(weight.T).T.contiguous(), None if bias is None else transform(bias)


def _plus(bias: Tensor | None, more: Tensor) -> Tensor:
    return more if bias is None else bias + more.to(bias)


def _fold_head_norms(state: Mapping[str, Tensor], scale: Tensor, layout: Layout, dtype: torch.dtype) -> dict:
    """Key scales (k, m) in the gains of norms: (k m) of all heads together, or (m) that only equal heads can pass."""
    m = scale.shape[1]
    is_shared = len(state[f"{layout.key_norm}.weight"]) == m
    if is_shared and not torch.allclose(scale, scale[:1].expand_as(scale), rtol=1e-5):
        raise ObrError(
            "The rotation scales keys before RoPE, each KV head by its own factors, but this model normalises "
            "queries and keys with one gain for all heads; use a rotation without key scales."
        )
    new, scale = {}, scale[:1] if is_shared else scale
    for norm, factor in ((layout.key_norm, scale), (layout.query_norm, 1 / scale)):
        weight, offset = state[f"{norm}.weight"], layout.norm_offset
        gain = scale_heads(weight.to(dtype) + offset, factor.to(weight.device))
        new[f"{norm}.weight"] = (gain - offset).to(weight)
    return new


def online(changes: BlockTransforms, layout: Layout, columns: Mapping[str, int]) -> dict[str, nn.Module]:
    """The modules that stay online in a block, by the path under which a wrapped block holds them.

    columns: input channels of each layer, by path.
    """
    quantizer = f"{layout.attention}.key_value_quantizer"
    modules: dict[str, nn.Module] = {}
    for role, path in layout.roles.items():
        group = KIND_OF[kind_of(role)]
        if group in changes.shifts:
            modules[f"{path}.shift"] = Shift(changes.shifts[group])
        if (transform := changes.input_of(f"{prefix_of(role)}{group}", columns[path])) is not None:
            modules[f"{path}.transform"] = transform
        if role in changes.ranges:
            modules[f"{path}.range"] = _range(*changes.ranges[role])
    if changes.keys is not None:
        modules[f"{quantizer}.transform"] = changes.keys
    if changes.queries is not None:
        modules[f"{quantizer}.query_transform"] = changes.queries
    for role, name in (("keys", "key_range"), ("values", "value_range")):
        if role in changes.ranges:
            modules[f"{quantizer}.{name}"] = _range(*changes.ranges[role])
    return modules


def _range(low: Tensor, high: Tensor) -> Range:
    return Range(torch.sigmoid(low), torch.sigmoid(high))


def attach(block: nn.Module, changes: BlockTransforms, layout: Layout) -> None:
    """Set the online modules of a wrapped block: in float32, or float64 where the block is. Gradients pass."""
    layout = layout.in_block(block)
    weight = block.get_submodule(layout.linears[0]).weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    columns = {path: block.get_submodule(path).weight.shape[1] for path in layout.linears}
    for path, module in online(changes, layout, columns).items():
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, module.held_in(dtype, weight.device))


@torch.no_grad()
def assign(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put folded tensors into a block; a layer that had no bias gets one if there is one for it."""
    for path, tensor in tensors.items():
        parent, _, name = path.rpartition(".")
        module = block.get_submodule(parent)
        if getattr(module, name) is None:
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
        else:
            getattr(module, name).data = tensor
