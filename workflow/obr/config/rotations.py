"""The kinds of rotations: one entry each, read by the config's checks and by the package's registries.

A new kind is an entry of ROTATIONS and a class in `obr.rotations`, a function `learn` in `obr.rotations.learning`, or
both. Nothing else lists them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RotationKind:
    """class_name: of the class in `obr.rotations` that holds the parameters; None if another kind's class does.
    learned: `obr.rotations.learning` has a module of the kind's name with a function `learn`."""

    class_name: str | None
    learned: bool = False


ROTATIONS = {
    "quarot": RotationKind("QuaRot"),
    "spinquant": RotationKind("SpinQuant", learned=True),
    "flatquant": RotationKind("FlatQuant", learned=True),
    "ostquant": RotationKind("OSTQuant", learned=True),
    "scaling": RotationKind("Scaling"),
    "omniquant": RotationKind(None, learned=True),
    "smoothquant": RotationKind(None, learned=True),
    "awq": RotationKind(None, learned=True),
}
DRAWN = tuple(name for name, kind in ROTATIONS.items() if kind.class_name)
LEARNED = tuple(name for name, kind in ROTATIONS.items() if kind.learned)
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
