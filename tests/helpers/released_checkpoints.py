"""Released checkpoints as the three front ends of OBR's authors save them, written from their lists of keys."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import obr
from helpers.rotation_files import invertible, scale
from obr.checkpoints.released.download import download_released
from obr.config.quantizer import QuantizerSettings
from obr.models.architectures import layout_of
from obr.models.fake_quant import fake_quantize
from obr.rotations.flatquant import factor_pair

BUFFERS = {"maxq": torch.tensor(7), "scale": torch.zeros(1), "zero": torch.zeros(1)}

# What FlatQuant's front end quantises besides weights, and a recipe for its checkpoints.
CACHE = {"bits": 4, "symmetric": False, "group_size": "head", "clip_ratio": "learned"}
ENTRY = {"method": "released", "bits": 4, "sparsity": 0.5, "rotation": "flatquant"}
QUANTISED = {"activations": {"bits": 4, "clip_ratio": "learned"}, "keys": CACHE, "values": CACHE}


def pruned_and_rounded(weight: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """Half of every row removed, the rest on a 4-bit grid of one step a row, at 16 bits."""
    kept = weight.abs() > weight.abs().median(dim=1, keepdim=True).values
    return (fake_quantize(weight, QuantizerSettings(bits=4)) * kept).to(dtype)


# --- QuaRot and SpinQuant ---------------------------------------------------------------------------------


def wrapped_state(model: nn.Module, kind: str, seed: int = 5) -> dict[str, Tensor]:
    """Rotate a model, prune and round its layers, both in place; the state dict as the front end `kind` saves it.

    Every linear layer is wrapped, the head too: its parameters stand there twice, as one tensor.
    """
    layout, sizes = layout_of(model.config), model.config
    obr.rotate(model, kind, seed=seed)
    state = {}
    for path, part in ((layout.embed, "plain"), (layout.head, "wrapped")):
        linear = model.get_submodule(path)
        state |= _parameters(path, linear, linear.weight.data.half(), part == "wrapped")
    norm = torch.zeros(1) if kind == "quarot" else torch.ones(sizes.hidden_size).half()
    state[f"{layout.final_norm}.weight"] = norm
    for index, block in enumerate(model.get_submodule(layout.blocks)):
        prefix = f"{layout.blocks}.{index}."
        state |= {f"{prefix}{norm_path}.weight": norm.clone() for norm_path in layout.norms.values()}
        wrapper = f"{prefix}self_attn.apply_rotary_pos_emb_qk_rotation_wrapper.k_quantizer"
        state |= {f"{wrapper}.{part}": tensor.clone() for part, tensor in BUFFERS.items()}
        for name in layout.linears:
            linear = block.get_submodule(name)
            state |= _parameters(prefix + name, linear, pruned_and_rounded(linear.weight.data), True)
            first = linear.transform.factors()[0] if linear.transform is not None else None
            if first is not None and first.shape[0] & (first.shape[0] - 1):
                state[f"{prefix}{name}.had_K"] = (first * first.shape[0] ** 0.5).round().float()
    if kind == "quarot":
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 1e-5
    return state


def _parameters(path: str, linear: nn.Module, weight: Tensor, wrapped: bool) -> dict[str, Tensor]:
    """The keys of a layer, whose parameters become those of the file."""
    linear.weight.data, found = weight.float(), {f"{path}.weight": weight}
    if getattr(linear, "bias", None) is not None:
        found[f"{path}.bias"] = linear.bias.data.half()
        linear.bias.data = found[f"{path}.bias"].float()
    if wrapped:
        found |= {name.replace(path, f"{path}.module"): tensor for name, tensor in found.items()}
        for quantizer in ("quantizer", "out_quantizer"):
            found |= {f"{path}.{quantizer}.{part}": tensor.clone() for part, tensor in BUFFERS.items()}
    return found


# --- FlatQuant --------------------------------------------------------------------------------------------


class Clip(nn.Module):
    """A quantiser of the last axis with learned shares of the largest and the smallest value."""

    def __init__(self, symmetric: bool, high: float, low: float, bits: int = 4):
        super().__init__()
        self.symmetric, self.bits = symmetric, bits
        self.clip_factor_a_max = nn.Parameter(torch.full((1,), high))
        self.clip_factor_a_min = nn.Parameter(torch.full((1,), low))

    def forward(self, x: Tensor) -> Tensor:
        high = x.amax(-1, keepdim=True).clamp(min=0) * torch.sigmoid(self.clip_factor_a_max)
        low = x.amin(-1, keepdim=True).clamp(max=0) * torch.sigmoid(self.clip_factor_a_min)
        if self.symmetric:
            step = torch.maximum(high, -low) / (2 ** (self.bits - 1) - 1)
            return step * (x / step).round().clamp(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)
        step = (high - low) / (2**self.bits - 1)
        zero = (-low / step).round()
        return step * (((x / step).round() + zero).clamp(0, 2**self.bits - 1) - zero)


class FlatLinear(nn.Module):
    """A folded layer with its learned clips and the quantiser of its inputs."""

    def __init__(self, weight: Tensor, bias: Tensor | None, seed: int):
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        self.clip_factor_w_max = nn.Parameter(3 + scale((weight.shape[0], 1), seed))
        self.clip_factor_w_min = nn.Parameter(2 + scale((weight.shape[0], 1), seed + 1))
        self.act_quantizer = Clip(True, 2.0 + seed % 3, 1.5 + seed % 5)
        self.weight_quantizer = nn.Module()
        for part, tensor in BUFFERS.items():
            self.weight_quantizer.register_buffer(part, tensor.clone())
        self.linear.weight.data = weight
        if bias is not None:
            self.linear.bias.data = bias

    def clipped(self, weight: Tensor) -> Tensor:
        high = weight.amax(1, keepdim=True) * torch.sigmoid(self.clip_factor_w_max)
        low = weight.amin(1, keepdim=True) * torch.sigmoid(self.clip_factor_w_min)
        return torch.minimum(torch.maximum(weight, low), high)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.linear.bias is None else self.linear.bias.float()
        return F.linear(self.act_quantizer(x), self.linear.weight.float(), bias)


class Pair(nn.Module):
    """x -> x (L ⊗ R), with inverses and the scale c that is merged elsewhere."""

    def __init__(self, size: int, seed: int):
        super().__init__()
        left, right = (invertible(n, seed + i) for i, n in enumerate(factor_pair(size)))
        parts = {"left": left, "right": right, "left_inv": _dual(left), "right_inv": _dual(right)}
        for name, matrix in parts.items():
            self.register_parameter(f"matrix_{name}", nn.Parameter(matrix))
        self.diag_scale = nn.Parameter(scale((size,), seed + 7))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.kron(self.matrix_left, self.matrix_right)

    def folded(self, weight: Tensor) -> Tensor:
        """Of the layer that reads (x c)(L ⊗ R)."""
        return weight / self.diag_scale @ torch.linalg.inv(torch.kron(self.matrix_left, self.matrix_right)).T


class Single(nn.Module):
    """A matrix with its inverse transpose. free: it was learned as it is, and is kept a second time."""

    def __init__(self, size: int, seed: int, free: bool):
        super().__init__()
        self.matrix = nn.Parameter(invertible(size, seed))
        self.matrix_inv_t = nn.Parameter(_dual(self.matrix.data))
        if free:
            self.linear = nn.Linear(size, size, bias=False)
            self.linear.weight = self.matrix


def _dual(matrix: Tensor) -> Tensor:
    return torch.linalg.inv(matrix).T.contiguous()


class FlatBlock(nn.Module):
    """A decoder block of the paper's FlatQuant front end, folded, pruned and rounded, computing step by step."""

    def __init__(self, block: nn.Module, config, seed: int, free: bool, dtype: torch.dtype):
        super().__init__()
        attention, mlp, width = block.self_attn, block.mlp, config.hidden_size
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.theta, self.eps = config.rope_parameters["rope_theta"], config.rms_norm_eps
        size = width // self.heads
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.self_attn.ln_trans, self.mlp.up_gate_trans = Pair(width, seed), Pair(width, seed + 20)
        self.mlp.down_trans = Pair(config.intermediate_size, seed + 40)
        self.self_attn.o_trans = Single(self.heads, seed + 60, free)
        self.self_attn.kcache_trans = Single(size, seed + 70, free)
        self.self_attn.vcache_trans = Single(size, seed + 80, free)
        self.self_attn.k_cache_quantizer = Clip(False, 3.0, 2.0)
        self.self_attn.v_cache_quantizer = Clip(False, 1.0, 2.5)
        value = torch.block_diag(*[self.self_attn.vcache_trans.matrix.data] * self.kv_heads)
        out = torch.kron(self.self_attn.o_trans.matrix.data, self.self_attn.vcache_trans.matrix.data)
        down = self.mlp.down_trans
        for number, (holder, name, layer, read, outputs) in enumerate(
            [
                (self.self_attn, "q_proj", attention.q_proj, self.self_attn.ln_trans.folded, None),
                (self.self_attn, "k_proj", attention.k_proj, self.self_attn.ln_trans.folded, None),
                (self.self_attn, "v_proj", attention.v_proj, self.self_attn.ln_trans.folded, value),
                (self.self_attn, "o_proj", attention.o_proj, lambda w: w @ torch.linalg.inv(out).T, None),
                (self.mlp, "up_proj", mlp.up_proj, self.mlp.up_gate_trans.folded, torch.diag(down.diag_scale.data)),
                (self.mlp, "gate_proj", mlp.gate_proj, self.mlp.up_gate_trans.folded, None),
                (self.mlp, "down_proj", mlp.down_proj, down.folded, None),
            ]
        ):
            made = FlatLinear(layer.weight.data, None if layer.bias is None else layer.bias.data, seed + number)
            weight = made.clipped(read(layer.weight.data))
            weight = weight if outputs is None else outputs.T @ weight
            made.linear.weight.data = pruned_and_rounded(weight.data, dtype)
            if layer.bias is not None:
                made.linear.bias.data = (layer.bias.data if outputs is None else layer.bias.data @ outputs).to(dtype)
            holder.add_module(name, made)
        for name, trans in (
            ("input_layernorm", self.self_attn.ln_trans),
            ("post_attention_layernorm", self.mlp.up_gate_trans),
        ):
            norm = nn.Module()
            norm.weight = nn.Parameter((getattr(block, name).weight.data * trans.diag_scale.data).to(dtype))
            self.add_module(name, norm)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(normed(x, self.input_layernorm, self.eps))
        read = self.mlp.up_gate_trans(normed(x, self.post_attention_layernorm, self.eps))
        gated = F.silu(self.mlp.gate_proj(read)) * self.mlp.up_proj(read)
        return x + self.mlp.down_proj(self.mlp.down_trans(gated))

    def attend(self, x: Tensor) -> Tensor:
        """(s, d): causal attention of one sequence, head by head."""
        own, read = self.self_attn, self.self_attn.ln_trans(x)
        query, key, value = (
            layer(read).unflatten(1, (heads, -1))
            for layer, heads in ((own.q_proj, self.heads), (own.k_proj, self.kv_heads), (own.v_proj, self.kv_heads))
        )
        query, key = turned(query, self.theta), turned(key, self.theta)
        query, key = query @ own.kcache_trans.matrix_inv_t, key @ own.kcache_trans.matrix
        key, value = own.k_cache_quantizer(key), own.v_cache_quantizer(value)
        found = torch.empty_like(query)
        for head in range(self.heads):
            other = head // (self.heads // self.kv_heads)
            scores = query[:, head] @ key[:, other].T / query.shape[-1] ** 0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            found[:, head] = scores.softmax(-1) @ value[:, other]
        return own.o_proj((own.o_trans.matrix.T @ found).flatten(1))


