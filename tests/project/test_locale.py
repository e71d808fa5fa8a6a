"""Locales that are not UTF-8: the same digests, the same files, no exception."""

import ast
import os
import shutil
import subprocess
import sys

import pytest

from helpers.paths import PUBLISHED, ROOT
from helpers.workflow_runs import CONFIG, command, environment
from obr.runtime import code_digest

STAGES = ("compression.stage", "calibration.collect_hessians", "data.texts", "report.table")
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(scope="module")
def latin(tmp_path_factory) -> dict[str, str]:
    """Variables of a Latin-1 locale, made here."""
    if shutil.which("localedef") is None:
        pytest.skip("localedef is not installed")
    folder = tmp_path_factory.mktemp("locale")
    made = subprocess.run(
        ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "en_US")], capture_output=True
    )
    if made.returncode > 1 or not (folder / "en_US").exists():
        pytest.skip("localedef lacks the definitions of en_US")
    return {"LOCPATH": str(folder), "LC_ALL": "en_US", "PYTHONUTF8": "0"}


def plain(**more: str) -> dict[str, str]:
    """The environment with this locale alone."""
    kept = {key: value for key, value in environment().items() if not key.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    return kept | more


def printed(code: str, variables: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=plain(**variables), capture_output=True)
    assert done.returncode == 0, done.stderr.decode("latin-1")
    return done.stdout.decode("latin-1").strip()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latin", "ascii"])
def test_digests_do_not_depend_on_the_locale(kind, request):
    variables = ASCII if kind == "ascii" else request.getfixturevalue("latin")
    encoding = printed("import locale; print(locale.getpreferredencoding(False))", variables)
    assert encoding.upper() in ("ISO-8859-1", "ANSI_X3.4-1968", "US-ASCII"), encoding
    found = printed(f"from obr.runtime.code_digest import digest; print(*map(digest, {STAGES!r}))", variables)
    assert found.split() == [code_digest.digest(stage) for stage in STAGES]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latin", "ascii"])
def test_a_command_writes_utf_8_under_any_locale(kind, request, tmp_path):
    variables = ASCII if kind == "ascii" else request.getfixturevalue("latin")
    run = [sys.executable, "-m", "obr", "errata", "--published", str(PUBLISHED), "--out"]
    for name, environment_ in (("here.md", dict(os.environ)), ("there.md", variables)):
        done = subprocess.run(
            [*run, name], env=plain(**environment_) if name == "there.md" else environment(), cwd=tmp_path,
            capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode("latin-1")
    assert (tmp_path / "here.md").read_bytes() == (tmp_path / "there.md").read_bytes()


@pytest.mark.slow
@pytest.mark.workflow
def test_the_workflow_is_read_under_ascii(tmp_path, tiny_folder):
    run = subprocess.run(command(tmp_path, CONFIG, "-n"), env=plain(**ASCII), capture_output=True)
    assert run.returncode == 0, (run.stdout + run.stderr).decode("latin-1")[-2000:]


# Calls that read or write text -> the position of the encoding among their arguments.
TEXT_CALLS = {"read_text": 0, "write_text": 1, "open": 3, "fdopen": 3, "TextIOWrapper": 1, "NamedTemporaryFile": 2}
BINARY_OPEN = {"tokenize", "os", "tarfile", "zipfile", "archive", "Image", "webbrowser"}  # whose `open` is no text's


def owner_of(call: ast.Call) -> str | None:
    """The name before the dot of a called method."""
    return getattr(getattr(call.func, "value", None), "id", None)


def without_encoding(source: str) -> list[int]:
    """Line numbers of calls that open text without naming its encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        if (
            any(word.arg in ("text", "universal_newlines") for word in node.keywords)
            and owner_of(node) == "subprocess"
        ):
            found.append(node.lineno)  # decodes by the locale; `encoding` alone is enough
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if method else getattr(node.func, "id", None)
        owner = owner_of(node)
        if name not in TEXT_CALLS or (name == "open" and owner in BINARY_OPEN):
            continue
        if name in ("read_text", "write_text") and not method:
            continue  # functions of this package, which write UTF-8
        path_open = name == "open" and method and owner != "io"
        at = 1 if path_open and not node.args[2:] else TEXT_CALLS[name]
        keywords = {word.arg: word.value for word in node.keywords}
        place = 0 if path_open or name == "NamedTemporaryFile" else 1
        mode = keywords.get("mode", node.args[place] if len(node.args) > place else None)
        binary = isinstance(mode, ast.Constant) and "b" in str(mode.value)
        binary = binary or (name == "NamedTemporaryFile" and mode is None)
        takes_mode = name in ("open", "fdopen", "NamedTemporaryFile")
        given = "encoding" in keywords or len(node.args) > at
        if not given and not (takes_mode and binary):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    "line, missing",
    [
        ("path.read_text()", True), ("path.read_text(encoding='utf-8')", False), ("path.read_text('utf-8')", False),
        ("path.write_text(text)", True), ("path.write_text(text, encoding='utf-8')", False),
        ("open(path)", True), ("open(path, 'w')", True), ("open(path, 'rb')", False),
        ("open(path, mode='wb')", False),
        ("open(path, 'w', encoding='utf-8')", False), ("path.open()", True), ("path.open('rb')", False),
        ("found[0].path.open('a')", True), ("write_text(text, path)", False), ("os.open(path, 0)", False),
        ("os.fdopen(number, 'w')", True), ("io.open(path)", True),
        ("subprocess.run(command, text=True)", True), ("subprocess.run(command, encoding='utf-8')", False),
    ],
)  # fmt: skip
def test_a_text_without_an_encoding_is_found(line, missing):
    assert bool(without_encoding(line)) == missing


def test_text_files_are_opened_with_encoding():
    files = [*ROOT.glob("workflow/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    assert len(files) > 100
    assert not [f"{path.relative_to(ROOT)}:{n}" for path in files for n in without_encoding(path.read_text("utf-8"))]
