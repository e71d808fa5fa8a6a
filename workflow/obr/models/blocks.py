"""Decoder models, whole in memory or streamed from disk one block at a time."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from obr.errors import ObrError
from obr.models.architectures import Dimensions, Layout, layout_of
from obr.models.check.folder import Checked, check_folder, with_buffers
from obr.models.check.memory import check_model, is_tied
from obr.models.hidden_states import HiddenStates, MemoryBudget
from obr.models.layers import ATTENTION, wrap_block
from obr.models.loading import default_device


class Blocks:
    """The decoder blocks of a model in memory, wrapped as they are loaded; the base of the streamed ones.

    model: a transformers causal LM whose embeddings, final norm and head are in place. It changes: it is put into
    evaluation mode, attends by this package's attention, and its blocks' linear layers become QuantLinear.

    Raises:
        ObrError: `check.memory.check_model` refuses the model.
    """

    def __init__(self, model: nn.Module):
        layout = check_model(model)
        if not is_tied(model, layout):
            model.config.tie_word_embeddings = False
        self._hold(model.eval())
        model.set_attn_implementation(ATTENTION)

    def _hold(self, model: nn.Module) -> None:
        self.model, self.config = model, model.config
        self.layout = layout_of(model.config)
        # Read by threads, while `entering` has recorders in the model's own list for a moment.
        self.skeleton = model.get_submodule(self.layout.blocks)
        self.dimensions = Dimensions.of(model.config)

    def __len__(self) -> int:
        return self.dimensions.blocks

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.get_submodule(self.layout.embed).weight.device

    def layout_at(self, index: int) -> Layout:
        """The layout of block `index`, with the layers that this block has."""
        return self.layout.in_block(self.skeleton[index])

    def load(self, index: int) -> nn.Module:
        """Block `index`, its linear layers wrapped."""
        block = self.model.get_submodule(self.layout.blocks)[index]
        wrap_block(block, self.layout)
        return block

    def logits(self, hidden: Tensor) -> Tensor:
        """(b, s, d) out of the last block -> (b, s, v), scaled and bounded as the family has it."""
        norm, head = (self.model.get_submodule(n) for n in (self.layout.final_norm, self.layout.head))
        # Autocast chooses the dtype itself: without it the whole head would exist in float32 too.
        cast = torch.is_autocast_enabled(hidden.device.type)
        logits = F.linear(norm(hidden), head.weight if cast else head.weight.to(hidden.dtype), head.bias)
        divisor, factor, softcap = (
            setting and getattr(self.config, setting, None)
            for setting in (self.layout.logit_divisor, self.layout.logit_factor, self.layout.logit_softcap)
        )
        if divisor not in (None, 1):
            logits = logits / divisor
        if factor is not None:
            logits = logits * factor
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    @torch.no_grad()
    def embed(self, tokens: Tensor, room: MemoryBudget | None = None) -> tuple[HiddenStates, list[dict]]:
        """What enters the first block, and what every block is called with besides.

        tokens: (b, s). room: for what is returned. Returns the states of b windows (1, s, d) and one dictionary
        of keyword arguments a block, good for any window: the model's own forward is run over recorders in place
        of its blocks, so that position embeddings and masks are what the family makes them.

        Raises:
            ObrError: no windows of tokens, tokens that the model does not have, or no room for the states.
        """
        check_windows(tokens)
        hidden = None
        for index, window in enumerate(tokens):
            states, arguments = self.entering(window[None])
            if hidden is None:
                hidden = HiddenStates(len(tokens), states.shape[1:], states.dtype, self.device, room)
            hidden[index] = states
        return hidden, arguments

    def forget_length(self) -> None:
        """Set dynamic position embeddings back, whose frequencies are those of the longest sequence so far."""
        self.entering(torch.zeros(1, 1, dtype=torch.long))

    @torch.no_grad()
    def entering(self, tokens: Tensor) -> tuple[Tensor, list[dict]]:
        """What the model's own forward gives to its blocks: states (b, s, d), and keyword arguments of each block.

        Raises:
            ObrError: tokens that the model does not have.
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
            parent(input_ids=tokens.to(self.device), **CALL)
        finally:
            setattr(parent, attribute, originals)
        return recorders[0].hidden, [recorder.arguments for recorder in recorders]


# How a model is called, whatever its configuration would have it return besides.
CALL = {"use_cache": False, "output_attentions": False, "output_hidden_states": False, "return_dict": True}


