"""A logger plugin of Snakemake: on a terminal a progress bar with the time that is left, elsewhere the usual lines.

The default profile names it. Snakemake finds it by its module name, as it finds every logger plugin.
"""

from __future__ import annotations

import re
import sys
from copy import copy
from logging import LogRecord

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from snakemake_logger_plugin_progress.estimate import Estimate

# What the bar shows instead of lines.
SHOWN = (LogEvent.JOB_INFO, LogEvent.JOB_STARTED, LogEvent.JOB_FINISHED, LogEvent.PROGRESS, LogEvent.RESOURCES_INFO)
SELECTING = "Select jobs to execute..."  # once per round of jobs
# Once for each file of the configuration, which is laid over another: nothing that a user has to know.
EXTENDED = re.compile(r"Config file \S+ is extended by additional config specified via the command line\.")


class LogHandler(LogHandlerBase):
    """Prints Snakemake's own lines, by its own filter and format; on a terminal the jobs are a bar below them."""

    def __post_init__(self) -> None:
        self.stream = sys.stdout if self.common_settings.stdout else sys.stderr
        self.estimate = Estimate()
        self.bar = None
        if self.stream.isatty() and not self.common_settings.dryrun:
            from snakemake_logger_plugin_progress.bar import Bar

            self.bar = Bar(self.stream, self.common_settings.nocolor)

    def emit(self, record: LogRecord) -> None:
        try:
            if EXTENDED.fullmatch(record.getMessage()):
                return
            event = getattr(record, "event", None)
            self.estimate.take(event, vars(record))
            lines = event not in SHOWN or (event == LogEvent.JOB_INFO and self.common_settings.printshellcmds)
            text = self._text(record, event)
            if self.bar is None:
                if text:
                    print(text, file=self.stream, flush=True)
                return
            if text and lines and text != SELECTING:
                self.bar.line(text)
            self.bar.show(self.estimate)
        except Exception:
            self.handleError(record)

    def _text(self, record: LogRecord, event: str | None) -> str:
        """Snakemake's lines of a record; where a rule has a message, the message and the details of the job."""
        message = getattr(record, "rule_msg", None)
        if event != LogEvent.JOB_INFO or not message:
            return self.format(record)
        details = copy(record)
        details.rule_msg = None
        time, _, rest = self.format(details).partition("\n")
        return f"{time}\n{message}\n{rest}"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        super().close()

    @property
    def writes_to_stream(self) -> bool:
        return True

    @property
    def writes_to_file(self) -> bool:
        return False

    @property
    def has_filter(self) -> bool:
        return False  # Snakemake's own

    @property
    def has_formatter(self) -> bool:
        return False  # Snakemake's own

    @property
    def needs_rulegraph(self) -> bool:
        return False
