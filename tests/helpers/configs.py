"""Configurations: a small one, copies with some values replaced, and files laid over one another."""

import copy

from helpers.paths import ROOT
from obr.config.config_files import layered, merge, read_yaml

STUDIES = (
    "hessians", "seeds", "ostquant", "rotations", "released", "joint", "joint_rotations",
    "mixed_precision", "equal_storage", "statistics", "kernels_cpu", "hardware",
)  # fmt: skip
SMALL = "config/experiments/small.yaml"
OBR_A4 = {"recipe": "obr", "activations": "a4"}

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
    },
    "activations": {"a4": {"activations": {"bits": 4}}},
    "tables": {"t": {"title": "T", "models": ["small", "large"], "rows": ["dense", OBR_A4], "perplexity": ["wiki"]}},
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
    """The project's config with the paper and all studies, under other files and changes."""
    over: dict = {"experiments": ["paper", *STUDIES]}
    for name in names:
        merge(over, read_yaml(ROOT / name))
    return layered(merge(over, changes))
