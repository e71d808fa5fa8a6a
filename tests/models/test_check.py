"""Model folders on their way in: which file a tensor comes from, what is accounted for, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import obr
from helpers.workflow_runs import with_hashes
from obr.checkpoints.format import CheckpointBlocks
from obr.cli import main
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.data import token_windows, tokenize
from obr.errors import ObrError
from obr.models.blocks import StreamedBlocks
from obr.models.download import download_model
from obr.models.loading import load_tokenizer

INDEX = "model.safetensors.index.json"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def windows(tiny_folder):
    tokens = tokenize.tokenize(load_tokenizer(tiny_folder / "model"), (tiny_folder / "heldout.txt").read_text())
    return token_windows.evaluation_windows(tokens, 128, 512)


@pytest.fixture(scope="module")
def right(tiny_folder, windows) -> float:
    return own(AutoModelForCausalLM.from_pretrained(tiny_folder / "model", dtype=torch.float32), windows)


@pytest.fixture
def model(tiny_folder, tmp_path) -> Path:
    """The tiny model in one file."""
    return Path(shutil.copytree(tiny_folder / "model", tmp_path / "source"))


@pytest.fixture
def shards(model) -> Path:
    """The tiny model in an index and several files."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    (model / "model.safetensors").unlink()
    whole.save_pretrained(model, max_shard_size="150KB")
    assert len(list(model.glob("model-*.safetensors"))) > 2
    return model


@torch.no_grad()
def own(model, windows) -> float:
    """Perplexity by the model's own forward."""
    losses = [model(input_ids=window[None], labels=window[None]).loss for window in windows]
    return float(torch.stack(losses).mean().exp())


def streamed(folder: Path, windows) -> float:
    return obr.perplexity(StreamedBlocks(folder, device="cpu"), windows)


def loaded(folder: Path, windows) -> float:
    return own(obr.load_model(folder, device="cpu"), windows)


def download(folder: Path, **options) -> Path:
    out = folder.with_name("downloaded")
    download_model({"source": "path", "path": str(folder)}, out, **options)
    return out


def change(folder: Path, **values) -> None:
    """Set keys of config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def edit(file: Path, edited) -> None:
    """Replace the tensors of a file by `edited(tensors)`."""
    tensors = {name: tensor.contiguous() for name, tensor in edited(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def other(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of the model's names and shapes with other values."""
    generator = torch.Generator().manual_seed(0)
    tensors = {k: v for file in folder.glob("model*.safetensors") for k, v in load_file(file).items()}
    return {name: 0.01 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}


def refused(folder: Path, sentence: str) -> None:
    """By each way in, with one sentence, and nothing is written."""
    for way in (download, lambda folder: StreamedBlocks(folder, device="cpu"), obr.load_model):
        with pytest.raises(ObrError, match=sentence):
            way(folder)
    assert not folder.with_name("downloaded").exists()


# --- Which file a tensor comes from -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "stray",
    ["model-00002-of-00002.safetensors", "model.fp16.safetensors", "consolidated.safetensors", "zz.safetensors"],
)
@pytest.mark.parametrize("kind", ["shards", "model"])
def test_files_that_nothing_names_are_left_out(stray, kind, request, windows, right):
    folder = request.getfixturevalue(kind)
    save_file(other(folder), folder / stray, metadata={"format": "pt"})
    assert streamed(folder, windows) == pytest.approx(right, rel=1e-5)
    assert loaded(folder, windows) == pytest.approx(right, rel=1e-5)
    out = download(folder)
    assert not (out / stray).exists()
    plain = own(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), windows)
    assert streamed(out, windows) == pytest.approx(plain, rel=1e-5) and plain == pytest.approx(right, rel=1e-5)


def test_an_index_decides_over_a_single_file_beside_it(shards, windows, right):
    """transformers would read the single file."""
    save_file(other(shards), shards / "model.safetensors", metadata={"format": "pt"})
    assert own(AutoModelForCausalLM.from_pretrained(shards, dtype=torch.float32), windows) > 2 * right
    for value in (streamed(shards, windows), loaded(shards, windows)):
        assert value == pytest.approx(right, rel=1e-5)
    out = download(shards)
    assert not (out / "model.safetensors").exists() and streamed(out, windows) == pytest.approx(right, rel=1e-5)


