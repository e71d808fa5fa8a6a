"""Packed checkpoints: a folder with one file a block, the ends, a layer report and a manifest.

block_NNN.safetensors   packed linear layers, norms, biases, online transforms; none where the manifest refers to the
                        files of the dense model, see `referred`
ends.safetensors        embeddings, final norm, head (unless tied)
layers.csv              what became of each layer
manifest.json           recipe, calibration, sizes, versions, hashes of all files and of all they were made from
config.json             as the model came, and what tells transformers of the format
side files              tokenizer, generation settings, licence: as the model came, see `side_files`
"""

import copy
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from obr.checkpoints import referred
from obr.checkpoints.device_unpacking import unpacked_weight
from obr.checkpoints.files import (
    ENDS,
    check_files,
    read_manifest,
)
from obr.checkpoints.packing import Packed, unpack
from obr.config.recipe import Recipe
from obr.errors import BROKEN_FILE, ObrError, first_line
from obr.models import dtypes, online_transforms, remote_code
from obr.models.architectures import Layout, layout_of
from obr.models.blocks import StreamedBlocks
from obr.models.check.folder import Checked, check_tensors, meta_model
from obr.models.check.memory import is_tied
from obr.models.configuration import generation_config, load_config
from obr.models.layers import set_quantizers, wrap_block
from obr.models.split import take_model_apart
from obr.models.state import refuse_plain_saving
from obr.models.tensor_files import TensorFiles
from obr.runtime.files import atomic_write
from obr.runtime.resume import block_file


def save_block(block: nn.Module, layout: Layout, path: Path, dtype: torch.dtype) -> None:
    """Write one compressed block. Raises ObrError if a layer of it is not compressed."""
    tensors, layers, layout = {}, {}, layout.in_block(block)
    for name in layout.linears:
        linear = block.get_submodule(name)
        if linear.packed is None:
            raise ObrError(f"Layer {name} is not compressed; run obr.compress before obr.save.")
        layers[name] = linear.packed.about
        tensors |= {f"{name}.{part}": t for part, t in linear.packed.tensors.items()}
    transforms = online_transforms.specs(block)
    packed = {f"{name}.weight" for name in layout.linears}
    exact = {name for name, _ in block.named_buffers()}  # of online transforms and routers
    for name, tensor in block.state_dict().items():
        if name not in packed:
            tensors[name] = tensor.cpu() if name in exact else tensor.to("cpu", dtype)
    _write(tensors, path, {"block": json.dumps({"layers": layers, "transforms": transforms})})


def load_block(blocks: StreamedBlocks, index: int, path: Path) -> nn.Module:
    """Block `index` of a model as `save_block` wrote it, unpacked, in the model's dtype and on its device.

    Raises:
        ObrError: the file is not a whole block, or one of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["block"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except BROKEN_FILE as error:
        raise ObrError(
            f"{path} is not a whole block of a checkpoint ({first_line(error)}); compress again."
        ) from error
    return _built(blocks, index, header, tensors, str(path))


def stored_block(blocks: StreamedBlocks, index: int, directory: Path, manifest: dict) -> nn.Module:
    """Block `index` of a checkpoint as `load_block` gives it, from its own file or from the model's.

    Raises:
        ObrError: as `load_block`, or the model's files lack a tensor.
    """
    if referred.ENTRY not in manifest:
        return load_block(blocks, index, directory / block_file(index))
    header, tensors = referred.read_tensors(
        directory, manifest, blocks.skeleton, blocks.layout, index, getattr(torch, manifest["dtype"])
    )
    return _built(blocks, index, header, tensors, str(referred.folder_of(directory, manifest)))


def _built(blocks: StreamedBlocks, index: int, header: dict, tensors: dict[str, Tensor], what: str) -> nn.Module:
    """A block from the contents of its file. what: the file's name in messages."""
    block = copy.deepcopy(blocks.skeleton[index])
    wrap_block(block, blocks.layout)
    try:
        fill_block(block, blocks, header, tensors, what)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        why = f"{type(error).__name__} {first_line(error)}"
        raise ObrError(f"{what} is not a block of this model ({why}); compress the model again.") from error
    return block.to(blocks.target).requires_grad_(False)


