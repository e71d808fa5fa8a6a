"""Task folders and zero-shot accuracy, on rows written here and, where OBR_DATA is set, on real ones."""

import json
import logging
import math
import os
import shutil
import socket
from pathlib import Path

import pytest

from helpers.zero_shot_tasks import ARC, HELLASWAG, LAMBADA, PIQA, ROWS, TEXT, WINOGRANDE, local_task, write_lines
from obr.errors import ObrError
from obr.evaluation.cloze import cloze
from obr.evaluation.lm_eval_tasks import packaged_task
from obr.evaluation.tasks import download_task, load_task, question, read_task
from obr.evaluation.zero_shot import TaskRun, zero_shot
from obr.runtime import hub
from obr.runtime.files import sha256_of

# (context, continuations, right one) of the first row: the prompts of lm-eval's packaged tasks.
ARC_QUESTION = ("Question: What melts?\nAnswer:", ["ice", "a stone"], 0)
FIRST = {
    "piqa": (
        "Question: To cut the bread\nAnswer:",
        ["cut it with a sharp knife.", "put it on a shelf"],
        0,
    ),
    "arc_easy": ARC_QUESTION,
    "arc_challenge": ARC_QUESTION,
    "boolq": ("Ice is cold.\nQuestion: is ice cold?\nAnswer:", ["no", "yes"], 1),
    "hellaswag": (
        "Baking: A man mixes dough. Then he",
        ["bakes it.", "sings. loudly.", "swims.", "sleeps."],
        0,
    ),
    "winogrande": ("had helped.", ["Ann thanked Eve because Ann", "Ann thanked Eve because Eve"], 1),
    "lambada_openai": ("The old coat was put on a long", [" shelf"], 0),
    "openbookqa": ("Ice is", ["warm", "cold", "loud", "old"], 1),
    "social_iqa": (
        "Q: Ann cut the bread. Why did Ann do this?\nA:",
        ["to eat it", "to paint it", "to lose it"],
        0,
    ),
}
ENDINGS = [
    ("cut", "bread", "tabletop"),
    ("mend", "chair", "windowsill"),
    ("wash", "old coat", "shelf"),
    ("open", "tin", "doorstep"),
    ("find", "knife", "sideboard"),
    ("sell", "glue", "mantelpiece"),
]


