"""Run a command and note what it took: the same measurement for this project and for the others.

    python benchmarks/peers/measure.py NOTE.json COMMAND ARGUMENT...

NOTE gets seconds (on the clock), processor_seconds (user and system, of all its processes) and peak_mb (resident, of
the largest of its processes), as the kernel counts them for a child that has ended. The memory is never less than
this process's own, so that only a small one can measure. The exit status is the command's.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def measure(command: list[str], **options) -> tuple[int, dict[str, float]]:
    """(exit status, {"seconds", "processor_seconds", "peak_mb"}) of a command; options: those of subprocess.Popen."""
    started = time.monotonic()
    process = subprocess.Popen(command, **options)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, {
        "seconds": round(time.monotonic() - started, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_mb": round(used.ru_maxrss / 1024),
    }


def main() -> int:
    note, *command = sys.argv[1:]
    status, used = measure(command)
    if status == 0:
        Path(note).write_text(json.dumps(used) + "\n", encoding="utf-8")
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
