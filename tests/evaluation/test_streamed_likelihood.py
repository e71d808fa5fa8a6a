"""Streamed zero-shot evaluation scores as lm-eval's own model does at batch size 1, and holds one block at a time."""

import gc
import json
import os
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

import obr
from helpers.answer_likelihoods import alone, tiny
from helpers.family_models import EXPERTS, FAMILIES, random_model
from helpers.single_scores import task_score
from helpers.small_tokenizers import BOOLQ, byte_level, make
from helpers.workflow_runs import with_hashes
from helpers.zero_shot_tasks import LAMBADA, PIQA, WINOGRANDE, local_task
from obr.checkpoints.format import CheckpointBlocks
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.evaluation import block_pass
from obr.evaluation.likelihood import Answers, log_likelihoods, streamed_log_likelihoods
from obr.evaluation.perplexity import Windows
from obr.evaluation.prompt_trees import Batch, batches_of, joined, trees_of
from obr.evaluation.tasks import download_task, load_task
from obr.evaluation.zero_shot import zero_shot
from obr.models.architectures import Dimensions
from obr.models.hidden_states import MemoryBudget
from obr.models.loading import load_tokenizer
from obr.models.read_only import ReadOnlyBlocks

NATS = 1e-3
A8, A4 = {"bits": 8}, {"bits": 4}
RECIPES = {
    "dense": {"method": "dense"},
    "W4A16": {"method": "rtn"},
    "W4A8KV8": {"method": "rtn", "activations": A8, "keys": A8, "values": A8},
    "W4A4KV4": {"method": "rtn", "activations": A4, "keys": A4, "values": A4},
}
QUESTIONS = [
    ([5, 6, 7, 8], [[1, 2, 3], [1, 2], [4], [1, 2, 3]]),  # answers that begin alike, and one twice
    ([5, 6, 7, 8, 1], [[2, 3], [9, 9, 9, 9]]),  # a context that goes on from another with the tokens of its answer
    ([5, 6, 7, 9, 9, 2], [[11, 12], [3]]),  # contexts that begin alike
    ([9], [[1, 2, 3], [3]]),  # of the token alone that begins a text
    (list(range(10, 40)), [[1, 2, 3, 4, 5, 6], [7]]),  # longer than max_length
    (list(range(20, 30)), [[40] * 12]),
]
REQUESTS = [("", context, answer) for context, answers in QUESTIONS for answer in answers]
MAX_LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer():
    return make(byte_level, "<s> $A")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_lm_eval(model, tokenizer, requests, max_length):
    """Of lm-eval's own model, one request at a time, without padding.

    Without its cache of logits, which confuses answers of different lengths whose tokens but the last are the same.
    """
    judge = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=max_length, softmax_dtype="float32",
        logits_cache=False,
    )  # fmt: skip
    return judge._loglikelihood_tokens(requests, disable_tqdm=True)


def check_same(found, wanted):
    assert len(found) == len(wanted)
    for (ours, greedy), (theirs, likeliest) in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=NATS) and greedy == likeliest