def normed(x: Tensor, norm: nn.Module, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * norm.weight.float()


def turned(x: Tensor, theta: float) -> Tensor:
    """RoPE of x (s, heads, m), whose channels i and i + m/2 are pairs."""
    half = x.shape[-1] // 2
    angle = torch.outer(torch.arange(len(x)).float(), theta ** -(torch.arange(half) / half))[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


class FlatModel(nn.Module):
    """A model of the FlatQuant front end; its state dict is the file. free: transforms learned as free matrices."""

    def __init__(self, base: nn.Module, free: bool = False, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        config, self.model = base.config, nn.Module()
        self.eps = config.rms_norm_eps
        self.model.embed_tokens = nn.Embedding(*base.model.embed_tokens.weight.shape)
        self.model.layers = nn.ModuleList(
            FlatBlock(block, config, 100 * i, free, dtype) for i, block in enumerate(base.model.layers)
        )
        self.model.norm, self.lm_head = nn.Module(), nn.Linear(*reversed(base.lm_head.weight.shape), bias=False)
        self.model.embed_tokens.weight.data = base.model.embed_tokens.weight.data.to(dtype)
        self.model.norm.weight = nn.Parameter(base.model.norm.weight.data.to(dtype))
        self.lm_head.weight.data = base.lm_head.weight.data.to(dtype)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (b, s, v)."""
        found = []
        for sequence in tokens:
            x = self.model.embed_tokens(sequence).float()
            for layer in self.model.layers:
                x = layer(x)
            found.append(normed(x, self.model.norm, self.eps) @ self.lm_head.weight.float().T)
        return torch.stack(found)


# --- Files ------------------------------------------------------------------------------------------------

FORMS = (
    "bin",
    "bin shards",
    "safetensors",
    "safetensors shards",
    "first of shared",
    "last of shared",
    "with quantizers",
)


def written(folder: Path, state: dict[str, Tensor], form: str = "bin") -> Path:
    """A downloaded released checkpoint in `folder`, whose files have one of the forms."""
    source = folder / "hub"
    source.mkdir(parents=True)
    if form.endswith("of shared"):  # as safetensors writes a model: one name for each tensor
        names = sorted(state, reverse=form.startswith("last"))
        kept = {state[name].data_ptr(): name for name in reversed(names)}
        state = {
            name: state[name] for name in state if kept[state[name].data_ptr()] == name or not state[name].numel()
        }
        form = "safetensors"
    if form == "with quantizers":
        torch.save({"model": state}, source / "pytorch_model.bin")
    elif form == "bin":
        torch.save(state, source / "pytorch_model.bin")
    elif form == "safetensors":
        save_file(unshared(state), source / "model.safetensors")
    else:
        stem, end, save = (
            ("pytorch_model", "bin", torch.save) if form == "bin shards" else ("model", "safetensors", save_file)
        )
        names, listed = sorted(state), {}
        for number in range(3):
            name = f"{stem}-{number + 1:05d}-of-00003.{end}"
            save(unshared({n: state[n] for n in names[number::3]}), source / name)
            listed |= dict.fromkeys(names[number::3], name)
        (source / f"{stem}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return downloaded(folder)


def downloaded(folder: Path) -> Path:
    download_released({"source": "path", "path": str(folder / "hub")}, folder / "released")
    return folder / "released"


def unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}
