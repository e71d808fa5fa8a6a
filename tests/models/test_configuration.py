"""config.json on its way in: every key is obeyed as transformers does, or refused in one sentence."""

import json
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import obr
from helpers.family_models import FAMILIES, TOKENS, random_model
from helpers.paths import ROOT
from helpers.random_llama import random_llama
from helpers.workflow_runs import CONFIG, snakemake
from obr.cli.main import main
from obr.config.model_sizes import read_config, sizes_of
from obr.config.workflow import check_widths
from obr.errors import ObrError
from obr.models.blocks import StreamedBlocks
from obr.models.download import download_model
from obr.models.loading import config_of
from obr.planning import tensor_sizes

NAMES = [
    "llama", "mistral", "qwen2, 14 heads", "qwen3, head_dim apart", "gemma", "granite", "smollm3"
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random model of each family."""
    found = {}
    for name in NAMES:
        found[name] = tmp_path_factory.mktemp("families") / "model"
        random_model(FAMILIES[name], torch.float32).save_pretrained(found[name])
    return found


@pytest.fixture
def tiny(folders, tmp_path) -> Path:
    return with_keys(folders["llama"], tmp_path)


def with_keys(folder: Path, out: Path, **keys) -> Path:
    """The same weights with other keys in config.json."""
    out.mkdir(exist_ok=True)
    config = json.loads((folder / "config.json").read_text()) | keys
    (out / "config.json").write_text(json.dumps(config))
    if not (out / "model.safetensors").exists():
        (out / "model.safetensors").symlink_to(folder / "model.safetensors")
    return out


@torch.no_grad()
def own(model) -> float:
    return float(torch.stack([model(input_ids=w[None], labels=w[None]).loss for w in TOKENS]).mean().exp())


# --- What changes the computation -------------------------------------------------------------------------

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 8}
WINDOW = {"use_sliding_window": True, "sliding_window": 4}
MIXED = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize(
    "keys",
    [
        {"rope_parameters": LINEAR}, {"rope_parameters": DYNAMIC, "max_position_embeddings": 8},
        {"rope_parameters": YARN, "max_position_embeddings": 32}, {"sliding_window": 4},
        {**WINDOW, "layer_types": MIXED}, {"is_causal": False}, {"use_bidirectional_attention": True},
        {"hidden_act": "gelu"}, {"rms_norm_eps": 0.5}, {"no_rope_layers": [0, 1]}, {"logits_scaling": 3.0},
        {"attention_multiplier": 2.0}, {"final_logit_softcapping": 5.0},
    ],
    ids=lambda keys: ", ".join(keys),
)  # fmt: skip
def test_keys_are_obeyed_as_by_transformers_or_refused(family, keys, folders, tmp_path):
    """The perplexity of the streamed model is that of transformers' own forward."""
    folder = with_keys(folders[family], tmp_path / "m", **keys)
    try:
        found = obr.perplexity(StreamedBlocks(folder, device="cpu"), TOKENS)
    except ObrError as error:
        key = next(key for key in keys if key in str(error))
        kind = config_of(folders[family]).model_type
        assert f"which {kind} models of transformers do not obey: remove it if" in str(error)
        assert key not in type(config_of(folders[family])).__dataclass_fields__
        return
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert found == pytest.approx(own(theirs), rel=1e-5)


OBEYED = {"sliding_window": ["mistral"], "logits_scaling": ["granite"], "is_causal": NAMES, "rope_parameters": NAMES}


@pytest.mark.parametrize("key, families", OBEYED.items())
def test_keys_that_a_family_has_are_not_refused(key, families, folders, tmp_path):
    """And change what is computed: the test above would pass with everything refused or ignored."""
    values = {"sliding_window": 4, "logits_scaling": 3.0, "is_causal": False, "rope_parameters": LINEAR}
    for family in families:
        folder = with_keys(folders[family], tmp_path / "m", **{key: values[key]})
        before = obr.perplexity(StreamedBlocks(folders[family], device="cpu"), TOKENS)
        assert obr.perplexity(StreamedBlocks(folder, device="cpu"), TOKENS) != pytest.approx(before, rel=1e-3)
        (tmp_path / "m/model.safetensors").unlink()


@pytest.mark.parametrize(
    "keys, sentence",
    [
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised already \(gptq\), says quantization_config"),
        ({"quantization_config": "int4"}, r"quantised already \(int4\)"),
        ({"quantization_config": []}, r"quantised already \(\[\]\)"),
        ({"quantization": {"bits": 4, "group_size": 64}}, r"quantised already \(None\), says quantization in"),
        ({"compression_config": {"format": "pack"}}, "says compression_config"),
        ({"sparsity_config": {"format": "dense"}}, "says sparsity_config"),
        ({"quantization_config": {"quant_method": "obr"}}, r"packed checkpoint .*with obr\.load"),
        ({"transformers_weights": "other.safetensors"}, "sends transformers to other weights than the index names"),
        ({"configuration_files": ["config.4.0.0.json"]}, "sends transformers to other files than config.json"),
        ({"per_layer_config": {"0": {"intermediate_size": 96}}}, "gives blocks sizes of their own"),
        ({"text_config": {"hidden_size": 1}}, "text_config in config.json of .* nests another model"),
        ({"partial_rotary_factor": 0.5}, "do not obey"),
        ({"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor .* is not 1"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping .* is 50.0, which llama models of"),
        ({"logit_scale": 0.0625}, "logit_scale .* do not obey"),
        ({"layer_types": MIXED}, "layer_types .* do not obey"),
        ({"num_local_experts": 8}, "num_local_experts .* do not obey"),
        ({"clip_qkv": 8.0}, "clip_qkv .* do not obey"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier .* do not obey"),
        ({"adapter_path": "x"}, "adapter_path .* do not obey"),
        ({"use_qk_norm": True}, "use_qk_norm .* do not obey"),
        ({"dtype": "fp16"}, "config.json of .* cannot be loaded"),
        ({"dtype": "int8"}, "dtype in config.json of .* is int8, no floating-point type"),
        ({"pad_token_id": 64}, "pad_token_id in config.json of .* is 64, which is none of its 64 tokens; correct it"),
        ({"tie_word_embeddings": None}, "cannot be loaded .*tie_word_embeddings.* expected bool, got"),
        ({"eos_token_id": "</s>"}, "cannot be loaded .*eos_token_id"),
        ({"num_attention_heads": 0}, "num_attention_heads in config.json of .* is 0; it must be a whole number"),
        ({"hidden_size": -96}, "hidden_size in config.json of .* is -96"),
        ({"intermediate_size": 344.0}, "intermediate_size in config.json of .* is 344.0; it must be a whole number"),
        ({"vocab_size": True}, "vocab_size in config.json of .* is True; it must be a whole number"),
        ({"hidden_size": 97}, "cannot be loaded .*not a multiple of the number of attention"),
        ({"head_dim": 15}, "cannot be loaded .*even rotary dimension"),
        ({"num_key_value_heads": 0}, "num_key_value_heads in config.json of .* is 0"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers in config.json of .* it must be a whole number from 1 to"),
        ({"num_labels": 10**9}, "num_labels in config.json of .* it must be a whole number from 0 to 100,000"),
        ({"hidden_act": "none"}, "does not describe a causal language model"),
        ({"model_type": None}, "model_type None of .* is unknown to this transformers"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] of .* is unknown to this transformers"),
        ({"model_type": "stablelm"}, "'stablelm' is not supported"),
        ({"auto_map": "x.Y"}, "auto_map in config.json of .* is 'x.Y', no mapping"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_unsupported_config_is_refused_in_one_sentence(keys, sentence, folders, tmp_path):
    folder = with_keys(folders["llama"], tmp_path / "m", **keys)
    for way in (
        lambda: download_model({"source": "path", "path": str(folder)}, tmp_path / "out"),
        lambda: StreamedBlocks(folder, device="cpu"),
        lambda: obr.load_model(folder, device="cpu"),
    ):
        with pytest.raises(ObrError, match=sentence):
            way()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"quantization_config": None, "auto_map": None, "layer_types": None, "sliding_window": None},
        {"attn_implementation": "flash_attention_2"}, {"_attn_implementation": "flash_attention_2"},
        {"return_dict": False, "use_return_dict": False}, {"output_attentions": True, "output_hidden_states": True},
        {"output_attentions": True, "attn_implementation": "sdpa"}, {"use_cache": False},
        {"layer_types": ["full_attention"] * 2, "use_sliding_window": False, "sliding_window": 4096},
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},
        {"pretraining_tp": 2, "architectures": None, "id2label": {"0": "x"}, "unsloth_fixed": True},
        {"attn_pdrop": 0.1, "router_aux_loss_coef": 0.01, "_flash_attn_2_enabled": True, "num_experts": 1},
        {"bos_token_id": None, "eos_token_id": [1, 2], "pad_token_id": -1, "dtype": None, "torch_dtype": "float16"},
    ],
    ids=lambda keys: ", ".join(keys)[:40],
)  # fmt: skip
def test_keys_that_change_nothing_are_accepted(keys, folders, tmp_path):
    right = own(AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32))
    folder = with_keys(folders["llama"], tmp_path / "m", **keys)
    download_model({"source": "path", "path": str(folder)}, tmp_path / "out")
    assert obr.perplexity(StreamedBlocks(tmp_path / "out", device="cpu"), TOKENS) == pytest.approx(right, rel=1e-5)
    model = obr.load_model(tmp_path / "out", device="cpu")
    assert own(model) == pytest.approx(right, rel=1e-5)
    obr.save(obr.compress(model, None, {"method": "rtn", "bits": 8}, progress=False), tmp_path / "c")
    packed = obr.load(tmp_path / "c", device="cpu")
    assert own(packed) == pytest.approx(obr.perplexity(packed, TOKENS), rel=1e-5)  # transformers' own forward works


def test_the_configuration_read_is_transformers_own(folders):
    from transformers import AutoConfig

    for folder in folders.values():
        assert config_of(folder).to_json_string() == AutoConfig.from_pretrained(folder).to_json_string()


def test_a_config_that_is_no_object_is_told(tmp_path):
    for text, sentence in (
        ("[]", "holds a JSON list, not an object"), ("{", "is missing or not JSON"), ("[" * 99_999, "not JSON"),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ObrError, match=sentence):
            StreamedBlocks(tmp_path)


# --- Any value at all -------------------------------------------------------------------------------------

NASTY = [None, "x", [1], {"a": 1}, -1, 0, 0.5, 10**30, True]


@contextmanager
def bounded(seconds: int):
    """End in an error what takes longer, by the clock."""

    def late(*_):
        raise AssertionError("too long")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
def test_config_values_of_any_type_raise_no_traceback(tmp_path):
    """What a download accepts, a streamed stage computes, or says in a sentence that it cannot."""
    random_llama(
        1, vocab_size=32, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1
    ).save_pretrained(tmp_path / "plain")
    more = ("rope_scaling", "layer_types", "quantization_config", "auto_map", "attn_implementation", "is_causal")
    tokens, refused, accepted = torch.arange(16).view(2, 8), 0, 0
    for key in [*json.loads((tmp_path / "plain/config.json").read_text()), *more]:
        for value in NASTY:
            folder = with_keys(tmp_path / "plain", tmp_path / "m", **{key: value})
            source = {"source": "path", "path": str(folder)}
            with bounded(60):
                told(lambda folder=folder: check_widths(read_config(folder), {"a": "2:4"}, "m"))
                told(lambda folder=folder: tensor_sizes.sizes_in(folder))
                if told(lambda source=source: download_model(source, tmp_path / "out")):
                    refused += 1
                else:
                    accepted += 1
                    told(lambda: obr.perplexity(StreamedBlocks(tmp_path / "out", device="cpu"), tokens))
    assert refused > 100 and accepted > 40


def told(act) -> str | None:
    """What the user is told in place of a result; any other exception is a failure."""
    try:
        act()
    except ObrError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


# --- Without transformers ---------------------------------------------------------------------------------


def test_sizes_are_those_of_transformers(folders):
    for folder in folders.values():
        config, sizes = config_of(folder), sizes_of(read_config(folder), "m")
        heads, head_dim = config.num_attention_heads, getattr(config, "head_dim", None)
        assert (sizes.hidden, sizes.heads, sizes.kv_heads) == (config.hidden_size, heads, config.num_key_value_heads)
        assert sizes.head_dim == (head_dim or config.hidden_size // heads) and sizes.vocabulary == 64


@pytest.mark.parametrize("key", ["vocab_size", "num_attention_heads", "hidden_size", "intermediate_size"])
def test_a_size_that_is_missing_is_told_by_every_command(key, folders, tmp_path, capsys):
    config = json.loads((folders["llama"] / "config.json").read_text())
    del config[key]
    folder = with_keys(folders["llama"], tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ObrError, match=f"has no {key}; add it, or choose another model"):
        tensor_sizes.sizes_in(folder)
    stage = ["check-model", "--patterns", "a=2:4", "--model", str(folder), "--out", str(tmp_path / "o")]
    assert main(stage) == (key != "vocab_size")
    assert key == "vocab_size" or f"obr: config.json of m has no {key}; add it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.workflow
def test_a_plan_tells_what_is_wrong_with_a_model(tiny_folder, folders, tmp_path, capsys):
    import yaml

    folder = with_keys(folders["llama"], tmp_path / "m", vocab_size=None)
    config = CONFIG | {
        "models": {"tiny": CONFIG["models"]["tiny"] | {"source": {"source": "path", "path": str(folder)}}}
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"results": str(tmp_path / "results")}))
    snakefile = str(ROOT / "Snakefile")
    assert main(["plan", "--snakefile", snakefile, "--configfile", str(tmp_path / "config.yaml")]) == 1
    assert f"obr: config.json of {folder} has no vocab_size; add it" in capsys.readouterr().err


# --- Local sources that change ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.workflow
def test_a_local_text_that_is_edited_is_fetched_again(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    shutil.copy(tiny_folder / "train.txt", tmp_path / "own")
    for name in ("model", "heldout.txt"):
        (tmp_path / "own" / name).symlink_to(tiny_folder / name)
    monkeypatch.setenv("OBR_TINY", str(tmp_path / "own"))
    target = "results/smoke/texts/train.txt"
    assert snakemake(tmp_path, CONFIG, target).returncode == 0
    assert "Nothing to be done" in snakemake(tmp_path, CONFIG, "--dry-run", target).stdout
    with open(tmp_path / "own/train.txt", "a", encoding="utf-8") as text:
        text.write("another sentence\n")
    assert "rule download_text" in snakemake(tmp_path, CONFIG, "--dry-run", target).stdout


def test_rules_reading_local_files_have_state_parameter():
    found = set()
    for name in ("download", "rotations", "compress"):
        text = (ROOT / f"workflow/rules/{name}.smk").read_text(encoding="utf-8")
        found |= {rule.split(":")[0] for rule in f"\n{text}".split("\nrule ") if "local=jobs.local(" in rule}
    assert found == {
        "download_model", "download_text", "download_documents", "download_task", "download_rotation",
        "download_released", "released",
    }  # fmt: skip
