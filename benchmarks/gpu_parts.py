"""The parts of check_gpu.py, most valuable first; each runs in a process of its own and writes PART.csv.

    python benchmarks/gpu_parts.py products --out results/check-gpu --device cuda --seconds 120

The last line that a part prints is what the summary says of it. Rows are written as they come, so that a part that is
killed leaves those it has.
"""

import argparse
import csv
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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

    def keep(self, row: dict) -> None:
        """Add a row to the part's CSV file, whose columns are those of its first row."""
        path = self.out / f"{self.name}.csv"
        columns = None
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                columns = next(csv.reader(file), None)
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns or list(row), extrasaction="ignore")
            if columns is None:
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)


class Failed(Exception):
    """A check that did not hold; the message is the summary's."""


def device(s: Settings) -> str:
    """What machine this is."""
    import torch

    facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": find_spec("triton") is not None}
    if s.is_cuda:
        if not torch.cuda.is_available():
            raise Failed("PyTorch finds no CUDA device.")
        about = torch.cuda.get_device_properties(s.device)
        facts |= {
            "name": about.name, "capability": f"{about.major}.{about.minor}", "memory_gb": about.total_memory / 1e9,
            "multiprocessors": about.multi_processor_count, "l2_mb": about.L2_cache_size / 2**20,
            "cusparselt": torch.backends.cusparselt.is_available(),
        }  # fmt: skip
        smi = subprocess.run(["nvidia-smi"], capture_output=True, encoding="utf-8", check=False).stdout
        print(smi)
    for name, value in facts.items():
        s.keep({"name": name, "value": value})
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def kernel_tests(s: Settings) -> str:
    """Exactness of the Triton and CUDA kernels on the device."""
    files = ["tests/kernels/test_gpu.py", "tests/kernels/test_cuda.py", "tests/checkpoints/test_packed_linear.py"]
    return _pytest(s, [*files, "-k", "expansion or stored or rounded" if s.small else "not missing"])


def gpu_tests(s: Settings) -> str:
    """All tests that need a GPU."""
    return _pytest(s, ["tests/kernels/test_gpu.py", "-k", "invalid"] if s.small else ["tests", "-m", "gpu"])


def _pytest(s: Settings, arguments: list[str]) -> str:
    """Run tests; one row a test with its outcome and seconds. Raises Failed if one failed or none ran."""
    found = s.work / "junit.xml"
    found.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={found}", "-p", "no:cacheprovider", *arguments]
    subprocess.run(command, cwd=ROOT, check=False, timeout=max(s.left, 1))
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(found).getroot().iter("testcase") if found.exists() else ():
        kinds = {child.tag for child in case}
        status = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[status] += 1
        s.keep(
            {"test": f"{case.get('classname')}::{case.get('name')}", "status": status, "seconds": case.get("time")}
        )
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    if counts["failed"] or not counts["passed"]:
        raise Failed(f"Tests: {said}.")
    return f"Tests: {said}."


def products(s: Settings) -> str:
    """Checks and times of all products: dense, FP8, 2:4, INT4, packed by Triton; one shape after the other."""
    import pandas as pd

    from obr.kernels import benchmark

    sizes = (
        [(1, 256, 128)] if s.small else [(t, n, r) for t in (1, 8, 2048) for n, r in ((4096, 4096), (4096, 11008))]
    )
    refused, timed = 0, 0
    for tokens, columns, rows in sizes:
        entry = {"shapes": [{"tokens": tokens, "columns": columns, "rows": rows}], "seconds": 0.2, "repeats": 20}
        path = s.work / "shape.csv"
        benchmark.benchmark(entry, s.device, path)
        for row in pd.read_csv(path).to_dict("records"):
            refused += str(row["status"]).startswith("refused")
            timed += str(row["status"]).startswith("ok")
            s.keep(row)
    if refused:
        raise Failed(f"{refused} products are wrong, {timed} right.")
    return f"{timed} products are right and timed."


@dataclass(frozen=True)
class Part:
    """seconds: that it is thought to take on one card. shows: what for."""

    function: Callable[[Settings], str]
    seconds: float
    shows: str


def _later(name: str) -> Callable[[Settings], str]:
    """A part of gpu_models.py, which imports more."""

    def function(s: Settings) -> str:
        import gpu_models

        return getattr(gpu_models, name)(s)

    return function


# Most valuable first. Seconds are estimates: nothing here was run on a GPU yet.
PARTS = {
    "device": Part(device, 10, "which GPU, driver, PyTorch and Triton"),
    "kernel_tests": Part(kernel_tests, 90, "Triton and CUDA kernels against whole numbers, packed models too"),
    "products": Part(products, 100, "times of all products, each checked, beside FP16, FP8, 2:4 and INT4"),
    "large": Part(
        _later("large"), 120,
        "two blocks of Llama-2-7B's shape: compression, peak memory against the plan, decoding packed and not",
    ),
    "memory": Part(_later("memory_of_stages"), 60, "peak memory of compression by each method against the plan"),
    "tiny": Part(_later("tiny"), 120, "the workflow on a tiny model, its scores beside the CPU's"),
    "trees": Part(_later("trees"), 40, "zero-shot scores by prompt trees against lm-eval's own model, and times"),
    "gpu_tests": Part(gpu_tests, 60, "all tests that need a GPU"),
    "demo": Part(_later("demo"), 300, "SmolLM2's demo, its table beside the CPU's"),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(PARTS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.name}.csv").unlink(missing_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "workflow"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    try:
        print(
            PARTS[args.name].function(Settings(args.name, args.out.absolute(), args.device, args.seconds, args.small))
        )
    except Failed as reason:
        print(reason)
        return 1
    except Exception as error:  # a log whose last line says what broke
        import traceback

        traceback.print_exc()
        print(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
