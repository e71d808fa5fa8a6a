"""Models in memory on their way in: what is not theirs is refused, and measuring leaves them as they were."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import obr
from obr.checkpoints.writer import save
from obr.data import token_windows, tokenize
from obr.errors import ObrError
from obr.models.blocks import Blocks
from obr.models.layers import QuantLinear
from obr.models.loading import load_tokenizer

pytestmark = pytest.mark.slow

obr.register_with_transformers()

RTN = {"method": "rtn"}


@pytest.fixture(scope="module")
def windows(tiny_folder):
    tokens = tokenize.tokenize(load_tokenizer(tiny_folder / "model"), (tiny_folder / "heldout.txt").read_text())
    return token_windows.evaluation_windows(tokens, 128, 512)


@pytest.fixture(scope="module")
def plain(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder / "model", dtype=torch.float32)


@pytest.fixture
def model(plain):
    return copy.deepcopy(plain).requires_grad_(False)


@torch.no_grad()
def own(model, windows) -> float:
    losses = [model(input_ids=window[None], labels=window[None]).loss for window in windows]
    return float(torch.stack(losses).mean().exp())


def state(model) -> dict:
    """Everything that a user could notice: classes, tensors and whose they are, settings, hooks, attributes."""
    found = {"config": json.dumps(model.config.to_dict(), sort_keys=True, default=str)}
    found["attention"] = model.config._attn_implementation
    found["generation"] = str(model.generation_config)
    for name, module in model.named_modules():
        found[name] = (type(module), id(module), module.training, [str(v) for v in module._modules])
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks"):
            found[f"{name} {kind}"] = list(getattr(module, kind).values())
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, type(None)))}
        found[f"{name} attributes"] = (plain, sorted(vars(module)))
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        found[f"tensor {name}"] = (id(tensor), tensor.dtype, tensor.requires_grad, tensor.grad)
        found[f"bytes {name}"] = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return found


# --- Measuring --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_measuring_leaves_a_model_as_it_was(plain, windows, attention):
    model = copy.deepcopy(plain)  # with gradients wanted, some of it in training mode
    model.set_attn_implementation(attention)
    model.config.output_hidden_states, model.config.use_cache = True, True
    model.model.layers[0].train()
    random = torch.get_rng_state()
    before = state(model)
    value = obr.perplexity(model, windows)
    assert state(model) == before and torch.equal(torch.get_rng_state(), random)
    assert value == pytest.approx(own(model.eval(), windows), rel=1e-5)
    assert model(windows[:1]).hidden_states is not None  # as the user has asked for


def test_a_model_in_training_mode_is_measured_without_dropout(model, windows):
    right = own(model, windows)
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.5
    model.config.attention_dropout = 0.5
    model.train()
    assert obr.perplexity(model, windows) == pytest.approx(right, rel=1e-5) and model.training


def test_frequencies_that_depend_on_the_length_are_put_back(model, windows):
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model.config.max_position_embeddings = 16
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    before = state(model)
    value = obr.perplexity(model, windows)
    assert state(model) == before and value == pytest.approx(own(model, windows), rel=1e-5)


def test_failed_measurement_leaves_model_unchanged(model, windows):
    before = state(model)
    with pytest.raises(ObrError, match="Token 600 is none of the model's 512"):
        obr.perplexity(model, torch.full((1, 8), 600))
    assert state(model) == before


@pytest.mark.parametrize("rotation", [None, "quarot"])
def test_a_compressed_model_is_measured_as_it_computes(model, windows, tmp_path, rotation):
    if rotation:
        obr.rotate(model, rotation)
    recipe = {**RTN, "activations": {"bits": 8}, "keys": {"bits": 4}, "values": {"bits": 4}}
    obr.compress(model, None, recipe, progress=False)
    before = state(model)
    assert obr.perplexity(model, windows) == pytest.approx(own(model, windows), rel=1e-5) and state(model) == before
    save(model, tmp_path / "c")
    for packed in (False, True):
        loaded = obr.load(tmp_path / "c", packed=packed)
        before = state(loaded) if not packed else None  # packed layers have no weight to look at
        assert obr.perplexity(loaded, windows) == pytest.approx(own(loaded, windows), rel=1e-5)
        assert packed or state(loaded) == before
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert obr.perplexity(theirs, windows) == pytest.approx(own(theirs, windows), rel=1e-5)
    model.set_attn_implementation("sdpa")  # which would leave keys and values as they are
    with pytest.raises(
        ObrError, match=r"which attention 'sdpa' leaves out; call model\.set_attn_implementation\('obr'\)"
    ):
        obr.perplexity(model, windows)


@pytest.mark.parametrize(
    "tokens, sentence",
    [
        ([[1, 2, 3]], "tokens is a list; give a tensor of windows"),
        ({"input_ids": torch.ones(1, 4).long()}, "tokens is a dict; give a tensor of windows"),
        (torch.ones(4).long(), r"tokens has shape \(4,\) of int64; give windows of token ids \(b, s\)"),
        (torch.ones(1, 4), r"tokens has shape \(1, 4\) of float32; give windows of token ids"),
        (torch.ones(0, 4).long(), r"tokens has shape \(0, 4\) of int64"),
        (torch.ones(2, 1).long(), "Windows have 1 token, of which none is predicted; give two or more"),
    ],
)
def test_tokens_that_are_no_windows_are_told(model, tokens, sentence):
    with pytest.raises(ObrError, match=sentence):
        obr.perplexity(model, tokens)
    if "Windows" not in sentence:
        with pytest.raises(ObrError, match=sentence):
            Blocks(model).embed(tokens)
        with pytest.raises(ObrError, match=sentence):
            obr.compress(model, tokens, {"method": "gptq"}, progress=False)


# --- What is refused --------------------------------------------------------------------------------------


class Adapted(nn.Linear):
    """A linear layer with a low-rank addition, as adapters are."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.lora_A, self.lora_B = nn.Linear(linear.in_features, 2, bias=False), nn.Linear(2, linear.out_features)

    def forward(self, x):
        return super().forward(x) + self.lora_B(self.lora_A(x))


