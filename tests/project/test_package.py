"""The package's own order: imports go one way, heavy libraries load late, versions and commands agree."""

import ast
import graphlib
import importlib
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import obr
from helpers.paths import ROOT
from helpers.workflow_runs import environment
from obr.cli.parser import BY_HAND, STAGES, parser
from obr.runtime import code_digest

PACKAGE = ROOT / "workflow" / "obr"
# From the ground up; a module imports from lower floors, or from its own package.
FLOORS = [
    ["errors"],
    ["runtime"],
    ["config"],
    ["methods", "models", "report"],
    ["kernels", "data", "planning"],
    ["rotations"],
    ["calibration"],
    ["mixed_precision"],
    ["checkpoints"],
    ["evaluation", "export"],
    ["compression"],
    ["cli"],
    ["__main__"],
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_one_way(path):
    own = path.parts[0].removesuffix(".py")
    if own == "__init__":  # the names of the package
        return
    assert own in FLOOR, f"{own} is on no floor"
    for imported in code_digest._imports(path.as_posix()):
        other = imported.split(".")[1] if "." in imported else own
        assert other == own or FLOOR[other] < FLOOR[own], f"{path} imports {imported}"


def test_modules_have_no_import_cycle():
    sorter = graphlib.TopologicalSorter()
    for path in MODULES:
        imported = map(code_digest._path, code_digest._imports(path.as_posix()))
        sorter.add(path.as_posix(), *({other for other in imported if other} - {path.as_posix()}))
    sorter.prepare()  # CycleError otherwise


def test_the_picture_of_the_package_is_that_of_its_imports():
    run = subprocess.run(
        [sys.executable, ROOT / "docs/draw_package.py", "--check"], text=True, capture_output=True, env=environment()
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_modules_and_functions_are_small(path):
    """At most 350 lines a module, 60 a function, and six parameters unless the docstring says why."""
    text = (PACKAGE / path).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            many = len(set(names) - {"self", "cls"}) > 6
            assert not many or re.search(r"(?i)parameter", ast.get_docstring(node) or ""), node.name


def unannotated(function: ast.FunctionDef) -> list[str]:
    """Parameters of a function without an annotation, and "return"."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    starred = [a for a in (function.args.vararg, function.args.kwarg) if a is not None]
    found = [a.arg for a in (*arguments, *starred) if a.annotation is None and a.arg not in ("self", "cls")]
    return found + ["return"] * (function.returns is None and function.name != "__init__")


@pytest.mark.parametrize("path", [path for path in MODULES if path.as_posix() != "kernels/gpu/programs.py"], ids=str)
def test_public_functions_have_annotations(path):
    """Of functions and methods without an underscore, those of public classes; Triton's programs have their own."""
    tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    public = [node for owner in (tree, *classes) for node in owner.body if isinstance(node, ast.FunctionDef)]
    found = {node.name: unannotated(node) for node in public if not node.name.startswith("_")}
    assert not {name: names for name, names in found.items() if names}


def imported_by(code: str) -> set[str]:
    """Which heavy libraries a piece of code loads."""
    watch = f"import sys; {code}; print([m for m in {HEAVY!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True, check=True)
    return set(ast.literal_eval(found.stdout.splitlines()[-1]))


HEAVY = ["torch", "transformers", "datasets", "lm_eval", "pandas", "matplotlib"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "code, allowed",
    [
        ("import obr, obr.cli.main, obr.config.workflow, obr.runtime.code_digest, obr.config.recipe", set()),
        ("import obr.models.download, obr.data.texts, obr.evaluation.tasks", set()),
        ("import obr.report.table", {"pandas"}),
        ("import obr.methods.restore, obr.checkpoints.packing", {"torch"}),
        (
            "import obr.checkpoints.format, obr.evaluation.perplexity, obr.compression.stage",
            {"torch", "transformers"},
        ),
    ],
)
def test_heavy_libraries_are_loaded_late(code, allowed):
    assert imported_by(code) <= allowed


def test_public_names_are_no_modules_after_import_of_all_modules():
    """A sub-package of the same name would take the place of a function as soon as something imports it."""
    before = {name: getattr(obr, name) for name in obr.__all__}
    assert all(callable(value) for value in before.values())
    for path in MODULES:
        if path.name != "__main__.py" and (path.as_posix() != "kernels/gpu/programs.py" or find_spec("triton")):
            importlib.import_module(".".join(["obr", *path.with_suffix("").parts]).removesuffix(".__init__"))
    assert {name: getattr(obr, name) for name in obr.__all__} == before
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = obr.nonsense


def test_the_digest_sees_code_and_nothing_else(tmp_path, monkeypatch):
    package = tmp_path / "obr"
    package.mkdir()
    (package / "a.py").write_text('"""Doc."""\nfrom obr import b\n\nX = 1\n')
    (package / "b.py").write_text("Y = 2\n")
    monkeypatch.setattr(code_digest, "ROOT", package)

    def now():
        code_digest._imports.cache_clear()
        code_digest._tree.cache_clear()
        return code_digest.digest("a")

    before = now()
    (package / "a.py").write_text('"""Another doc."""\n# a comment\nfrom obr import b\nX = 1  # one\n')
    assert now() == before
    (package / "b.py").write_text("Y = 3\n")
    assert now() != before
    before = now()
    (package / "b.cpp").write_text("int y = 3;\n")
    assert now() != before
    before = now()
    (package / "c.cpp").write_text("int c = 3;\n")
    assert now() == before


def test_stages_depend_on_what_they_compile():
    def sources(stage):
        return {source.name for path in code_digest.closure(stage) for source in code_digest.compiled(path)}

    assert {"kernels.cpp", "layout.h", "avx512.h", "gemm.cu"} <= sources("kernels.benchmark")
    assert "native.cpp" in sources("compression.stage") and "gemm.cu" not in sources("compression.stage")


def test_editing_restoration_touches_compression_but_not_hessians():
    restore = "methods/restore.py"
    assert restore in code_digest.closure("compression.stage")
    others = [
        "calibration.collect_hessians",
        "data.token_windows",
        "models.download",
        "data.texts",
        "evaluation.tasks",
    ]
    for stage in [*others, "rotations.obtain", "kernels.benchmark", "report.table", "report.figures.draw"]:
        assert code_digest.closure(stage) and restore not in code_digest.closure(stage), stage
    heavy = {"models/blocks.py", "models/layers.py", "methods/grid.py"}
    assert not heavy & code_digest.closure("models.download")  # gigabytes to fetch again


def test_stages_have_rules_with_code_digests():
    rules = "\n".join(p.read_text() for p in (ROOT / "workflow" / "rules").glob("*.smk"))
    stages = set(parser()._subparsers._group_actions[0].choices)
    assert {re.sub("-", "_", s) for s in stages - set(BY_HAND)} <= {
        re.sub("-", "_", s) for s in re.findall(r"obr ([a-z-]+) (?:--|\{wildcards|\{params)", rules)
    }
    for block in rules.split("\nrule ")[1:]:
        # The check of a model's patterns is held against the model anew whenever the workflow is read.
        tracked = [] if block.startswith("check_model:") else ["code="]
        for needed in ("log:", "benchmark:", "threads:", "resources:", *tracked):
            assert needed in block, f"rule {block.split(':')[0]} has no {needed}"


def test_rules_pass_the_memory_for_hidden_states_to_each_stage_that_has_it():
    rules = "\n".join(p.read_text() for p in (ROOT / "workflow" / "rules").glob("*.smk"))
    stages = [name for name, (_, _, options) in STAGES.items() if "activations" in options.split()] + ["evaluate"]
    assert "learn-rotation" in stages and "compress" in stages
    for stage in stages:
        command = rules[rules.index(f"obr {stage} ") :].partition("2>&1")[0]
        assert "--activations-memory {resources.activations_mb}" in command, stage


EXTRAS = ("data", "eval", "learn", "export", "report", "workflow", "crate", "docs", "dev")


def test_the_conda_environment_is_the_lock_file():
    environment = yaml.safe_load((ROOT / "envs" / "obr.yaml").read_text())
    assert {"pip": ["-r ../requirements.lock"]} in environment["dependencies"]
    text = (ROOT / "requirements.lock").read_text()
    lock = dict(re.findall(r"^([\w.-]+)==(\S+) \\$", text, re.M))
    assert len(lock) == len(re.findall(r"^\w", text, re.M)) > 100  # nothing without a version and a hash
    for package in re.split(r"\n(?=\w)", text)[1:]:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}$", package, re.M), package
    (torch,) = re.findall(r"^torch==(\S+)$", (ROOT / "requirements.torch.lock").read_text(), re.M)
    assert f"pytorch={torch}" in environment["dependencies"] and "torch" not in lock
    lock["torch"] = torch
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][k] for k in EXTRAS)]
    needed = [re.match(r"[A-Za-z_-]+", package)[0] for packages in lists for package in packages]
    names = {name.lower().replace("_", "-") for name in lock}
    assert {n.lower().replace("_", "-") for n in needed} <= names


