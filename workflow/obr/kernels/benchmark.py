"""The benchmark of kernels: products of `kernels` are checked, then timed, on this device."""

import math
import platform
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from obr.errors import ObrError, first_line
from obr.kernels import stopwatch
from obr.kernels.cpu_caches import Caches
from obr.kernels.int4 import packed_weight
from obr.kernels.products import KERNELS, LAYOUTS, Case, Emulated, Lacking
from obr.kernels.stopwatch import Budget
from obr.runtime.files import write_text

# Largest error, over the largest entry of the exact product, of a sound kernel with this output; rounding the
# output alone costs half a unit in the last place: 3e-8 (fp32), 2.4e-4 (fp16), 2e-3 (bf16).
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2, torch.int32: 0.0}
COLUMNS = (
    "shape",
    "tokens",
    "columns",
    "rows",
    "kernel",
    "status",
    "checked",
    "median_ms",
    "p25_ms",
    "p75_ms",
    "repeats",
    "weight_bytes",
    "bits_per_weight",
    "tops_dense",
    "tops_executed",
    "gop",
    "read_gb_s",
    "of_bound",
    "cache_mb",
    "buffer_mb",
    "caution",
    "sm_mhz",
    "sm_mhz_most",
    "device",
    "threads",
    "torch",
)
NOT_RUN = "not available: there is no CUDA device"


def benchmark(entry: dict, device: str, out: Path) -> None:
    """Check and time kernels on `device`; one line of the CSV file `out` for each shape and kernel.

    entry: {shapes: [{name?, tokens, columns, rows}], seconds: 1, repeats: 20, warmup: 3, buffer_mb: 256,
    kernels?: names}. A product is (tokens, columns) x (rows, columns)^T. Each is first compared with the float64
    product of the operands it multiplies (`checked`: largest error over the largest entry of the exact product). A
    wrong product is refused and not timed. A kernel that device or build lack, or that PyTorch would emulate, has the
    reason in `status`, and no time.

    median_ms, p25_ms, p75_ms: median and quartiles of as many runs as the column `repeats` says: the entry's
    `repeats`, or what fits in its `seconds`: at least three, or one where a single run takes longer than that.
    On CUDA by events, the L2 cache overwritten before each run; on the CPU by the clock, the caches filled with other
    data before each run.
    cache_mb, buffer_mb: 2^20 bytes of the last-level caches, and of the data that replaces their content before each
    run. On the CPU the buffer is four times the caches, but no more than the entry's `buffer_mb`.
    caution: says where weights may have stayed in the caches, or where the system does not report their size.
    read_gb_s: 10^9 bytes that these threads read from memory in a second, median of as many reads; on the CPU only,
    and not where weights may stay in the caches.
    of_bound: the time in which the weight's bytes can be read at that speed, as a share of the median; at most 1.
    tops_dense: 2 * tokens * rows * columns / time, in 10^12 a second, zeros counted as if they were
    multiplied; tops_executed: only what the kernel multiplies, half of that for 2:4 sparsity; gop: the operations
    that it carries out, in 10^9.
    sm_mhz, sm_mhz_most: clock of the multiprocessors right after a kernel's runs, and the highest there is (CUDA).

    Raises:
        ObrError: the entry names no or an impossible shape, an unknown kernel or an impossible budget, or there is no
            such device.
    """
    import pandas as pd

    target = _device(device)
    names, machine = _kernel_names(entry), _machine(target)
    bench = _Bench(target, _budget(entry), _caches(entry, target))
    speed, lines = bench.read_speed(), []
    for shape in _shapes(entry):
        x, weight = bench.operands(shape)
        for name in names:
            line = bench.measure(KERNELS[name], x, weight)
            if "median_ms" in line:
                line |= _bound(line, speed, bench.caches)
            lines.append({**shape, "kernel": name, **line, **machine, **bench.about})
    frame = pd.DataFrame(lines, columns=list(COLUMNS))
    write_text(frame.to_csv(index=False), out)


def sizes(entry: dict, out: Path) -> None:
    """The CSV file of `benchmark` where there is no CUDA device: what can be computed without one.

    For each shape and kernel the bytes of a weight, laid out as the kernel reads it, and the operations; `status`
    says that it was not run, and there is no time. Errors as `benchmark`.
    """
    import pandas as pd

    lines, laid_out = [], {}
    names = _kernel_names(entry)
    for shape in _shapes(entry):
        for name in names:
            weight = (shape["rows"], shape["columns"])
            key = LAYOUTS.get(name, name), weight  # two kernels may share a layout
            if key not in laid_out:
                laid_out[key] = _bytes(name, weight)
            lines.append({**shape, "kernel": name, "status": NOT_RUN, **_extent(*laid_out[key], shape)})
    write_text(pd.DataFrame(lines, columns=list(COLUMNS)).to_csv(index=False), out)