class Prompted(nn.Embedding):
    pass


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Packed(torch.Tensor):
    pass


def layer(model):
    return model.model.layers[1]


def set_module(name, make):
    def spoil(model):
        model.set_submodule(name, make(model.get_submodule(name)))

    return spoil


def setting(module, name, value):
    return lambda model: setattr(model.get_submodule(module), name, value)


def on(module, act):
    return lambda model: act(model.get_submodule(module))


def norm_of_a_subclass(norm):
    other = type("OtherNorm", (type(norm),), {})(96)
    other.weight = norm.weight
    return other


def prompted(embed):
    found = Prompted(512, 96)
    found.weight = embed.weight
    return found


def with_bias(linear):
    found = nn.Linear(linear.in_features, linear.out_features)
    found.weight = linear.weight
    return found


def share(model):
    layer(model).mlp.up_proj.weight = layer(model).mlp.gate_proj.weight


def other_forward(model):
    forward = layer(model).mlp.forward
    layer(model).mlp.forward = lambda x: 2 * forward(x)


def quantised_tensor(model):
    weight = layer(model).mlp.up_proj.weight.data.as_subclass(Packed)
    layer(model).mlp.up_proj.weight = nn.Parameter(weight, requires_grad=False)


def int8(model):
    layer(model).mlp.up_proj.weight = nn.Parameter(torch.ones(192, 96, dtype=torch.int8), requires_grad=False)


