"""Every command of the documents is run as it is printed, in a copy of the project; so are their examples.

Snakemake's are dry runs that evaluate everything, and so are make's; `obr` and the library work on the tiny model.
"""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import yaml

from helpers import external_checkpoints
from helpers.configs import merged
from helpers.gguf_files import write_gguf
from helpers.paths import ROOT
from helpers.workflow_runs import SMOKE, environment
from obr.config.workflow import Config
from obr.models.architectures import FAMILIES

PATTERNS = ("*.md", "config/*.md", "docs/**/*.md", "tests/fixtures/*.md", "workflow/published/*.md")
DOCUMENTS = sorted(p.relative_to(ROOT).as_posix() for pattern in PATTERNS for p in ROOT.glob(pattern))
INLINE = ("obr errata", "obr --help")  # commands in the README's sentences
CONFIGS = ("snakemake --cores all --configfile tests/config.yaml",)  # that no printed command names
# Commands that are not run, by how they begin, and why.
LEFT_OUT = {
    "python benchmarks/": "each takes minutes; the tests of benchmarks run them on the tiny model",
    "python docs/publish.py": "it needs the results of a run of hours; its own tests have small ones",
    "make peers": "it installs other programs and takes an hour",
    "pip install": "the tests install nothing",
    "snakemake --cores all --default-storage-provider s3": "its plugin is no part of the project, nor is a bucket",
    "snakemake --executor kubernetes": "its plugin is no part of the project, nor is a cluster",
}
UPLOAD = "obr push results/compressed/llama-2-7b/obr_gptq-w4s50-quarot you/name"
LLAMA = "obr quantize meta-llama/Llama-2-7b-hf --sparsity 0.5 --bits 4 --out llama-2-7b-obr"
# What is run in place of a command, and why.
IN_PLACE = {
    LLAMA: (
        LLAMA.replace("meta-llama/Llama-2-7b-hf", "$OBR_TINY/model")
        + " --calibration $OBR_TINY/train.txt --samples 16 --seqlen 128",
        "it needs the hub: on the tiny model and its text",
    ),
    UPLOAD: (f"{UPLOAD} --dry-run uploaded", "it needs an account on the hub"),
    "obr check": (
        "obr check --offline --configfile config.test.yaml",
        "it needs the hub, a GPU and the paper's disk: of the tiny workflow",
    ),
    "obr evaluate results/compressed/MODEL/RECIPE --texts wikitext2 --tasks piqa arc_easy": (
        f"obr evaluate {SMOKE}/compressed/tiny/obr_gptq_2_4 --texts heldout --tasks continuation "
        "--configfile config.test.yaml --out by_hand.json",
        "it needs the hub: of the tiny workflow",
    ),
    "obr evaluate results/models/MODEL --texts notes.txt --seqlen 1024 --out before.json": (
        f"obr evaluate {SMOKE}/models/tiny --texts $OBR_TINY/heldout.txt --seqlen 64 --out before.json",
        "it needs a text of the user: of the tiny model",
    ),
    "obr evaluate compressed --texts held_out.txt --seqlen 512": (
        f"obr evaluate {SMOKE}/compressed/tiny/obr_gptq_2_4 --texts $OBR_TINY/heldout.txt --seqlen 64 --out own.json",
        "it needs a checkpoint of the user: of the tiny workflow",
    ),
    "obr evaluate compressed --texts held_out.txt --seqlen 512 --activations a4kv4 --out a4kv4.json": (
        f"obr evaluate {SMOKE}/compressed/tiny/obr_gptq_2_4 --texts $OBR_TINY/heldout.txt --seqlen 64 "
        "--activations a4kv4 --out a4kv4.json",
        "it needs a checkpoint of the user: of the tiny workflow",
    ),
    "snakemake --report report.html": (
        "command snakemake --configfile config.test.yaml --report report.html",
        "it needs results: of the tiny workflow",
    ),
}
# Paths of the paper's models -> of the tiny model's.
PATHS = {
    "results/compressed/llama-2-7b/obr_gptq-w4s50-quarot": f"{SMOKE}/compressed/tiny/obr_gptq",
    "results/compressed/MODEL/RECIPE": f"{SMOKE}/compressed/tiny/obr_gptq_2_4",
}
# Names of the user's own model and texts -> the tiny model's.
OWN = {
    "path/to/model": "$OBR_TINY/model",
    "--calibration text.txt": "--calibration $OBR_TINY/train.txt",
    "held_out.txt": "$OBR_TINY/heldout.txt",
}
DATA = ("text/wiki.valid.raw", "text/wiki.test.raw", "tasks/piqa_validation.jsonl", "tasks/arc_easy_test.jsonl")
DATA += ("tasks/winogrande_xl_validation.jsonl",)
COPIED = ("workflow", "config", "profiles")
EXTERNAL = {"Llama-2-7B-GPTQ": "gptq 4, ordered", "Llama-3-8B-FP8": "floats, channel"}  # as other programs write them
SHELL = """
snakemake() {
  command snakemake --strict-dag-evaluation cyclic-graph functions periodic-wildcards --dry-run "$@"
}
make() { if [ "$1" = plan ]; then command make "$@"; else command make --dry-run "$@"; fi; }
"""


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.S)


