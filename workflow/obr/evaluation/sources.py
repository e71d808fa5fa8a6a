"""Texts and tasks by name, as the command `obr evaluate` takes them: found in the config, fetched into a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from obr.config import paths
from obr.config.workflow import Config
from obr.data.texts import download_text
from obr.errors import ObrError
from obr.evaluation.stage import Wanted
from obr.evaluation.tasks import download_task
from obr.runtime import local_sources
from obr.runtime.files import read_json, write_json

SEQLEN = 2048
TEXT_SETTINGS = ("seqlen", "tokens", "bos")
TASK_SETTINGS = ("limit", "batch_tokens", "bos")


class Sources:
    """Finds texts and tasks, and fetches each once into a folder, in the layout of the folder of results.

    Args:
        folder: made if need be.
        config: whose sections `perplexity`, `texts` and `zero_shot` give the names.
    """

    def __init__(self, folder: Path, config: Config):
        self.folder, self.raw = Path(folder), config.raw

    def text(self, name: str, changes: dict) -> Wanted:
        """A text file, or a name of the config's `perplexity` or `texts`. changes: of its settings.

        Raises:
            ObrError: no such file or name, or a text that cannot be fetched.
        """
        if (file := Path(name).expanduser()).is_file():
            return Wanted("perplexity", file.stem, file, {"seqlen": SEQLEN, **changes})
        if name in self.raw["perplexity"]:
            entry = self.raw["perplexity"][name]
        elif name in self.raw["texts"]:
            entry = {"text": name}
        else:
            raise _unknown("text", name, [*self.raw["perplexity"], *self.raw["texts"]])
        source, out = self.raw["texts"][entry["text"]], paths.path(self.folder, "text", text=entry["text"])
        if not self._made(out, source):
            download_text(source, out)
            self._note(out, source)
        spec = {key: entry[key] for key in TEXT_SETTINGS if key in entry}
        return Wanted("perplexity", name, out, {"seqlen": SEQLEN, **spec, **changes})

    def task(self, name: str, changes: dict, file: Path | None = None) -> Wanted:
        """A name of the config's `zero_shot`, or any task of lm-eval. changes: of its settings.

        file: JSON lines with the task's rows, instead of the hub.

        Raises:
            ObrError: an unknown task, one that is not scored by log-likelihoods, or rows that cannot be fetched.
        """
        entry = self.raw["zero_shot"].get(name, {"source": {"source": "hub", "task": name}})
        source = entry["source"]
        if file is not None:
            if shots := source.get("num_fewshot"):
                raise ObrError(
                    f"task {name} of the config has {shots} examples in each prompt, which {file} does not hold; "
                    "name the task as lm-eval does, or give the file in the config."
                )
            source = {"source": "path", "task": source.get("task", name), "file": str(file.resolve())}
        out = paths.path(self.folder, "task", task=name)
        if not self._made(out, source):
            text = self.text(entry["text"], {}).source if entry.get("text") else None
            download_task(source, out.parent, text)
            self._note(out, source)
        spec = {key: entry[key] for key in TASK_SETTINGS if key in entry}
        return Wanted("zero_shot", name, out.parent, {**spec, **changes})

    def _made(self, out: Path, source: dict) -> bool:
        """Whether `out` is there and was made from this source."""
        note = self._place(out)
        return out.exists() and note.exists() and read_json(note) == self._request(source)

    def _note(self, out: Path, source: dict) -> None:
        write_json(self._request(source), self._place(out))

    def _place(self, out: Path) -> Path:
        return self.folder / "made" / f"{out.relative_to(self.folder).as_posix().replace('/', '.')}.json"

    @staticmethod
    def _request(source: dict) -> dict:
        return {"source": source, "local": local_sources.state(source)}


def _unknown(kind: str, name: str, known: Iterable[str]) -> ObrError:
    names = ", ".join(dict.fromkeys(known))
    return ObrError(f"{kind} {name!r} is neither a file nor a name of the config, which has {names}; correct it.")
