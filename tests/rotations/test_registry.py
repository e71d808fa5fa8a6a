"""Rotations: orthogonal, and invisible at 16 bits in every family."""

import pytest
import torch
import yaml

import obr
from helpers.family_models import EXPERTS, FAMILIES, random_model
from helpers.paths import ROOT
from obr.errors import ObrError
from obr.models.architectures import Dimensions, layout_of
from obr.models.hadamard import Kronecker, hadamard, known_hadamard
from obr.models.layers import ATTENTION, QuantLinear, wrap_block
from obr.rotations import fold, published_files, registry
from obr.rotations.obtain import make


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


def test_kronecker_transform_equals_dense_product():
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(k, k, generator=generator) for k in (3, 4, 2))
    x, signs = torch.randn(5, 24, generator=generator), torch.randn(24, generator=generator).sign()
    assert torch.allclose(Kronecker([a, b, c], signs)(x), (x * signs) @ torch.kron(torch.kron(a, b), c).T, atol=1e-5)
    assert torch.allclose(Kronecker([a, 8])(x), x @ torch.kron(a, torch.eye(8)).T, atol=1e-5)


def test_a_rotation_in_blocks_mixes_within_them_alone(tmp_path):
    dimensions = Dimensions(hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, blocks=1)
    for block, mixed in ((16, 16), (64, 64)):
        rotation = registry.draw("quarot", dimensions, block=block)
        assert rotation.about()["block"] == block and "o inputs" not in rotation.about()["online"]
        for name, n in (("residual", 576), ("value", 64), ("query_key", 64), ("down", 1536)):
            matrix = rotation.transforms[name].matrix()
            ours = torch.arange(n)[:, None] // mixed == torch.arange(n) // mixed
            assert torch.allclose(matrix.abs(), ours.double() * mixed**-0.5), (name, block)
        registry.save(rotation, tmp_path / "rotation")
        loaded = registry.load(tmp_path / "rotation", dimensions)
        assert loaded.about() == rotation.about() and loaded.changes(0).inputs.keys() == {"down"}
    narrow = Dimensions(hidden=96, intermediate=256, heads=4, kv_heads=2, head_dim=24, blocks=1)
    wide = registry.draw("quarot", narrow, block=128)  # wider than hidden size and heads: they are mixed as a whole
    assert bool((wide.transforms["residual"].matrix() != 0).all()) and wide.transforms["down"].sizes == [2, 128]
    with pytest.raises(
        ObrError, match="blocks of 128 do not divide the hidden size 576; choose a power of two up to 64"
    ):
        registry.draw("quarot", dimensions, block=128)
    for block in (24, 0):
        with pytest.raises(ObrError, match=f"Hadamard blocks of {block}; choose one of 16, 32, 64, 128, or null"):
            registry.draw("quarot", dimensions, block=block)
    with pytest.raises(ObrError, match="Rotation 'spinquant' has no option for block: 16; use kind quarot"):
        registry.draw("spinquant", dimensions, block=16)


def test_a_fused_rotation_is_the_part_of_the_whole_that_weights_take(tmp_path):
    dimensions = Dimensions(hidden=96, intermediate=256, heads=4, kv_heads=2, head_dim=24, blocks=1)
    whole, fused = (registry.draw("quarot", dimensions, 3, fused=fused) for fused in (False, True))
    registry.save(fused, tmp_path / "rotation")
    fused = registry.load(tmp_path / "rotation", dimensions)
    assert fused.about()["fused"] and fused.about()["online"] == []
    assert fused.transforms.keys() == {"residual", "value"}
    for name, transform in fused.transforms.items():
        assert torch.equal(transform.matrix(), whole.transforms[name].matrix())


def test_known_hadamard_matrices():
    for n in (12, 20, 36, 172):
        matrix = known_hadamard(n)
        assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64))
    assert known_hadamard(9) is None


