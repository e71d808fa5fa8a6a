"""Tables: what the paper prints, what was measured here, and the difference, with notes from the artefacts.

Reads only results already on disk (manifests, perplexities, zero-shot scores) and the published numbers.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from obr import errata
from obr import published as papers
from obr.artefacts import (
    HEADINGS,
    Metric,
    Row,
    metrics_of,
    model_label,
    number,
    read_manifest,
    read_perplexity,
    read_zero_shot,
    resolve_rows,
    value_of,
)
from obr.errors import ObrError
from obr.files import write_text
from obr.render import Table, detail_columns, html, latex, markdown

DETAILS = ("bits_per_weight", "file_mb", "seconds", "relative_error", "held_out_error", "sparsity")
HESSIANS = {
    "sequential": "of each block's inputs from the already compressed blocks before it",
    "cached": "of the dense model, rotated where the recipe rotates",
}
MASKS = {
    "wanda": "from the mean over calibration sequences",
    "wanda_harmonic": "from a sum in which calibration sequence i counts 1/i, as in the released code",
}


@dataclass
class Evidence:
    """Every artefact a table read, for its notes: what was measured, and what was quoted."""

    perplexity: list[tuple[str, str, dict]] = field(default_factory=list)  # model label, text, artefact
    zero_shot: list[tuple[str, str, dict]] = field(default_factory=list)  # model label, task, artefact
    manifests: dict[tuple[str, str], dict] = field(default_factory=dict)  # by (model label, row label)
    quoted: list[tuple[str, pd.DataFrame]] = field(default_factory=list)  # model label: row label, its rows
    masks: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))  # row labels, by mask


def build(entry: dict, recipes: dict, models: dict, results: Path, published: Path) -> Table:
    """Gather one table of the config.

    The frame holds, for each (model, row): `model, model_label, recipe, label, method, setting, sparsity`
    (as asked for: a fraction or a pattern), then `{metric}_paper, {metric}_ours, {metric}_stderr` (zero-shot
    only) and `{metric}_delta` (ours - paper) for each text, task and `mean`, then the details asked for.

    Raises:
        ObrError: a recipe, model or detail is unknown, an artefact is missing (the sentence names the target
            to build), or a published filter is misspelt or ambiguous.
    """
    rows, metrics, details = resolve_rows(entry, recipes), metrics_of(entry), list(entry.get("details") or [])
    for name in details:
        if name not in DETAILS:
            raise ObrError(f"Detail {name!r} is unknown; choose from {', '.join(DETAILS)}.")
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
                evidence.manifests[label, row.label] = manifests[0]
                record |= pd.DataFrame([_details(details, manifest) for manifest in manifests]).mean().to_dict()
            if row.recipe is not None and row.recipe.chosen_mask in MASKS:
                evidence.masks[row.recipe.chosen_mask][row.label] = None
            records.append(record)
    if not records:
        raise ObrError(f"Table {entry.get('title', '')!r} has nothing to show; give it rows with recipes.")
    notes = _notes(entry, metrics, evidence, quotes.frame, published)
    return Table(_ordered(records, metrics), notes, entry.get("title", ""), metrics, details)


def _head(model: str, label: str, row: Row, quotes: papers.Quotes) -> dict:
    names = {"model": model, "model_label": label, "recipe": row.key, "label": row.label}
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
    spread = ours.std(ddof=1).rename(lambda column: column.replace("_ours", "_stderr"))
    return ours.mean().to_dict() | spread.to_dict()


def _quoted(metrics, quotes, model, label, row, evidence: Evidence, measured: dict) -> dict:
    """`{metric}_paper` and `{metric}_delta` of one (model, recipe)."""
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
    head = list(frame.columns[:7])
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


def _notes(
    entry: dict, metrics: list[Metric], evidence: Evidence, frame: pd.DataFrame | None, published: Path
) -> list[str]:
    notes = [entry["note"]] if entry.get("note") else []
    seeds = entry.get("seeds") or []
    if len(seeds) > 1:
        notes.append(
            f"Mean ± standard deviation over {len(seeds)} seeds ({', '.join(map(str, seeds))}) of calibration "
            "windows, drawn rotations and random masks; rows that none of these touch have one value."
        )
    notes += _perplexity_notes(evidence) + _zero_shot_notes(evidence)
    mean = next((m for m in metrics if m.key == "mean"), None)
    if mean:
        text = f"Mean: plain mean of the {len(entry['zero_shot'])} tasks, taken as independent for its error"
        six = "" if mean.published else "; not the paper's six tasks, so no printed mean stands beside it"
        notes.append(f"{text}{six}.")
    meanings = {
        "bits_per_weight": "Bits per weight: of the compressed linear layers, in theory / in the file.",
        "file_mb": "File: the whole checkpoint, embeddings included, in MB of 10⁶ bytes.",
        "relative_error": "Relative error: squared error of the layers' outputs on the calibration data over "
        "their squared norm; mean over the layers.",
        "held_out_error": "Held-out error: the same on windows that no Hessian has seen.",
    }
    notes += [text for detail, text in meanings.items() if detail in (entry.get("details") or [])]
    notes += _compression_notes(evidence) + _mask_notes(evidence) + _origin_notes(evidence)
    if any(metric.kind == "minutes" for metric in metrics):
        notes.append(_time_note(evidence))
    if frame is not None:
        notes += errata.notes(frame, evidence.quoted)
    notes += papers.remarks(evidence.quoted)
    return notes + (papers.mentions(papers.load(published), entry["mentions"]) if entry.get("mentions") else [])


def _time_note(evidence: Evidence) -> str:
    devices = " and ".join(sorted({str(m.get("device")) for m in evidence.manifests.values()}))
    cached = any(m["recipe"].get("hessian") == "cached" for m in evidence.manifests.values())
    apart = "; cached Hessians, collected once for all recipes, are not in it" if cached else ""
    return f"Compression: wall-clock of a recipe's compression as its run recorded it, here on {devices}{apart}."


def _perplexity_notes(evidence: Evidence) -> list[str]:
    variants = defaultdict(dict)
    for model, text, artefact in evidence.perplexity:
        facts = tuple(artefact.get(k) for k in ("definition", "windows", "seqlen", "tokens"))
        variants[text].setdefault(facts, {})[model] = None
    notes = []
    for text, found in variants.items():
        for (definition, windows, seqlen, tokens), models in found.items():
            whose = f" ({', '.join(models)})" if len(found) > 1 else ""
            definition = str(definition).rstrip(".")
            notes.append(
                f"{HEADINGS.get(text, text)} perplexity{whose}: {definition}; {windows:,} windows of "
                f"{seqlen:,} tokens, {tokens:,} tokens in all."
            )
    return notes + _bos_notes("Perplexity", [(model, artefact) for model, _, artefact in evidence.perplexity])


def _zero_shot_notes(evidence: Evidence) -> list[str]:
    facts, prompts = {}, defaultdict(dict)
    for model, task, artefact in evidence.zero_shot:
        share = "" if artefact.get("limit") is None else "the first "
        facts[f"{HEADINGS.get(task, task)} {artefact['metric']} of {share}{artefact['n']:,}"] = None
        if artefact.get("prompts"):
            prompts[artefact["prompts"]][model] = None
    if not facts:
        return []
    notes = [f"Zero-shot: accuracy in percent ± standard error; {', '.join(facts)} examples."]
    notes += [f"Zero-shot prompts: {text}{_whose(prompts, models)}." for text, models in prompts.items()]
    return notes + _bos_notes("Zero-shot", [(model, artefact) for model, _, artefact in evidence.zero_shot])


def _bos_notes(what: str, found: list[tuple[str, dict]]) -> list[str]:
    """The artefacts' notes on missing BOS tokens, each once. found: (model label, artefact)."""
    return list(dict.fromkeys(f"{what} ({model}): {about['note']}." for model, about in found if about.get("note")))


