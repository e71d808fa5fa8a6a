"""A small results folder with every artefact of some models and recipes, written without computing any."""

import json
from pathlib import Path

import pandas as pd

from obr.config import paths
from obr.report import published

TASKS = list(published.PAPER_TASKS)
TABLE_1 = {"source": "obr", "table": "OBR Table 1 / exp_quarot.jpg"}
MODELS = {
    "llama": {"label": "Llama-2-7B", "published": "Llama-2-7B"},
    "tiny": {"label": "Tiny_1 & co"},
}
SCHEMES = {"a4kv4": {"activations": {"bits": 4}, "keys": {"bits": 4}, "values": {"bits": 4}}}
A4 = {"activations": "a4kv4"}  # of rows that name no scheme
OBR = {
    "method": "obr_gptq",
    "rotation": "quarot",
    "calibration": "wikitext2",
    "bits": 4,
    "sparsity": 0.5,
    **A4,
}
RECIPES = {
    "dense": {"label": "Dense", "method": "dense"},
    "rtn": {"label": "RTN", "method": "rtn", "bits": 3, "rotation": "quarot", **A4},
    "obr": {"label": "OBR (GPTQ)", **OBR},
    "obr_cached": {"label": "OBR, cached", **OBR, "hessian": "cached"},
    "obr_24": {"label": "OBR 2:4", **OBR, "pattern": "2:4"},
}
CONFIG = {"recipes": RECIPES, "activations": SCHEMES, "models": MODELS}
OBR_A16 = {"recipe": "obr", "activations": "a16", "label": "OBR, 16-bit activations"}
PERPLEXITY = {"dense": 5.5, "rtn": 140.0, "obr": 8.1, "obr_cached": 8.3, "obr_24": 13.0}
ENTRY = {
    "title": "Main results (50% & W4A4KV4)",
    "models": ["llama", "tiny"],
    "rows": [
        {"recipe": "dense", "published": {"method": "FP16"}},
        {"recipe": "rtn", "published": {"method": "QuaRot(quant-only)"}},
        {"recipe": "obr", "published": {"method": "OBR_GPTQ"}},
        "obr_cached",
    ],
    "perplexity": ["wikitext2", "sotu"],
    "zero_shot": TASKS,
    "mean": True,
    "details": ["bits_per_weight", "file_mb", "relative_error", "sparsity"],
    "published": TABLE_1,
    "note": "A note of the config.",
}


def save(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def fabricate(results: Path) -> Path:
    """A results folder with every artefact of every model and recipe above."""
    for model in MODELS:
        for place, (key, recipe) in enumerate(RECIPES.items()):
            shared = {"device": "cpu", "versions": {"torch": "2.13.0"}, "seconds": 1.0}
            write_checkpoint(results, model, key, recipe, shared)
            scheme = recipe.get("activations", "a16")
            for text, windows in (("wikitext2", 141), ("sotu", 20)):
                content = {
                    "value": PERPLEXITY[key],
                    "tokens": 2048 * windows,
                    "windows": windows,
                    "seqlen": 2048,
                }
                content |= {"definition": "exp of the mean cross-entropy", **shared}
                save_score((results, model, key, scheme), "perplexity", text, content)
            for i, task in enumerate(TASKS):
                score = {
                    "task": task,
                    "value": 0.75 - 0.02 * place - 0.01 * i,
                    "stderr": 0.01,
                    "metric": "acc",
                }
                score |= {"n": 200, "limit": 200 if model == "tiny" else None, **shared}
                save_score((results, model, key, scheme), "zero_shot", task, score)
    for model in MODELS:
        scores = json.loads(evaluation(results, model, "obr", "a4kv4").read_text(encoding="utf-8"))
        for score in scores["perplexity"].values():
            score["value"] = 7.5
        save(evaluation(results, model, "obr", "a16"), scores)
    return results


def evaluation(results: Path, model: str, recipe: str, scheme: str = "a16") -> Path:
    """The file of the scores of a checkpoint under an activation scheme."""
    return paths.path(results, "evaluation", model=model, recipe=recipe, activations=scheme)


def save_score(place: tuple[Path, str, str, str], kind: str, name: str, content: dict) -> None:
    """Write a score beside those that are there. place: results, model, recipe and scheme."""
    path = evaluation(*place)
    scores = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"perplexity": {}, "zero_shot": {}}
    scores[kind][name] = content
    save(path, scores)


def change_scores(path: Path, kind: str, name: str | None = None, **fields) -> None:
    """Change fields of the scores of a kind in a file of scores; name: of one of them alone."""
    scores = json.loads(path.read_text(encoding="utf-8"))
    for one, score in scores[kind].items():
        if name in (None, one):
            score |= fields
    save(path, scores)


def write_checkpoint(results: Path, model: str, key: str, recipe: dict, shared: dict) -> None:
    """Write the manifest and the report of the layers of a checkpoint."""
    bits = recipe.get("bits", 16) * (1 - recipe.get("sparsity", 0)) + (1 if "sparsity" in recipe else 0)
    manifest = {"recipe": {"hessian": "sequential", **recipe}, "file_bytes": 2_500_000, "relative_error": 0.1}
    manifest["bits_per_weight"] = {"theoretical": bits, "file": bits + 0.03}
    calibrated = recipe["method"] not in ("dense", "rtn")
    manifest |= {"sparsity": 0.501, "calibration": {"tokens": 262144} if calibrated else None, **shared}
    save(paths.path(results, "manifest", model=model, recipe=key), manifest)
    lines = []
    for block in range(7):
        left = {"bits": 16, "sparsity": 0.0, "relative_error": 0.0} if block == 6 else {}  # alone
        for i, layer in enumerate(("q", "k", "v", "o", "up", "gate", "down")):
            error = 0.02 * (1 + block) * (1 + 0.2 * i) * (0.5 + len(key) / 4)
            line = {"block": block, "layer": layer, "bits": 4, "sparsity": 0.5, "relative_error": error}
            lines.append(line | left)
    place = paths.path(results, "layers", model=model, recipe=key)
    place.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(lines).to_csv(place, index=False)
