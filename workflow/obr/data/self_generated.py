"""Calibration windows that a model writes itself, where no text of its training is available."""

import hashlib
import json
from pathlib import Path

import torch
from tqdm import tqdm

from obr.data.sampling import sample_windows
from obr.data.token_windows import load_tokens, write_tokens
from obr.data.tokenize import config_of, doubts, window_bos
from obr.errors import ObrError
from obr.models.loading import load_model, load_tokenizer

OPTIONS = {"temperature": 1.0, "top_p": 1.0, "batch_size": 16}


def generate(
    directory: Path | str, spec: dict, out: Path | str, device: str = "cpu", dtype: torch.dtype | None = None
) -> None:
    """Write the safetensors file `out`: tokens (nsamples, seqlen) int64 that the model in `directory` has drawn.

    Documents begin with the token that begins a text and end where the model ends them, at `seqlen` tokens at most;
    end to end they are cut into windows. The whole model is held in memory.

    spec: nsamples, seqlen, seed, and `generated` {temperature, top_p, batch_size}. `bos`: "window" puts a BOS token
    in front of every window, see `data.sample_windows`.
    Raises ObrError for a tokenizer that knows no token to begin with, and for logits that are not finite.
    """
    directory, out = Path(directory), Path(out)
    options = OPTIONS | spec["generated"]
    nsamples, seqlen, seed = spec.get("nsamples", 128), spec.get("seqlen", 2048), spec.get("seed", 0)
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    tokenizer, model = load_tokenizer(directory), load_model(directory, dtype, device)
    first, needed, stream = window_bos(tokenizer, spec.get("bos")), nsamples * seqlen, []
    torch.manual_seed(seed)
    with tqdm(total=needed, desc="writing", unit="token", mininterval=5) as shown:
        while len(stream) < needed:
            before = len(stream)
            for document in _documents(model, tokenizer, seqlen, options):
                stream += document
            shown.update(min(len(stream), needed) - before)
    tokens = sample_windows(torch.tensor(stream), nsamples, seqlen, sampling="sequential", bos_token_id=first)
    about = {"model": directory.name, "text": "its own writing", "text_sha256": _sha256(tokens), "generated": options}
    about |= {"nsamples": nsamples, "seqlen": seqlen, "seed": seed, "tokens": tokens.numel()}
    about |= {"bos": "window"} if first is not None else {}
    about |= doubts(tokens, tokenizer, config_of(directory))
    write_tokens(tokens, about | {"tokenizer": type(tokenizer).__name__}, out)


def _documents(model, tokenizer, longest: int, options: dict) -> list[list[int]]:
    """A batch of documents, each with the token that ended it if there was one."""
    from transformers import GenerationConfig

    begin, ends = tokenizer.bos_token_id, model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    ends |= {tokenizer.eos_token_id} - {None}
    begin = begin if begin is not None else tokenizer.eos_token_id
    if begin is None:
        raise ObrError(f"{type(tokenizer).__name__} has no token to begin a text with; calibrate on a text instead.")
    start = torch.full((options["batch_size"], 1), begin, device=model.device)
    config = GenerationConfig(
        do_sample=True, temperature=options["temperature"], top_p=options["top_p"], top_k=0,
        max_new_tokens=max(1, longest - 1), eos_token_id=sorted(ends) or None, pad_token_id=begin,
    )  # fmt: skip
    try:
        rows = model.generate(start, attention_mask=torch.ones_like(start), generation_config=config).tolist()
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise ObrError(
            f"The model's logits are not finite in {model.dtype}; use another dtype, or mend it."
        ) from error
    return [row[: next((i + 1 for i, token in enumerate(row) if i and token in ends), None)] for row in rows]


def mix(files: list[Path], spec: dict, out: Path | str) -> None:
    """Write the safetensors file `out`: windows (nsamples, seqlen) of several files of windows, taken in turns.

    Window i is window i // k of file i mod k, so that the first few are a mixture, too.

    spec: nsamples, seqlen, and `mix`, names of the files to be noted.
    Raises ObrError where a file has too few windows or windows of another length.
    """
    nsamples, seqlen = spec.get("nsamples", 128), spec.get("seqlen", 2048)
    parts, notes = zip(*(load_tokens(file) for file in files), strict=True)
    each = -(-nsamples // len(parts))
    for file, part in zip(files, parts):
        if part.shape[1] != seqlen or len(part) < each:
            raise ObrError(
                f"{file} has {len(part)} windows of {part.shape[1]} tokens, and a mixture of {len(parts)} needs "
                f"{each} of {seqlen} from each; correct nsamples or seqlen of the calibrations."
            )
    tokens = torch.stack([part[:each] for part in parts], 1).flatten(0, 1)[:nsamples].clone()
    about = {"model": notes[0]["model"], "text": " + ".join(spec["mix"]), "text_sha256": _sha256(tokens)}
    about |= {"nsamples": nsamples, "seqlen": seqlen, "mix": [note["text"] for note in notes]}
    if lacking := dict.fromkeys(note["note"] for note in notes if "note" in note):
        about["note"] = "; ".join(lacking)
    write_tokens(tokens, about | {"tokens": tokens.numel(), "tokenizer": notes[0]["tokenizer"]}, Path(out))


def _sha256(tokens: torch.Tensor) -> str:
    return hashlib.sha256(json.dumps(tokens.tolist()).encode()).hexdigest()
