"""From text to tokens: calibration samples and evaluation windows, the same bytes for the same inputs."""

import contextlib
import hashlib
import json
import random
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch

from obr import foreign
from obr.errors import ObrError, first_line
from obr.files import read_json, whole
from obr.layout import needs_bos

SAMPLINGS = ("random", "sequential", "documents")
DOCUMENTS = ".jsonl"  # suffix of a file with one JSON string per line
SPEC_KEYS = ("nsamples", "seqlen", "seed", "bos", "sampling")
PROBE = "a b"  # the text by which `special_tokens` finds what a tokenizer adds


def read_text(path: Path | str) -> str:
    """Text of a UTF-8 file, line ends untouched. Raises ObrError if it is missing or not UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise ObrError(f"text file {path} cannot be read ({error.strerror}): run the stage download_text.") from error
    except UnicodeDecodeError as error:
        raise ObrError(
            f"text file {path} is not UTF-8 (byte {error.start}): convert it, for example with iconv."
        ) from error


def special_tokens(tokenizer) -> tuple[list[int], list[int]]:
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


def require_bos(tokenizer) -> int:
    """The beginning-of-sequence (BOS) token. Raises ObrError if the tokenizer has none."""
    if tokenizer.bos_token_id is None:
        raise ObrError(f"{type(tokenizer).__name__} has no beginning-of-sequence token: set bos to false.")
    return tokenizer.bos_token_id


def spell_tokens(tokenizer, ids: list[int]) -> str:
    """Special tokens in words: "a BOS token", or their names."""
    if ids == [tokenizer.bos_token_id]:
        return "a BOS token"
    return "the special tokens " + " ".join(tokenizer.convert_ids_to_tokens(ids))


def tokenize(tokenizer, text: str, bos: bool | str | None = None) -> torch.LongTensor:
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


def window_bos(tokenizer, bos: bool | str | None) -> int | None:
    """The token that `bos` puts in front of every window: BOS for "window", None for the other values."""
    return require_bos(tokenizer) if bos == "window" else None


def calibration_tokens(
    tokenizer,
    text: str | Sequence[str],
    *,
    nsamples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    bos: bool | str | None = None,
    sampling: str = "random",
) -> torch.LongTensor:
    """Calibration samples (nsamples, seqlen) of token ids out of one text, or out of a list of documents.

    "random": windows [i, i + seqlen) of one text with i = `random.Random(seed).randint(0, t - seqlen - 1)`, drawn as
    GPTQ draws them from WikiText-2; they may overlap. "sequential": the first nsamples windows, end to end.
    "documents": one window inside each of nsamples documents, drawn as GPTQ draws them from C4; see
    `document_windows`.
    bos: see `tokenize`. With "window" every window is BOS and seqlen - 1 tokens of the text, drawn likewise.
    Raises ObrError if the text is too short, if no document is longer than seqlen, or if the text is a list where
    one string is needed, or the reverse.
    """
    _check_sampling(sampling, not isinstance(text, str), "the text")
    if sampling == "documents":
        return document_windows(tokenizer, text, nsamples, seqlen, seed, bos)
    tokens = tokenize(tokenizer, text, bos)
    return sample_windows(tokens, nsamples, seqlen, seed, sampling, window_bos(tokenizer, bos))


def _check_sampling(sampling: str, documents: bool, what: str) -> None:
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
    """
    _check_sampling(sampling, False, "the text")
    _check_windows(nsamples, seqlen)
    if bos_token_id is not None:
        windows = sample_windows(_behind_bos(tokens, seqlen, bos_token_id), nsamples, seqlen - 1, seed, sampling)
        return _begun(windows, bos_token_id)
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
    tokenizer, documents: Sequence[str], nsamples: int, seqlen: int, seed: int = 0, bos: bool | str | None = None
) -> torch.LongTensor:
    """Windows (nsamples, seqlen), each inside one of n documents, drawn as GPTQ's loader draws them from C4.

    With one `random.Random(seed)`, for each window: a document `randint(0, n - 1)`, again until it has more than
    seqlen tokens, then the window [j, j + seqlen) with j = `randint(0, t - seqlen - 1)`, t its number of tokens.
    A document is tokenised when it is drawn, by itself, with special tokens as `tokenize` adds them. One of exactly
    seqlen tokens is drawn again; GPTQ's loader accepts it and then ends in an error. All other draws are the same.
    bos: see `tokenize`. With "window" every window is BOS and seqlen - 1 tokens of a document, drawn likewise.
    Raises ObrError if no document has more than seqlen tokens.
    """
    _check_windows(nsamples, seqlen)
    if (first := window_bos(tokenizer, bos)) is not None:
        if seqlen < 2:
            raise ObrError(f"seqlen {seqlen} has no room for a token after BOS: use 2 or more.")
        return _begun(document_windows(tokenizer, documents, nsamples, seqlen - 1, seed, bos=False), first)
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


