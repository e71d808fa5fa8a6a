"""Wheels are fetched once and verified; the hub's exceptions become one sentence."""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.wheel_files import make_wheel
from obr.errors import ObrError
from obr.runtime import hub
from obr.runtime.files import sha256_of

pytestmark = pytest.mark.usefixtures("cache")


def fake_pip(monkeypatch, files: list[Path], returncode: int = 0, stderr: str = ""):
    calls = []

    def run(command, **_):
        calls.append(command)
        for file in files:
            shutil.copy(file, command[command.index("-d") + 1])
        return SimpleNamespace(returncode=returncode, stderr=stderr, stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_a_wheel_is_fetched_once(tmp_path, cache, monkeypatch):
    sha256 = make_wheel(tmp_path, "a_package", {"a.txt": b"text"})
    calls = fake_pip(monkeypatch, [tmp_path / "a_package-1.0-py3-none-any.whl"])
    first = hub.wheel("A.package", "1.0", sha256.upper())
    assert hub.wheel("a-package", "1.0", sha256) == first == cache / "a_package-1.0-py3-none-any.whl"
    assert len(calls) == 1 and calls[0][-1] == "A.package==1.0" and "--no-deps" in calls[0]
    assert [path.name for path in cache.iterdir()] == [first.name]


def test_a_cached_wheel_with_another_hash_is_fetched_again(tmp_path, cache, monkeypatch):
    sha256 = make_wheel(tmp_path, "a_package", {"a.txt": b"text"})
    (cache / "a_package-1.0-py3-none-any.whl").write_bytes(b"damaged")
    fake_pip(monkeypatch, [tmp_path / "a_package-1.0-py3-none-any.whl"])
    assert sha256_of(hub.wheel("a-package", "1.0", sha256)) == sha256


def test_a_wheel_with_the_wrong_hash_is_refused_and_not_kept(tmp_path, cache, monkeypatch):
    sha256 = make_wheel(tmp_path, "a_package", {"a.txt": b"text"})
    fake_pip(monkeypatch, [tmp_path / "a_package-1.0-py3-none-any.whl"])
    with pytest.raises(ObrError, match=rf"a-package==1\.0 has sha256 {sha256}, not {'0' * 64}: correct"):
        hub.wheel("a-package", "1.0", "0" * 64)
    assert not list(cache.iterdir())


def test_failed_fetch_shows_pips_last_line(monkeypatch):
    fake_pip(monkeypatch, [], 1, "WARNING: retrying\nERROR: No matching distribution found for nil==1\n\n")
    with pytest.raises(ObrError, match=r"fetch nil==1 \(ERROR: No matching distribution .*check the network"):
        hub.wheel("nil", "1", "0" * 64)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OBR_CACHE", str(tmp_path / "file"))
    with pytest.raises(ObrError, match=r"file/wheels cannot be written .*set OBR_CACHE"):
        hub.wheel("nil", "1", "0" * 64)


def test_hub_exceptions_become_one_sentence(monkeypatch):
    import errno

    from huggingface_hub import errors

    def said(exception):
        return str(hub.hub_error(exception, "some/model", "v1"))

    try:
        try:
            raise TimeoutError
        except TimeoutError as cause:
            raise errors.LocalEntryNotFoundError("An error happened.\nPlease check") from cause
    except errors.LocalEntryNotFoundError as error:
        assert "cannot be reached (TimeoutError)" in said(error)
    assert "HF_HUB_OFFLINE is set: unset it" in said(errors.OfflineModeIsEnabled("offline"))
    assert "lacks a file asked for (no a.bin)" in said(errors.EntryNotFoundError("no a.bin"))
    assert "write it as owner/name" in said(errors.HFValidationError("a/b/c"))
    assert "No space left" in said(OSError(errno.ENOSPC, "No space left on device"))
    # A loop in the chain of causes must not become a loop here.
    one, two = OSError("one"), OSError("two")
    one.__cause__, two.__cause__ = two, one
    assert "one" in said(one)
