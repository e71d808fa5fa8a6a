"""How long jobs take on so many cores and GPUs."""

import heapq
from collections import defaultdict

from obr.planning.dry_run import Job


def schedule(jobs: list[Job], seconds: list[float], on_gpu: list[bool], cores: int, gpus: int) -> float:
    """Seconds until all jobs are done, if each begins as soon as its inputs, cores and a GPU are there."""
    waiting = [len(job.after) for job in jobs]
    next_of: dict[int, list[int]] = defaultdict(list)
    for number, job in enumerate(jobs):
        for before in job.after:
            next_of[before].append(number)
    ready = [number for number in range(len(jobs)) if not waiting[number]]
    running: list[tuple[float, int]] = []
    now, free, devices = 0.0, cores, gpus
    while ready or running:
        for number in sorted(ready, key=lambda n: -seconds[n]):
            if jobs[number].threads <= free and (devices or not on_gpu[number]):
                ready.remove(number)
                free, devices = free - jobs[number].threads, devices - on_gpu[number]
                heapq.heappush(running, (now + seconds[number], number))
        now, number = heapq.heappop(running)
        free, devices = free + jobs[number].threads, devices + on_gpu[number]
        for other in next_of[number]:
            waiting[other] -= 1
            if not waiting[other]:
                ready.append(other)
    return now
