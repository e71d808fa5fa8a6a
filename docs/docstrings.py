"""Griffe extension of the site: docstrings as mkdocstrings reads them."""

import re

import griffe

FIELD = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): ")


def _listed(text: str, names: set[str]) -> str:
    """Lines such as `name: meaning` outside of sections, as items of a list. names: parameters or attributes."""
    lines = []
    inside = False
    for line in text.splitlines():
        match = FIELD.match(line)
        if match and set(match[1].split(", ")) <= names:
            lines += [""] * (not inside) + [f"- `{match[1]}`: {line[match.end() :]}"]
            inside = True
        else:
            inside = inside and bool(line.strip())
            lines.append(f"    {line}" if inside else line)
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Makes `Example:` a section of doctests, which Griffe knows as `Examples:` only, and fields a list."""

    def on_object(self, *, obj, **kwargs) -> None:
        """Rewrite the docstring of a class or function."""
        if obj.docstring and (obj.is_function or obj.is_class):
            names = {p.name for p in obj.parameters} if obj.is_function else set(obj.members)
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = _listed(text, names)
