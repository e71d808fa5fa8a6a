"""Packed checkpoints: a folder with one file a block, the ends, a layer report and a manifest.

block_NNN.safetensors   packed linear layers, norms, biases, online transforms
ends.safetensors        embeddings, final norm, head (unless tied)
layers.csv              what became of each layer
manifest.json           recipe, calibration, sizes, versions, hashes of all files and of all they were made from
config.json             as the model came, and what tells transformers of the format
side files              tokenizer, generation settings, licence: as the model came, see `sidefiles`
"""

import copy
import csv
import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from obr import dtypes, fetch, foreign, online
from obr.checkpoint_files import (
    ENDS,
    FORMAT,
    check_files,
    check_no_strays,
    check_replaceable,
    read_manifest,
    remove_outdated,
)
from obr.errors import BROKEN_FILE, ObrError, first_line
from obr.files import become, flush, whole, whole_folder, write_json
from obr.layout import Layout, layout_of
from obr.model import Blocks, StreamedBlocks, block_file
from obr.model_check import Checked, check_tensors, is_tied, meta_model
from obr.model_config import generation_config, load_config
from obr.model_saving import check_before_saving, check_block_as_compressed, check_stored
from obr.model_state import refuse_plain_saving
from obr.modules import QuantLinear, set_quantizers, wrap_block
from obr.packing import Packed, pack, unpack
from obr.provenance import software, versions
from obr.recipe import Recipe
from obr.restoration import Restored
from obr.resume import Unfinished
from obr.sidefiles import GENERATION, copy_side_files, side_files
from obr.unchanged import ReadOnlyBlocks
from obr.weights import TensorFiles


@dataclass
class LayerReport:
    """One row of layers.csv."""

    block: int
    layer: str
    rows: int
    columns: int
    bits: int
    pattern: str
    sparsity: float
    zeros: float
    relative_error: float
    damp: float
    seconds: float
    packed_bytes: int
    flags: str
    held_out_error: float = float("nan")

    @property
    def compressed(self) -> bool:
        """Not of a block that the recipe leaves alone."""
        return self.bits < 16 or self.sparsity > 0

    def noted(self) -> dict:
        """For JSON, which has no NaN: an error that was not measured is None."""
        return {key: None if value != value else value for key, value in asdict(self).items()}

    @classmethod
    def of(cls, noted: dict) -> "LayerReport":
        """What `noted` made a dictionary of."""
        return cls(**{key: float("nan") if value is None else value for key, value in noted.items()})


@dataclass
class Report:
    """What a compression did; becomes the manifest.

    dtype: in which what has 16 bits is stored. computed_in: the dtype of the passes; None where nothing is computed.
    allocation: what it was told to do layer by layer. slopes: mean squares of the outputs' gradients by layer, if
    rows are weighed by them; not in the manifest. released: what was verified of a checkpoint that others made.
    processors: that computed, as `processor.about` has them, each with the numbers of its `blocks`.
    """

    recipe: Recipe
    dtype: torch.dtype
    computed_in: torch.dtype | None = None
    calibration: dict | None = None
    rotation: dict | None = None
    source: dict | None = None
    allocation: dict | None = None
    slopes: dict[str, Tensor] | None = None
    released: dict | None = None
    layers: list[LayerReport] = field(default_factory=list)
    seconds: float = 0.0
    device: str = "cpu"
    processors: list[dict] = field(default_factory=list)

    def made_by(self, processor: dict, index: int) -> None:
        """Note which processor compressed a block."""
        for known in self.processors:
            if known == processor | {"blocks": known["blocks"]}:
                known["blocks"].append(index)
                return
        self.processors.append(processor | {"blocks": [index]})


def store(linear: QuantLinear, restored: Restored, dtype: torch.dtype) -> None:
    """Put a compressed layer into its module, exactly as it will be read back."""
    linear.packed = pack(restored, dtype)
    linear.weight.data = unpack(linear.packed).weight.to(linear.weight)


