"""The one check that every model passes on its way in, as a folder or in memory.

`folder.check_folder` compares a folder with the model that its config.json describes: tensors, shapes, dtypes, files
beside them. `memory.check_model` compares a model in memory with the same: its modules, parameters and hooks. What
the comparison does not account for is refused by name, since later stages would leave it out without a word.
"""
