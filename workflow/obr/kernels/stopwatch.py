"""Times of a matrix product: cold caches, and a budget of seconds that bounds the number of runs."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

clock = time.perf_counter
LEAST = 3  # timed runs, whatever they take; one where a single run takes longer than the whole budget
WARMUP_SHARE = 0.25  # of the budget: untimed runs end there, the run that was checked included


@dataclass(frozen=True)
class Budget:
    """How long a product may be timed.

    seconds: for all its runs, those of the caches' buffer included. repeats: the most timed runs. warmup: the most
    untimed ones.
    """

    seconds: float
    repeats: int
    warmup: int

    def warmups(self, each: float) -> int:
        """Untimed runs of `each` seconds, of which one is over."""
        return min(self.warmup, max(0, int(WARMUP_SHARE * self.seconds / max(each, 1e-9)) - 1))

    def least(self, each: float) -> int:
        """Timed runs that are made whatever they take."""
        return min(self.repeats, 1 if each > self.seconds else LEAST)

    def fitting(self, each: float) -> int:
        """Timed runs of `each` seconds, if they are to be counted beforehand."""
        fit = int((1 - WARMUP_SHARE) * self.seconds / max(each, 1e-9))
        return min(self.repeats, max(self.least(each), fit))


def taken(run: Callable[[], object]) -> tuple[float, object]:
    """(seconds, what it returned) of one call."""
    start = clock()
    result = run()
    return clock() - start, result


def cpu_times(run: Callable[[], object], filler: Tensor, budget: Budget, each: float) -> list[float]:
    """Milliseconds of each timed run, by the clock. filler: read before each. each: seconds of the run so far."""
    end = clock() + budget.seconds
    for _ in range(budget.warmups(each)):
        run()
    times: list[float] = []
    while len(times) < budget.repeats and (len(times) < budget.least(each) or clock() < end):
        filler.sum()
        times.append(1e3 * taken(run)[0])
    return times


def cuda_times(run: Callable[[], object], device: torch.device, budget: Budget, buffer: int) -> list[float]:
    """Milliseconds of each timed run, by events; so many bytes are overwritten before each, to clear the L2 cache.

    Runs are queued without waiting for each other, so that the device never waits for the host. How many fit in the
    budget is estimated from one of them.
    """
    with torch.cuda.device(device):
        cache = torch.empty(buffer, dtype=torch.int8, device=device)

        def queued(count: int) -> list[float]:
            pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
            for start, stop in pairs:
                cache.zero_()
                start.record()
                run()
                stop.record()
            torch.cuda.synchronize(device)
            return [start.elapsed_time(stop) for start, stop in pairs]

        each, _ = taken(lambda: queued(1))
        queued(budget.warmups(each))
        return queued(budget.fitting(each))
