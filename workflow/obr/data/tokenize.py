"""Texts turned into tokens, and the special tokens that a tokenizer adds."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from obr.errors import ObrError, first_line
from obr.models import remote_code
from obr.models.architectures import needs_bos
from obr.runtime.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "a b"  # the text by which `special_tokens` finds what a tokenizer adds
ROWS = (".json", ".jsonl", ".ndjson")  # suffixes of files whose text is inside JSON


def read_text(path: Path | str) -> str:
    """Text of a UTF-8 file, line ends untouched, without a byte order mark.

    Raises:
        ObrError: the file is missing, not UTF-8, has NUL characters, or holds rows of JSON.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise ObrError(f"text file {path} cannot be read ({error.strerror}): run the stage download_text.") from error
    except UnicodeDecodeError as error:
        raise ObrError(
            f"text file {path} is not UTF-8 (byte {error.start}): convert it, for example with iconv."
        ) from error
    if "\0" in text:
        raise ObrError(f"text file {path} has NUL characters, as UTF-16 has: convert it, for example with iconv.")
    if Path(path).suffix.lower() in ROWS and _is_json(text):
        raise ObrError(
            f"text file {path} holds JSON, whose quotes and names would count as text: write its texts alone into "
            "a .txt file."
        )
    return text


def _is_json(text: str) -> bool:
    """Whether a text, or its first line that is not blank, is JSON."""
    for part in (next((line for line in text.splitlines() if line.strip()), ""), text):
        try:
            return isinstance(json.loads(part), dict | list | str)
        except (ValueError, RecursionError):
            continue
    return False


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Token ids that a tokenizer adds before and after every text, such as ([bos], []).

    Raises ObrError for a tokenizer that adds tokens inside a text.
    """
    plain = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    padded = tokenizer(PROBE)["input_ids"]
    added = len(padded) - len(plain)
    for before in range(added + 1) if plain or not added else ():
        if padded[before : before + len(plain)] == plain:
            return padded[:before], padded[before + len(plain) :]
    raise ObrError(
        f"{type(tokenizer).__name__} adds special tokens that are neither before nor after a text: set bos to false."
    )


def require_bos(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The beginning-of-sequence (BOS) token. Raises ObrError if the tokenizer has none."""
    if tokenizer.bos_token_id is None:
        raise ObrError(f"{type(tokenizer).__name__} has no beginning-of-sequence token: set bos to false.")
    return tokenizer.bos_token_id


def tokens_as_text(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    """Special tokens in words: "a BOS token", or their names."""
    if ids == [tokenizer.bos_token_id]:
        return "a BOS token"
    return "the special tokens " + " ".join(tokenizer.convert_ids_to_tokens(ids))


def tokenize(tokenizer: "PreTrainedTokenizerBase", text: str, bos: bool | str | None = None) -> torch.LongTensor:
    """Token ids (t,) of the whole text at once.

    bos: which special tokens are added to the text.
        None: those that the tokenizer adds, before and after the text.
        True: a beginning-of-sequence (BOS) token before the text, and no other.
        False: none.
        "window": none here. `evaluation_windows` and `sample_windows` put BOS in front of every window.
    A BOS token that the text itself begins with is not doubled.
    Raises ObrError for another `bos`, and for True and "window" if the tokenizer has no BOS token.
    """
    if bos not in (None, True, False, "window"):
        raise ObrError(f"bos {bos!r} is unknown: use null, true, false or window.")
    first = require_bos(tokenizer) if bos else tokenizer.bos_token_id
    # verbose=False: a text longer than the model's context is meant here, and cut into windows later.
    ids = tokenizer(text, add_special_tokens=bos is None, verbose=False)["input_ids"]
    if bos is True:
        ids = [first, *ids]
    if bos in (None, True) and first is not None and ids[:2] == [first, first]:
        ids = ids[1:]
    return torch.tensor(ids, dtype=torch.int64)


def window_bos(tokenizer: "PreTrainedTokenizerBase", bos: bool | str | None) -> int | None:
    """The token that `bos` puts in front of every window: BOS for "window", None for the other values."""
    return require_bos(tokenizer) if bos == "window" else None


def missing_bos(windows: torch.LongTensor, tokenizer: "PreTrainedTokenizerBase", model_type: str) -> str | None:
    """A sentence on windows (b, s) without BOS in front, for families that need it; None if no window lacks it."""
    if not needs_bos(model_type):
        return None
    begun = 0 if tokenizer.bos_token_id is None else int((windows[:, 0] == tokenizer.bos_token_id).sum())
    without = len(windows) - begun
    if not without:
        return None
    return (
        f"{model_type} models need a BOS token in front and {without:,} of {len(windows):,} windows have none, "
        "so the values are not meaningful; set bos to window"
    )


def doubts(windows: torch.LongTensor, tokenizer: "PreTrainedTokenizerBase", config: dict, text: str = "") -> dict:
    """{"note": sentences} on what makes the values of windows (b, s) doubtful; {} where nothing does.

    Said are a missing BOS token, windows longer than the model's positions, and line ends of Windows.

    config: of the model, as config.json has it. text: that the windows are cut from.
    """
    found = [missing_bos(windows, tokenizer, config.get("model_type") or "")]
    positions = config.get("max_position_embeddings")
    if type(positions) is int and windows.shape[1] > positions:
        found.append(
            f"windows of {windows.shape[1]:,} tokens are longer than the {positions:,} positions of the model's "
            "configuration"
        )
    if crs := text.count("\r\n"):
        found.append(f"{crs:,} lines of the text end in CR LF, and each CR counts as text")
    return {"note": "; ".join(filter(None, found))} if any(found) else {}


def config_of(model_dir: Path) -> dict:
    """The contents of a model folder's config.json; {} without one."""
    file = Path(model_dir) / "config.json"
    return read_json(file) if file.is_file() else {}


def tokenizer_of(model_dir: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder. Raises ObrError if there is none that can be read."""
    from transformers import AutoTokenizer

    if not model_dir.is_dir():
        raise ObrError(f"model folder {model_dir} does not exist: run the stage download_model.")
    trust = remote_code.trusted(model_dir)
    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=trust)
    except Exception as error:  # of any library that reads tokenizers
        raise remote_code.refusal(model_dir, error) or ObrError(
            f"model folder {model_dir} has no tokenizer that transformers can load "
            f"({first_line(error)}): add its tokenizer files."
        ) from error


def behind_bos(tokens: torch.LongTensor, seqlen: int, bos_token_id: int) -> torch.LongTensor:
    """The tokens of a text whose windows get a BOS token each: without one of their own in front."""
    if seqlen < 2:
        raise ObrError(f"seqlen {seqlen} has no room for a token after BOS: use 2 or more.")
    return tokens[1:] if len(tokens) and int(tokens[0]) == bos_token_id else tokens


def begin_with_bos(windows: torch.LongTensor, bos_token_id: int) -> torch.LongTensor:
    """Windows (b, s) with a BOS token before each: (b, s + 1)."""
    return torch.cat([torch.full_like(windows[:, :1], bos_token_id), windows], dim=1)
