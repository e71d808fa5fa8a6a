"""The kinds of rotations: one entry each, read by the config's checks and by the package's registries.

A new kind is an entry of ROTATIONS and a class in `obr.rotations`, a function `learn` in `obr.rotations.learning`, or
both. Nothing else lists them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Learner:
    """How long a learner works unless the entry's `learn` says otherwise: its defaults, and what plans count.

    steps: of gradient descent through the whole model, each of `batch` windows; None if it goes block by block.
    epochs: over the calibration windows in each block, by gradient descent if there is a batch. A learner without
    one searches, which counts as so many epochs.
    """

    steps: int | None = None
    epochs: int | None = None
    batch: int | None = None

    @property
    def defaults(self) -> dict[str, int]:
        """The settings that are given."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class RotationKind:
    """class_name: of the class in `obr.rotations` that holds the parameters; None if another kind's class does.
    learner: of a module of the kind's name in `obr.rotations.learning`, with a function `learn`; None without one."""

    class_name: str | None
    learner: Learner | None = None


ROTATIONS = {
    "quarot": RotationKind("QuaRot"),
    "spinquant": RotationKind("SpinQuant", Learner(steps=100, batch=8)),
    "flatquant": RotationKind("FlatQuant", Learner(epochs=15, batch=4)),
    "ostquant": RotationKind("OSTQuant", Learner(steps=100, batch=8)),
    "scaling": RotationKind("Scaling"),
    "omniquant": RotationKind(None, Learner(epochs=20, batch=1)),
    "smoothquant": RotationKind(None, Learner(epochs=1)),
    "awq": RotationKind(None, Learner(epochs=20)),
}
DRAWN = tuple(name for name, kind in ROTATIONS.items() if kind.class_name)
LEARNERS = {name: kind.learner for name, kind in ROTATIONS.items() if kind.learner is not None}
LEARNED = tuple(LEARNERS)
WITHOUT_MLPS = ("spinquant",)  # formats of published files that hold nothing of an MLP


def kind_held_by(name: str) -> str:
    """The kind that holds what a learner or a file format of this name gives: "scaling" for "awq"."""
    known = ROTATIONS.get(name)
    return "scaling" if known is not None and known.class_name is None else name


# Where the files are that no package registry or model hub serves, by format.
DRIVE = "https://drive.google.com/drive/folders/"
WHERE = {
    "spinquant": f"R.bin files are at {DRIVE}1R2zix4qeXBjcmgnJN1rny93cguJ4rEE8 (SpinQuant's) and "
    f"{DRIVE}1nV9juzE6_OHr10y6Ke5KCyOiGqDr0srX (OBR's, below rotations/GPTQ); GPTQ and OBR need one learned at "
    "W16A4KV4: fetch it by hand",
    "ostquant": f"files such as llama2_7b_w4a16kv16.bin are at {DRIVE}10kFP3G-qdDvpPik9F9jy49c3yQbGFG6N: "
    "fetch one by hand",
}
