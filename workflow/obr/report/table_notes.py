"""Sentences below a table: what was computed how, from the artefacts themselves."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from obr.report import errata
from obr.report import published as papers
from obr.report.table_rows import (
    HEADINGS,
    Metric,
)

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


def notes_of(
    entry: dict, metrics: list[Metric], evidence: Evidence, frame: pd.DataFrame | None, published: Path
) -> list[str]:
    """The notes under a table: what its numbers are, from the artefacts that it read.

    Args:
        entry: the table's, of the config. metrics: its columns. evidence: what its rows read.
        frame: published numbers, whose contradictions are noted; None where the table quotes none.
        published: their file.
    """
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
        "refinement_seconds": "Refinement: seconds of training, block by block, part of the compression's time; rows "
        "without are training-free.",
        "relative_error": "Relative error: squared error of the layers' outputs on the calibration data over "
        "their squared norm; mean over the layers.",
        "held_out_error": "Held-out error: the same on windows that no Hessian has seen.",
    }
    notes += [text for detail, text in meanings.items() if detail in (entry.get("details") or [])]
    notes += _compression_notes(evidence) + _rotation_notes(evidence) + _mask_notes(evidence)
    notes += _origin_notes(evidence)
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
        shots = artefact.get("num_fewshot")
        after = f" ({shots}-shot)" if shots else ""
        facts[f"{HEADINGS.get(task, task)} {artefact['metric']} of {share}{artefact['n']:,}{after}"] = None
        if artefact.get("prompts"):
            prompts[artefact["prompts"]][model] = None
    if not facts:
        return []
    few = any(artefact.get("num_fewshot") for *_, artefact in evidence.zero_shot)
    what = "Tasks" if few else "Zero-shot"
    notes = [f"{what}: accuracy in percent ± standard error; {', '.join(facts)} examples."]
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
            of = "" if text == name else f" of {text}"  # overrides may keep a name and change its text
            calibrations[f"{name}, {calibration['tokens']:,} tokens{of}"][label] = None
            hessians[manifest["recipe"].get("hessian")][label] = None
    notes = [f"Calibration: {text}{_whose(calibrations, labels)}." for text, labels in calibrations.items()]
    for kind, labels in hessians.items():
        notes.append(f"Hessians: {kind}, {HESSIANS.get(kind, 'of unknown origin')}{_whose(hessians, labels)}.")
    used = [(model, manifest.get("calibration") or {}) for (model, _), manifest in evidence.manifests.items()]
    return notes + _bos_notes("Calibration", used)


def _rotation_notes(evidence: Evidence) -> list[str]:
    """Rows whose rotation the model's family does not take, and why."""
    left_out = defaultdict(dict)
    for (model, label), manifest in evidence.manifests.items():
        rotation = manifest.get("rotation") or {}
        if rotation.get("asked"):
            left_out[model, rotation["asked"], rotation["reason"]][label] = None
    return [
        f"Not rotated: {model} in {', '.join(labels)}, whose recipes ask for {asked}; {reason}."
        for (model, asked, reason), labels in left_out.items()
    ]


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
