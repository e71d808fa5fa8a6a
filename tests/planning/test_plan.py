"""Plans: the jobs are Snakemake's, the times come near those of finished runs, and what was timed corrects them."""

import csv
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import save_file

from helpers.paths import FIXTURES, ROOT
from helpers.workflow_runs import CONFIG, snakemake
from obr.config import paths
from obr.config.config_files import load_config
from obr.config.recipe import Option, Recipe
from obr.errors import ObrError
from obr.planning import cost_model, learning_cost, measured_times, memory, tensor_sizes
from obr.planning.dry_run import Job, pending
from obr.planning.plan import overrides_of, plan_of, summary
from obr.planning.prices import TIMED, Prices
from obr.planning.schedule import peak_disk, schedule
from obr.runtime.files import write_json

DEMO = ROOT / "config" / "experiments" / "demo.yaml"
SNAKEFILE = ROOT / "Snakefile"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[dict, list[Job]]:
    """The demo's configuration and jobs, from nothing."""
    results = tmp_path_factory.mktemp("demo") / "results"
    return pending(SNAKEFILE, [DEMO], {"results": str(results)}, [], 2)


def timed(name: str) -> dict[str, float]:
    """Seconds of the jobs of a finished run, by rule and names, on an AMD EPYC server."""
    with open(FIXTURES / f"{name}_timings.csv", encoding="utf-8", newline="") as file:
        return {row["job"]: float(row["seconds"]) for row in csv.DictReader(file)}


def name(job: Job) -> str:
    order = {"hessian": "model rotation calibration", "download_rotation": "rotation model"}
    order |= {
        "calibrate": "calibration model",
        "generate": "calibration model",
        "mix": "calibration model",
        "kernels": "device",
    }
    order |= {"gradients": order["hessian"], "sensitivity": f"{order['hessian']} options"}
    keys = order.get(job.rule, "model recipe activations text task table figure").split()
    return "/".join([job.rule, *(job.wildcards[k] for k in keys if k in job.wildcards)])


