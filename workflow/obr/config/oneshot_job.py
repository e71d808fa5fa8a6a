"""What `obr quantize` does, with every name resolved: which model, rotation, texts and calibration windows."""

import json
import re
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

from obr.config.model_sizes import read_config
from obr.config.oneshot_options import OneShot, reads_windows, resolved_recipe
from obr.config.recipe import Recipe
from obr.config.recipe_origins import Origins
from obr.errors import ObrError, first_line
from obr.runtime import local_sources
from obr.runtime.files import read_json

SAMPLES, SEQLEN = 128, 2048
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass
class Job:
    """A compression as a small config: entries as those of the workflow's sections, by the names of its files.

    model: the key of `models`. in_place: the folder of a model that was downloaded before; None to fetch it.
    named: what the recipe's rotation and calibration were called by the user, for messages and for --print-recipe.
    evaluated: the key of `perplexity`; None for no evaluation. from_file: keys of texts that are the user's files.
    """

    options: OneShot
    recipe: Recipe
    origins: Origins
    named: dict[str, str | None]
    model: str = ""
    entry: dict = field(default_factory=dict)
    in_place: Path | None = None
    rotation: dict | None = None
    calibrations: dict[str, dict] = field(default_factory=dict)
    texts: dict[str, dict] = field(default_factory=dict)
    perplexity: dict | None = None
    evaluated: str | None = None
    from_file: set[str] = field(default_factory=set)

    def decisive(self) -> dict:
        """All that decides the checkpoint, as JSON has it."""
        read = {name: self.texts[entry["text"]] for name, entry in self.calibrations.items() if "text" in entry}
        sources = [self.entry["source"], (self.rotation or {}).get("source", {}), *read.values()]
        found = {
            "model": str(self.in_place.resolve()) if self.in_place else self.entry,
            "recipe": self.recipe.to_dict() | {"label": None},
            "rotation": self.rotation,
            "calibrations": self.calibrations,
            "texts": read,
            "device": self.options.device,
            "dtype": self.options.dtype,
            "files": [local_sources.state(source, self.model) for source in sources],
        }
        return json.loads(json.dumps(found))

    def lines(self) -> list[str]:
        """What will be done, one line per thing."""
        recipe, entry = self.recipe, self.calibrations.get(self.recipe.calibration or "")
        pruned = f", {recipe.pattern or f'sparsity {recipe.sparsity:g}'}" if recipe.sparsity else ""
        bits = f"{recipe.bits_per_weight:.2f} bits per weight"
        source = self.in_place or self.entry["source"]
        windows = "none"
        if entry:
            windows = f"{entry.get('nsamples', SAMPLES)} windows of {entry.get('seqlen', SEQLEN)} tokens, "
            windows += f"{self.recipe.calibration} ({_source(entry, self.texts)}), {recipe.hessian} Hessians"
        found = {
            "model": f"{self.model} ({source if self.in_place else _brief(source)})",
            "recipe": f"{recipe.method}, {recipe.setting}{pruned}, {bits}",
            "rotation": recipe.rotation + (f", seed {self.rotation.get('seed', 0)}" if _drawn(self.rotation) else ""),
            "calibration": windows,
            "device": f"{self.options.device}, {self.options.dtype or recipe.dtype or 'default dtype'}",
            "output": f"{self.options.out}, work files in {work_folder(self.options.out)}",
        }
        if self.evaluated:
            found["perplexity"] = f"on {self.evaluated}, before and after"
        return [f"{name:<11} {text}" for name, text in found.items()]


def work_folder(out: Path) -> Path:
    """Where a run keeps its model, rotation and calibration windows: beside the output."""
    return Path(out).absolute().with_name(Path(out).absolute().name + ".work")


def resolve(options: OneShot) -> Job:
    """The job of some options; nothing is fetched.

    Raises:
        ObrError: a name that is no file and not in the config, or options that `resolved_recipe` refuses.
    """
    recipe, origins = resolved_recipe(options)
    job = Job(options, recipe, origins, {"rotation": recipe.rotation, "calibration": recipe.calibration})
    _resolve_model(job)
    _resolve_rotation(job)
    if recipe.calibration and reads_windows(recipe):
        job.recipe = replace(job.recipe, calibration=_resolve_calibration(job, recipe.calibration))
    if options.evaluate is not None:
        _resolve_evaluation(job)
    return job


def _resolve_model(job: Job) -> None:
    """A folder, a name of the config's models, or a repository of the hub."""
    name, options = str(job.options.model), job.options
    folder = Path(name).expanduser()
    on_hub = HUB_NAME.fullmatch(name) and not (options.configfile and name in options.config.raw["models"])
    if options.revision is not None and (folder.exists() or not on_hub):
        raise ObrError(
            f"--revision {options.revision} would change nothing, since {name} is no repository of the hub; "
            "leave it out."
        )
    if folder.is_dir():
        read_config(folder)
        job.model, job.entry = _plain(folder.resolve().name), {"source": {"source": "path", "path": str(folder)}}
        if (folder / "source.json").is_file() and isinstance(read_json(folder / "source.json").get("sha256"), dict):
            job.in_place = folder  # downloaded and checked by this project
        return
    if folder.exists():
        raise ObrError(
            f"{name} is a file; give the folder of a model in safetensors, or a hub id such as owner/name."
        )
    if on_hub:
        job.model = _plain(name.split("/")[1])
        job.entry = {"source": {"source": "hub", "repo": name, "revision": options.revision or "main"}}
        return
    models = options.config.raw["models"]
    if name not in models:
        raise ObrError(
            f"{name} is no folder, no hub id such as owner/name and no model of {options.config_name}, which has "
            f"{', '.join(models)}; correct it, or name another config by --configfile."
        )
    job.model, job.entry = (
        name,
        {key: models[name][key] for key in ("source", "dtype", "trust_remote_code") if key in models[name]},
    )


