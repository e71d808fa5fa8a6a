"""In every Python process that has this folder on its PYTHONPATH, "cuda" is the simulated device.

Python imports a module of this name as it starts. The device is made right after PyTorch, where that is imported.
"""

import importlib.abc
import importlib.util
import sys
from pathlib import Path

DEVICE = Path(__file__).resolve().parents[1] / "simulated_device.py"


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Finds PyTorch as it is found without this class, and activates the device when it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(name)
        if found is None:
            return None
        load = found.loader.exec_module

        def load_and_activate(module):
            load(module)
            spec = importlib.util.spec_from_file_location(DEVICE.stem, DEVICE)
            device = sys.modules[DEVICE.stem] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(device)
            device.activate()

        found.loader.exec_module = load_and_activate
        return found


sys.meta_path.insert(0, _AfterTorch())
