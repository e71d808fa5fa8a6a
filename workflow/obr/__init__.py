"""Sparse and quantised language models by Optimal Brain Restoration and its baselines.

    model = obr.load_model("path/to/model")  # a folder with config.json and safetensors
    model = obr.rotate(model, "quarot", seed=0)
    model = obr.compress(model, obr.calibration_tokens(tokenizer, text), {"method": "obr_gptq"})
    obr.save(model, "smollm2-obr")
    model = obr.load("smollm2-obr")

Names are imported when they are first used, so `import obr` loads no library and changes nothing in the interpreter.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from obr.checkpoints.huggingface import register_with_transformers
    from obr.checkpoints.packed_linear import load
    from obr.checkpoints.writer import save
    from obr.compression.in_memory import compress
    from obr.compression.oneshot import quantize
    from obr.config.recipe import Recipe
    from obr.data.token_windows import calibration_tokens, evaluation_windows
    from obr.errors import ObrError
    from obr.evaluation.perplexity import perplexity
    from obr.methods.restore import restore
    from obr.models.loading import load_model
    from obr.rotations.apply import rotate

_HOME = {
    "ObrError": "errors",
    "Recipe": "config.recipe",
    "calibration_tokens": "data.token_windows",
    "compress": "compression.in_memory",
    "evaluation_windows": "data.token_windows",
    "load": "checkpoints.packed_linear",
    "load_model": "models.loading",
    "perplexity": "evaluation.perplexity",
    "quantize": "compression.oneshot",
    "register_with_transformers": "checkpoints.huggingface",
    "restore": "methods.restore",
    "rotate": "rotations.apply",
    "save": "checkpoints.writer",
}
__all__ = [
    "ObrError", "Recipe", "calibration_tokens", "compress", "evaluation_windows", "load", "load_model", "perplexity",
    "quantize", "register_with_transformers", "restore", "rotate", "save",
]  # fmt: skip


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'obr' has no attribute {name!r}")
    return getattr(import_module(f"obr.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
