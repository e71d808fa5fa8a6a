"""One evaluation of all texts and tasks: the scores of separate stages, kept by name, resumed at a block."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, processors

from helpers.paths import ROOT
from helpers.small_tokenizers import BOOLQ
from helpers.zero_shot_tasks import PIQA, local_task
from obr.checkpoints.format import CheckpointBlocks
from obr.cli.main import main
from obr.compression.stage import compress_stage
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.evaluation import block_pass, resume_point, stage
from obr.evaluation.stage import Wanted, evaluate_stage
from obr.models.hidden_states import MemoryBudget
from obr.runtime.files import sha256_of

TEXT = {"seqlen": 64, "tokens": 1024}


@pytest.fixture(scope="module")
def checkpoint(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated") / "c"
    recipe = Recipe.parse({"method": "rtn", "calibration": "c", "activations": {"bits": 8}})
    compress_stage(tiny_folder / "model", recipe, out, device="cpu")
    return out


@pytest.fixture
def wanted(tiny_folder, tmp_path):
    return [
        Wanted("perplexity", "heldout", tiny_folder / "heldout.txt", TEXT),
        Wanted("zero_shot", "piqa", local_task(tmp_path, "piqa", PIQA), {"limit": 3}),
        Wanted("zero_shot", "boolq", local_task(tmp_path, "boolq", BOOLQ), {"bos": False, "batch_tokens": 100}),
    ]


def scores(found: dict) -> dict:
    """The scores without their keys and times."""
    left_out = ("key", "seconds", "tokens_computed")
    return {
        f"{kind}.{name}": {key: value for key, value in score.items() if key not in left_out}
        for kind in stage.KINDS
        for name, score in found[kind].items()
    }


@pytest.fixture
def computed(monkeypatch):
    """The number of texts and tasks of every pass over the blocks."""
    counts, real = [], stage.run
    monkeypatch.setattr(
        stage, "run", lambda blocks, parts, *rest: counts.append(len(parts)) or real(blocks, parts, *rest)
    )
    return counts


def test_single_pass_gives_scores_of_separate_stages(checkpoint, wanted, tmp_path, monkeypatch):
    loaded, load = [], CheckpointBlocks.load
    monkeypatch.setattr(CheckpointBlocks, "load", lambda self, index: loaded.append(index) or load(self, index))
    found = scores(evaluate_stage(checkpoint, wanted, tmp_path / "s.json", device="cpu"))
    assert loaded == [0, 1]
    for number, one in enumerate(wanted):
        alone = evaluate_stage(checkpoint, [one], tmp_path / f"{number}.json", device="cpu")
        assert found[one.label] == scores(alone)[one.label]


def test_hidden_states_in_a_file_give_the_same_scores(checkpoint, wanted, tmp_path):
    found = [
        scores(evaluate_stage(checkpoint, wanted, tmp_path / name, device="cpu", room=room))
        for name, room in (("memory.json", None), ("file.json", MemoryBudget(1e-3, tmp_path)))
    ]
    assert found[0] == found[1]


def test_only_missing_scores_are_computed(checkpoint, wanted, tmp_path, computed):
    out = tmp_path / "s.json"
    evaluate_stage(checkpoint, wanted[:1], out, device="cpu")
    first = json.loads(out.read_text())["perplexity"]
    assert set(scores(evaluate_stage(checkpoint, wanted[1:], out, device="cpu"))) == {w.label for w in wanted}
    assert computed == [1, 2] and json.loads(out.read_text())["perplexity"] == first
    before = json.loads(out.read_text())
    again = evaluate_stage(checkpoint, wanted, out, device="cpu")
    assert computed == [1, 2] and again["computed"] == [] and before["computed"] == [w.label for w in wanted[1:]]
    assert {**before, "computed": []} == json.loads(out.read_text())


def test_a_changed_text_setting_or_code_is_evaluated_again(checkpoint, wanted, tmp_path, computed):
    out, text = tmp_path / "s.json", tmp_path / "text.txt"
    text.write_text(wanted[0].source.read_text())
    wanted[0] = Wanted("perplexity", "heldout", text, TEXT)
    evaluate_stage(checkpoint, wanted, out, device="cpu")
    text.write_text(text.read_text() + " The end of it.")
    evaluate_stage(checkpoint, wanted, out, device="cpu")
    wanted[1] = Wanted("zero_shot", "piqa", wanted[1].source, {"limit": 2})
    assert evaluate_stage(checkpoint, wanted, out, device="cpu")["zero_shot"]["piqa"]["n"] == 2
    evaluate_stage(checkpoint, wanted, out, device="cpu", code="another")
    assert computed == [3, 1, 1, 3]


def test_scores_of_another_checkpoint_or_setting_are_not_kept(checkpoint, tiny_folder, wanted, tmp_path, computed):
    out, other = tmp_path / "s.json", tmp_path / "other"
    recipe = Recipe.parse({"method": "rtn", "bits": 3, "calibration": "c"})
    compress_stage(tiny_folder / "model", recipe, other, device="cpu")
    first = evaluate_stage(checkpoint, wanted[:1], out, device="cpu")["perplexity"]["heldout"]["value"]
    found = evaluate_stage(other, wanted[1:2], out, device="cpu")
    assert not found["perplexity"]
    plain = Recipe.parse({"method": "rtn", "calibration": "c"})
    second = evaluate_stage(checkpoint, wanted[:1], out, recipe=plain, device="cpu")
    assert second["perplexity"]["heldout"]["value"] != first and not second["zero_shot"]
    assert computed == [1, 1, 1]


@pytest.mark.slow
def test_a_checkpoint_that_is_made_again_keeps_its_scores(checkpoint, tiny_folder, wanted, tmp_path, computed):
    """Its manifest has other times; with another seed or scheme its scores would be replaced, with a notice."""
    out, again = tmp_path / "s.json", tmp_path / "again"
    first = evaluate_stage(checkpoint, wanted[:1], out, device="cpu")
    recipe = json.loads((checkpoint / "manifest.json").read_text())["recipe"]
    compress_stage(tiny_folder / "model", Recipe.parse(recipe), again, device="cpu")
    manifest = json.loads((again / "manifest.json").read_text())
    (again / "manifest.json").write_text(json.dumps(manifest | {"seconds": 99.0}))
    found = evaluate_stage(again, wanted, out, device="cpu")
    assert found["perplexity"] == first["perplexity"] and computed == [1, 2]


def test_replaced_scores_are_announced(checkpoint, wanted, tmp_path, capsys):
    out = tmp_path / "s.json"
    evaluate_stage(checkpoint, wanted[:1], out, device="cpu")
    assert "replaced" not in capsys.readouterr().err
    plain = Recipe.parse({"method": "rtn", "calibration": "c"})
    evaluate_stage(checkpoint, wanted[:1], out, recipe=plain, device="cpu")
    assert "holds scores of another checkpoint or setting, which are replaced" in capsys.readouterr().err


def test_a_model_as_it_came_is_evaluated(tiny_folder, wanted, tmp_path):
    dense = tmp_path / "dense"
    compress_stage(tiny_folder / "model", Recipe.parse({"method": "dense"}), dense, device="cpu")
    plain = evaluate_stage(tiny_folder / "model", wanted, tmp_path / "a.json", device="cpu")
    assert plain["setting"] == "W16A16KV16" and plain["recipe"] is None
    assert scores(plain) == scores(evaluate_stage(dense, wanted, tmp_path / "b.json", device="cpu"))
    with pytest.raises(ObrError, match="no recipe applies"):
        evaluate_stage(
            tiny_folder / "model", wanted, tmp_path / "a.json", recipe=Recipe.parse({"method": "rtn"}), device="cpu"
        )


def test_scores_of_another_tokenizer_or_prompt_are_not_kept(tiny_folder, wanted, tmp_path, computed):
    model, out = tmp_path / "model", tmp_path / "s.json"
    shutil.copytree(tiny_folder / "model", model)
    text, task = Wanted("perplexity", "t", wanted[0].source, {**TEXT, "bos": None}), wanted[1]
    first = evaluate_stage(model, [text, task], out, device="cpu")["perplexity"]["t"]
    inner = Tokenizer.from_file(str(model / "tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    inner.save(str(model / "tokenizer.json"))
    second = evaluate_stage(model, [text, task], out, device="cpu")["perplexity"]["t"]
    assert second["value"] != first["value"] and "</s> once, before the text" in second["definition"]
    prompt, note = task.source / "task.yaml", task.source / "task.json"
    prompt.write_text(prompt.read_text().replace("Answer:", "Reply:"))
    note.write_text(json.dumps(json.loads(note.read_text()) | {"config_sha256": sha256_of(prompt)}))
    evaluate_stage(model, [text, task], out, device="cpu")
    assert computed == [2, 2, 1]


def test_a_file_of_rows_does_not_stand_in_for_a_task_with_examples(checkpoint, tmp_path, capsys):
    rows, config = tmp_path / "rows.jsonl", tmp_path / "config.yaml"
    rows.write_text("".join(json.dumps(row) + "\n" for row in PIQA))
    config.write_text("zero_shot: {five: {source: {source: hub, task: piqa, num_fewshot: 5}}}\n")
    command = ["evaluate", str(checkpoint), "--configfile", str(config), "--out", str(tmp_path / "s.json")]
    assert main([*command, "--task", "five", str(rows)]) == 1
    assert "has 5 examples in each prompt, which" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from obr.cli.main import main
from obr.evaluation import block_pass, resume_point
resume_point.SECONDS, resume_point.SHARE = 0, 0
real, calls = block_pass._replace, []
def replace(*arguments):
    real(*arguments)
    calls.append(None)
    if len(calls) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
block_pass._replace = replace
sys.exit(main(sys.argv[2:]))
"""