@pytest.mark.workflow
def test_the_jobs_are_those_of_a_dry_run(demo, tmp_path):
    config, jobs = demo
    assert config["threads"]["compress"] == 1 and config["device"] == "cpu"
    raw = {**yaml.safe_load(DEMO.read_text()), "results": str(tmp_path / "none")}
    listed = snakemake(tmp_path, raw, "--dry-run").stdout
    counts = {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", listed, re.M) if rule not in ("all", "total")}
    mine: dict[str, int] = defaultdict(int)
    for job in jobs:
        mine[job.rule] += 1
    assert mine == counts
    table = next(job for job in jobs if job.rule == "table")
    assert {jobs[n].rule for n in table.after} >= {"evaluate", "compress"}


@pytest.mark.workflow
def test_plan_of_one_target_prices_its_jobs_only(tmp_path):
    _, jobs = pending(SNAKEFILE, [DEMO], {"results": str(tmp_path)}, [f"{tmp_path}/tables/demo.csv"], 2)
    assert {"compress", "table"} <= {job.rule for job in jobs} and "figure" not in {job.rule for job in jobs}


def compare(config: dict, jobs: list[Job], seconds: dict[str, float]) -> dict[str, float]:
    """Planned over measured seconds, of every stage and of all. Evaluations that are not timed are left out."""
    prices, planned, measured = Prices(config), defaultdict(float), defaultdict(float)
    for job in jobs:
        if job.rule == "evaluate" and name(job) not in seconds:
            continue
        for key in (job.rule, "all"):
            planned[key] += prices.price(job).seconds
            measured[key] += seconds[name(job)]
    return {key: planned[key] / measured[key] for key in planned}


@pytest.mark.workflow
def test_demo_prices_are_near_measured_times(demo):
    """From counted work alone, every long stage and the whole within a factor of 1.5."""
    ratios = compare(*demo, timed("demo"))
    for rule in ("compress", "evaluate", "hessian", "all"):
        assert 1 / 1.5 < ratios[rule] < 1.5, (rule, ratios)


@pytest.mark.workflow
def test_tiny_workflow_prices_are_near_measured_times(tiny_folder, tmp_path):
    """Its jobs do little but start; timed one by one on one core."""
    results = {"results": str(tmp_path / "results")}
    ratios = compare(*pending(SNAKEFILE, [ROOT / "tests" / "config.yaml"], results, [], 1), timed("tiny"))
    for rule in ("compress", "evaluate", "hessian", "all"):
        assert 1 / 1.5 < ratios[rule] < 1.5, (rule, ratios)


@pytest.mark.workflow
def test_a_plan_of_the_demo_reads_well(demo):
    config, _ = demo
    plan = plan_of(SNAKEFILE, [DEMO], {"results": config["results"]}, [], 2, 1)
    assert plan.jobs == 35 and 10 * 60 < plan.wall < 33 * 60 and not plan.gated and plan.gpu == 0
    assert 0.08 < plan.fetched < 0.3 and plan.disk < 4 and 1 < plan.host < 4
    text = summary(plan)
    assert "35 jobs, about" in text and "on 2 cores" in text and "a server's core" in text


@pytest.mark.workflow
def test_the_paper_is_priced_with_its_licences(tmp_path):
    everything = {"results": str(tmp_path), "experiments": ["paper", "ostquant"]}
    plan = plan_of(SNAKEFILE, [], everything, [], 16, 1, gpu_memory=24)
    assert all(sums["gpu"] < 24 for sums in plan.by_rule.values()) and plan.gpu > 16
    assert plan.jobs > 500 and plan.fetched > 400 and "meta-llama/Llama-2-7b-hf" in plan.gated
    assert len(plan.checked) == 15 and all(row["planned"] < row["published"] for row in plan.checked)
    assert "Gated" in summary(plan) and "Every job fits into a GPU of 24 GB." in summary(plan)
    assert plan.disk < plan.disk_peak and "GB in the end" in summary(plan)
    few = plan_of(SNAKEFILE, [], everything | {"only_models": ["llama-2-7b"]}, [], 16, 1, gpu_memory=1.0)
    listed = [line for line in summary(few).splitlines() if line.startswith("  ") and line.endswith(" GB")]
    assert listed == [f"  {name}" for name in few.too_large] and len(listed) > 10
    assert f"{len(listed)} jobs of {few.jobs} exceed a GPU of 1 GB:" in summary(few)
    assert all("llama-2-7b" in name and float(name.split()[-2]) > 1 for name in few.too_large)
    assert few.busy < plan.busy / 2 and set(few.by_model) == {"llama-2-7b"}


def test_the_sizes_of_every_task_of_the_paper_are_known():
    tasks = yaml.safe_load((ROOT / "config/datasets.yaml").read_text())["zero_shot"]
    assert {entry["source"]["task"] for entry in tasks.values() if entry["source"]["source"] == "hub"} <= set(
        cost_model.TASKS
    )
    sizes = tensor_sizes.Sizes.estimate(7.0)
    one, two = (cost_model.zero_shot(sizes, task, 100, 2048).products for task in ("lambada_openai", "winogrande"))
    assert one / two == pytest.approx(90 / 29, rel=0.02)


def test_the_memory_of_zero_shot_evaluation_does_not_grow_with_depth():
    sizes = tensor_sizes.Sizes.estimate(70.0)
    for on_gpu in (False, True):
        deep, shallow = (
            memory.memory("evaluate", replace(sizes, blocks=blocks), 10**6, 2048, on_gpu) for blocks in (80, 2)
        )
        assert deep == shallow and deep[1] < 24
    assert deep[1] > 1e-9 * 2 * (sizes.block + sizes.ends)  # a block and the ends at 16 bits


def fabricated(results: Path, seconds: float) -> None:
    """One timed perplexity of a small model."""
    (results / "models/m").mkdir(parents=True)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    (results / "models/m/config.json").write_text(json.dumps({**sizes, "vocab_size": 500}))
    (results / "evaluations/m/r").mkdir(parents=True)
    scores = {"perplexity": {"t": {"tokens": 4096, "seqlen": 1024}}, "zero_shot": {}}
    about = {"device": "cpu", "computed": ["perplexity.t"], **scores}
    (results / "evaluations/m/r/a16.json").write_text(json.dumps(about))
    (results / "benchmarks/evaluate/m/r").mkdir(parents=True)
    (results / "benchmarks/evaluate/m/r/a16.tsv").write_text(f"s\tmax_rss\n{seconds}\t800\n")


@pytest.mark.workflow
def test_timings_of_finished_jobs_correct_the_prices(tmp_path, demo):
    config, jobs = demo
    job = next(job for job in jobs if job.rule == "evaluate")
    fabricated(tmp_path, 100.0)
    known = measured_times.found_under(tmp_path)
    assert [t.stage for t in known] == ["evaluate"] and known[0].memory == 0.8
    factor = measured_times.factors(known, "cpu", {})["evaluate"]
    assert factor == pytest.approx(100 / known[0].work.seconds(cost_model.SPEEDS["cpu"]))
    assert Prices(config, known=known).price(job).seconds > 3 * Prices(config).price(job).seconds
    assert measured_times.factors(known, "cuda", {}) == {}


def test_timings_of_every_timed_stage_have_the_work_that_its_price_counts(tmp_path):
    fabricated(tmp_path, 1.0)
    names = {"model": "m", "rotation": "none", "calibration": "c", "options": "o", "recipe": "r"}
    read = {"tokens": 4096, "seqlen": 1024}
    option, recipe = {"method": "gptq", "bits": 3}, {"method": "gptq", "bits": 3, "calibration": "c"}
    artefacts = {
        "manifest": {"recipe": recipe, "calibration": read, "device": "cpu"},
        "hessians": {"calibration": read, "device": "cpu"},
        "sensitivity": {"device": "cpu", "options": [option], "layers": [{"block": 0}, {"block": 0}]},
    }
    for artefact, content in artefacts.items():
        write_json(content, paths.path(tmp_path, artefact, **names))
    paths.path(tmp_path, "gradients", **names).parent.mkdir(parents=True)
    notes = {"gradients": json.dumps({**read, "device": "cpu"})}
    save_file({}, paths.path(tmp_path, "gradients", **names), metadata=notes)
    for job in ("compress/m/r", "hessian/m/none/c", "gradients/m/none/c", "sensitivity/m/none/c/o"):
        file = tmp_path / f"benchmarks/{job}.tsv"
        file.parent.mkdir(parents=True)
        file.write_text("s\tmax_rss\n2.0\t800\n")
    sizes = tensor_sizes.sizes_in(tmp_path / "models/m")
    found = {timing.stage: timing.work for timing in measured_times.found_under(tmp_path)}
    assert found.pop("evaluate") == cost_model.evaluation(sizes, [(4096, 1024)], [])
    assert found == {
        "compress gptq": cost_model.compress(sizes, Recipe.parse(recipe), 4096, 1024),
        "gradients": cost_model.gradients(sizes, 4096, 1024),
        "hessian": cost_model.hessian(sizes, 4096, 1024),
        "sensitivity": cost_model.sensitivity(replace(sizes, blocks=1), [Option.parse(option, "option")]),
    }


def test_timings_whose_artefact_is_gone_are_passed_over(tmp_path):
    fabricated(tmp_path, 1.0)
    shutil.rmtree(tmp_path / "evaluations")
    assert measured_times.found_under(tmp_path) == []


def test_the_schedule_waits_for_inputs_cores_and_gpus():
    jobs = [Job("a", {}, 1, ()), Job("a", {}, 1, ()), Job("b", {}, 2, (), (0, 1)), Job("c", {}, 1, (), (0,))]
    times = [4.0, 2.0, 3.0, 1.0]
    assert schedule(jobs, times, [False] * 4, 2, 1) == 8.0  # 4, then 3 on both cores, then 1 (or 1 first)
    assert schedule(jobs[:2], times[:2], [True, True], 2, 1) == 6.0
    assert schedule(jobs[:2], times[:2], [True, True], 2, 2) == 4.0


def test_the_disk_is_fullest_where_outputs_and_scratch_lie_together():
    jobs = [Job("a", {}, 1, ()), Job("b", {}, 1, (), (0,)), Job("c", {}, 1, (), (1,)), Job("d", {}, 1, (), (2,))]
    when, kept = [(0, 1), (1, 2), (2, 3), (3, 4)], [5.0, 2.0, 1.0, 1.0]
    assert peak_disk(jobs, when, kept, [0.0] * 4) == 9.0  # all of it, in the end
    assert peak_disk(jobs, when, kept, [0.0, 4.0, 0.0, 0.0]) == 11.0  # while the second runs
    jobs[0], jobs[1] = replace(jobs[0], temporary=True), replace(jobs[1], holds=(0,))
    assert peak_disk(jobs, when, kept, [0.0] * 4) == 7.0  # what the second has read is gone before the third begins


def test_dense_checkpoints_refer_to_the_model():
    sizes = tensor_sizes.Sizes.estimate(7.0)
    plain, rotated = (Recipe.parse({"method": "dense", "rotation": rotation}) for rotation in ("none", "quarot"))
    assert cost_model.checkpoint_bytes(sizes, plain) == 2 * sizes.ends
    assert cost_model.checkpoint_bytes(sizes, rotated) >= 2 * sizes.block * sizes.blocks


def test_operation_counts_scale_with_sizes():
    small, large = tensor_sizes.Sizes.estimate(1), tensor_sizes.Sizes.estimate(8)
    assert 6 < large.block * large.blocks / (small.block * small.blocks) < 10
    assert tensor_sizes.Sizes.estimate(6.7).hidden == pytest.approx(4096, rel=0.05)
    work = [cost_model.zero_shot(small, "piqa", None, tokens).runs for tokens in (256, 2048)]
    assert work[0] == 8 * work[1]


def test_learning_is_priced_by_its_settings():
    sizes = tensor_sizes.Sizes(576, 1536, 576, 192, 30, 49152)
    flat = learning_cost.learning(sizes, "flatquant", {"epochs": 4, "batch": 2, "held_out": 2}, 16, 512)
    assert 654 / 1.5 < flat.seconds(cost_model.SPEEDS["cpu"]) < 654 * 1.5  # as measured on one core
    spin = {"steps": 30, "batch": 4, "held_out": 8}
    osts = learning_cost.learning(sizes, "ostquant", {"steps": 100, "batch": 1, "held_out": 8}, 136, 512)
    assert 1677 / 1.5 < osts.seconds(cost_model.SPEEDS["cpu"]) < 1677 * 1.5
    twice = learning_cost.learning(sizes, "spinquant", {**spin, "steps": 60}, 136, 512)
    assert twice.products > 1.8 * learning_cost.learning(sizes, "spinquant", spin, 136, 512).products
    for kind, batch, measured in (("spinquant", 4, 1.02), ("ostquant", 2, 1.22)):  # of so many windows of 256 tokens
        learn = {"batch": batch, "quantise": {"bits": 4}}
        assert learning_cost.memory(sizes, kind, learn, 20, 256, False)[0] == pytest.approx(measured, rel=0.5)


def test_the_memory_of_learning_is_one_blocks_whatever_the_depth():
    sizes = tensor_sizes.Sizes.estimate(30.0)
    for kind in ("spinquant", "ostquant"):
        for learn in ({"quantise": {"bits": 4}, "micro_batch": 4}, {"batch": 32, "quantise": {"activations": {}}}):
            deep, shallow = (
                learning_cost.memory(replace(sizes, blocks=n), kind, learn, 804, 2048, True)[1] for n in (60, 2)
            )
            assert deep == shallow < 24 and deep > 8e-9 * sizes.block
    deep, shallow = (
        learning_cost.memory(replace(sizes, blocks=n), "spinquant", {}, 804, 2048, True)[0] for n in (60, 2)
    )
    assert deep - shallow < 4  # what enters the blocks, beyond the room for it, lies in files


def test_every_step_of_learning_reads_the_blocks_twice():
    sizes = tensor_sizes.Sizes(576, 1536, 576, 192, 30, 49152)
    few, many = (
        learning_cost.learning(sizes, "spinquant", {"steps": n, "every": 10}, 136, 512).loads for n in (10, 20)
    )
    assert many - few == (2 * 10 + 1) * 2.0 * sizes.block * sizes.blocks


def test_rounding_weights_while_learning_costs_more_once_a_step():
    sizes, learn = tensor_sizes.Sizes(576, 1536, 576, 192, 30, 49152), {"steps": 100, "batch": 8}
    for kind in ("spinquant", "ostquant"):
        plain = learning_cost.learning(sizes, kind, learn, 136, 512)
        rounded = learning_cost.learning(sizes, kind, {**learn, "quantise": {"bits": 4}}, 136, 512)
        parts = learning_cost.learning(sizes, kind, {**learn, "quantise": {"bits": 4}, "micro_batch": 2}, 136, 512)
        assert plain.elements < rounded.elements == parts.elements and rounded.products == parts.products
        assert parts.runs > rounded.runs


def test_rules_of_the_workflow_have_a_cost_and_others_are_refused():
    rules = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "workflow/rules").glob("*.smk"))
    known = {*TIMED, *cost_model.CONSTANT, "kernels", "released"}
    assert set(re.findall(r"^rule (\w+):", rules, re.M)) == known
    with pytest.raises(ObrError, match="no cost for the rule 'polish'"):
        Prices(load_config().raw).price(Job("polish", {}, 1, ()))


