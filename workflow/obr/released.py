"""Checkpoints as OBR's authors released them, made into packed ones of this project, and verified on the way.

A released checkpoint is the state dict of a QuaRot-rotated model whose linear layers hold fake-quantised 16-bit
weights: embeddings and head are rotated, norms have no weight, every linear layer is wrapped, so that its weight
stands there twice (`q_proj.weight`, `q_proj.module.weight`), and `had_K` is the Hadamard matrix of an online
transform whose size is no power of two. What the quantisers buffered is ignored by name; anything else that is
missing or too many is refused.
"""

import copy
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from obr import fetch
from obr.checkpoint import LayerReport, Report, Writer, store
from obr.errors import BROKEN_FILE, ObrError, first_line
from obr.files import become, read_json, whole_folder, write_json
from obr.hadamard import Kronecker, sylvester
from obr.model import StreamedBlocks
from obr.modules import wrap_block
from obr.progress import Progress
from obr.recipe import Recipe
from obr.restoration import Restored
from obr.rotations import fold
from obr.rotations.quarot import QuaRot

FILES = ("pytorch_model*.bin", "model*.safetensors", "*.index.json")
# What QuaRot's wrappers leave in a state dict besides weights: quantisers that are computed anew for every token.
BUFFERS = re.compile(r"\.(quantizer|out_quantizer|k_quantizer)\.(maxq|scale|zero)$|rotary_emb\.inv_freq$")
EPSILON = 1e-5  # of QuaRot's norms, whatever the model's own
ON_GRID = 0.02  # of a step, to which rounding to 16 bits may move a code


class StateDict:
    """The tensors of a folder with pytorch_model*.bin or model*.safetensors, by name, read when asked for.

    Raises:
        ObrError: no such file, or one that is no state dict of plain tensors.
    """

    def __init__(self, folder: Path):
        self.folder, self.files, self.loaded = Path(folder), {}, {}
        pickles, safe = (sorted(self.folder.glob(pattern)) for pattern in FILES[:2])
        for path in safe:
            with self._open(path) as file:
                self.files |= dict.fromkeys(file.keys(), path)
        for path in () if safe else pickles:
            self.loaded |= self._pickled(path)
        self.names = {*self.files, *self.loaded}
        if not self.names:
            raise ObrError(f"{folder} holds neither pytorch_model*.bin nor model*.safetensors; download it again.")
        self.taken: set[str] = set()

    @staticmethod
    def _open(path: Path):
        try:
            return safe_open(path, framework="pt")
        except BROKEN_FILE as error:
            raise ObrError(f"{path} is not a whole safetensors file ({first_line(error)}).") from error

    @staticmethod
    def _pickled(path: Path) -> dict[str, Tensor]:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise ObrError(f"{path} holds more than plain tensors, or is broken ({first_line(error)}).") from error
        found = found.get("model", found) if isinstance(found, dict) else found
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise ObrError(f"{path} is not a state dict; a released checkpoint is one.")
        return found

    def take(self, name: str) -> Tensor | None:
        """A tensor, None if there is none of that name; it counts as expected from now on."""
        self.taken.add(name)
        if name in self.loaded:
            return self.loaded[name]
        if name not in self.files:
            return None
        with self._open(self.files[name]) as file:
            return file.get_tensor(name)

    def left(self) -> list[str]:
        """Names that nothing has asked for and that are not known buffers."""
        return sorted(name for name in self.names - self.taken if not BUFFERS.search(name))


@dataclass
class Verified:
    """What was found about the weights: of every row, how many values it has and how many are zero."""

    rows: int = 0
    levels: int = 0  # most values in a row
    least_zeros: float = 1.0  # of a row
    most_zeros: float = 0.0
    off_grid: int = 0  # rows whose values are no multiples of one step

    def add(self, weight: Tensor, recipe: Recipe, where: str) -> None:
        """Count a layer (r, n), and refuse it if it is not what the recipe says.

        Raises:
            ObrError: a row has more values than its bits allow, or fewer zeros than its sparsity asks for.
        """
        ordered = weight.sort(dim=1).values
        levels = (ordered[:, 1:] != ordered[:, :-1]).sum(1) + 1
        zeros = (weight == 0).float().mean(1)
        allowed, asked = 2**recipe.bits, int(weight.shape[1] * recipe.sparsity) / weight.shape[1]
        if int(levels.max()) > allowed:
            raise ObrError(
                f"{where}: row {int(levels.argmax())} has {int(levels.max())} different values, more than the "
                f"{allowed} of {recipe.bits} bits; the checkpoint is not quantised as the recipe says."
            )
        if float(zeros.min()) < asked - 1e-9:
            raise ObrError(
                f"{where}: row {int(zeros.argmin())} is {100 * float(zeros.min()):.2f} % zeros, fewer than the "
                f"{100 * asked:.2f} % of the recipe; the checkpoint is not pruned as it says."
            )
        self.rows += weight.shape[0]
        self.levels = max(self.levels, int(levels.max()))
        self.least_zeros = min(self.least_zeros, float(zeros.min()))
        self.most_zeros = max(self.most_zeros, float(zeros.max()))
        self.off_grid += int((distance_to_grid(weight, recipe.bits) > ON_GRID).sum())