def save_block(block: nn.Module, layout: Layout, path: Path, dtype: torch.dtype) -> None:
    """Write one compressed block. Raises ObrError if a layer of it is not compressed."""
    tensors, layers = {}, {}
    for name in layout.linears:
        linear = block.get_submodule(name)
        if linear.packed is None:
            raise ObrError(f"Layer {name} is not compressed; run obr.compress before obr.save.")
        layers[name] = linear.packed.about
        tensors |= {f"{name}.{part}": t for part, t in linear.packed.tensors.items()}
    transforms = online.specs(block)
    prefixes = tuple(f"{name}." for name in transforms)
    packed = {f"{name}.weight" for name in layout.linears}
    for name, tensor in block.state_dict().items():
        if name not in packed:
            tensors[name] = tensor.cpu() if name.startswith(prefixes) else tensor.to("cpu", dtype)
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
    block = copy.deepcopy(blocks.model.get_submodule(blocks.layout.blocks)[index])
    wrap_block(block, blocks.layout)
    try:
        fill_block(block, blocks.layout, header, tensors, str(path), blocks.dtype)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        why = f"{type(error).__name__} {first_line(error)}"
        raise ObrError(f"{path} is not a block of this model ({why}); compress the model again.") from error
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
    with whole(path) as partial:
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
    weights = {f"{name}.weight" for name in layout.linears}
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
        self.recipe, dtype = dtypes.settled(recipe or Recipe.parse(self.manifest["recipe"]), dtype)
        super().__init__(Path(directory), None, dtype, device)
        vars(self.config).pop("quantization_config", None)  # nothing that the model still needs
        if len(self) != self.manifest["blocks"]:
            raise ObrError(f"{directory} has {self.manifest['blocks']} blocks, its config {len(self)}.")
        if (stored := dtypes.name_of(self.storage_dtype)) != self.manifest.get("dtype"):
            named = self.manifest.get("dtype")
            raise ObrError(f"{directory} stores {ENDS} in {stored}, its manifest says {named}; compress it again.")

    def _checked(self) -> Checked:
        """The checkpoint's configuration and ends; blocks are checked as they are read."""
        folder, trust = self.directory, foreign.trusted(self.directory)
        config = load_config(folder, str(folder), trust, packed=True)
        layout, model = layout_of(config), meta_model(config, trust, str(folder))
        parts = [layout.embed, layout.final_norm] + ([] if config.tie_word_embeddings else [layout.head])
        expected = {f"{part}.weight": list(model.get_submodule(part).weight.shape) for part in parts}
        tensors = TensorFiles(folder, names=[ENDS])
        return Checked(config, model, tensors, check_tensors(tensors, expected, set(), config.model_type))

    def whole(self) -> nn.Module:
        model = super().whole()
        if (settings := generation_config(self.directory)) is not None:
            model.generation_config = GenerationConfig.from_dict(settings)
        return model

    def load(self, index: int) -> nn.Module:
        block = load_block(self, index, self.directory / block_file(index))
        if index in self.recipe.chosen(len(self)):
            set_quantizers(block, self.layout, self.recipe)
        return block


def fill_block(
    block: nn.Module, layout: Layout, header: dict, tensors: dict[str, Tensor], what: str, dtype: torch.dtype
) -> None:
    """Fill a wrapped, empty block from the contents of its file, in `dtype`; online transforms stay in float32.

    Raises:
        ObrError: missing, unexpected or misshapen tensors.
    """
    state = {}
    for name in layout.linears:
        about, linear = header["layers"][name], block.get_submodule(name)
        names = {part: f"{name}.{part}" for part in ("codes", "values", "scale", "mask")}
        parts = {part: tensors.pop(full) for part, full in names.items() if full in tensors}
        if list(linear.weight.shape) != about["shape"]:
            raise ObrError(f"{what}: {name} is {about['shape']}, the model's is {list(linear.weight.shape)}.")
        linear.packed = Packed(about, parts)
        try:
            state[f"{name}.weight"] = unpack(linear.packed).weight
        except ObrError as error:
            raise ObrError(f"{what}, {name}: {error}") from error
        if linear.bias is None and f"{name}.bias" in tensors:  # a rotation has shifted what the layer reads
            linear.bias = nn.Parameter(tensors[f"{name}.bias"], requires_grad=False)
    for name, spec in header["transforms"].items():
        parent, _, attribute = name.rpartition(".")
        setattr(block.get_submodule(parent), attribute, online.from_spec(spec, tensors, f"{name}."))
    prefixes = tuple(f"{name}." for name in header["transforms"])
    state |= {name: t.clone() for name, t in tensors.items()}  # as views they would keep the whole file in memory
    state = {name: t if name.startswith(prefixes) else t.to(dtype) for name, t in state.items()}
    missing, unexpected = block.load_state_dict(state, assign=True, strict=False)
    if missing or unexpected:
        raise ObrError(f"{what}: missing {missing[:3]}, unexpected {unexpected[:3]}; it is another model's.")


