"""What would stop a run later, in one list before it starts: files, licences, memory, disk, packages."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from obr.config import paths
from obr.config.model_sizes import read_config
from obr.config.rotations import WHERE
from obr.errors import ObrError
from obr.models.architectures import objection_to_file
from obr.planning.dry_run import Job
from obr.planning.prices import TIMED, Price
from obr.planning.schedule import peak_disk, spans
from obr.runtime import hub

# The section of the configuration whose entry's source a rule fetches, and the wildcard that names the entry.
SOURCES = {
    "download_model": ("models", "model"),
    "download_text": ("texts", "text"),
    "download_documents": ("texts", "text"),
    "download_task": ("zero_shot", "task"),
    "download_rotation": ("rotations", "rotation"),
    "download_released": ("recipes", "recipe"),
}
# Packages that a rule's jobs import, besides those that every command needs, and the extra that brings them.
PACKAGES = {
    "download_text": (("datasets",), "data"),
    "download_documents": (("datasets",), "data"),
    "download_task": (("lm_eval", "datasets"), "eval"),
    "evaluate": (("lm_eval", "datasets"), "eval"),
    "learn_rotation": (("geoopt",), "learn"),
    "table": (("pandas",), "report"),
    "figure": (("pandas", "matplotlib"), "report"),
}
MARGIN = 1.0  # GB that the system and Snakemake keep


@dataclass
class Machine:
    """What this machine has.

    Args:
        gpus: (name, GB) of each.
        host: GB of memory.
        free: GB on the disk of a folder.
        compiler: of C++, None for none.
        access: raises ObrError where a repository of the hub (kind, name, revision) cannot be had.
        importable: whether a package can be imported.
    """

    gpus: list[tuple[str, float]]
    host: float
    free: Callable[[Path], float]
    compiler: str | None
    access: Callable[[str, str, str | None], None]
    importable: Callable[[str], bool] = field(default=lambda name: importlib.util.find_spec(name) is not None)

    @classmethod
    def here(cls, online: bool = True) -> Machine:
        """The machine that this process runs on. online: False to leave the hub out."""
        import psutil

        return cls(
            _gpus(), psutil.virtual_memory().total / 1e9, _free,
            shutil.which("g++") or shutil.which("clang++"), hub_access if online else lambda *_: None,
        )  # fmt: skip


def _gpus() -> list[tuple[str, float]]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, encoding="utf-8", errors="replace", check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    rows = [line.rpartition(",") for line in said.splitlines() if line.strip()]
    return [(name.strip(), float(size) * 1.048576e-3) for name, _, size in rows if size.strip().isdigit()]


def _free(folder: Path) -> float:
    present = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(present).free / 1e9


def hub_access(kind: str, repo: str, revision: str | None) -> None:
    """Raise ObrError if this account cannot fetch a repository: its licence, its revision, the network."""
    from huggingface_hub import HfApi

    found = hub.hub_info(repo, revision, kind)
    if getattr(found, "gated", False):
        try:
            HfApi().auth_check(repo, repo_type=kind)
        except hub.hub_exceptions() as error:
            raise hub.hub_error(error, repo if kind == "model" else f"datasets/{repo}", revision) from error


@dataclass
class Preflight:
    """problems: each would stop the run. notes: what makes it slower or other than expected."""

    problems: list[str]
    notes: list[str]

    def lines(self) -> list[str]:
        """The list for people to read."""
        found = [f"PROBLEM  {problem}" for problem in self.problems] + [f"note     {note}" for note in self.notes]
        count = len(self.problems)
        verdict = (
            f"{count} problem{'s' * (count > 1)} would stop the run." if count else "Nothing would stop the run."
        )
        return [*found, verdict]


def preflight(
    config: dict, jobs: Sequence[Job], each: Sequence[Price], machine: Machine, gpu_memory: float | None = None
) -> Preflight:
    """What would stop these jobs on a machine.

    Args:
        config: as Snakemake validated it.
        jobs, each: of the dry run, and their prices.
        gpu_memory: GB of the GPUs that will be used, if they are not those of this machine.
    """
    found = Preflight([], [])
    _check_sources(config, jobs, machine, found)
    _check_packages(jobs, machine, found)
    _check_memory(config, jobs, each, machine, gpu_memory, found)
    results = Path(config["results"])
    needed, free = _peak(config, jobs, each, machine), machine.free(results)
    if needed > free:
        found.problems.append(
            f"The run takes {needed:.1f} GB of {results} at its peak and {free:.1f} GB are free; free some, set "
            "`results`, take fewer models by `only_models`, or drop weights that are evaluated by `keep`."
        )
    if machine.compiler is None and any(job.rule in ("compress", "kernels", "sensitivity") for job in jobs):
        found.notes.append("No C++ compiler is found, so compression on a CPU is slower; install g++ or clang++.")
    return found


def _peak(config: dict, jobs: Sequence[Job], each: Sequence[Price], machine: Machine) -> float:
    """GB on the disk at the peak, with the cores and GPUs of this machine."""
    on_gpu = [job.rule in TIMED and config["device"] == "cuda" for job in jobs]
    seconds = [price.seconds for price in each]
    when = spans(list(jobs), seconds, on_gpu, os.cpu_count() or 1, max(1, len(machine.gpus)))
    return peak_disk(list(jobs), when, [price.disk for price in each], [price.scratch for price in each])


def _check_sources(config: dict, jobs: Sequence[Job], machine: Machine, found: Preflight) -> None:
    """Local files that are not there, and repositories of the hub that cannot be had."""
    asked: dict[tuple, str | None] = {}
    refused: dict[tuple[str, str], list[str]] = defaultdict(list)  # (entry, sentence): models
    unreachable: list[str] = []
    for job in (job for job in jobs if job.rule in SOURCES):
        section, wildcard = SOURCES[job.rule]
        entry, model = config[section][job.wildcards[wildcard]], job.wildcards.get("model", "")
        source = entry["source"] if isinstance(entry.get("source"), dict) else entry
        where = f"{section}.{job.wildcards[wildcard]}"
        if section == "rotations" and _is_not_taken(config, model, entry):
            continue
        if source.get("source") == "path":
            if sentence := _local(source, model, entry.get("format")):
                refused[where, sentence].append(model)
        elif source.get("source") == "hub" and source.get("repo"):
            key = ("dataset" if section == "texts" else "model", source["repo"], source.get("revision"))
            if key not in asked:
                asked[key] = unreachable[0] if unreachable else _refusal(machine, *key)
            if sentence := asked[key]:
                if "cannot be reached" in sentence or "HF_HUB_OFFLINE" in sentence:
                    unreachable.append(sentence)
                else:
                    refused[where, sentence].append(model)
    for (where, sentence), models in refused.items():
        named = f" for {', '.join(models)}" if where.startswith("rotations.") else ""
        found.problems.append(f"{where}{named}: {sentence}")
    if unreachable:
        found.problems.append(f"{len(unreachable)} downloads of the hub cannot start; the first: {unreachable[0]}")


def _is_not_taken(config: dict, model: str, entry: dict) -> bool:
    """Whether a model that is there, downloaded or in a local folder, is of a family that takes no such rotation."""
    if entry.get("format", "obr") == "obr":  # of any kind
        return False
    folders, source = (
        [paths.folder(config["results"], "model_config", model=model)],
        config["models"][model]["source"],
    )
    if source.get("source") == "path":
        folders.append(Path(os.path.expandvars(source["path"])).expanduser())
    for folder in folders:
        if (folder / "config.json").is_file():
            return objection_to_file(read_config(folder, model), entry["format"]) is not None
    return False


def missing_files(config: dict, jobs: Sequence[Job]) -> list[str]:
    """Local files of pending jobs that are not there, one sentence for each entry of the configuration."""
    found = Preflight([], [])
    _check_sources(config, jobs, Machine([], 0.0, _free, None, lambda *_: None), found)
    return found.problems


def _local(source: dict, model: str, form: str | None) -> str | None:
    """What is wrong with a local source, in one sentence; the model's name in it stays `{model}`."""
    name = source.get("path") or source.get("file") or ""
    own = name.replace("{model}", model)
    try:
        hub.local_path(own)
    except ObrError as error:
        sentence = str(error).replace(own, name)
        return f"{sentence.removesuffix('.')}; {WHERE[form]}." if form in WHERE else sentence
    return None


