"""What a run will cost before it starts: jobs, hours, memory, disk, downloads and licences.

The jobs are those of Snakemake's dry run; their times come from counted work (`costs`), corrected by the timings of
jobs that have finished here (`timings`); the wall-clock from dealing the jobs out to cores and GPUs.
"""

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

from obr.errors import ObrError
from obr.planning import measured_times
from obr.planning.dry_run import Job, pending
from obr.planning.prices import TIMED, Price, Prices
from obr.planning.published_times import published_times
from obr.planning.schedule import peak_disk, spans
from obr.runtime.files import json_text


@dataclass
class Plan:
    """A priced run. Times in seconds, sizes in GB; `measured` says how many timings stand behind a stage."""

    device: str
    cores: int
    gpus: int
    jobs: int
    wall: float
    busy: float
    by_rule: dict[str, dict] = field(default_factory=dict)
    by_model: dict[str, float] = field(default_factory=dict)
    host: float = 0.0
    gpu: float = 0.0
    disk: float = 0.0
    disk_peak: float = 0.0
    fetched: float = 0.0
    gated: list[str] = field(default_factory=list)
    measured: dict[str, int] = field(default_factory=dict)
    checked: list[dict] = field(default_factory=list)  # model, method, published and planned minutes
    gpu_memory: float | None = None  # of the GPU that jobs are held against
    too_large: list[str] = field(default_factory=list)  # jobs that need more, each with what it needs


def plan_of(
    snakefile: Path,
    configfiles: list[Path],
    overrides: dict,
    targets: list[str],
    cores: int,
    gpus: int,
    bandwidth: float = 20.0,
    gpu_memory: float | None = None,
) -> Plan:
    """The priced dry run of a configuration, or of some of its targets.

    One parameter per flag of `obr plan`. Jobs that need more than `gpu_memory` GB of a GPU are listed.

    Timings are taken from `benchmarks` below the results folder and the folders beside it.

    Raises:
        ObrError: the workflow refuses the configuration or a target.
    """
    config, jobs, prices, each = priced(snakefile, configfiles, overrides, targets, cores, bandwidth)
    plan = total(config, jobs, each, prices, cores, gpus)
    if gpu_memory is not None:
        plan.gpu_memory = gpu_memory
        plan.too_large = [
            f"{' '.join([job.rule, *job.wildcards.values()])}: {price.gpu:.1f} GB"
            for job, price in sorted(zip(jobs, each), key=lambda pair: -pair[1].gpu)
            if price.gpu > gpu_memory
        ]
    plan.checked = published_times(Path(snakefile).parent / "workflow/published/results.csv", jobs, each, prices)
    return plan


def priced(
    snakefile: Path, configfiles: list[Path], overrides: dict, targets: list[str], cores: int, bandwidth: float = 20.0
) -> tuple[dict, list[Job], Prices, list[Price]]:
    """(configuration, jobs, prices, price of each job) of a dry run; parameters and errors as of `plan_of`."""
    config, jobs = pending(snakefile, configfiles, overrides, targets, cores)
    results = Path(config["results"])
    beside = [results, *sorted(p for p in results.parent.glob("*") if p.is_dir() and p != results)]
    known = [timing for folder in beside for timing in measured_times.found_under(folder)]
    prices = Prices(config, bandwidth, known)
    return config, jobs, prices, [prices.price(job) for job in jobs]


def overrides_of(pairs: list[str]) -> dict:
    """`KEY=VALUE` pairs as Snakemake's --config reads them: the values are YAML.

    Raises:
        ObrError: one has no equals sign.
    """
    import yaml

    odd = [pair for pair in pairs if "=" not in pair]
    if odd:
        raise ObrError(f"--config {odd[0]} is not of the form KEY=VALUE; write it as {odd[0]}=VALUE.")
    return {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in pairs)}