def evaluate_command(checkpoint: Path, wanted: list[Wanted], out: Path) -> list[str]:
    flags = {"perplexity": "--text", "zero_shot": "--task"}
    settings = [
        word
        for w in wanted
        for word in (flags[w.kind], w.name, str(w.source), *(f"{k}={json.dumps(v)}" for k, v in w.spec.items()))
    ]
    return ["evaluate", str(checkpoint), *settings, "--out", str(out), "--device", "cpu", "--threads", "1"]


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_at_its_block(checkpoint, wanted, tmp_path, monkeypatch, capsys):
    out, whole = tmp_path / "s.json", tmp_path / "whole.json"
    command = [sys.executable, "-c", KILLED, "2", *evaluate_command(checkpoint, wanted, out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "workflow")}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    states = out.with_name("s.json.states")
    assert states.exists() and not out.exists()
    loaded, load = [], CheckpointBlocks.load
    monkeypatch.setattr(CheckpointBlocks, "load", lambda self, index: loaded.append(index) or load(self, index))
    assert main(evaluate_command(checkpoint, wanted, out)) == 0
    assert loaded == [1] and not states.exists()
    assert "going on with an interrupted run" in capsys.readouterr().err
    assert main(evaluate_command(checkpoint, wanted, whole)) == 0
    assert scores(json.loads(out.read_text())) == scores(json.loads(whole.read_text()))


