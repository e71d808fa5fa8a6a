"""The benchmark of kernels: products of `kernels` are checked, then timed, on the device at hand."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from obr import int4
from obr.errors import ObrError, first_line
from obr.files import write_text
from obr.kernels import KERNELS, LAYOUTS, Case, Lacking

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
    "weight_bytes",
    "bits_per_weight",
    "tops_dense",
    "tops_executed",
    "gop",
    "read_gb_s",
    "of_bound",
    "sm_mhz",
    "sm_mhz_most",
    "device",
    "threads",
    "torch",
)
NOT_RUN = "not available: no CUDA device was at hand"


def benchmark(entry: dict, device: str, out: Path) -> None:
    """Check and time kernels on `device`; one line of the CSV file `out` for each shape and kernel.

    entry: {shapes: [{name?, tokens, columns, rows}], repeats: 20, warmup: 3, kernels?: names}.
    A product is (tokens, columns) x (rows, columns)^T. Each is first compared with the float64 product of the
    operands it multiplies (`checked`: largest error over the largest entry of the exact product); one that is
    wrong is refused and not timed. One that device or build lacks has the reason in `status`, and no time.

    Times in ms: median and quartiles of `repeats` runs. On CUDA by events, the L2 cache overwritten before
    each run; on the CPU by the clock, the caches filled with other data before each run.
    read_gb_s: 10^9 bytes that these threads read from memory in a second, median of as many reads (CPU only).
    of_bound: the time in which the weight's bytes can be read at that speed, as a share of the median; a
    product of few tokens cannot exceed 1.
    tops_dense: 2 * tokens * rows * columns / time, in 10^12 a second, zeros counted as if they were
    multiplied; tops_executed: only what the kernel multiplies, half of that for 2:4 sparsity; gop: the operations
    that it carries out, in 10^9.
    sm_mhz, sm_mhz_most: clock of the multiprocessors right after a kernel's runs, and the highest there is (CUDA).

    Raises:
        ObrError: the entry names no or an impossible shape or an unknown kernel, or there is no such device.
    """
    import pandas as pd

    target = _device(device)
    repeats, warmup = int(entry.get("repeats", 20)), int(entry.get("warmup", 3))
    if repeats < 1 or warmup < 0:
        raise ObrError(f"Benchmark repeats {repeats} and warmup {warmup}: at least one repeat, no negative warmup.")
    names, machine = _kernel_names(entry), _machine(target)
    speed = _read_speed(repeats) if target.type == "cpu" else None
    timer = _cuda_times if target.type == "cuda" else _cpu_times
    lines = []
    for shape in _shapes(entry):
        for name in names:
            line = _measure(KERNELS[name], shape, target, timer, repeats, warmup)
            if speed is not None and "median_ms" in line:
                bound = line["weight_bytes"] / speed * 1e3
                line |= {"read_gb_s": speed / 1e9, "of_bound": bound / line["median_ms"]}
            lines.append({**shape, "kernel": name, **line, **machine})
    frame = pd.DataFrame(lines, columns=list(COLUMNS))
    write_text(frame.to_csv(index=False), out)


def sizes(entry: dict, out: Path) -> None:
    """The CSV file of `benchmark` for a CUDA device that is not there: what can be known without one.

    For each shape and kernel the bytes of a weight, laid out as the kernel reads it, and the operations; `status`
    says that it was not run, and there is no time. Errors as `benchmark`.
    """
    import pandas as pd

    lines, laid_out = [], {}
    names = [name for name in _kernel_names(entry) if not name.startswith("packed")]  # those are a CPU's
    for shape in _shapes(entry):
        for name in names:
            weight = (shape["rows"], shape["columns"])
            if (name, weight) not in laid_out:
                laid_out[name, weight] = _bytes(name, weight)
            lines.append({**shape, "kernel": name, "status": NOT_RUN, **_extent(*laid_out[name, weight], shape)})
    write_text(pd.DataFrame(lines, columns=list(COLUMNS)).to_csv(index=False), out)


def _bytes(kernel: str, shape: tuple[int, int]) -> tuple[int | None, float]:
    """(bytes of a weight (r, n), share of the multiplications); None where only the device's libraries lay it out."""
    if kernel not in LAYOUTS:
        return None, 0.5 if kernel.endswith("2:4") else 1.0
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


