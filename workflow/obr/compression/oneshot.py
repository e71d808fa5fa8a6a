"""`obr.quantize`: a model from its folder or hub to a packed checkpoint in one call, streamed and resumable."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from obr.checkpoints.files import MANIFEST, check_no_strays, check_replaceable, read_manifest
from obr.compression.stage import compress_stage
from obr.compression.work_folder import WorkFolder
from obr.config.model_sizes import read_config
from obr.config.oneshot_job import SEQLEN, Job, resolve, work_folder
from obr.config.oneshot_options import OneShot
from obr.config.workflow import check_widths
from obr.errors import ObrError
from obr.evaluation.stage import STAGE, Wanted, evaluate_stage
from obr.models import remote_code
from obr.models.architectures import with_defaults
from obr.models.hidden_states import MemoryBudget
from obr.models.loading import default_device
from obr.runtime import code_digest
from obr.runtime.files import read_json, write_json
from obr.runtime.locks import acquire, release

if TYPE_CHECKING:
    from obr.config.recipe import Recipe


@dataclass(frozen=True)
class Quantized:
    """What `obr.quantize` has made.

    folder: the packed checkpoint. work: folder of the work files. manifest: the contents of its manifest.json.
    before, after: perplexity of the original model and of the checkpoint as artefacts of the stage perplexity; None
    if it was not asked for. original_bytes: of the original model's weights.
    """

    folder: Path
    work: Path
    manifest: dict
    original_bytes: int
    before: dict | None = None
    after: dict | None = None
    text: str | None = None

    @property
    def perplexity(self) -> tuple[float, float] | None:
        """(of the original model, of the checkpoint); None if it was not asked for."""
        if self.before is None or self.after is None:
            return None
        values = [found["value"] for found in (self.before, self.after)]
        return tuple(float("inf") if value is None else value for value in values)

    def lines(self) -> list[str]:
        """The outcome: bits per weight, size, error, perplexity if it was asked for, how to load the checkpoint."""
        manifest, bits = self.manifest, self.manifest["bits_per_weight"]
        with (self.folder / "layers.csv").open(encoding="utf-8") as file:
            layers = sum(1 for _ in file) - 1
        error = manifest["relative_error"]
        mean = "not measured, without windows" if error is None else f"{error:.4f}, mean over {layers} layers"
        found = {
            "bits per weight": f"{bits['theoretical']:.2f} in theory, {bits['file']:.2f} in the file",
            "size": f"{manifest['file_bytes'] / 1e6:.1f} MB, {self.original_bytes / 1e6:.1f} MB before",
            "relative error": mean,
        }
        if self.perplexity:
            before, after = self.perplexity
            found["perplexity"] = f"{after:.2f} on {self.text}, {before:.2f} before"
        found["load it"] = f'obr.load("{self.folder}")'
        return [f"{name:<16} {text}" for name, text in found.items()]


def quantize(
    model: str | Path, out: str | Path, *, revision: str | None = None, method: str | None = None,
    bits: int | None = None, sparsity: float | None = None, pattern: str | None = None, group: int | None = None,
    mask: str | None = None, alpha: float | None = None, column_order: str | None = None, damp: float | None = None,
    clip: str | None = None, activations: str | None = None, activation_bits: int | None = None,
    kv_bits: int | None = None, rotation: str | Path | None = None, seed: int | None = None,
    calibration: str | Path | None = None, samples: int | None = None, seqlen: int | None = None,
    hessian: str | None = None, recipe: "str | Path | dict | Recipe | None" = None,
    evaluate: str | Path | None = None, configfile: "str | Path | Sequence[str | Path]" = (), device: str = "auto",
    dtype: str | None = None, activations_memory: float = 4096, overwrite: bool = False,
) -> Quantized:  # fmt: skip
    """Compress a model, one block in memory at a time; the parameters are the options of the command `obr quantize`.

        >>> found = obr.quantize("path/to/model", "packed", bits=3, calibration="text.txt", samples=8, seqlen=64)
        >>> found.manifest["bits_per_weight"]["theoretical"]
        2.5

    A call that was interrupted and is repeated goes on at its block. None leaves a value to the recipe.

    Args:
        model: a folder of safetensors, a hub repository "owner/name", or a name of the config's models.
        revision: a commit or tag of the hub repository; by default the newest commit, which source.json records.
        out: folder of the packed checkpoint, new or empty; the files it is made from lie in the folder `<out>.work`.
        method, bits, sparsity, pattern, group, mask, alpha, column_order, damp, clip, hessian: fields of
            `obr.Recipe`, by default obr_gptq at 4 bits and sparsity 0.5, with sequential Hessians.
        activations: a scheme of the config's activations, such as "a4kv4", which the next two change.
        activation_bits, kv_bits: of linear layers' inputs, and of keys and values; 16, the default, for none.
        rotation: "quarot" (default), "none", a file of this project, or a name of the config's rotations.
        seed: of rotation, calibration windows and random masks.
        calibration: a text file, or a name of the config's calibrations or texts; by default "wikitext2" of the hub.
        samples, seqlen: windows, and tokens per window; by default 128 and 2048.
        recipe: what the parameters change: a name of the config's recipes, a YAML file, a dictionary or a Recipe.
        evaluate: a text, as for calibration, on which perplexity is measured before and after.
        configfile: files in which names are looked up, instead of the project's config.yaml.
        device: "cpu", "cuda" or "auto". dtype: of the computation; float32 on a CPU, the model's on a GPU.
        activations_memory: MB for hidden states; more of them lie in a file.
        overwrite: replace an older checkpoint, or blocks that another run has left unfinished.

    Raises:
        ObrError: something cannot be had, does not fit, or would be overwritten; the sentence names the remedy.
    """
    given = dict(locals()) | {"out": Path(out)}
    given["configfile"] = tuple(map(Path, [configfile] if isinstance(configfile, str | Path) else configfile))
    for name in ("model", "rotation", "calibration", "evaluate", "recipe"):
        if isinstance(given[name], Path):
            given[name] = str(given[name])
    return run(resolve(OneShot(**given)))


def run(job: Job) -> Quantized:
    """Do a job: make what it reads, compress, evaluate."""
    options, out = job.options, Path(job.options.out)
    device = default_device() if options.device == "auto" else options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ObrError("device is 'cuda', but PyTorch finds no GPU; use device cpu, or install a build for CUDA.")
    named = options.dtype or job.recipe.dtype
    dtype = getattr(torch, named) if named else None
    job.options = replace(options, device=device)
    folder = work_folder(out)
    acquire(folder)
    try:
        with remote_code.allowed(job.entry.get("trust_remote_code", False) or remote_code.is_allowed()):
            finished = _check_out(job, folder)
            work = WorkFolder(folder, job, device, dtype)
            work.texts()
            _check_model(job, work)
            if not finished:
                compress_stage(
                    work.model, job.recipe, out, rotation=work.rotation, dtype=dtype, device=device,
                    megabytes=options.activations_memory, **work.statistics(),
                )  # fmt: skip
            return _outcome(job, work)
    finally:
        release(folder)


def _check_out(job: Job, folder: Path) -> bool:
    """Whether `out` holds the finished checkpoint of this very job; notes in `folder` whose work files these are.

    Raises:
        ObrError: `out` holds something else that the job may not replace.
    """
    options, out, note = job.options, Path(job.options.out), folder / "job.json"
    if out.exists() and not out.is_dir():
        raise ObrError(f"{out} is a file; choose a folder for the checkpoint.")
    unfinished, wanted = out.with_name(f"{out.name}.unfinished"), job.decisive()
    noted = read_json(note) if note.exists() else None
    same = noted is not None and noted == wanted
    interrupted = (unfinished / "run.json").exists()
    present = sorted(path.name for path in out.iterdir() if path.suffix != ".lock") if out.exists() else []
    if interrupted and not same:
        if not options.overwrite:
            raise ObrError(
                f"{unfinished} holds blocks of an interrupted run with other settings{_difference(noted, wanted)}; "
                "repeat that command to finish it, or give --overwrite to drop them."
            )
        shutil.rmtree(unfinished)
    finished = same and not interrupted and MANIFEST in present
    if present and not (same and (interrupted or finished)):
        if not options.overwrite:
            raise ObrError(
                f"{out} is not empty: it holds {present[0]}; choose a new folder, or give --overwrite to replace the "
                "checkpoint in it."
            )
        check_no_strays(out) if interrupted else check_replaceable(out)
    write_json(wanted, note)
    return finished and not options.overwrite


def _difference(noted: dict | None, wanted: dict) -> str:
    """What differs between two jobs, in brackets."""
    if noted is None:
        return ""
    pairs = {**noted, **noted.get("recipe", {})}, {**wanted, **wanted["recipe"]}
    names = [name for name in pairs[1] if name != "recipe" and pairs[0].get(name) != pairs[1][name]]
    return f" (first difference: {names[0]})" if names else ""


def _check_model(job: Job, work: WorkFolder) -> None:
    """Raise ObrError at windows longer than the context, or a pattern that does not divide the layers."""
    config, recipe = read_config(work.model), job.recipe
    patterns = {option.label: option.pattern for option in recipe.options} or {recipe.method: recipe.pattern}
    check_widths(with_defaults(config), patterns, job.model)
    longest = config.get("max_position_embeddings")
    lengths = [entry.get("seqlen", SEQLEN) for entry in job.calibrations.values()]
    lengths += [job.perplexity.get("seqlen", SEQLEN)] if job.perplexity else []
    if isinstance(longest, int) and lengths and max(lengths) > longest:
        raise ObrError(
            f"Windows have {max(lengths)} tokens, but the model has {longest} positions; give --seqlen {longest} or "
            "less."
        )


def _outcome(job: Job, work: WorkFolder) -> Quantized:
    """What was made, with perplexities if they are asked for."""
    out, model = Path(job.options.out), work.model
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    found = Quantized(out, work.folder, read_manifest(out), size)
    if job.perplexity is None:
        return found
    wanted = [Wanted("perplexity", str(job.evaluated), work.text(job.perplexity["text"]), work.evaluation)]
    room = MemoryBudget(work.megabytes, work.folder)
    scores = []
    for folder, recipe in ((model, "dense"), (out, "recipe")):
        place = work.path("evaluation", recipe=recipe, activations="own")
        place.parent.mkdir(parents=True, exist_ok=True)
        scores.append(
            evaluate_stage(
                folder, wanted, place, dtype=work.dtype, device=work.device, room=room, code=code_digest.digest(STAGE)
            )
        )
    before, after = (score["perplexity"][str(job.evaluated)] for score in scores)
    return replace(found, before=before, after=after, text=job.evaluated)
