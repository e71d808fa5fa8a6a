"""Wanda's masks from norms in which calibration sequence i counts 1/i: their formula, and every way to them."""

import json

import pytest
import torch
from safetensors.torch import save_file

import obr
from helpers.random_llama import random_llama
from obr.calibration import collect_hessians
from obr.checkpoints.verify import verify_checkpoint
from obr.compression import blocks as compression
from obr.compression.recompute import Places, repeat
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.methods.layer_hessian import Hessian
from obr.models.blocks import Blocks
from obr.rotations import apply
from obr.rotations.obtain import make

RECIPE = {"method": "wanda", "mask": "wanda_harmonic", "bits": 16, "calibration": "c"}


def model_of():
    return random_llama(initializer_range=0.1)


@pytest.fixture(scope="module")
def tokens():
    """(8, 32): sequences of different tokens, so that their order matters."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randint(16 * i, 16 * i + 16, (32,), generator=generator) for i in range(8)])


@pytest.fixture(scope="module")
def files(tokens, tmp_path_factory):
    """Folder with a random model, its rotation, tokens and cached Hessians."""
    folder = tmp_path_factory.mktemp("files")
    model_of().save_pretrained(folder / "model")
    make({"kind": "quarot", "seed": 0}, folder / "model", folder / "rotation.safetensors")
    save_file({"tokens": tokens}, folder / "tokens.safetensors", metadata={"calibration": "{}"})
    inputs = folder / "model", folder / "rotation.safetensors", folder / "tokens.safetensors"
    collect_hessians.hessian_stage(*inputs, folder / "hessians", device="cpu")
    return folder


def compressed(tokens, **options) -> dict[str, torch.Tensor]:
    model = obr.compress(model_of(), tokens, {**RECIPE, **options}, progress=False)
    return {name: module.weight for name, module in model.named_modules() if name.endswith("_proj")}


def stage(files, out, **options) -> dict:
    recipe = Recipe.parse({**RECIPE, "rotation": "quarot", **options})
    inputs = {"rotation": files / "rotation.safetensors"}
    if recipe.hessian == "cached":
        inputs["hessians"] = files / "hessians"
    else:
        inputs["tokens"] = files / "tokens.safetensors"
    return compress_stage(files / "model", recipe, out, **inputs, device="cpu")


def blocks_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def as_released(weight: torch.Tensor, sequences: list[torch.Tensor], sparsity: float = 0.5) -> torch.Tensor:
    """The mask by the released formula: squared norms added up, each divided by the sequences seen so far."""
    scaler = torch.zeros(weight.shape[1])
    for seen, x in enumerate(sequences, start=1):
        scaler += torch.norm(x.T, p=2, dim=-1) ** 2 / seen
    scores = weight.abs() * scaler.sqrt()
    mask = torch.ones_like(weight, dtype=torch.bool)
    for row, order in zip(mask, scores.sort(dim=1, stable=True).indices, strict=True):
        row[order[: int(weight.shape[1] * sparsity)]] = False
    return mask


def test_masks_are_those_of_the_released_formula(tokens):
    """Of every layer, from the inputs that it gets once the groups and blocks before it are pruned."""
    found = obr.compress(model_of(), tokens, RECIPE, progress=False)
    dense, blocks = Blocks(model_of()), Blocks(found)
    hidden, arguments = blocks.embed(tokens)
    for index in range(2):
        block = blocks.load(index)
        for name in blocks.layout.linears:
            inputs = [collect_hessians.inputs_of(block, name, states, arguments[index]) for states in hidden]
            weight = dense.load(index).get_submodule(name).weight
            mask = block.get_submodule(name).weight != 0
            assert torch.equal(mask, as_released(weight, inputs)), (index, name)
        for i, states in enumerate(hidden):
            hidden[i] = block(states, **arguments[index])


def test_the_order_of_the_sequences_matters_to_these_masks_alone(tokens):
    layers = {mask: compressed(tokens, mask=mask) for mask in ("wanda", "wanda_harmonic")}
    turned = {mask: compressed(tokens.flip(0), mask=mask) for mask in layers}
    name = "model.layers.0.self_attn.q_proj"

    def differing(one, other):
        return float(((one[name] == 0) != (other[name] == 0)).float().mean())

    assert differing(layers["wanda"], turned["wanda"]) == 0
    assert differing(layers["wanda_harmonic"], turned["wanda_harmonic"]) > 0.01
    assert differing(layers["wanda"], layers["wanda_harmonic"]) > 0.005


@pytest.mark.parametrize("method", ["obr_rtn", "obr_gptq"])
def test_obr_restores_under_the_same_masks(method, tokens):
    pruned = compressed(tokens, bits=4)
    for name, weight in compressed(tokens, method=method, bits=4).items():
        if "layers.0.self_attn" in name and "o_proj" not in name:  # whose inputs are the dense model's
            assert torch.equal(weight[pruned[name] == 0], torch.zeros(int((pruned[name] == 0).sum()))), name
            assert (weight != 0).any()


def test_harmonic_mask_of_one_layer_needs_norms(tokens):
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randn(20, 32, generator=generator) * torch.rand(32, generator=generator) for _ in range(5)]
    weight, matrix = torch.randn(24, 32, generator=generator), sum(x.T @ x for x in sequences)
    harmonic = sum(x.square().sum(0) / i for i, x in enumerate(sequences, 1))
    for method in ("wanda", "obr_rtn", "obr_gptq"):
        layer = obr.restore(weight, matrix, method, mask="wanda_harmonic", harmonic=harmonic)
        assert torch.equal(layer.mask, as_released(weight, sequences)), method
        own = obr.restore(weight, Hessian(matrix, harmonic=harmonic), method, mask="wanda_harmonic")
        assert torch.equal(own.weight, layer.weight)
        with pytest.raises(
            ObrError, match=r"layer: mask wanda_harmonic needs column norms .*give them as `harmonic`"
        ):
            obr.restore(weight, matrix, method, mask="wanda_harmonic")
    patterned = obr.restore(weight, matrix, "wanda", mask="wanda_harmonic", harmonic=harmonic, pattern="2:4")
    scores = (weight.abs() * harmonic.sqrt()).view(24, 8, 4)
    assert torch.equal(patterned.mask.view(24, 8, 4), scores >= scores.sort(-1).values[..., 2:3])
    # Where no mask is chosen by them, they are not needed.
    for options in ({"sparsity": 0.0}, {"method": "joint", "sweeps": 0}, {"method": "gptq"}, {"mask": layer.mask}):
        obr.restore(weight, matrix, **{"method": "obr_rtn", "mask": "wanda_harmonic", **options})


def test_norms_that_do_not_fit_are_refused():
    weight, matrix = torch.randn(4, 8), torch.eye(8)
    for harmonic in (torch.ones(7), -torch.ones(8), torch.full((8,), float("nan"))):
        with pytest.raises(ObrError, match=r"harmonic has shape .*; it must hold the squared norms, 0 or more, of 8"):
            obr.restore(weight, matrix, "wanda", mask="wanda_harmonic", harmonic=harmonic)
    with pytest.raises(ObrError, match="harmonic is given beside a Hessian object"):
        obr.restore(weight, Hessian(matrix), "wanda", mask="wanda_harmonic", harmonic=torch.ones(8))


@pytest.mark.slow
def test_a_model_in_memory_and_a_streamed_one_get_the_same(files, tokens, tmp_path):
    manifest = stage(files, tmp_path / "c", rotation="quarot", bits=4)
    assert manifest["recipe"]["mask"] == "wanda_harmonic"
    model = obr.load(tmp_path / "c")
    own = model_of()
    obr.rotate(own, "quarot", seed=0)
    obr.compress(own, tokens, {**RECIPE, "bits": 4}, progress=False)
    state = own.state_dict()
    for name, module in model.named_modules():
        if name.endswith(
            "_proj"
        ):  # the stage stores float32, obr.compress float16: later inputs differ by its rounding
            same = ((module.weight == 0) == (state[f"{name}.weight"] == 0)).float().mean()
            assert same > 0.995 and (same == 1 or "layers.0.self_attn" not in name or "o_proj" in name), name
    assert verify_checkpoint(tmp_path / "c") == []
    places = Places(files / "model", files / "rotation.safetensors", files / "tokens.safetensors")
    assert all(layer.identical for layer in repeat(tmp_path / "c", 5, places, "cpu"))


def test_cached_hessians_bring_the_norms(files, tmp_path):
    stage(files, tmp_path / "c", hessian="cached")
    cached = collect_hessians.load(files / "hessians" / "block_001.safetensors", harmonic=True)
    rotated = apply.open_blocks(files / "model", files / "rotation.safetensors", device="cpu").load(1)
    state = obr.load(tmp_path / "c").state_dict()
    for name, group in (("self_attn.v_proj", "qkv"), ("mlp.down_proj", "down")):
        scores = rotated.get_submodule(name).weight.abs() * cached[group].harmonic.sqrt()
        other = rotated.get_submodule(name).weight.abs() * cached[group].hessian.diagonal().sqrt()
        kept = state[f"model.layers.1.{name}.weight"] != 0
        for norms, same in ((scores, True), (other, False)):
            least = norms.sort(1).values[:, norms.shape[1] // 2, None]
            assert torch.equal(kept, norms >= least) == same, name


def test_cached_hessians_without_norms_are_refused_in_a_sentence(files, tmp_path):
    old = tmp_path / "hessians"
    old.mkdir()
    (old / "hessian.json").write_bytes((files / "hessians" / "hessian.json").read_bytes())
    for path in (files / "hessians").glob("block_*"):
        collect_hessians.save(
            {g: collect_hessians.Moments(m.hessian) for g, m in collect_hessians.load(path).items()}, old / path.name
        )
    recipe = {"rotation": "quarot", "hessian": "cached", "method": "obr_gptq", "bits": 4}
    inputs = {"rotation": files / "rotation.safetensors", "hessians": old, "device": "cpu"}
    with pytest.raises(
        ObrError, match=r"block_000\.safetensors has no harmonic norms, .*run the stage hessian again"
    ):
        compress_stage(files / "model", Recipe.parse({**RECIPE, **recipe}), tmp_path / "a", **inputs)
    assert not (tmp_path / "a" / "manifest.json").exists()
    compress_stage(files / "model", Recipe.parse({**RECIPE, **recipe, "mask": "wanda"}), tmp_path / "b", **inputs)


def test_held_out_windows_do_not_count(tokens):
    held, fewer = compressed(tokens, held_out=3), compressed(tokens[:5])
    assert all(torch.equal(held[name], weight) for name, weight in fewer.items())


def test_asymmetric_calibration_takes_norms_of_actual_inputs(tokens):
    """As in the Hessians; in the first group they are the dense model's, and nothing is shifted."""
    aimed, plain = compressed(tokens, asymmetry=1.0), compressed(tokens)
    for name in ("q", "k", "v"):
        layer = f"model.layers.0.self_attn.{name}_proj"
        assert torch.equal(aimed[layer] == 0, plain[layer] == 0)
    assert any(not torch.equal(aimed[name] == 0, weight == 0) for name, weight in plain.items())


