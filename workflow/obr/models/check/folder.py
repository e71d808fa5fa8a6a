"""Model folders: tensors, shapes, dtypes and files against what config.json describes."""

import copy
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from obr.errors import ObrError, first_line
from obr.models import remote_code
from obr.models.architectures import Layout, layout_of
from obr.models.configuration import load_config
from obr.models.split import follow, take_model_apart
from obr.models.tensor_files import HEADER_DTYPES, QUANTISED, STORED, TensorFiles, check_names
from obr.runtime.gpu import taken_away

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Buffers that old files keep beside the weights and that every model computes from its configuration.
RECOMPUTED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
# Of torch.distributed.checkpoint: transformers would read these instead of the named weights.
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass
class Checked:
    """A model folder that has passed.

    config: it ties head and embedding only if they are equal. model: of that configuration, without memory, its fused
    layers apart. tensors: of the folder, named as the model has them. kinds: dtypes in which weights are stored, as
    headers name them. untied: config.json ties head and embedding, but the file has a head that differs.
    """

    config: object
    model: nn.Module
    tensors: TensorFiles
    kinds: set[str]
    untied: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The one in which weights are stored, or of several the one that holds them all: float32."""
        first, *others = (getattr(torch, HEADER_DTYPES[name]) for name in sorted(self.kinds))
        for other in others:
            first = torch.promote_types(first, other)
        return first

    @property
    def parameters(self) -> int:
        """Number of parameters, those of a tied head counted once."""
        own = set(self.model.state_dict())
        if _says_tied(self.config):
            own -= set(self.model.all_tied_weights_keys)
        return sum(prod(self.tensors.headers[name][0]) for name in own)


def check_folder(folder: Path, what: str | None = None, trust: bool | None = None, castable: bool = False) -> Checked:
    """Check a model folder; headers are read, and contents only where head and embedding may be tied.

    what: its name in messages. trust: its own code may be run; by default as `remote_code.trusted` says. castable:
    the weights are about to be cast, so they may be stored in float64.

    Raises:
        ObrError: the configuration, a file, a tensor, a shape or a dtype is not accounted for.
    """
    folder, what = Path(folder), what or str(folder)
    trust = remote_code.trusted(folder) if trust is None else trust
    config = load_config(folder, what, trust)
    tensors = TensorFiles(folder, what)
    check_beside(tensors)
    return check_against(config, tensors, trust, castable)


def check_beside(tensors: TensorFiles, known: tuple[str, ...] = ()) -> None:
    """Raise ObrError at a file beside the weights that changes what they mean, or that is read in their place.

    known: names of such files that the caller reads itself.
    """
    names = {entry.name for entry in os.scandir(tensors.directory)} - set(known)
    check_names(names, tensors.what)
    if stray := sorted(name for name in names if DISTRIBUTED.fullmatch(name)):
        raise ObrError(
            f"{tensors.what} has {stray[0]}, which transformers reads instead of {tensors.entry}; remove one."
        )


def check_against(
    config: "PreTrainedConfig", tensors: TensorFiles, trust: bool = False, castable: bool = False
) -> Checked:
    """Compare tensors with the model that a configuration describes; the parameters are those of `check_folder`.

    Raises:
        ObrError: a tensor, a shape or a dtype is not accounted for.
    """
    layout, what = layout_of(config), tensors.what
    _check_blocks(tensors, layout, config, what)
    untied = _untied(config, tensors, layout)
    if untied:
        config.tie_word_embeddings = False
    model = meta_model(config, trust, what)
    check_family(model, layout, what)
    take_model_apart(model, layout)
    follow(tensors, layout, model.get_submodule(layout.blocks))
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set() if untied or not _says_tied(config) else {f"{layout.head}.weight"}
    dtypes = HEADER_DTYPES if castable else STORED
    exact = {name for name, _ in model.named_buffers()}
    kinds = check_tensors(tensors, expected, tied, config.model_type, dtypes, exact)
    return Checked(config, model, tensors, kinds, untied)


def _check_blocks(tensors: TensorFiles, layout: Layout, config, what: str) -> None:
    """Raise ObrError unless the file has as many blocks as the configuration, before these are built."""
    prefix = f"{layout.blocks}."
    numbers = {name.removeprefix(prefix).split(".")[0] for name in tensors.files if name.startswith(prefix)}
    if numbers and len(numbers) != config.num_hidden_layers:
        raise ObrError(
            f"{what} has {len(numbers)} blocks, by config.json it should have {config.num_hidden_layers}; fetch "
            "config and weights from the same revision."
        )


def meta_model(config: "PreTrainedConfig", trust: bool = False, what: str = "the model") -> nn.Module:
    """A causal language model of this configuration with no memory behind its tensors.

    trust: code beside the configuration may be run. Raises ObrError if transformers cannot make one.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trust
            )
    except Exception as error:  # of transformers, or of the model's own code
        if taken_away(error):
            raise
        why = first_line(error) or type(error).__name__
        raise ObrError(
            f"config.json of {what} does not describe a causal language model ({why}): choose another model."
        ) from error
    return model