def test_schema_keys_have_descriptions():
    schema = yaml.safe_load((ROOT / "workflow" / "schemas" / "config.schema.yaml").read_text())

    def walk(node, where):
        for key, value in node.get("properties", {}).items():
            assert "description" in value, f"{where}.{key}"
            walk(value, f"{where}.{key}")
        for part in ("items", "additionalProperties"):
            if isinstance(node.get(part), dict):
                walk(node[part], f"{where}.{part}")
        for choice in node.get("oneOf", []):
            walk(choice, f"{where}.oneOf")

    walk(schema, "config")
    for name, definition in schema["$defs"].items():
        walk(definition, name)


def texts_in(value) -> list[str]:
    """All strings inside a value of YAML, keys left out."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, str) else [text for part in inside for text in texts_in(part)]


CONFIGS = [ROOT / "config.yaml", ROOT / "tests/config.yaml", *sorted((ROOT / "config").rglob("*.yaml"))]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_hold_no_absolute_paths_and_no_anchors(path):
    text = path.read_text()
    texts = texts_in(yaml.safe_load(text))
    assert not [text for text in texts if re.search(r"(^|[\s=:])(/\w|~/)", text)]
    for event in yaml.parse(text):
        assert not isinstance(event, yaml.AliasEvent) and getattr(event, "anchor", None) is None, event.start_mark
        assert getattr(event, "value", None) != "<<", event.start_mark


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["snakefmt", "--check", "Snakefile", "workflow"],
        ["snakemake", "--lint"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_linters_pass(command):
    tool = Path(sys.executable).parent / command[0]
    run = subprocess.run([tool, *command[1:]], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert run.returncode == 0, run.stdout[-3000:]
