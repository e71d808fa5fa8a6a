"""Caches without a home folder, or with one that cannot be written: as in containers that run under a number."""

import errno
import os
import platform
import pwd
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from helpers.paths import ROOT
from helpers.workflow_runs import CONFIG, command, environment
from obr.config import workflow
from obr.errors import ObrError
from obr.methods import native
from obr.runtime import cache_folder, compiler, gpu, hub

UNKNOWN = """
import pwd
def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = getpwuid
"""


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch) -> Path:
    """An empty folder for temporary files, and no cache named."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for name in (cache_folder.VARIABLE, "XDG_CACHE_HOME", "MPLCONFIGDIR", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    cache_folder._own.cache_clear()
    yield folder
    cache_folder._own.cache_clear()


@pytest.fixture(params=["none", "missing", "file"])
def no_home(request, tmp_path, monkeypatch) -> str:
    """No home folder: unknown to the system, named but not there, or no folder."""
    if request.param == "none":

        def unknown(uid):
            raise KeyError(uid)

        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(pwd, "getpwuid", unknown)
    else:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if request.param == "file":
        (tmp_path / "home").touch()
    return request.param


@pytest.fixture
def unwritable_home(tmp_path, monkeypatch) -> Path:
    """A home in which nothing can be made, not even by root."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".cache").touch()
    monkeypatch.setenv("HOME", str(home))
    return home


def test_the_cache_is_in_the_home_folder_or_where_the_variable_says(tmp_path, monkeypatch, recwarn):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder.folder("native") == tmp_path / ".cache/obr/native"
    monkeypatch.setenv(cache_folder.VARIABLE, "~/other")
    assert cache_folder.writable("native") == tmp_path / "other/native" and (tmp_path / "other/native").is_dir()
    assert cache_folder.redirect() is None and not recwarn.list


def test_without_a_home_the_cache_is_temporary(no_home, scratch):
    with pytest.warns(UserWarning, match=r"since there is no home folder; set OBR_CACHE to a writable folder"):
        path = cache_folder.writable("native")
    assert path == scratch / f"obr-{os.getuid()}" / "native" and path.is_dir()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with pytest.warns(UserWarning), pytest.raises(ObrError, match=r"could not fetch|cannot be written"):
        hub.wheel("", "", "0")


def test_a_home_that_cannot_be_written_is_named(unwritable_home, scratch):
    with pytest.warns(UserWarning, match=r"since .*/home/.cache/obr/native cannot be written \(.*set OBR_CACHE"):
        assert cache_folder.writable("native").is_relative_to(scratch)


def test_a_full_disk_is_not_taken_for_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(cache_folder, "_tried", full)
    with pytest.raises(OSError, match="No space left"):
        cache_folder.writable("native")
    monkeypatch.setenv("CXX", sys.executable)
    with pytest.raises(
        ObrError, match=r"native.cpp cannot be built by .*No space left.*set OBR_CACHE to a folder with"
    ):
        compiler.build([native.SOURCE], ["-DNEVER_BUILT_BEFORE"])


def test_a_variable_that_names_no_whole_path_is_refused(monkeypatch):
    monkeypatch.setenv(cache_folder.VARIABLE, "~nobody-at-all/cache")
    with pytest.raises(ObrError, match=r"OBR_CACHE is ~nobody-at-all/cache, but there is no home folder"):
        cache_folder.folder("wheels")


