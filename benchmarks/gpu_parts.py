"""The parts of check_gpu.py, most valuable first; each runs in a process of its own and writes PART.csv.

    python benchmarks/gpu_parts.py products --out results/check-gpu --device cuda --seconds 120

The line that a part ends with, after FOUND, is what the summary says of it; STATUSES has its exit codes. Rows are
written as they come, so that a part that is killed leaves those it has. A part ends with the process that started it.
"""

import argparse
import csv
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from obr.runtime import gpu

ROOT = Path(__file__).resolve().parents[1]
FOUND = "found: "
STATUSES = {0: "passed", 1: "failed", 3: "left out", 4: "cut short"}  # by exit code
OWN = ("packed", "(CUTLASS)")  # in the names of this package's products


@dataclass
class Settings:
    """name: of the part. out: the folder of the run. seconds: until the part is to end. small: sizes for a trial."""

    name: str
    out: Path
    device: str
    seconds: float
    small: bool
    began: float = field(default_factory=time.monotonic)

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    @property
    def work(self) -> Path:
        """A folder for models and checkpoints that the part makes."""
        folder = self.out / "work" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def table(self) -> Path:
        return self.out / f"{self.name}.csv"

    def rows(self) -> list[dict[str, str]]:
        """What `keep` has kept so far."""
        if not self.table.exists():
            return []
        with self.table.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def keep(self, row: dict) -> None:
        """Add a row to the part's CSV file; the columns are those of all rows."""
        rows = self.rows()
        known = list(rows[0]) if rows else []
        columns = list(dict.fromkeys([*known, *row]))
        whole = columns != known
        with self.table.open("w" if whole else "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            if whole:
                writer.writeheader()
                writer.writerows(rows)
            writer.writerow(row)
        print(row, flush=True)

    def run(self, command: list, what: str, **options) -> int:
        """The exit status of a program, which is ended with the part's time. Raises CutShort then."""
        try:
            return subprocess.run(command, check=False, timeout=max(self.left - 2, 1), **options).returncode
        except subprocess.TimeoutExpired:
            raise CutShort(f"{what} did not end in time.") from None


def tiny_model(s: Settings) -> str:
    """The folder of the tests' tiny model: that of OBR_TINY, or one that the parts of a run train once."""
    if "OBR_TINY" in os.environ:
        return os.environ["OBR_TINY"]
    made = s.out / "work/tiny-model"
    if not (made / "heldout.txt").exists():  # written last
        command = [sys.executable, str(ROOT / "tests/helpers/tiny_model.py"), str(made)]
        if status := s.run(command, "The training of the tiny model"):
            raise Failed(f"The tiny model could not be trained: status {status}; the log says why.")
    return str(made)


class Failed(Exception):
    """A check that did not hold; the message is the summary's."""


class LeftOut(Exception):
    """What cannot be checked here, and why."""


class CutShort(Exception):
    """A part that had no more time; what it has found."""


def device(s: Settings) -> str:
    """What machine this is."""
    import torch

    facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": find_spec("triton") is not None}
    if s.is_cuda:
        if not torch.cuda.is_available():
            raise Failed(f"PyTorch {torch.__version__} finds no CUDA device, although one is visible.")
        about = torch.cuda.get_device_properties(s.device)
        facts |= {
            "name": about.name, "capability": f"{about.major}.{about.minor}", "memory_gb": about.total_memory / 1e9,
            "multiprocessors": about.multi_processor_count, "l2_mb": about.L2_cache_size / 2**20,
            "cusparselt": torch.backends.cusparselt.is_available(),
        }  # fmt: skip
        facts["driver"] = _driver()
    for name, value in facts.items():
        s.keep({"name": name, "value": value})
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _driver() -> str | None:
    """The driver's version; nvidia-smi's table goes to the log."""
    if shutil.which("nvidia-smi") is None:
        return None
    ask = ["--query-gpu=driver_version", "--format=csv,noheader"]
    table, version = (
        subprocess.run(["nvidia-smi", *which], capture_output=True, encoding="utf-8", check=False, timeout=60).stdout
        for which in ([], ask)
    )
    print(table)
    return next(iter(version.split()), None)


def kernel_tests(s: Settings) -> str:
    """Exactness of the Triton and CUDA kernels on the device."""
    files = ["tests/kernels/test_gpu.py", "tests/kernels/test_cuda.py", "tests/checkpoints/test_packed_linear.py"]
    return _pytest(s, [*files, "-k", "expansion or stored or rounded or exact_on" if s.small else "not missing"])


def gpu_tests(s: Settings) -> str:
    """All tests that need a GPU."""
    files = ["tests/kernels", "tests/checkpoints/test_packed_linear.py"]
    return _pytest(s, [*(files if s.small else ["tests"]), "-m", "gpu"])


def _pytest(s: Settings, arguments: list[str]) -> str:
    """Run tests; one row a test. Raises Failed if one failed, and LeftOut if none could run."""
    path = [str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OBR_ROWS": str(s.table)}
    if not s.small:  # at small sizes no test of the kernels needs it
        environment["OBR_TINY"] = tiny_model(s)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pytest_rows", "-p", "no:cacheprovider", *arguments]
    try:
        status = s.run(command, "pytest", cwd=ROOT, env=environment)
    except CutShort as reason:
        raise CutShort(f"{_tests(s)} {reason}") from None
    statuses = Counter(row["status"] for row in s.rows())
    if status not in (0, 5) or statuses["failed"] or not statuses:
        raise Failed(f"{_tests(s)} pytest ended with {status}.")
    if not statuses["passed"]:
        raise LeftOut(_tests(s))
    return _tests(s)


def _tests(s: Settings) -> str:
    """How many tests passed, failed and were skipped, and why the latter."""
    rows = s.rows()
    counts = Counter(row["status"] for row in rows)
    reasons = Counter(row["reason"] for row in rows if row["status"] == "skipped")
    why = "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common())
    said = ", ".join(f"{counts[status]} {status}" for status in ("passed", "failed", "skipped"))
    return f"Tests: {said}{f' ({why})' if why else ''}."


def products(s: Settings) -> str:
    """Checks and times of all products: dense, FP8, 2:4, INT4, packed by Triton; one shape after the other."""
    import pandas as pd

    from obr.kernels import benchmark

    sizes = (
        [(1, 256, 128)] if s.small else [(t, n, r) for t in (1, 8, 2048) for n, r in ((4096, 4096), (4096, 11008))]
    )
    for tokens, columns, rows in sizes:
        if s.left < 5 and s.rows():
            raise CutShort(_counted(s.rows()))
        entry = {"shapes": [{"tokens": tokens, "columns": columns, "rows": rows}], "seconds": 0.2, "repeats": 20}
        path = s.work / "shape.csv"
        benchmark.benchmark(entry, s.device, path)
        for row in pd.read_csv(path, keep_default_na=False).to_dict("records"):
            s.keep(row)
    found = s.rows()
    wrong = [row for row in found if row["status"].startswith("refused") or _broken(row)]
    if wrong or not any(row["status"].startswith("ok") for row in found):
        first = f" {wrong[0]['kernel']} is {wrong[0]['status']}" if wrong else ""
        raise Failed(f"{_counted(found)}{first}")
    return _counted(found)


def _broken(row: dict[str, str]) -> bool:
    """Whether a product of this package failed, or any with an error after which a GPU computes nothing more."""
    is_own = any(word in row["kernel"] for word in OWN)
    return row["status"].startswith("failed") and (is_own or bool(gpu.LOST_GPU.search(row["status"])))


def _counted(rows: list[dict[str, str]]) -> str:
    """How many products were timed, wrong, and not to be had, with the reasons of the latter."""
    kinds = Counter(row["status"].partition(",")[0].partition(":")[0] for row in rows)
    reasons = Counter(row["status"] for row in rows if row["status"].startswith(("not available", "failed")))
    said = f"{kinds['ok']} products right and timed, {kinds['refused']} wrong"
    said += f", {kinds['skipped']} skipped" if kinds["skipped"] else ""
    why = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return f"{said}; {why}." if why else f"{said}."


@dataclass(frozen=True)
class Part:
    """A check. seconds: what it is thought to take on one card. shows: what for. starts_jobs: that reserve a GPU."""

    function: Callable[[Settings], str]
    seconds: float
    shows: str
    starts_jobs: bool = False

    def run(self, s: Settings) -> str:
        """What the part has found, on a GPU that no job of this package's uses besides."""
        if s.is_cuda and not self.starts_jobs:
            try:
                gpu.claim("cuda")
            except CutShort as reason:
                raise CutShort(f"The GPU was reserved by another job all the time. {reason}") from None
        return self.function(s)


def _later(name: str) -> Callable[[Settings], str]:
    """A part of gpu_models.py, which imports more."""

    def function(s: Settings) -> str:
        import gpu_models

        return getattr(gpu_models, name)(s)

    return function


# Most valuable first. Seconds are estimates: nothing here was run on a GPU yet.
PARTS = {
    "device": Part(device, 10, "which GPU, driver, PyTorch and Triton"),
    "kernel_tests": Part(kernel_tests, 90, "Triton and CUDA kernels against whole numbers, packed models too", True),
    "products": Part(products, 100, "times of all products, each checked, beside FP16, FP8, 2:4 and INT4"),
    "large": Part(
        _later("large"), 120,
        "two blocks of Llama-2-7B's shape: compression, peak memory against the plan, decoding packed and not",
    ),
    "memory": Part(_later("memory_of_stages"), 60, "peak memory of compression by each method against the plan"),
    "tiny": Part(_later("tiny"), 120, "the workflow on a tiny model, its scores beside the CPU's", True),
    "trees": Part(_later("trees"), 40, "zero-shot scores by prompt trees against lm-eval's own model, and times"),
    "gpu_tests": Part(gpu_tests, 60, "all tests that need a GPU", True),
    "demo": Part(_later("demo"), 300, "SmolLM2's demo, its table beside the CPU's", True),
}  # fmt: skip


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    s = Settings(args.name, args.out.absolute(), args.device, args.seconds, args.small)
    s.out.mkdir(parents=True, exist_ok=True)
    s.table.unlink(missing_ok=True)
    shutil.rmtree(s.work)  # of a run that was killed: its workflow's lock, its checkpoints
    try:
        status, said = 0, PARTS[args.name].run(s)
        shutil.rmtree(s.work)  # gigabytes, which only a part that failed leaves to be looked at
    except (Failed, LeftOut, CutShort) as reason:
        status, said = {Failed: 1, LeftOut: 3, CutShort: 4}[type(reason)], str(reason)
        if isinstance(reason, CutShort):
            said = f"{said} Rows kept: {len(s.rows())}."
    except Exception as error:
        import traceback

        traceback.print_exc()
        text = str(error).strip().splitlines()
        status, said = 1, gpu.taken_away(error) or f"{type(error).__name__}: {text[0] if text else ''}"
    print(f"\n{FOUND}{said}", flush=True)
    return status


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(PARTS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--small", action="store_true")
    return parser.parse_args()


def _stop(number: int, frame) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)
    raise CutShort(f"Ended by {signal.Signals(number).name}.")


def _end_with(parent: int) -> None:
    """End this part and what it has started when the process that started it is gone, killed for instance."""
    while os.getppid() == parent:
        time.sleep(0.5)
    if os.getpgrp() == os.getpid():  # a group of its own
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    import gpu_parts  # the module that gpu_models imports, with the same exceptions

    sys.exit(gpu_parts.main())
