"""What a learner is given: a model, windows of tokens, the quantisation to learn for, and a place to resume from."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from obr.config.recipe import Recipe
from obr.data import token_windows
from obr.errors import BROKEN_FILE, ObrError
from obr.models.architectures import Dimensions
from obr.models.hidden_states import MemoryBudget
from obr.models.loading import config_of
from obr.runtime.files import atomic_write
from obr.runtime.locks import release
from obr.runtime.provenance import fingerprint
from obr.runtime.resume import claim

# Keys of `learn` that are the same for every learner; the others are a learner's own, see `Task.settings`.
COMMON = ("calibration", "held_out", "quantise", "dtype")
HELD_OUT = 4  # windows, unless the entry says how many


class Snapshots:
    """The state of a run that learns, in the folder `<out>.unfinished`; there as long as the run is not finished.

    Raises:
        ObrError: the state there is of another run.
    """

    def __init__(self, out: Path, run: dict):
        self.folder = out.with_name(out.name + ".unfinished")
        claim(self.folder, run, "the state")
        self.path = self.folder / "state.safetensors"

    def read(self) -> tuple[dict[str, Tensor], dict] | None:
        """Tensors and note that were written last, None if none were."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
                return tensors, json.loads(file.metadata()["note"])
        except BROKEN_FILE as error:
            raise ObrError(f"{self.path} cannot be read ({error}); delete its folder to start again.") from error

    def write(self, tensors: dict[str, Tensor], note: dict) -> None:
        """Replace what was kept; tensors of any dtype, a generator's state among them; note: as JSON."""
        owned = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        with atomic_write(self.path) as partial:
            save_file(owned, partial, metadata={"note": json.dumps(note)})

    def remove(self) -> None:
        """Forget the run, once its result is whole."""
        shutil.rmtree(self.folder, ignore_errors=True)
        release(self.folder)


def report_step(row: dict) -> None:
    """Print a line of a curve, such as "step 20, loss 3.21, held out 3.3"."""
    spelled = (f"{name.replace('_', ' ')} {value:.5g}" for name, value in row.items())
    print(", ".join(spelled), file=sys.stderr, flush=True)


@dataclass
class LearningRun:
    """What a learner is given.

    model: folder of a downloaded model. windows (b, s): tokens to learn from. held_out (c, s): tokens of the same
    text to judge by, never learned from. recipe: of the quantisation to learn for (`quantise` of the entry:
    bits, clip, activations, o_inputs, queries, keys, values, as in a recipe; all 16 bits if left out). options:
    the rest of the entry's `learn`. kept: for resuming. report: called with each line of the curve. megabytes: of
    memory for hidden states, see `room`.
    """

    model: Path
    dimensions: Dimensions
    windows: Tensor
    held_out: Tensor
    recipe: Recipe
    options: dict
    seed: int
    kept: Snapshots
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    about: dict = field(default_factory=dict)
    megabytes: float = MemoryBudget.megabytes
    report: Callable[[dict], None] = report_step

    @classmethod
    def of(cls, entry: dict, model: Path, tokens: Path, out: Path, device: str, dtype: torch.dtype) -> "LearningRun":
        """The task of a config entry {"kind", "seed", "learn": {…}}, with calibration windows from a file.

        dtype: of products, unless the entry's `learn` has one.

        Raises:
            ObrError: settings that cannot be, too few windows, or an unfinished run with others.
        """
        learn = dict(entry["learn"])
        windows, about = token_windows.load_tokens(tokens)
        learn.pop("calibration", None)
        dtype = getattr(torch, learn.pop("dtype")) if "dtype" in learn else dtype
        held_out = learn.pop("held_out", HELD_OUT)
        if not 0 < held_out < len(windows):
            raise ObrError(
                f"learn: held_out {held_out} of the {len(windows)} calibration windows leaves none to learn from, "
                "or none to judge by; use more windows or another number."
            )
        recipe = Recipe.parse({"method": "rtn", "bits": 16, **learn.pop("quantise", {})}, "learn.quantise")
        decides = {"entry": entry, "device": device, "dtype": str(dtype)}
        run = fingerprint(f"rotations.learning.{entry['kind']}", model, {"tokens": tokens}, **decides)
        return cls(
            model=model,
            dimensions=Dimensions.of(config_of(model)),
            windows=windows[:-held_out],
            held_out=windows[-held_out:],
            recipe=recipe,
            options=learn,
            seed=entry.get("seed", 0),
            kept=Snapshots(out, run),
            device=device,
            dtype=dtype,
            about=about,
        )

    @property
    def room(self) -> MemoryBudget:
        """Where hidden states may lie: in memory, or in files beside the output."""
        return MemoryBudget(self.megabytes, self.kept.folder)

    def settings(self, **defaults: Any) -> SimpleNamespace:
        """A learner's own settings: its defaults, and what the entry says instead. Raises ObrError for others."""
        unknown = sorted(set(self.options) - set(defaults))
        if unknown:
            known = ", ".join(sorted({*defaults, *COMMON}))
            raise ObrError(f"learn has the key {unknown[0]!r}, which this learner does not know; known are {known}.")
        return SimpleNamespace(**{**defaults, **self.options})
