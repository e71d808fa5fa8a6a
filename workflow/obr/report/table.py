"""Tables: what the paper prints, what was measured here, and the difference, with notes from the artefacts.

Reads only results already on disk (manifests, perplexities, zero-shot scores) and the published numbers.
"""

from pathlib import Path

import pandas as pd

from obr.errors import ObrError
from obr.report import published as papers
from obr.report.table_formats import Table, detail_columns, html, latex, markdown
from obr.report.table_notes import MASKS, Evidence, notes_of
from obr.report.table_rows import (
    Metric,
    Row,
    entry_of,
    metrics_of,
    model_label,
    number,
    read_manifest,
    read_perplexity,
    read_zero_shot,
    resolve_rows,
    value_of,
)
from obr.runtime.files import write_text

DETAILS = (
    "bits_per_weight", "file_mb", "seconds", "refinement_seconds", "relative_error", "held_out_error", "sparsity",
)  # fmt: skip


def build(config: dict, name: str, results: Path, published: Path) -> Table:
    """Gather one table of the config.

    config: as read from its files, or the part that the table needs: tables, recipes, activations and models.

    The frame holds, for each (model, row): `model, model_label, recipe, activations, label, method, setting,
    sparsity` (as asked for: a fraction or a pattern), then `{metric}_paper, {metric}_ours, {metric}_stderr`
    (zero-shot only) and `{metric}_delta` (ours - paper) for each text, task and `mean`, then the details asked for.

    Raises:
        ObrError: a recipe, model or detail is unknown, an artefact is missing (the sentence names the target
            to build), or a published filter is misspelt or ambiguous.
    """
    entry, models = entry_of(config, "tables", name), config["models"]
    rows, metrics, details = resolve_rows(entry, config), metrics_of(entry), list(entry.get("details") or [])
    for detail in details:
        if detail not in DETAILS:
            raise ObrError(f"Detail {detail!r} is unknown; choose from {', '.join(DETAILS)}.")
    labels = {key: model_label(models, key) for key in entry.get("models") or []}
    if not labels:
        raise ObrError(f"Table {entry.get('title', '')!r} has no models; list model keys under `models`.")
    quotes, evidence = papers.Quotes(entry, models, rows, published), Evidence()
    records = []
    for model, label in labels.items():
        for row in rows:
            if row.recipe is None and not quotes.any(model, row):
                continue
            record = _head(model, label, row, quotes)
            record |= _averaged([_measured(metrics, results, model, label, each, evidence) for each in row.seeds])
            record |= _quoted(metrics, quotes, model, label, row, evidence, record)
            if row.recipe is None:
                record |= _details(details, {})
            elif details or row.recipe.method != "dense":
                manifests = [read_manifest(results, model, each) for each in row.seeds]
                evidence.manifests[_place(evidence, label, row, manifests[0])] = manifests[0]
                found = pd.DataFrame([_details(details, manifest) for manifest in manifests])
                record |= found.mean(skipna=False).to_dict()
            if row.recipe is not None and row.recipe.chosen_mask in MASKS:
                evidence.masks[row.recipe.chosen_mask][row.label] = None
            records.append(record)
    if not records:
        raise ObrError(f"Table {entry.get('title', '')!r} has nothing to show; give it rows with recipes.")
    notes = notes_of(entry, metrics, evidence, quotes.frame, published)
    return Table(_ordered(records, metrics), notes, entry.get("title", ""), metrics, details)


def _place(evidence: Evidence, model: str, row: Row, manifest: dict) -> tuple[str, str]:
    """(model, row) as notes name them: by the row's label, with its recipe where another row has that label."""
    other = evidence.manifests.get((model, row.label), manifest)
    return model, row.label if other == manifest else f"{row.label} [{row.checkpoint}]"


def _head(model: str, label: str, row: Row, quotes: papers.Quotes) -> dict:
    names = {"model": model, "model_label": label, "recipe": row.checkpoint, "activations": row.activations}
    names["label"] = row.label
    if row.recipe is None:
        return names | {"method": "", **quotes.setting(model, row)}
    asked = "by layer" if row.recipe.allocation else row.recipe.pattern or row.recipe.sparsity
    return names | {"method": row.recipe.method, "setting": row.recipe.setting, "sparsity": asked}