Q, MLP, UP = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp", "model.layers.1.mlp.up_proj"
SPOILED = {
    "adapter": (set_module(Q, Adapted), r"q_proj is a \S+Adapted, not a torch\S+Linear: .*merge an adapter first"),
    "head": (set_module("lm_head", Adapted), r"lm_head is a \S+Adapted, not a torch"),
    "our own layer elsewhere": (set_module("lm_head", QuantLinear), r"lm_head is a obr\S+QuantLinear, not a torch"),
    "embedding": (set_module("model.embed_tokens", prompted), r"embed_tokens is a \S+Prompted, not a torch"),
    "norm": (set_module("model.norm", norm_of_a_subclass), r"model\.norm is a \S+OtherNorm, not a transformers"),
    "activation": (set_module(f"{MLP}.act_fn", lambda _: nn.GELU()), r"act_fn is a \S+GELU, not a"),
    "compiled block": (set_module("model.layers.1", torch.compile), "as it was before `torch.compile`"),
    "compiled in place": (on(MLP, nn.Module.compile), r"layers\.1\.mlp is compiled"),
    "extra module": (setting("model.layers.1", "probe", nn.Linear(96, 2)), r"extra module model\.layers\.1\.probe"),
    "extra parameter": (setting(MLP, "scale", nn.Parameter(torch.ones(1))), r"extra \S+mlp\.scale"),
    "extra buffer": (on(MLP, lambda m: m.register_buffer("mask", torch.ones(192, 96))), r"extra \S+mlp\.mask"),
    "head with a bias": (set_module("lm_head", with_bias), r"extra lm_head\.bias"),
    "biased projection": (set_module(UP, with_bias), r"extra \S+up_proj\.bias"),
    "hook": (on(MLP, lambda m: m.register_forward_hook(lambda *_: None)), r"1\.mlp has the hook .*remove it"),
    "pre-hook": (on("model.norm", lambda m: m.register_forward_pre_hook(lambda *_: None)), r"norm has the hook"),
    "backward hook": (on(MLP, lambda m: m.register_full_backward_hook(lambda *_: None)), r"mlp has the hook"),
    "parametrisation": (on(UP, lambda m: parametrize.register_parametrization(m, "weight", Doubled())),
                        r"up_proj is a \S+, not a torch\S+Linear: remove the parametrisation"),
    "weight norm": (on(UP, nn.utils.weight_norm), r"up_proj has the hook \S*WeightNorm"),
    "forward": (other_forward, r"layers\.1\.mlp has another forward than its class"),
    "another class of tensor": (quantised_tensor, r"up_proj\.weight is a \S+Packed, no plain tensor"),
    "int8": (int8, r"up_proj\.weight holds int8, no weights: load the model in full precision"),
    "float8": (on(UP, lambda m: m.to(torch.float8_e4m3fn)), r"up_proj\.weight holds float8_e4m3fn, no weights"),
    "two dtypes": (on(MLP, lambda m: m.bfloat16()), r"is float32, \S+weight is bfloat16: convert the model"),
    "offloaded": (on(MLP, lambda m: m.to("meta")), r"is not in memory .*load the whole model on one device"),
    "shared": (share, r"gate_proj\.weight and \S+up_proj\.weight share one tensor"),
    "same block twice": (lambda m: set_module("model.layers.1", lambda _: m.model.layers[0])(m),
                         r"no module model\.layers\.1 "),
    "blocks removed": (lambda m: setattr(m.model, "layers", m.model.layers[:1]), r"no module model\.layers\.1 "),
    "blocks added": (lambda m: m.model.layers.append(copy.deepcopy(layer(m))), r"extra module model\.layers\.2"),
    "another scale": (setting("model.layers.1.self_attn", "scaling", 1.0), r"self_attn\.scaling is 1\.0, by the"),
    "another epsilon": (setting("model.norm", "variance_epsilon", 0.5), r"norm\.variance_epsilon is 0\.5"),
    "renormalised": (setting("model.embed_tokens", "max_norm", 1.0), r"embed_tokens\.max_norm is 1\.0"),
    "another width": (set_module(UP, lambda _: nn.Linear(96, 200, bias=False)),
                      r"up_proj\.weight is 200 x 96, by the model's configuration it should be 192 x 96"),
    "devices": (lambda m: setattr(m, "hf_device_map", {"model": 0, "lm_head": "cpu"}), "lies on several devices"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("spoil, sentence", SPOILED.values(), ids=SPOILED)
def test_foreign_layers_and_attributes_are_refused(spoil, sentence, model, windows):
    """By each way in, and nothing changes."""
    spoil(model)
    kinds = {name: type(module) for name, module in model.named_modules()}
    for way in (
        lambda: obr.perplexity(model, windows),
        lambda: obr.rotate(model, "quarot"),
        lambda: obr.compress(model, None, RTN, progress=False),
    ):
        with pytest.raises(ObrError, match=sentence):
            way()
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert model.config._attn_implementation == "sdpa" and model.config.tie_word_embeddings


def test_a_class_with_another_forward_is_refused(model, windows, monkeypatch):
    """It changes every model of this process, and none that a checkpoint is read into elsewhere."""
    kind = type(layer(model).mlp)
    monkeypatch.setattr(kind, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    with pytest.raises(ObrError, match=r"layers\.0\.mlp has a forward of \w+, which no checkpoint would keep"):
        obr.perplexity(model, windows)


def test_attention_of_the_users_own_is_measured_and_not_replaced(model, windows):
    AttentionInterface.register(
        "halved", lambda m, q, *args, **kwargs: sdpa_attention_forward(m, q / 2, *args, **kwargs)
    )
    AttentionMaskInterface.register("halved", sdpa_mask)
    plain = obr.perplexity(model, windows)
    model.set_attn_implementation("halved")
    measured = obr.perplexity(model, windows)
    assert measured != pytest.approx(plain, rel=1e-4)
    for change in (lambda: obr.rotate(model, "quarot"), lambda: obr.compress(model, None, RTN, progress=False)):
        with pytest.raises(ObrError, match="The model attends by 'halved', which no checkpoint would keep"):
            change()
    assert obr.perplexity(model, windows) == measured


def test_storage_has_the_dtype_of_the_weights_not_of_the_configuration(tiny_folder):
    model = LlamaForCausalLM.from_pretrained(tiny_folder / "model", dtype=torch.float32).to(torch.bfloat16)
    model.config.dtype = torch.float32
    assert obr.compress(model, None, RTN, progress=False).obr_report.dtype == torch.bfloat16


def test_dequantised_models_are_measured_but_not_changed(model, windows):
    """transformers leaves the format of the files in the configuration of what it has dequantised."""
    expected = obr.perplexity(model, windows)
    model.config.quantization_config = {"quant_method": "gptq"}
    assert obr.perplexity(model, windows) == expected
    for change in (lambda: obr.rotate(model, "quarot"), lambda: obr.compress(model, None, RTN, progress=False)):
        with pytest.raises(ObrError, match=r"already \(gptq\)"):
            change()


def test_wrappers_and_other_classes_are_refused(model, plain, windows):
    extended = copy.deepcopy(model)
    extended.__class__ = type("Extended", (type(model),), {})
    for wrapped, sentence in (
        (nn.DataParallel(model), r"wrapped in DataParallel: pass its `\.module`"),
        (torch.compile(model), r"wrapped in OptimizedModule: pass its `\._orig_mod`"),
        (model.model, "LlamaModel, not transformers' LlamaForCausalLM: load it as one, without additions"),
        (extended, "Extended, not transformers' LlamaForCausalLM"),
        (nn.Sequential(model), "Sequential, no model of transformers"),
        ("path", "no model of transformers"),
    ):
        with pytest.raises(ObrError, match=sentence):
            obr.perplexity(wrapped, windows)


def test_hooks_of_every_module_are_refused(model, windows):
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ObrError, match="torch has hooks that run for all modules; remove them"):
            obr.perplexity(model, windows)
    finally:
        handle.remove()


def test_a_hook_after_compression_keeps_a_model_from_being_saved(model, tmp_path):
    obr.compress(model, None, RTN, progress=False)
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ObrError, match=r"mlp\.down_proj has the hook"):
        obr.save(model, tmp_path / "c")


def test_an_adapter_is_refused_until_it_is_merged(tiny_folder, windows):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(obr.load_model(tiny_folder / "model", device="cpu"), config).eval()
    inner = adapted.base_model.model
    right = own(inner, windows)
    for model in (adapted, inner):
        for way in (lambda m: obr.perplexity(m, windows), lambda m: obr.rotate(m, "quarot"), lambda m: Blocks(m)):
            with pytest.raises(ObrError, match=r"merge the adapter first \(`model = model\.merge_and_unload\(\)`\)"):
                way(model)
    assert own(inner, windows) == right
    assert obr.perplexity(adapted.merge_and_unload(), windows) == pytest.approx(right, rel=1e-4)


@torch.no_grad()
def test_a_head_that_was_untied_in_memory_is_saved(model, windows, tmp_path):
    """The flag in the configuration still says that it is tied."""
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight * 0.5, requires_grad=False)
    before = own(model, windows)
    obr.compress(model, None, {**RTN, "bits": 8}, progress=False)
    obr.save(model, tmp_path / "c")
    assert own(obr.load(tmp_path / "c", device="cpu"), windows) == pytest.approx(before, rel=0.01)
    assert own(obr.load(tmp_path / "c", device="cpu"), windows) == pytest.approx(own(model, windows), rel=1e-6)