def _compression_notes(evidence: Evidence) -> list[str]:
    calibrations, hessians = defaultdict(dict), defaultdict(dict)
    for (_, label), manifest in evidence.manifests.items():
        calibration = manifest.get("calibration")
        if calibration:
            name = manifest["recipe"].get("calibration")
            text = calibration.get("text", name)
            of = "" if text == name else f" of {text}"  # an edition may keep a name and change its text
            calibrations[f"{name}, {calibration['tokens']:,} tokens{of}"][label] = None
            hessians[manifest["recipe"].get("hessian")][label] = None
    notes = [f"Calibration: {text}{_whose(calibrations, labels)}." for text, labels in calibrations.items()]
    for kind, labels in hessians.items():
        notes.append(f"Hessians: {kind}, {HESSIANS.get(kind, 'of unknown origin')}{_whose(hessians, labels)}.")
    used = [(model, manifest.get("calibration") or {}) for (model, _), manifest in evidence.manifests.items()]
    return notes + _bos_notes("Calibration", used)


def _mask_notes(evidence: Evidence) -> list[str]:
    """Which norms Wanda's masks are from; nothing where all are of the mean."""
    if "wanda_harmonic" not in evidence.masks:
        return []
    return [f"Mask {m}: norms {MASKS[m]}{_whose(evidence.masks, rows)}." for m, rows in evidence.masks.items()]


def _whose(groups: dict, labels: dict) -> str:
    return f" ({', '.join(labels)})" if len(groups) > 1 else ""


def _origin_notes(evidence: Evidence) -> list[str]:
    """Devices and library versions, as recorded by the runs themselves."""
    evaluations = [a for *_, a in evidence.perplexity] + [a for *_, a in evidence.zero_shot]
    devices = {a["device"]: None for a in evaluations if a.get("device")}
    versions = defaultdict(dict)
    for artefact in [*evaluations, *evidence.manifests.values()]:
        for library, version in (artefact.get("versions") or {}).items():
            versions[library][str(version)] = None
    notes = [f"Evaluated on {' and '.join(devices)}."] if devices else []
    listed = ", ".join(f"{library} {' and '.join(found)}" for library, found in sorted(versions.items()))
    return [*notes, f"Versions: {listed}."] if listed else notes