def total(config: dict, jobs: list[Job], each: list[Price], prices: Prices, cores: int, gpus: int) -> Plan:
    """The sums over priced jobs."""
    plan = Plan(prices.device, cores, gpus if prices.device == "cuda" else 0, len(jobs), 0.0, 0.0)
    devices = ["cuda" if job.rule in TIMED and prices.device == "cuda" else "cpu" for job in jobs]
    on_gpu = [device == "cuda" or job.wildcards.get("device") == "cuda" for job, device in zip(jobs, devices)]
    when = spans(jobs, [price.seconds for price in each], on_gpu, cores, max(1, gpus))
    plan.wall = max((end for _, end in when), default=0.0)
    plan.disk_peak = peak_disk(jobs, when, [price.disk for price in each], [price.scratch for price in each])
    by_model: dict[str, float] = defaultdict(float)
    for job, price in zip(jobs, each):
        rule = plan.by_rule.setdefault(job.rule, {"jobs": 0, "seconds": 0.0, "longest": 0.0, "host": 0.0, "gpu": 0.0})
        rule["jobs"] += 1
        rule["seconds"] += price.seconds
        for key, value in (("longest", price.seconds), ("host", price.host), ("gpu", price.gpu)):
            rule[key] = max(rule[key], value)
        if job.rule in TIMED:
            plan.busy += price.seconds
            by_model[job.wildcards["model"]] += price.seconds
        plan.disk, plan.fetched = plan.disk + price.disk * (not job.temporary), plan.fetched + price.fetched
        plan.host, plan.gpu = max(plan.host, price.host), max(plan.gpu, price.gpu)
        if job.rule == "download_model" and config["models"][job.wildcards["model"]].get("gated"):
            plan.gated.append(config["models"][job.wildcards["model"]]["source"]["repo"])
    plan.by_model = dict(sorted(by_model.items(), key=lambda pair: -pair[1]))
    counts: dict[str, int] = defaultdict(int)
    for timing in measured_times._of(prices.known, prices.device):
        counts[timing.stage.split()[0]] += 1
    plan.measured = {rule: counts[rule] for rule in plan.by_rule if rule in TIMED}
    return plan


# --- Words --------------------------------------------------------------------------------------------


def summary(plan: Plan) -> str:
    """The plan for people to read."""
    if not plan.jobs:
        return "Nothing to be done: every result is there.\n"
    gpus = f"{plan.gpus} GPU{'s' if plan.gpus > 1 else ''} and " if plan.gpus else ""
    lines = [f"{plan.jobs} jobs, about {span(plan.wall)} on {gpus}{plan.cores} cores.", ""]
    lines.append(f"{'stage':<18}{'jobs':>6}{'hours':>9}{'longest':>10}{'host GB':>9}{'GPU GB':>8}  timed before")
    for rule, sums in sorted(plan.by_rule.items(), key=lambda pair: -pair[1]["seconds"]):
        timed = f"{plan.measured[rule]} jobs" if plan.measured.get(rule) else "no" if rule in plan.measured else ""
        lines.append(
            f"{rule:<18}{sums['jobs']:>6}{sums['seconds'] / 3600:>9.2f}{span(sums['longest']):>10}"
            f"{sums['host']:>9.1f}{sums['gpu']:>8.1f}  {timed}".rstrip()
        )
    if plan.by_model:
        hours = ", ".join(f"{model} {seconds / 3600:.2f}" for model, seconds in plan.by_model.items())
        lines += ["", f"Device hours by model: {hours}; {plan.busy / 3600:.1f} in all."]
    device = f", {plan.gpu:.0f} GB of a GPU" if plan.gpu else ""
    lines.append(f"Peak memory of a job: {plan.host:.1f} GB of the host{device}.")
    if plan.too_large:
        count = len(plan.too_large)
        lines.append(f"{count} job{'s' * (count > 1)} of {plan.jobs} exceed a GPU of {plan.gpu_memory:g} GB:")
        lines += [f"  {name}" for name in plan.too_large]
    elif plan.gpu_memory is not None and plan.gpu:
        lines.append(f"Every job fits into a GPU of {plan.gpu_memory:g} GB.")
    lines.append(
        f"Disk: {plan.disk:.1f} GB in the end, {plan.disk_peak:.1f} GB at the peak. Downloads: {plan.fetched:.1f} GB."
    )
    if plan.gated:
        lines.append(f"Gated, accept the licence on the hub first: {', '.join(sorted(plan.gated))}.")
    if any(not count for count in plan.measured.values()):
        lines.append(f"Stages not timed before are priced by counted work at the speed of {DEVICES[plan.device]}.")
    if plan.checked:
        lines += ["", "Compression in minutes, the paper's on one A100 and as planned here:"]
        lines += [
            f"  {r['model']:<14}{r['method']:<16}{r['published']:>7.0f}{r['planned']:>7.0f}" for r in plan.checked
        ]
    return "\n".join(lines) + "\n"


DEVICES = {"cpu": "a server's core", "cuda": "an A100"}


def span(seconds: float) -> str:
    """A time in two units at most."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def as_json(plan: Plan) -> str:
    """The plan for programs to read."""
    return json_text(asdict(plan), "the plan")
