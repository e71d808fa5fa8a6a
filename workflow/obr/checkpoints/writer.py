"""Packed checkpoints written, block by block or from memory, with a report of every layer."""

import copy
import csv
import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from obr.checkpoints import referred
from obr.checkpoints.files import (
    ENDS,
    FORMAT,
    SKETCHES,
    check_no_strays,
    check_replaceable,
    remove_outdated,
    sketches_of,
    weight_bytes,
)
from obr.checkpoints.format import load_block, save_block, save_ends
from obr.checkpoints.packing import pack, unpack
from obr.checkpoints.save_check import check_before_saving, check_block_as_compressed, check_stored
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.methods.restore import Restored
from obr.models import dtypes, remote_code
from obr.models.blocks import Blocks
from obr.models.check.memory import check_attention_kind, is_tied
from obr.models.configuration import generation_config
from obr.models.layers import QuantLinear
from obr.models.read_only import ReadOnlyBlocks
from obr.models.side_files import GENERATION, copy_side_files, side_files
from obr.runtime.files import atomic_folder, atomic_write, fsync, replace_folder, sha256_of, write_json
from obr.runtime.provenance import software, versions
from obr.runtime.resume import Unfinished

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPTIONAL = {"tokens": int, "refined": float, "refine_seconds": float}  # columns of layers.csv that may be missing


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
    # Columns of some models and recipes alone: calibration tokens that the router sent to the layer's expert; the
    # error of the block's output after refinement over that before, and the refinement's seconds.
    tokens: int | None = None
    refined: float | None = None
    refine_seconds: float | None = None

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
        return cls(**{k: float("nan") if v is None and k not in OPTIONAL else v for k, v in noted.items()})

    @classmethod
    def read(cls, row: dict[str, str]) -> "LayerReport":
        """A line of layers.csv. Raises ValueError, KeyError or TypeError at one that is none."""
        kinds = {name: field.type for name, field in cls.__dataclass_fields__.items()} | OPTIONAL
        given = {key: value for key, value in row.items() if key not in OPTIONAL or value}
        return cls(**{key: kinds[key](value) for key, value in given.items()})


@dataclass
class Report:
    """What a compression did; becomes the manifest.

    dtype: in which what has 16 bits is stored. computed_in: the dtype of the passes; None where nothing is computed.
    allocation: the options chosen layer by layer. output_gradients: mean squares of the outputs' gradients by layer,
    if rows are weighted by them; not in the manifest. released: what was verified of a checkpoint that others made.
    external: format of another program's checkpoint and its own bits a weight. seconds: None where nobody noted them.
    processors: that computed, as `processor.about` has them, each with the numbers of its `blocks`.
    """

    recipe: Recipe
    dtype: torch.dtype
    computed_in: torch.dtype | None = None
    calibration: dict | None = None
    rotation: dict | None = None
    source: dict | None = None
    allocation: dict | None = None
    output_gradients: dict[str, Tensor] | None = None
    released: dict | None = None
    external: dict | None = None
    layers: list[LayerReport] = field(default_factory=list)
    seconds: float | None = 0.0
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


