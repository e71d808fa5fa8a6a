"""Checkpoints as other programs write them, packed bit by bit: slow, and independent of the readers.

Each writer takes a weight (r, n), returns the tensors that stand for it and the weight that they mean.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def streams(rows: np.ndarray, bits: int) -> Tensor:
    """(r, words) int32: each row's integers one after the other, the lowest bit first."""
    words = []
    for row in rows:
        number = sum(int(value) << (bits * place) for place, value in enumerate(row))
        count = -(-len(row) * bits // 32)
        words.append([(number >> (32 * i)) & 0xFFFFFFFF for i in range(count)])
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32))


def rounded(weight: Tensor, bits: int, group: int, order: list[int] | None = None):
    """(codes (r, n), zero points (r, groups), scales (r, groups) in float16, the weight that they mean)."""
    rows, columns = weight.shape
    order = order or [column // group for column in range(columns)]
    codes, meant = np.zeros((rows, columns), dtype=int), torch.zeros(rows, columns)
    groups = max(order) + 1
    zeros, scales = np.zeros((rows, groups), dtype=int), torch.zeros(rows, groups)
    for number in range(groups):
        places = [column for column in range(columns) if order[column] == number]
        part = weight[:, places]
        low, high = part.min(1).values.clamp_max(0), part.max(1).values.clamp_min(0)
        scale = ((high - low) / (2**bits - 1)).half().float()
        zero = (-low / scale).round().clamp(0, 2**bits - 1)
        code = (part / scale[:, None] + zero[:, None]).round().clamp(0, 2**bits - 1)
        codes[:, places], zeros[:, number], scales[:, number] = code.int().numpy(), zero.int().numpy(), scale
        meant[:, places] = (code - zero[:, None]) * scale[:, None]
    return codes, zeros, scales, meant


def gptq(bits: int, group: int | None, version: int = 1, ordered: bool = False) -> Callable:
    """GPTQ's layout; version 1 takes one from whole words of zero points."""

    def write(weight: Tensor):
        columns = weight.shape[1]
        size = group or columns
        order = [(column * 7 % columns) // size for column in range(columns)] if ordered else None
        codes, zeros, scales, meant = rounded(weight, bits, size, order)
        packed = streams(zeros.T, bits)
        if version == 1 and 32 % bits == 0:
            ones = sum(1 << place for place in range(0, 32, bits))
            packed = torch.from_numpy((packed.numpy().view(np.uint32) - np.uint32(ones)).view(np.int32))
        elif version == 1:
            packed = streams((zeros.T - 1) % 2**bits, bits)
        tensors = {"qweight": streams(codes, bits).T, "qzeros": packed, "scales": scales.T.half()}
        groups = torch.tensor(order or [column // size for column in range(columns)], dtype=torch.int32)
        return tensors | {"g_idx": groups}, meant

    return write


def awq(group: int) -> Callable:
    """AWQ's layout "gemm": eight rows of a column in a word, even ones in its lower half."""

    def words(numbers: np.ndarray) -> Tensor:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return streams(numbers.reshape(len(numbers), -1, 8)[:, :, order].reshape(len(numbers), -1), 4)

    def write(weight: Tensor):
        codes, zeros, scales, meant = rounded(weight, 4, group)
        return {"qweight": words(codes.T), "qzeros": words(zeros.T), "scales": scales.T.half()}, meant

    return write


def packed(bits: int, group: int | None = None, whole: bool = False, ordered: bool = False) -> Callable:
    """compressed-tensors' pack-quantized, asymmetric; whole: no integer lies across two words."""

    def write(weight: Tensor):
        rows, columns = weight.shape
        size = group or columns
        order = [(column * 5 % columns) // size for column in range(columns)] if ordered else None
        codes, zeros, scales, meant = rounded(weight, bits, size, order)
        if whole:
            fits = 32 // bits
            padded = np.pad(codes, ((0, 0), (0, -columns % fits)))
            words = torch.cat([streams(part, bits) for part in np.split(padded, padded.shape[1] // fits, 1)], 1)
        else:
            words = streams(codes, bits)
        tensors = {"weight_packed": words, "weight_scale": scales, "weight_shape": torch.tensor([rows, columns])}
        if ordered:
            tensors["weight_g_idx"] = torch.tensor(order, dtype=torch.int32)
        return tensors | {"weight_zero_point": streams(zeros.T, bits).T}, meant

    return write


def integers(weight: Tensor):
    """compressed-tensors' int-quantized: one scale a row."""
    scale = (weight.abs().amax(1, keepdim=True) / 127.5).bfloat16()
    codes = (weight / scale.float()).round().clamp(-128, 127)
    return {"weight": codes.to(torch.int8), "weight_scale": scale}, codes * scale.float()


def floats(strategy: str) -> Callable:
    """compressed-tensors' float-quantized: floats of 8 bits, a scale for all, for a row, or for blocks of 32 x 48."""

    def write(weight: Tensor):
        rows, columns = weight.shape
        tall, wide = {"tensor": (rows, columns), "channel": (1, columns), "block": (32, 48)}[strategy]
        scale, full = torch.zeros(-(-rows // tall), -(-columns // wide)), torch.zeros(rows, columns)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                place = slice(i * tall, (i + 1) * tall), slice(j * wide, (j + 1) * wide)
                scale[i, j] = full[place] = weight[place].abs().max() / 448
        codes = (weight / full).to(torch.float8_e4m3fn)
        scale = scale.flatten() if strategy == "tensor" else scale
        return {"weight": codes, "weight_scale": scale}, codes.float() * full

    return write


def by_bitmask(eight_bits: bool = False, pattern: bool = True) -> Callable:
    """Kept values and a mask of one bit a weight, of 2:4 or of any places; of 16-bit floats, or of 8-bit integers."""

    def write(weight: Tensor):
        rows, columns = weight.shape
        grouped = weight.abs().reshape(rows, -1, 4)
        ranks = grouped.argsort(dim=2, descending=True).argsort(dim=2)
        mask = (ranks < 2).reshape(rows, columns) if pattern else weight.abs() > weight.abs().median()
        values, meant, tensors = weight.half(), (weight * mask).half().float(), {}
        if eight_bits:
            made, meant = integers(weight * mask)
            values, tensors = made["weight"], {"weight_scale": made["weight_scale"]}
            mask = mask & (values != 0) if not pattern else mask
        kept = values[mask]
        tensors["compressed"] = kept.reshape(rows, -1) if pattern else kept
        bits = [[sum(int(row[8 * i + b]) << b for b in range(8)) for i in range(columns // 8)] for row in mask]
        tensors["bitmask"] = torch.tensor(bits, dtype=torch.uint8)
        tensors["shape"] = torch.tensor([rows, columns])
        return tensors, meant

    return write


def scheme(form: str, more: dict | None = None, **weights) -> dict:
    """A `quantization_config` of compressed-tensors; more: of the whole, or of the group if it is of activations."""
    asymmetric = form == "pack-quantized"
    known = {"num_bits": 4, "type": "int", "symmetric": not asymmetric, "strategy": "channel", "group_size": None}
    group = {"targets": ["Linear"], "weights": known | weights} if form != "dense" else None
    more = dict(more or {})
    if group is not None:
        group["input_activations"] = more.pop("input_activations", None)
    config = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
    config["quantization_status"] = "compressed"
    return config | {"config_groups": {"group_0": group} if group else {}} | more


PER_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
PER_TOKEN_FLOAT = PER_TOKEN | {"type": "float"}
SPARSE_24 = {"sparsity_config": {"format": "sparse-24-bitmask"}}
# name -> (writer of a layer, quantization_config, bits, group)
CASES = {
    "gptq 4, ordered": (
        gptq(4, 32, ordered=True), {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, 4, 32,
    ),
    "gptq 3": (gptq(3, None), {"quant_method": "gptq", "bits": 3, "group_size": -1}, 3, None),
    "gptq 2, second version": (
        gptq(2, 16, version=2),
        {"quant_method": "gptq", "bits": 2, "group_size": 16, "checkpoint_format": "gptq_v2"}, 2, 16,
    ),
    "awq": (awq(32), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, 4, 32),
    "auto-round, gptq": (
        gptq(4, 32),
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "group_size": 32}, 4, 32,
    ),
    "auto-round, awq": (
        awq(48), {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "group_size": 48}, 4, 48,
    ),
    "packed 4": (packed(4), scheme("pack-quantized"), 4, None),
    "packed 3, groups": (
        packed(3, 32), scheme("pack-quantized", num_bits=3, strategy="group", group_size=32), 3, 32,
    ),
    "packed 3, groups in order": (
        packed(3, 32, ordered=True),
        scheme("pack-quantized", num_bits=3, strategy="group", group_size=32, actorder="group"), 3, 32,
    ),
    "packed 3, whole words": (packed(3, whole=True), scheme("pack-quantized", num_bits=3), 3, None),
    "integers": (integers, scheme("int-quantized", {"input_activations": PER_TOKEN}, num_bits=8), 8, None),
    "floats, tensor": (
        floats("tensor"), scheme("float-quantized", num_bits=8, type="float", strategy="tensor"), 8, None,
    ),
    "floats, channel": (
        floats("channel"),
        scheme("float-quantized", {"input_activations": PER_TOKEN_FLOAT}, num_bits=8, type="float"), 8, None,
    ),
    "floats, block": (
        floats("block"),
        scheme("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 48]), 8, None,
    ),
    "2:4": (by_bitmask(), scheme("dense", SPARSE_24), 16, None),
    "2:4, integers": (by_bitmask(eight_bits=True), scheme("int-quantized", SPARSE_24, num_bits=8), 8, None),
    "bitmask": (
        by_bitmask(pattern=False), scheme("dense", {"sparsity_config": {"format": "sparse-bitmask"}}), 16, None,
    ),
}  # fmt: skip


def write(model: Path, out: Path, case: str, config: dict | None = None) -> dict[str, Tensor]:
    """A copy of a model folder in another program's format; returns all weights that it means.

    config: entries of the `quantization_config`, in place of the case's own.
    """
    writer, settings, *_ = CASES[case]
    shutil.copytree(model, out)
    found, meant = {}, {}
    for name, tensor in load_file(model / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if layer.endswith(LINEAR):
            tensors, meant[name] = writer(tensor.float())
            found |= {f"{layer}.{end}": part.contiguous() for end, part in tensors.items()}
        else:
            found[name], meant[name] = tensor, tensor.float()
    save_file(found, out / "model.safetensors", metadata={"format": "pt"})
    about = json.loads((out / "config.json").read_text(encoding="utf-8"))
    about["quantization_config"] = settings | (config or {})
    (out / "config.json").write_text(json.dumps(about), encoding="utf-8")
    return meant


def change(folder: Path, name: str, to: Callable[[Tensor], Tensor | None]) -> None:
    """Change a tensor of a folder, or leave it out."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensor = to(tensors.pop(name, None))
    save_file(tensors if tensor is None else tensors | {name: tensor}, path, metadata={"format": "pt"})
