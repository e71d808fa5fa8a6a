"""Input and parameter functions of the rule that evaluates a checkpoint: its texts and tasks."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from obr.config import paths
from obr.config.workflow import Config

if TYPE_CHECKING:
    from snakemake.io import InputFiles, Wildcards


class ScoreFunctions:
    """The functions for one config. Snakemake calls them with the wildcards model, recipe and activations."""

    def __init__(self, config: Config):
        self.config, self.raw, self.results = config, config.raw, config.results

    def _path(self, artefact: str, **names: str) -> str:
        return f"{self.results}/{paths.below(artefact, **names)}"

    def requested(self, wildcards: "Wildcards") -> dict[str, list[str]]:
        """The texts and tasks of an evaluation: those of tables and figures, and those that its file holds already.

        So an evaluation is not out of date where another experiment asks for fewer scores than are there.
        """
        names = {key: wildcards[key] for key in ("model", "recipe", "activations")}
        wanted = self.config.scores.get(tuple(names.values()), {})
        file = Path(self._path("evaluation", **names))
        try:
            present = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or one that the job replaces
            present = {}
        return {
            kind: sorted({*wanted.get(kind, []), *(name for name in present.get(kind, {}) if name in self.raw[kind])})
            for kind in ("perplexity", "zero_shot")
        }

    def inputs(self, wildcards: "Wildcards") -> dict[str, list[str]]:
        """The files of an evaluation's texts and tasks, in the order of `requested`."""
        scores = self.requested(wildcards)
        texts = [self.raw["perplexity"][name]["text"] for name in scores["perplexity"]]
        return {
            "texts": [self._path("text", text=text) for text in texts],
            "tasks": [self._path("task", task=task) for task in scores["zero_shot"]],
        }

    def entry(self, wildcards: "Wildcards") -> str:
        """The settings of an evaluation's texts and tasks."""
        return _json(
            {
                kind: {n: self._settings_of(kind, n) for n in names}
                for kind, names in self.requested(wildcards).items()
            }
        )

    def _settings_of(self, kind: str, name: str) -> dict:
        """What decides a score besides its data: the settings of an entry of `perplexity` or `zero_shot`."""
        return {k: v for k, v in self.raw[kind][name].items() if k not in ("text", "source") and v is not None}

    def flags(self, wildcards: "Wildcards", input: "InputFiles") -> str:
        """The flags that name an evaluation's texts and tasks, each with its file and settings."""
        scores = self.requested(wildcards)
        files = {"perplexity": list(input.texts), "zero_shot": [str(Path(task).parent) for task in input.tasks]}
        flags = []
        for kind, flag in (("perplexity", "--text"), ("zero_shot", "--task")):
            for name, file in zip(scores[kind], files[kind], strict=True):
                settings = [f"{key}={_json(value)}" for key, value in self._settings_of(kind, name).items()]
                flags.append(shlex.join([flag, name, str(file), *settings]))
        return " ".join(flags)


def _json(value) -> str:
    return json.dumps(value, sort_keys=True)
