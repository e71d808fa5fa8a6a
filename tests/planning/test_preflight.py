"""What would stop a run is listed at once, by name and with its remedy, on made-up machines."""

import json
import os
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml
from huggingface_hub import errors

from helpers.paths import ROOT
from helpers.workflow_runs import snakemake
from obr.cli.main import main
from obr.errors import ObrError
from obr.planning import preflight as preflight_module
from obr.planning.dry_run import Job
from obr.planning.preflight import Machine, hub_access, preflight
from obr.planning.prices import Price

HUB = {"source": "hub", "repo": "owner/name", "revision": "main"}
CONFIG = {
    "results": "results",
    "device": "cpu",
    "models": {
        "a": {"source": HUB},
        "b": {"source": {**HUB, "repo": "owner/gated"}},
        "own": {"source": {"source": "path", "path": "gone/model"}},
    },
    "texts": {"wiki": {**HUB, "repo": "owner/text"}},
    "zero_shot": {"piqa": {"source": {"source": "path", "task": "piqa", "file": "$OBR_UNSET/piqa.jsonl"}}},
    "rotations": {
        "spinquant": {
            "kind": "file",
            "format": "spinquant",
            "source": {"source": "path", "path": "gone/{model}/R.bin"},
        }
    },
    "recipes": {"released": {"source": {"source": "path", "path": "gone/released"}}},
}


def job(rule: str, **wildcards: str) -> Job:
    return Job(rule, wildcards, 1, (f"{rule}-{'-'.join(wildcards.values())}",))


def machine(**changes) -> Machine:
    parts = {
        "gpus": [], "host": 24.0, "free": lambda folder: 100.0, "compiler": "g++", "access": lambda *_: None,
        "importable": lambda name: True,
    }  # fmt: skip
    return Machine(**{**parts, **changes})


def problems(jobs: list[Job], prices: list[Price] | None = None, config: dict = CONFIG, **changes) -> list[str]:
    gpu_memory = changes.pop("gpu_memory", None)
    prices = prices or [Price(1.0)] * len(jobs)
    return preflight(config, jobs, prices, machine(**changes), gpu_memory).problems