@pytest.mark.parametrize("kind", ["open to all", "link", "file"])
def test_a_temporary_folder_that_others_can_write_is_not_used(kind, no_home, scratch, tmp_path):
    """A library that is loaded from there would run another user's code."""
    place = scratch / f"obr-{os.getuid()}"
    if kind == "link":
        place.symlink_to(tmp_path)
    elif kind == "file":
        place.touch()
    else:
        place.mkdir()
        place.chmod(0o777)
    with pytest.warns(UserWarning):
        path = cache_folder.folder("native")
    assert not path.is_relative_to(place) and stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_missing_temporary_folder_raises_one_sentence(no_home, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    with pytest.raises(ObrError, match=r"There is no folder for temporary files .*; set TMPDIR to a writable one"):
        cache_folder.folder("native")


@pytest.mark.slow
def test_a_library_in_a_cache_that_cannot_be_written_is_used(tmp_path, monkeypatch, recwarn):
    if native.library() is None:
        pytest.skip("no compiler")
    monkeypatch.setenv(cache_folder.VARIABLE, str(tmp_path))
    compiler.build([native.SOURCE], native.FLAGS)
    monkeypatch.setattr(cache_folder, "writable", lambda name: pytest.fail("nothing has to be written"))
    compiler.build([native.SOURCE], native.FLAGS)
    (library,) = (tmp_path / "native").iterdir()
    monkeypatch.setenv(cache_folder.VARIABLE, str(tmp_path / "other"))  # a name that this process has not loaded
    (tmp_path / "other/native").mkdir(parents=True)
    (tmp_path / "other/native" / library.name).write_bytes(b"cut short")
    with pytest.raises(
        ObrError, match=r"\.so cannot be loaded \(.*\); delete it, or set OBR_CACHE to a folder whose"
    ):
        compiler.build([native.SOURCE], native.FLAGS)


def test_caches_of_other_libraries_go_to_temporary_folder(no_home, scratch, monkeypatch):
    for name in ("XDG_CACHE_HOME", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "")  # so that what is set here is undone
    sentence = cache_folder.redirect()
    assert "there is no home folder that can be written" in sentence and "set XDG_CACHE_HOME and" in sentence
    assert Path(os.environ["XDG_CACHE_HOME"]).is_relative_to(scratch)
    assert cache_folder.redirect() is None  # what is set stays


def test_a_path_below_no_home_does_not_exist(no_home):
    source = {"source": "path", "path": "~/model"}
    with pytest.raises(ObrError, match="does not exist"):
        workflow.check_paths({"m": {"source": source}}, "models")
    with pytest.raises(ObrError, match="does not exist"):
        hub.local_path("~/model")


def test_a_gpus_lock_that_cannot_be_opened_is_named(scratch, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    (scratch / f"obr-gpu-{os.getuid()}-{platform.node()}-3.lock").mkdir()
    with pytest.raises(
        ObrError, match=r"-3.lock, which reserves GPU 3, cannot be opened \(.*\); delete it, or set TMPDIR"
    ):
        gpu.claim("cuda")


@pytest.mark.slow
@pytest.mark.parametrize("home", [None, "/nowhere/at/all", "unwritable"])
def test_commands_run_for_a_user_whom_the_system_does_not_know(home, tmp_path):
    """In processes of their own, from the import on; with a library, the command line, and Snakemake."""
    (tmp_path / "sitecustomize.py").write_text(UNKNOWN)
    variables = {**environment(), "TMPDIR": str(tmp_path / "scratch")}
    variables["PYTHONPATH"] = f"{tmp_path}:{variables['PYTHONPATH']}"
    variables.pop("HOME", None)
    if home is not None:
        variables["HOME"] = home.replace("unwritable", str(tmp_path / "sitecustomize.py"))
    library = "import obr, torch; print(obr.restore(torch.eye(32), torch.eye(32)).sparsity)"
    done = subprocess.run(
        [sys.executable, "-c", library], env=variables, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "0.5\n" and "Traceback" not in done.stderr, done.stderr
    assert "set OBR_CACHE to a writable folder" in done.stderr
    one = [
        sys.executable,
        "-m",
        "obr",
        "errata",
        "--published",
        "{}/workflow/published/results.csv",
        "--out",
        "e.md",
    ]
    one = [part.format(ROOT) for part in one]
    done = subprocess.run(one, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "set XDG_CACHE_HOME and MPLCONFIGDIR" in done.stderr, done.stderr
    assert not (tmp_path / "~").exists() and not Path("/nowhere").exists()


@pytest.mark.slow
@pytest.mark.workflow
def test_snakemake_runs_for_unknown_user_with_home_and_user_set(tmp_path, tiny_folder):
    (tmp_path / "sitecustomize.py").write_text(UNKNOWN)
    variables = environment(HOME=str(tmp_path), USER="obr")
    variables["PYTHONPATH"] = f"{tmp_path}:{variables['PYTHONPATH']}"
    done = subprocess.run(command(tmp_path, CONFIG, "-n"), env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
