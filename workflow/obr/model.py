"""Decoder models, whole in memory or streamed from disk one block at a time."""

import copy
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from obr import foreign
from obr.activations import Activations, Room
from obr.errors import BROKEN_FILE, ObrError, first_line
from obr.layout import Dimensions, layout_of
from obr.modules import ATTENTION, wrap_block


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_tokenizer(directory: Path):
    """The tokenizer of a model folder."""
    trust = foreign.trusted(directory)
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust)
    except foreign.failures(trust, OSError, ValueError) as error:
        told = foreign.refusal(directory, error)
        raise told or ObrError(f"{directory} holds no usable tokenizer ({first_line(error)}).") from error


def config_of(directory: Path):
    """The transformers configuration of a model folder; see `foreign` for code that the folder brings along.

    Raises:
        ObrError: there is none, or it asks for code of its own.
    """
    trust = foreign.trusted(directory)
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trust)
    except foreign.failures(trust, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        told = foreign.refusal(directory, error)
        raise told or ObrError(f"{directory} holds no model ({first_line(error)}).") from error


def load_model(directory: str | Path, dtype: torch.dtype = torch.float32, device: str | None = None):
    """A whole transformers model in evaluation mode.

    Raises:
        ObrError: the folder holds no model, or one of a family that `layout` does not know.
    """
    config, trust = config_of(directory), foreign.trusted(directory)
    try:
        options = {"trust_remote_code": trust, "use_safetensors": True, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=dtype, **options)
    except foreign.failures(trust, OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ObrError(f"{directory} cannot be loaded as a model: {first_line(error)}.") from error
    layout_of(model.config)
    return model.eval().requires_grad_(False).to(device or default_device())


class Blocks:
    """The decoder blocks of a model in memory; the base of the streamed ones.

    model: a transformers causal LM whose embeddings, final norm and head are in place.
    """

    def __init__(self, model: nn.Module):
        self.model, self.config = model, model.config
        self.layout = layout_of(model.config)
        self.dimensions = Dimensions.of(model.config)
        model.set_attn_implementation(ATTENTION)

    def __len__(self) -> int:
        return self.dimensions.blocks

    @property
    def device(self) -> torch.device:
        return self.model.get_submodule(self.layout.embed).weight.device

    def load(self, index: int) -> nn.Module:
        """Block `index`, its linear layers wrapped."""
        block = self.model.get_submodule(self.layout.blocks)[index]
        wrap_block(block, self.layout)
        return block

    def logits(self, hidden: Tensor) -> Tensor:
        """(b, s, d) out of the last block -> (b, s, v), divided as Granite divides its own."""
        norm, head = (self.model.get_submodule(n) for n in (self.layout.final_norm, self.layout.head))
        logits = F.linear(norm(hidden), head.weight.to(hidden.dtype), head.bias)
        scaling = getattr(self.config, "logits_scaling", 1.0)
        return logits if scaling == 1 else logits / scaling

    @torch.no_grad()
    def embed(self, tokens: Tensor, room: Room | None = None) -> tuple[Activations, list[dict]]:
        """What enters the first block, and what every block is called with besides.

        tokens: (b, s). room: for what is returned. Returns the states of b windows (1, s, d) and one dictionary
        of keyword arguments a block, good for any window: the model's own forward is run over recorders in place
        of its blocks, so that position embeddings and masks are what the family makes them.

        Raises:
            ObrError: tokens that the model does not have, or no room for the states.
        """
        known = self.model.get_submodule(self.layout.embed).weight.shape[0]
        if strange := [int(t) for t in (tokens.max(), tokens.min()) if not 0 <= int(t) < known]:
            raise ObrError(
                f"Token {strange[0]} is none of the model's {known}; tokenise the text with its own tokenizer."
            )
        parent = self.model.get_submodule(self.layout.blocks.rpartition(".")[0])
        attribute = self.layout.blocks.rpartition(".")[2]
        originals = getattr(parent, attribute)
        recorders = [_Recorder(block) for block in originals]
        setattr(parent, attribute, nn.ModuleList(recorders))
        try:
            hidden = None
            for index, window in enumerate(tokens.to(self.device)):
                parent(input_ids=window[None], use_cache=False)
                states = recorders[0].hidden
                if hidden is None:
                    hidden = Activations(len(tokens), states.shape[1:], states.dtype, self.device, room)
                hidden[index] = states
        finally:
            setattr(parent, attribute, originals)
        return hidden, [recorder.arguments for recorder in recorders]


class _Recorder(nn.Module):
    """Stands in for a block: keeps its arguments, computes nothing."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: only its attributes are read

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, hidden: Tensor, **arguments) -> Tensor:
        self.__dict__["hidden"], self.__dict__["arguments"] = hidden, arguments
        return hidden


def run_block(block: nn.Module, states: Tensor, arguments: dict) -> Tensor:
    """The block's output (b, s, d) for states (b, s, d)."""
    out = block(states, **arguments)
    return out[0] if isinstance(out, tuple) else out


def advance(block: nn.Module, hidden: Activations, arguments: dict) -> None:
    """Replace the hidden states by the block's outputs, window by window."""
    for index, states in enumerate(hidden):
        hidden[index] = run_block(block, states, arguments)


def passed(block: nn.Module, hidden: Activations, arguments: dict, room: Room | None = None) -> Activations:
    """The block's outputs, beside the hidden states. room: for what is returned."""
    leaving = Activations(len(hidden), hidden.shape, hidden.dtype, hidden.device, room)
    for index, states in enumerate(hidden):
        leaving[index] = run_block(block, states, arguments)
    return leaving


class TensorFiles:
    """The tensors of a folder of safetensors files, read one at a time by name."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.files: dict[str, Path] = {}
        for path in sorted(self.directory.glob("*.safetensors")):
            with self._open(path) as file:
                self.files |= dict.fromkeys(file.keys(), path)
        if not self.files:
            raise ObrError(f"{directory} holds no safetensors files; download or convert the model first.")

    @staticmethod
    def _open(path: Path):
        try:
            return safe_open(path, framework="pt")
        except BROKEN_FILE as error:
            raise ObrError(f"{path} is not a whole safetensors file ({first_line(error)}).") from error

    def read(self, names: dict[str, str], *to) -> dict[str, Tensor]:
        """Tensors by the keys of `names`, whose values are names in the files; to: as of `Tensor.to`.

        A file is opened for every tensor anew: what has been read stays mapped, and counts as resident, as long
        as the file is open. Raises ObrError if a tensor lacks, or is none of floating-point numbers.
        """
        tensors: dict[str, Tensor] = {}
        for key, name in names.items():
            if name not in self.files:
                raise ObrError(f"{self.directory} has no tensor {name!r}; it is not a whole model.")
            with self._open(self.files[name]) as file:
                tensor = file.get_tensor(name)
            if not tensor.is_floating_point():
                kind = str(tensor.dtype).removeprefix("torch.")
                raise ObrError(
                    f"{self.directory}: {name} holds {kind}, no weights; choose a model that is not quantised."
                )
            tensors[key] = tensor.to(*to)
        return tensors

    def check(self, name: str, found: Tensor, wanted: Tensor) -> None:
        """Raise ObrError unless the tensor `name` has the shape that the configuration gives it."""
        if found.shape != wanted.shape:
            found, wanted = (" x ".join(map(str, tensor.shape)) for tensor in (found, wanted))
            raise ObrError(
                f"{self.directory}: {name} is {found}, by config.json it should be {wanted}; fetch the model again."
            )


def empty_model(config, trust: bool = False) -> nn.Module:
    """A model of this configuration with no memory behind its weights; its rotary embedding is real.

    trust: whether code beside the configuration may be run.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if any(True for _ in child.buffers(recurse=False)) and not list(child.parameters()):
                setattr(module, name, type(child)(config))
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:  # beside weights, as the scale of Gemma's embeddings is
                setattr(module, key, torch.empty_like(buffer, device="cpu"))
                model._init_weights(module)
    return model.eval().requires_grad_(False)


class StreamedBlocks(Blocks):
    """A downloaded model whose blocks are read from disk, and rotated, each time they are asked for.

    Args:
        directory: with config.json and safetensors.
        rotation: applied to the ends at once and to each block as it is loaded; None leaves them as they are.
        dtype: of the computation. Rotations are folded in float32 or better, whatever it is.

    Embeddings and head lie in the dtype in which they are stored, and are converted as they are used.
    """

    def __init__(self, directory: Path, rotation=None, dtype: torch.dtype | None = None, device: str | None = None):
        config = config_of(directory)
        layout_of(config)
        self.directory, self.rotation = Path(directory), rotation
        self.target = torch.device(device or default_device())
        self.dtype = dtype or (torch.float32 if self.target.type == "cpu" else config.dtype or torch.bfloat16)
        self.storage_dtype = config.dtype or torch.float16
        self.files = TensorFiles(directory)
        super().__init__(empty_model(config, foreign.trusted(directory)))
        self._check_modules()
        self._load_ends()

    @property
    def device(self) -> torch.device:
        return self.target

    def _check_modules(self) -> None:
        """Raise ObrError unless the family's modules are there; code of a model's own may call them otherwise."""
        layout, first = self.layout, f"{self.layout.blocks}.0."
        names = [layout.embed, layout.final_norm, layout.head]
        present = {name for name, _ in self.model.named_modules()}
        for name in [*names, *(first + part for part in (*layout.linears, *layout.norms.values()))]:
            if name not in present:
                family = self.config.model_type
                raise ObrError(f"{self.directory} has no module {name}, as {family} models have; use a native model.")

    def _load_ends(self) -> None:
        layout, model = self.layout, self.model
        names = {f"{part}.weight": f"{part}.weight" for part in (layout.embed, layout.final_norm)}
        if f"{layout.head}.weight" in self.files.files:
            names[f"{layout.head}.weight"] = f"{layout.head}.weight"
        tensors = self.files.read(names, self.target, torch.float32)
        tensors.setdefault(f"{layout.head}.weight", tensors[f"{layout.embed}.weight"])
        for name, tensor in tensors.items():
            module = model.get_submodule(name.rpartition(".")[0])
            self.files.check(name, tensor, module.weight)
            module.weight = nn.Parameter(tensor, requires_grad=False)
        if self.config.tie_word_embeddings:
            model.get_submodule(layout.head).weight = model.get_submodule(layout.embed).weight
        for module in model.modules():  # rotary embeddings
            for key, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(module, key, buffer.to(self.target))
        if self.rotation is not None:
            self.rotation.to(self.target).fold_ends(model, layout)
        for part, dtype in (
            (layout.final_norm, self.dtype),
            (layout.embed, self.storage_dtype),
            (layout.head, self.storage_dtype),
        ):
            module = model.get_submodule(part)
            module.weight.data = module.weight.to(dtype)
        embed = model.get_submodule(layout.embed)
        self._converted = embed.register_forward_hook(lambda _, __, out: out.to(self.dtype))

    def whole(self) -> nn.Module:
        """The model with all its blocks in place, in the dtype of the computation."""
        holder = self.model.get_submodule(self.layout.blocks)
        for index in range(len(self)):
            holder[index] = self.load(index)
        for part in (self.layout.embed, self.layout.head):
            module = self.model.get_submodule(part)
            module.weight.data = module.weight.to(self.dtype)
        self._converted.remove()
        return self.model

    def load(self, index: int) -> nn.Module:
        empty = self.model.get_submodule(self.layout.blocks)[index]
        block = copy.deepcopy(empty)
        prefix = f"{self.layout.blocks}.{index}."
        dtype = self.dtype if self.rotation is None else torch.float32
        names = {name: prefix + name for name in block.state_dict()}
        tensors = self.files.read(names, self.target, dtype)
        for name, wanted in block.state_dict().items():
            self.files.check(names[name], tensors[name], wanted)
        block.load_state_dict(tensors, assign=True)
        block.requires_grad_(False)
        wrap_block(block, self.layout)
        if self.rotation is not None:
            self.rotation.fold_block(block, index, self.layout)
            for parameter in block.parameters():  # not the online transforms, which are buffers
                parameter.data = parameter.to(self.dtype)
        return block


def block_file(index: int) -> str:
    """Name of a block's file, in every folder that holds one a block."""
    return f"block_{index:03d}.safetensors"
