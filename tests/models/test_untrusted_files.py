"""Files from strangers, and input that no one meant: what the user is told, and that nothing of it is run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import obr
from helpers.configs import replaced
from helpers.gguf_files import write_gguf
from helpers.layer_samples import layer
from helpers.random_llama import random_llama
from helpers.workflow_runs import CONFIG, SMOKE, snakemake
from obr.calibration import collect_hessians
from obr.cli import main
from obr.config.pattern import Pattern
from obr.data.token_windows import load_tokens
from obr.errors import ObrError
from obr.methods.registry import FUNCTIONS
from obr.methods.restore import restore
from obr.models.architectures import Dimensions
from obr.models.download import download_model
from obr.models.gguf_files import dequantise
from obr.models.loading import config_of, load_model
from obr.rotations import registry
from obr.rotations.obtain import make
from obr.runtime.files import sha256_of

VOCABULARY = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a random model of two blocks."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    random_llama(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1
    ).save_pretrained(folder)
    return folder


def told(capsys, *arguments) -> str:
    """The one sentence of a command that must fail."""
    assert main.main([str(a) for a in arguments]) == 1
    *progress, error = capsys.readouterr().err.strip().split("\n")
    assert error.startswith("obr: ") and all(": block " in line for line in progress), [*progress, error]
    return error


def copied(model: Path, folder: Path, **config) -> Path:
    """A copy of the model with some keys of config.json changed."""
    copy = Path(shutil.copytree(model, folder / "copy"))
    known = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(known | config))
    return copy


# --- Code -------------------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
Path("ran").touch()
from transformers import LlamaConfig, LlamaForCausalLM
"""
AUTO = {"AutoConfig": "code.LlamaConfig", "AutoModelForCausalLM": "code.LlamaForCausalLM"}


def test_code_that_a_native_model_brings_along_is_left_alone(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = copied(model, tmp_path, auto_map=AUTO)
    (copy / "code.py").write_text(CODE)
    load_model(copy, device="cpu")
    download_model({"source": "path", "path": str(copy)}, tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "out").glob("*.py"))