def test_a_downloaded_model_leaves_nothing_of_an_older_one(shards, tiny_folder):
    out = download(shards)
    assert (out / INDEX).exists()
    download_model({"source": "path", "path": str(tiny_folder / "model")}, out)
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]


def test_a_tensor_in_two_named_files_is_refused(shards):
    first, last = sorted(shards.glob("model-*.safetensors"))[:: len(list(shards.glob("model-*.safetensors"))) - 1]
    name = next(iter(load_file(first)))
    edit(last, lambda tensors: tensors | {name: torch.zeros(3)})
    refused(
        shards, rf"{last.name} of .* holds {name}, which is in {first.name} by the index: fetch index and weights"
    )


def test_a_tensor_that_the_index_does_not_name_is_refused(shards):
    file = min(shards.glob("model-*.safetensors"))
    edit(file, lambda tensors: tensors | {"extra.weight": torch.zeros(3)})
    refused(shards, rf"{file.name} of .* holds extra\.weight, which is not in the index")


def test_a_tensor_that_a_file_lacks_is_refused(shards):
    file = min(shards.glob("model-*.safetensors"))
    edit(file, lambda tensors: dict(list(tensors.items())[1:]))
    refused(shards, rf"{INDEX} of .* is in {file.name}, which has no such tensor \(1 in all\)")


@pytest.mark.parametrize("name", ["../x.safetensors", "sub/x.safetensors", "/x.safetensors", "x.bin", "..", ""])
def test_an_index_that_leaves_its_folder_is_refused(shards, name):
    listing = json.loads((shards / INDEX).read_text())
    listing["weight_map"][EMBED] = name
    (shards / INDEX).write_text(json.dumps(listing))
    refused(shards, rf"{INDEX} of .* names '{name}', which is no safetensors file in the model's own folder")


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{", "[" * 100_000])
def test_a_broken_index_is_refused(shards, index):
    (shards / INDEX).write_text(index)
    refused(shards, f"{INDEX} of .* does not list the weights: fetch the model again")


def test_files_without_their_index_are_no_model(shards):
    (shards / INDEX).unlink()
    for way, sentence in ((download, "is not a folder with"), (obr.load_model, f"has neither {INDEX} nor model")):
        with pytest.raises(ObrError, match=sentence):
            way(shards)


def test_a_sharded_checkpoint_of_torch_is_not_read_in_place_of_the_weights(model, windows, right):
    shutil.copyfile(model / "model.safetensors", model / "shard-00000-model-00001-of-00001.safetensors")
    with pytest.raises(ObrError, match=r"which transformers reads instead of model\.safetensors; remove one"):
        obr.load_model(model)
    assert loaded(download(model), windows) == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("adapter_config.json", "merge the adapter first"), ("adapter_model.safetensors", "merge the adapter first"),
        ("quantize_config.json", "choose the full-precision original"),
    ],
)  # fmt: skip
def test_files_that_change_what_the_weights_mean_are_refused(model, name, remedy):
    (model / name).write_text("{}")
    refused(model, f"has the file {name} beside its weights: {remedy}")


@pytest.mark.slow
def test_checkpoints_read_their_own_files_alone(model, tmp_path, windows):
    compress_stage(model, Recipe.parse({"method": "rtn"}), tmp_path / "c", device="cpu")
    value = obr.perplexity(CheckpointBlocks(tmp_path / "c", device="cpu"), windows)
    for stray in ("model.safetensors", "zz.safetensors"):
        save_file(other(model), tmp_path / "c" / stray)
        with pytest.raises(ObrError, match=f"{stray} is not in the manifest of the checkpoint"):
            CheckpointBlocks(tmp_path / "c", device="cpu")
        (tmp_path / "c" / stray).unlink()
    assert obr.perplexity(CheckpointBlocks(tmp_path / "c", device="cpu"), windows) == value
    edit(tmp_path / "c/ends.safetensors", lambda tensors: tensors | {"scale": torch.ones(1)})
    with pytest.raises(ObrError, match=r"ends\.safetensors is not the file that was written \(its sketch differs\)"):
        obr.load(tmp_path / "c")
    with_hashes(tmp_path / "c")
    with pytest.raises(ObrError, match=r"has 1 tensors that llama models .* do not have \(scale first\)"):
        obr.load(tmp_path / "c")
    edit(tmp_path / "c/ends.safetensors", lambda tensors: {EMBED: tensors[EMBED]})
    with_hashes(tmp_path / "c")
    with pytest.raises(ObrError, match=r"lacks 1 tensors of a llama model \(model\.norm\.weight first\)"):
        obr.load(tmp_path / "c")
    with pytest.raises(
        ObrError, match=r"is a packed checkpoint of this package, not a model: read it with obr\.load"
    ):
        obr.load_model(tmp_path / "c")