def load(directory: str | Path, recipe: "Recipe | dict | None" = None, dtype=None, device: str | None = None):
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


class Writer:
    """Writes a checkpoint block by block, so that an interrupted run can go on.

    Args:
        directory: made if need be. dtype: of everything kept at 16 bits.
        run: what decides the blocks, as plain data, see `Unfinished`.

    Raises:
        ObrError: the unfinished blocks there are of another run; the folder holds files of something else.
    """

    def __init__(self, directory: Path, blocks: Blocks, dtype: torch.dtype, run: dict | None = None):
        self.directory, self.blocks, self.dtype, self.run = Path(directory), blocks, dtype, run
        check_no_strays(self.directory)
        self.unfinished = Unfinished(self.directory, run)

    def finished(self, index: int) -> tuple[list[LayerReport], float, dict] | None:
        """The report of a block that an interrupted run has finished, its seconds and its processor; None if it has
        not."""
        note = self.unfinished.note(index)
        if not note:
            return None
        return [LayerReport.of(row) for row in note["layers"]], note["seconds"], note["processor"]

    def load(self, index: int) -> nn.Module:
        """A finished block."""
        return load_block(self.blocks, index, self.unfinished.file(index))

    def block(
        self,
        index: int,
        block: nn.Module,
        rows: list[LayerReport],
        seconds: float = 0.0,
        processor: dict | None = None,
    ) -> None:
        """Write a block, compressed in so many seconds by a processor."""
        note = {"layers": [row.noted() for row in rows], "seconds": seconds, "processor": processor}
        self.unfinished.keep(index, lambda path: save_block(block, self.blocks.layout, path, self.dtype), note)

    def finish(self, report: Report, tokenizer_from: Path | None = None) -> dict:
        """Write the ends, layers.csv, the configuration and, last, the manifest; returns the manifest."""
        blocks = self.blocks
        (self.directory / "manifest.json").unlink(missing_ok=True)  # of an older checkpoint, of which parts go now
        self.unfinished.move(len(blocks))
        if self.run is not None:  # an older checkpoint may lie there; obr.save writes into a new folder
            remove_outdated(self.directory, len(blocks))
        save_ends(blocks.model, blocks.layout, self.directory / ENDS, self.dtype)
        config = copy.deepcopy(blocks.config)
        config.dtype = self.dtype
        config.tie_word_embeddings = is_tied(blocks.model, blocks.layout)
        config.quantization_config = {"quant_method": "obr", "format": FORMAT}  # see `pretrained`
        config.save_pretrained(self.directory)
        if tokenizer_from:
            copy_side_files(tokenizer_from, self.directory)
            if not (self.directory / GENERATION).exists() and (found := generation_config(tokenizer_from)):
                write_json(found, self.directory / GENERATION)
        if tokenizer_from and foreign.trusted(tokenizer_from):
            for path in Path(tokenizer_from).glob("*.py"):
                shutil.copy2(path, self.directory)
        with (
            whole(self.directory / "layers.csv") as partial,
            open(partial, "w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(file, LayerReport.__dataclass_fields__)
            writer.writeheader()
            writer.writerows(asdict(layer) for layer in report.layers)
        manifest = self._manifest(report) | {"files": self._hashes()}
        write_json(manifest, self.directory / "manifest.json")
        self.unfinished.remove()
        return manifest

    def _hashes(self) -> dict[str, str]:
        """sha256 of every file, once they are on the disk."""
        names = {path.name for path in self.directory.iterdir() if path.is_file() and not path.match("*.lock")}
        names = sorted(names | set(side_files(self.directory)))
        for name in names:
            flush(self.directory / name)
        return {name: fetch.sha256_of(self.directory / name) for name in names}

    def _manifest(self, report: Report) -> dict:
        layers = report.layers
        weights = sum(layer.rows * layer.columns for layer in layers)
        packed = sum(layer.packed_bytes for layer in layers)
        theoretical = sum(layer.rows * layer.columns * _recipe_of(layer, report).bits_per_weight for layer in layers)
        return {
            "format": FORMAT,
            "recipe": report.recipe.to_dict(),
            "blocks": len(self.blocks),
            "dtype": dtypes.name_of(self.dtype),
            "computed_in": report.computed_in and dtypes.name_of(report.computed_in),
            "bits_per_weight": {"theoretical": theoretical / weights, "file": 8 * packed / weights},
            "file_bytes": sum(path.stat().st_size for path in self.directory.glob("*.safetensors")),
            "linear_weights": weights,
            "linear_bytes": packed,
            "sparsity": sum(layer.sparsity * layer.rows * layer.columns for layer in layers) / weights,
            "zeros": sum(layer.zeros * layer.rows * layer.columns for layer in layers) / weights,
            "relative_error": _mean([layer.relative_error for layer in layers if layer.compressed]),
            "flagged_layers": sum(bool(layer.flags) for layer in layers),
            "calibration": report.calibration,
            "rotation": report.rotation,
            "source": report.source,
            **({"allocation": report.allocation} if report.allocation is not None else {}),
            **({"released": report.released} if report.released is not None else {}),
            **({"held_out_error": _mean([row.held_out_error for row in layers])} if report.recipe.held_out else {}),
            "seconds": report.seconds,
            "device": report.device,
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "processors": report.processors,
            "inputs": self.run,
            "versions": versions(),
            "software": software(),
        }


def _mean(errors: list[float]) -> float | None:
    """Of those that were measured."""
    measured = [error for error in errors if error == error]
    return sum(measured) / len(measured) if measured else None


def _recipe_of(layer: LayerReport, report: Report) -> Recipe:
    """The report's recipe with what is this layer's own."""
    if report.recipe.allocation is not None:
        own = {"bits": layer.bits, "sparsity": layer.sparsity, "pattern": layer.pattern or None}
        return replace(report.recipe, allocation=None, **own)
    if layer.sparsity or layer.bits < 16:
        return replace(report.recipe, bits=layer.bits)
    return replace(report.recipe, bits=16, sparsity=0.0, pattern=None)


def save(model: nn.Module, directory: str | Path, tokenizer=None) -> dict:
    """Write a model compressed in memory by `obr.compress` as a packed checkpoint; returns its manifest.

    What is written is what the model computes; anything else is refused. The folder appears whole, in place of an
    older checkpoint if there is one.

        obr.save(model, "compressed", tokenizer)

    Args:
        directory: new, empty, or an older checkpoint. tokenizer: saved beside the weights.

    Raises:
        ObrError: the model was not compressed in memory, or was changed since; the folder holds other files.
    """
    check_before_saving(model)
    directory, report, blocks = Path(directory), model.obr_report, ReadOnlyBlocks(model)
    layout, dtype = blocks.layout, report.dtype
    if len(report.layers) != len(blocks) * len(layout.linears):
        raise ObrError(f"The model has {len(blocks)} blocks, other than when it was compressed; compress it again.")
    for part in (layout.embed, layout.final_norm, layout.head):
        check_stored(model.get_submodule(part).weight, dtype, f"{part}.weight")
    check_replaceable(directory)
    chosen = report.recipe.chosen(len(blocks))
    with whole_folder(directory) as folder:
        writer = Writer(folder, blocks, dtype)
        for index in range(len(blocks)):
            block = blocks.load(index)
            check_block_as_compressed(
                block, layout, report.recipe, index in chosen, dtype, f"{layout.blocks}.{index}"
            )
            writer.block(index, block, [row for row in report.layers if row.block == index])
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        # Not by its save_pretrained, which refuses settings that many models ship.
        write_json(json.loads(model.generation_config.to_json_string()), folder / GENERATION)
        manifest = writer.finish(report)
        become(folder, directory)
    return manifest
