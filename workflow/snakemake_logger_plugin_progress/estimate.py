"""How long a run of the workflow will still take, from the jobs that have finished."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

from snakemake_interface_logger_plugins.common import LogEvent

# How long a job takes beside one of the others, until a job of its rule has finished.
WEIGHTS = {
    "compress": 60.0, "sensitivity": 60.0, "learn_rotation": 60.0, "hessian": 40.0, "gradients": 40.0,
    "generate": 40.0,
    "evaluate": 30.0, "perplexity": 15.0, "zero_shot": 30.0, "kernels": 15.0, "download_model": 10.0,
}  # fmt: skip
WEIGHT = 3.0


class Estimate:
    """Counts jobs as Snakemake reports them.

    Args:
        clock: seconds, from any beginning.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock, self.begun = clock, clock()
        self.total = self.done = 0
        self.waiting: Counter[str] = Counter()  # jobs by rule, running ones among them
        self.jobs: dict[int, tuple[str, str, float]] = {}  # running ones: rule, name, start
        self.taken: dict[str, list[float]] = defaultdict(list)

    def take(self, event: LogEvent | None, fields: Mapping) -> None:
        """Note an event and its fields."""
        if event == LogEvent.RUN_INFO:
            counts = dict(fields["stats"])
            self.total, self.begun = counts.pop("total"), self.clock()
            self.waiting = Counter(counts)
        elif event == LogEvent.JOB_INFO:
            names = fields.get("wildcards") or {}
            label = fields.get("rule_msg") or " ".join([fields["rule_name"], *(str(names[key]) for key in names)])
            self.jobs[fields["jobid"]] = (fields["rule_name"], label, self.clock())
        elif event == LogEvent.JOB_FINISHED and fields["job_id"] in self.jobs:
            rule, _, start = self.jobs.pop(fields["job_id"])
            self.taken[rule].append(self.clock() - start)
            self.waiting[rule] -= 1
        elif event == LogEvent.JOB_ERROR:
            self.jobs.pop(fields.get("jobid"), None)
        elif event == LogEvent.PROGRESS:
            self.done, self.total = fields["done"], fields["total"]

    @property
    def running(self) -> list[str]:
        """The names of running jobs, the oldest first."""
        return [name for _, name, _ in self.jobs.values()]

    def left(self) -> float | None:
        """Seconds until the end, None before the first job has finished.

        Jobs are expected to take as long as the finished ones of their rule, and those of other rules in proportion
        to WEIGHTS. As many run at a time as have run so far.
        """
        busy = sum(map(sum, self.taken.values()))
        elapsed = self.clock() - self.begun
        if not busy or elapsed <= 0:
            return None
        weighed = sum(len(times) * WEIGHTS.get(rule, WEIGHT) for rule, times in self.taken.items())
        mean = {rule: sum(times) / len(times) for rule, times in self.taken.items()}
        expected = {rule: mean.get(rule, busy / weighed * WEIGHTS.get(rule, WEIGHT)) for rule in self.waiting}
        now = [(rule, self.clock() - start) for rule, _, start in self.jobs.values()]
        begun = sum(min(spent, expected.get(rule, 0.0)) for rule, spent in now)
        work = sum(expected[rule] * max(count, 0) for rule, count in self.waiting.items()) - begun
        return max(work, 0.0) / max(1.0, (busy + sum(spent for _, spent in now)) / elapsed)

    def sentence(self) -> str:
        """Such as "12 min elapsed, about 35 min left"."""
        left = self.left()
        elapsed = f"{_span(self.clock() - self.begun)} elapsed"
        return elapsed if left is None else f"{elapsed}, about {_span(left)} left"


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
