"""How far a stage is: a bar on a terminal, a line a block in a log file, both with the time that is left."""

import sys
import time

from tqdm import tqdm


class Progress:
    """Counts the blocks of a model as a stage gets through them.

    Blocks that an interrupted run had finished count as done, but say nothing of the speed.

    Args:
        what: the stage. total: blocks. shown: False for silence.
    """

    def __init__(self, what: str, total: int, shown: bool = True):
        self.what, self.total, self.shown = what, total, shown
        self.done = self.resumed = 0
        self.started = time.monotonic()
        self.bar = None
        if shown and sys.stderr.isatty():
            self.bar = tqdm(total=total, desc=what, unit="block", smoothing=0, mininterval=0.5)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def resume(self) -> None:
        """One more block that was finished before; call before the first `block`."""
        self.done += 1
        self.resumed = self.done
        self.started = time.monotonic()
        if self.bar is not None:
            self.bar.n = self.bar.initial = self.done
            self.bar.start_t = self.bar.last_print_t = time.time()
            self.bar.refresh()
        elif self.shown and self.done == 1:
            print(f"{self.what}: going on with an interrupted run", file=sys.stderr, flush=True)

    def layer(self, place: str) -> None:
        """What is being worked on inside the block, for the bar."""
        if self.bar is not None:
            self.bar.set_postfix_str(place)

    def block(self) -> None:
        """One more block is done."""
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        elif self.shown:
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """Such as "obr_gptq: block 3 of 30, 12 s elapsed, 108 s left"."""
        elapsed = time.monotonic() - self.started
        left = elapsed / max(self.done - self.resumed, 1) * (self.total - self.done)
        return f"{self.what}: block {self.done} of {self.total}, {_clock(elapsed)} elapsed, {_clock(left)} left"


def _clock(seconds: float) -> str:
    return tqdm.format_interval(seconds)