@pytest.fixture(scope="module")
def piqa(tmp_path_factory):
    return local_task(tmp_path_factory.mktemp("tasks"), "piqa", PIQA)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator([json.dumps(PIQA), TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


@pytest.fixture
def model():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            initializer_range=0.3,
            tie_word_embeddings=False,
        )
        return LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small are slower on two."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def likelihood(model, tokenizer, context: str, continuation: str) -> float:
    import torch

    before = tokenizer.encode(context)
    whole = torch.tensor([tokenizer.encode(context + continuation)])
    with torch.no_grad():
        scores = model(whole).logits[0].float().log_softmax(-1)
    return sum(scores[i - 1, whole[0, i]].item() for i in range(len(before), whole.shape[1]))


# Task folders.


@pytest.mark.slow
@pytest.mark.parametrize("task", ROWS)
def test_prompts_are_those_of_the_packaged_task(task, tmp_path):
    loaded = load_task(local_task(tmp_path, task, ROWS[task]))
    assert question(loaded, loaded.eval_docs[0]) == FIRST[task]


def test_folder_moves_and_keeps_nested_columns(tmp_path, monkeypatch):
    made = local_task(tmp_path, "arc_easy", ARC)
    written = "".join(file.read_text() for file in made.iterdir())
    assert str(tmp_path) not in (made / "task.yaml").read_text() and "site-packages" not in written
    moved = tmp_path / "elsewhere" / "arc"
    moved.parent.mkdir()
    made.rename(moved)
    monkeypatch.chdir(moved.parent)
    assert [json.loads(line) for line in (moved / "data.jsonl").read_text().splitlines()] == ARC
    task = load_task(Path("arc"))
    assert [question(task, doc)[2] for doc in task.eval_docs] == [0, 1]
    assert read_task(moved)["n"] == 2 and read_task(moved)["split"] == "test"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["arc_easy.jsonl", "elsewhere"]


def test_folder_is_readable_by_lm_eval_itself(tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    made = local_task(tmp_path, "winogrande", WINOGRANDE)
    monkeypatch.chdir(made)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    task = TaskManager(include_path=".", include_defaults=False).load(["winogrande"])["tasks"]["winogrande"]
    assert question(task, task.eval_docs[0]) == FIRST["winogrande"]


def test_hub_source_takes_the_scored_split_at_a_commit(tmp_path, monkeypatch):
    import datasets

    asked = {}

    def load_dataset(path, name, **options):
        asked.update(path=path, name=name, **options)
        return datasets.Dataset.from_list(ARC)

    info = type("Info", (), {"sha": "c0ffee"})()
    monkeypatch.setattr(hub, "hub_info", lambda repo, revision, kind: info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    download_task({"source": "hub", "task": "arc_challenge"}, tmp_path / "arc")
    assert asked == {
        "path": "allenai/ai2_arc",
        "name": "ARC-Challenge",
        "split": "test",
        "revision": "c0ffee",
    }
    assert read_task(tmp_path / "arc")["revision"] == "c0ffee"
    task = load_task(tmp_path / "arc")
    assert question(task, task.eval_docs[1]) == ("Question: What burns?\nAnswer:", ["a rock", "wood"], 1)


def test_hub_source_serves_single_answer_tasks(tmp_path, monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(hub, "hub_info", lambda repo, revision, kind: type("Info", (), {"sha": "c0ffee"})())
    monkeypatch.setattr(
        datasets, "load_dataset",
        lambda *names, **options: asked.append((*names, options["split"])) or datasets.Dataset.from_list(LAMBADA),
    )  # fmt: skip
    download_task({"source": "hub", "task": "lambada_openai"}, tmp_path / "lambada")
    assert asked == [("EleutherAI/lambada_openai", "default", "test")]
    task = load_task(tmp_path / "lambada")
    assert question(task, task.eval_docs[1]) == ("To mend it use a little", [" glue"], 0)


def test_unreachable_hub_is_one_sentence(tmp_path, monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "hub_info", lambda repo, revision, kind: type("Info", (), {"sha": "c0ffee"})())
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ObrError, match="datasets/baber/piqa"):
        download_task({"source": "hub", "task": "piqa"}, tmp_path / "piqa")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "task, rows, message",
    [
        ("piqa", [{"goal": "x", "label": 0}], "lack sol1, sol2"),
        ("winogrande", [{"sentence": "a _ b", "option1": "x", "answer": "1"}], "option2"),
        ("hellaswag", [{k: v for k, v in HELLASWAG[0].items() if k != "endings"}], "endings"),
        ("piqa", [PIQA[0], {**PIQA[0], "label": -1}], "row 2 .* names answer -1"),
        ("piqa", [], "no rows"),
        ("gsm8k", [{"question": "x", "answer": "1"}], "'gsm8k' has output type generate_until: choose"),
        ("wikitext", [{"page": "x"}], "'wikitext' has output type loglikelihood_rolling: choose"),
        ("lambada_openai", [{"words": "a house"}], "lack text"),
        ("lambada_openai", [{"text": "a house"}, {"text": "a house "}], "row 2 of task lambada_openai has no answer"),
        ("piqqa", PIQA, "no task named 'piqqa'"),
    ],
)
def test_rows_that_do_not_fit_are_refused(task, rows, message, tmp_path):
    with pytest.raises(ObrError, match=message):
        local_task(tmp_path, task, rows)
    assert not (tmp_path / task).exists()


def test_local_file_is_found_and_checked(tmp_path, monkeypatch):
    source = {"source": "path", "task": "piqa", "file": "$SOME_TASKS/piqa.jsonl"}
    monkeypatch.delenv("SOME_TASKS", raising=False)
    with pytest.raises(ObrError, match="SOME_TASKS is not set"):
        download_task(source, tmp_path / "out")
    monkeypatch.setenv("SOME_TASKS", str(tmp_path))
    with pytest.raises(ObrError, match="does not exist"):
        download_task(source, tmp_path / "out")
    file = write_lines(tmp_path / "piqa.jsonl", PIQA)
    with pytest.raises(ObrError, match="sha256"):
        download_task(source | {"sha256": "0" * 64}, tmp_path / "out")
    download_task(source | {"sha256": sha256_of(file)}, tmp_path / "out")
    file.write_text('{"goal": "x"}\nnot json\n')
    with pytest.raises(ObrError, match="line 2"):
        download_task(source, tmp_path / "out")
    assert read_task(tmp_path / "out")["n"] == len(PIQA)  # the failure left the whole folder in place


def test_unknown_task_source_is_refused(tmp_path):
    with pytest.raises(ObrError, match="'web' is unknown"):
        download_task({"source": "web", "task": "piqa"}, tmp_path / "out")


def test_metrics_are_reduced_to_accuracies():
    assert [metric["metric"] for metric in packaged_task("copa")["metric_list"]] == ["acc"]


def test_a_task_of_one_answer_keeps_its_accuracy_alone():
    config = packaged_task("lambada_openai")
    assert [metric["metric"] for metric in config["metric_list"]] == ["acc"]
    assert config["output_type"] == "loglikelihood"


def test_a_folder_whose_task_became_another_is_refused(tmp_path):
    made = local_task(tmp_path, "lambada_openai", LAMBADA)
    file, note = made / "task.yaml", made / "task.json"
    file.write_text(file.read_text().replace("output_type: loglikelihood", "output_type: loglikelihood_rolling"))
    note.write_text(json.dumps(json.loads(note.read_text()) | {"config_sha256": sha256_of(file)}))
    with pytest.raises(
        ObrError, match="has output type loglikelihood_rolling: choose a task of output type multiple"
    ):
        load_task(made)


# Cloze.


def test_cloze_is_determined_by_text_n_and_seed():
    rows = cloze(TEXT, 12, 0)
    assert rows == cloze(TEXT, 12, 0) != cloze(TEXT, 12, 1)
    for row in rows:
        right = row["choices"][row["label"]]
        assert f"{row['context']} {right}" in TEXT and 20 <= len(row["context"].split()) <= 40
        assert len(set(row["choices"])) == 4 and len({len(choice.split()) for choice in row["choices"]}) == 1
        paragraph = row["context"].split()[1]
        wrong = [choice for i, choice in enumerate(row["choices"]) if i != row["label"]]
        assert all(f"word{paragraph}x" not in choice and choice in TEXT for choice in wrong)
    assert len({row["label"] for row in cloze(TEXT, 20, 0)}) == 4


def test_cloze_folder_is_a_task_folder(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    download_task({"source": "cloze", "n": 12, "seed": 0}, tmp_path / "out", text)
    task = load_task(tmp_path / "out")
    row = cloze(TEXT, 12, 0)[0]
    assert question(task, task.eval_docs[0]) == (row["context"], row["choices"], row["label"])
    with pytest.raises(ObrError, match="20 paragraphs"):
        download_task({"source": "cloze", "n": 21, "seed": 0}, tmp_path / "out", text)
    with pytest.raises(ObrError, match="is no file"):
        download_task({"source": "cloze", "n": 12, "seed": 0}, tmp_path / "out")


# Accuracy.


@pytest.mark.parametrize("batch_size", [1, 3])
def test_accuracy_is_the_ranking_of_log_likelihoods(model, tokenizer, piqa, batch_size):
    result = zero_shot(model, tokenizer, piqa, limit=7, batch_size=batch_size)
    right = {"acc": 0, "acc_norm": 0}
    for row in PIQA[:7]:
        context, answers = f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]]
        scores = [likelihood(model, tokenizer, context, f" {answer}") for answer in answers]
        normed = [score / len(answer) for score, answer in zip(scores, answers)]
        right["acc"] += scores.index(max(scores)) == row["label"]
        right["acc_norm"] += normed.index(max(normed)) == row["label"]
    share = right["acc_norm"] / 7
    assert right["acc"] != right["acc_norm"], "the rows no longer tell the two metrics apart"
    assert result["acc"] == pytest.approx(right["acc"] / 7)
    assert result["acc_norm"] == result["value"] == pytest.approx(share)
    assert result["stderr"] == pytest.approx((share * (1 - share) / 6) ** 0.5)
    assert (result["metric"], result["n"], result["limit"], result["truncated"]) == ("acc_norm", 7, 7, 0)


@pytest.mark.slow
def test_model_trained_on_the_answers_gets_them_all(model, tokenizer, piqa):
    import torch

    texts = [f"Question: {row['goal']}\nAnswer: {row[('sol1', 'sol2')[row['label']]]}" for row in PIQA]
    ids = [torch.tensor([tokenizer.encode(text)]) for text in texts]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        for text in ids:
            model(text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert zero_shot(model, tokenizer, piqa)["value"] == 1.0


def greedily(model, tokenizer, context: str, length: int) -> list[int]:
    """The next tokens, each the likeliest."""
    import torch

    ids = tokenizer.encode(context)
    for _ in range(length):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-length:]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4])
