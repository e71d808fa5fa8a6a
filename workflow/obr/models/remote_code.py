"""Code that a model or its tokenizer brings along: run only where the user says so, and only what was recorded."""

import contextlib
import json
import re
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from obr.errors import ObrError
from obr.runtime.files import read_json, sha256_of

_allowed: ContextVar[bool] = ContextVar("allowed", default=False)


@contextlib.contextmanager
def allowed(answer: bool = True) -> Iterator[None]:
    """Inside, models may run their own code, as `trust_remote_code: true` in the config says of one."""
    token = _allowed.set(answer)
    try:
        yield
    finally:
        _allowed.reset(token)


def is_allowed() -> bool:
    """Whether models may run their own code here, as inside `allowed`."""
    return _allowed.get()


def trusted(folder: Path | str) -> bool:
    """What transformers gets for a folder as `trust_remote_code`; False outside `allowed`.

    folder: of a downloaded model, or of a checkpoint made from one.

    Raises:
        ObrError: it asks for code that was not recorded at the download, or is no longer what was recorded.
    """
    folder = Path(folder)
    if not _allowed.get() or not references(folder):
        return False
    recorded = _recorded(folder)
    if (present := code_of(folder)) != recorded:
        odd = sorted(set(present.items()) ^ set(recorded.items()))[0][0]
        raise ObrError(f"{folder}/{odd} is not the code that was recorded at the download; download the model again.")
    check_references(folder, str(folder))
    return True


def refusal(folder: Path, error: Exception) -> ObrError | None:
    """The sentence for the user when transformers refused to run a folder's code; None if it failed otherwise."""
    if "trust_remote_code" not in str(error):
        return None
    return ObrError(
        f"{folder} brings code of its own, which is not run; choose a native model, or read the code and set "
        "trust_remote_code: true for this model in the config."
    )


def references(folder: Path) -> list[str]:
    """What config.json and tokenizer_config.json name in their auto_map, such as "modeling_x.XForCausalLM"."""
    found = []
    for name in ("config.json", "tokenizer_config.json"):
        with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
            named = json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map") or {}
            for value in named.values():
                found += [str(part) for part in (value if isinstance(value, list) else [value]) if part]
    return found


def check_references(folder: Path, what: str) -> None:
    """Raise ObrError unless all code that is asked for lies in the folder itself. what: its name in messages."""
    for reference in references(folder):
        if not re.fullmatch(r"\w+\.\w+", reference):
            raise ObrError(
                f"{what} asks for {reference}, code outside its own folder, which no revision pins: copy it beside "
                "the weights, correct auto_map, and use `source: path`."
            )
        if not (folder / f"{reference.split('.')[0]}.py").is_file():
            raise ObrError(f"{what} asks for {reference}, but its code is not there: choose another model.")


def code_of(folder: Path) -> dict[str, str]:
    """sha256 of the Python files that lie in a folder."""
    return {path.name: sha256_of(path) for path in sorted(folder.glob("*.py"))}


def _recorded(folder: Path) -> dict[str, str]:
    source = folder / "source.json"
    noted = read_json(source) if source.exists() else read_json(folder / "manifest.json").get("source") or {}
    if not isinstance(noted.get("code"), dict):
        raise ObrError(
            f"{folder} does not record the code that it brings along; download the model with "
            "trust_remote_code: true."
        )
    return noted["code"]
