"""Scales of groups of columns: their grids, GPTQ with them, and checkpoints that hold them."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import obr
from helpers.layer_samples import layer
from helpers.random_llama import random_llama
from helpers.workflow_runs import with_hashes
from obr.checkpoints.format import CheckpointBlocks
from obr.checkpoints.packing import pack, unpack
from obr.checkpoints.verify import verify_checkpoint
from obr.config.methods import METHODS
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.export import dispatch
from obr.methods.gptq import gptq_sweep
from obr.methods.grid import Grid
from obr.methods.layer import Layer, Solution
from obr.methods.layer_hessian import Hessian
from obr.methods.obr import SWEPT_TOLERANCE, TOLERANCE, restore_pruned
from obr.methods.refit_scales import refit
from obr.methods.restore import recipe_of_layers, restore, restore_together
from obr.planning import cost_model, tensor_sizes


@pytest.mark.parametrize("clip", ["minmax", "mse"])
def test_groups_are_rounded_as_separate_rows(clip):
    weight, _ = layer(5, 70)
    found = restore(weight, None, "rtn", bits=3, group=32, clip=clip)
    assert found.scale.shape == (5, 3)  # the last group has 6 columns
    for number, part in enumerate(weight.split(32, dim=1)):
        scale = Grid.fit(part, 3, clip).scale.half().float()
        codes = (part / scale).round().clamp(-4, 3)
        columns = slice(32 * number, 32 * (number + 1))
        assert torch.equal(found.scale[:, number : number + 1], scale)
        assert torch.equal(found.codes[:, columns].float(), codes)
        assert torch.equal(found.weight[:, columns], codes * scale)


def gptq_by_columns(weight, hessian, bits, group, clip):
    """GPTQ as plainly as it can be said: one column after the other, in float64; (codes, scales)."""
    work, factor = weight.double(), hessian.inverse_factor.double()
    codes, scales = torch.zeros_like(work), []
    for j in range(work.shape[1]):
        if j % group == 0:
            grid = Grid.fit(work[:, j : j + group].float(), bits, clip)
            scales.append(grid.scale.half().double())
        codes[:, j] = (work[:, j] / scales[-1][:, 0]).round().clamp(grid.low, grid.high)
        error = (work[:, j] - codes[:, j] * scales[-1][:, 0]) / factor[j, j]
        work[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return codes, torch.cat(scales, 1)


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("group", [16, 48, 96, 128, 200])  # whole, ragged, and more than a block of the sweep
def test_gptq_fits_group_scale_at_its_first_column(group, clip):
    weight, matrix = layer(12, 300)
    hessian = Hessian(matrix)
    found = restore(weight, hessian, "gptq", bits=3, group=group, clip=clip)
    codes, scales = gptq_by_columns(weight, hessian, 3, group, clip)
    same = (found.codes == codes).float().mean()
    assert same > 0.995 and ((found.scale / scales - 1).abs() < 0.02).float().mean() > 0.98
    first = Grid.fit(weight, 3, clip, group).scale
    assert torch.equal(found.scale[:, 0], first[:, 0]) and not torch.equal(found.scale[:, 1], first[:, 1])


@pytest.mark.parametrize("group", [300, 512])
def test_a_group_as_wide_as_the_row_is_the_row(group):
    weight, matrix = layer(12, 300)
    hessian, mask = Hessian(matrix), torch.ones(12, 300, dtype=torch.bool)
    grid = Grid.fit(weight, 3, "mse", group)
    row = Grid(grid.scale.clone(), 3)  # the row's scale in 16 bits, too
    recipe = recipe_of_layers({"method": "gptq", "bits": 3, "group": group})
    swept, alike = (gptq_sweep(Layer(weight, hessian, mask, of, recipe, (12,))) for of in (grid, row))
    assert torch.equal(swept.weight, alike.weight)
    assert torch.equal(swept.grid.scale, row.scale) and torch.equal(
        row.scale, Grid.fit(weight, 3).scale.half().float()
    )


def test_narrower_groups_leave_less_error():
    weight, matrix = layer(32, 256)
    weight[:, ::64] *= 6
    for method in ("rtn", "gptq"):
        errors = [restore(weight, matrix, method, bits=3, group=g).relative_error for g in (16, 64, None)]
        assert errors == sorted(errors), method


@pytest.mark.parametrize("order", ["given", "hessian"])
@pytest.mark.parametrize("group", [7, 16, 32])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "obr_rtn", "obr_gptq"])
def test_pruned_layers_have_scales_of_groups(method, group, order):
    """In pairs of 4:8, as NVFP4's sparse tensor cores take them; OBR's scales are of the weights it has restored."""
    weight, matrix = layer(12, 160)
    weight[:, ::40] *= 6
    options = {"bits": 4, "pattern": "paired 4:8"}
    if "magnitude" in METHODS[method].masks:
        options["mask"] = "magnitude"
    if METHODS[method].ordered:
        options["column_order"] = order
    found = restore(weight, matrix, method, group=group, **options)
    dense = weight
    if method.startswith("obr"):
        tolerance = SWEPT_TOLERANCE if method == "obr_gptq" else TOLERANCE
        dense = restore_pruned(weight, Hessian(matrix), found.mask, tolerance)
    if order == "given" or not method.startswith("obr"):  # else solved in another order, to the solver's tolerance
        assert torch.equal(found.scale, Grid.fit(dense, 4, "mse", group).scale)
    assert torch.equal(found.weight, found.codes * Grid(found.scale, 4, group).over(160))
    assert (found.weight[~found.mask] == 0).all() and found.group == group
    assert (found.mask.unflatten(1, (-1, 4, 2)).any(3).sum(2) == 2).all()
    assert found.relative_error < restore(weight, matrix, method, **options).relative_error
    if method.startswith("obr"):
        for alpha in (0.0, 1.0):
            assert torch.equal(
                restore(weight, matrix, method, group=group, alpha=alpha, **options).scale, found.scale
            )


@pytest.mark.parametrize("method", ["obr_rtn", "obr_gptq"])
def test_groups_of_equal_scales_change_nothing(method, monkeypatch):
    """With the scale of the row for each of its groups, the codes are those of one scale a row."""
    weight, matrix = layer(8, 96)
    row = Grid.fit(weight, 4).scale.half().float()
    fit = Grid.fit.__func__

    def alike(cls, weight, bits, clip="mse", group=None, *_, **__):
        return Grid(row if group is None else row.expand(-1, 6).contiguous(), bits, group)

    monkeypatch.setattr(Grid, "fit", classmethod(alike))
    grouped, plain = (restore(weight, matrix, method, group=group) for group in (16, None))
    monkeypatch.setattr(Grid, "fit", classmethod(fit))
    assert (grouped.codes == plain.codes).float().mean() > 0.999


def test_layers_of_one_input_have_their_own_groups():
    weights = {"q": layer(8, 96)[0], "k": layer(4, 96, seed=1)[0]}
    hessian = Hessian(layer(8, 96)[1])
    together = restore_together(weights, hessian, {"method": "gptq", "bits": 3, "group": 32})
    for name, weight in weights.items():
        alone = restore(weight, hessian, "gptq", bits=3, group=32)
        assert torch.equal(together[name].weight, alone.weight) and torch.equal(together[name].scale, alone.scale)


@pytest.mark.parametrize("group", [7, 32, 48, 64, 100])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_packing_roundtrip_is_exact_for_grouped_scales(method, group):
    weight, hessian = layer(6, 64)
    weight[:, :32] *= 1e-7  # scales below the normal numbers of float16
    weight[0] = 0
    restored = restore(weight, hessian, method, bits=3, group=group)
    packed = pack(restored, torch.float16)
    back = unpack(packed)
    assert packed.tensors["scale"].dtype == torch.float16 and back.group == packed.about["group"] == group
    for part in ("weight", "codes", "scale", "mask"):
        assert torch.equal(getattr(back, part), getattr(restored, part)), part


def scales_by_rows(weight, codes, hessian, group):
    """Least squares of H^(1/2) for one row after the other, in float64."""
    factor = torch.linalg.cholesky(hessian.double()).mT
    found = []
    for row, its in zip(weight.double(), codes.double(), strict=True):
        columns = [torch.zeros_like(its).index_copy(0, i, its[i]) for i in torch.arange(len(its)).split(group)]
        system = factor @ torch.stack(columns, 1)
        found.append(torch.linalg.lstsq(system, (factor @ row)[:, None]).solution[:, 0])
    return torch.stack(found)


@pytest.mark.parametrize("group", [16, 32, 70, 100])  # whole, ragged, and no less than a row
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_rows_scales_are_fitted_together(method, group, monkeypatch):
    monkeypatch.setattr("obr.methods.refit_scales._SYSTEM_ELEMENTS", 40)  # several chunks of rows
    weight, hessian = layer(6, 70)
    plain, refitted = (
        restore(weight, hessian, method, bits=3, group=group, clip="minmax", refit=refit) for refit in (False, True)
    )
    assert torch.equal(plain.codes, refitted.codes) and refitted.relative_error < plain.relative_error
    assert torch.equal(refitted.scale.half().float(), refitted.scale)
    expected = scales_by_rows(weight, plain.codes, hessian, group)
    assert (expected > 0).all() and torch.allclose(refitted.scale.double(), expected, rtol=2e-3)


def test_scales_that_cannot_be_fitted_stay():
    weight, matrix = layer(3, 64)
    grid = Grid.fit(weight, 3, "mse", 16)
    values = grid.round(weight)
    values[0, 16:32] = 0  # no code tells what this scale should be
    values[1] = -values[1]  # the best scales are negative
    solution = refit(weight, Solution(values, torch.ones_like(values, dtype=torch.bool), grid), Hessian(matrix))
    found, refitted = solution.grid, solution.weight
    assert found.scale[0, 1] == grid.scale[0, 1] and found.scale[0, 0] != grid.scale[0, 0]
    assert torch.equal(found.scale[1], grid.scale[1]) and not torch.equal(found.scale[2], grid.scale[2])
    assert found.contains(refitted) and not refitted[0, 16:32].any()


def test_packed_size_of_groups_equals_formula():
    recipe = Recipe.parse({"method": "gptq", "bits": 3, "group": 128, "calibration": "c"})
    assert recipe.bits_per_weight == 3.125 and recipe.setting == "W3g128A16KV16"
    weight, hessian = layer(16, 256)
    assert (
        8 * pack(restore(weight, hessian, "gptq", bits=3, group=128), torch.float16).bytes / weight.numel() == 3.125
    )
    rows = Recipe.parse({"method": "gptq", "bits": 3, "calibration": "c"})
    sizes = tensor_sizes.Sizes.estimate(0.1)
    more = cost_model.checkpoint_bytes(sizes, recipe) - cost_model.checkpoint_bytes(sizes, rows)
    assert 0 < more < 0.125 / 8 * sizes.block * sizes.blocks
    assert cost_model.compress(sizes, recipe, 0, 1).elements > cost_model.compress(sizes, rows, 0, 1).elements


@pytest.mark.parametrize(
    "entry, sentence",
    [
        ({"group": 0}, "r.group is 0; it must be a number of columns"),
        ({"group": 12.5}, "r.group is 12.5, which is not a whole number"),
        ({"group": True}, "r.group is True, which is not a whole number"),
        (
            {"method": "sparsegpt_gptq"},
            "group is 128, but method sparsegpt_gptq takes one scale a row; use method rtn or gptq or magnitude or",
        ),
        ({"method": "dense"}, "group is 128, but method dense takes one"),
        ({"bits": 16}, "group is 128, but weights of 16 bits have no scales; use fewer bits, or group: null"),
        ({"allocation": {"bits": 4, "options": [{"method": "rtn"}]}}, "the options of an allocation take one scale"),
    ],
)
def test_groups_that_cannot_be_are_refused(entry, sentence):
    with pytest.raises(ObrError, match=sentence):
        Recipe.parse({"method": "gptq", "calibration": "c", "group": 128, **entry}, "r")


@pytest.mark.parametrize("group", [0, -3, "32", 1.5, True, 31, 10**15])
def test_files_with_other_groups_are_refused(group):
    packed = pack(restore(*layer(4, 64), "rtn", group=32), torch.float16)
    packed.about["group"] = group
    with pytest.raises(ObrError, match="its file is broken"):
        unpack(packed)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model at 3 bits in groups of 48, the last of a row ragged; its second block at 16 bits."""
    random_llama().save_pretrained(source := tmp_path_factory.mktemp("model"))
    model = obr.load_model(source, device="cpu")
    tokens = torch.randint(0, 128, (8, 64), generator=torch.Generator().manual_seed(0))
    recipe = {"method": "gptq", "bits": 3, "group": 48, "blocks": "0:1", "activations": {"bits": 8}}
    folder = tmp_path_factory.mktemp("groups") / "checkpoint"
    model = obr.compress(model, tokens, recipe, progress=False)
    obr.save(model, folder)
    return model, folder