def save_ends(model: nn.Module, layout: Layout, path: Path, dtype: torch.dtype) -> None:
    """Write embeddings, final norm and, unless it is the embedding, the head."""
    parts = [layout.embed, layout.final_norm]
    if not is_tied(model, layout):
        parts.append(layout.head)
    tensors = {f"{p}.weight": model.get_submodule(p).weight.to("cpu", dtype).contiguous() for p in parts}
    _write(tensors, path, {})


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors to a safetensors file. Raises ObrError at one that is not finite: no model is made of such."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ObrError(f"{path.name}: {name} has NaN or infinite values in {dtype}; the model is not saved.")
    with atomic_write(path) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata=metadata)


def round_ends(model: nn.Module, layout: Layout, dtype: torch.dtype) -> None:
    """Round embeddings, final norm and head to the dtype in which they are stored, in place.

    Raises:
        ObrError: they have values that this dtype cannot hold.
    """
    for part in (layout.embed, layout.final_norm, layout.head):
        module = model.get_submodule(part)
        module.weight.data = _rounded(module.weight, dtype, f"{part}.weight")


def round_rest(block: nn.Module, layout: Layout, dtype: torch.dtype) -> None:
    """Round a block's norms and biases to the dtype in which they are stored, in place.

    Raises:
        ObrError: they have values that this dtype cannot hold.
    """
    weights = {f"{name}.weight" for name in layout.in_block(block).linears}
    for name, parameter in block.named_parameters():
        if name not in weights:
            parameter.data = _rounded(parameter, dtype, name)


def _rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    rounded = tensor.to(dtype)
    if not rounded.isfinite().all() and tensor.isfinite().all():
        stored = str(dtype).removeprefix("torch.")
        raise ObrError(
            f"{name} has values beyond {stored}, in which it would be stored; load the model with obr.load_model, "
            "which keeps the dtype of its files, or from transformers with dtype=torch.bfloat16."
        )
    return rounded.to(tensor.dtype)


class CheckpointBlocks(StreamedBlocks):
    """The blocks of a packed checkpoint, read and unpacked each time they are asked for.

    recipe: whose activation, key and value settings apply; by default the checkpoint's own.
    dtype: of the computation; None for the recipe's, and without one the device's default.
    """

    def __init__(self, directory: Path, recipe: Recipe | None = None, dtype=None, device=None):
        self.manifest = read_manifest(Path(directory))
        check_files(Path(directory), self.manifest)
        own = Recipe.parse(self.manifest["recipe"])
        _check_same_weights(recipe or own, own, directory)
        self.recipe, dtype = dtypes.resolve_dtype(recipe or own, dtype)
        super().__init__(Path(directory), None, dtype, device)
        vars(self.config).pop("quantization_config", None)  # nothing that the model still needs
        if len(self) != self.manifest["blocks"]:
            raise ObrError(f"{directory} has {self.manifest['blocks']} blocks, its config {len(self)}.")
        if (stored := dtypes.name_of(self.storage_dtype)) != self.manifest.get("dtype"):
            named = self.manifest.get("dtype")
            raise ObrError(f"{directory} stores {ENDS} in {stored}, its manifest says {named}; compress it again.")

    def _checked(self) -> Checked:
        """The checkpoint's configuration and ends; blocks are checked as they are read."""
        folder, trust = self.directory, remote_code.trusted(self.directory)
        config = load_config(folder, str(folder), trust, packed=True)
        layout, model = layout_of(config), meta_model(config, trust, str(folder))
        take_model_apart(model, layout)
        parts = [layout.embed, layout.final_norm] + ([] if config.tie_word_embeddings else [layout.head])
        expected = {f"{part}.weight": list(model.get_submodule(part).weight.shape) for part in parts}
        tensors = TensorFiles(folder, names=[ENDS])
        return Checked(config, model, tensors, check_tensors(tensors, expected, set(), config.model_type))

    def whole(self) -> nn.Module:
        """The model with all blocks, unpacked, and the checkpoint's settings of `generate`."""
        model = super().whole()
        if (settings := generation_config(self.directory)) is not None:
            model.generation_config = GenerationConfig.from_dict(settings)
        return model

    def load(self, index: int) -> nn.Module:
        """Block `index`, unpacked, with quantisers if the recipe acts on it."""
        block = stored_block(self, index, self.directory, self.manifest)
        if index in self.recipe.chosen(len(self)):
            set_quantizers(block, self.layout, self.recipe)
        return block