def saved(model, name: str, rotation, folder):
    if rotation:
        obr.rotate(model, rotation, seed=1)
    recipe = {"calibration": "c", **RECIPES[name]}
    obr.save(obr.compress(model, torch.arange(1, 41).view(2, 20), recipe, progress=False), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("rotation", [None, "quarot"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_scores_equal_lm_evals_for_families_and_recipes(family, recipe, rotation, tokenizer, tmp_path):
    if rotation and Dimensions.of(FAMILIES[family]).objection(rotation):
        pytest.skip(f"{family} models stay as they are with rotation {rotation}")
    folder = saved(random_model(FAMILIES[family], torch.float32), recipe, rotation, tmp_path / "c")
    # In float32 sums differ in their last bit, which moves a rounded activation to another level now and then.
    dtype = torch.float64 if "activations" in RECIPES[recipe] else torch.float32
    wanted = by_lm_eval(obr.load(folder, dtype=dtype, device="cpu"), tokenizer, REQUESTS, MAX_LENGTH)
    room = MemoryBudget(1e-3, tmp_path)  # less than the hidden states: they lie in a file
    for batch_tokens, place in ((32, room), (512, None)):
        blocks = CheckpointBlocks(folder, dtype=dtype, device="cpu")
        check_same(streamed_log_likelihoods(blocks, REQUESTS, MAX_LENGTH, batch_tokens, place), wanted)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe, a dense block", "deepseek_v3"])
def test_streamed_scores_of_experts_equal_lm_evals(family, tokenizer, tmp_path):
    """What requests share is computed once, whichever experts its tokens are sent to."""
    folder = saved(random_model(EXPERTS[family], torch.float32), next(iter(RECIPES)), "quarot", tmp_path / "c")
    wanted = by_lm_eval(obr.load(folder, device="cpu"), tokenizer, REQUESTS, MAX_LENGTH)
    for batch_tokens in (32, 512):
        blocks = CheckpointBlocks(folder, dtype=torch.float32, device="cpu")
        check_same(streamed_log_likelihoods(blocks, REQUESTS, MAX_LENGTH, batch_tokens), wanted)


@pytest.mark.parametrize("window", [1, 4, 8, 64])
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_window_of_attention_is_one_of_positions(family, window, tokenizer):
    """In Qwen2 the second block alone has one."""
    sizes = {"use_sliding_window": True, "max_window_layers": 1} if family == "qwen2" else {}
    model = tiny(family, sliding_window=window, **sizes)
    wanted = by_lm_eval(model, tokenizer, REQUESTS, MAX_LENGTH)
    check_same(streamed_log_likelihoods(ReadOnlyBlocks(model), REQUESTS, MAX_LENGTH), wanted)
    check_same(log_likelihoods(model, REQUESTS, MAX_LENGTH, 8), wanted)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_position_embeddings_that_depend_on_the_length_are_those_of_each_request(rope):
    parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 6}
    sizes = {"rope_parameters": parameters, "max_position_embeddings": 6 if rope == "dynamic" else 64}
    found = streamed_log_likelihoods(ReadOnlyBlocks(tiny(**sizes)), REQUESTS, MAX_LENGTH)
    likelihoods = log_likelihoods(tiny(**sizes), REQUESTS, MAX_LENGTH, 8)
    for (_, context, answer), ours, theirs in zip(REQUESTS, found, likelihoods, strict=True):
        wanted, _ = alone(tiny(**sizes), context, answer, MAX_LENGTH)
        assert ours[0] == pytest.approx(wanted, abs=NATS) and theirs[0] == pytest.approx(wanted, abs=NATS)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_longer_text_in_the_same_pass_leaves_position_embeddings_alone(rope):
    """All requests are beyond the length from which frequencies depend on it, and the text is longer still."""
    parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 6}
    sizes = {"rope_parameters": parameters, "max_position_embeddings": 6 if rope == "dynamic" else 64}
    requests = [("", list(range(10, 20)), [1, 2, 3]), ("", list(range(30, 42)), [4, 5])]
    wanted = streamed_log_likelihoods(ReadOnlyBlocks(tiny(**sizes)), requests, MAX_LENGTH)
    blocks, windows = ReadOnlyBlocks(tiny(**sizes)), torch.arange(1, 41).view(1, 40)
    alone_value = block_pass.run(blocks, [Windows(blocks, windows)])[0]
    for order in ((0, 1), (1, 0)):
        made = [lambda: Windows(blocks, windows), lambda: Answers(blocks, requests, MAX_LENGTH, 64)]
        parts = [made[i]() for i in order]
        found = dict(zip(order, block_pass.run(blocks, parts), strict=True))
        check_same(found[1], wanted)
        assert found[0] == pytest.approx(alone_value, rel=1e-5)


TOKENS = st.lists(st.integers(0, 5), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(
    questions=st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=4),
    max_length=st.integers(9, 20),
    most=st.integers(1, 60),
    pairs=st.sampled_from([0, 3, 1000]),
)
def test_a_token_sees_the_tokens_before_it_in_its_request(questions, max_length, most, pairs):
    """By the mask, whether trees are rows of their own or parts of one row; every request is in one tree."""
    requests = [("", context, answer) for context, answers in questions for answer in answers]
    trees = trees_of(requests, max_length, most, pairs)
    for batches in (batches_of(trees, most), [Batch([joined(trees)])]):
        seen = []
        for batch in batches:
            tokens, positions = batch.tokens.flatten(), batch.positions.flatten()
            mask = (batch.mask(torch.float32, torch.device("cpu"))[:, 0] == 0).reshape(len(tokens), -1)
            for answer in batch.answers:
                _, context, wanted = requests[answer.request]
                last, row = answer.places[-1], answer.places[-1] // batch.shape[1] * batch.shape[1]
                above = row + mask[last].nonzero().flatten()
                assert tokens[above].tolist() == (context + wanted)[-(max_length + 1) : -1]
                assert positions[above].tolist() == list(range(len(above)))
                assert answer.places == above[-len(wanted) :].tolist() and answer.tokens == wanted
                seen.append(answer.request)
        assert sorted(seen) == list(range(len(requests)))


def test_batches_hold_no_more_tokens_than_they_may():
    requests = [("", [i, *range(length)], [1, 2]) for i in range(6) for length in (3, 9, 30)]
    batches = batches_of(trees_of(requests, 64, 40, 100), 40)
    assert all(batch.tokens.numel() <= 40 or batch.shape[0] == 1 for batch in batches) and len(batches) > 3
    lengths = [batch.shape[1] for batch in batches]
    assert lengths == sorted(lengths, reverse=True)


def test_requests_join_tree_when_saving_exceeds_attention_cost():
    """What three questions of 40 tokens share is computed once if it is long, and apart if it is short.

    With 10 tokens two of them are a tree: 1,920 > 70² - 2 · 40². The third would cost more: 1,920 < 100² - 70² - 40².
    """
    for shared, count in ((2, 3), (10, 2), (30, 1)):
        requests = [("", [*range(shared), 50 + i, *range(39 - shared)], [1]) for i in range(3)]
        assert len(trees_of(requests, 64, 200, 3 * 64)) == count
    assert len(trees_of(requests, 64, 45, 3 * 64)) == 3  # no tree of several requests is larger


def test_blocks_are_loaded_once_and_shared_tokens_read_once():
    model, loaded, read = tiny(), [], []
    blocks = ReadOnlyBlocks(model)
    load = blocks.load

    def watched(index):
        loaded.append(index)
        return load(index)

    blocks.load = watched
    real = block_pass.run_block
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_pass, "run_block", lambda block, states, call: read.append(states[..., 0].numel())
                      or real(block, states, call))  # fmt: skip
        contexts = [[i, *range(1, 11)] for i in range(3)]
        requests = [("", context, [7, last, 9]) for context in contexts for last in range(4)]
        streamed_log_likelihoods(blocks, requests, 64, 64)
    assert loaded == [0, 1]
    assert sum(read) == 2 * 3 * (11 + 1 + 4)  # of 2 * 12 * 13 tokens one by one