def test_models_that_users_prepare_are_taken(plain, windows):
    """Half precision, fewer blocks, more tokens, outputs that were recorded before, gradient checkpointing."""
    for prepare in (
        lambda m: m.half(),
        lambda m: m.to(torch.float64),
        lambda m: m.resize_token_embeddings(520),
        lambda m: m(windows[:1], output_hidden_states=True),
        lambda m: m.gradient_checkpointing_enable(),
        lambda m: (setattr(m.model, "layers", m.model.layers[:1]), setattr(m.config, "num_hidden_layers", 1)),
    ):
        model = copy.deepcopy(plain)
        prepare(model)
        assert obr.perplexity(model, windows) == pytest.approx(own(model, windows), rel=2e-3)
        obr.compress(model.requires_grad_(False), None, RTN, progress=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.model.rotary_emb.inv_freq.mul_(0.99),
        lambda m: m.model.rotary_emb.inv_freq.copy_(m.model.rotary_emb.inv_freq.bfloat16().float()),
        lambda m: setattr(m.model.rotary_emb, "inv_freq", m.model.rotary_emb.inv_freq / 4),
        lambda m: m.config.rope_parameters.update(rope_theta=500.0),
    ],
)
def test_frequencies_that_no_file_would_keep_are_refused(model, windows, tmp_path, change):
    """A checkpoint keeps the configuration alone: the model that is loaded would compute others."""
    change(model)
    for step in (
        lambda: obr.perplexity(model, windows),
        lambda: obr.rotate(model, "quarot"),
        lambda: obr.compress(model, None, RTN, progress=False),
    ):
        with pytest.raises(ObrError, match=r"rotary_emb\.inv_freq differs from what the model's configuration gives"):
            step()


def test_frequencies_that_change_after_compression_keep_a_model_from_being_saved(model, tmp_path):
    obr.compress(model, None, RTN, progress=False)
    model.model.rotary_emb.inv_freq.mul_(0.5)
    with pytest.raises(ObrError, match=r"rotary_emb\.inv_freq differs"):
        obr.save(model, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_the_scale_of_embeddings_is_compared_too(windows):
    config = GemmaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    assert obr.perplexity(model, windows) == pytest.approx(own(model, windows), rel=1e-4)
    model.model.embed_tokens.embed_scale.mul_(2)
    with pytest.raises(ObrError, match=r"embed_tokens\.embed_scale differs from what the model's configuration"):
        obr.perplexity(model, windows)
