import json
import os
import re
import shlex
import tempfile
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from obr.config import workflow as obr_config
from obr.runtime import code_digest as obr_digest
from obr.runtime import local_sources as obr_local
from obr.errors import ObrError

try:
    validate(config, "../schemas/config.schema.yaml")
except (WorkflowError, AttributeError):  # Snakemake's own message holds the schema; a list for a mapping crashes it
    schema = Path(workflow.basedir, "workflow/schemas/config.schema.yaml").read_text(encoding="utf-8")
    sentence = obr_config.objection(config, yaml.safe_load(schema))
    if sentence is None:
        raise
    raise WorkflowError(sentence) from None

try:
    CONFIG = obr_config.Config(config)
    for section in ("models", "texts", "zero_shot"):
        obr_config.check_paths(config[section], section)
    for model in config["models"]:
        if Path(f"{config['results']}/models/{model}/config.json").exists():
            CONFIG.check_widths(model, Path(f"{config['results']}/models/{model}/config.json"))
except ObrError as error:
    raise WorkflowError(str(error)) from None

RESULTS = CONFIG.results
PUBLISHED = f"{workflow.basedir}/workflow/published/results.csv"


def one_of(names):
    """A regular expression that matches these names alone; one that matches nothing where there are none."""
    return "|".join(map(re.escape, names)) or "(?!)"


# Every wildcard takes names of the config alone, and rules that make the same file each take names of their own. So no
# input function is called with a name that its section does not have, and a misspelt target is a missing file.
RELEASED = one_of(key for key, recipe in CONFIG.parsed.items() if recipe.method == "released")
COMPRESSED = one_of(key for key, recipe in CONFIG.parsed.items() if recipe.method != "released")
LEARNED = one_of(key for key, entry in config["rotations"].items() if "learn" in entry)
GIVEN = one_of(key for key, entry in config["rotations"].items() if "learn" not in entry)  # drawn, or from a file
CUT, GENERATED, MIXED = (
    one_of(key for key, entry in config["calibrations"].items() if kind in entry)
    for kind in ("text", "generated", "mix")
)


wildcard_constraints:
    model=one_of(config["models"]),
    rotation=one_of(["none", *config["rotations"]]),
    calibration=one_of(config["calibrations"]),
    recipe=one_of(CONFIG.parsed),
    text=one_of(config["perplexity"]),
    task=one_of(config["zero_shot"]),
    options=one_of(config["layer_options"]),
    table=one_of(config["tables"]),
    figure=one_of(config["figures"]),


