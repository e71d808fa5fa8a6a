"""Configurations: a small one, copies with some values replaced, and files laid over one another."""

import copy

import yaml
from jsonschema.validators import Draft202012Validator

from helpers.paths import ROOT

RAW = {
    "results": "results",
    "models": {"small": {}, "large": {}},
    "rotations": {"quarot": {"kind": "quarot"}},
    "texts": {"train": {}, "test": {}},
    "calibrations": {"c": {"text": "train"}},
    "perplexity": {"wiki": {"text": "test"}},
    "zero_shot": {"piqa": {"source": {}}},
    "recipes": {
        "dense": {"method": "dense"},
        "obr": {"method": "obr_gptq", "rotation": "quarot", "calibration": "c", "label": "OBR"},
        "obr_a4": {"weights": "obr", "activations": {"bits": 4}},
    },
    "tables": {
        "t": {"title": "T", "models": ["small", "large"], "rows": ["dense", "obr_a4"], "perplexity": ["wiki"]}
    },
    "figures": {"f": {"kind": "perplexity_bits", "models": ["large"], "rows": ["obr"], "perplexity": "wiki"}},
}


def replaced(config: dict, **changes) -> dict:
    """A copy with other values in some places, which are written with double underscores: a__b=1 sets ["a"]["b"]."""
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config


def merged(*names: str, **changes) -> dict:
    """Configs laid over one another, as Snakemake lays them, with the schema's defaults of what is used here."""
    config: dict = {}
    for name in names:
        _lay(config, yaml.safe_load((ROOT / name).read_text()))
    config |= changes
    schema = yaml.safe_load((ROOT / "workflow" / "schemas" / "config.schema.yaml").read_text())
    errors = list(Draft202012Validator(schema).iter_errors(config))
    assert not errors, errors[0].message
    for section in ("rotations", "calibrations", "perplexity", "zero_shot", "figures"):
        config.setdefault(section, {})
    return config


def _lay(under: dict, over: dict) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            _lay(under[key], value)
        else:
            under[key] = value
