"""The jobs that Snakemake would run, with the configuration as it stands after all overrides: its own dry run, asked
through its API."""

import contextlib
import io
import os
from dataclasses import dataclass, field
from pathlib import Path

from obr.errors import ObrError


@dataclass(frozen=True)
class Job:
    """One job of a dry run. `after` are the numbers of the jobs, in the list, whose outputs it reads.

    temporary: whether Snakemake deletes its outputs, but for small ones, once nothing needs them.
    priority: jobs of a higher one start first.
    holds: numbers of the jobs whose temporary outputs it reads.
    """

    rule: str
    wildcards: dict[str, str]
    threads: int
    outputs: tuple[str, ...]
    after: tuple[int, ...] = field(default=())
    temporary: bool = False
    priority: int = 0
    holds: tuple[int, ...] = field(default=())


def pending(
    snakefile: Path, configfiles: list[Path], overrides: dict, targets: list[str], cores: int
) -> tuple[dict, list[Job]]:
    """(configuration with defaults, jobs that would run); nothing is run.

    Raises:
        ObrError: the workflow refuses its configuration or its targets; the sentence is Snakemake's.
    """
    from snakemake.api import SnakemakeApi
    from snakemake.settings.types import ConfigSettings, DAGSettings, OutputSettings, Quietness, ResourceSettings

    if not Path(snakefile).is_file():
        raise ObrError(f"There is no {snakefile}; run this in the folder of the workflow, or name its Snakefile.")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), _mute():
        try:
            with SnakemakeApi(OutputSettings(dryrun=True, quiet={Quietness.ALL})) as api:
                workflow = api.workflow(
                    resource_settings=ResourceSettings(cores=cores),
                    config_settings=ConfigSettings(config=overrides, configfiles=[p.resolve() for p in configfiles]),
                    snakefile=Path(snakefile).resolve(),
                )
                workflow.dag(dag_settings=DAGSettings(targets=set(targets))).execute_workflow(executor="dryrun")
                dag = workflow._workflow.dag
                found = [job for job in dag.needrun_jobs(exclude_finished=False) if job.rule.name != "all"]
                numbers = {job: number for number, job in enumerate(found)}
                jobs = [
                    Job(
                        job.rule.name,
                        dict(job.wildcards_dict),
                        min(int(job.threads), cores),
                        tuple(map(str, job.output)),
                        tuple(sorted(numbers[other] for other in dag.dependencies[job] if other in numbers)),
                        bool(job.temp_output),
                        int(job.priority),
                        tuple(
                            sorted(
                                numbers[other]
                                for other, files in dag.dependencies[job].items()
                                if other in numbers and files & set(other.temp_output)
                            )
                        ),
                    )
                    for job in found
                ]
                return dict(workflow._workflow.globals["config"]), jobs
        except Exception as error:
            sentence = " ".join(str(error).split()) or _last_line(said.getvalue())
            raise ObrError(f"Snakemake cannot list the jobs: {sentence.rstrip('.')[:600]}.") from error


@contextlib.contextmanager
def _mute():
    """Nothing on the standard streams, whoever holds them: Snakemake's logger keeps them from before."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        kept = {number: os.dup(number) for number in (1, 2)}
        try:
            for number in kept:
                os.dup2(nowhere.fileno(), number)
            yield
        finally:
            for number, copy in kept.items():
                os.dup2(copy, number)
                os.close(copy)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
