"""A model on disk and rotation files for it, in the layouts in which their authors publish them."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

import obr
from helpers.family_models import FAMILIES, TOKENS, exact_model, random_model
from obr.models.architectures import Dimensions
from obr.rotations.obtain import make
from obr.rotations.registry import load


def orthogonal(n: int, seed: int) -> Tensor:
    """(n, n) as training leaves it: float32, orthogonal to its rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0].float()


def invertible(n: int, seed: int) -> Tensor:
    return orthogonal(n, seed) * scale((n,), seed + 1) @ orthogonal(n, seed + 2)


def scale(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def write_model(folder: Path, family: str) -> Dimensions:
    """A random model's folder; returns its sizes."""
    random_model(FAMILIES[family], torch.float32).save_pretrained(folder / "model")
    return Dimensions.of(AutoConfig.from_pretrained(folder / "model"))


def read(folder: Path, name: str, contents, **entry):
    """The rotation that the stage makes of `contents`, written as the authors write it, for the model there."""
    torch.save(contents, folder / "published.pth")
    source = {"source": "path", "path": str(folder / "published.pth")}
    entry = {"kind": "file", "format": name, "source": source, **entry}
    make(entry, folder / "model", folder / "rotation.safetensors")
    return load(folder / "rotation.safetensors", Dimensions.of(AutoConfig.from_pretrained(folder / "model")))


def rotated(family: str, rotation) -> tuple[torch.nn.Module, torch.nn.Module, float]:
    """(plain model, rotated model, largest relative change of the logits), in float64."""
    plain, model = exact_model(FAMILIES[family]), exact_model(FAMILIES[family])
    before = plain(TOKENS).logits
    after = obr.rotate(model, rotation)(TOKENS).logits
    return plain, model, float((after - before).abs().max() / before.abs().max())


def inputs_of(model, path: str, transformed: bool) -> Tensor:
    """What a linear layer of block 0 gets (t, n), or with `transformed` what its weight meets."""
    linear, seen = model.model.layers[0].get_submodule(path), []
    if transformed:
        linear.observer = seen.append
        model(TOKENS)
        linear.observer = None
    else:
        handle = linear.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        model(TOKENS)
        handle.remove()
    return seen[0].flatten(0, -2)


def refused(call, *parts: str) -> None:
    """The call raises an ObrError whose one sentence holds all parts."""
    try:
        call()
    except obr.errors.ObrError as error:
        missing = [part for part in parts if part not in str(error)]
        assert not missing, f"{missing} not in: {error}"
    else:
        raise AssertionError(f"not refused: {parts}")
