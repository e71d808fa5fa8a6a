"""When jobs run on so many cores and GPUs, and how much disk they take at once."""

import heapq
from collections import defaultdict

from obr.planning.dry_run import Job


def schedule(jobs: list[Job], seconds: list[float], on_gpu: list[bool], cores: int, gpus: int) -> float:
    """Seconds until all jobs are done, if each begins as soon as its inputs, cores and a GPU are there.

    Example:
        >>> jobs = [Job("hessian", {}, 1, ()), Job("compress", {}, 1, (), after=(0,)), Job("table", {}, 1, ())]
        >>> schedule(jobs, [3.0, 4.0, 5.0], [False] * 3, cores=2, gpus=0)
        7.0
    """
    return max((end for _, end in spans(jobs, seconds, on_gpu, cores, gpus)), default=0.0)


def spans(
    jobs: list[Job], seconds: list[float], on_gpu: list[bool], cores: int, gpus: int
) -> list[tuple[float, float]]:
    """(begin, end) of each job, in seconds."""
    waiting = [len(job.after) for job in jobs]
    next_of: dict[int, list[int]] = defaultdict(list)
    for number, job in enumerate(jobs):
        for before in job.after:
            next_of[before].append(number)
    ready = [number for number in range(len(jobs)) if not waiting[number]]
    running: list[tuple[float, int]] = []
    now, free, devices = 0.0, cores, gpus
    found = [(0.0, 0.0)] * len(jobs)
    while ready or running:
        for number in sorted(ready, key=lambda n: (-jobs[n].priority, -seconds[n])):
            if jobs[number].threads <= free and (devices or not on_gpu[number]):
                ready.remove(number)
                free, devices = free - jobs[number].threads, devices - on_gpu[number]
                found[number] = now, now + seconds[number]
                heapq.heappush(running, (found[number][1], number))
        now, number = heapq.heappop(running)
        free, devices = free + jobs[number].threads, devices + on_gpu[number]
        for other in next_of[number]:
            waiting[other] -= 1
            if not waiting[other]:
                ready.append(other)
    return found


def peak_disk(jobs: list[Job], when: list[tuple[float, float]], kept: list[float], scratch: list[float]) -> float:
    """The most GB that lie on the disk at once.

    when: (begin, end) of each job. kept: GB of its outputs, from its beginning on; temporary ones go when the last
    job that reads them ends. scratch: GB besides, as long as it runs.
    """
    read_until = [end for _, end in when]
    for number, job in enumerate(jobs):
        for before in job.holds:
            read_until[before] = max(read_until[before], when[number][1])
    changes = []
    for number, (begin, end) in enumerate(when):
        changes += [(begin, kept[number] + scratch[number]), (end, -scratch[number])]
        if jobs[number].temporary:
            changes.append((read_until[number], -kept[number]))
    taken = peak = 0.0
    for _, change in sorted(changes):  # what goes before what comes at the same time
        taken += change
        peak = max(peak, taken)
    return peak