@pytest.fixture(scope="module")
def checkpoint(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("scored") / "c"
    recipe = Recipe.parse({"method": "rtn", "calibration": "c"})
    compress_stage(tiny_folder / "model", recipe, out, device="cpu")
    return out


TASKS = {
    "piqa": PIQA,
    "boolq": BOOLQ,
    "winogrande": WINOGRANDE,
    "lambada_openai": [*LAMBADA, {"text": "house"}],  # the last has an empty context
}
SAME = ("acc", "acc_norm", "value", "stderr", "n", "truncated", "prompts", "max_length")


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_zero_shot_stage_equals_model_in_memory(name, checkpoint, tmp_path):
    folder = local_task(tmp_path, name, TASKS[name])
    streamed = task_score(checkpoint, folder, {"batch_tokens": 100, "bos": True}, device="cpu")
    model = obr.load(checkpoint, device="cpu")
    whole = zero_shot(model, load_tokenizer(checkpoint), folder, batch_size=2, bos=True)
    assert {key: streamed[key] for key in SAME} == {key: whole[key] for key in SAME}
    assert streamed["batch_tokens"] == 100 and streamed["dtype"] == "float32"
    if name == "lambada_openai":
        assert streamed["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-4)
    json.dumps(streamed, allow_nan=False)


def samples_of(found, name: str) -> list[tuple[float, bool]]:
    return [score for sample in found["samples"][name] for score in sample["filtered_resps"]]


def check_as_lm_eval(monkeypatch, checkpoint, folder, name, bos, limit=None):
    """The stage against lm-eval with its own model, from the text of the task to the answers."""
    import lm_eval.evaluator

    kept = []
    monkeypatch.setattr(lm_eval.evaluator, "evaluate", lambda *a, **k: kept.append(evaluate(*a, **k)) or kept[-1])
    result = task_score(checkpoint, folder, {"bos": bos, "limit": limit}, device="cpu")
    judge = HFLM(
        pretrained=obr.load(checkpoint, device="cpu"), tokenizer=load_tokenizer(checkpoint), batch_size=1,
        add_bos_token=bos, softmax_dtype="float32",
    )  # fmt: skip
    wanted = evaluate(judge, {"tasks": {name: load_task(folder)}}, limit=limit, bootstrap_iters=1)
    check_same(samples_of(kept[0], name), samples_of(wanted, name))
    assert result["acc"] == wanted["results"][name]["acc,none"]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", TASKS)
def test_texts_are_read_as_lm_eval_reads_them(name, bos, checkpoint, tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "with_bos")
    for file in checkpoint.iterdir():
        if not (tmp_path / "with_bos" / file.name).exists():
            (tmp_path / "with_bos" / file.name).hardlink_to(file)
    with_hashes(tmp_path / "with_bos")
    folder = local_task(tmp_path, name, TASKS[name])
    check_as_lm_eval(monkeypatch, tmp_path / "with_bos", folder, name, bos)


@pytest.mark.slow
@pytest.mark.skipif("OBR_DATA" not in os.environ, reason="OBR_DATA names no folder with the real task sets")
@pytest.mark.parametrize(
    "name, file",
    [("piqa", "piqa_validation"), ("arc_easy", "arc_easy_test"), ("winogrande", "winogrande_xl_validation")],
)
def test_real_rows_are_scored_as_by_lm_eval(name, file, checkpoint, tmp_path, monkeypatch):
    source = {"source": "path", "task": name, "file": f"$OBR_DATA/data/tasks/{file}.jsonl"}
    download_task(source, tmp_path / name)
    check_as_lm_eval(monkeypatch, checkpoint, tmp_path / name, name, False, limit=30)


@pytest.mark.slow
def test_streamed_scoring_holds_one_block_in_memory(tiny_folder, tmp_path, monkeypatch):
    """Of models of 2 and of 6 blocks: the bytes of all tensors that live when a block is loaded are the same."""
    folder, peaks = local_task(tmp_path, "piqa", PIQA), {}
    real = CheckpointBlocks.load
    for depth in (2, 6):
        model = tiny(num_hidden_layers=depth, vocab_size=512, max_position_embeddings=512)
        out = saved(model, "W4A16", None, tmp_path / str(depth))
        load_tokenizer(tiny_folder / "model").save_pretrained(out)
        del model
        before, blocks = [], []

        def watched(self, index, before=before, blocks=blocks):
            gc.collect()
            assert not any(block() is not None for block in blocks), "another block is still in memory"
            tensors = (item for item in gc.get_objects() if isinstance(item, torch.Tensor) and not item.is_meta)
            before.append(sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))
            block = real(self, index)
            blocks.append(weakref.ref(block))
            return block

        monkeypatch.setattr(CheckpointBlocks, "load", watched)
        task_score(out, folder, {"batch_tokens": 64}, device="cpu")
        assert len(before) == depth
        peaks[depth] = max(before) - min(before)
        assert peaks[depth] < 1000, before