def _resolve_rotation(job: Job) -> None:
    """none, a file, quarot, or a name of the config's rotations; the recipe then has the rotation's name."""
    name, seed = job.recipe.rotation, job.options.seed
    if name == "none":
        return
    if (path := Path(name).expanduser()).is_file():
        source = {"source": "path", "path": str(path.resolve())}
        job.rotation, name = {"kind": "file", "format": "obr", "source": source}, _plain(path.stem)
    elif name == "quarot" and not job.options.configfile and not isinstance(job.options.recipe, str):
        job.rotation = {"kind": "quarot", "seed": 0}
    else:
        rotations = job.options.config.raw["rotations"]
        if name not in rotations:
            raise ObrError(
                f"--rotation {name} is neither a file nor a rotation of {job.options.config_name}, which has none, "
                f"{', '.join(rotations)}; correct it."
            )
        job.rotation = deepcopy(rotations[name])
    if seed is not None and job.rotation["kind"] != "file":
        job.rotation["seed"] = seed
    if "learn" in job.rotation:
        learn = job.rotation["learn"]
        learn["calibration"] = _resolve_calibration(job, learn["calibration"], main=False)
    job.recipe = replace(job.recipe, rotation=name)


def _resolve_calibration(job: Job, name: str, main: bool = True, part_of: dict | None = None) -> str:
    """A text file, or a name of the config's calibrations or texts; returns the key under which it is entered.

    main: of the recipe, whose windows the options change; not of a learned rotation. part_of: the mixture that takes
    its windows from this one.
    """
    options = job.options
    key, entry = _text_or_entry(job, name, "calibrations", "--calibration")
    if main and part_of is None and options.samples is not None:
        entry["nsamples"] = options.samples
    if main and options.seqlen is not None:
        entry["seqlen"] = options.seqlen
    if options.seed is not None and "mix" not in entry:
        entry["seed"] = options.seed
    for size, flag, least in (("nsamples", "samples", 1), ("seqlen", "seqlen", 2)):
        if type(entry.get(size, least)) is not int or entry.get(size, least) < least:
            raise ObrError(f"--{flag} is {entry[size]}; it must be a whole number from {least} on.")
    if job.calibrations.get(key, entry) != entry:
        key = f"{key}-{entry.get('nsamples', SAMPLES)}x{entry.get('seqlen', SEQLEN)}"
    job.calibrations[key] = entry
    if "mix" in entry:
        entry["mix"] = [_resolve_calibration(job, part, main, entry) for part in entry["mix"]]
    return key


def _resolve_evaluation(job: Job) -> None:
    """A text file, or a name of the config's perplexity section or texts."""
    key, entry = _text_or_entry(job, job.options.evaluate, "perplexity", "--evaluate")
    if key in job.from_file or "seqlen" not in entry:
        entry["seqlen"] = job.options.seqlen or SEQLEN
    job.evaluated, job.perplexity = key, {k: entry[k] for k in ("text", "seqlen", "tokens", "bos") if k in entry}


def _text_or_entry(job: Job, name: str, section: str, flag: str) -> tuple[str, dict]:
    """(key, entry) of a text file, or of a name of a section or of texts; the texts are entered."""
    path = Path(str(name)).expanduser()
    if path.is_file():
        _check_readable(path, flag)
        key = _plain(path.stem)
        if (known := job.texts.get(key)) and known.get("path") != str(path.resolve()):
            key = f"{key}-2"  # another file of that name
        job.texts[key] = {"source": "path", "path": str(path.resolve())}
        job.from_file.add(key)
        return key, {"text": key}
    raw = job.options.config.raw
    if name in raw[section]:
        entry = deepcopy(raw[section][name])
    elif name in raw["texts"]:
        entry = {"text": name}
    else:
        names = ", ".join(dict.fromkeys([*raw[section], *raw["texts"]]))
        raise ObrError(
            f"{flag} {name} is neither a text file nor a name of {job.options.config_name}, which has {names}; "
            "correct it."
        )
    if "text" in entry:
        job.texts[entry["text"]] = deepcopy(raw["texts"][entry["text"]])
    return name, entry


def _check_readable(path: Path, flag: str) -> None:
    """Raise ObrError before anything is fetched, should a text file be unreadable."""
    try:
        with path.open(encoding="utf-8") as file:
            file.read(1 << 16)
    except (OSError, UnicodeDecodeError) as error:
        raise ObrError(
            f"{flag} {path} is not text in UTF-8 ({first_line(error)}); convert it, or correct it."
        ) from error


def _plain(name: str) -> str:
    """A name as the config allows it for entries, which become file names."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-") or "model"


def _drawn(rotation: dict | None) -> bool:
    return rotation is not None and rotation["kind"] != "file"


def _brief(source: dict) -> str:
    name = source.get("repo") or source.get("package") or source.get("path")
    return f"{source['source']} {name}"


def _source(entry: dict, texts: dict[str, dict]) -> str:
    if "text" in entry:
        return _brief(texts[entry["text"]])
    return f"mixture of {', '.join(entry['mix'])}" if "mix" in entry else "written by the model"
