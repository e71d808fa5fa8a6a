"""Calibration windows drawn from one stream of tokens, or inside single documents."""

import contextlib
import hashlib
import json
import random
from array import array
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from obr.data.tokenize import begin_with_bos, behind_bos, tokenize, window_bos
from obr.errors import ObrError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLINGS = ("random", "sequential", "documents")
DOCUMENTS = ".jsonl"  # suffix of a file with one JSON string per line


def check_sampling(sampling: str, documents: bool, what: str) -> None:
    """Raise ObrError unless the sampling is known and is for what is given: separate documents, or one text."""
    if sampling not in SAMPLINGS:
        raise ObrError(f"sampling {sampling!r} is unknown: choose one of {', '.join(SAMPLINGS)}.")
    if documents != (sampling == "documents"):
        needed, given = ("one text", "separate documents") if documents else ("separate documents", "one text")
        raise ObrError(f"sampling {sampling!r} needs {needed}, but {what} is {given}: correct one of the two.")


def sample_windows(
    tokens: torch.LongTensor,
    nsamples: int,
    seqlen: int,
    seed: int = 0,
    sampling: str = "random",
    bos_token_id: int | None = None,
) -> torch.LongTensor:
    """Windows (nsamples, seqlen) of tokens (t,), "random" or "sequential" as `calibration_tokens` says.

    bos_token_id: the first token of every window, followed by seqlen - 1 tokens of the text; None for none.

    Example:
        >>> sample_windows(torch.arange(10), nsamples=2, seqlen=3, sampling="sequential").tolist()
        [[0, 1, 2], [3, 4, 5]]
    """
    check_sampling(sampling, False, "the text")
    _check_windows(nsamples, seqlen, seed)
    if bos_token_id is not None:
        windows = sample_windows(behind_bos(tokens, seqlen, bos_token_id), nsamples, seqlen - 1, seed, sampling)
        return begin_with_bos(windows, bos_token_id)
    total = len(tokens)
    needed = seqlen + 1 if sampling == "random" else nsamples * seqlen
    if total < needed:
        raise ObrError(
            f"the text has {total} tokens and {sampling} sampling of {nsamples} x {seqlen} needs {needed}: "
            f"choose a smaller seqlen{'' if sampling == 'random' else ' or nsamples'}, or a longer text."
        )
    if sampling == "sequential":
        return tokens[:needed].reshape(nsamples, seqlen).clone()
    generator = random.Random(seed)
    starts = [generator.randint(0, total - seqlen - 1) for _ in range(nsamples)]
    return torch.stack([tokens[start : start + seqlen] for start in starts])


def document_windows(
    tokenizer: "PreTrainedTokenizerBase",
    documents: Sequence[str],
    nsamples: int,
    seqlen: int,
    seed: int = 0,
    bos: bool | str | None = None,
) -> torch.LongTensor:
    """Windows (nsamples, seqlen), each inside one of n documents, drawn as GPTQ's loader draws them from C4.

    With one `random.Random(seed)`, for each window: a document `randint(0, n - 1)`, again until it has more than
    seqlen tokens, then the window [j, j + seqlen) with j = `randint(0, t - seqlen - 1)`, t its number of tokens.
    A document is tokenised alone when it is drawn, with special tokens as `tokenize` adds them. One of exactly
    seqlen tokens is drawn again; GPTQ's loader accepts it and then ends in an error. All other draws are the same.
    bos: see `tokenize`. With "window" every window is BOS and seqlen - 1 tokens of a document, drawn likewise.
    Raises ObrError if no document has more than seqlen tokens.
    """
    _check_windows(nsamples, seqlen, seed)
    if (first := window_bos(tokenizer, bos)) is not None:
        if seqlen < 2:
            raise ObrError(f"seqlen {seqlen} has no room for a token after BOS: use 2 or more.")
        return begin_with_bos(document_windows(tokenizer, documents, nsamples, seqlen - 1, seed, bos=False), first)
    generator, short, windows = random.Random(seed), set(), []
    while len(windows) < nsamples:
        if len(short) == len(documents):
            raise ObrError(
                f"none of the {len(documents)} documents has more than {seqlen} tokens, which sampling documents "
                "needs: choose a smaller seqlen, other documents, or sampling random."
            )
        number = generator.randint(0, len(documents) - 1)
        if number in short:
            continue
        tokens = tokenize(tokenizer, documents[number], bos)
        if len(tokens) <= seqlen:
            short.add(number)
            continue
        start = generator.randint(0, len(tokens) - seqlen - 1)
        windows.append(tokens[start : start + seqlen])
    return torch.stack(windows)


def _check_windows(nsamples: int, seqlen: int, seed: int) -> None:
    for name, value in (("nsamples", nsamples), ("seqlen", seqlen), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ObrError(f"{name} {value!r} must be a whole number: correct the config.")
    if nsamples < 1 or seqlen < 1:
        raise ObrError(f"nsamples {nsamples} and seqlen {seqlen} must be at least 1: correct the config.")


class Documents(Sequence):
    """The documents of a file with one JSON string per line; only those asked for are read.

    sha256: of the file. Raises ObrError if the file is missing, or a line that is asked for is no JSON string.
    """

    def __init__(self, path: Path | str):
        self.path, self.starts, digest = Path(path), array("Q", [0]), hashlib.sha256()
        try:
            with self.path.open("rb") as file:
                for line in file:
                    digest.update(line)
                    self.starts.append(self.starts[-1] + len(line))
        except OSError as error:
            raise ObrError(
                f"documents file {path} cannot be read ({error.strerror}): run the stage download_documents."
            ) from error
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            line = file.read(self.starts[index + 1] - self.starts[index])
        with contextlib.suppress(ValueError):
            if isinstance(document := json.loads(line), str):
                return document
        raise ObrError(
            f"line {index + 1} of {self.path} is not a JSON string: give the file that the stage "
            "download_documents writes."
        )