def check_windows(tokens: object) -> None:
    """Raise ObrError unless these are windows of tokens (b, s)."""
    if not isinstance(tokens, Tensor):
        raise ObrError(
            f"tokens is a {type(tokens).__name__}; give a tensor of windows (b, s), as torch.tensor([ids])."
        )
    if tokens.ndim != 2 or not tokens.numel() or tokens.is_floating_point() or tokens.is_complex():
        kind = f"{tuple(tokens.shape)} of {str(tokens.dtype).removeprefix('torch.')}"
        raise ObrError(
            f"tokens has shape {kind}; give windows of token ids (b, s), at least one token in one window."
        )


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


def run_in_place(block: nn.Module, hidden: HiddenStates, arguments: dict) -> None:
    """Replace the hidden states by the block's outputs, window by window."""
    for index, states in enumerate(hidden):
        hidden[index] = run_block(block, states, arguments)


def run_copy(
    block: nn.Module, hidden: HiddenStates, arguments: dict, room: MemoryBudget | None = None
) -> HiddenStates:
    """The block's outputs, beside the hidden states. room: for what is returned."""
    leaving = HiddenStates(len(hidden), hidden.shape, hidden.dtype, hidden.device, room)
    for index, states in enumerate(hidden):
        leaving[index] = run_block(block, states, arguments)
    return leaving


class StreamedBlocks(Blocks):
    """A downloaded model whose blocks are read from disk, and rotated, each time they are asked for.

    Args:
        directory: with config.json and safetensors.
        rotation: applied to the ends at once and to each block as it is loaded; None leaves them as they are.
        dtype: of the computation. Rotations are folded in float32 or better, whatever it is.

    Embeddings and head lie in the dtype in which they are stored, and are converted as they are used.
    """

    def __init__(self, directory: Path, rotation=None, dtype: torch.dtype | None = None, device: str | None = None):
        self.directory, self.rotation = Path(directory), rotation
        checked = self._checked()
        self.target = torch.device(device or default_device())
        self.storage_dtype, self.files = checked.dtype, checked.tensors
        self.dtype = dtype or (torch.float32 if self.target.type == "cpu" else checked.dtype)
        self._hold(with_buffers(checked.model, checked.model.config))
        self.model.set_attn_implementation(ATTENTION)
        self._load_ends()

    def _checked(self) -> Checked:
        return check_folder(self.directory)

    @property
    def device(self) -> torch.device:
        """Where blocks are loaded to."""
        return self.target

    def _load_ends(self) -> None:
        layout, model = self.layout, self.model
        names = {f"{part}.weight": f"{part}.weight" for part in (layout.embed, layout.final_norm)}
        if not self.config.tie_word_embeddings:
            names[f"{layout.head}.weight"] = f"{layout.head}.weight"
        tensors = self.files.read(names, self.target, torch.float32)
        for name, tensor in tensors.items():
            module = model.get_submodule(name.rpartition(".")[0])
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
        self._converted = embed.register_forward_hook(self._embedded)

    def _embedded(self, embed: nn.Module, tokens: tuple[Tensor], rows: Tensor) -> Tensor:
        """Embeddings in the dtype of the computation.

        Gemma's are multiplied by √d in the dtype of the stored rows, which rounds the constant; here it is exact.
        """
        scale = getattr(embed, "embed_scale", None)
        if scale is None:
            return rows.to(self.dtype)
        return F.embedding(tokens[0], embed.weight).to(self.dtype) * scale.to(self.dtype)

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
        """A new module of block `index`, its weights read from the folder, rotated if there is a rotation."""
        block = copy.deepcopy(self.skeleton[index])
        prefix = f"{self.layout.blocks}.{index}."
        dtype = self.dtype if self.rotation is None else torch.float32
        buffers = {name for name, _ in block.named_buffers()}
        names = {name: prefix + name for name in block.state_dict()}
        tensors = self.files.read({n: full for n, full in names.items() if n not in buffers}, self.target, dtype)
        tensors |= self.files.read({n: full for n, full in names.items() if n in buffers}, self.target)
        block.load_state_dict(tensors, assign=True)
        del tensors  # a rotation then replaces the weights one after the other
        block.requires_grad_(False)
        wrap_block(block, self.layout)
        if self.rotation is not None:
            self.rotation.fold_block(block, index, self.layout)
            for parameter in block.parameters():  # not the online transforms, which are buffers
                parameter.data = parameter.to(self.dtype)
        return block