def _machine(device: torch.device) -> dict:
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else _processor()
    return {"device": name, "threads": None if cuda else torch.get_num_threads(), "torch": torch.__version__}


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# --- Checking and timing ------------------------------------------------------------------------------


def _measure(kernel: Callable, shape: dict, device, timer: Callable, repeats: int, warmup: int) -> dict:
    """What a line says of one kernel: its status, and its times if it is there and right."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape["tokens"], shape["columns"], generator=generator).to(device)
    weight = torch.randn(shape["rows"], shape["columns"], generator=generator).to(device)
    with torch.inference_mode():
        try:
            case = kernel(x, weight)
            product = case.run()
        except (Lacking, ObrError) as reason:
            return {"status": f"not available: {reason}"}
        except (RuntimeError, AttributeError) as error:
            # PyTorch says in these that a build, a device or a shape is not provided for; so may a fault of ours,
            # hence its kind and words stand in the table and the figure.
            return {"status": f"failed, {type(error).__name__}: {first_line(error)}"}
        error, allowed = _error(case, product), TOLERANCE[product.dtype]
        if not error <= allowed:
            return {"status": f"refused: error {error:.2g} is above {allowed:g}", "checked": error}
        times = timer(case.run, device, repeats, warmup)
    status = f"ok, {case.remark}" if case.remark else "ok"
    return {"status": status, "checked": error, **_figures(case, times, shape), **_clocks(device)}


def _clocks(device: torch.device) -> dict:
    """MHz as nvidia-smi tells them; nothing where it does not, or for a CPU."""
    if device.type != "cuda":
        return {}
    which = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", which, "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        now, most = (float(part) for part in told.split(","))
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
    return {"median_ms": median, "p25_ms": p25, "p75_ms": p75, **extent, **speeds}


def _extent(weight_bytes: int | None, executed: float, shape: dict) -> dict:
    """What a product takes whatever the time: bytes and bits of the weight, where known, and operations."""
    weights = shape["rows"] * shape["columns"]
    gop = 2e-9 * shape["tokens"] * weights * executed
    if weight_bytes is None:
        return {"gop": gop}
    return {"weight_bytes": weight_bytes, "bits_per_weight": 8 * weight_bytes / weights, "gop": gop}


def _cpu_times(run: Callable, device, repeats: int, warmup: int) -> list[float]:
    for _ in range(warmup):
        run()
    others = _more_than_caches()
    times = []
    for _ in range(repeats):
        others.sum()
        start = time.perf_counter_ns()
        run()
        times.append((time.perf_counter_ns() - start) / 1e6)
    return times


def _more_than_caches() -> Tensor:
    """Four times as many bytes as the largest cache holds, of 64 MB where the system does not tell."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    largest = max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=64 << 20)
    return torch.ones(largest // 2, dtype=torch.int64)


def _read_speed(repeats: int) -> float | None:
    """Bytes a second that PyTorch's threads read from memory; None without a compiler for the loop."""
    memory, threads = _more_than_caches(), torch.get_num_threads()
    try:
        times = _cpu_times(lambda: int4.read_memory(memory, threads), None, repeats, 1)
    except ObrError:
        return None
    return memory.nbytes / statistics.median(times) * 1e3


def _cuda_times(run: Callable, device: torch.device, repeats: int, warmup: int) -> list[float]:
    with torch.cuda.device(device):
        cache = torch.empty(
            2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device
        )
        for _ in range(warmup):
            run()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, stop in pairs:
            cache.zero_()
            start.record()
            run()
            stop.record()
        torch.cuda.synchronize(device)
    return [start.elapsed_time(stop) for start, stop in pairs]
