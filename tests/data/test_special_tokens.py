"""Special tokens: where they are put, and that none stands between a prompt and its answer."""

import json
import math
import random

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from torch.nn import functional as F
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

import obr
from helpers.single_scores import text_score
from helpers.small_tokenizers import BOOLQ, HELLASWAG, byte_level, make, prefix_space
from helpers.workflow_runs import with_hashes
from helpers.zero_shot_tasks import TEXT, local_task
from obr.cli.main import main
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.data.sampling import sample_windows
from obr.data.self_generated import generate
from obr.data.token_windows import calibrate, load_tokens
from obr.data.tokenize import special_tokens, tokenize
from obr.errors import ObrError
from obr.evaluation.zero_shot import zero_shot
from obr.export.dispatch import export
from obr.models.loading import load_tokenizer
from obr.report.table_rows import value_of

TEMPLATES = {"neither": "$A", "BOS": "<s> $A", "EOS": "$A </s>", "both": "<s> $A </s>", "another": "<cls> $A"}


@pytest.fixture(scope="module")
def tokenizers():
    return {(kind, name): make(kind, text) for kind in (byte_level, prefix_space) for name, text in TEMPLATES.items()}


def random_model(kind=LlamaForCausalLM, config=LlamaConfig, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256}
        return kind(config(**sizes, initializer_range=0.3, tie_word_embeddings=False, **options)).eval()


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def task_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return {"boolq": local_task(folder, "boolq", BOOLQ), "hellaswag": local_task(folder, "hellaswag", HELLASWAG)}


@pytest.fixture
def scored(monkeypatch):
    """What lm-eval was given and gave back: a list of (context, continuation, log-likelihood)."""
    import lm_eval.evaluator

    found, real = [], lm_eval.evaluator.evaluate

    def spy(*arguments, **options):
        results = real(*arguments, **options)
        for samples in results["samples"].values():
            for sample in samples:
                pairs = [argument[:2] for argument in sample["arguments"]]
                scores = [score for score, _ in sample["filtered_resps"]]
                found.extend((*pair, score) for pair, score in zip(pairs, scores, strict=True))
        return results

    monkeypatch.setattr(lm_eval.evaluator, "evaluate", spy)
    return found


@torch.no_grad()
def naive(model, tokenizer, context: str, continuation: str, before: list[int]) -> float:
    """Tokenised without special tokens; `before` in front; log-softmax summed over the answer's tokens."""
    question, both = (tokenizer.encode(t, add_special_tokens=False) for t in (context, context + continuation))
    ids = torch.tensor([before + both])
    scores = model(ids).logits[0].log_softmax(-1)
    return sum(float(scores[i - 1, ids[0, i]]) for i in range(len(before) + len(question), ids.shape[1]))


# Zero-shot prompts.


@pytest.mark.slow
@pytest.mark.parametrize("kind", [byte_level, prefix_space])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("bos", [None, False, True, "tokenizer"])
def test_no_special_token_between_prompt_and_answer(model, tokenizers, task_folders, scored, kind, template, bos):
    tokenizer = tokenizers[kind, template]
    own = {"BOS": [0], "both": [0], "another": [2]}.get(template, [])
    before = {None: [], False: [], True: [0], "tokenizer": own}[bos]
    for name in task_folders:
        scored.clear()
        result = zero_shot(model, tokenizer, task_folders[name], batch_size=3, bos=bos)
        assert result["bos"] == bos and len(scored) == {"boolq": 8, "hellaswag": 12}[name]
        for context, continuation, score in scored:
            assert score == pytest.approx(naive(model, tokenizer, context, continuation, before), abs=1e-4)
    spelled = {0: "a BOS token before each prompt", 2: "the special tokens <cls> before each prompt"}
    assert result["prompts"] == (spelled[before[0]] if before else "no special tokens")


def test_two_answers_of_one_token_do_not_tie_where_eos_is_added(model, tokenizers, task_folders, scored):
    zero_shot(model, tokenizers[byte_level, "EOS"], task_folders["boolq"])
    no, yes = scored[0][2], scored[1][2]
    assert abs(no - yes) > 1e-3


