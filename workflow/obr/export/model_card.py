"""The card of a checkpoint on the hub: scores, recipe, command, licence, limits."""

import json
from pathlib import Path

from obr.config import paths
from obr.config.recipe import Recipe
from obr.config.recipe_settings import command_line
from obr.config.schemes import SIXTEEN_BITS_SCHEME
from obr.errors import ObrError
from obr.report.table_rows import HEADINGS, number, read_artefact, value_of

# The hub's names of licences that the models' own records spell otherwise.
LICENCES = {"apache-2.0": "apache-2.0", "mit": "mit", "llama2": "llama2", "llama3": "llama3", "llama3.1": "llama3.1"}


def model_card(checkpoint: Path, manifest: dict, repo: str, licence: str | None = None) -> str:
    """The card of a checkpoint, Markdown with the hub's metadata on top.

    Raises:
        ObrError: nothing recorded the base model's licence, and none is given.
    """
    recipe = Recipe.parse(manifest["recipe"])
    source = manifest.get("source") or {}
    licence = licence or source.get("licence")
    if not licence:
        raise ObrError(
            f"{checkpoint} does not record its base model's licence; give it with --licence, such as llama2."
        )
    base = (source.get("source") or {}).get("repo") or (source.get("source") or {}).get("package")
    name = repo.split("/")[1]
    parts = [
        _metadata(licence, base),
        f"# {name}",
        _what(recipe, manifest, base),
        "## Measured\n\n" + _measured(checkpoint, manifest),
        "## Use\n\n```python\nfrom huggingface_hub import snapshot_download\nimport obr\n\n"
        f'model = obr.load(snapshot_download("{repo}"))  # a transformers model, weights unpacked\n```',
        "## Recipe\n\n```json\n" + json.dumps(_set_fields(recipe), indent=2) + "\n```\n\n" + _commands(recipe),
        "## Licence\n\n"
        f"The weights derive from {base or 'the base model'} and stay under its licence, {licence}; its terms on use "
        "and naming apply to this checkpoint too.",
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in _limits(recipe, manifest)),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(licence: str, base: str | None) -> str:
    known = LICENCES.get(licence.lower())
    lines = ["---", f"license: {known or 'other'}"]
    lines += [] if known else [f"license_name: {json.dumps(licence)}"]
    lines += [f"base_model: {base}", "base_model_relation: quantized"] if base and "/" in base else []
    return "\n".join([*lines, "library_name: obr", "tags: [obr, pruning, quantization]", "---"])


def _what(recipe: Recipe, manifest: dict, base: str | None) -> str:
    sparsity = f"{recipe.pattern} sparsity" if recipe.pattern else f"{100 * recipe.sparsity:g} % sparsity"
    bits, rotation = manifest["bits_per_weight"], recipe.rotation
    calibrated = manifest.get("calibration")
    data = f", calibrated on {calibrated['tokens']:,} tokens of {calibrated['text']}" if calibrated else ""
    pruned = f" at {sparsity}" if recipe.sparsity else " as allocated to layers" if recipe.allocation else ""
    turned = f"rotated by {rotation}" if rotation != "none" else "not rotated"
    return (
        f"{base or 'A model'} compressed by {recipe.method} to {recipe.setting}{pruned}, {turned}{data}. Its linear "
        f"layers take {bits['theoretical']:.2f} bits a weight in theory and {bits['file']:.2f} in these files, which "
        f"hold {manifest['file_bytes'] / 1e6:,.0f} MB with the 16-bit embeddings."
    )


def _measured(checkpoint: Path, manifest: dict) -> str:
    """One row of what is known: every evaluation of this checkpoint in its results folder, and of the dense model."""
    results, model, key = checkpoint.parents[2], checkpoint.parent.name, checkpoint.name
    rows, meanings = {}, {}
    places = [
        (recipe, folder) for recipe in dict.fromkeys(("dense", key)) for folder in _evaluated(results, model, recipe)
    ]
    for recipe, scheme in places:
        row, names = {}, {"model": model, "recipe": recipe, "activations": scheme}
        scores = read_artefact(paths.path(results, "evaluation", **names))
        for name, score in sorted(scores["perplexity"].items()):
            column = f"{HEADINGS.get(name, name)} perplexity"
            row[column] = f"{value_of(score):.2f}"
            meanings[f"{column}: {score.get('definition')}."] = score.get("definition")
        for name, score in sorted(scores["zero_shot"].items()):
            row[f"{HEADINGS.get(name, name)} {score['metric']}, %"] = f"{100 * number(score['value']):.2f}"
            meanings[f"Zero-shot prompts: {score.get('prompts')}."] = score.get("prompts")
        if row:
            rows[recipe if scheme == SIXTEEN_BITS_SCHEME else f"{recipe}, {scheme}"] = row
    error = manifest.get("relative_error")
    notes = (
        f"Mean relative error of the layers' outputs on the calibration data: {error:.4f}."
        if error is not None
        else ""
    )
    if not any(recipe == key for recipe, _ in places):
        return f"No evaluation of this checkpoint was found beside it. {notes}".strip()
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"| | {' | '.join(columns)} |", f"| :-- |{' --: |' * len(columns)}"]
    lines += [
        f"| {label} | {' | '.join(row.get(column, '–') for column in columns)} |" for label, row in rows.items()
    ]
    notes = " ".join([notes, *(text for text, known in meanings.items() if known)])
    return "\n".join([*lines, "", notes]).strip()


def _evaluated(results: Path, model: str, recipe: str) -> list[str]:
    """The activation schemes under which a checkpoint was evaluated, "a16" first."""
    folder = paths.folder(results, "evaluation", model=model, recipe=recipe, activations="*")
    found = [path.stem for path in folder.glob("*.json")]
    return sorted(found, key=lambda scheme: (scheme != SIXTEEN_BITS_SCHEME, scheme))


def _set_fields(recipe: Recipe) -> dict:
    """The recipe without what it does not set."""
    return {
        k: v for k, v in recipe.to_dict().items() if v is not None and not (isinstance(v, dict) and v["bits"] == 16)
    }


def _commands(recipe: Recipe) -> str:
    entry = command_line(_set_fields(recipe))
    if recipe.method == "released":
        return (
            f"Made by\n\n```sh\nobr released --recipe {entry} --model MODEL --released DOWNLOAD --out CHECKPOINT\n```"
        )
    flags = " --rotation ROTATION.safetensors" if recipe.rotation != "none" else ""
    if recipe.needs_hessian:
        flags += " --hessians HESSIANS" if recipe.hessian == "cached" else " --tokens TOKENS.safetensors"
    return f"Made by\n\n```sh\nobr compress --recipe {entry} --model MODEL{flags} --out CHECKPOINT\n```"


def _limits(recipe: Recipe, manifest: dict) -> list[str]:
    limits = [
        "Weights are unpacked when they are loaded: what is saved is disk, not memory or time.",
        "It was not aligned, filtered or tested for safety after compression; it may be worse than its base model in "
        "ways that these numbers do not show.",
    ]
    if recipe.activations.bits < 16 or recipe.keys.bits < 16:
        limits.append("Activations, keys and values are quantised in simulation, in the arithmetic of the model.")
    if recipe.rotation != "none":
        limits.append("Part of the rotation is computed online, so that other loaders give nonsense: use obr.load.")
    if manifest.get("flagged_layers"):
        limits.append(f"{manifest['flagged_layers']} layers did not go as asked; layers.csv has the reasons.")
    return limits