def printed() -> list[str]:
    """Commands of the documents' shell blocks, continued lines joined, and those in comments; each once."""
    found = []
    for document in DOCUMENTS:
        for block in blocks(document, "sh"):
            found += [re.sub(r"\s+#.*", "", line) for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    for source in ("Snakefile", "config.yaml", *sorted((ROOT / "config/experiments").glob("*.yaml"))):
        text = (ROOT / source).read_text(encoding="utf-8")
        shown = re.findall(r"^#(?: +[A-Za-z ,'-]+:)? +((?:snakemake|obr) [^`\n]+?)(?: {2,}.*)?$", text, re.M)
        if source not in ("Snakefile", "config.yaml"):  # the studies run dry together, in the tests of config
            shown = [line for line in shown if "--configfile" in line]
        found += [f"OBR_DATA=folder {line}" if "wikitext.yaml" in line else line for line in shown]
    return list(dict.fromkeys(line for line in found if line))


PRINTED = [*printed(), *INLINE, *CONFIGS]
COMMANDS = [command for command in PRINTED if not command.startswith(tuple(LEFT_OUT))]


@pytest.fixture(scope="module")
def project(tiny_folder, tmp_path_factory) -> Path:
    """A copy of the project, with the files that commands name, and this environment in the place of make's."""
    copy = tmp_path_factory.mktemp("project")
    for path in [*ROOT.glob("*.*"), ROOT / "Snakefile", ROOT / "Makefile", *map(ROOT.joinpath, COPIED)]:
        if path.is_file():
            shutil.copy2(path, copy)
        elif path.name in COPIED:
            shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "tests").mkdir()
    shutil.copy2(ROOT / "tests/config.yaml", copy / "tests")
    for name in DATA:
        (copy / "folder/data" / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / "folder/data" / name).touch()
    for name, case in EXTERNAL.items():
        external_checkpoints.write(tiny_folder / "model", copy / name, case)
    write_gguf(copy / "model.Q8_0.gguf")
    (copy / ".venv").mkdir()
    (copy / ".venv/bin").symlink_to(Path(sys.executable).parent)
    (copy / ".venv/.ready").touch()
    return copy


@pytest.fixture(scope="module")
def running(request, project):
    """The chosen commands, two at a time: {command: future of its finished process}."""
    chosen = [item.callspec.params["command"] for item in request.session.items if "running" in item.fixturenames]
    work = request.getfixturevalue("finished") if any(_wants_results(command) for command in chosen) else project
    with ThreadPoolExecutor(2) as pool:
        yield {command: pool.submit(_run, command, project, work) for command in chosen}


def _wants_results(command: str) -> bool:
    return not command.startswith("obr quantize") and _stands_in(command)