def _bytes(kernel: str, shape: tuple[int, int]) -> tuple[int | None, float]:
    """(bytes of a weight (r, n), share of the multiplications); None where only the device's libraries lay it out."""
    if kernel not in LAYOUTS:
        return None, 0.5 if kernel.endswith(("2:4", "4:8")) else 1.0
    stored, executed = LAYOUTS[kernel](torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    return sum(part.nbytes for part in stored), executed


# --- Asking -------------------------------------------------------------------------------------------


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ObrError(f"Device {name!r} is unknown; use cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise ObrError(f"Device {name!r} cannot be benchmarked; use cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ObrError(f"Device {name!r} is not there ({torch.cuda.device_count()} CUDA devices); use cpu.")
    return device


def _shapes(entry: dict) -> list[dict]:
    if not entry.get("shapes"):
        raise ObrError("The benchmark has no shapes; list {tokens, columns, rows} under `shapes`.")
    shapes = []
    for shape in entry["shapes"]:
        sizes = {key: shape.get(key) for key in ("tokens", "columns", "rows")}
        if not all(isinstance(size, int) and size > 0 for size in sizes.values()):
            raise ObrError(f"Benchmark shape {shape} needs positive whole numbers tokens, columns and rows.")
        shapes.append({"shape": shape.get("name") or "x".join(map(str, sizes.values())), **sizes})
    return shapes


def _kernel_names(entry: dict) -> list[str]:
    names = entry.get("kernels") or list(KERNELS)
    for name in names:
        if name not in KERNELS:
            raise ObrError(f"Kernel {name!r} is unknown; choose from {', '.join(KERNELS)}.")
    return names


def _budget(entry: dict) -> Budget:
    budget = Budget(entry.get("seconds", 1.0), entry.get("repeats", 20), entry.get("warmup", 3))
    if not (isinstance(budget.seconds, int | float) and 0 < budget.seconds < math.inf):
        raise ObrError(f"Benchmark seconds {budget.seconds!r} is no positive number; give a kernel 1, say.")
    counts = (budget.repeats, budget.warmup)
    if not all(isinstance(count, int) for count in counts) or budget.repeats < 1 or budget.warmup < 0:
        raise ObrError(
            f"Benchmark repeats {budget.repeats!r} and warmup {budget.warmup!r}: set at least one repeat and no "
            "negative warmup."
        )
    return budget


def _caches(entry: dict, device: torch.device) -> Caches:
    limit = entry.get("buffer_mb", 256)
    if not isinstance(limit, int) or limit < 1:
        raise ObrError(f"Benchmark buffer_mb {limit!r} is no positive whole number; set the default, 256.")
    if device.type == "cuda":
        last_level = torch.cuda.get_device_properties(device).L2_cache_size
        return Caches(last_level, True, 2 * last_level)
    return Caches.of_this_machine(limit << 20)


def _machine(device: torch.device) -> dict:
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else _processor()
    return {"device": name, "threads": None if cuda else torch.get_num_threads(), "torch": torch.__version__}


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# --- Checking and timing ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bench:
    """What all lines of a benchmark share: the device, the time a kernel may take, the caches to be cleared."""

    device: torch.device
    budget: Budget
    caches: Caches

    @property
    def about(self) -> dict:
        return {"cache_mb": self.caches.bytes / 2**20, "buffer_mb": self.caches.buffer / 2**20}

    @cached_property
    def filler(self) -> Tensor:
        return self.caches.filler()

    def times(self, run: Callable[[], object], each: float) -> list[float]:
        """Milliseconds of each run. each: seconds that a run took before."""
        if self.device.type == "cuda":
            return stopwatch.cuda_times(run, self.device, self.budget, self.caches.buffer)
        return stopwatch.cpu_times(run, self.filler, self.budget, each)

    def read_speed(self) -> float | None:
        """Bytes a second that PyTorch's threads read from memory.

        None on CUDA, without a compiler for the loop, and where the memory that is read may lie in the caches.
        """
        if self.device.type == "cuda" or not self.caches.cleared:
            return None
        memory, threads = self.caches.filler(), torch.get_num_threads()
        try:
            seconds, _ = stopwatch.taken(lambda: packed_weight.read_memory(memory, threads))
        except ObrError:
            return None
        times = self.times(lambda: packed_weight.read_memory(memory, threads), seconds)
        return memory.nbytes / statistics.median(times) * 1e3

    def operands(self, shape: dict) -> tuple[Tensor, Tensor]:
        """Random x (t, n) and weight (r, n), float32."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape["tokens"], shape["columns"], generator=generator)
        weight = torch.randn(shape["rows"], shape["columns"], generator=generator)
        return x.to(self.device), weight.to(self.device)

    def measure(self, kernel: Callable, x: Tensor, weight: Tensor) -> dict:
        """What a line says of one kernel: its status, and its times if it is there and right."""
        shape = {"tokens": len(x), "columns": x.shape[1], "rows": len(weight)}
        with torch.inference_mode():
            try:
                case = kernel(x, weight)
                seconds, product = stopwatch.taken(case.run)
            except (Lacking, ObrError) as reason:
                return {"status": f"{'skipped' if isinstance(reason, Emulated) else 'not available'}: {reason}"}
            except (RuntimeError, AttributeError) as error:
                # PyTorch says in these that a build, a device or a shape is not provided for; so may a fault of ours,
                # hence its kind and words stand in the table and the figure.
                return {"status": f"failed, {type(error).__name__}: {first_line(error)}"}
            error, allowed = _error(case, product), TOLERANCE[product.dtype]
            if not error <= allowed:
                return {"status": f"refused: error {error:.2g} is above {allowed:g}", "checked": error}
            times = self.times(case.run, seconds)
        status = f"ok, {case.remark}" if case.remark else "ok"
        return {"status": status, "checked": error, **_figures(case, times, shape), **_clocks(self.device)}


def _bound(line: dict, speed: float | None, caches: Caches) -> dict:
    """Of a kernel that was timed: its share of the read bound, or why it has none. speed: bytes a second."""
    cautions = [caches.caution] if caches.caution else []
    found = {}
    if speed is not None:
        share = line["weight_bytes"] / speed * 1e3 / line["median_ms"]
        found = {"read_gb_s": speed / 1e9, "of_bound": share if share <= 1 else None}
        if share > 1:
            cautions.append("weights may stay in the cache: they were read faster than memory is")
    return {**found, "caution": "; ".join(cautions) or None}


def _clocks(device: torch.device) -> dict:
    """MHz as nvidia-smi tells them; nothing where it does not, or for a CPU."""
    if device.type != "cuda":
        return {}
    which = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", which, "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=10
        ).stdout
        now, most = (float(part) for part in answer.split(","))
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    return {"sm_mhz": now, "sm_mhz_most": most}


def _error(case: Case, product: Tensor) -> float:
    """Largest error of `product` (t, r) over the largest entry of the exact one; NaN if it holds a NaN."""
    errors, largest = [], []
    for start in range(0, len(case.x), 4096):  # a few rows at a time: float64 copies are large
        part = slice(start, start + 4096)
        exact = case.x[part].double() @ case.weight.double().T
        errors.append((product[part].double() - exact).abs().max())
        largest.append(exact.abs().max())
    return (torch.stack(errors).max() / torch.stack(largest).max()).item()


def _figures(case: Case, times: list[float], shape: dict) -> dict:
    """times: ms."""
    p25, median, p75 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    extent = _extent(sum(part.nbytes for part in case.stored), case.executed, shape)
    executed = extent["gop"] / median  # 10^9 in a thousandth of a second: 10^12 a second
    speeds = {"tops_dense": executed / case.executed, "tops_executed": executed}
    spread = {"p25_ms": p25, "p75_ms": p75, "repeats": len(times)}
    return {"median_ms": median, **spread, **extent, **speeds}


def _extent(weight_bytes: int | None, executed: float, shape: dict) -> dict:
    """What a product takes whatever the time: bytes and bits of the weight, where known, and operations."""
    weights = shape["rows"] * shape["columns"]
    gop = 2e-9 * shape["tokens"] * weights * executed
    if weight_bytes is None:
        return {"gop": gop}
    return {"weight_bytes": weight_bytes, "bits_per_weight": 8 * weight_bytes / weights, "gop": gop}
