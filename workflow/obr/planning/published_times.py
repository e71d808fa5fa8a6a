"""Times of compressions that the paper prints, beside those of a plan."""

from pathlib import Path

from obr.planning.dry_run import Job
from obr.planning.prices import Price, Prices

# Recipe -> its method as the paper prints it.
TIMED_IN_THE_PAPER = {
    "sparsegpt_gptq-w4s50-quarot": "SparseGPT+GPTQ",
    "obr_rtn-w4s50-quarot": "OBR_RTN",
    "obr_gptq-w4s50-quarot": "OBR_GPTQ",
}


def published_times(path: Path, jobs: list[Job], each: list[Price], prices: Prices) -> list[dict]:
    """Compressions that the paper timed on an A100, beside what they are priced at here; none on a CPU."""
    if prices.device != "cuda" or not path.is_file():
        return []
    from obr.report.published import load, lookup, select

    printed = select(load(path), source="obr", metric="compression_time_min")
    found = []
    for job, price in zip(jobs, each):
        method = TIMED_IN_THE_PAPER.get(job.wildcards["recipe"]) if job.rule == "compress" else None
        if method:
            model = prices.config["models"][job.wildcards["model"]]
            if model.get("published") in set(printed["model"]):
                minutes = lookup(printed, model=model["published"], method=method)
                row = {"model": job.wildcards["model"], "method": method, "published": minutes}
                found.append({**row, "planned": price.seconds / 60})
    return sorted(found, key=lambda row: (row["method"], row["published"]))
