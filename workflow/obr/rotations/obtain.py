"""Where a model's rotation comes from: drawn from a seed, or a file."""

from pathlib import Path

from obr.config.rotations import WHERE
from obr.errors import ObrError
from obr.models.architectures import Dimensions
from obr.rotations import published_files
from obr.rotations.registry import draw, load, save
from obr.rotations.unrotated import instead_of
from obr.runtime import hub
from obr.runtime.files import sha256_of


def make(entry: dict, model: Path, out: Path) -> None:
    """The stage: the rotation of a downloaded model, from a config entry, written to `out`.

    entry: {"kind": a name of KINDS, "seed", "block"?, "fused"?} draws it; {"kind": "file", "source", "format"?}
    takes one that `save` wrote or, by its format, one that another project published, from {"source": "path",
    "path", "sha256"?} or {"source": "hub", "repo", "revision", "file", "sha256"?}, where `{model}` stands for
    the model's name. Where the model's family does not take the kind, the file says so and changes nothing.

    Raises:
        ObrError: the file cannot be had, is not what its sha256 says, or was made for another model.
    """
    from obr.models.loading import config_of

    dimensions = Dimensions.of(config_of(model))
    if entry["kind"] == "file":
        name = entry.get("format", "obr")
        rotation = instead_of(name, dimensions, published=True) if name != "obr" else None
        path = _fetch(entry["source"], model.name, name) if rotation is None else None
        if name == "obr":
            rotation = load(path, dimensions)
        elif path is not None:
            rotation = published_files.read(name, path, dimensions, model, entry)
            rotation.options["sha256"] = sha256_of(path)
    else:
        options = {name: entry.get(name) for name in ("block", "fused")}
        rotation = draw(entry["kind"], dimensions, entry.get("seed", 0), **options)
    save(rotation, out)


def _fetch(source: dict, model: str, name: str) -> Path:
    if source["source"] == "path":
        path = _local(source["path"].replace("{model}", model), name)
    else:
        path = _from_hub(source, source["file"].replace("{model}", model))
    expected = source.get("sha256")
    actual = sha256_of(path) if expected else None
    if actual != expected:
        raise ObrError(f"{path} has sha256 {actual}, not {expected}: correct the config if you trust the file.")
    return path


def _local(path: str, name: str) -> Path:
    try:
        return hub.local_path(path)
    except ObrError as error:
        if name in WHERE:
            raise ObrError(f"{str(error).removesuffix('.')}; {WHERE[name]}.") from error
        raise


def _from_hub(source: dict, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    revision = hub.hub_info(source["repo"], source["revision"]).sha
    try:
        return Path(hf_hub_download(source["repo"], file, revision=revision))
    except hub.hub_exceptions() as error:
        raise hub.hub_error(error, source["repo"], revision) from error