def _measured(metrics, results, model, label, row, evidence: Evidence) -> dict:
    """`{metric}_ours` and `{metric}_stderr` of one (model, recipe); accuracies in percent."""
    record, scores = {}, []
    for metric in metrics:
        key = metric.key
        if row.recipe is None or metric.kind == "quoted":
            record[f"{key}_ours"] = float("nan")
        elif metric.kind == "perplexity":
            artefact = read_perplexity(results, model, row, key)
            evidence.perplexity.append((label, key, artefact))
            record[f"{key}_ours"] = value_of(artefact)
        elif metric.kind == "minutes":
            seconds = None if row.recipe.method == "dense" else read_manifest(results, model, row).get("seconds")
            record["minutes_ours"] = number(seconds) / 60
        elif metric.kind == "zero_shot":
            artefact = read_zero_shot(results, model, row, key)
            evidence.zero_shot.append((label, key, artefact))
            scores.append((100 * number(artefact["value"]), 100 * number(artefact.get("stderr"))))
            record[f"{key}_ours"], record[f"{key}_stderr"] = scores[-1]
        else:  # the mean comes last, when all its tasks are read; NaN if one of them is
            values, errors = zip(*scores)
            record["mean_ours"] = sum(values) / len(values)
            record["mean_stderr"] = sum(e**2 for e in errors) ** 0.5 / len(errors)
    return record


def _averaged(records: list[dict]) -> dict:
    """Means over seeds, with their standard deviation in place of each run's own error; one seed as it is."""
    if len(records) == 1:
        return records[0]
    frame = pd.DataFrame(records)
    ours = frame[[column for column in frame if column.endswith("_ours")]]
    spread = ours.std(ddof=1, skipna=False).rename(lambda column: column.replace("_ours", "_stderr"))
    return ours.mean(skipna=False).to_dict() | spread.to_dict()


def _quoted(metrics, quotes, model, label, row, evidence: Evidence, measured: dict) -> dict:
    """`{metric}_paper` and `{metric}_delta` of one (model, recipe).

    Seven parameters: the row, and what is known of it.
    """
    record = {}
    for metric in metrics:
        chosen = quotes.rows(model, row, metric.published)
        printed = chosen is not None and not chosen.empty
        if printed:
            evidence.quoted.append((f"{label}: {row.label}", chosen))
        record[f"{metric.key}_paper"] = float(chosen["value"].iloc[0]) if printed else float("nan")
        record[f"{metric.key}_delta"] = measured[f"{metric.key}_ours"] - record[f"{metric.key}_paper"]
    return record


def _details(details: list[str], manifest: dict) -> dict:
    bits = manifest.get("bits_per_weight") or {}
    read = {
        "bits_per_weight_theoretical": bits.get("theoretical"),
        "bits_per_weight_file": bits.get("file"),
        "file_mb": number(manifest.get("file_bytes")) / 1e6,
        "seconds": manifest.get("seconds"),
        "refinement_seconds": (manifest.get("refinement") or {}).get("seconds"),
        "relative_error": manifest.get("relative_error"),
        "held_out_error": manifest.get("held_out_error"),
        "sparsity_measured": manifest.get("sparsity"),
    }
    return {column: number(read[column]) for detail in details for column in detail_columns(detail)}


def _ordered(records: list[dict], metrics: list[Metric]) -> pd.DataFrame:
    """Paper, ours, standard error, delta side by side for each metric; details last."""
    frame = pd.DataFrame(records)
    parts = [f"{m.key}_{part}" for m in metrics for part in ("paper", "ours", "stderr", "delta")]
    parts = [column for column in parts if column in frame]
    head = list(frame.columns[:8])
    return frame[head + parts + [c for c in frame.columns if c not in {*head, *parts}]]


def write(table: Table, out_stem: Path) -> None:
    """Write `out_stem` + .csv (all digits), .md, .html and .tex (rounded, best compressed value in bold).

    The LaTeX file is a whole table environment; it needs the packages booktabs and graphicx.
    """
    stem = Path(out_stem)
    write_text(table.frame.to_csv(index=False), stem.with_name(stem.name + ".csv"))
    write_text(markdown(table), stem.with_name(stem.name + ".md"))
    write_text(html(table), stem.with_name(stem.name + ".html"))
    write_text(latex(table, stem.name), stem.with_name(stem.name + ".tex"))


# --- Notes ----------------------------------------------------------------------------------------
