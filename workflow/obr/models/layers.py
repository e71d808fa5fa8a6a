"""The modules that stand in for a model's own: linear layers and attention that simulate low precision."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from obr.config.quantizer import QuantizerSettings
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.models.architectures import Layout
from obr.models.fake_quant import fake_quantize
from obr.models.hadamard import Kronecker
from obr.models.online_transforms import Range, Shift
from obr.models.split import take_apart

ATTENTION = "obr"


class QuantLinear(nn.Module):
    """A linear layer behind an optional online shift and transform, and an activation quantiser.

    range: learned bounds of the quantiser, used where its settings ask for them. observer: called with each
    transformed input (..., n), before it is quantised or, if observes_quantised, after; Hessians are collected
    there, behind the transform, where the weight is. quantize: learning puts one with a gradient in its place.
    """

    quantize = staticmethod(fake_quantize)

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.shift: Shift | None = None
        self.transform: Kronecker | None = None
        self.range: Range | None = None
        self.activations = QuantizerSettings()
        self.observer = None
        self.observes_quantised = False
        self.packed = None  # the compressed layer as it is stored, once there is one

    def forward(self, x: Tensor) -> Tensor:
        """(..., r) of x (..., n): shifted, transformed, quantised, then multiplied by the weight."""
        if self.shift is not None:
            x = self.shift(x)
        if self.transform is not None:
            x = self.transform(x)
        quantised = self.quantize(x, self.activations, self.range)
        if self.observer is not None:
            self.observer(quantised if self.observes_quantised else x)
        return F.linear(quantised, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"columns={self.weight.shape[1]}, rows={self.weight.shape[0]}, activations={self.activations.bits}"


class KeyValueQuantizer(nn.Module):
    """What happens to queries, keys and values inside an attention layer.

    transform: (head dim), applied to keys after RoPE, and to queries unless they have their own in
    query_transform, the dual of one that is not orthogonal; scores are unchanged. key_range, value_range:
    learned bounds of the quantisers, used where their settings ask for them. quantize: as of QuantLinear.
    """

    quantize = staticmethod(fake_quantize)

    def __init__(self):
        super().__init__()
        self.transform: Kronecker | None = None
        self.query_transform: Kronecker | None = None
        self.key_range: Range | None = None
        self.value_range: Range | None = None
        self.queries = QuantizerSettings()
        self.keys = QuantizerSettings()
        self.values = QuantizerSettings()

    @property
    def active(self) -> bool:
        """Whether it does anything."""
        settings = (self.queries, self.keys, self.values)
        return self.transform is not None or any(part.bits < 16 for part in settings)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """query (b, h, s, m), key and value (b, k, s, m), quantised token by token over all KV heads."""
        if self.transform is not None:
            query = (self.query_transform or self.transform)(query)
            key = self.transform(key)
        query = self._quantized(query, self.queries, None)
        key = self._quantized(key, self.keys, self.key_range)
        return query, key, self._quantized(value, self.values, self.value_range)

    def _quantized(self, heads: Tensor, settings: QuantizerSettings, bounds: Range | None) -> Tensor:
        if settings.bits == 16:
            return heads
        tokens = heads.transpose(1, 2)
        return self.quantize(tokens.flatten(2), settings, bounds).view_as(tokens).transpose(1, 2)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: quantise, then scaled dot-product attention."""
    quantizer = getattr(module, "key_value_quantizer", None)
    if quantizer is not None:
        query, key, value = quantizer(query, key, value)
    if (observer := getattr(module, "attention_observer", None)) is not None:
        observer(query, key, mask, kwargs)
    if (softcap := kwargs.get("softcap")) is not None:
        return _softcapped(query * (kwargs["scaling"] / softcap), key, value, mask, softcap), None
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def _softcapped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, softcap: float) -> Tensor:
    """(b, s, h, m): attention whose scores are bounded by `softcap` through tanh, as in Gemma 2.

    query: divided by the bound.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(groups, dim=1) for heads in (key, value))
    scores = softcap * torch.tanh(query @ key.mT)
    if mask is None:  # the mask of a single sequence without padding
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        mask = ones.tril(scores.shape[-1] - scores.shape[-2])
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def wrap_block(block: nn.Module, layout: Layout) -> None:
    """Replace the block's linear layers by QuantLinear and give its attention a KeyValueQuantizer, in place.

    Fused layers and experts are taken apart first. Nothing is computed differently until a transform or a quantiser
    is set. Wrapping twice does no harm.
    """
    take_apart(block, layout)
    for name in layout.in_block(block).linears:
        linear = block.get_submodule(name)
        if not isinstance(linear, QuantLinear):
            block.set_submodule(name, QuantLinear(linear))
    module = block.get_submodule(layout.attention)
    if not hasattr(module, "key_value_quantizer"):
        module.key_value_quantizer = KeyValueQuantizer()


def set_quantizers(block: nn.Module, layout: Layout, recipe: Recipe) -> None:
    """Switch on the recipe's quantisation of activations, queries, keys and values in a wrapped block.

    Sets the precision of online transforms as well: the recipe's `online`, at least float32 for queries and keys.

    Raises:
        ObrError: a group size that does not divide the channels it groups, or a learned range that is not there.
    """
    layout = layout.in_block(block)
    for path, settings in quantizer_settings(block, layout, recipe).items():
        module, _, name = path.rpartition(".")
        setattr(block.get_submodule(module), name, settings)
    for name in layout.linears:
        block.get_submodule(name).observes_quantised = recipe.hessian_inputs == "quantised"
    for module in block.modules():
        if isinstance(module, Kronecker):
            module.precision = None if recipe.online == "model" else getattr(torch, recipe.online)
    for module in block.get_submodule(layout.attention).key_value_quantizer.modules():
        if isinstance(module, Kronecker):
            module.precision = module.precision or torch.float32  # of queries and keys


def quantizer_settings(block: nn.Module, layout: Layout, recipe: Recipe) -> dict[str, QuantizerSettings]:
    """{path of the attribute in a wrapped block: settings} of the recipe's quantisers.

    Raises:
        ObrError: as `set_quantizers`; keys or values are quantised where a latent vector is cached.
    """
    layout, found = layout.in_block(block), {}
    attention = block.get_submodule(layout.attention)
    m = getattr(attention, layout.head_dim)
    for name in layout.linears:
        linear, settings = block.get_submodule(name), recipe.activations
        if recipe.o_inputs is not None and name in layout.groups["o"]:
            settings = recipe.o_inputs
        if recipe.int8_down_proj and name in layout.of_kind("down") and settings.bits < 8:
            settings = replace(settings, bits=8)
        width, what = linear.weight.shape[1], f"the inputs of {name}"
        found[f"{name}.activations"] = _fitted(settings, width, m, linear.range, what)
    if layout.latent:
        _refuse_latent(recipe)
        return found
    place = f"{layout.attention}.key_value_quantizer"
    if (quantizer := getattr(attention, "key_value_quantizer", None)) is None:
        raise ObrError(f"The model has lost its {place}, which quantises keys and values; load the model again.")
    queries, channels = (block.get_submodule(layout.groups["qkv"][i]).weight.shape[0] for i in (0, 2))
    found[f"{place}.queries"] = _fitted(recipe.queries, queries, m, None, "the queries of a token")
    found[f"{place}.keys"] = _fitted(recipe.keys, channels, m, quantizer.key_range, "the keys of a token")
    found[f"{place}.values"] = _fitted(recipe.values, channels, m, quantizer.value_range, "the values of a token")
    return found


def _refuse_latent(recipe: Recipe) -> None:
    """Raise ObrError at quantised queries, keys or values of attention that caches a latent vector instead."""
    for name in ("queries", "keys", "values"):
        if (bits := getattr(recipe, name).bits) < 16:
            raise ObrError(
                f"The recipe has {name} at {bits} bits, but this model's attention caches a latent vector instead of "
                f"keys and values; set {name} to 16 bits."
            )


def _fitted(
    settings: QuantizerSettings, channels: int, head_dim: int, bounds: Range | None, what: str
) -> QuantizerSettings:
    """The settings with a group size in channels. Raises ObrError if they do not fit."""
    if settings.bits == 16:
        return settings
    if settings.clip_ratio == "learned" and bounds is None:
        raise ObrError(f"clip_ratio learned: the rotation has learned no range for {what}; use a number.")
    group = head_dim if settings.group_size == "head" else settings.group_size
    if group and channels % group:
        raise ObrError(
            f"group_size {group} does not divide {what}, {channels} channels; "
            "choose one that does, or null for one scale a token."
        )
    return replace(settings, group_size=group)
