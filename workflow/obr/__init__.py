"""Sparse and quantised language models by Optimal Brain Restoration and its rivals.

    model = obr.load_model("path/to/model")  # a folder with config.json and safetensors
    model = obr.rotate(model, "quarot", seed=0)
    model = obr.compress(model, obr.calibration_tokens(tokenizer, text), {"method": "obr_gptq"})
    obr.save(model, "smollm2-obr")
    model = obr.load("smollm2-obr")

Names are imported when they are first used, so `import obr` costs nothing. transformers' own `from_pretrained`
reads packed checkpoints too, from then on.
"""

from importlib import import_module

from obr.registration import register

_HOME = {
    "ObrError": "errors",
    "Recipe": "recipe",
    "restore": "restoration",
    "rotate": "rotations",
    "load_model": "model",
    "calibration_tokens": "data",
    "evaluation_windows": "data",
    "compress": "compression",
    "save": "checkpoint",
    "load": "packed",
    "perplexity": "evaluate",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'obr' has no attribute {name!r}")
    return getattr(import_module(f"obr.{_HOME[name]}"), name)


register()