def test_the_memory_of_gpus_is_in_gb_of_nvidia_smis_mib(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho 'NVIDIA A100-SXM4-80GB, 81920'\necho 'NVIDIA H200, MIG, [N/A]'\n", encoding="utf-8"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert Machine.here(online=False).gpus == [("NVIDIA A100-SXM4-80GB", pytest.approx(85.9, abs=0.05))]


@pytest.mark.parametrize(("kind", "name"), [("model", "owner/name"), ("dataset", "datasets/owner/name")])
def test_a_gated_repository_that_cannot_be_asked_for_is_named_as_its_page_is(kind, name, monkeypatch):
    class Refused:
        def auth_check(self, repo, repo_type):
            assert (repo, repo_type) == ("owner/name", kind)
            raise errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(preflight_module.hub, "hub_info", lambda *_: SimpleNamespace(gated="manual"))
    monkeypatch.setattr(huggingface_hub, "HfApi", Refused)
    with pytest.raises(ObrError, match=f"^{name} cannot be fetched"):
        hub_access(kind, "owner/name", None)


def test_a_run_with_all_it_needs_has_no_problem():
    jobs = [
        job("download_model", model="a"),
        job("download_text", text="wiki"),
        job("compress", model="a", recipe="r"),
    ]
    found = preflight(CONFIG, jobs, [Price(1.0, 2.0, 0.0, 1.0)] * 3, machine())
    assert not found.problems and not found.notes and found.lines() == ["Nothing would stop the run."]


@pytest.mark.parametrize(
    ("config", "is_needed"),
    [
        ({"model_type": "olmo2"}, False),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, False),
        ({"model_type": "olmoe"}, True),
    ],
)
def test_rotation_files_are_not_missed_by_families_that_take_none(config, is_needed, tmp_path):
    """Whether the model is still to be copied from its folder, or is in the results already."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own/config.json").write_text(json.dumps(config), encoding="utf-8")
    models = {"own": {"source": {"source": "path", "path": str(tmp_path / "own")}}, "a": {"source": HUB}}
    copied = tmp_path / "results/models/a"
    copied.mkdir(parents=True)
    (copied / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for model in models:
        jobs = [job("download_rotation", rotation="spinquant", model=model)]
        settings = {**CONFIG, "models": models, "results": str(tmp_path / "results")}
        assert bool(problems(jobs, config=settings)) == is_needed


def test_missing_local_files_are_listed_together():
    jobs = [
        job("download_model", model="own"),
        job("download_task", task="piqa"),
        job("download_rotation", rotation="spinquant", model="a"),
        job("download_rotation", rotation="spinquant", model="b"),
        job("download_released", model="a", recipe="released"),
    ]
    found = problems(jobs)
    assert [sentence.partition(":")[0] for sentence in found] == [
        "models.own", "zero_shot.piqa", "rotations.spinquant for a, b", "recipes.released",
    ]  # fmt: skip
    assert "OBR_UNSET, which is not set: export it" in found[1]
    assert "gone/{model}/R.bin does not exist" in found[2] and "fetch it by hand" in found[2]


def test_repositories_are_asked_once_and_refusals_named():
    asked = []

    def access(kind, repo, revision):
        asked.append((kind, repo))
        if repo == "owner/gated":
            raise ObrError("owner/gated is gated on the hub: accept its licence.")

    jobs = [job("download_model", model="a"), job("download_model", model="b"), job("download_text", text="wiki")]
    found = problems([*jobs, *jobs], access=access)
    assert asked == [("model", "owner/name"), ("model", "owner/gated"), ("dataset", "owner/text")]
    assert found == ["models.b: owner/gated is gated on the hub: accept its licence."]


def test_an_unreachable_hub_is_asked_once_and_told_once():
    asked = []

    def access(kind, repo, revision):
        asked.append(repo)
        raise ObrError("owner/name cannot be fetched because the hub cannot be reached: try again.")

    jobs = [job("download_model", model="a"), job("download_model", model="b"), job("download_text", text="wiki")]
    found = problems(jobs, access=access)
    assert len(asked) == 1 and len(found) == 1 and found[0].startswith("3 downloads of the hub cannot start")


def test_jobs_that_do_not_fit_are_named():
    jobs = [job("compress", model="a", recipe="r"), job("compress", model="b", recipe="r")]
    prices = [Price(1.0, 4.0, 20.0), Price(1.0, 30.0, 40.0)]
    (host,) = problems(jobs, prices)
    assert host.startswith("1 job of compress of b needs up to 30.0 GB of this machine, which has 23.0")
    on_gpu = {**CONFIG, "device": "cuda"}
    gpu, _ = problems(jobs, prices, on_gpu, gpus=[("A100", 80.0), ("small", 24.0)])
    assert gpu.startswith("1 job of compress of b needs up to 40.0 GB of a GPU, which has 24.0")
    assert len(problems(jobs, prices, on_gpu, gpu_memory=16.0)) == 3
    assert problems(jobs[:1], prices[:1], on_gpu)[0].startswith("device is 'cuda' but no NVIDIA GPU is visible")


def test_disk_packages_and_compiler_are_checked():
    jobs = [job("compress", model="a", recipe="r"), job("figure", figure="f"), job("learn_rotation", model="a")]
    prices = [Price(1.0, 1.0, 0.0, 60.0), Price(1.0, 1.0, 0.0, 50.0), Price(1.0)]
    found = preflight(CONFIG, jobs, prices, machine(importable=lambda n: n != "geoopt", compiler=None))
    package, disk = found.problems
    assert package == "Package geoopt cannot be imported; pip install 'obr[learn]' installs it."
    assert disk.startswith("The run takes 110.0 GB of results at its peak and 100.0 GB are free")
    assert "No C++ compiler" in found.notes[0]
    assert found.lines()[-1] == "2 problems would stop the run."


@pytest.mark.workflow
@pytest.mark.parametrize(("wrong", "status"), [(False, 0), (True, 1)])
def test_the_command_checks_a_configuration(wrong, status, tiny_folder, tmp_path, capsys):
    config = {
        "experiments": [],
        "results": str(tmp_path / "results"),
        "device": "cpu",
        "models": {"tiny": {"source": {"source": "path", "path": str(tiny_folder / "model")}}},
        "texts": {"held": {"source": "path", "path": str(tiny_folder / "heldout.txt")}},
        "perplexity": {"held": {"text": "held", "seqlen": 64}},
        "recipes": {"dense": {"method": "dense"}},
        "tables": {"t": {"title": "T", "models": ["tiny"], "rows": ["dense"], "perplexity": ["held"]}},
    }
    if wrong:
        rotation = {"kind": "file", "source": {"source": "path", "path": "gone/{model}.safetensors"}}
        config["rotations"] = {"mine": rotation}
        config["recipes"]["rtn"] = {"method": "rtn", "rotation": "mine"}
        config["tables"]["t"]["rows"].append("rtn")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    snakefile = str(ROOT / "Snakefile")
    assert main(["check", "--snakefile", snakefile, "--configfile", str(file)]) == status
    said = capsys.readouterr()
    if wrong:
        assert "rotations.mine for tiny: path gone/{model}.safetensors does not exist" in said.out
        assert said.err == "obr: 1 thing would stop the run; see the list above.\n"
    else:
        assert said.out == "Nothing would stop the run.\n"
    assert not (tmp_path / "results").exists()


@pytest.mark.workflow
def test_a_run_is_refused_at_its_start_with_all_missing_files(tiny_folder, tmp_path):
    """The model is there, two rotations are not: no job starts."""
    rotations = {
        name: {"kind": "file", "source": {"source": "path", "path": f"gone/{name}.safetensors"}} for name in "ab"
    }
    config = {
        "experiments": [],
        "device": "cpu",
        "models": {"tiny": {"source": {"source": "path", "path": str(tiny_folder / "model")}}},
        "texts": {"held": {"source": "path", "path": str(tiny_folder / "heldout.txt")}},
        "perplexity": {"held": {"text": "held", "seqlen": 64}},
        "rotations": rotations,
        "recipes": {name: {"method": "rtn", "bits": 4, "rotation": name} for name in rotations},
        "tables": {"t": {"title": "T", "models": ["tiny"], "rows": [*rotations], "perplexity": ["held"]}},
    }
    run = snakemake(tmp_path, config)
    assert run.returncode == 1 and "Some inputs of this run are not there:" in run.stdout
    for name in rotations:
        assert f"rotations.{name} for tiny: path gone/{name}.safetensors does not exist" in run.stdout
    assert not (tmp_path / "results/models").exists()
