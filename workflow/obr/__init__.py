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

from obr._transformers_hook import register

_HOME = {
    "ObrError": "errors",
    "Recipe": "config.recipe",
    "restore": "methods.restore",
    "rotate": "rotations.apply",
    "load_model": "models.loading",
    "calibration_tokens": "data.token_windows",
    "evaluation_windows": "data.token_windows",
    "compress": "compression.in_memory",
    "save": "checkpoints.writer",
    "load": "checkpoints.packed_linear",
    "perplexity": "evaluation.perplexity",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'obr' has no attribute {name!r}")
    return getattr(import_module(f"obr.{_HOME[name]}"), name)


register()