def test_states_of_another_evaluation_are_not_taken_over(checkpoint, wanted, tmp_path, monkeypatch):
    """The states that are left are those behind the first of two blocks, for one text."""
    monkeypatch.setattr(resume_point, "SECONDS", 0)
    out, states = tmp_path / "s.json", tmp_path / "s.json.states"
    monkeypatch.setattr(resume_point.ResumePoint, "drop", lambda self: None)
    right = scores(evaluate_stage(checkpoint, wanted[:1], out, device="cpu"))
    left = states.read_bytes()
    out.unlink()
    others = evaluate_stage(checkpoint, wanted[1:2], out, device="cpu")
    assert scores(others) == scores(evaluate_stage(checkpoint, wanted[1:2], tmp_path / "t.json", device="cpu"))
    out.unlink()
    states.write_bytes(left)
    loaded, load = [], CheckpointBlocks.load
    monkeypatch.setattr(CheckpointBlocks, "load", lambda self, index: loaded.append(index) or load(self, index))
    assert scores(evaluate_stage(checkpoint, wanted[:1], out, device="cpu")) == right and loaded == [1]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"{}\n" + b, lambda b: b"\xff" + b])
def test_damaged_states_are_refused_by_name(damage, checkpoint, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(resume_point, "SECONDS", 0)
    monkeypatch.setattr(resume_point.ResumePoint, "drop", lambda self: None)
    out, states = tmp_path / "s.json", tmp_path / "s.json.states"
    evaluate_stage(checkpoint, wanted[:1], out, device="cpu")
    out.unlink()
    states.write_bytes(damage(states.read_bytes()))
    with pytest.raises(ObrError, match=r"s\.json\.states.*cannot be read.*remove it"):
        evaluate_stage(checkpoint, wanted[:1], out, device="cpu")


def test_saving_states_takes_a_tenth_of_the_time_at_most(tmp_path, monkeypatch):
    now = [0.0]

    @contextlib.contextmanager
    def slow(path):
        yield path
        now[0] += 20

    monkeypatch.setattr(resume_point, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(resume_point, "atomic_write", slow)
    point, saved = resume_point.ResumePoint(tmp_path / "s.json.states", "key"), []
    for moment in (29, 31, 52 + 198, 52 + 200):  # not before 30 s, and not before ten times the 20 s are over
        now[0] = moment
        point.save([], moment)
        saved.append(json.loads(point.path.read_bytes())["blocks"] if point.path.exists() else None)
    assert saved == [None, 31, 31, 252]


def test_without_room_for_states_the_evaluation_ends_all_the_same(checkpoint, wanted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resume_point, "SECONDS", 0)

    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(resume_point, "atomic_write", full)
    assert evaluate_stage(checkpoint, wanted[:1], tmp_path / "s.json", device="cpu")["perplexity"]
    assert "cannot be saved" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_takes_files_and_names_of_a_config(checkpoint, tiny_folder, tmp_path, capsys):
    rows, config = tmp_path / "rows.jsonl", tmp_path / "config.yaml"
    rows.write_text("".join(json.dumps(row) + "\n" for row in PIQA))
    config.write_text(
        f"texts: {{held: {{source: path, path: {tiny_folder / 'heldout.txt'}}}}}\n"
        "perplexity: {short: {text: held, seqlen: 32, tokens: 320}}\n"
        f"zero_shot: {{questions: {{limit: 2, source: {{source: path, task: piqa, file: {rows}}}}}}}\n"
    )
    out = tmp_path / "s.json"
    command = ["evaluate", str(checkpoint), "--configfile", str(config), "--out", str(out), "--threads", "1"]
    command += ["--texts", "short", str(tiny_folder / "train.txt"), "--seqlen", "64", "--tasks", "questions"]
    assert main([*command, "--task", "piqa", str(rows), "limit=1"]) == 0
    found = json.loads(out.read_text())
    assert {name: s["seqlen"] for name, s in found["perplexity"].items()} == {"short": 64, "train": 64}
    assert {name: s["n"] for name, s in found["zero_shot"].items()} == {"questions": 2, "piqa": 1}
    printed = capsys.readouterr().out
    assert "short: perplexity" in printed and "questions: acc_norm" in printed


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "nothing to evaluate on; give --texts or --tasks"),
        (["--texts", "gone"], "text 'gone' is neither a file nor a name of the config"),
        (["--tasks", "gone"], "no task named 'gone'"),
        (["--tasks", "gsm8k"], "generate_until"),
        (["--text", "a"], "write --text NAME FILE"),
        (["--text", "a", "gone.txt"], "gone.txt does not exist"),
        (["--text", "a", "gone.txt", "windows=3"], "'windows=3' is no setting; the settings are seqlen, tokens, bos"),
        (["--task", "a", "gone", "limit=none"], "limit=none is not a whole number from 1 on"),
        (["--task", "a", "gone"], "gone has no"),
        (["--text", "a", "gone.txt", "seqlen=64", "seqlen=32"], "--text a: seqlen is given twice"),
        (["--texts", "gone", "--limit", "0"], "--limit is 0"),
    ],
)
def test_invalid_evaluation_requests_are_refused(options, sentence, checkpoint, tmp_path, capsys):
    assert main(["evaluate", str(checkpoint), "--out", str(tmp_path / "s.json"), *options]) == 1
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "s.json").exists()


def test_two_scores_of_one_name_are_refused(checkpoint, wanted, tmp_path):
    with pytest.raises(ObrError, match="same name"):
        evaluate_stage(checkpoint, [wanted[0], wanted[0]], tmp_path / "s.json", device="cpu")


def test_a_wrong_block_changes_the_scores(checkpoint, wanted, tmp_path, monkeypatch):
    """The comparison with separate stages sees a pass that gives a block another's states."""
    right = scores(evaluate_stage(checkpoint, wanted, tmp_path / "a.json", device="cpu"))
    real = block_pass.run_block
    monkeypatch.setattr(block_pass, "run_block", lambda block, states, call: real(block, states, call) + 0.1)
    assert scores(evaluate_stage(checkpoint, wanted, tmp_path / "b.json", device="cpu")) != right