def _refusal(machine: Machine, kind: str, repo: str, revision: str | None) -> str | None:
    try:
        machine.access(kind, repo, revision)
    except ObrError as error:
        return str(error)
    return None


def _check_packages(jobs: Sequence[Job], machine: Machine, found: Preflight) -> None:
    missing: dict[str, set[str]] = defaultdict(set)
    for rule in sorted({job.rule for job in jobs} & set(PACKAGES)):
        names, extra = PACKAGES[rule]
        missing[extra] |= {name for name in names if not machine.importable(name)}
    for extra, names in missing.items():
        if names:
            found.problems.append(
                f"Package {' and '.join(sorted(names))} cannot be imported; pip install 'obr[{extra}]' installs it."
            )


def _check_memory(
    config: dict, jobs: Sequence[Job], each: Sequence[Price], machine: Machine, gpu_memory: float | None,
    found: Preflight,
) -> None:  # fmt: skip
    timed = [(job, price) for job, price in zip(jobs, each, strict=True) if job.rule in TIMED]
    if config["device"] == "cuda" and timed:
        if not machine.gpus and gpu_memory is None:
            found.problems.append("device is 'cuda' but no NVIDIA GPU is visible; use --config device=cpu.")
        card = gpu_memory or min((size for _, size in machine.gpus), default=None)
        if card is not None:
            found.problems += _too_large(timed, [price.gpu for _, price in timed], card, "a GPU")
    found.problems += _too_large(timed, [price.host for _, price in timed], machine.host - MARGIN, "this machine")


def _too_large(timed: Sequence[tuple[Job, Price]], needed: Sequence[float], room: float, where: str) -> list[str]:
    """One sentence for each rule and model whose jobs need more memory than there is."""
    largest: dict[tuple[str, str], tuple[float, int]] = {}
    for (job, _), size in zip(timed, needed, strict=True):
        if size > room:
            key = (job.rule, job.wildcards["model"])
            most, count = largest.get(key, (0.0, 0))
            largest[key] = (max(most, size), count + 1)
    return [
        f"{count} job{'s' * (count > 1)} of {rule} of {model} need{'s' * (count == 1)} up to {size:.1f} GB of "
        f"{where}, which has {room:.1f}; use a larger one, or leave the model out by `only_models`."
        for (rule, model), (size, count) in largest.items()
    ]