def test_norms_are_of_quantised_inputs(tokens):
    quantised = {"hessian_inputs": "quantised", "activations": {"bits": 2}}
    layer = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(compressed(tokens, **quantised)[layer] == 0, compressed(tokens)[layer] == 0)


class Plug(Exception):
    """Pulled."""


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_one_with_another_mask_does_not(files, tmp_path, monkeypatch):
    stage(files, tmp_path / "undisturbed", bits=4)
    write = compression.Writer.block

    def pulled(self, index, *arguments):
        if index == 1:
            raise Plug
        write(self, index, *arguments)

    monkeypatch.setattr(compression.Writer, "block", pulled)
    with pytest.raises(Plug):
        stage(files, tmp_path / "out", bits=4)
    monkeypatch.undo()
    with pytest.raises(ObrError, match=r"holds blocks of another run \(its recipe differs"):
        stage(files, tmp_path / "out", bits=4, mask="wanda")
    stage(files, tmp_path / "out", bits=4)
    assert blocks_of(tmp_path / "out") == blocks_of(tmp_path / "undisturbed")


@pytest.mark.slow
def test_allocations_use_the_recipes_mask(tokens):
    """Only where an option's method takes a mask are the norms needed."""
    options = [{"method": "obr_rtn", "bits": 4, "sparsity": 0.5}, {"method": "gptq", "bits": 3}]
    recipe = {"method": "obr_rtn", "bits": 4, "mask": "wanda_harmonic", "calibration": "c"}
    for several, mask in ((options, "wanda_harmonic"), (options[1:], None)):
        parsed = Recipe.parse({**recipe, "allocation": {"bits": 3.0, "options": several}})
        assert parsed.chosen_mask == mask and parsed.needs_harmonic == (mask is not None)
    one = Recipe.parse({**recipe, "allocation": {"bits": 3.0, "options": options[:1]}})
    model = obr.compress(model_of(), tokens, json.loads(json.dumps(one.to_dict())), progress=False)
    plain = compressed(tokens, method="obr_rtn", bits=4)
    layer = "model.layers.0.self_attn.q_proj"
    assert torch.equal(model.get_submodule(layer).weight, plain[layer])
