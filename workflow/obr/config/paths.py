"""Where each artefact lies below the folder of results: the one list, read by the rules and by the package."""

from pathlib import Path

ARTEFACTS = {
    "model_config": "models/{model}/config.json",
    "model": "models/{model}/source.json",
    "model_check": "models/{model}.checked.json",
    "text": "texts/{text}.txt",
    "text_source": "texts/{text}.json",
    "documents": "documents/{text}.jsonl",
    "documents_source": "documents/{text}.json",
    "task": "tasks/{task}/task.json",
    "released": "released/{model}/{recipe}/source.json",
    "rotation": "rotations/{rotation}/{model}.safetensors",
    "learning_curve": "rotations/{rotation}/{model}.csv",
    "calibration": "calibration/{calibration}/{model}.safetensors",
    "hessians": "hessians/{model}/{rotation}/{calibration}/hessian.json",
    "gradients": "gradients/{model}/{rotation}/{calibration}.safetensors",
    "sensitivity": "sensitivity/{model}/{rotation}/{calibration}/{options}/losses.json",
    "allocation": "allocations/{model}/{recipe}.json",
    "checkpoint": "compressed/{model}/{recipe}",
    "manifest": "manifests/{model}/{recipe}.json",
    "layers": "layers/{model}/{recipe}.csv",
    "evaluation": "evaluations/{model}/{recipe}/{activations}.json",
    "kernels": "kernels/{device}.csv",
    "settings": "config/{section}/{name}.{digest}.json",
    "table": "tables/{table}.{form}",
    "figure": "figures/{figure}.{form}",
    "errata": "errata.md",
}


class _Wildcards(dict):
    """Leaves a name that is not given as a wildcard."""

    def __missing__(self, name: str) -> str:
        return f"{{{name}}}"


def below(artefact: str, **names: str) -> str:
    """The place of an artefact below the folder of results; names that are not given stay wildcards of Snakemake.

    Example:
        >>> below("checkpoint", model="tiny")
        'compressed/tiny/{recipe}'
    """
    return ARTEFACTS[artefact].format_map(_Wildcards(names))


def path(results: str | Path, artefact: str, **names: str) -> Path:
    """The file of an artefact. results: the folder of results."""
    return Path(results) / below(artefact, **names)


def folder(results: str | Path, artefact: str, **names: str) -> Path:
    """The folder whose last file is the artefact, such as that of a checkpoint, a model or Hessians."""
    return path(results, artefact, **names).parent
