"""What tables and figures are made of: a config entry's rows and metrics, and the artefacts behind them."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from obr.config import paths
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.report.published import MEANS

HEADINGS = {
    "wikitext2": "WikiText-2",
    "c4": "C4",
    "piqa": "PIQA",
    "boolq": "BoolQ",
    "hellaswag": "HellaSwag",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "winogrande": "WinoGrande",
    "lambada_openai": "LAMBADA",
    "openbookqa": "OpenBookQA",
    "social_iqa": "SIQA",
    "zeroshot_avg": "Mean",
    "zeroshot6_lambada_avg": "Mean of 6 with LAMBADA",
    "zeroshot8_avg": "Mean of 8 tasks",
    "zeroshot9_avg": "Mean of 9 tasks",
}


@dataclass(frozen=True)
class Row:
    """One recipe of a table or figure. `checkpoint` is the recipe whose folder holds its weights.

    variants: the same recipe under each of several seeds, itself included; empty where one seed is asked for.
    published_bits: bits per weight at which the published figure draws the row; None where it counts as ours does.
    A row that only quotes has no recipe.
    """

    key: str
    label: str
    recipe: Recipe | None
    checkpoint: str
    published: dict | None
    variants: tuple["Row", ...] = ()
    published_bits: float | None = None

    @property
    def seeds(self) -> tuple["Row", ...]:
        """Its variants, or itself alone."""
        return self.variants or (self,)


@dataclass(frozen=True)
class Metric:
    """One column: `published` is its name among the published metrics, `kind` where ours comes from."""

    key: str
    heading: str
    published: str
    lower_is_better: bool
    kind: str = "zero_shot"  # or perplexity, mean, minutes, quoted


def resolve_rows(entry: dict, recipes: dict) -> list[Row]:
    """The `rows` of an entry, each a recipe key, `{recipe, label?, published?, published_bits?, variants?}` or, for
    a row that only quotes, `{label, published}`.

    Raises:
        ObrError: no rows, or a recipe (or the one that its `weights` names) is not in the config.
    """
    if not entry.get("rows"):
        raise ObrError(f"Entry {entry.get('title', '')!r} has no rows; list recipe keys under `rows`.")
    rows = []
    for item in entry["rows"]:
        item = {"recipe": item} if isinstance(item, str) else item
        published = item.get("published")
        if "recipe" not in item:
            rows.append(Row(item["label"], item["label"], None, "", published))
            continue
        label = item.get("label")
        variants = tuple(_row(key, recipes, label, None) for key in item.get("variants") or [])
        row = _row(item["recipe"], recipes, label, published)
        rows.append(replace(row, variants=variants, published_bits=item.get("published_bits")))
    return rows


def _row(key: str, recipes: dict, label: str | None, published: dict | None) -> Row:
    checkpoint = recipes.get(key, {}).get("weights") or key
    for name in (key, checkpoint):
        if name not in recipes:
            raise ObrError(f"Recipe {name!r} is not in the config; known are {', '.join(sorted(recipes))}.")
    recipe = Recipe.parse(recipes[key], key)
    return Row(key, label or recipe.label or key, recipe, checkpoint, published)


def model_label(models: dict, key: str) -> str:
    """The name a model is shown by. Raises ObrError if the config does not know it."""
    if key not in models:
        raise ObrError(f"Model {key!r} is not in the config; known are {', '.join(sorted(models))}.")
    return models[key].get("label") or key


def metrics_of(entry: dict) -> list[Metric]:
    """The columns of an entry: its texts, its tasks, the tasks' mean and the time of compression if it wants
    them, and published metrics that have no counterpart of ours.

    Raises:
        ObrError: a mean is wanted of no tasks, or a column twice.
    """
    names = entry.get("published_metrics") or {}
    texts, tasks = entry.get("perplexity") or [], entry.get("zero_shot") or []
    texts = [texts] if isinstance(texts, str) else texts
    found = [Metric(t, HEADINGS.get(t, t), names.get(t, f"{t}_ppl"), True, "perplexity") for t in texts]
    found += [Metric(t, HEADINGS.get(t, t), names.get(t, t), False) for t in tasks]
    if entry.get("mean"):
        if not tasks:
            raise ObrError(f"Table {entry.get('title', '')!r} wants a mean of no tasks; list some in `zero_shot`.")
        # A mean over tasks other than those of a published mean has no counterpart.
        printed = MEANS.get(frozenset(names.get(t, t) for t in tasks), "")
        found.append(Metric("mean", "Mean", names.get("mean", printed), False, "mean"))
    if entry.get("time"):
        name = names.get("minutes", "compression_time_min")
        found.append(Metric("minutes", "Compression (min)", name, True, "minutes"))
    found += [Metric(q, HEADINGS.get(q, q), q, q.endswith("_ppl"), "quoted") for q in entry.get("quoted") or []]
    keys = [metric.key for metric in found]
    if len(set(keys)) < len(keys):
        raise ObrError(f"Entry {entry.get('title', '')!r} names a column twice: {', '.join(keys)}.")
    return found


def read_artefact(path: Path) -> dict:
    """One JSON artefact. Raises ObrError, naming the target to build, if it is missing or damaged."""
    require(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        raise ObrError(f"{path} is not valid JSON; delete it and build it with `snakemake {path}`.") from None


def require(path: Path) -> Path:
    """`path` itself. Raises ObrError, naming the target to build, if there is no such file."""
    if not Path(path).is_file():
        raise ObrError(f"{path} is missing; build it with `snakemake {path}`.")
    return path


def read_manifest(results: Path, model: str, row: Row) -> dict:
    return read_artefact(paths.path(results, "checkpoint", model=model, recipe=row.checkpoint))


def read_perplexity(results: Path, model: str, row: Row, text: str) -> dict:
    return read_artefact(paths.path(results, "perplexity", model=model, recipe=row.key, text=text))


def read_zero_shot(results: Path, model: str, row: Row, task: str) -> dict:
    return read_artefact(paths.path(results, "zero_shot", model=model, recipe=row.key, task=task))


def number(value) -> float:
    return float("nan") if value is None else float(value)


def value_of(artefact: dict, key: str = "value", status: str = "status") -> float:
    """A number of an artefact as `files.finite` wrote it, infinite ones too; NaN where there is none."""
    if artefact[key] is None and artefact.get(status, "finite") != "finite":
        return float(artefact[status])
    return number(artefact[key])
