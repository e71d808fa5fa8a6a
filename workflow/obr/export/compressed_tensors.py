"""compressed-tensors' layout "pack-quantized": a folder that transformers and vLLM read.

b-bit codes lie in 32-bit words, a scale a row, embeddings and norms at 16 bits. With activations of 8 bits the layout
is "int-quantized", in which a code takes a byte: vLLM reads no other there.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor, nn

from obr.checkpoints.packing import unpack
from obr.errors import ObrError
from obr.export.source import ExportSource
from obr.models.architectures import Layout
from obr.models.side_files import copy_side_files, is_side_file
from obr.runtime.files import atomic_folder, check_folder_replaceable, read_json, replace_folder, write_json

OWN = re.compile(r"model-(ends|\d{3,})\.safetensors|model\.safetensors\.index\.json|config\.json")


def write(source: ExportSource, out: Path) -> str:
    """Write the folder `out`, one file a block; returns a sentence on it."""
    index, bits, written = {}, {}, 0
    check_folder_replaceable(
        out, "an export", "model-ends.safetensors", lambda name: bool(OWN.fullmatch(name)) or is_side_file(name)
    )
    with atomic_folder(out) as folder:
        for file, tensors in _files(source, bits):
            tensors = _in_bytes(tensors, bits) if source.inputs else tensors
            save_file(tensors, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(tensors, file)
            written += sum(tensor.nbytes for tensor in tensors.values())
        write_json(
            {"metadata": {"total_size": written}, "weight_map": index}, folder / "model.safetensors.index.json"
        )
        config = read_json(source.folder / "config.json") | {"quantization_config": _settings(source, bits)}
        write_json(both_spellings(config), folder / "config.json")
        copy_side_files(source.folder, folder)
        replace_folder(folder, out)
    how = "stored in bytes, their inputs at 8 bits," if source.inputs else "packed"
    odd = [] if source.inputs else sorted({width for width in bits.values() if 32 % width})
    note = (
        f" Layers of {' and '.join(map(str, odd))} bits need transformers 5; version 4 reads them wrongly."
        if odd
        else ""
    )
    return f"{out}: {len(bits)} layers {how} for compressed-tensors, {written / 1e6:.1f} MB in all.{note}"


def _in_bytes(tensors: dict[str, Tensor], bits: dict[str, int]) -> dict[str, Tensor]:
    """The same codes in the layout "int-quantized": a byte each."""
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(".weight_shape")}
    for name in [name for name in found if name.endswith(".weight_packed")]:
        layer, shape = name.removesuffix(".weight_packed"), tensors[name.replace("_packed", "_shape")]
        codes = unpack_from_int32(found.pop(name), bits[layer], torch.Size(shape.tolist()))
        found[f"{layer}.weight"] = codes.contiguous()
    return found


def both_spellings(config: dict) -> dict:
    """A config.json with the keys of transformers 5 and, beside them, those that version 4 and vLLM read.

    Version 4 takes a default, without a warning, for each key that it does not find under its own name.
    """
    rope = dict(config.get("rope_parameters") or {})
    older = {"torch_dtype": config.get("dtype")}
    if rope and all(isinstance(part, dict) for part in rope.values()):  # of blocks of each kind
        whole = dict(rope.get("full_attention") or {})
        older["rope_theta"] = whole.pop("rope_theta", None)
        older["rope_local_base_freq"] = (rope.get("sliding_attention") or {}).get("rope_theta")
        older["rope_scaling"] = None if whole.get("rope_type", "default") == "default" else whole
    elif rope:
        older["rope_theta"] = rope.pop("rope_theta", None)
        plain = rope.get("rope_type", "default") == "default"
        older["rope_scaling"] = None if plain else rope
        if "partial_rotary_factor" in rope:
            older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return config | {key: value for key, value in older.items() if value is not None or key == "rope_scaling"}


def _files(source: ExportSource, bits: dict[str, int]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, tensors) of each file to write; `bits` is filled with those of each packed layer."""
    layout, dtype = source.layout, source.blocks.storage_dtype
    model = source.blocks.model
    parts = [layout.embed, layout.final_norm]
    parts += [] if source.config.tie_word_embeddings else [layout.head]
    yield (
        "model-ends.safetensors",
        {f"{p}.weight": model.get_submodule(p).weight.to(dtype).contiguous() for p in parts},
    )
    for number, block in source:
        prefix = f"{layout.blocks}.{number}."
        yield f"model-{number:03d}.safetensors", _tensors(block, layout.in_block(block), prefix, dtype, bits)


