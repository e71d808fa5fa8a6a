"""GGUF, which llama.cpp reads: codes of at most 4 bits as Q4_0, up to 8 bits as Q8_0, both without loss.

A Q4_0 block is 32 codes of 4 bits and a scale, a Q8_0 block 32 of 8 bits. Each repeats its row's scale, rounded to
float16, which is all that changes: 5e-4 of a weight at most. llama.cpp then rounds activations to 8 bits in blocks
of 32, as it does with every such file.
"""

from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from obr.checkpoints.packing import unpack
from obr.errors import ObrError
from obr.export import gguf_tokenizer
from obr.export.source import ExportSource
from obr.runtime.files import atomic_write

BLOCK = 32  # codes that share a scale in the file
# Model family -> (architecture of llama.cpp, whether its rotary embedding takes neighbours instead of halves).
ARCHITECTURES = {
    "llama": (gguf.MODEL_ARCH.LLAMA, True),
    "mistral": (gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, False),
}
FREQUENCIES = ("llama", "mistral")  # families for which llama.cpp reads frequencies of the rotary embedding
PLAIN = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
FILE_TYPES = {
    Kind.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Kind.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Kind.F32: gguf.LlamaFileType.ALL_F32,
    Kind.F16: gguf.LlamaFileType.MOSTLY_F16,
    Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16,
}


def write(source: ExportSource, out: Path) -> str:
    """Write the file `out`; returns a sentence on it."""
    _check(source)
    _check_replaceable(out)
    with atomic_write(out) as partial:
        file = _File(source, partial)
        spoken = file.write()
    widened = [
        f"{count} layers of {bits} bits take {4.5 if bits < 4 else 8.5} bits a weight, since GGUF has no such codes"
        for bits, count in sorted(file.widened.items())
    ]
    return (
        f"{out}: {file.kinds[Kind.Q4_0]} layers as Q4_0 and {file.kinds[Kind.Q8_0]} as Q8_0, scales rounded by at "
        f"most {file.rounding:.1e} of themselves, {', '.join([*widened, spoken])}, "
        f"{out.stat().st_size / 1e6:.1f} MB in all."
    )


