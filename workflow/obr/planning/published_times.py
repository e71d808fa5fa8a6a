"""Times of compressions that the paper prints, beside those of a plan."""

from pathlib import Path

from obr.planning.dry_run import Job
from obr.planning.prices import Price, Prices

TIMED_IN_THE_PAPER = {"sparsegpt_gptq": "SparseGPT+GPTQ", "obr_rtn": "OBR_RTN", "obr_gptq": "OBR_GPTQ"}


def published_times(path: Path, jobs: list[Job], each: list[Price], prices: Prices) -> list[dict]:
    """Compressions that the paper timed on an A100, beside what they are priced at here; none on a CPU."""
    if prices.device != "cuda" or not path.is_file():
        return []
    from obr.report.published import load, lookup, select

    printed = select(load(path), source="obr", metric="compression_time_min")
    found = []
    for job, price in zip(jobs, each):
        recipe = prices.recipe(job.wildcards["recipe"]) if job.rule == "compress" else None
        if recipe and recipe.method in TIMED_IN_THE_PAPER and job.wildcards["recipe"] == f"{recipe.method}-w4s50-quarot":
            method, model = TIMED_IN_THE_PAPER[recipe.method], prices.config["models"][job.wildcards["model"]]
            if model.get("published") in set(printed["model"]):
                minutes = lookup(printed, model=model["published"], method=method)
                row = {"model": job.wildcards["model"], "method": method, "published": minutes}
                found.append({**row, "planned": price.seconds / 60})
    return sorted(found, key=lambda row: (row["method"], row["published"]))