def _stands_in(command: str) -> bool:
    return command in IN_PLACE or any(path in command for path in PATHS)


def _run(command: str, project: Path, work: Path):
    """A shell that runs the command: in the folder with results where it wants some, else in the project."""
    text = IN_PLACE.get(command, (command,))[0]
    for path, stand_in in (PATHS | OWN).items():
        text = text.replace(path, str(stand_in))
    if text.startswith("obr push"):
        text += " --licence mit"  # the tiny model, unlike those of the hub, comes without a licence
    if _wants_results(command) and "obr evaluate" not in text:
        text = text.replace("--configfile", f"--snakefile {ROOT / 'Snakefile'} --configfile")
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", SHELL + text],
        cwd=work if _wants_results(command) else project,
        env=environment(project),
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.workflow
@pytest.mark.parametrize("command", COMMANDS)
def test_printed_command_exits_with_zero(command, running, project):
    if command.startswith("make ") and shutil.which("make") is None:
        pytest.skip("make is not installed")
    if command.startswith("source ") and not (project / command.split()[1]).exists():
        pytest.skip("these tests do not run in an environment of venv")
    done = running[command].result()
    assert done.returncode == 0, done.stdout[-3000:]
    assert not re.search(r"\w*(Exception|Error)\b", done.stdout), done.stdout[-3000:]
    if "snakemake" in command and command not in IN_PLACE:
        total = re.search(r"^total +(\d+)$", done.stdout, re.M)
        assert total and int(total[1]) > 2, done.stdout[-2000:]


def test_omitted_and_replaced_commands_occur_in_documents():
    for start in (*LEFT_OUT, *IN_PLACE, *PATHS, *OWN):
        assert any(start in command for command in PRINTED), start
    for command in INLINE:
        assert f"`{command}`" in (ROOT / "README.md").read_text(encoding="utf-8"), command


def test_printed_pip_packages_are_in_lock_file():
    """Where the document says so."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    text = "".join((ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS)
    packages = re.findall(r"^pip install (\S+) +# it is in requirements\.lock$", text, re.M)
    assert packages and all(f"\n{package}==" in lock for package in packages)


@pytest.mark.slow
def test_the_examples_of_the_library_run(tiny_folder, tmp_path, monkeypatch):
    import torch

    import obr

    monkeypatch.chdir(tmp_path)
    inputs = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    found = {
        "obr": obr,
        "weight": torch.randn(32, 64, generator=torch.Generator().manual_seed(1)),
        "hessian": inputs.T @ inputs,
    }
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/model").symlink_to(tiny_folder / "model")
    (tmp_path / "text.txt").symlink_to(tiny_folder / "train.txt")
    external_checkpoints.write(tiny_folder / "model", tmp_path / "Llama-2-7B-AWQ", "awq")
    found["text"] = (tiny_folder / "train.txt").read_text(encoding="utf-8")
    found["stream"] = torch.arange(5000) % 500  # the tokens of a text
    first = "docs/how-to/use-the-library.md"  # whose names the others use
    documents = [first, *(document for document in DOCUMENTS if document != first)]
    examples = [block for document in documents for block in blocks(document, "python")]
    assert len(examples) >= 2
    with mock.patch.dict(FAMILIES):  # an example adds an entry
        for example in examples:
            exec(compile(example, "example", "exec"), found)
    assert found["layer"].mask.float().mean() == 0.5
    assert found["packed"].config.hidden_size == found["model"].config.hidden_size


@pytest.mark.parametrize("example", [block for document in DOCUMENTS for block in blocks(document, "yaml")])
def test_the_examples_of_configs_are_configs(example, tmp_path):
    (tmp_path / "example.yaml").write_text(example)
    sections = yaml.safe_load(example)
    config = Config(merged(str(tmp_path / "example.yaml")))
    for section, entries in sections.items():
        if isinstance(entries, dict):
            assert set(entries) <= set(config.raw[section])
        else:
            assert config.raw[section] == entries