def _check_same_weights(given: Recipe, own: Recipe, directory: Path) -> None:
    """Raise ObrError if a recipe for evaluation says of weights what the checkpoint's own recipe does not.

    A value that a recipe of its method has by default says nothing; so {"method": "dense"} switches quantisers off.
    """
    default = Recipe.parse({"method": given.method, "calibration": "given"})
    for key in ("bits", "sparsity", "pattern", "group", "rotation"):
        value, stored = getattr(given, key), getattr(own, key)
        if value not in (stored, getattr(default, key)):
            raise ObrError(
                f"The recipe's {key} is {value!r}, but the weights of {directory} were compressed with {stored!r}; "
                "a recipe for evaluation sets activations, queries, keys and values alone."
            )


def fill_block(block: nn.Module, blocks: StreamedBlocks, header: dict, tensors: dict[str, Tensor], what: str) -> None:
    """Fill a wrapped, empty block from the contents of its file, in the dtype and on the device of `blocks`.

    Online transforms stay in float32. On a GPU weights are unpacked there.

    Raises:
        ObrError: missing, unexpected or misshapen tensors.
    """
    state, dtype, device = {}, blocks.dtype, blocks.target
    exact = {name for name, _ in block.named_buffers()}
    for name in blocks.layout.in_block(block).linears:
        about, linear = header["layers"][name], block.get_submodule(name)
        names = {part: f"{name}.{part}" for part in ("codes", "values", "scale", "mask")}
        parts = {part: tensors.pop(full) for part, full in names.items() if full in tensors}
        if list(linear.weight.shape) != about["shape"]:
            raise ObrError(f"{what}: {name} is {about['shape']}, the model's is {list(linear.weight.shape)}.")
        linear.packed = Packed(about, parts)
        try:
            on_host = device.type == "cpu"  # where numpy is quicker than torch
            weight = unpack(linear.packed).weight if on_host else unpacked_weight(linear.packed, device)
            state[f"{name}.weight"] = weight.to(dtype)
        except ObrError as error:
            raise ObrError(f"{what}, {name}: {error}") from error
        if linear.bias is None and f"{name}.bias" in tensors:  # a rotation has shifted what the layer reads
            linear.bias = nn.Parameter(tensors[f"{name}.bias"], requires_grad=False)
    for name, spec in header["transforms"].items():
        parent, _, attribute = name.rpartition(".")
        setattr(block.get_submodule(parent), attribute, online_transforms.from_spec(spec, tensors, f"{name}."))
    prefixes = tuple(f"{name}." for name in header["transforms"])
    state |= {name: t.clone() for name, t in tensors.items()}  # as views they would keep the whole file in memory
    exact |= {name for name in state if name.startswith(prefixes)}
    state = {name: t if name in exact else t.to(dtype) for name, t in state.items()}
    missing, unexpected = block.load_state_dict(state, assign=True, strict=False)
    if missing or unexpected:
        raise ObrError(f"{what}: missing {missing[:3]}, unexpected {unexpected[:3]}; it is another model's.")


def load(
    directory: str | Path,
    recipe: "Recipe | dict | None" = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> nn.Module:
    """A compressed model, whole, as a transformers model: weights unpacked, quantisers and transforms in place.

    recipe: overrides the checkpoint's settings for activations, keys and values. dtype: of the computation, before
    the recipe's own.

    Raises:
        ObrError: the folder is not a whole checkpoint of this format.
    """
    recipe = Recipe.parse(recipe) if recipe is not None else None
    blocks = CheckpointBlocks(Path(directory), recipe, dtype, device)
    model = blocks.whole()
    model.obr_recipe = blocks.recipe
    refuse_plain_saving(model)
    return model