# --- Flags and tensors ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_head_that_differs_is_not_tied_whatever_the_config_says(model, windows, right, tmp_path):
    edit(model / "model.safetensors", lambda tensors: tensors | {HEAD: tensors[EMBED] * 0.5})
    plain = own(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), windows)
    assert plain > 1.2 * right
    assert streamed(model, windows) == pytest.approx(plain, rel=1e-5)
    out = download(model)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    weights = sum(t.numel() for t in load_file(model / "model.safetensors").values())
    assert json.loads((out / "source.json").read_text())["parameters"] == weights
    compress_stage(out, Recipe.parse({"method": "dense"}), tmp_path / "dense", device="cpu")
    assert own(obr.load(tmp_path / "dense", device="cpu"), windows) == pytest.approx(plain, rel=1e-4)
    whole = obr.load_model(model, device="cpu")
    assert own(whole, windows) == pytest.approx(plain, rel=1e-5)
    obr.compress(whole, None, {"method": "rtn", "bits": 8}, progress=False)
    before = obr.perplexity(whole, windows)
    obr.save(whole, tmp_path / "packed")
    assert obr.perplexity(obr.load(tmp_path / "packed", device="cpu"), windows) == before


def test_a_rotation_keeps_a_head_that_differs(model, windows):
    """Also where transformers made the model, with the flag that its config.json has."""
    edit(model / "model.safetensors", lambda tensors: tensors | {HEAD: tensors[EMBED] * 0.5})
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).requires_grad_(False)
    before = own(whole, windows)
    assert whole.config.tie_word_embeddings
    assert own(obr.rotate(whole, "quarot"), windows) == pytest.approx(before, rel=1e-4)
    assert not whole.config.tie_word_embeddings


def test_an_equal_head_is_tied(model, windows, right):
    edit(model / "model.safetensors", lambda tensors: tensors | {HEAD: tensors[EMBED].clone()})
    out = download(model)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    assert streamed(out, windows) == pytest.approx(right, rel=1e-5)
    blocks = StreamedBlocks(out, device="cpu")
    assert blocks.model.lm_head.weight is blocks.model.model.embed_tokens.weight


def cut(name):
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(name)}


def plus(name, tensor):
    return lambda tensors: tensors | {name: tensor}


BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    "edited, config, sentence",
    [
        (dict, {"tie_word_embeddings": False}, r"lacks 1 tensors of a llama model \(lm_head\.weight first\)"),
        (plus(BIAS, torch.zeros(96)), {}, rf"has 1 tensors that llama models .* do not have \({BIAS} first\)"),
        (dict, {"attention_bias": True}, r"lacks 8 tensors of a llama model \(\S+self_attn\.k_proj\.bias"),
        (dict, {"mlp_bias": True}, r"lacks 6 tensors .*mlp\.down_proj\.bias"),
        (plus("lm_head.bias", torch.zeros(512)), {}, r"do not have \(lm_head\.bias first\)"),
        (dict, {"num_hidden_layers": 1}, "has 2 blocks, by config.json it should have 1"),
        (dict, {"num_hidden_layers": 3}, "has 2 blocks, by config.json it should have 3"),
        (dict, {"num_hidden_layers": 10**12}, "is 1000000000000; it must be a whole number from 1 to 10,000"),
        (dict, {"vocab_size": 500}, "embed_tokens.weight is 512 x 96, by config.json it should be 500 x 96"),
        (dict, {"vocab_size": 10**9}, "embed_tokens.weight is 512 x 96, by config.json it should be 1000000000 x 96"),
        (dict, {"head_dim": 16}, "self_attn.k_proj.weight is 32 x 96, by config.json it should be 16 x 96"),
        (dict, {"num_key_value_heads": 3}, "self_attn.k_proj.weight is 32 x 96, by config.json it should be 96 x 96"),
        (dict, {"num_key_value_heads": 2}, "is 2, which does not divide its 3 attention heads"),
        (cut("1.mlp.up_proj.weight"), {}, r"lacks 1 tensors of a llama model \(\S+mlp\.up_proj\.weight"),
        (plus("v_head.summary.weight", torch.zeros(1, 96)), {}, r"do not have \(v_head\.summary\.weight first\)"),
        (plus(BIAS.replace("bias", "weight_scale"), torch.ones(1)), {}, r"do not have \(\S+\.weight_scale first"),
        (plus("model.layers.0.mlp.up_proj.g_idx", torch.zeros(96).int()), {}, r"do not have \(\S+\.g_idx first\)"),
        (plus(BIAS.replace("q_proj.bias", "q_norm.weight"), torch.ones(32)), {}, r"do not have \(\S+q_norm\.weight"),
    ],
)  # fmt: skip
def test_tensors_that_the_config_does_not_account_for_are_refused(model, edited, config, sentence):
    edit(model / "model.safetensors", edited)
    change(model, **config)
    refused(model, sentence)


def test_rotary_buffers_of_old_files_do_no_harm(model, windows, right):
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(16) for i in range(2)}
    edit(model / "model.safetensors", lambda tensors: tensors | buffers)
    assert streamed(download(model), windows) == pytest.approx(right, rel=1e-5)


# --- Dtypes -----------------------------------------------------------------------------------------------


def cast(dtype, only: str = ""):
    return lambda tensors: {k: v.to(dtype) if only in k else v for k, v in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("said", ["float32", "float16", "bfloat16", None])
def test_stored_dtype_is_that_of_file_not_of_config(model, said, tmp_path):
    edit(model / "model.safetensors", cast(torch.bfloat16))
    change(model, dtype=said)
    manifest = compress_stage(model, Recipe.parse({"method": "rtn"}), tmp_path / "c", device="cpu")
    assert manifest["dtype"] == "bfloat16"
    assert load_file(tmp_path / "c/ends.safetensors")[EMBED].dtype == torch.bfloat16
    whole = obr.compress(obr.load_model(model, device="cpu"), None, {"method": "rtn"}, progress=False)
    assert obr.save(whole, tmp_path / "memory")["dtype"] == "bfloat16"
    out = download(model)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((out / "source.json").read_text())["dtype"] == "bfloat16"


def test_mixed_dtypes_are_stored_in_widest(model, windows, tmp_path):
    edit(model / "model.safetensors", cast(torch.bfloat16, "proj"))
    plain = own(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), windows)
    out = download(model, dtype="float32")
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.float32}
    out = download(model)
    assert json.loads((out / "source.json").read_text())["dtype"] == "float32"
    compress_stage(out, Recipe.parse({"method": "dense"}), tmp_path / "c", device="cpu")
    assert own(obr.load(tmp_path / "c", device="cpu"), windows) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool])
def test_dtypes_of_quantised_weights_are_refused(model, dtype):
    edit(model / "model.safetensors", cast(dtype, "layers.0.mlp.up_proj"))
    refused(model, r"up_proj\.weight is stored as \w+, not as one of F32, BF16, F16; choose the full-precision")
    with pytest.raises(ObrError, match="not as one of F32, BF16, F16, F64; choose the full-precision original"):
        download(model, dtype="float16")  # a cast would lose the scales


def test_float64_is_cast_where_asked_and_else_refused(model, windows, right):
    edit(model / "model.safetensors", cast(torch.float64))
    refused(model, r"is stored as F64, not as one of F32, BF16, F16; set dtype: float32 for this model")
    assert streamed(download(model, dtype="float32"), windows) == pytest.approx(right, rel=1e-5)


