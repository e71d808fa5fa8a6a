"""From text to tokens: calibration samples and evaluation windows, the same bytes for the same inputs."""

import contextlib
import hashlib
import json
import random
from pathlib import Path

import torch

from obr import foreign
from obr.errors import ObrError, first_line
from obr.files import whole

SAMPLINGS = ("random", "sequential")
SPEC_KEYS = ("nsamples", "seqlen", "seed", "bos", "sampling")


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


def tokenize(tokenizer, text: str, bos: bool | None = None) -> torch.LongTensor:
    """Token ids (t,) of the whole text at once.

    bos: None adds the special tokens that the tokenizer adds by itself, False adds none, True puts the
    beginning-of-sequence token in front and adds no other. Raises ObrError if there is no such token.
    """
    # verbose=False: a text longer than the model's context is meant here, and cut into windows later.
    ids = tokenizer(text, add_special_tokens=bos is None, verbose=False)["input_ids"]
    if bos:
        if tokenizer.bos_token_id is None:
            raise ObrError(
                f"{type(tokenizer).__name__} has no beginning-of-sequence token: set bos to null or false."
            )
        ids = [tokenizer.bos_token_id, *ids]
    return torch.tensor(ids, dtype=torch.int64)


def calibration_tokens(
    tokenizer,
    text: str,
    *,
    nsamples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    bos: bool | None = None,
    sampling: str = "random",
) -> torch.LongTensor:
    """Calibration samples (nsamples, seqlen) of token ids out of one text.

    "random": windows [i, i + seqlen) with i = `random.Random(seed).randint(0, t - seqlen - 1)`, drawn as GPTQ
    draws them from WikiText-2; they may overlap. "sequential": the first nsamples windows, end to end.
    The text is one string, also where it was joined from documents: GPTQ draws its C4 samples from inside
    single documents longer than seqlen, while here a window may cross from one document into the next.
    Raises ObrError if the text is too short.
    """
    return sample_windows(tokenize(tokenizer, text, bos), nsamples, seqlen, seed, sampling)


def sample_windows(
    tokens: torch.LongTensor, nsamples: int, seqlen: int, seed: int = 0, sampling: str = "random"
) -> torch.LongTensor:
    """Windows (nsamples, seqlen) of tokens (t,), chosen as `calibration_tokens` says."""
    if sampling not in SAMPLINGS:
        raise ObrError(f"sampling {sampling!r} is unknown: choose one of {', '.join(SAMPLINGS)}.")
    if nsamples < 1 or seqlen < 1:
        raise ObrError(f"nsamples {nsamples} and seqlen {seqlen} must be at least 1: correct the config.")
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


def evaluation_windows(tokens: torch.LongTensor, seqlen: int, limit_tokens: int | None = None) -> torch.LongTensor:
    """Windows (b, seqlen) end to end over tokens (t,), or over the first limit_tokens; the tail is dropped.

    Raises ObrError if not one window fits.
    """
    if seqlen < 1:
        raise ObrError(f"seqlen {seqlen} must be at least 1: correct the config.")
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
    text = read_text(text_file)
    stream = tokenize(tokenizer, text, options.pop("bos"))
    tokens = sample_windows(stream, **options)
    about = {
        "model": model_dir.name,
        "text": spec.get("text", text_file.stem),
        "text_sha256": hashlib.sha256(text.encode("utf-8")).hexdigest(),
        **options,
        "bos": spec.get("bos"),
        "tokens_in_text": len(stream),
        "tokens": tokens.numel(),
        "tokenizer": type(tokenizer).__name__,
    }
    write_tokens(tokens, about, out)


def write_tokens(tokens: torch.LongTensor, about: dict, out: Path) -> None:
    """Write calibration windows (nsamples, seqlen) and what is to be noted about them."""
    from safetensors.torch import save_file

    with whole(out) as partial:
        # One metadata entry: safetensors writes several in an order that differs from run to run.
        save_file({"tokens": tokens}, partial, metadata={"calibration": json.dumps(about, sort_keys=True)})


def load_tokens(path: Path | str) -> tuple[torch.LongTensor, dict]:
    """Tokens (nsamples, seqlen) that `write_tokens` wrote, and what was noted about them.

    Noted: model, text, text_sha256, nsamples, seqlen, tokens, tokenizer; of windows of a text also seed, sampling,
    bos and tokens_in_text, of others how they came about. Raises ObrError if the file is missing, damaged or
    another kind of file.
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