def test_single_answer_is_correct_when_greedy_decoding_gives_it(model, tokenizer, tmp_path, batch_size):
    """Trained on half of the texts, a model ends these and few of the others."""
    import torch

    texts = [f"To {verb} the {noun} the man put it on the {end}" for verb, noun, end in ENDINGS]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        for text in texts[::2]:
            ids = torch.tensor([tokenizer.encode(text)])
            model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    right, likelihoods = [], []
    for text in texts:
        context, _, last = text.rpartition(" ")
        target = tokenizer.encode(text)[len(tokenizer.encode(context)) :]
        right.append(greedily(model, tokenizer, context, len(target)) == target)
        likelihoods.append(likelihood(model, tokenizer, context, f" {last}"))
        assert len(target) > 1 or last == "shelf"
    assert any(right) and not all(right)
    folder = local_task(tmp_path, "lambada_openai", [{"text": text} for text in texts])
    result = zero_shot(model, tokenizer, folder, batch_size=batch_size)
    share = sum(right) / len(texts)
    assert result["value"] == result["acc"] == pytest.approx(share) and result["metric"] == "acc"
    assert result["stderr"] == pytest.approx((share * (1 - share) / (len(texts) - 1)) ** 0.5)
    assert result["perplexity"] == pytest.approx(math.exp(-sum(likelihoods) / len(texts)), rel=1e-4)
    assert (result["output_type"], result["perplexity_status"], result["n"]) == ("loglikelihood", "finite", 6)