def check_writable():
    """Refuse a results folder that cannot be written before any job, whose own log could not tell."""
    present = next(path for path in (Path(RESULTS), *Path(RESULTS).absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=present).close()
    except OSError as error:
        raise WorkflowError(
            f"{RESULTS} cannot be written ({error.strerror}): correct its rights, or set `results`."
        ) from None


def entry_of(section):
    """The JSON of a config entry, named by the wildcard of the same singular: models -> {model}."""

    def entry(wildcards):
        names = {"perplexity": "text", "zero_shot": "task"}
        return json.dumps(config[section][wildcards[names.get(section, section.rstrip("s"))]], sort_keys=True)

    return entry


def code_of(stage):
    """The digest of a stage's code; a constant where the profile or config turns that off."""
    return obr_digest.digest(stage) if config["track_code"] else "untracked"


def size_of(wildcards):
    """Billions of parameters of the model at hand, for the resources."""
    model = wildcards.get("model")
    return config["models"][model]["parameters"] if model else 0


def memory(gigabytes, per_billion):
    """mem_mb: a constant, and what grows with the model."""
    return lambda wildcards: int(1000 * (gigabytes + per_billion * size_of(wildcards)))


def minutes(constant, per_billion):
    """runtime in minutes."""
    return lambda wildcards: int(constant + per_billion * size_of(wildcards))


GPU = 1 if config["device"] == "cuda" else 0


def trust_of(wildcards):
    """The flag that lets a model run its own code, where the config says so."""
    return "--trust-remote-code" if config["models"][wildcards.model].get("trust_remote_code") else ""


def compute_of(wildcards):
    """The flags of a stage that runs a model. The config's dtype is for stages without a recipe that names its own."""
    recipe = CONFIG.parsed.get(wildcards.get("recipe"))
    own = recipe is not None and recipe.dtype is not None
    dtype = f"--dtype {config['dtype']}" if config["dtype"] and not own else ""
    return " ".join(filter(None, (f"--device {config['device']}", dtype, trust_of(wildcards))))


def recipe_inputs(wildcards):
    """What a compression reads besides the model."""
    recipe = CONFIG.parsed[wildcards.recipe]
    inputs = {}
    if recipe.rotation != "none":
        inputs["rotation"] = f"{RESULTS}/rotations/{recipe.rotation}/{wildcards.model}.safetensors"
    if recipe.calibration and recipe.hessian == "cached":
        inputs["hessians"] = (
            f"{RESULTS}/hessians/{wildcards.model}/{recipe.rotation}/{recipe.calibration}/hessian.json"
        )
    elif recipe.needs_hessian:
        inputs["tokens"] = f"{RESULTS}/calibration/{recipe.calibration}/{wildcards.model}.safetensors"
    if recipe.needs_gradients:
        inputs["gradients"] = (
            f"{RESULTS}/gradients/{wildcards.model}/{recipe.rotation}/{recipe.calibration}.safetensors"
        )
    if recipe.allocation:
        inputs["allocation"] = f"{RESULTS}/allocations/{wildcards.model}/{wildcards.recipe}.json"
    return inputs


def recipe_flags(wildcards, input):
    """The command-line flags for those inputs."""
    flags = []
    for name in ("rotation", "tokens", "hessians", "gradients", "allocation"):
        path = input.get(name)
        if path:
            flags.append(f"--{name} {Path(path).parent if name == 'hessians' else path}")
    return " ".join(flags)


def sensitivity_of(wildcards):
    """The losses that a recipe's allocation chooses from."""
    recipe, options = CONFIG.parsed[wildcards.recipe], CONFIG.options_of(wildcards.recipe)
    place = f"{wildcards.model}/{recipe.rotation}/{recipe.calibration}/{options}"
    return f"{RESULTS}/sensitivity/{place}/losses.json"


def sensitivity_entry(wildcards):
    """JSON of the options that are tried, and of the blocks on which."""
    blocks = CONFIG.measured_blocks(wildcards.options, wildcards.rotation, wildcards.calibration)
    return json.dumps({"options": config["layer_options"][wildcards.options], "blocks": blocks}, sort_keys=True)


def rotation_input(wildcards):
    """The rotation that a stage names in its path, if it is one."""
    path = f"{RESULTS}/rotations/{wildcards.rotation}/{wildcards.model}.safetensors"
    return {"rotation": path} if wildcards.rotation != "none" else {}


def calibration_text(wildcards):
    """The text that windows are drawn from: joined, or its documents apart."""
    entry = config["calibrations"][wildcards.calibration]
    if entry.get("sampling") == "documents":
        return f"{RESULTS}/documents/{entry['text']}.jsonl"
    return f"{RESULTS}/texts/{entry['text']}.txt"


def learning_tokens(wildcards):
    """The windows that a rotation is learned from."""
    calibration = config["rotations"][wildcards.rotation]["learn"]["calibration"]
    return f"{RESULTS}/calibration/{calibration}/{wildcards.model}.safetensors"


def learner_of(wildcards):
    """The digest of the learner's code."""
    return code_of(f"rotations.learning.{config['rotations'][wildcards.rotation]['kind']}")


def hessian_inputs(wildcards):
    tokens = f"{RESULTS}/calibration/{wildcards.calibration}/{wildcards.model}.safetensors"
    return {"tokens": tokens, **rotation_input(wildcards)}


def rotation_flag(wildcards, input):
    return f"--rotation {input.rotation}" if "rotation" in input.keys() else ""


def checkpoint_manifest(wildcards):
    key = CONFIG.checkpoint_of(wildcards.recipe)
    return f"{RESULTS}/compressed/{wildcards.model}/{key}/manifest.json"


def task_text(wildcards):
    """The text that a task made from text is made of."""
    text = config["zero_shot"][wildcards.task].get("text")
    return {"text": f"{RESULTS}/texts/{text}.txt"} if text else {}


def task_text_flag(wildcards, input):
    return f"--text {input.text}" if "text" in input.keys() else ""


def local_of(section):
    """JSON of the state of the local files that a config entry names; a changed file then reruns its job."""

    def local(wildcards):
        names = {"perplexity": "text", "zero_shot": "task"}
        entry = config[section][wildcards[names.get(section, section.rstrip("s"))]]
        source = entry.get("source")
        source = source if isinstance(source, dict) else entry
        return json.dumps(obr_local.state(source, wildcards.get("model", "")), sort_keys=True)

    return local


def task_source(wildcards):
    """What decides a task's data; how many rows are scored does not."""
    return json.dumps({"source": config["zero_shot"][wildcards.task]["source"]}, sort_keys=True)


def parts_of(section):
    """The artefacts that a table or figure is made of."""

    def parts(wildcards):
        entry = config[section][wildcards[section.rstrip("s")]]
        return [f"{RESULTS}/{path}" for path in CONFIG.artefacts(entry)]

    return parts


def used(section, of):
    """JSON of the recipes or models that a table or figure names."""

    def entries(wildcards):
        entry = config[section][wildcards[section.rstrip("s")]]
        if of == "models":
            return json.dumps({m: config["models"][m] for m in entry.get("models", [])}, sort_keys=True)
        keys = {key for row in CONFIG.rows(entry) for key in (row, CONFIG.checkpoint_of(row))}
        return json.dumps({key: CONFIG.recipes[key] for key in sorted(keys)}, sort_keys=True)

    return entries


def kernel_entry(wildcards):
    """JSON of the benchmark on this device: the shapes that are for it, and what a product is."""
    shapes = [s for s in config["kernels"]["shapes"] if s.get("device", wildcards.device) == wildcards.device]
    shapes = [{k: v for k, v in shape.items() if k not in ("device", "published")} for shape in shapes]
    return json.dumps({**config["kernels"], "shapes": shapes}, sort_keys=True)


def kernel_device(wildcards):
    """Where products are timed; of a GPU's, where the workflow runs on a CPU, only the sizes can be told."""
    if wildcards.device == "cuda" and config["device"] == "cpu":
        return "--device cpu --sizes-only"
    return f"--device {wildcards.device}"


def figure_shapes(wildcards):
    """The shapes of the benchmark that a figure of kernels draws."""
    if config["figures"][wildcards.figure]["kind"] != "kernels":
        return ""
    return f"--shapes {shlex.quote(json.dumps({'shapes': config['kernels']['shapes']}, sort_keys=True))}"


def everything(wildcards):
    """Tables and figures, and what they are made of, so that a lost result is rebuilt."""
    targets = [f"{RESULTS}/tables/{name}.csv" for name in config["tables"]]
    targets += [f"{RESULTS}/figures/{name}.pdf" for name in config["figures"]]
    for entry in [*config["tables"].values(), *config["figures"].values()]:
        targets += [f"{RESULTS}/{path}" for path in CONFIG.artefacts(entry)]
    if any(entry.get("published") for entry in config["tables"].values()):
        targets.append(f"{RESULTS}/errata.md")
    return list(dict.fromkeys(targets))
