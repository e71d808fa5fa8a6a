"""Timing: repeat, take the median, show the spread; and the machine it was on."""

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch


def timed(
    function: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[float], object]:
    """Seconds of each call by the clock on the wall, or another, and what the last one returned."""
    seconds, result = [], None
    for _ in range(repeats):
        start = clock()
        result = function()
        seconds.append(clock() - start)
    return seconds, result


def clock_of(threads: int) -> Callable[[], float]:
    """For work on so many threads. One thread's time is the processor's, which other work on the machine does not
    take from, only from memory and caches; that of several is the wall's.
    """
    return time.process_time if threads == 1 else time.perf_counter


def alternately(
    functions: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, list[float]], dict]:
    """Seconds and last result of each function, called in turns, so that a slow minute slows all of them."""
    seconds, results = {name: [] for name in functions}, {}
    for _ in range(repeats):
        for name, function in functions.items():
            (taken,), results[name] = timed(function, 1, clock)
            seconds[name].append(taken)
    return seconds, results


def summary(name: str, seconds: list[float]) -> dict[str, float]:
    """{name_s: median, name_min_s, name_max_s} in seconds."""
    return {f"{name}_s": median(seconds), f"{name}_min_s": min(seconds), f"{name}_max_s": max(seconds)}


def counted(count: int, noun: str) -> str:
    """ "1 thread", "2 threads"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def machine() -> dict[str, str | int]:
    """What a figure in seconds belongs to: processor, cores, threads in use, torch."""
    return {
        "cpu": _processor(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in named:
        return platform.processor() or platform.machine()
    # A virtual machine may hide the model's number behind a bare "AMD EPYC": family and model then name it.
    return f"{named['model name']} (family {named.get('cpu family')}, model {named.get('model')})"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