def distance_to_grid(weight: Tensor, bits: int) -> Tensor:
    """(r,): how far the values of each row (r, n) lie from multiples of one step, in steps.

    The step is the row's largest magnitude over the code it may have, whichever of 1 … 2^(bits-1) fits best.
    """
    weight = weight.float()
    largest = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    best = torch.full((weight.shape[0],), float("inf"))
    for code in range(1, 2 ** (bits - 1) + 1):
        steps = weight * (code / largest)
        best = torch.minimum(best, (steps - steps.round()).abs().amax(1))
    return best


def download_released(source: dict, out: Path) -> None:
    """The stage: fetch a released checkpoint into the folder `out`, with a source.json.

    source: {"source": "hub", "repo", "revision"} or {"source": "path", "path"}, which is not copied.

    Raises:
        ObrError: it cannot be had.
    """
    with whole_folder(out) as folder:
        if source["source"] == "path":
            write_json(
                {"source": source, "folder": str(fetch.local_path(source["path"]).resolve())}, folder / "source.json"
            )
        else:
            _from_hub(source, folder)
        become(folder, out)


def _from_hub(source: dict, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    info = fetch.hub_info(source["repo"], source["revision"])
    try:
        snapshot_download(source["repo"], revision=info.sha, local_dir=folder, allow_patterns=list(FILES))
    except fetch.hub_exceptions() as error:
        raise fetch.hub_error(error, source["repo"], source["revision"]) from error
    licence = info.card_data.get("license") if info.card_data else None
    write_json({"source": source, "folder": ".", "revision": info.sha, "licence": licence}, folder / "source.json")


@torch.no_grad()
def adopt(model: Path, released: Path, recipe: Recipe, out: Path) -> dict:
    """The stage: a released checkpoint, verified, as a packed one; returns the manifest.

    model: the folder of the base model, for its configuration and tokenizer. released: what `download_released`
    wrote. The weights are kept at 16 bits, to the last one. `released` in the manifest is what was verified.

    Raises:
        ObrError: missing or unexpected tensors, other shapes, or weights that are not what the recipe says.
    """
    started = time.monotonic()
    about = read_json(released / "source.json")
    state = StateDict(released / about["folder"])
    blocks = StreamedBlocks(model, None, torch.float32, "cpu")
    dtype = torch.float16
    rotation = QuaRot.draw(blocks.dimensions)
    rotation.transforms |= online_transforms(state, blocks)
    _ends(state, blocks)
    blocks.config.rms_norm_eps = EPSILON
    report = Report(recipe, dtype, rotation=rotation.about(), source=about, device="cpu")
    writer, verified = Writer(out, blocks, dtype), Verified()
    with Progress("released", len(blocks)) as shown:
        for index in range(len(blocks)):
            block = _block(state, blocks, index, rotation)
            rows = [_adopt(block, name, index, recipe, verified, dtype) for name in blocks.layout.linears]
            writer.block(index, block, rows)
            report.layers += rows
            shown.block()
    left = state.left()
    if left:
        raise ObrError(
            f"{state.folder} has {len(left)} unexpected tensors, such as {left[0]!r}; it is another layout."
        )
    report.seconds = time.monotonic() - started
    manifest = writer.finish(report, tokenizer_from=model) | {"released": vars(verified)}
    write_json(manifest, out / "manifest.json")
    return manifest


def online_transforms(state: StateDict, blocks: StreamedBlocks) -> dict[str, Kronecker]:
    """Those in front of o_proj and down_proj, with the file's own Hadamard matrices.

    Raises:
        ObrError: a size that is no power of two without a matrix: which of the many it was cannot be told.
    """
    sizes, layout = blocks.dimensions, blocks.layout
    found = {}
    for part, size, rest in (("o", sizes.heads, [sizes.head_dim]), ("down", sizes.intermediate, [])):
        path = layout.groups[part][0]
        matrices = [state.take(f"{layout.blocks}.{i}.{path}.had_K") for i in range(sizes.blocks)]
        given = [m.double() for m in matrices if m is not None and m.ndim == 2]
        if any(not torch.equal(given[0], other) for other in given):
            raise ObrError(f"{state.folder}: the had_K of {path} differ between blocks, which no rotation here has.")
        if not given and size & (size - 1):
            raise ObrError(
                f"{state.folder} has no {path}.had_K, but {size} is no power of two; which Hadamard matrix it was "
                "folded with cannot be told."
            )
        factors: list[Tensor | int] = [given[0] / given[0].shape[0] ** 0.5] if given else []
        order = size // given[0].shape[0] if given else size
        if order * (given[0].shape[0] if given else 1) != size or order & (order - 1):
            raise ObrError(f"{state.folder}: {path}.had_K does not divide {size} by a power of two; it is broken.")
        factors += [sylvester(order)] if order > 1 or not factors else []
        found["heads" if part == "o" else part] = Kronecker([*factors, *rest])
    return found


def _ends(state: StateDict, blocks: StreamedBlocks) -> None:
    """Rotated embeddings and head in place of the model's own; the norm between has no weight."""
    layout, model = blocks.layout, blocks.model
    for part in (layout.embed, layout.head):
        module = model.get_submodule(part)
        weight = _needed(state, f"{part}.weight", tuple(module.weight.shape))
        module.weight = nn.Parameter(weight.float(), requires_grad=False)
    _bare_norm(state, layout.final_norm, model.get_submodule(layout.final_norm))
    blocks.config.tie_word_embeddings = model.config.tie_word_embeddings = False


def _needed(state: StateDict, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = state.take(name)
    if tensor is None:
        raise ObrError(f"{state.folder} has no {name!r}; it is not a whole released checkpoint of this model.")
    if tuple(tensor.shape) != shape:
        raise ObrError(f"{state.folder}: {name} has shape {tuple(tensor.shape)}, the model needs {shape}.")
    return tensor


def _bare_norm(state: StateDict, name: str, norm: nn.Module) -> None:
    """Ones; the file has nothing, a placeholder of one element, or ones too."""
    tensor = state.take(f"{name}.weight")
    if tensor is not None and tensor.numel() > 1 and not bool((tensor == 1).all()):
        raise ObrError(f"{state.folder}: {name} has a weight, so its model was not rotated as QuaRot does it.")
    norm.weight = nn.Parameter(torch.ones(norm.weight.shape), requires_grad=False)


def _block(state: StateDict, blocks: StreamedBlocks, index: int, rotation: QuaRot) -> nn.Module:
    """A wrapped block with the released weights and the online transforms."""
    layout = blocks.layout
    block = copy.deepcopy(blocks.model.get_submodule(layout.blocks)[index])
    prefix = f"{layout.blocks}.{index}"
    for name in layout.linears:
        linear = block.get_submodule(name)
        linear.weight = nn.Parameter(
            _weight(state, f"{prefix}.{name}", tuple(linear.weight.shape)), requires_grad=False
        )
        if linear.bias is not None:
            bias = state.take(f"{prefix}.{name}.module.bias")
            twin = state.take(f"{prefix}.{name}.bias")
            bias = twin if bias is None else bias
            if bias is None:
                raise ObrError(f"{state.folder} has no bias of {prefix}.{name}; it is another model's.")
            linear.bias = nn.Parameter(bias.float(), requires_grad=False)
    for norm in layout.norms.values():
        _bare_norm(state, f"{prefix}.{norm}", block.get_submodule(norm))
    wrap_block(block, layout)
    fold.attach(block, rotation.changes(index), layout)
    return block.eval().requires_grad_(False)


def _weight(state: StateDict, name: str, shape: tuple[int, ...]) -> Tensor:
    """A wrapped layer's weight, which stands there once or twice."""
    inner, outer = state.take(f"{name}.module.weight"), state.take(f"{name}.weight")
    if inner is not None and outer is not None and not torch.equal(inner, outer):
        raise ObrError(f"{state.folder}: the two weights of {name} differ; which one counts cannot be told.")
    found = f"{name}.module.weight" if inner is not None else f"{name}.weight"
    return _needed(state, found, shape).float()


def _adopt(
    block: nn.Module, name: str, index: int, recipe: Recipe, verified: Verified, dtype: torch.dtype
) -> LayerReport:
    """Verify a layer and store it as it is."""
    linear = block.get_submodule(name)
    weight = linear.weight.data
    verified.add(weight, recipe, f"block {index} {name}")
    mask = weight != 0
    store(linear, Restored(weight, None, None, mask, float("nan"), 16, None), dtype)
    zeros = float((~mask).float().mean())
    return LayerReport(
        block=index, layer=name, rows=weight.shape[0], columns=weight.shape[1], bits=recipe.bits, pattern="",
        sparsity=recipe.sparsity, zeros=zeros, relative_error=float("nan"), damp=0.0, seconds=0.0,
        packed_bytes=linear.packed.bytes, flags="",
    )  # fmt: skip


def spell(manifest: dict) -> str:
    """What was verified, for the log."""
    found, recipe = manifest["released"], manifest["recipe"]
    return (
        f"{found['rows']:,} rows: at most {found['levels']} values in a row of {2 ** recipe['bits']} allowed, "
        f"{100 * found['least_zeros']:.2f} to {100 * found['most_zeros']:.2f} % zeros, "
        f"{found['off_grid']:,} rows off a grid of one step."
    )
