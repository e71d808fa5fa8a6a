"""Rotations: orthogonal, and invisible at 16 bits in every family."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import obr
from obr import rotations
from obr.errors import ObrError
from obr.hadamard import Kronecker, hadamard, known_hadamard, random_orthogonal
from obr.layout import Dimensions, layout_of
from obr.modules import QuantLinear
from obr.rotations.source import make

FAMILIES = {
    "llama": LlamaConfig(hidden_size=96, intermediate_size=344, num_attention_heads=6, num_key_value_heads=2),
    "llama, tied, 9 heads": LlamaConfig(
        hidden_size=144,
        intermediate_size=192,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "mistral": MistralConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2),
    "qwen2, 14 heads": Qwen2Config(
        hidden_size=112, intermediate_size=296, num_attention_heads=14, num_key_value_heads=2
    ),
    "qwen3, head_dim apart": Qwen3Config(
        hidden_size=96, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    ),
    "gemma": GemmaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=1, head_dim=32
    ),
    "granite": GraniteConfig(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        residual_multiplier=0.5,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        logits_scaling=2.0,
    ),
    "smollm3": SmolLM3Config(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0
    ),
}


def random_model(config, dtype=torch.float64):
    """A model with norms away from one and biases away from zero, so that a wrong fold shows."""
    torch.manual_seed(0)
    options = {**config.to_dict(), "vocab_size": 64, "num_hidden_layers": 2}
    options.pop("layer_types", None)
    config = type(config)(**options)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
        elif "bias" in name:
            parameter.copy_(torch.randn_like(parameter))
        else:
            parameter.mul_(5)
    return model


TOKENS = torch.arange(1, 41).view(2, 20)  # without padding, whose embedding is zero


class ExactNorm(torch.nn.Module):
    """A model's RMSNorm in the dtype of its input; transformers' own are float32 inside."""

    def __init__(self, norm, offset):
        super().__init__()
        self.weight, self.offset = norm.weight, offset
        self.eps = getattr(norm, "variance_epsilon", None) or norm.eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (self.weight + self.offset)


def exact_model(config):
    """A random model that computes in float64 throughout."""
    model = random_model(config)
    offset = layout_of(model.config).norm_offset
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, ExactNorm(module, offset))
    return model


def change(model, rotate) -> float:
    """Largest change of the logits, over the largest logit."""
    before = model(TOKENS).logits
    rotate(model)
    return float((model(TOKENS).logits - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", rotations.KINDS)
def test_logits_do_not_change(family, kind):
    assert change(exact_model(FAMILIES[family]), lambda m: obr.rotate(m, kind, seed=7)) < 1e-12
    assert change(random_model(FAMILIES[family], torch.float32), lambda m: obr.rotate(m, kind, seed=7)) < 1e-3


def test_the_online_parts_are_there():
    model = random_model(FAMILIES["llama"])
    obr.rotate(model, "quarot")
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert isinstance(attention.o_proj, QuantLinear) and attention.o_proj.transform.columns == 96
    assert mlp.down_proj.transform.columns == 344
    assert attention.key_value_quantizer.transform.columns == 16
    assert attention.q_proj.transform is None
    eye = torch.eye(16, dtype=torch.float64)
    assert not torch.equal(attention.key_value_quantizer.transform(eye), eye)


@pytest.mark.parametrize("part", ["residual"])
def test_a_residual_matrix_that_is_not_orthogonal_shows(part):
    def rotate(model):
        rotation = rotations.draw("quarot", Dimensions.of(model.config))
        broken = rotation.transforms[part]
        broken.factor0 = broken.factor0 + 0.1 * random_orthogonal(len(broken.factor0), torch.Generator())
        obr.rotate(model, rotation)

    assert change(random_model(FAMILIES["llama"]), rotate) > 1e-3


def test_centred_embeddings_show():
    def rotate(model):
        embed = model.model.embed_tokens.weight
        embed -= embed.mean(1, keepdim=True)
        obr.rotate(model, "quarot")

    assert change(random_model(FAMILIES["llama"]), rotate) > 1e-3


SIZES = [1, 2, 9, 14, 64, 96, 128, 576, 896, 960, 1536, 4864, 5632, 11008, 13824, 14336, 18944, 28672, 29568]


@pytest.mark.parametrize("n", SIZES)
def test_transforms_are_orthogonal_and_flat(n):
    transform = hadamard(n, torch.Generator().manual_seed(0))
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = transform(x)
    assert torch.allclose(y @ y.T, x @ x.T, rtol=1e-5)
    spike = torch.zeros(1, n, dtype=torch.float64)
    spike[0, -1] = 1
    if n not in (9, 14, 29568):  # Hadamard: one outlier is spread evenly
        assert torch.allclose(transform(spike).abs(), torch.full_like(spike, n**-0.5), rtol=1e-5)


def test_the_kronecker_product_is_what_it_says():
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(k, k, generator=generator) for k in (3, 4, 2))
    x, signs = torch.randn(5, 24, generator=generator), torch.randn(24, generator=generator).sign()
    assert torch.allclose(Kronecker([a, b, c], signs)(x), (x * signs) @ torch.kron(torch.kron(a, b), c).T, atol=1e-5)
    assert torch.allclose(Kronecker([a, 8])(x), x @ torch.kron(a, torch.eye(8)).T, atol=1e-5)


def test_known_hadamard_matrices():
    for n in (12, 20, 36, 172):
        matrix = known_hadamard(n)
        assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64))
    assert known_hadamard(9) is None


def test_the_same_seed_gives_the_same_rotation_and_files_come_back(tmp_path):
    dimensions = Dimensions.of(FAMILIES["llama, tied, 9 heads"])
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        rotations.save(rotations.draw("quarot", dimensions, seed), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()
    loaded, drawn = rotations.load(tmp_path / "a", dimensions), rotations.draw("quarot", dimensions)
    x = torch.randn(2, 144, dtype=torch.float64)
    assert torch.equal(loaded.transforms["residual"](x), drawn.transforms["residual"](x))
    with pytest.raises(ObrError, match=r"transform 'residual' has size 144, but the model needs 96"):
        rotations.load(tmp_path / "a", Dimensions.of(FAMILIES["llama"]))
    drawn.transforms["down"].factor0 *= 1.1
    rotations.save(drawn, tmp_path / "stretched")
    with pytest.raises(ObrError, match=r"transform 'down' is not orthogonal \(it scales by 1.1"):
        rotations.load(tmp_path / "stretched", dimensions)
    (tmp_path / "d").write_text("not a rotation")
    with pytest.raises(ObrError, match="is not a rotation of this project"):
        rotations.load(tmp_path / "d", dimensions)


def test_unknown_kinds_and_families_are_refused_by_name():
    with pytest.raises(ObrError, match="Rotation 'twist' is not known; choose one of quarot"):
        rotations.draw("twist", Dimensions.of(FAMILIES["llama"]))
    with pytest.raises(ObrError, match="'mixtral' is a mixture of experts"):
        layout_of(MixtralConfig())
    with pytest.raises(ObrError, match="add an entry to FAMILIES"):
        layout_of(type("Config", (), {"model_type": "gpt2"})())


def test_a_rotation_can_be_a_file(tiny_folder, tmp_path):
    """Of this project's format, by path: for one model, of one hash."""
    model = tiny_folder / "model"
    make({"kind": "quarot", "seed": 3}, model, tmp_path / "model.safetensors")
    source = {"source": "path", "path": str(tmp_path / "{model}.safetensors")}
    make({"kind": "file", "source": source}, model, tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ObrError, match=r"has sha256 .*, not 000"):
        make({"kind": "file", "source": {**source, "sha256": "0" * 64}}, model, tmp_path / "no")
    with pytest.raises(ObrError, match=r"gone\.safetensors"):
        make({"kind": "file", "source": {"source": "path", "path": "gone.safetensors"}}, model, tmp_path)
