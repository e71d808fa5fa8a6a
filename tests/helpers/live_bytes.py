"""The largest number of bytes that PyTorch held at once while a function ran, on top of what it held before."""

import gc
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], object]) -> int:
    """Of the CPU's allocator, in any thread."""
    gc.collect()  # what is freed meanwhile counts as less
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    live = peak = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