def _tensors(block: nn.Module, layout: Layout, prefix: str, dtype, bits: dict[str, int]) -> dict[str, Tensor]:
    """The tensors of a block under the names that the family's files have; `bits` gets those of its layers."""
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in block.state_dict().items()}
    exact = {name: buffer for name, buffer in block.named_buffers() if name in tensors}  # of routers
    tensors, own = tensors | {name: buffer.contiguous() for name, buffer in exact.items()}, {}
    for name in layout.linears:
        restored = unpack(block.get_submodule(name).packed)
        if restored.codes is None:
            continue
        del tensors[f"{name}.weight"]
        own[name] = restored.bits
        tensors[f"{name}.weight_packed"] = pack_to_int32(restored.codes, restored.bits)
        tensors[f"{name}.weight_scale"] = restored.scale.float().contiguous()
        tensors[f"{name}.weight_shape"] = torch.tensor(restored.codes.shape)
    online = {name for name in tensors if name.rpartition(".")[0].endswith(".range")}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in online}
    for path, names in layout.fused.items():
        _fuse(tensors, own, path, [f"{path}.{name}" for name in names], prefix)
    bits |= {_stored(prefix + name, layout): width for name, width in own.items()}
    return {_stored(prefix + name, layout): tensor for name, tensor in tensors.items()}


def _stored(name: str, layout: Layout) -> str:
    """A tensor's or module's name as the family's files spell it."""
    for old, new in layout.stored:
        name = f"{name}.".replace(new, old).removesuffix(".")
    return name


def _fuse(tensors: dict[str, Tensor], bits: dict[str, int], path: str, parts: list[str], prefix: str) -> None:
    """Put a fused layer in the place of its parts, which have a scale a row each; in place.

    Raises:
        ObrError: the parts have different numbers of bits.
    """
    widths = {bits.pop(name, None) for name in parts}
    if len(widths) > 1:
        raise ObrError(
            f"{prefix}{path} has parts of {', '.join(str(w or 16) for w in widths)} bits, which compressed-tensors "
            "cannot hold in one layer; compress them alike."
        )
    (width,) = widths
    if width is not None:
        bits[path] = width
    for kind in ("weight", "weight_packed", "weight_scale", "bias"):
        if f"{parts[0]}.{kind}" in tensors:
            tensors[f"{path}.{kind}"] = torch.cat([tensors.pop(f"{name}.{kind}") for name in parts])
    shapes = [tensors.pop(f"{name}.weight_shape") for name in parts if f"{name}.weight_shape" in tensors]
    if shapes:
        tensors[f"{path}.weight_shape"] = torch.stack([torch.stack(shapes)[:, 0].sum(), shapes[0][1]])


def _settings(source: ExportSource, bits: dict[str, int]) -> dict:
    """The `quantization_config`: one scheme for all linear layers but the head, or layers by name if they differ."""
    blocks = [source.blocks.layout_at(index) for index in range(len(source.blocks))]
    expected = sum(len({layout.unfused(name) for name in layout.linears}) for layout in blocks)
    plain = len(bits) == expected and len(set(bits.values())) == 1
    groups = {}
    for number, width in enumerate(sorted(set(bits.values()))):
        scheme = QuantizationArgs(num_bits=width, type="int", symmetric=True, strategy="channel", dynamic=False)
        targets = ["Linear"] if plain else [name for name, b in bits.items() if b == width]
        groups[f"group_{number}"] = QuantizationScheme(
            targets=targets, weights=scheme, input_activations=_inputs(source)
        )
    paths = ((f"{own.blocks}.{i}", names) for i, own in enumerate(blocks) for names in own.readers.values())
    readers = [f"{block}.{name}" for block, names in paths for name in names]
    ignored = [source.layout.head, *(_stored(name, source.layout) for name in readers)]
    form = "int-quantized" if source.inputs else "pack-quantized"
    config = QuantizationConfig(config_groups=groups, format=form, quantization_status="compressed", ignore=ignored)
    return json.loads(config.model_dump_json(exclude_none=True))


def _inputs(source: ExportSource) -> QuantizationArgs | None:
    if source.inputs is None:
        return None
    return QuantizationArgs(num_bits=8, type="int", symmetric=source.inputs.symmetric, strategy="token", dynamic=True)