def _check_windows(nsamples: int, seqlen: int) -> None:
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


def evaluation_windows(
    tokens: torch.LongTensor, seqlen: int, limit_tokens: int | None = None, bos_token_id: int | None = None
) -> torch.LongTensor:
    """Windows (b, seqlen) end to end over tokens (t,), or over the first limit_tokens; the tail is dropped.

    bos_token_id: the first token of every window, followed by the next seqlen - 1 tokens of the text. Each token of
    the text in the windows is then a target, and b is t // (seqlen - 1). A BOS token that the text begins with is
    left out. None (default) cuts the text as it is.

        windows = obr.evaluation_windows(tokens, 2048, bos_token_id=tokenizer.bos_token_id)

    Raises ObrError if not one window fits.
    """
    if seqlen < 1:
        raise ObrError(f"seqlen {seqlen} must be at least 1: correct the config.")
    if bos_token_id is not None:
        windows = evaluation_windows(_behind_bos(tokens, seqlen, bos_token_id), seqlen - 1, limit_tokens)
        return _begun(windows, bos_token_id)
    used = tokens if limit_tokens is None else tokens[: max(limit_tokens, 0)]
    windows = len(used) // seqlen
    if windows == 0:
        limit = "" if limit_tokens is None else f" under the limit of {limit_tokens}"
        raise ObrError(
            f"the text has {len(used)} tokens{limit} and one window needs {seqlen}: "
            "choose a smaller seqlen, a larger limit or a longer text."
        )
    return used[: windows * seqlen].reshape(windows, seqlen)


def _behind_bos(tokens: torch.LongTensor, seqlen: int, bos_token_id: int) -> torch.LongTensor:
    """The tokens of a text whose windows get a BOS token each: without one of their own in front."""
    if seqlen < 2:
        raise ObrError(f"seqlen {seqlen} has no room for a token after BOS: use 2 or more.")
    return tokens[1:] if len(tokens) and int(tokens[0]) == bos_token_id else tokens


def _begun(windows: torch.LongTensor, bos_token_id: int) -> torch.LongTensor:
    return torch.cat([torch.full_like(windows[:, :1], bos_token_id), windows], dim=1)


def missing_bos(windows: torch.LongTensor, tokenizer, model_type: str) -> str | None:
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
    options |= {key: spec[key] for key in SPEC_KEYS if key in spec}
    tokenizer = _tokenizer(model_dir)
    _check_sampling(options["sampling"], text_file.suffix == DOCUMENTS, str(text_file))
    if options["sampling"] == "documents":
        text = Documents(text_file)
        sha256, size = text.sha256, {"documents": len(text)}
        tokens = calibration_tokens(tokenizer, text, **options)
    else:
        text = read_text(text_file)
        stream = tokenize(tokenizer, text, options["bos"])
        sha256, size = hashlib.sha256(text.encode("utf-8")).hexdigest(), {"tokens_in_text": len(stream)}
        drawn = {key: value for key, value in options.items() if key != "bos"}
        tokens = sample_windows(stream, **drawn, bos_token_id=window_bos(tokenizer, options["bos"]))
    about = {
        "model": model_dir.name,
        "text": spec.get("text", text_file.stem),
        "text_sha256": sha256,
        **options,
        **size,
        "tokens": tokens.numel(),
        "tokenizer": type(tokenizer).__name__,
    }
    write_tokens(tokens, about | bos_note(tokens, tokenizer, model_dir), out)


def bos_note(windows: torch.LongTensor, tokenizer, model_dir: Path) -> dict:
    """{"note": sentence} for calibration windows without the BOS token that the model needs; else {}."""
    config = model_dir / "config.json"
    model_type = read_json(config).get("model_type", "") if config.is_file() else ""
    note = missing_bos(windows, tokenizer, model_type)
    return {"note": note} if note else {}


def write_tokens(tokens: torch.LongTensor, about: dict, out: Path) -> None:
    """Write calibration windows (nsamples, seqlen) and what is to be noted about them."""
    from safetensors.torch import save_file

    with whole(out) as partial:
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


def _tokenizer(model_dir: Path):
    from transformers import AutoTokenizer

    if not model_dir.is_dir():
        raise ObrError(f"model folder {model_dir} does not exist: run the stage download_model.")
    trust = foreign.trusted(model_dir)
    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=trust)
    except Exception as error:  # of any library that reads tokenizers
        raise foreign.refusal(model_dir, error) or ObrError(
            f"model folder {model_dir} has no tokenizer that transformers can load "
            f"({first_line(error)}): add its tokenizer files."
        ) from error