@pytest.mark.slow
@torch.no_grad()
def test_checkpoints_compute_the_same(checkpoint):
    model, folder = checkpoint
    tokens = torch.arange(40)[None]
    assert torch.equal(obr.load(folder, device="cpu")(tokens).logits, model(tokens).logits)
    block = CheckpointBlocks(folder, device="cpu").load(0)
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        assert torch.equal(block.get_submodule(name).weight, model.model.layers[0].get_submodule(name).weight)
    assert verify_checkpoint(folder) == []
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["recipe"]["group"] == 48
    assert manifest["bits_per_weight"]["theoretical"] == pytest.approx((3 + 16 / 48 + 16) / 2)


Q = "self_attn.q_proj"


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda t, h: t[f"{Q}.scale"].mul_(2), "block_000.safetensors is not the file that was written"),
        (lambda t, h: t[f"{Q}.scale"].neg_(), "has scales that are not positive"),
        (lambda t, h: t[f"{Q}.scale"].fill_(float("inf")), "scales that are not finite"),
        (lambda t, h: t.update({f"{Q}.scale": t[f"{Q}.scale"][:, :1].clone()}), "contradicts itself"),
        (lambda t, h: h["layers"][Q].pop("group"), "contradicts itself"),
        (lambda t, h: h["layers"][Q].update(group=50), "has scales for groups of 50 columns, the recipe says 48"),
    ],
)
def test_altered_groups_are_noticed(checkpoint, change, sentence, tmp_path):
    _, folder = checkpoint
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with safe_open(folder / "block_000.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        header = json.loads(file.metadata()["block"])
    change(tensors, header)
    save_file(tensors, tmp_path / "block_000.safetensors", metadata={"block": json.dumps(header)})
    if "the file that was written" not in sentence:  # as a careful forger would
        with_hashes(tmp_path)
    assert any(sentence in problem for problem in verify_checkpoint(tmp_path))


def test_formats_without_groups_refuse_grouped_scales(checkpoint, tmp_path):
    _, folder = checkpoint
    with pytest.raises(ObrError, match="q_proj has scales for groups of 48 columns; load it with packed=False"):
        obr.load(folder, packed=True)
    for form in dispatch.FORMATS:
        with pytest.raises(ObrError, match=f"groups of 48 columns, but {form} is written with one a row"):
            dispatch.export(folder, form, tmp_path / "out", weights_only=True)
