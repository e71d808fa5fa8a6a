"""What tables and figures are made of: a config entry's rows and metrics, and the artefacts behind them."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from obr.config import paths
from obr.config.recipe import Recipe
from obr.config.schemes import evaluated_entry, scheme_of
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
    """One recipe of a table or figure under one activation scheme. `checkpoint` is the recipe's key in the config.

    key: tells the rows of an entry apart, such as "gptq-w4-quarot/a4kv4".
    variants: the same recipe under each of several seeds, itself included; empty where one seed is asked for.
    published_bits: bits per weight at which the published figure draws the row; None where it counts as ours does.
    A row that only quotes has no recipe.
    """

    key: str
    label: str
    recipe: Recipe | None
    checkpoint: str
    activations: str
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


def resolve_rows(entry: dict, config: dict) -> list[Row]:
    """The `rows` of an entry, each a recipe key, `{recipe, activations?, label?, published?, published_bits?,
    variants?}` or, for a row that only quotes, `{label, published}`.

    config: with the sections that rows name: recipes, activations and layer_options.

    Raises:
        ObrError: no rows, or a recipe or activation scheme is not in the config.
    """
    if not entry.get("rows"):
        raise ObrError(f"Entry {entry.get('title', '')!r} has no rows; list recipe keys under `rows`.")
    rows = []
    for item in entry["rows"]:
        item = {"recipe": item} if isinstance(item, str) else item
        published = item.get("published")
        if "recipe" not in item:
            rows.append(Row(item["label"], item["label"], None, "", "", published))
            continue
        row = replace(_row(item["recipe"], item, config), published=published)
        variants = tuple(_row(key, item, config) for key in item.get("variants") or [])
        rows.append(replace(row, variants=variants, published_bits=item.get("published_bits")))
    return rows


def _row(key: str, item: dict, config: dict) -> Row:
    """The row of a recipe, the item's own or that of another seed."""
    if key not in config["recipes"]:
        raise ObrError(f"Recipe {key!r} is not in the config; known are {', '.join(sorted(config['recipes']))}.")
    scheme = scheme_of(config, {**item, "recipe": key})
    recipe = Recipe.parse(evaluated_entry(config, key, scheme), key)
    return Row(f"{key}/{scheme}", item.get("label") or recipe.label or key, recipe, key, scheme, None)


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


def entry_of(config: dict, section: str, name: str) -> dict:
    """A table or figure of a config. Raises ObrError if there is none of that name."""
    if name not in (config.get(section) or {}):
        known = ", ".join(config.get(section) or {}) or "none"
        raise ObrError(f"{section} of the config has no {name!r}; it has {known}.")
    return config[section][name]


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
    """The manifest of a row's checkpoint. Raises ObrError if it is not there."""
    return read_artefact(paths.path(results, "manifest", model=model, recipe=row.checkpoint))


def read_perplexity(results: Path, model: str, row: Row, text: str) -> dict:
    """The perplexity of a row on a text. Raises ObrError if it is not there."""
    return _score(results, model, row, "perplexity", text)


def read_zero_shot(results: Path, model: str, row: Row, task: str) -> dict:
    """The accuracy of a row in a task. Raises ObrError if it is not there."""
    return _score(results, model, row, "zero_shot", task)


def _score(results: Path, model: str, row: Row, kind: str, name: str) -> dict:
    """A score of an evaluation. Raises ObrError, naming the target to build, if it is not there."""
    path = paths.path(results, "evaluation", model=model, recipe=row.checkpoint, activations=row.activations)
    scores = read_artefact(path).get(kind, {})
    if name not in scores:
        raise ObrError(f"{path} has no {kind} {name}; build it with `snakemake {path}`.")
    return scores[name]


def number(value: float | None) -> float:
    """A number of an artefact; NaN where it has none."""
    return float("nan") if value is None else float(value)


def value_of(artefact: dict, key: str = "value", status: str = "status") -> float:
    """A number of an artefact as `files.finite` wrote it, infinite ones too; NaN where there is none."""
    if artefact[key] is None and artefact.get(status, "finite") != "finite":
        return float(artefact[status])
    return number(artefact[key])