def test_a_bos_in_the_prompt_is_not_doubled(model, tokenizers, tmp_path, scored):
    rows = [{**row, "passage": f"<s>{row['passage']}"} for row in BOOLQ]
    folder = local_task(tmp_path, "boolq", rows)
    for template in ("neither", "both"):
        for bos in (False, True, "tokenizer"):
            scored.clear()
            zero_shot(model, tokenizers[byte_level, template], folder, bos=bos)
            for context, continuation, score in scored:
                wanted = naive(model, tokenizers[byte_level, template], context, continuation, [])
                assert score == pytest.approx(wanted, abs=1e-4)


def test_a_bos_that_does_not_exist_is_refused(model, task_folders):
    without = make(byte_level, "$A </s>", bos_token=None)
    with pytest.raises(ObrError, match="no beginning-of-sequence token: set bos to false"):
        zero_shot(model, without, task_folders["boolq"], bos=True)
    with pytest.raises(ObrError, match="bos 'window' is unknown: use null, true, false or tokenizer"):
        zero_shot(model, without, task_folders["boolq"], bos="window")
    assert zero_shot(model, without, task_folders["boolq"], limit=1)["stderr"] is None


def test_a_prompt_of_nothing_follows_the_token_that_begins_a_text(model, tokenizers, tmp_path, scored):
    folder = local_task(tmp_path, "lambada_openai", [{"text": "house"}, {"text": "The old house"}])
    zero_shot(model, tokenizers[byte_level, "both"], folder)
    assert scored[0][:2] == ("", " house")
    assert scored[0][2] == pytest.approx(naive(model, tokenizers[byte_level, "both"], "", " house", [0]), abs=1e-4)
    nothing = make(byte_level, "$A", bos_token=None, eos_token=None, unk_token=None, pad_token="<cls>")
    with pytest.raises(ObrError, match="neither a BOS nor an EOS token"):
        zero_shot(model, nothing, folder)


@pytest.fixture(scope="module")
def gemma():
    return random_model(GemmaForCausalLM, GemmaConfig, head_dim=8)


def test_gemma_gets_a_bos_as_the_released_evaluation_has_it(gemma, tokenizers, task_folders, scored):
    tokenizer = tokenizers[byte_level, "neither"]
    result = zero_shot(gemma, tokenizer, task_folders["boolq"])
    assert result["prompts"] == "a BOS token before each prompt" and "note" not in result
    for context, continuation, score in scored:
        assert score == pytest.approx(naive(gemma, tokenizer, context, continuation, [0]), abs=1e-4)
    result = zero_shot(gemma, tokenizer, task_folders["boolq"], bos=False)
    assert result["note"].startswith("gemma models need a BOS token in front and the prompts have none")


# Texts and windows.


@pytest.mark.parametrize("kind", [byte_level, prefix_space])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_text_gets_the_special_tokens_asked_for(tokenizers, kind, template):
    tokenizer = tokenizers[kind, template]
    plain = tokenizer.encode("The old house", add_special_tokens=False)
    added = {"neither": ([], []), "BOS": ([0], []), "EOS": ([], [1]), "both": ([0], [1]), "another": ([2], [])}
    before, after = added[template]
    assert special_tokens(tokenizer) == (before, after)
    assert tokenize(tokenizer, "The old house").tolist() == before + plain + after
    assert tokenize(tokenizer, "The old house", True).tolist() == [0, *plain]
    for bos in (False, "window"):
        assert tokenize(tokenizer, "The old house", bos).tolist() == plain
    for bos in (None, True):  # written in the text, it is not doubled
        assert tokenize(tokenizer, "<s>The old house", bos).tolist().count(0) == 1
    with pytest.raises(ObrError, match="bos 'text' is unknown"):
        tokenize(tokenizer, "The old house", "text")


