"""The hidden states between two blocks in a file, so that an interrupted evaluation goes on at its block."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from obr.errors import ObrError, first_line
from obr.models.hidden_states import StoredStates
from obr.runtime.files import atomic_write

# Seconds between two savings, and how many times as long as a saving took: saving costs a tenth of the time at most.
SECONDS = 30.0
SHARE = 10


class ResumePoint:
    """Hidden states of an evaluation, saved now and then in one file.

    Args:
        path: of the file.
        key: digest of all that decides the hidden states. A file with another key is of another evaluation.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self.saved, self.cost = time.monotonic(), 0.0

    def load(self, hidden: StoredStates) -> int:
        """Fill `hidden` from the file. Returns the number of blocks that are done, 0 without a file of this key.

        Raises:
            ObrError: the file cannot be read.
        """
        try:
            with open(self.path, "rb") as file:
                header = json.loads(file.readline())
                if header["key"] != self.key:
                    return 0
                for number in range(len(hidden)):
                    hidden.read(number, file)
                return header["blocks"]
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise ObrError(
                f"{self.path}, the state of an interrupted evaluation, cannot be read ({first_line(error)}); "
                "remove it to start that evaluation again."
            ) from error

    def save(self, hidden: StoredStates, blocks: int) -> None:
        """Replace the file, if the last saving was long enough ago. blocks: the number that are done.

        An evaluation goes on without a file where the disk has no room for one, and says so.
        """
        if time.monotonic() - self.saved < max(SECONDS, SHARE * self.cost):
            return
        started = time.monotonic()
        try:
            with atomic_write(self.path) as partial, open(partial, "wb") as file:
                file.write(json.dumps({"key": self.key, "blocks": blocks}).encode() + b"\n")
                for number in range(len(hidden)):
                    hidden.write(number, file)
        except OSError as error:
            print(
                f"The state of the evaluation cannot be saved in {self.path} ({error.strerror}): "
                "if it is interrupted, it starts again at the first block.",
                file=sys.stderr,
            )
        self.saved = time.monotonic()
        self.cost = self.saved - started

    def drop(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
