"""From text to tokens: calibration samples and evaluation windows, the same bytes for the same inputs."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from obr.data.sampling import DOCUMENTS, Documents, check_sampling, document_windows, sample_windows
from obr.data.tokenize import (
    begin_with_bos,
    behind_bos,
    config_of,
    doubts,
    read_text,
    tokenize,
    tokenizer_of,
    window_bos,
)
from obr.errors import ObrError
from obr.runtime.files import atomic_write

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPEC_KEYS = ("nsamples", "seqlen", "seed", "bos", "sampling", "reversed")


def calibration_tokens(
    tokenizer: "PreTrainedTokenizerBase",
    text: str | Sequence[str],
    *,
    nsamples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    bos: bool | str | None = None,
    sampling: str = "random",
    reversed: bool = False,
) -> torch.LongTensor:
    """Calibration samples (nsamples, seqlen) of token ids out of one text, or out of a list of documents.

    One parameter per key of a calibration.

    "random": windows [i, i + seqlen) of one text with i = `random.Random(seed).randint(0, t - seqlen - 1)`, drawn as
    GPTQ draws them from WikiText-2; they may overlap. "sequential": the first nsamples windows, end to end.
    "documents": one window inside each of nsamples documents, drawn as GPTQ draws them from C4; see
    `document_windows`.
    bos: see `tokenize`. With "window" every window is BOS and seqlen - 1 tokens of the text, drawn likewise.
    reversed: the last window drawn comes first. Sums over all windows then differ by rounding alone.
    Raises ObrError if the text is too short, if no document is longer than seqlen, or if the text is a list where
    one string is needed, or the reverse.

    Example:
        >>> tokens = obr.calibration_tokens(tokenizer, text, nsamples=4, seqlen=64)
        >>> tuple(tokens.shape)
        (4, 64)
    """
    check_sampling(sampling, not isinstance(text, str), "the text")
    if sampling == "documents":
        windows = document_windows(tokenizer, text, nsamples, seqlen, seed, bos)
    else:
        tokens = tokenize(tokenizer, text, bos)
        windows = sample_windows(tokens, nsamples, seqlen, seed, sampling, window_bos(tokenizer, bos))
    return windows.flip(0) if reversed else windows


def evaluation_windows(
    tokens: torch.LongTensor, seqlen: int, limit_tokens: int | None = None, bos_token_id: int | None = None
) -> torch.LongTensor:
    """Windows (b, seqlen) end to end over tokens (t,), or over the first limit_tokens; the tail is dropped.

    bos_token_id: the first token of every window, followed by the next seqlen - 1 tokens of the text. Each token of
    the text in the windows is then a target, and b is t // (seqlen - 1). A BOS token that the text begins with is
    left out. None (default) cuts the text as it is.

    Raises:
        ObrError: not one window fits.

    Example:
        >>> tuple(obr.evaluation_windows(torch.arange(100), 32).shape)
        (3, 32)
    """
    if seqlen < 1:
        raise ObrError(f"seqlen {seqlen} must be at least 1: correct the config.")
    if bos_token_id is not None:
        windows = evaluation_windows(behind_bos(tokens, seqlen, bos_token_id), seqlen - 1, limit_tokens)
        return begin_with_bos(windows, bos_token_id)
    used = tokens if limit_tokens is None else tokens[: max(limit_tokens, 0)]
    windows = len(used) // seqlen
    if windows == 0:
        limit = "" if limit_tokens is None else f" under the limit of {limit_tokens}"
        raise ObrError(
            f"the text has {len(used)} tokens{limit} and one window needs {seqlen}: "
            "choose a smaller seqlen, a larger limit or a longer text."
        )
    return used[: windows * seqlen].reshape(windows, seqlen)


def calibrate(model_dir: Path | str, text_file: Path | str, spec: dict, out: Path | str) -> None:
    """Write the safetensors file `out`: tokens (nsamples, seqlen) int64 of a text by a model's tokenizer.

    text_file: UTF-8 text, or with sampling "documents" a `.jsonl` file with one JSON string per line.
    spec: keyword arguments of `calibration_tokens`, and optionally `text`, a name of the text to be noted.
    Raises ObrError for unknown keys, a folder without tokenizer, or a text too short.
    """
    unknown = sorted(set(spec) - {*SPEC_KEYS, "text"})
    if unknown:
        raise ObrError(f"calibration has unknown keys {', '.join(unknown)}: use only {', '.join(SPEC_KEYS)}.")
    model_dir, text_file, out = Path(model_dir), Path(text_file), Path(out)
    options = {"nsamples": 128, "seqlen": 2048, "seed": 0, "bos": None, "sampling": "random"}
    options |= {key: spec[key] for key in SPEC_KEYS if key in spec and key != "reversed"}
    order = {"reversed": True} if spec.get("reversed") else {}
    tokenizer = tokenizer_of(model_dir)
    check_sampling(options["sampling"], text_file.suffix == DOCUMENTS, str(text_file))
    if options["sampling"] == "documents":
        text = Documents(text_file)
        sha256, size = text.sha256, {"documents": len(text)}
        tokens = calibration_tokens(tokenizer, text, **options, **order)
    else:
        text = read_text(text_file)
        stream = tokenize(tokenizer, text, options["bos"])
        sha256, size = hashlib.sha256(text.encode("utf-8")).hexdigest(), {"tokens_in_text": len(stream)}
        drawn = {key: value for key, value in options.items() if key != "bos"}
        tokens = sample_windows(stream, **drawn, bos_token_id=window_bos(tokenizer, options["bos"]))
        tokens = tokens.flip(0) if order else tokens
    about = {
        "model": model_dir.name,
        "text": spec.get("text", text_file.stem),
        "text_sha256": sha256,
        **options,
        **order,
        **size,
        "tokens": tokens.numel(),
        "tokenizer": type(tokenizer).__name__,
    }
    read = text if isinstance(text, str) else ""
    write_tokens(tokens, about | doubts(tokens, tokenizer, config_of(model_dir), read), out)


def write_tokens(tokens: torch.LongTensor, about: dict, out: Path) -> None:
    """Write calibration windows (nsamples, seqlen) and what is to be noted about them."""
    from safetensors.torch import save_file

    with atomic_write(out) as partial:
        # One metadata entry: safetensors writes several in an order that differs from run to run.
        save_file({"tokens": tokens}, partial, metadata={"calibration": json.dumps(about, sort_keys=True)})


def load_tokens(path: Path | str) -> tuple[torch.LongTensor, dict]:
    """Tokens (nsamples, seqlen) that `write_tokens` wrote, and what was noted about them.

    Noted: model, text, text_sha256, nsamples, seqlen, tokens, tokenizer; of windows of a text also seed, sampling,
    bos and its size, as tokens_in_text or as documents; of others how they came about. Raises ObrError if the file
    is missing, damaged or another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    # KeyError and ValueError: a safetensors file, but none of ours.
    with contextlib.suppress(OSError, SafetensorError, KeyError, ValueError), safe_open(path, framework="pt") as file:
        tokens, about = file.get_tensor("tokens"), json.loads((file.metadata() or {})["calibration"])
        if tokens.ndim == 2 and tokens.numel() and not tokens.is_floating_point() and isinstance(about, dict):
            return tokens.long(), about
    raise ObrError(
        f"{path} is missing or not a whole file of calibration tokens: delete it and run the stage calibrate."
    )