def test_price_falls_with_number_of_blocks():
    sizes = tensor_sizes.Sizes(576, 1536, 576, 192, 30, 49152)
    whole = Recipe.parse({"method": "obr_gptq", "calibration": "c"})
    part = Recipe.parse({"method": "obr_gptq", "calibration": "c", "blocks": "0:6"})
    all_blocks, six = (cost_model.compress(sizes, recipe, 8192, 512) for recipe in (whole, part))
    assert six.exact == pytest.approx(all_blocks.exact / 5) and six.products == pytest.approx(all_blocks.products / 5)
    end = Recipe.parse({"method": "obr_gptq", "calibration": "c", "blocks": "29:30"})
    last = cost_model.compress(sizes, end, 8192, 512)
    assert six.products < last.products < all_blocks.products  # 29 blocks are passed once


def test_asymmetric_calibration_costs_more():
    sizes = tensor_sizes.Sizes(576, 1536, 576, 192, 30, 49152)
    plain, aimed = (Recipe.parse({"method": "joint", "calibration": "c", "asymmetry": a}) for a in (0.0, 0.5))
    blind, both = (cost_model.compress(sizes, recipe, 8192, 512) for recipe in (plain, aimed))
    assert both.products == 2 * blind.products and both.grams == 2 * blind.grams and both.exact > blind.exact
    states = 4e-9 * 8192 * 576
    more = (
        memory.memory("compress", sizes, 8192, 512, False, aimed)[0]
        - memory.memory("compress", sizes, 8192, 512, False, plain)[0]
    )
    assert states < more < states + 0.05


@pytest.mark.workflow
def test_invalid_plan_options_raise_one_sentence(tmp_path):
    with pytest.raises(ObrError, match=r"There is no .*; run this in the folder of the workflow"):
        pending(tmp_path / "Snakefile", [], {}, [], 1)
    with pytest.raises(ObrError, match="quick is not of the form KEY=VALUE"):
        overrides_of(["quick"])
    assert overrides_of(["only_models=[a,b]", "quick=true"]) == {"only_models": ["a", "b"], "quick": True}
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump({**CONFIG, "nonsense": 1}))
    command = [sys.executable, "-m", "obr", "plan", "--snakefile", str(SNAKEFILE), "--configfile", str(bad)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "nonsense" in run.stderr and "Traceback" not in run.stderr