def test_the_same_seed_gives_the_same_rotation_and_files_come_back(tmp_path):
    dimensions = Dimensions.of(FAMILIES["llama, tied, 9 heads"])
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        registry.save(registry.draw("quarot", dimensions, seed), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()
    loaded, drawn = registry.load(tmp_path / "a", dimensions), registry.draw("quarot", dimensions)
    x = torch.randn(2, 144, dtype=torch.float64)
    assert torch.equal(loaded.transforms["residual"](x), drawn.transforms["residual"](x))
    with pytest.raises(ObrError, match=r"transform 'residual' has size 144, but the model needs 96"):
        registry.load(tmp_path / "a", Dimensions.of(FAMILIES["llama"]))
    drawn.transforms["down"].factor0 *= 1.1
    registry.save(drawn, tmp_path / "stretched")
    with pytest.raises(ObrError, match=r"transform 'down' is not orthogonal \(it scales by 1.1"):
        registry.load(tmp_path / "stretched", dimensions)
    (tmp_path / "d").write_text("not a rotation")
    with pytest.raises(ObrError, match="is not a rotation of this project"):
        registry.load(tmp_path / "d", dimensions)


def test_unknown_kinds_and_families_are_refused_by_name():
    with pytest.raises(ObrError, match="Rotation 'twist' is not known; choose one of quarot"):
        registry.draw("twist", Dimensions.of(FAMILIES["llama"]))
    with pytest.raises(ObrError, match="add an entry to FAMILIES"):
        layout_of(type("Config", (), {"model_type": "gpt2"})())


@pytest.mark.parametrize("kind", registry.KINDS)
def test_rotation_file_roundtrip_is_exact_for_every_kind(kind, tmp_path):
    dimensions = Dimensions.of(FAMILIES["llama"])
    drawn = registry.draw(kind, dimensions, 5)
    drawn.options["steps"] = 100
    registry.save(drawn, tmp_path / "a")
    loaded = registry.load(tmp_path / "a", dimensions)
    assert loaded.kind == kind and loaded.seed == 5 and loaded.about() == drawn.about()
    assert loaded.about()["steps"] == 100
    assert loaded.parameters.keys() == drawn.parameters.keys()
    for name, tensor in drawn.parameters.items():
        assert torch.equal(loaded.parameters[name], tensor), name
    registry.save(registry.draw(kind, dimensions, 6), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()
    if drawn.parameters:
        short = Dimensions(**{**vars(dimensions), "blocks": dimensions.blocks - 1})
        with pytest.raises(ObrError, match=r"is for 32 blocks .32 are in it., but the model has 31; it was made for"):
            registry.load(tmp_path / "a", short)


@pytest.mark.parametrize(
    "kind, name, change, message",
    [
        ("spinquant", "R1", lambda x: x * 1.001, r"R1 is not orthogonal \(RᵀR is 2.0e-03 off\)"),
        ("spinquant", "blocks.1.R2", lambda x: x[:4, :4], r"blocks.1.R2 has shape \(4, 4\), but the model needs"),
        ("spinquant", "R1", None, r"lacks \['R1'\]"),
        ("ostquant", "blocks.0.S_ov", lambda x: x * 0, "blocks.0.S_ov is a scale with zeros"),
        ("flatquant", "blocks.0.value", lambda x: x / x.sum() / 0, "blocks.0.value has values that are not finite"),
        ("flatquant", "blocks.0.o.heads", lambda x: x[:1].expand_as(x), "condition number .* cannot be undone"),
        ("flatquant", "blocks.1.keys", None, "lacks .*'blocks.1.keys'"),
        ("scaling", "blocks.0.q.limit", lambda x: torch.ones(96, 5), "has 5 groups, which do not divide the 96 col"),
    ],
)
def test_broken_parameters_are_refused_by_name(kind, name, change, message, tmp_path):
    dimensions = Dimensions(**{**vars(Dimensions.of(FAMILIES["llama"])), "blocks": 2})
    rotation = registry.draw(kind, dimensions)
    if kind == "scaling":
        rotation.parameters |= {f"blocks.{i}.q.limit": torch.ones(96, 4) for i in range(2)}
        rotation.check("whole")
    if change is None:
        del rotation.parameters[name]
    else:
        rotation.parameters[name] = change(rotation.parameters[name])
    registry.save(rotation, tmp_path / "broken")
    with pytest.raises(ObrError, match=message):
        registry.load(tmp_path / "broken", dimensions)


@pytest.mark.parametrize("kind", ["spinquant", "ostquant", "flatquant", "scaling"])
def test_folds_are_differentiable(kind):
    """The same code folds for good and learns: every parameter that the weights depend on gets a gradient."""
    model = random_model(FAMILIES["llama, all heads apart"])
    layout, block = layout_of(model.config), model.model.layers[0]
    wrap_block(block, layout)
    rotation = registry.draw(kind, Dimensions.of(model.config))
    for tensor in rotation.parameters.values():
        tensor.requires_grad_()
    changes = rotation.changes(0)
    new = fold.fold_block(dict(block.named_parameters()), changes, layout, clip=True)
    for path in layout.linears:
        linear = block.get_submodule(path)
        if linear.bias is None and f"{path}.bias" in new:
            linear.bias = torch.nn.Parameter(torch.zeros_like(new[f"{path}.bias"]), requires_grad=False)
    fold.attach(block, changes, layout)
    arguments = {"position_embeddings": model.model.rotary_emb(torch.zeros(1), torch.arange(9)[None])}
    model.set_attn_implementation(ATTENTION)
    hidden = torch.randn(1, 9, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.func.functional_call(block, new, (hidden,), arguments).square().sum().backward()
    for name, tensor in rotation.parameters.items():
        if name.startswith(("blocks.0.", "R")) and ".range_" not in name:
            assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(), name


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


def test_the_schema_knows_all_formats():
    path = ROOT / "workflow/schemas/config.schema.yaml"
    entry = yaml.safe_load(path.read_text())["properties"]["rotations"]["additionalProperties"]["properties"]
    assert set(entry["format"]["enum"]) == {"obr", *published_files.READERS}


@pytest.mark.parametrize("name", ["flatquant", "ostquant", "smoothquant", "awq", "omniquant"])
def test_published_files_of_dense_models_leave_experts_unrotated(name, tmp_path):
    """Also where the file is missing: it is not needed."""
    random_model(EXPERTS["mixtral"]).save_pretrained(tmp_path / "model")
    entry = {"kind": "file", "format": name, "source": {"source": "path", "path": "gone"}}
    make(entry, tmp_path / "model", tmp_path / "r.safetensors")
    about = registry.load(tmp_path / "r.safetensors", Dimensions.of(EXPERTS["mixtral"])).about()
    assert about["asked"] == name and f"files of {name} name the layers of dense models" in about["reason"]