def with_buffers(model: nn.Module, config: "PreTrainedConfig") -> nn.Module:
    """A model without memory behind its weights, its buffers (rotary embeddings, scales) made real, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if any(True for _ in child.buffers(recurse=False)) and not list(child.parameters()):
                setattr(module, name, type(child)(config))
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:  # beside weights, as the scale of Gemma's embeddings is
                setattr(module, key, torch.empty_like(buffer, device="cpu"))
                model._init_weights(module)
    return model.eval().requires_grad_(False)


def check_family(model: nn.Module, layout: Layout, what: str) -> None:
    """Raise ObrError unless the family's modules are there; code of a model's own may call them otherwise."""
    modules, first = dict(model.named_modules()), f"{layout.blocks}.0."
    first_block = modules.get(first[:-1])
    own = layout if first_block is None or not layout.experts else layout.in_block(first_block)
    linears = [first + layout.unfused(part) for part in own.linears if ".experts." not in part] + [layout.head]
    others = [layout.embed, layout.final_norm, *(first + part for part in layout.norms.values())]
    for name in [*linears, *others]:
        if name not in modules:
            family = model.config.model_type
            raise ObrError(f"{what} has no module {name}, as {family} models have; use a native model.")
    for name in linears:
        if type(modules[name]) is not nn.Linear:
            raise ObrError(
                f"{name} of {what} is a {class_name(modules[name])}, not torch.nn.Linear; use a native model."
            )


def check_tensors(
    tensors: TensorFiles,
    expected: dict[str, list[int]],
    optional: set[str],
    kind: str,
    dtypes: Collection[str] = STORED,
    exact: set[str] = frozenset(),
) -> set[str]:
    """The dtypes in which the tensors are stored, if they are those that are expected, no more and no fewer.

    expected: {name: shape}. optional: names that may be missing. kind: of model, for messages. dtypes: that headers
    may name. exact: names of buffers, whose dtype is their own matter.
    """
    what, stored = tensors.what, tensors.headers
    missing = sorted(set(expected) - set(stored) - optional)
    if missing:
        raise ObrError(
            f"{what} lacks {len(missing)} tensors of a {kind} model ({missing[0]} first): fetch the model again, or "
            "choose one in transformers' own format."
        )
    left = sorted(name for name in set(stored) - set(expected) if not RECOMPUTED.search(name))
    if left:
        raise ObrError(
            f"{what} has {len(left)} tensors that {kind} models with its config.json do not have ({left[0]} first): "
            "correct config.json, or choose a model that is neither quantised nor extended."
        )
    for name in sorted(set(expected) & set(stored)):
        shape, dtype = stored[name]
        if shape != expected[name]:
            found, wanted = (" x ".join(map(str, sizes)) for sizes in (shape, expected[name]))
            raise ObrError(
                f"{what}: {name} is {found}, by config.json it should be {wanted}; fetch config and weights from the "
                "same revision."
            )
        if dtype not in dtypes:
            remedy = "set dtype: float32 for this model" if dtype in HEADER_DTYPES else QUANTISED
            raise ObrError(f"{what}: {name} is stored as {dtype}, not as one of {', '.join(dtypes)}; {remedy}.")
    return {stored[name][1] for name in (set(expected) - exact) & set(stored)}


def _says_tied(config) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def _untied(config, tensors: TensorFiles, layout: Layout) -> bool:
    """Whether the file has a head that differs from the embedding, although the configuration ties the two."""
    head, embed = f"{layout.head}.weight", f"{layout.embed}.weight"
    return _says_tied(config) and {head, embed} <= set(tensors.files) and not tensors.equal(head, embed)


def class_name(module: object) -> str:
    """The full name of an object's class, such as "torch.nn.modules.linear.Linear"."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
