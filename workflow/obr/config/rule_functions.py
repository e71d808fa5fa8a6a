"""Input and parameter functions of the Snakemake rules: what a job reads and which flags its command gets.

Snakemake calls them with the wildcards of a job, and with its input where a parameter depends on that.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from obr.config import paths
from obr.config.recipe_settings import command_line, settings_line
from obr.config.score_functions import ScoreFunctions
from obr.config.workflow import Config
from obr.runtime import code_digest, local_sources
from obr.runtime.files import write_text

if TYPE_CHECKING:
    from snakemake.io import InputFiles, Wildcards

# The wildcard that names an entry of a section, where it is not the section's singular.
WILDCARDS = {"zero_shot": "task"}
MODEL_SETTINGS = ("source", "dtype", "trust_remote_code")  # of a model, those that decide its files
INPUT_FLAGS = ("rotation", "tokens", "hessians", "gradients", "allocation")


def one_of(names: Iterable[str]) -> str:
    """A regular expression that matches these names alone; one that matches nothing where there are none."""
    return "|".join(map(re.escape, names)) or "(?!)"


class RuleFunctions:
    """The functions for one config; `config` has its recipes resolved."""

    def __init__(self, config: Config):
        self.config, self.raw, self.results = config, config.raw, config.results
        self.scores = ScoreFunctions(config)

    # Places and names

    def path(self, artefact: str, **names: str) -> str:
        """The file of an artefact; names that are not given stay wildcards."""
        return f"{self.results}/{paths.below(artefact, **names)}"

    def log(self, rule: str, *wildcards: str) -> str:
        """The log file of a rule, with a placeholder for each wildcard."""
        return "/".join([f"{self.results}/logs/{rule}", *(f"{{{name}}}" for name in wildcards)]) + ".log"

    def benchmark(self, rule: str, *wildcards: str) -> str:
        """The benchmark file of a rule, with a placeholder for each wildcard."""
        return "/".join([f"{self.results}/benchmarks/{rule}", *(f"{{{name}}}" for name in wildcards)]) + ".tsv"

    def wildcards(self) -> dict[str, str]:
        """A constraint for each wildcard: names of the config alone.

        So no input function is called with a name that its section does not have, and a misspelt target is a
        missing file.
        """
        raw = self.raw
        return {
            "model": one_of(raw["models"]), "rotation": one_of(["none", *raw["rotations"]]),
            "calibration": one_of(raw["calibrations"]), "recipe": one_of(self.config.parsed),
            "activations": one_of(raw["activations"]),
            "text": one_of(raw["texts"]), "task": one_of(raw["zero_shot"]),
            "options": one_of(raw["layer_options"]), "table": one_of(raw["tables"]), "figure": one_of(raw["figures"]),
        }  # fmt: skip

    def recipes(self, released: bool) -> str:
        """A constraint: the recipes whose checkpoints others made, or those of our own."""
        parsed = self.config.parsed.items()
        return one_of(key for key, recipe in parsed if recipe.adopted == released)

    def entries(self, section: str, key: str | None = None, has: bool = True) -> str:
        """A constraint: the entries of a section; with a key those that have it, or the others."""
        return one_of(name for name, entry in self.raw[section].items() if key is None or (key in entry) == has)

    # Settings, as words of a command

    def _entry(self, section: str, wildcards) -> dict:
        return self.raw[section][wildcards[WILDCARDS.get(section, section.rstrip("s"))]]

    def entry(self, section: str) -> Callable:
        """A function: the config entry that the wildcards name."""
        return lambda wildcards: settings_line(self._entry(section, wildcards))

    def model_source(self, wildcards: "Wildcards") -> str:
        """What decides a model's files; its name in tables and its sizes do not."""
        entry = self.raw["models"][wildcards.model]
        return settings_line({key: entry[key] for key in MODEL_SETTINGS if key in entry})

    def text_entry(self, wildcards: "Wildcards") -> str:
        """The settings of a text, as words of a command line."""
        return settings_line(self.raw["texts"][wildcards.text])

    def task_source(self, wildcards: "Wildcards") -> str:
        """What decides a task's data; how many rows are scored does not."""
        return settings_line({"source": self.raw["zero_shot"][wildcards.task]["source"]})

    def gradients_entry(self, wildcards: "Wildcards") -> str:
        """The settings of output gradients, as words of a command line."""
        return settings_line(self.raw["gradients"])

    def released_source(self, wildcards: "Wildcards") -> str:
        """The source of a checkpoint that others computed, as words of a command line."""
        return settings_line(self.raw["recipes"][wildcards.recipe]["source"])

    def patterns(self, wildcards: "Wildcards", input: "InputFiles") -> str:
        """The flag with the patterns that a model's layers are given, each as RECIPE=PATTERN; nothing without any.

        Taking `input` keeps a changed pattern from starting the check of the model again: Snakemake would then
        overlook what else has changed behind it. Patterns that change later are checked when the workflow is read.
        """
        given = self.config.patterns_of(wildcards.model)
        words = [f"{recipe}={pattern}" for recipe, pattern in sorted(given.items()) if pattern]
        return shlex.join(["--patterns", *words]) if words else ""

    def weights(self, wildcards: "Wildcards") -> str:
        """The recipe of a checkpoint, as words of a command."""
        return command_line(json.loads(self.config.weight_entry(wildcards.recipe)))

    def evaluation(self, wildcards: "Wildcards") -> str:
        """The recipe under which a checkpoint is evaluated, as words of a command."""
        return command_line(json.loads(self.config.evaluation_entry(wildcards.recipe, wildcards.activations)))

    def sensitivity_entry(self, wildcards: "Wildcards") -> str:
        """The options that are tried, and the blocks on which."""
        blocks = self.config.measured_blocks(wildcards.options, wildcards.rotation, wildcards.calibration)
        return settings_line({"options": self.raw["layer_options"][wildcards.options], "blocks": blocks})

    def kernels_entry(self, wildcards: "Wildcards") -> str:
        """The benchmark on this device: the shapes that are for it, and what a product is."""
        kernels = self.raw["kernels"]
        shapes = [s for s in kernels["shapes"] if s.get("device", wildcards.device) == wildcards.device]
        shapes = [{k: v for k, v in shape.items() if k not in ("device", "published")} for shape in shapes]
        return settings_line({**kernels, "shapes": shapes})

    def _settings(self, section: str, name: str) -> dict:
        """The part of the config that a table or figure reads, as its command gets it."""
        raw, entry = self.raw, self.raw[section][name]
        rows = self.config.rows(entry)
        own = [row["recipe"] for row in entry.get("rows", []) if isinstance(row, dict) and "recipe" in row]
        recipes = {key: raw["recipes"][key] for key in (*own, *(recipe for recipe, _ in rows))}
        options = {recipe["allocation"]["options"] for recipe in recipes.values() if recipe.get("allocation")}
        found = {
            section: {name: entry},
            "recipes": recipes,
            "activations": {key: raw["activations"][key] for _, key in rows},
            "layer_options": {key: raw["layer_options"][key] for key in options},
            "models": {key: raw["models"][key] for key in entry.get("models", [])},
        }
        return found | ({"kernels": raw["kernels"]} if entry.get("kind") == "kernels" else {})

    def _settings_file(self, section: str, name: str) -> tuple[str, str]:
        """(place, contents) of the settings of a table or figure: named by its contents, so that it never changes."""
        text = json.dumps(self._settings(section, name), sort_keys=True, indent=1) + "\n"
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self.path("settings", section=section, name=name, digest=digest), text

    def settings(self, section: str) -> Callable:
        """A function: the file with what a table or figure reads of the config; another one when that changes."""
        return lambda wildcards: self._settings_file(section, wildcards[section.rstrip("s")])[0]

    def write_settings(self) -> None:
        """Write the settings of all tables and figures that are not there yet."""
        for section in ("tables", "figures"):
            for name in self.raw[section]:
                place, text = self._settings_file(section, name)
                if not Path(place).exists():
                    write_text(text, place)

    # What decides a job besides its inputs

    def code(self, stage: str) -> str:
        """The digest of a stage's code; a constant where the profile or config turns that off."""
        return code_digest.digest(stage) if self.raw["track_code"] else "untracked"

    def learner(self, wildcards: "Wildcards") -> str:
        """The digest of the learner's code."""
        return self.code(f"rotations.learning.{self.raw['rotations'][wildcards.rotation]['kind']}")

    def local(self, section: str) -> Callable:
        """A function: the state of the local files that a config entry names; a changed file reruns its job."""

        def state(wildcards):
            entry = self._entry(section, wildcards)
            source = entry.get("source")
            source = source if isinstance(source, dict) else entry
            return _json(local_sources.state(source, wildcards.get("model", "")))

        return state

    # Inputs

    def rotation(self, wildcards: "Wildcards") -> dict[str, str]:
        """The rotation that a stage names in its path, if it is one."""
        if wildcards.rotation == "none":
            return {}
        return {"rotation": self.path("rotation", rotation=wildcards.rotation, model=wildcards.model)}

    def statistics(self, wildcards: "Wildcards") -> dict[str, str]:
        """What Hessians, gradients and losses are computed from, besides the model."""
        tokens = self.path("calibration", calibration=wildcards.calibration, model=wildcards.model)
        return {"tokens": tokens, **self.rotation(wildcards)}

    def compression(self, wildcards: "Wildcards") -> dict[str, str]:
        """What a compression reads besides the model."""
        recipe = self.config.parsed[wildcards.recipe]
        names = {"model": wildcards.model, "rotation": recipe.rotation, "calibration": recipe.calibration}
        inputs = {}
        if recipe.rotation != "none":
            inputs["rotation"] = self.path("rotation", **names)
        if recipe.calibration and recipe.hessian == "cached":
            inputs["hessians"] = self.path("hessians", **names)
        elif recipe.needs_hessian:
            inputs["tokens"] = self.path("calibration", **names)
        if recipe.needs_gradients:
            inputs["gradients"] = self.path("gradients", **names)
        if recipe.allocation:
            inputs["allocation"] = self.path("allocation", model=wildcards.model, recipe=wildcards.recipe)
        return inputs

    def sensitivity(self, wildcards: "Wildcards") -> str:
        """The losses that a recipe's allocation chooses from."""
        key = wildcards.recipe
        return self.path(
            "sensitivity", model=wildcards.model, rotation=self.config.parsed[key].rotation,
            calibration=self.config.measured_calibration(key), options=self.config.options_of(key),
        )  # fmt: skip

    def calibration_text(self, wildcards: "Wildcards") -> str:
        """The text that windows are drawn from: joined, or its documents apart."""
        entry = self.raw["calibrations"][wildcards.calibration]
        return self.path("documents" if entry.get("sampling") == "documents" else "text", text=entry["text"])

    def mixed(self, wildcards: "Wildcards") -> list[str]:
        """The files of the calibration windows that are mixed."""
        parts = self.raw["calibrations"][wildcards.calibration]["mix"]
        return [self.path("calibration", calibration=part, model=wildcards.model) for part in parts]

    def learning_tokens(self, wildcards: "Wildcards") -> str:
        """The windows that a rotation is learned from."""
        calibration = self.raw["rotations"][wildcards.rotation]["learn"]["calibration"]
        return self.path("calibration", calibration=calibration, model=wildcards.model)

    def checkpoint(self, wildcards: "Wildcards") -> str:
        """The folder of the checkpoint that is evaluated."""
        return self.path("checkpoint", model=wildcards.model, recipe=wildcards.recipe)

    def task_text(self, wildcards: "Wildcards") -> dict[str, str]:
        """The text that a task made from text is made of."""
        text = self.raw["zero_shot"][wildcards.task].get("text")
        return {"text": self.path("text", text=text)} if text else {}

    def parts(self, section: str) -> Callable:
        """A function: the artefacts that a table or figure is made of."""
        return lambda wildcards: [
            f"{self.results}/{part}" for part in self.config.artefacts(self._entry(section, wildcards))
        ]

    def everything(self, wildcards: "Wildcards") -> list[str]:
        """Tables and figures, and what they are made of, so that a lost result is rebuilt."""
        tables, figures = self.raw["tables"], self.raw["figures"]
        targets = [self.path("table", table=name, form="csv") for name in tables]
        targets += [self.path("figure", figure=name, form="pdf") for name in figures]
        for entry in [*tables.values(), *figures.values()]:
            targets += [f"{self.results}/{part}" for part in self.config.artefacts(entry)]
        if self.raw["keep"] == "weights":
            targets += [
                self.path("checkpoint", model=model, recipe=recipe) for model, recipe, _ in self.config.scores
            ]
        if any(entry.get("published") for entry in tables.values()):
            targets.append(self.path("errata"))
        return list(dict.fromkeys(targets))

    # Flags

    def trust(self, wildcards: "Wildcards") -> str:
        """The flag that lets a model run its own code, where the config says so."""
        return "--trust-remote-code" if self.raw["models"][wildcards.model].get("trust_remote_code") else ""

    def compute(self, wildcards: "Wildcards") -> str:
        """Flags of a stage that runs a model; the config's dtype is for stages whose recipe names none."""
        recipe = self.config.parsed.get(wildcards.get("recipe"))
        if recipe is not None and "activations" in wildcards.keys():  # noqa: SIM118, no mapping
            recipe = self.config.evaluated(wildcards.recipe, wildcards.activations)
        own = recipe is not None and recipe.dtype is not None
        dtype = f"--dtype {self.raw['dtype']}" if self.raw["dtype"] and not own else ""
        return " ".join(filter(None, (f"--device {self.raw['device']}", dtype, self.trust(wildcards))))

    def input_flags(self, wildcards: "Wildcards", input: "InputFiles") -> str:
        """The flags for what a compression reads."""
        given = {name: input.get(name) for name in INPUT_FLAGS if input.get(name)}
        if "hessians" in given:
            given["hessians"] = Path(given["hessians"]).parent
        return " ".join(f"--{name} {place}" for name, place in given.items())

    def flag(self, name: str) -> Callable:
        """A function: the flag for an input that not every job has."""
        return lambda wildcards, input: f"--{name} {input[name]}" if input.get(name) else ""

    def kernels_device(self, wildcards: "Wildcards") -> str:
        """Where products are timed; of a GPU's, where the workflow runs on a CPU, only the sizes are known."""
        if wildcards.device == "cuda" and self.raw["device"] == "cpu":
            return "--device cpu --sizes-only"
        return f"--device {wildcards.device}"

    # Resources

    @property
    def gpu(self) -> int:
        """GPUs that a job takes."""
        return 1 if self.raw["device"] == "cuda" else 0

    def _billions(self, wildcards) -> float:
        """Billions of parameters of the job's model."""
        model = wildcards.get("model")
        return self.raw["models"][model]["parameters"] if model else 0

    def memory(self, gigabytes: float, per_billion: float) -> Callable:
        """A function: mem_mb, a constant and what grows with the model."""
        return lambda wildcards: int(1000 * (gigabytes + per_billion * self._billions(wildcards)))

    def minutes(self, constant: float, per_billion: float) -> Callable:
        """A function: runtime in minutes, likewise."""
        return lambda wildcards: int(constant + per_billion * self._billions(wildcards))


def _json(value) -> str:
    return json.dumps(value, sort_keys=True)
