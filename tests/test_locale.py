"""Locales that are not UTF-8: the same digests, the same files, no exception."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from obr.runtime import code_digest
from running import CONFIG, command, environment

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


@pytest.mark.parametrize("kind", ["latin", "ascii"])
def test_digests_do_not_depend_on_the_locale(kind, request):
    variables = ASCII if kind == "ascii" else request.getfixturevalue("latin")
    encoding = printed("import locale; print(locale.getpreferredencoding(False))", variables)
    assert encoding.upper() in ("ISO-8859-1", "ANSI_X3.4-1968", "US-ASCII"), encoding
    found = printed(f"from obr.runtime.code_digest import digest; print(*map(digest, {STAGES!r}))", variables)
    assert found.split() == [code_digest.digest(stage) for stage in STAGES]


@pytest.mark.parametrize("kind", ["latin", "ascii"])
def test_a_command_writes_utf_8_under_any_locale(kind, request, tmp_path):
    variables = ASCII if kind == "ascii" else request.getfixturevalue("latin")
    published = Path(__file__).parents[1] / "workflow/published/results.csv"
    run = [sys.executable, "-m", "obr", "errata", "--published", str(published), "--out"]
    for name, environment_ in (("here.md", dict(os.environ)), ("there.md", variables)):
        done = subprocess.run(
            [*run, name], env=plain(**environment_) if name == "there.md" else environment(), cwd=tmp_path,
            capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode("latin-1")
    assert (tmp_path / "here.md").read_bytes() == (tmp_path / "there.md").read_bytes()


def test_the_workflow_is_read_under_ascii(tmp_path, tiny_folder):
    run = subprocess.run(command(tmp_path, CONFIG, "-n"), env=plain(**ASCII), capture_output=True)
    assert run.returncode == 0, (run.stdout + run.stderr).decode("latin-1")[-2000:]
