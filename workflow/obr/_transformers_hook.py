"""Lets transformers' `from_pretrained` read packed checkpoints once this package and transformers are imported, in
whichever order, without importing transformers for those who do not."""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

REGISTRY, READER = "transformers.quantizers.auto", "obr.checkpoints.huggingface"


def register() -> None:
    """Have the reader enter itself in transformers' list of formats: now, or as soon as that is imported."""
    if REGISTRY in sys.modules:
        import_module(READER)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Stands before the other finders until the registry is imported, and imports the reader right after it."""

    def find_spec(self, name, path=None, target=None):
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                import_module(READER)

            spec.loader.exec_module = exec_module
        return spec