@given(
    total=st.integers(0, 200), seqlen=st.integers(1, 40), limit=st.one_of(st.none(), st.integers(0, 250)),
    begun=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_windows_begin_with_bos_and_tokens_are_contiguous(total, seqlen, limit, begun):
    tokens = torch.arange(7, 7 + total)
    text = torch.cat([torch.tensor([1]), tokens]) if begun else tokens
    used = tokens[:limit].tolist()
    wanted = [[1, *used[i : i + seqlen - 1]] for i in range(0, len(used), max(1, seqlen - 1))]
    wanted = [window for window in wanted if len(window) == seqlen]
    if seqlen < 2 or not wanted:
        with pytest.raises(ObrError, match="no room for a token after BOS" if seqlen < 2 else "one window needs"):
            obr.evaluation_windows(text, seqlen, limit, bos_token_id=1)
        return
    assert obr.evaluation_windows(text, seqlen, limit, bos_token_id=1).tolist() == wanted


@given(total=st.integers(2, 200), seqlen=st.integers(2, 30), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_calibration_windows_begin_with_bos_too(total, seqlen, seed):
    tokens, length = torch.arange(7, 7 + total), seqlen - 1
    if total > length:
        draw = random.Random(seed)
        starts = [draw.randint(0, total - length - 1) for _ in range(3)]
        windows = sample_windows(tokens, 3, seqlen, seed, bos_token_id=1)
        assert windows.tolist() == [[1, *tokens[i : i + length].tolist()] for i in starts]
    if total >= 2 * length:
        windows = sample_windows(tokens, 2, seqlen, sampling="sequential", bos_token_id=1)
        assert windows.tolist() == [[1, *tokens[i : i + length].tolist()] for i in (0, length)]


@pytest.fixture(scope="module")
def gemma_checkpoint(gemma, tokenizers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    gemma.save_pretrained(folder / "model")
    tokenizers[byte_level, "BOS"].save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    compress_stage(folder / "model", Recipe.parse({"method": "dense"}), folder / "packed")
    return folder


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("bos", [None, True, False, "window"])
def test_perplexity_is_over_requested_windows(gemma, gemma_checkpoint, bos):
    found = text_score(
        gemma_checkpoint / "packed", gemma_checkpoint / "text.txt", {"seqlen": 32, "bos": bos}, dtype=torch.float32
    )
    tokenizer = load_tokenizer(gemma_checkpoint / "packed")
    text = tokenizer.encode(TEXT, add_special_tokens=False)
    if bos == "window":
        windows = [[0, *text[i : i + 31]] for i in range(0, len(text) - 30, 31)]
    else:
        text = text if bos is False else [0, *text]
        windows = [text[i : i + 32] for i in range(0, len(text) - 31, 32)]
    losses = [F.cross_entropy(gemma(torch.tensor([w])).logits[0, :-1], torch.tensor(w[1:])) for w in windows]
    assert found["value"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=0.01)  # weights in bfloat16
    assert found["windows"] == len(windows) and found["tokens"] == 32 * len(windows) and found["bos"] == bos
    assert "31 targets a window" in found["definition"]
    special = {None: "a BOS token once, before the text", True: "a BOS token once, before the text",
               False: "no special tokens", "window": "every window begins with a BOS token"}[bos]  # fmt: skip
    assert special in found["definition"]
    without = {False: len(windows), "window": 0}.get(bos, len(windows) - 1)
    if without:
        assert f"and {without} of {len(windows)} windows have none" in found["note"]
    else:
        assert "note" not in found


def test_the_definition_names_what_a_tokenizer_adds_after_the_text(tiny_folder, tmp_path):
    compress_stage(tiny_folder / "model", Recipe.parse({"method": "dense"}), tmp_path / "packed")
    inner = Tokenizer.from_file(str(tmp_path / "packed/tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    inner.save(str(tmp_path / "packed/tokenizer.json"))
    with_hashes(tmp_path / "packed")
    found = text_score(tmp_path / "packed", tiny_folder / "heldout.txt", {"seqlen": 64, "tokens": 256})
    ending = "a BOS token once, before the text and the special tokens </s> once, after the text"
    assert found["definition"].endswith(ending) and "note" not in found


def test_obr_perplexity_prints_its_definition_and_note(gemma_checkpoint, tmp_path, capsys):
    command = ["evaluate", str(gemma_checkpoint / "packed"), "--out", str(tmp_path / "p.json")]
    command += ["--text", "t", str(gemma_checkpoint / "text.txt"), "seqlen=128", "tokens=1536"]
    for bos, words in (("window", "every window begins with a BOS token"), ("null", "11 of 12 windows have none")):
        assert main([*command, f"bos={bos}"]) == 0
        assert words in capsys.readouterr().out
    score = json.loads((tmp_path / "p.json").read_text())["perplexity"]["t"]
    assert "window" not in score["definition"].rpartition(";")[2]


def test_an_infinite_perplexity_is_no_number_in_json(tokenizers, tmp_path, capsys):
    model = random_model()
    model.lm_head.weight.data *= 1e4
    model.save_pretrained(tmp_path / "model")
    tokenizers[byte_level, "BOS"].save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    compress_stage(tmp_path / "model", Recipe.parse({"method": "dense"}), tmp_path / "packed")
    text = ["--text", "t", str(tmp_path / "text.txt"), "seqlen=32", "tokens=128"]
    assert main(["evaluate", str(tmp_path / "packed"), *text, "--out", str(tmp_path / "p")]) == 0
    assert capsys.readouterr().out.startswith("t: perplexity inf: ")
    found = json.loads((tmp_path / "p").read_text(), parse_constant=pytest.fail)["perplexity"]["t"]
    assert (found["value"], found["status"]) == (None, "inf") and value_of(found) == math.inf


def test_calibration_files_say_what_gemma_lacks(gemma_checkpoint, tmp_path):
    for bos in (None, "window"):
        spec = {"nsamples": 3, "seqlen": 16, "bos": bos}
        calibrate(gemma_checkpoint / "model", gemma_checkpoint / "text.txt", spec, tmp_path / "c")
        windows, about = load_tokens(tmp_path / "c")
        assert about["bos"] == bos
        if bos:
            assert (windows[:, 0] == 0).all() and "note" not in about
        else:
            assert "gemma models need a BOS token in front and 3 of 3 windows have none" in about["note"]
    tokenizer = load_tokenizer(gemma_checkpoint / "model")
    made = obr.calibration_tokens(tokenizer, TEXT, nsamples=3, seqlen=16, bos="window")
    assert torch.equal(made, windows)


def test_a_model_writes_windows_that_begin_with_bos(tiny_folder, tmp_path):
    spec = {"generated": {"batch_size": 4}, "nsamples": 3, "seqlen": 64, "seed": 0}
    streams = {}
    for bos in (None, "window"):
        generate(tiny_folder / "model", {**spec, "bos": bos}, tmp_path / "w")
        windows, about = load_tokens(tmp_path / "w")
        assert windows.shape == (3, 64) and about.get("bos") == bos
        streams[bos] = windows
    assert (streams["window"][:, 0] == 0).all()
    assert torch.equal(streams["window"][:, 1:].flatten(), streams[None].flatten()[1:190])


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
def test_gguf_says_what_the_tokenizer_adds(tiny_folder, tmp_path, template):
    """Whatever the flags of tokenizer_config.json say."""
    model = obr.load_model(tiny_folder / "model", device="cpu")
    compressed = obr.compress(model, None, {"method": "rtn"}, progress=False)
    obr.save(compressed, tmp_path / "c", load_tokenizer(tiny_folder / "model"))
    inner = Tokenizer.from_file(str(tmp_path / "c/tokenizer.json"))
    single = TEMPLATES[template].replace("<cls>", "a")  # a token of the model's own
    ids = [(token, inner.token_to_id(token)) for token in ("<s>", "</s>", "a") if token in single]
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    inner.save(str(tmp_path / "c/tokenizer.json"))
    with_hashes(tmp_path / "c")
    if template == "another":
        with pytest.raises(ObrError, match="adds the special tokens a to a text, for which GGUF has no key"):
            export(tmp_path / "c", "gguf", tmp_path / "model.gguf")
        return
    export(tmp_path / "c", "gguf", tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    added = {key: fields[f"tokenizer.ggml.add_{key}_token"].contents() for key in ("bos", "eos")}
    assert added == {"bos": template in ("BOS", "both"), "eos": template in ("EOS", "both")}