def test_a_model_that_needs_its_own_code_is_refused_without_a_question(model, tmp_path, monkeypatch, capsys):
    """transformers would ask on the terminal, and wait."""
    monkeypatch.chdir(tmp_path)
    copy = copied(model, tmp_path, auto_map=AUTO, model_type="secret")
    (copy / "code.py").write_text(CODE)
    for read in (config_of, load_model):
        with pytest.raises(
            ObrError,
            match=r"model_type 'secret' of .*copy needs the repository's own code: choose a model with native",
        ):
            read(copy)
    entry = json.dumps({"source": {"source": "path", "path": str(copy)}})
    error = told(capsys, "download-model", "--settings", entry, "--out", tmp_path / "out")
    assert "model_type 'secret' of path source" in error and "needs the repository's own code" in error
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_a_tokenizer_that_needs_its_own_code_is_refused(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    copy = copied(model, tmp_path)
    settings = {"tokenizer_class": "Secret", "auto_map": {"AutoTokenizer": ["code.Secret", None]}}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    (copy / "code.py").write_text(CODE)
    (tmp_path / "t.txt").write_text("text")
    calibrate = ("calibrate", "--settings", '{"seqlen": 4}', "--model", copy, "--text", tmp_path / "t.txt")
    error = told(capsys, *calibrate, "--out", tmp_path / "t.safetensors")
    assert "copy brings code of its own, which is not run; choose a native model, or read the code and set" in error
    assert not (tmp_path / "ran").exists() and not (tmp_path / "t.safetensors").exists()


OWN = """
from pathlib import Path
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
class OwnModel(LlamaForCausalLM):
    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        Path("ran").touch()
class OwnTokenizer(PreTrainedTokenizerFast):
    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        Path("read").touch()
"""
TRUSTED = "--trust-remote-code"


@pytest.fixture
def own(model, tmp_path, monkeypatch) -> Path:
    """A Llama whose model and tokenizer are classes of its own; they leave files where they are made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    copy = copied(model, tmp_path, auto_map={"AutoModelForCausalLM": "own.OwnModel"})
    words = Tokenizer(WordLevel({str(n): n for n in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(copy)
    known = json.loads((copy / "tokenizer_config.json").read_text())
    known |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (copy / "tokenizer_config.json").write_text(json.dumps(known))
    (copy / "own.py").write_text(OWN)
    (tmp_path / "t.txt").write_text("1 2 3 4 " * 100)
    return copy


def download(own: Path, out: Path, **entry) -> list[str]:
    entry = json.dumps({"source": {"source": "path", "path": str(own)}} | entry)
    return ["download-model", "--settings", entry, "--out", str(out)]


@pytest.mark.slow
def test_code_is_run_where_the_config_says_so_and_is_on_record(own, tmp_path, capsys):
    def ran() -> list[str]:
        made = [name for name in ("ran", "read") if (tmp_path / name).exists()]
        for name in made:
            (tmp_path / name).unlink()
        return made

    assert main.main(download(own, tmp_path / "m", trust_remote_code=True)) == 0
    assert ran() == ["ran"]
    code = {"own.py": sha256_of(own / "own.py")}
    assert json.loads((tmp_path / "m/source.json").read_text())["code"] == code
    calibrate = ["calibrate", "--settings", '{"seqlen": 4, "nsamples": 4}', "--model", "m", "--text", "t.txt"]
    assert main.main([*calibrate, "--out", "t.safetensors", TRUSTED]) == 0 and ran() == ["read"]
    compress = ["compress", "--recipe", '{"method": "magnitude"}', "--model", "m", "--out", "c"]
    assert main.main([*compress, TRUSTED]) == 0 and "ran" in ran()
    manifest = json.loads((tmp_path / "c/manifest.json").read_text())
    assert manifest["source"]["code"] == code and manifest["files"]["own.py"] == code["own.py"]
    score = ["evaluate", "c", "--text", "t", "t.txt", "seqlen=4", "--out", "p.json"]
    assert main.main([*score, TRUSTED]) == 0 and ran() == ["ran", "read"]
    assert main.main(["verify", "c", TRUSTED]) == 0 and ran() == ["ran"]
    # The same without leave: the model is a Llama, and is read as one; its tokenizer is nothing known.
    assert main.main(["verify", "c"]) == 0 and main.main(compress) == 0
    capsys.readouterr()
    assert "m brings code of its own, which is not run" in told(capsys, *calibrate, "--out", "t2") and ran() == []


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (
            lambda m: (m / "own.py").write_text(OWN + "#"),
            "m/own.py is not the code that was recorded at the download",
        ),
        (lambda m: (m / "more.py").write_text(""), "m/more.py is not the code that was recorded at the download"),
        (lambda m: (m / "own.py").unlink(), "m/own.py is not the code that was recorded at the download"),
        (lambda m: (m / "source.json").write_text("{}"), "m does not record the code that it brings along"),
    ],
)
def test_code_that_was_altered_since_is_refused(own, tmp_path, capsys, spoil, sentence):
    assert main.main(download(own, tmp_path / "m", trust_remote_code=True)) == 0
    (tmp_path / "ran").unlink()
    spoil(tmp_path / "m")
    compress = ("compress", "--recipe", '{"method": "magnitude"}', "--model", "m", "--out", "c", TRUSTED)
    assert sentence in told(capsys, *compress) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "reference, sentence",
    [
        (
            "some/body--own.OwnModel",
            "asks for some/body--own.OwnModel, code outside its own folder, which no revision",
        ),
        ("../own.OwnModel", "asks for ../own.OwnModel, code outside its own folder"),
        ("gone.OwnModel", "asks for gone.OwnModel, but its code is not there: choose another model"),
    ],
)
def test_code_from_elsewhere_is_refused(own, tmp_path, capsys, reference, sentence):
    known = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(known | {"auto_map": {"AutoModelForCausalLM": reference}}))
    assert sentence in told(capsys, *download(own, tmp_path / "m", trust_remote_code=True))
    assert not (tmp_path / "m").exists() and not (tmp_path / "ran").exists()


def test_trusted_code_that_fails_or_changes_is_told(own, tmp_path, capsys):
    """Its exceptions in a sentence; a branch of the hub, whose code may change, is no revision to trust."""
    (own / "own.py").write_text("1 / 0")
    assert "(division by zero)" in told(capsys, *download(own, tmp_path / "m", trust_remote_code=True))
    source = {"source": "hub", "repo": "a/b", "revision": "main"}
    error = told(capsys, *download(own, tmp_path / "m", source=source, trust_remote_code=True))
    assert "its revision must be a full commit hash, which cannot change, not 'main'" in error


@pytest.mark.slow
@pytest.mark.workflow
def test_the_workflow_hands_the_leave_to_run_code_to_every_stage_of_that_model(tiny_folder, tmp_path):
    tiny = CONFIG["models"]["tiny"]
    models = {"trusted": tiny | {"trust_remote_code": True}, "other": tiny}
    config = replaced(CONFIG, models=models, figures={}, tables__zero_shot__models=[*models])
    config["tables"] = {"zero_shot": config["tables"]["zero_shot"]}
    run = snakemake(tmp_path, config, "--dry-run", "--printshellcmds", str(SMOKE / "tables/zero_shot.csv"))
    lines = [line for line in run.stdout.splitlines() if line.startswith("Shell command: obr")]
    opening = [line for line in lines if re.search("--model |obr evaluate ", line) and "obr check-model" not in line]
    for model in models:
        of_it = [line for line in opening if f"/{model}" in line]
        assert len(of_it) == 7 and all((TRUSTED in line) == (model == "trusted") for line in of_it), of_it
    assert not [line for line in lines if TRUSTED in line and line not in opening]


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_a_pickle_in_place_of_safetensors_is_not_opened(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = copied(model, tmp_path)
    torch.save({"a": Code()}, copy / "model.safetensors")
    with pytest.raises(ObrError, match=r"model\.safetensors of path source .* is missing or cut short"):
        download_model({"source": "path", "path": str(copy)}, tmp_path / "out")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ObrError, match=r"is not a folder with config\.json and model\.safetensors or"):
        download_model({"source": "path", "path": str(copy)}, tmp_path / "out")
    with pytest.raises(ObrError, match=r"has neither model\.safetensors\.index\.json nor model\.safetensors"):
        load_model(copy)
    assert not (tmp_path / "ran").exists()


# --- Broken files -----------------------------------------------------------------------------------------


def spoilt(content: bytes, draw: np.random.Generator) -> bytes:
    """Cut short, or with some bits flipped, mostly near the beginning, where a file says what it holds."""
    if draw.random() < 0.3:
        return content[: int(draw.integers(len(content)))]
    spoilt = bytearray(content)
    reach = len(content) if draw.random() < 0.3 else min(len(content), 4096)
    for place in draw.integers(reach, size=int(draw.integers(1, 9))):
        spoilt[place] ^= 1 << int(draw.integers(8))
    return bytes(spoilt)


@pytest.mark.fuzz
def test_a_spoilt_gguf_is_refused_or_read(tmp_path):
    """Data that is merely other data cannot be told apart; whatever else happens, happens in one sentence."""
    whole, draw, refused = write_gguf(tmp_path / "tiny.gguf").read_bytes(), np.random.default_rng(0), 0
    for trial in range(30):
        path = tmp_path / f"{trial}.gguf"
        path.write_bytes(spoilt(whole, draw))
        try:
            dequantise(path, tmp_path / "model", "float32")
        except ObrError as error:
            refused += 1
            assert str(path.name) in str(error) and "\n" not in str(error)
    assert refused > 10


READERS = {
    "model": lambda path, sizes: load_model(path.parent, device="cpu"),
    "tokens": lambda path, sizes: load_tokens(path),
    "hessian": lambda path, sizes: collect_hessians.load(path),
    "rotation": lambda path, sizes: registry.load(path, sizes),
}


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", READERS)
def test_a_spoilt_safetensors_file_is_refused_or_read(kind, model, tmp_path):
    path = copied(model, tmp_path) / "model.safetensors"
    if kind == "tokens":
        tokens = torch.randint(0, VOCABULARY, (4, 16))
        save_file({"tokens": tokens}, path, metadata={"calibration": json.dumps({"nsamples": 4})})
    if kind == "hessian":
        collect_hessians.save(
            {g: collect_hessians.Moments(torch.eye(16), torch.ones(16)) for g in ("qkv", "o")}, path
        )
    if kind == "rotation":
        make({"kind": "quarot"}, model, path)
    sizes, read = Dimensions.of(config_of(model)), READERS[kind]
    whole, draw, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(12 if kind == "model" else 60):
        path.write_bytes(spoilt(whole, draw))
        try:
            read(path, sizes)
        except ObrError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 5


def test_files_of_other_shapes_are_named(model, tmp_path):
    path = tmp_path / "a.safetensors"
    about = {"calibration": "{}"}
    for tokens in (torch.zeros(4), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 4)):
        save_file({"tokens": tokens}, path, metadata=about)
        with pytest.raises(ObrError, match="not a whole file of calibration tokens"):
            load_tokens(path)
    wrong = [{"o": torch.zeros(10), "o.harmonic": norms} for norms in (torch.zeros(3), torch.zeros(4).int())]
    for size, tensors in [(size, {"o": torch.zeros(10)}) for size in (10**9, 3, -4, "4")] + [(4, t) for t in wrong]:
        save_file(tensors, path, metadata={"sizes": json.dumps({"o": size})})
        with pytest.raises(ObrError, match="is not a whole Hessian file"):
            collect_hessians.load(path)


@pytest.mark.parametrize(
    "name, spoil, sentence",
    [
        ("layers.0.mlp.up_proj", lambda w: w[:, 1:], "model.layers.0.mlp.up_proj.weight is 64 x 31, by config.json"),
        ("layers.1.input_layernorm", lambda w: w[None], "model.layers.1.input_layernorm.weight is 1 x 32, by config"),
        (
            "embed_tokens",
            lambda w: w[1:],
            "model.embed_tokens.weight is 63 x 32, by config.json it should be 64 x 32",
        ),
        (
            "layers.0.mlp.up_proj",
            lambda w: w.to(torch.int8),
            "up_proj.weight is stored as I8, not as one of F32, BF16, F16; choose the full-precision original",
        ),
    ],
)
def test_tensors_of_another_shape_or_kind_are_named(name, spoil, sentence, model, tmp_path, capsys):
    copy = copied(model, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    tensors[f"model.{name}.weight"] = spoil(tensors[f"model.{name}.weight"]).contiguous()
    save_file(tensors, copy / "model.safetensors")
    entry = ("--recipe", "method=rtn")
    assert sentence in told(capsys, "compress", *entry, "--model", copy, "--out", tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


# --- Tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [VOCABULARY, -1])
def test_tokens_of_another_tokenizer_are_told(model, tmp_path, capsys, token):
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    tokens[1, 3] = token
    save_file({"tokens": tokens}, tmp_path / "t.safetensors", metadata={"calibration": "{}"})
    error = told(
        capsys, "hessian", "--model", model, "--tokens", tmp_path / "t.safetensors", "--out", tmp_path / "out"
    )
    assert f"Token {token} is none of the model's 64; tokenise the text with its own tokenizer" in error


# --- Activations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dense", *FUNCTIONS])
@pytest.mark.parametrize("inputs", ["zero", "constant", "one channel"])
def test_inputs_that_say_little_leave_sound_weights(method, inputs):
    """All columns dead, all inputs the same, all columns but one dead: finite weights, and a flag for the dead."""
    weight, _ = layer(4, 32)
    x = torch.ones(64, 32) if inputs == "constant" else torch.zeros(64, 32)
    if inputs == "one channel":
        x[:, 3] = torch.arange(64.0)
    result = restore(weight, x.T @ x, method)
    assert result.weight.isfinite().all()
    dead = {"zero": 32, "constant": 0, "one channel": 31}[inputs]
    assert result.flags == ([f"{dead} dead columns"] if dead and method != "dense" else [])


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        ("embeddings", r"block 0 qkv: the Hessian has NaN or infinite values; check the calibration activations"),
        ("norm", r"block 1 qkv: the Hessian has NaN or infinite values"),
        ("weights", r"block 1 mlp.down_proj: the weight has NaN or infinite values; the model's file is broken"),
    ],
)
def test_nan_is_told_where_it_comes_up(model, spoil, sentence):
    broken = load_model(model, device="cpu")
    if spoil == "embeddings":
        broken.model.embed_tokens.weight.data[:] = float("nan")
    elif spoil == "norm":
        broken.model.layers[1].input_layernorm.weight.data[0] = float("inf")
    else:
        broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    tokens = torch.randint(0, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ObrError, match=sentence):
        obr.compress(broken, tokens, {"method": "obr_gptq"}, progress=False)


def test_activations_that_are_not_finite_are_told_before_hessians_of_them_are_kept(model, tmp_path, capsys):
    copy = copied(model, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][0] = float("inf")
    save_file(tensors, copy / "model.safetensors")
    tokens = tmp_path / "t.safetensors"
    save_file({"tokens": torch.ones(2, 8, dtype=torch.int64)}, tokens, metadata={"calibration": "{}"})
    error = told(capsys, "hessian", "--model", copy, "--tokens", tokens, "--out", tmp_path / "out")
    assert "block 1 qkv: the Hessian has NaN or infinite values; check the model's weights" in error
    assert not (tmp_path / "out/hessian.json").exists()


def test_a_model_of_zeros_is_compressed_with_flags(model, tmp_path):
    """Nothing comes through its blocks: every column of o_proj and down_proj is dead, on record."""
    zero = load_model(model, device="cpu")
    for name, parameter in zero.named_parameters():
        if "v_proj" in name or "up_proj" in name:
            parameter.data.zero_()
    tokens = torch.randint(0, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    obr.compress(zero, tokens, {"method": "obr_gptq"}, progress=False)
    flags = {row.layer: row.flags for row in zero.obr_report.layers}
    assert "32 dead columns" in flags["self_attn.o_proj"] and "64 dead columns" in flags["mlp.down_proj"]


@pytest.mark.slow
@pytest.mark.workflow
@pytest.mark.parametrize(
    "recipes, sentence",
    [
        ([], "recipes: [] is not of type 'object'; the schema, workflow/schemas/config.schema.yaml, describes every"),
        ({"../x": {"method": "dense"}}, "recipes: '../x' cannot be a name; use letters, digits, '.', '_' and '-'"),
    ],
)
def test_the_workflow_tells_what_is_wrong_with_a_config(recipes, sentence, tiny_folder, tmp_path):
    run = snakemake(tmp_path, CONFIG | {"recipes": recipes}, "--dry-run")
    assert run.returncode == 1 and sentence in run.stdout and "Traceback" not in run.stdout, run.stdout
    lines = [line for line in run.stdout.splitlines() if not line.startswith("Config file ")]
    assert len(lines) < 8, run.stdout  # and not the whole schema


# --- Settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["16:32", "1:1000000000000", "paired 32:64"])
def test_patterns_beyond_counting_are_refused(text):
    with pytest.raises(ObrError, match="has too many masks a group to number them; choose an M of at most 20"):
        Pattern.parse(text)


def test_a_plain_tensor_file_is_no_checkpoint(tmp_path, capsys):
    save_file({"a": torch.zeros(2)}, tmp_path / "block_000.safetensors")
    assert "is no packed checkpoint: it has no manifest.json" in told(
        capsys, "evaluate", tmp_path, "--text", "t", tmp_path / "t", "seqlen=8", "--out", tmp_path / "o",
    )  # fmt: skip


def test_an_unreadable_entry_is_refused():
    run = [sys.executable, "-m", "obr", "calibrate", "--settings"]
    for entry in ("[" * 100_000, "[1]", "\x01", '{"a": ' + "[" * 100_000):
        done = subprocess.run([*run, entry], capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "not JSON" in done.stderr or "is no setting" in done.stderr


def test_weights_beside_the_named_ones_do_not_matter(model, tmp_path):
    """A file that there is no index to name is no part of what is compressed."""
    copy = copied(model, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    save_file({"extra": torch.zeros(3)}, copy / "model-extra.safetensors")
    assert download_model({"source": "path", "path": str(copy)}, tmp_path / "out") is None
    assert load_model(tmp_path / "out", device="cpu").num_parameters() == sum(t.numel() for t in tensors.values())
