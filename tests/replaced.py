"""Configs with some values replaced."""

import copy


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
