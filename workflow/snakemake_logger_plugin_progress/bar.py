"""The bar on a terminal: running jobs, jobs that are done, the time that is left."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from snakemake_logger_plugin_progress.estimate import Estimate

JOBS = 6  # running ones that are named


class Bar(Progress):
    """One bar for all jobs, below the names of those that run.

    Args:
        stream: a terminal.
        plain: whether to leave out colours.
    """

    def __init__(self, stream: TextIO, plain: bool):
        self.names: list[str] = []
        self.task = None
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        super().__init__(*columns, console=Console(file=stream, no_color=plain), transient=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        for name in self.names[:JOBS]:
            yield Text(f"  {name}", overflow="ellipsis", no_wrap=True)
        if len(self.names) > JOBS:
            yield Text(f"  and {len(self.names) - JOBS} more")
        yield from super().get_renderables()

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, estimate: Estimate) -> None:
        """Draw the state of the run; nothing before the number of jobs is known."""
        if not estimate.total:
            return
        if self.task is None:
            self.task = self.add_task("", total=estimate.total, left="")
            self.start()
        self.names = estimate.running
        self.update(
            self.task, completed=estimate.done, total=estimate.total, left=estimate.sentence(),
            description=f"{estimate.done} of {estimate.total} jobs",
            refresh=True,  # jobs shorter than the interval of the drawing thread are seen as well
        )  # fmt: skip

    def close(self) -> None:
        """Remove the bar."""
        self.stop()
