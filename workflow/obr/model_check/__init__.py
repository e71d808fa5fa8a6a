"""The one check that every model passes on its way in, as a folder or in memory.

`check_folder` compares a folder with the model that its config.json describes: tensors, shapes, dtypes, files beside
them. `check_model` compares a model in memory with the same: its modules, parameters and hooks. What the comparison
does not account for is refused by name, since later stages would leave it out without a word.
"""

from obr.model_check.folder import Checked, check_folder, check_tensors, meta_model
from obr.model_check.memory import UNFINISHED, check_finished, check_model, is_tied

__all__ = [
    "UNFINISHED", "Checked", "check_finished", "check_folder", "check_model", "check_tensors", "is_tied",
    "meta_model",
]  # fmt: skip