class Writer:
    """Writes a checkpoint block by block, so that an interrupted run can go on.

    Args:
        directory: made if need be. dtype: of everything kept at 16 bits.
        run: what decides the blocks, as plain data, see `Unfinished`.
        weights: model folder, or GGUF file, that the checkpoint refers to, instead of files of its blocks.

    Raises:
        ObrError: the unfinished blocks there are of another run; the folder holds files of something else.
    """

    def __init__(
        self,
        directory: Path,
        blocks: Blocks,
        dtype: torch.dtype,
        run: dict | None = None,
        weights: Path | None = None,
    ):
        self.directory, self.blocks, self.dtype, self.run = Path(directory), blocks, dtype, run
        self.weights = weights
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
        self.unfinished.keep(index, lambda path: self._save(block, path), note)

    def _save(self, block: nn.Module, path: Path) -> None:
        if self.weights is None:
            save_block(block, self.blocks.layout, path, self.dtype)

    def finish(self, report: Report, tokenizer_from: Path | None = None) -> dict:
        """Write the ends, layers.csv, the configuration and, last, the manifest; returns the manifest."""
        blocks = self.blocks
        (self.directory / "manifest.json").unlink(missing_ok=True)  # of an older checkpoint, of which parts go now
        self.unfinished.move(len(blocks))
        if self.run is not None:  # an older checkpoint may lie there; obr.save writes into a new folder
            remove_outdated(self.directory, 0 if self.weights else len(blocks))
        save_ends(blocks.model, blocks.layout, self.directory / ENDS, self.dtype)
        config = copy.deepcopy(blocks.config)
        config.dtype = self.dtype
        config.tie_word_embeddings = is_tied(blocks.model, blocks.layout)
        config.quantization_config = {"quant_method": "obr", "format": FORMAT}  # see `huggingface`
        config.save_pretrained(self.directory)
        if tokenizer_from:
            copy_side_files(tokenizer_from, self.directory)
            if not (self.directory / GENERATION).exists() and (found := generation_config(tokenizer_from)):
                write_json(found, self.directory / GENERATION)
        if tokenizer_from and remote_code.trusted(tokenizer_from):
            for path in Path(tokenizer_from).glob("*.py"):
                shutil.copy2(path, self.directory)
        with (
            atomic_write(self.directory / "layers.csv") as partial,
            open(partial, "w", encoding="utf-8", newline="") as file,
        ):
            left_out = {name for name in OPTIONAL if all(getattr(layer, name) is None for layer in report.layers)}
            columns = [name for name in LayerReport.__dataclass_fields__ if name not in left_out]
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(asdict(layer) for layer in report.layers)
        hashes = self._hashes()
        manifest = self._manifest(report) | {"files": hashes, SKETCHES: sketches_of(self.directory, hashes)}
        write_json(manifest, self.directory / "manifest.json")
        self.unfinished.remove()
        return manifest

    def _hashes(self) -> dict[str, str]:
        """sha256 of every file, once they are on the disk."""
        names = {path.name for path in self.directory.iterdir() if path.is_file() and not path.match("*.lock")}
        names = sorted(names | set(side_files(self.directory)))
        for name in names:
            fsync(self.directory / name)
        return {name: sha256_of(self.directory / name) for name in names}

    def _manifest(self, report: Report) -> dict:
        layers = report.layers
        entry = {} if self.weights is None else {referred.ENTRY: referred.reference(self.weights, self.directory)}
        weights = sum(layer.rows * layer.columns for layer in layers)
        packed = sum(layer.packed_bytes for layer in layers)
        theoretical = (report.external or {}).get("bits_per_weight") or (
            sum(layer.rows * layer.columns * _recipe_of(layer, report).bits_per_weight for layer in layers) / weights
        )
        return {
            "format": FORMAT,
            "recipe": report.recipe.to_dict(),
            "blocks": len(self.blocks),
            "dtype": dtypes.name_of(self.dtype),
            "computed_in": report.computed_in and dtypes.name_of(report.computed_in),
            "bits_per_weight": {"theoretical": theoretical, "file": 8 * packed / weights},
            "file_bytes": weight_bytes(self.directory, entry),
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
            **({"external": report.external} if report.external is not None else {}),
            **({"held_out_error": _mean([row.held_out_error for row in layers])} if report.recipe.held_out else {}),
            "seconds": report.seconds,
            **({"refinement": _refinement(layers)} if report.recipe.refine_steps else {}),
            "device": report.device,
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "processors": report.processors,
            "inputs": self.run,
            "versions": versions(),
            "software": software(),
            **entry,
        }


def _mean(errors: list[float]) -> float | None:
    """Of those that were measured."""
    measured = [error for error in errors if error == error]
    return sum(measured) / len(measured) if measured else None


def _refinement(layers: list[LayerReport]) -> dict:
    """Seconds of refinement, which are part of the whole; and by what the output error of a block was multiplied,
    geometric mean."""
    refined = {layer.block: layer.refined for layer in layers if layer.refined is not None}
    ratios = torch.tensor(list(refined.values()), dtype=torch.float64)
    return {
        "seconds": sum(layer.refine_seconds or 0.0 for layer in layers),
        "error_ratio": float(ratios.clamp_min(1e-12).log().mean().exp()) if refined else None,
    }


def _recipe_of(layer: LayerReport, report: Report) -> Recipe:
    """The report's recipe with what is this layer's own."""
    if report.recipe.allocation is not None:
        own = {"bits": layer.bits, "sparsity": layer.sparsity, "pattern": layer.pattern or None}
        return replace(report.recipe, allocation=None, **own)
    if layer.sparsity or layer.bits < 16:
        return replace(report.recipe, bits=layer.bits)
    return replace(report.recipe, bits=16, sparsity=0.0, pattern=None)


def save(model: nn.Module, directory: str | Path, tokenizer: "PreTrainedTokenizerBase | None" = None) -> dict:
    """Write a model compressed in memory by `obr.compress` as a packed checkpoint; returns its manifest.

    What is written is what the model computes; anything else is refused. The folder appears whole, in place of an
    older checkpoint if there is one.

    Args:
        directory: new, empty, or an older checkpoint.
        tokenizer: saved beside the weights.

    Raises:
        ObrError: the model was not compressed in memory, or was changed since; the folder holds other files.

    Example:
        >>> model = obr.compress(obr.load_model("path/to/model"), None, {"method": "rtn"}, progress=False)
        >>> manifest = obr.save(model, "compressed", tokenizer)
        >>> manifest["bits_per_weight"]["theoretical"]
        4.0
    """
    check_before_saving(model)
    check_attention_kind(model)
    directory, report, blocks = Path(directory), model.obr_report, ReadOnlyBlocks(model)
    layout, dtype = blocks.layout, report.dtype
    if len(report.layers) != sum(len(blocks.layout_at(index).linears) for index in range(len(blocks))):
        raise ObrError(f"The model has {len(blocks)} blocks, other than when it was compressed; compress it again.")
    for part in (layout.embed, layout.final_norm, layout.head):
        check_stored(model.get_submodule(part).weight, dtype, f"{part}.weight")
    check_replaceable(directory)
    chosen = report.recipe.chosen(len(blocks))
    with atomic_folder(directory) as folder:
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
        if model.generation_config is not None:
            write_json(json.loads(model.generation_config.to_json_string()), folder / GENERATION)
        manifest = writer.finish(report)
        replace_folder(folder, directory)
    return manifest
