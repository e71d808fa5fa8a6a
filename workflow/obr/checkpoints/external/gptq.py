"""The layouts of GPTQ (AutoGPTQ, GPTQModel), AWQ and AutoRound: packed codes, zero points and scales by groups.

A weight is (code - zero point) * scale. Codes of GPTQ are packed along the columns of a row, those of AWQ along the
rows of a column, eight to a word in an order of their own. GPTQ's first version stores zero points less one.
"""

import torch
from torch import Tensor

from obr.checkpoints.external.layouts import FLOATS, Layout, Stored, spread
from obr.checkpoints.external.words import unpack_words, words_for
from obr.errors import ObrError
from obr.models.tensor_files import TensorFiles

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which row each part of a word holds, from the lowest on
CODES = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 3, 4, 8)
DTYPES = {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS, "g_idx": ("I32", "I64")}
# Settings of GPTQModel that change what a layer computes from its codes, and what each does.
UNREAD = {"rotation": "rotates the model", "adapter": "adds an adapter to its layers"}
BY_LAYER = ("dynamic", "extra_config")  # settings in which layers may have bits and groups of their own


class Gptq(Layout):
    """Codes (n * bits / 32, r), zero points (groups, r * bits / 32), scales (groups, r), group of each column (n)."""

    name, ends, dtypes = "GPTQ", CODES, DTYPES

    def __init__(self, files, settings, shapes):
        super().__init__(files, settings, shapes)
        self.alike = not any(settings.get(key) for key in BY_LAYER)
        for key, does in UNREAD.items():
            if settings.get(key):
                raise ObrError(
                    f"{key} in quantization_config of {files.what} {does}, which is not read; choose another."
                )
        form = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
        if form not in ("gptq", "gptq_v2"):
            raise ObrError(f"{files.what} is in GPTQ's checkpoint_format {form!r}; read are gptq and gptq_v2.")
        self.less_one = form == "gptq"

    def stored(self, layer: str) -> Stored:
        (rows, columns), (words, width) = self.shapes[layer], self.shape(layer, "qweight")
        bits = 32 * words // columns
        if bits not in BITS or width != rows or words != words_for(columns, bits):
            raise self.unfit(layer, f"codes of {words} x {width} words for {rows} x {columns} weights")
        return self._stored(layer, bits)

    def _stored(self, layer: str, bits: int) -> Stored:
        """With groups as the scales have them."""
        (rows, columns), (groups, width) = self.shapes[layer], self.shape(layer, "scales")
        group = int(self.settings.get("group_size") or self.settings.get("q_group_size") or 0)
        self._check_settings(layer, bits, group, groups)
        if groups == 1:
            group = columns
        elif group < 1 or -(-columns // group) != groups:
            group = columns // groups
        if -(-columns // group) != groups or width != rows:
            raise self.unfit(layer, f"{groups} x {width} scales for {rows} x {columns} weights")
        if self.shape(layer, "qzeros") != [groups, words_for(rows, bits)]:
            raise self.unfit(layer, f"zero points of {self.shape(layer, 'qzeros')} words for {groups} groups")
        counted = ("qweight",) if groups == 1 else ("qweight", "qzeros", "scales")
        theory = 8 * self.bytes_of(layer, counted) / (rows * columns)
        return Stored(bits, None if groups == 1 else group, theory)

    def _check_settings(self, layer: str, bits: int, group: int, groups: int) -> None:
        """Raise ObrError if quantization_config says other bits or groups of all layers than the tensors have."""
        if not self.alike:
            return
        said, columns = self.settings.get("bits") or self.settings.get("w_bit"), self.shapes[layer][1]
        if said is not None and int(said) != bits:
            raise self.unfit(layer, f"codes of {bits} bits, but {said} by quantization_config")
        wanted = -(-columns // group) if group > 0 else 1
        if group and groups != wanted:
            raise self.unfit(layer, f"{groups} groups, but {wanted} by quantization_config (group_size {group})")

    def _check_zeros(self, layer: str, zeros: Tensor, bits: int) -> None:
        """Raise ObrError if zero points are not in the middle, though quantization_config says that they are.

        Programs that believe its `sym` do not read them; one more or less tells the two versions of GPTQ apart.
        """
        if self.alike and self.settings.get("sym") is True and not bool((zeros == 2 ** (bits - 1)).all()):
            raise self.unfit(
                layer, f"zero points other than {2 ** (bits - 1)}, though quantization_config says sym: true"
            )

    def weight(self, layer: str) -> Tensor:
        (rows, columns), how = self.shapes[layer], self.stored(layer)
        codes, zeros, scales, order = self.read(layer, *CODES)
        codes = unpack_words(codes.T, how.bits, columns)
        zeros = self._zero_points(zeros, how.bits, rows)
        self._check_zeros(layer, zeros, how.bits)
        order = self.order_of(layer, order, len(scales), self.settings.get("desc_act"))
        zero, scale = (spread(t.T.float(), rows, columns, how.group, order) for t in (zeros, scales))
        return (codes.float() - zero) * scale

    def _zero_points(self, words: Tensor, bits: int, rows: int) -> Tensor:
        """(groups, r), as they are subtracted.

        GPTQModel takes one from whole words, so that a zero point of 0 borrows from its neighbour; the sum of whole
        words gives it back.
        """
        if self.less_one and 32 % bits == 0:
            ones = sum(1 << place for place in range(0, 32, bits))
            words = (words.long() + ones).remainder(2**32)
            words = torch.where(words >= 2**31, words - 2**32, words).int()
        zeros = unpack_words(words, bits, rows)
        return (zeros + 1) % 2**bits if self.less_one and 32 % bits else zeros


class Awq(Gptq):
    """Codes (n, r * bits / 32) of 4 bits in AWQ's order, zero points likewise, scales (groups, r)."""

    name, ends = "AWQ", CODES[:3]

    def __init__(self, files, settings, shapes):
        Layout.__init__(self, files, settings, shapes)
        version = str(
            settings.get("version") or settings.get("format") or settings.get("checkpoint_format") or "gemm"
        )
        if version.lower() != "gemm":
            raise ObrError(f"{files.what} is in AWQ's version {version!r}; read is gemm.")
        if settings.get("zero_point") is False:
            raise ObrError(f"{files.what} is of AWQ without zero points (zero_point: false), which is not read.")
        self.alike = not any(settings.get(key) for key in BY_LAYER)

    def stored(self, layer: str) -> Stored:
        (rows, columns), (length, words) = self.shapes[layer], self.shape(layer, "qweight")
        if length != columns or words != words_for(rows, 4) or rows % 8:
            raise self.unfit(layer, f"codes of {length} x {words} words for {rows} x {columns} weights of 4 bits")
        return self._stored(layer, 4)

    def weight(self, layer: str) -> Tensor:
        (rows, columns), how = self.shapes[layer], self.stored(layer)
        codes, zeros, scales = self.read(layer, *self.ends)
        codes, zeros = (_in_order(unpack_words(t, 4, rows)) for t in (codes, zeros))
        self._check_zeros(layer, zeros, 4)
        zero, scale = (spread(t.T.float(), rows, columns, how.group) for t in (zeros, scales))
        return (codes.T.float() - zero) * scale


def _in_order(numbers: Tensor) -> Tensor:
    """(k, r) in AWQ's order -> in the order of rows."""
    return numbers.unflatten(1, (-1, 8))[:, :, torch.tensor(AWQ_ORDER).argsort()].flatten(1)


def auto_round(files: TensorFiles, settings: dict, shapes: dict[str, list[int]]) -> Layout:
    """The layout that a checkpoint of AutoRound names as its `packing_format`."""
    form, data = (str(settings.get(key) or "") for key in ("packing_format", "data_type"))
    form = form or str(settings.get("backend") or "")
    if settings.get("super_bits") or (data and not data.startswith("int")):
        raise ObrError(
            f"{files.what} has AutoRound's data_type {data!r} or scales in groups; read are plain integers."
        )
    layout = None
    if "awq" in form:
        layout = Awq(files, {**settings, "version": "gemm"}, shapes)
    elif (form.startswith("auto_round:") and "gptq" in form) or form in ("auto_round", "auto_round:exllamav2"):
        layout = Gptq(files, {**settings, "checkpoint_format": "gptq"}, shapes)
    if layout is not None:
        bits = settings.get("act_bits") or 16
        layout.left_out = f"inputs of layers (AutoRound's act_bits {bits})" if bits < 16 else None
        return layout
    raise ObrError(
        f"{files.what} has AutoRound's packing_format {form!r}; read are those of GPTQ (auto_round:auto_gptq) and of "
        "AWQ (auto_round:auto_awq)."
    )
