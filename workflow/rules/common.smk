"""What all rules share: the config, checked, and the functions of the package for inputs and flags."""

import tempfile
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from obr.config.config_files import add_recipes, check_overridden, read_yaml
from obr.config.model_sizes import read_config
from obr.config.rule_functions import RuleFunctions
from obr.config.workflow import Config, check_paths, objection
from obr.errors import ObrError
from obr.models.architectures import with_defaults
from obr.planning.dry_run import Job
from obr.planning.preflight import missing_files

try:
    add_recipes(config)
    check_overridden(config)
except ObrError as error:
    raise WorkflowError(str(error)) from None

try:
    for file in workflow.overwrite_configfiles:  # Snakemake lets the last of two equal keys win
        read_yaml(Path(file))
except ObrError as error:
    raise WorkflowError(str(error)) from None

try:
    validate(config, "../schemas/config.schema.yaml")
    sentence = None
except (WorkflowError, AttributeError) as error:  # a list for a mapping crashes Snakemake
    sentence = str(error)
schema = Path(workflow.basedir, "workflow/schemas/config.schema.yaml").read_text(encoding="utf-8")
if sentence := objection(config, yaml.safe_load(schema)) or sentence:  # Snakemake's message holds the schema
    raise WorkflowError(sentence) from None

try:
    jobs = RuleFunctions(Config(config))
    for section in ("models", "texts", "zero_shot"):
        check_paths(config[section], section)
    for model in config["models"]:
        if Path(jobs.path("model_config", model=model)).exists():
            folder = Path(jobs.path("model_config", model=model)).parent
            jobs.config.check_widths(model, with_defaults(read_config(folder, model)))
except ObrError as error:
    raise WorkflowError(str(error)) from None

if workflow.remote_exec:  # a job on another machine, perhaps with a disk of its own
    jobs.write_settings()

PUBLISHED = f"{workflow.basedir}/workflow/published/results.csv"


wildcard_constraints:
    **jobs.wildcards(),


def prepare():
    """Before any job: a results folder that can be written, and in it what tables and figures read of the config."""
    check_writable()
    check_local_files()
    jobs.write_settings()


def check_local_files():
    """Refuse a run whose local files are not all there, with all that are missing in one list."""
    pending = [Job(job.rule.name, dict(job.wildcards_dict), 1, ()) for job in workflow.dag.needrun_jobs()]
    if problems := missing_files(config, pending):
        raise WorkflowError("\n".join(["Some inputs of this run are not there:", *problems]))


def check_writable():
    """Refuse a results folder that cannot be written before any job, whose own log could not tell."""
    present = next(path for path in (Path(jobs.results), *Path(jobs.results).absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=present).close()
    except OSError as error:
        raise WorkflowError(
            f"{jobs.results} cannot be written ({error.strerror}): correct its rights, or set `results`."
        ) from None
