"""Wheels of the tests' own."""

import zipfile
from pathlib import Path

from obr.runtime.files import sha256_of


def make_wheel(folder: Path, name: str, files: dict[str, bytes]) -> str:
    """Write NAME-1.0-py3-none-any.whl and return its sha256."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}\nVersion: 1.0\nLicense: MIT\n\nText")
    return sha256_of(path)
