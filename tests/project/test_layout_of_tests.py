"""The tests' own order: folders as in the package, shared code in helpers, names that say what is tested."""

import ast
import re
from collections import Counter
from functools import cache

import pytest

from helpers.paths import HELPERS, ROOT

TESTS = ROOT / "tests"
# Folders that are no package's: of other parts of the project, whole runs, and what the tests need.
OTHERS = {"benchmarks", "docs", "project", "workflow", "helpers", "fixtures"}
FILES = sorted(path.relative_to(TESTS) for path in TESTS.rglob("*.py"))
MODULES = [path for path in FILES if path.name.startswith("test_")]
NO_SUBJECT = re.compile(r"test_(they|them|it|what|whatever|where|who|that|those|these|one|all|both|each)_")


@cache
def imported(path) -> set[str]:
    """Names of the modules that a file imports, with each name that is imported from them."""
    found = set()
    for node in ast.walk(ast.parse((TESTS / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}", *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def test_folders_are_those_of_the_package():
    packages = {path.parent.name for path in (ROOT / "workflow/obr").glob("*/__init__.py")}
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - OTHERS == packages and folders >= OTHERS
    assert {path.parts[0] for path in MODULES} == folders - {"helpers", "fixtures"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_module_imports_no_test_module(path):
    assert not [name for name in imported(path) if re.search(r"(^|\.)(test_\w+|conftest)(\.|$)", name)]


@pytest.mark.parametrize("helper", sorted(path.stem for path in HELPERS.glob("*.py")))
def test_helper_is_used(helper):
    """By a test, another helper, or a command: those name the file."""
    places = [path for path in FILES if path.as_posix() != f"helpers/{helper}.py"]
    commands = [ROOT / "Makefile", ROOT / "CONTRIBUTING.md", *(TESTS / path for path in places)]
    assert any(f"helpers.{helper}" in imported(path) for path in places) or any(
        f"{helper}.py" in path.read_text(encoding="utf-8") for path in commands
    )


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_names_of_tests_have_a_subject_and_are_distinct(path):
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    names = Counter(node.name for node in tree.body if isinstance(node, ast.FunctionDef))
    assert not [name for name, count in names.items() if count > 1 or NO_SUBJECT.match(name)]