class _File:
    """A GGUF file as it is filled.

    kinds: how many linear layers of each. widened: {bits: layers} of those that GGUF has no codes of this width for.
    rounding: largest of a scale, relative.
    """

    def __init__(self, source: ExportSource, path: Path):
        self.source, self.config, self.kinds, self.rounding = source, source.config, Counter(), 0.0
        self.widened: Counter = Counter()
        architecture, self.neighbours = ARCHITECTURES[source.config.model_type]
        self.names = gguf.get_tensor_name_map(architecture, len(source.blocks))
        # Tensors lie in a temporary file until all are known: their list comes first.
        self.writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture], use_temp_file=True)
        self.path = path

    def write(self) -> str:
        source, layout, writer = self.source, self.source.layout, self.writer
        ends = [layout.embed, layout.final_norm]
        for part in ends + ([] if self.config.tie_word_embeddings else [layout.head]):
            self._plain(f"{part}.weight", source.blocks.model.get_submodule(part).weight)
        for number, block in source:
            prefix = f"{layout.blocks}.{number}."
            for name in layout.linears:
                self._linear(prefix, name, block.get_submodule(name))
            packed = {f"{name}.{part}" for name in layout.linears for part in ("weight", "bias")}
            for name, tensor in block.state_dict().items():
                if name not in packed and ".range." not in name:
                    self._plain(prefix + name, tensor)
        self._rotary()
        self._sizes()
        spoken = gguf_tokenizer.add(
            writer, source.folder, source.blocks.model.get_submodule(layout.embed).weight.shape[0]
        )
        writer.write_header_to_file(self.path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return spoken

    def _linear(self, prefix: str, name: str, linear) -> None:
        order = self._order(name, len(linear.weight))
        if linear.bias is not None:
            self._plain(f"{prefix}{name}.bias", linear.bias[order])
        restored = unpack(linear.packed)
        if restored.codes is None:
            self.kinds[PLAIN[self.source.blocks.storage_dtype]] += 1
            self._plain(f"{prefix}{name}.weight", linear.weight[order])
            return
        kind = Kind.Q4_0 if restored.bits <= 4 else Kind.Q8_0
        scale = restored.scale[order, 0]
        half = scale.half()
        lost = ((half.float() - scale).abs() / scale.abs().clamp_min(1e-38)).max()
        if not lost < 0.5:
            raise ObrError(f"{prefix}{name} has scales that float16 cannot hold, so neither can GGUF.")
        self.kinds[kind] += 1
        if restored.bits not in (4, 8):
            self.widened[restored.bits] += 1
        self.rounding = max(self.rounding, float(lost))
        pack = q4_0 if kind is Kind.Q4_0 else q8_0
        try:
            stored = pack(restored.codes[order], half)
        except ObrError as error:
            raise ObrError(f"{prefix}{name}: {error}") from error
        self.writer.add_tensor(self._name(f"{prefix}{name}.weight"), stored.numpy(), raw_dtype=kind)

    def _order(self, name: str, rows: int) -> Tensor:
        """In which order llama.cpp wants a layer's rows: of queries and keys, neighbours turn together."""
        roles = self.source.layout.roles
        if not self.neighbours or name not in (roles["q"], roles["k"]):
            return torch.arange(rows)
        heads = rows // self.source.blocks.dimensions.head_dim
        return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).flatten()

    def _plain(self, name: str, tensor: Tensor) -> None:
        """Matrices as they were stored, vectors in float32, as llama.cpp wants them."""
        tensor = tensor.detach().to(torch.float32 if tensor.ndim == 1 else self.source.blocks.storage_dtype)
        kind, raw = PLAIN[tensor.dtype], tensor.contiguous().view(torch.uint8).numpy()
        self.writer.add_tensor(self._name(name), raw, raw_dtype=kind)

    def _name(self, name: str) -> str:
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ObrError(f"llama.cpp has no name for {name}, so GGUF cannot hold this model.")
        return found

    def _rotary(self) -> None:
        """Frequencies that are not plain powers of the base, as Llama 3.1's, as divisors of those that are."""
        parent = self.source.layout.blocks.rpartition(".")[0]
        rotary = self.source.blocks.model.get_submodule(parent).rotary_emb
        frequencies = rotary.inv_freq.double()
        powers = torch.arange(len(frequencies)).double() / len(frequencies)
        factors = _theta(self.config) ** -powers / frequencies
        if getattr(rotary, "attention_scaling", 1.0) != 1.0 or "dynamic" in str(_rope(self.config)["rope_type"]):
            raise ObrError(f"Rotary embeddings of type {_rope(self.config)['rope_type']} have no place in GGUF here.")
        if not torch.allclose(factors, torch.ones_like(factors), rtol=1e-4):
            if self.config.model_type not in FREQUENCIES:
                raise ObrError(
                    f"Rotary embeddings of type {_rope(self.config)['rope_type']} have no place in GGUF here: "
                    f"llama.cpp reads no frequencies for {self.config.model_type}; choose compressed-tensors."
                )
            self.writer.add_tensor("rope_freqs.weight", factors.float().numpy(), raw_dtype=Kind.F32)

    def _sizes(self) -> None:
        writer, config, sizes = self.writer, self.config, self.source.blocks.dimensions
        writer.add_name(getattr(config, "_name_or_path", "") or self.source.folder.name)
        writer.add_file_type(FILE_TYPES[self.kinds.most_common(1)[0][0]])
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(sizes.hidden)
        writer.add_block_count(sizes.blocks)
        writer.add_feed_forward_length(sizes.intermediate)
        writer.add_head_count(sizes.heads)
        writer.add_head_count_kv(sizes.kv_heads)
        writer.add_key_length(sizes.head_dim)
        writer.add_value_length(sizes.head_dim)
        writer.add_rope_dimension_count(sizes.head_dim)
        writer.add_rope_freq_base(_theta(config))
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def q4_0(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes (r, n) in [-8, 7] with scales (r,), float16, as blocks: (r, n / 32 * 18) bytes.

    A block is the scale and sixteen bytes, with code i + 8 below and code i + 16 + 8 above.

    Raises:
        ObrError: columns that are no whole number of blocks.
    """
    q = (_blocks(codes) + 8).to(torch.uint8)
    return _with_scales(q[..., : BLOCK // 2] | q[..., BLOCK // 2 :] << 4, scale)


def q8_0(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes (r, n) in [-128, 127] with scales (r,), float16, as blocks: (r, n / 32 * 34) bytes; errors as q4_0."""
    return _with_scales(_blocks(codes).to(torch.int8).view(torch.uint8), scale)


def _blocks(codes: Tensor) -> Tensor:
    rows, columns = codes.shape
    if columns % BLOCK:
        raise ObrError(f"{columns} columns are no whole number of GGUF's blocks of {BLOCK}, so it cannot hold them.")
    return codes.reshape(rows, -1, BLOCK)


def _with_scales(blocks: Tensor, scale: Tensor) -> Tensor:
    rows, count, _ = blocks.shape
    scales = torch.from_numpy(scale.numpy().view(np.uint8).copy()).reshape(rows, 1, 2).expand(rows, count, 2)
    return torch.cat([scales, blocks], dim=-1).reshape(rows, -1).contiguous()


def _check_replaceable(out: Path) -> None:
    """Raise ObrError if `out` is there and no GGUF file."""
    if out.is_dir():
        raise ObrError(f"{out} is a folder; give the name of a file, such as {out / 'model.gguf'}.")
    if out.is_file() and out.stat().st_size:
        with open(out, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ObrError(f"{out} is there and is no GGUF file; choose another name, or move it.")


def _check(source: ExportSource) -> None:
    config = source.config
    if config.model_type not in ARCHITECTURES:
        raise ObrError(
            f"Models of type {config.model_type!r} are not exported to GGUF, only {', '.join(ARCHITECTURES)}; "
            "choose compressed-tensors."
        )
    if config.hidden_act not in ("silu", "swish"):
        raise ObrError(
            f"The model's activation is {config.hidden_act}, llama.cpp's {config.model_type} has SiLU alone; choose "
            "compressed-tensors."
        )
    if config.model_type == "qwen3" and config.attention_bias:
        raise ObrError(
            "The model's attention has biases, which llama.cpp's qwen3 has not; choose compressed-tensors."
        )
    if getattr(config, "is_causal", True) is False:
        raise ObrError("The model's attention is not causal, which has no place in GGUF; choose another format.")
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        raise ObrError(
            f"The model attends to {window} tokens at most, which llama.cpp's {config.model_type} does not."
        )


def _rope(config) -> dict:
    return config.rope_parameters


def _theta(config) -> float:
    return float(_rope(config)["rope_theta"])
