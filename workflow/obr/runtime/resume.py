"""What an interrupted run leaves behind, so that the next one goes on where it was."""

import shutil
from collections.abc import Callable
from pathlib import Path

from obr.errors import ObrError
from obr.runtime.files import read_json, write_json
from obr.runtime.locks import acquire, release


class Unfinished:
    """The folder `<out>.unfinished`, where a run keeps its finished blocks until all are there.

    It lies beside `out`, since Snakemake deletes what a failed job has declared as output. Every block is a file
    and a note; the note is written last, as the sign that the file is whole.

    Args:
        out: the folder for which the blocks are meant; made if need be.
        run: what decides the blocks, as plain data; an unfinished run must equal it to be continued. None: the
            run is never continued.

    Raises:
        ObrError: the unfinished blocks there are of another run.
    """

    def __init__(self, out: Path, run: dict | None = None):
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.folder = self.out.with_name(self.out.name + ".unfinished")
        claim(self.folder, run)

    def note(self, index: int) -> dict | None:
        """What was noted of block `index` when it was finished; None if it was not."""
        path = self._note(index)
        return read_json(path) if path.exists() else None

    def finished(self, count: int) -> int:
        """How many blocks from the first on, of `count`, are finished."""
        return next((index for index in range(count) if not self._note(index).exists()), count)

    def file(self, index: int) -> Path:
        """Where a finished block lies: interrupted among the last moves, a run has moved some."""
        path = self.folder / block_file(index)
        return path if path.exists() else self.out / block_file(index)

    def keep(self, index: int, write: Callable[[Path], None], note: dict) -> None:
        """Let `write(path)` make the file of a block, then note that it is finished."""
        self._note(index).unlink(missing_ok=True)
        write(self.folder / block_file(index))
        write_json(note, self._note(index))

    def move(self, count: int) -> None:
        """Move the `count` finished blocks to where they are meant to be."""
        for index in range(count):
            path = self.folder / block_file(index)
            if path.exists():
                path.replace(self.out / block_file(index))

    def remove(self) -> None:
        """Tidy up, once `out` is whole; who the run was is forgotten last, so that this too may be interrupted."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == "run.json"):
            path.unlink() if not path.is_dir() else shutil.rmtree(path)
        self.folder.rmdir()
        release(self.folder)

    def _note(self, index: int) -> Path:
        return self.folder / f"block_{index:03d}.json"


def claim(folder: Path, run: dict | None, what: str = "blocks") -> None:
    """Make `folder` this run's own, or leave what is in it if an unfinished run that equals it wrote that.

    what: it holds, for messages. The folder is held (see `locks.acquire`) until its owner lets it go.

    Raises:
        ObrError: it holds what another run has left, or another process is at work in it.
    """
    acquire(folder)
    noted = folder / "run.json"
    if noted.exists() and (there := read_json(noted)) != run:
        keys = {*there, *(run or {})}  # what a user sets first, then code and versions
        differing = sorted(
            (key for key in keys if there.get(key) != (run or {}).get(key)),
            key=lambda key: (key in ("code", "versions"), key),
        )
        raise ObrError(
            f"{folder} holds {what} of another run (its {differing[0]} differs); "
            "go back to those settings to finish it, or delete the folder to start again."
        )
    if not noted.exists():  # nobody's: a run notes who it is before it leaves anything else
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    if run is not None:
        write_json(run, noted)


def block_file(index: int) -> str:
    """Name of a block's file, in every folder that holds one a block."""
    return f"block_{index:03d}.safetensors"
