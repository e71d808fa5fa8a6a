"""Learning rotations: for each kind, a learner that makes one for a model from calibration windows.

A learner is a function LearningRun -> (Rotation, curve). Curves are lines of {"step", "loss",
"held_out"}, and of {"block", …} where blocks are learned one by one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from obr.config.rotations import LEARNED
from obr.errors import ObrError
from obr.models.architectures import Dimensions
from obr.rotations import registry
from obr.rotations.base import Rotation
from obr.rotations.learning import awq, flatquant, omniquant, ostquant, smoothquant, spinquant
from obr.rotations.learning.run import LearningRun
from obr.rotations.unrotated import instead_of

if TYPE_CHECKING:
    import torch

MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (awq, flatquant, omniquant, ostquant, smoothquant, spinquant)
}
LEARNERS: dict[str, Callable[[LearningRun], tuple[Rotation, list[dict]]]] = {
    name: MODULES[name].learn for name in LEARNED
}


def learn_rotation(
    entry: dict,
    model: Path,
    tokens: Path,
    out: Path,
    device: str | None = None,
    dtype: "torch.dtype | None" = None,
    megabytes: float | None = None,
) -> Rotation:
    """The stage: learn a model's rotation by a config entry, write it to `out` and its curve beside, as CSV.

    entry: {"kind": a name of LEARNERS, "learn": {…}, "seed"}. tokens: file of calibration windows. dtype: of the
    model's products. megabytes: of memory for all hidden states, 4096 by default; more of them lie in files beside
    `out`. A model that takes no such rotation gets one that changes nothing.
    An interrupted run goes on from what it kept last, and ends with the same bytes. One parameter per flag of
    `obr learn-rotation`.

    Raises:
        ObrError: the kind is not one that is learned, or its settings cannot be.
    """
    import torch

    from obr.models.loading import config_of, default_device
    from obr.rotations.learning.curve import write

    if entry["kind"] not in LEARNERS:
        raise ObrError(f"Rotation {entry['kind']!r} is not learned; those that are: {', '.join(LEARNERS)}.")
    if (none := instead_of(entry["kind"], Dimensions.of(config_of(Path(model))))) is not None:
        write([], Path(out).with_suffix(".csv"))
        registry.save(none, Path(out))
        return none
    task = LearningRun.of(
        entry, Path(model), Path(tokens), Path(out), device or default_device(), dtype or torch.float32
    )
    if megabytes is not None:
        task.megabytes = megabytes
    try:
        rotation, curve = LEARNERS[entry["kind"]](task)
    except ObrError:
        if not task.kept.path.exists():  # refused before the first step: nothing to resume from
            task.kept.remove()
        raise
    rotation.options["learned"] = {**entry["learn"], "seed": task.seed, "calibration": task.about}
    rotation.check("what was learned")
    write(curve, Path(out).with_suffix(".csv"))
    registry.save(rotation, Path(out))
    task.kept.remove()
    return rotation
