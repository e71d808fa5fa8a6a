"""Griffe extension of the site: docstrings as mkdocstrings reads them."""

import re

import griffe


class Examples(griffe.Extension):
    """Makes `Example:` a section of doctests, which Griffe knows as `Examples:` only."""

    def on_object(self, *, obj, **kwargs) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