def test_values_beyond_the_dtype_of_storage_are_kept_or_refused(tiny_folder, tmp_path, windows):
    """A residual stream a million times as large, in bfloat16; float16 has no room for it."""
    big = AutoModelForCausalLM.from_pretrained(tiny_folder / "model", dtype=torch.float32).requires_grad_(False)
    big.config.tie_word_embeddings = False
    embed = big.model.embed_tokens.weight.data.clone()
    big.lm_head.weight, big.model.embed_tokens.weight.data = torch.nn.Parameter(embed.clone()), embed * 1e6
    for block in big.model.layers:
        block.self_attn.o_proj.weight.data *= 1e6
        block.mlp.down_proj.weight.data *= 1e6
    big.to(torch.bfloat16).save_pretrained(tmp_path / "big")
    model = obr.load_model(tmp_path / "big", device="cpu")
    dense = own(model, windows)
    obr.save(obr.compress(model, None, {"method": "rtn", "bits": 8}, progress=False), tmp_path / "packed")
    packed = obr.load(tmp_path / "packed", device="cpu")
    assert packed.model.embed_tokens.weight.isfinite().all()
    assert own(packed, windows) == pytest.approx(dense, rel=0.01)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "big", dtype=torch.float32).requires_grad_(False)
    with pytest.raises(
        ObrError, match=r"embed_tokens\.weight has values beyond float16, in which it would be stored"
    ):
        obr.compress(model, None, {"method": "rtn", "bits": 8}, progress=False)


def test_non_finite_weights_are_not_saved(tiny_folder, tmp_path):
    for name in ("model.embed_tokens", "model.layers.1.input_layernorm"):
        model = obr.load_model(tiny_folder / "model", device="cpu")
        obr.compress(model, None, {"method": "rtn"}, progress=False)
        model.get_submodule(name).weight.data[3] = float("inf")
        with pytest.raises(ObrError, match=rf"{name.split('.')[-1]}\.weight has NaN or infinite values in float32"):
            obr.save(model, tmp_path / "c")
        assert not (tmp_path / "c/manifest.json").exists()


# --- Names ------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_here_is_not_blamed_on_the_connection(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ObrError, match="nobody/nothing is neither a folder nor a repository in the hub's cache; obr"):
        obr.load_model("nobody/nothing")
    with pytest.raises(ObrError, match="gone is not a folder; give the folder of a downloaded model"):
        obr.load_model(tmp_path / "gone")


def test_a_repository_in_the_cache_of_the_hub_is_read(model, tmp_path, monkeypatch, windows, right):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub/models--some--tiny"
    shutil.copytree(model, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0" * 40)
    assert loaded("some/tiny", windows) == pytest.approx(right, rel=1e-5)


def test_a_local_source_that_is_overwritten_leaves_the_download_alone(model, windows, right):
    out = download(model)
    before = (out / "model.safetensors").read_bytes()
    changed = model.with_name("changed.safetensors")
    save_file(other(model), changed, metadata={"format": "pt"})
    shutil.copyfile(changed, model / "model.safetensors")  # into the same file
    assert (out / "model.safetensors").read_bytes() == before


def test_stages_end_in_one_sentence(model, capsys, tmp_path):
    """No traceback, whichever stage meets the model first."""
    edit(model / "model.safetensors", plus(BIAS, torch.zeros(96)))
    save_file({"tokens": torch.ones(8, 8).long()}, tmp_path / "t", metadata={"calibration": "{}"})
    common = ["--model", str(model), "--out", str(tmp_path / "out")]
    entry = {"kind": "flatquant", "learn": {"calibration": "c", "quantise": {"activations": {"bits": 4}}}}
    for stage in (
        ["hessian", *common, "--tokens", str(tmp_path / "t")],
        ["compress", *common, "--recipe", '{"method": "rtn"}'],
        ["gradients", *common, "--tokens", str(tmp_path / "t"), "--settings", '{"nsamples": 1, "seqlen": 8}'],
        ["generate", *common, "--settings", '{"generated": {}, "nsamples": 1, "seqlen": 8}'],
        ["learn-rotation", *common, "--tokens", str(tmp_path / "t"), "--settings", json.dumps(entry)],
    ):
        assert main.main(stage) == 1, stage
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("obr: ") and f"do not have ({BIAS} first)" in error, error