def test_an_overflown_perplexity_of_answers_is_none_with_a_status(model, tokenizer, tmp_path):
    import torch

    with torch.no_grad():
        model.lm_head.weight *= 1e4
    result = zero_shot(model, tokenizer, local_task(tmp_path, "lambada_openai", LAMBADA))
    assert result["perplexity"] is None and result["perplexity_status"] == "inf"
    json.dumps(result, allow_nan=False)


def test_task_without_acc_norm_reports_acc(model, tokenizer, tmp_path):
    result = zero_shot(model, tokenizer, local_task(tmp_path, "winogrande", WINOGRANDE))
    assert result["metric"] == "acc" and result["value"] == result["acc"]
    assert result["acc_norm"] is result["acc_norm_stderr"] is None
    assert result["stderr"] is None  # one row has no spread
    json.dumps(result, allow_nan=False)


def test_zero_shot_changes_no_file_generator_or_setting(model, tokenizer, piqa, tmp_path, monkeypatch, caplog):
    import datasets
    import torch

    def refuse(*args):
        raise AssertionError(f"network: {args}")

    for name in ("HOME", "TMPDIR", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    model.train()
    files, drawn = sorted(piqa.rglob("*")), torch.get_rng_state()
    level, bars = logging.getLogger("lm_eval").level, datasets.are_progress_bars_disabled()
    zero_shot(model, tokenizer, piqa, limit=2)
    assert sorted(piqa.rglob("*")) == files
    assert torch.equal(torch.get_rng_state(), drawn)
    assert list(tmp_path.iterdir()) == [] and not caplog.records
    assert model.training and tokenizer.pad_token is None
    assert logging.getLogger("lm_eval").level == level and datasets.are_progress_bars_disabled() == bars


def test_long_prompts_are_counted_and_long_answers_refused(model, tokenizer, piqa):
    lengths = [
        len(tokenizer.encode(f"Question: {row['goal']}\nAnswer: {row[sol]}"))
        for row in PIQA
        for sol in ("sol1", "sol2")
    ]
    room = sorted(lengths)[len(lengths) // 2]
    result = zero_shot(model, tokenizer, piqa, max_length=room)
    assert result["truncated"] == sum(length > room + 1 for length in lengths) > 0
    with pytest.raises(ObrError, match="raise max_length"):
        zero_shot(model, tokenizer, piqa, max_length=2)


def test_broken_models_and_data_are_refused(model, tokenizer, piqa, tmp_path):
    import torch

    with pytest.raises(ObrError, match="limit 0"):
        zero_shot(model, tokenizer, piqa, limit=0)
    model.config.tie_word_embeddings = True
    with pytest.raises(ObrError, match="tie_word_embeddings"):
        zero_shot(model, tokenizer, piqa)
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ObrError, match=r"3 of 3 questions .* not a finite"):
        zero_shot(model, tokenizer, piqa, limit=3)

    changed = shutil.copytree(piqa, tmp_path / "changed")
    with (changed / "data.jsonl").open("a") as file:
        file.write(json.dumps(PIQA[0]) + "\n")
    with pytest.raises(ObrError, match="has changed"):
        zero_shot(model, tokenizer, changed)
    (changed / "task.json").unlink()
    with pytest.raises(ObrError, match=r"no task\.json"):
        zero_shot(model, tokenizer, changed)


@pytest.mark.slow
@pytest.mark.skipif("OBR_DATA" not in os.environ, reason="OBR_DATA names no folder with the real task sets")
@pytest.mark.parametrize(
    "task, file, n, first",
    [
        ("piqa", "piqa_validation", 1838, "Question: How do I ready a guinea pig cage"),
        ("arc_easy", "arc_easy_test", 2376, "Question: Which statement best explains why photosynthesis"),
        ("winogrande", "winogrande_xl_validation", 1267, "always got the easier cases."),
    ],
)
def test_real_task_sets_have_known_rows(task, file, n, first, model, tokenizer, tmp_path):
    download_task({"source": "path", "task": task, "file": f"$OBR_DATA/data/tasks/{file}.jsonl"}, tmp_path / task)
    loaded = load_task(tmp_path / task)
    assert len(loaded.eval_docs) == n and question(loaded, loaded.eval_docs[0])[0].startswith(first)
    result = zero_shot(model, tokenizer, tmp_path / task, limit=3, max_length=512)
    assert result["n"] == 3 and 0 <= result["value"] <= 1


def fewshot_task(tmp_path: Path, name: str, rows: list, shots: int = 2) -> Path:
    for file, part in (("rows", rows[:3]), ("examples", rows[3:])):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    source = {"source": "path", "task": name, "file": str(tmp_path / "rows.jsonl"), "num_fewshot": shots}
    download_task({**source, "examples": str(tmp_path / "examples.jsonl")}, tmp_path / name)
    return tmp_path / name


def test_prompts_with_examples_are_those_of_lm_eval(model, tokenizer, tmp_path, monkeypatch):
    """lm-eval reads the same folder by itself and builds its own prompts."""
    from lm_eval.tasks import TaskManager

    folder = fewshot_task(tmp_path, "piqa", PIQA)
    run = TaskRun(folder, model.config, tokenizer)
    monkeypatch.chdir(folder)
    task = TaskManager(include_path=str(folder), include_defaults=False).load(["piqa"])["tasks"]["piqa"]
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    prompts = [request for request, _, _ in run.requests]
    assert prompts == [instance.args for instance in task.instances]
    assert prompts[0][0].count("Question:") == 3
    result = zero_shot(model, tokenizer, folder)
    assert result["num_fewshot"] == 2 and result["n"] == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"examples": None}, "no file of examples: add `examples`"),
        ({"num_fewshot": 6}, "has 5 examples, not 6: lower num_fewshot"),
        ({"examples": "gone.jsonl"}, "gone.jsonl of task piqa does not exist: correct `examples`"),
    ],
)
def test_examples_that_cannot_be_had_are_refused(changes, sentence, tmp_path):
    fewshot_task(tmp_path, "piqa", PIQA)
    source = json.loads((tmp_path / "piqa/task.json").read_text())["source"] | changes
    source = {key: value for key, value in source.items() if value is not None}
    with pytest.raises(ObrError, match=sentence):
        download_task(source, tmp_path / "again")


def test_changed_examples_are_refused(tmp_path):
    folder = fewshot_task(tmp_path, "piqa", PIQA)
    (folder / "examples.jsonl").write_text((folder / "examples.jsonl").read_text().replace("coat", "hat"))
    with pytest.raises(ObrError, match=r"examples\.jsonl has changed"):
        read_task(folder)
