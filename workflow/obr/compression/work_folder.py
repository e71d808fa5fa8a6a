"""The files that a compression in one command reads: each made once by its stage, and kept for the next run."""

import json
import shutil
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch

from obr.calibration.collect_hessians import hessian_stage
from obr.calibration.output_gradients import gradients
from obr.config import paths
from obr.config.oneshot_job import SEQLEN, Job
from obr.data import self_generated, token_windows
from obr.data.texts import download_documents, download_text
from obr.errors import ObrError
from obr.mixed_precision.allocate import allocate_stage
from obr.mixed_precision.sensitivity import measure_sensitivity
from obr.models.architectures import needs_bos
from obr.models.download import download_model
from obr.rotations import obtain
from obr.rotations.learning.registry import learn_rotation
from obr.runtime import local_sources
from obr.runtime.files import read_json, sha256_of, write_json


class WorkFolder:
    """Model, rotation, texts, calibration windows and statistics of a job, in the layout of the folder of results.

    Beside them `made/` notes what each file was made from. A file is made again only if that has changed.

    Args:
        folder: made if need be. device, dtype: of the computation; dtype None for the device's default.
    """

    def __init__(self, folder: Path, job: Job, device: str, dtype: torch.dtype | None):
        self.folder, self.job, self.recipe = Path(folder), job, job.recipe
        self.device, self.dtype = device, dtype
        self.megabytes = job.options.activations_memory

    def path(self, artefact: str, **names: str) -> Path:
        """The file of an artefact of the job's model."""
        return paths.path(self.folder, artefact, model=self.job.model, **names)

    def made(self, path: Path, request: dict, make: Callable[[], object]) -> Path:
        """The file `path`, which `make` writes unless it is there and was made by an equal request."""
        request = json.loads(json.dumps(request))
        note = self.folder / "made" / f"{path.relative_to(self.folder).as_posix().replace('/', '.')}.json"
        if path.exists() and note.exists() and read_json(note) == request:
            return path
        print(f"obr quantize: {path}", file=sys.stderr, flush=True)
        begun = note.with_suffix(".begun")
        if begun.exists() and read_json(begun) != request:  # what an interrupted run has left serves no more
            for place in (path, path.parent):
                shutil.rmtree(place.with_name(f"{place.name}.unfinished"), ignore_errors=True)
        note.unlink(missing_ok=True)
        write_json(request, begun)
        path.parent.mkdir(parents=True, exist_ok=True)
        make()
        write_json(request, note)
        begun.unlink()
        return path

    @cached_property
    def model(self) -> Path:
        """Folder of the model: the user's, if it was downloaded by this project, or a copy."""
        if self.job.in_place:
            return self.job.in_place
        entry, out = self.job.entry, self.path("model")
        request = {"entry": entry, "local": local_sources.state(entry["source"])}
        trust = entry.get("trust_remote_code", False)

        def make() -> None:
            try:
                download_model(entry["source"], out.parent, entry.get("dtype", "auto"), trust)
            except ObrError as error:
                if entry["source"]["source"] != "hub":
                    raise
                raise ObrError(
                    f"{str(error).removesuffix('.')}; there is no folder {self.job.options.model} either."
                ) from error

        return self.made(out, request, make).parent

    def text(self, name: str, documents: bool = False) -> Path:
        """A text, joined or as documents apart. Raises ObrError, which names --calibration, if it cannot be had."""
        source = self.job.texts[name]
        path = self.path("documents" if documents else "text", text=name)
        request = {"source": source, "local": local_sources.state(source)}

        def make() -> None:
            try:
                (download_documents if documents else download_text)(source, path)
            except ObrError as error:
                if name in self.job.from_file:
                    raise
                raise ObrError(
                    f"{str(error).removesuffix('.')}; or give a text file, such as --calibration FILE.txt."
                ) from error

        return self.made(path, request, make)

    def texts(self) -> None:
        """Fetch the texts of all calibrations and of the evaluation, which come before the gigabytes of a model."""
        for entry in self.job.calibrations.values():
            if "text" in entry:
                self.text(entry["text"], entry.get("sampling") == "documents")
        if self.job.perplexity:
            self.text(self.job.perplexity["text"])

    def windows(self, name: str) -> Path:
        """Calibration windows (nsamples, seqlen) of tokens."""
        entry, path = self.job.calibrations[name], self.path("calibration", calibration=name)
        if "mix" in entry:
            files = [self.windows(part) for part in entry["mix"]]
            request = {"entry": entry, "files": [sha256_of(file) for file in files]}
            return self.made(path, request, lambda: self_generated.mix(files, entry, path))
        if "generated" in entry:
            request = {"entry": entry, "model": self._model_hashes(), "device": self.device, "dtype": str(self.dtype)}
            return self.made(
                path, request, lambda: self_generated.generate(self.model, entry, path, self.device, self.dtype)
            )
        documents = entry.get("sampling") == "documents"
        text, entry = self.text(entry["text"], documents), self._with_bos(entry)
        request = {"entry": entry, "text": sha256_of(text), "model": self._model_hashes()}
        return self.made(path, request, lambda: token_windows.calibrate(self.model, text, entry, path))

    def _with_bos(self, entry: dict) -> dict:
        """An entry of a text with a BOS token in front of each window, where the text is the user's own file and the
        model's family needs that token."""
        model_type = read_json(self.model / "config.json").get("model_type", "")
        own = entry["text"] in self.job.from_file and needs_bos(model_type)
        return {**entry, "bos": "window"} if own else entry

    @property
    def evaluation(self) -> dict:
        """The evaluation's entry, as of the config's section perplexity."""
        return {"seqlen": SEQLEN, **self._with_bos(self.job.perplexity)}

    @cached_property
    def rotation(self) -> Path | None:
        """The rotation's file, drawn, fetched or learned; None for no rotation."""
        entry = self.job.rotation
        if entry is None:
            return None
        path = self.path("rotation", rotation=self.recipe.rotation)
        request = {"entry": entry, "model": self._model_hashes()}
        if "learn" in entry:
            tokens = self.windows(entry["learn"]["calibration"])
            request |= {"tokens": sha256_of(tokens), "device": self.device, "dtype": str(self.dtype)}
            return self.made(
                path, request, lambda: learn_rotation(entry, self.model, tokens, path, self.device, self.dtype)
            )
        request["local"] = local_sources.state(entry.get("source", {}), self.job.model)
        return self.made(path, request, lambda: obtain.make(entry, self.model, path))

    def statistics(self) -> dict[str, Path]:
        """What the recipe's compression reads besides model and rotation, by the parameters of `compress_stage`."""
        recipe, found = self.recipe, {}
        if recipe.calibration not in self.job.calibrations:  # its method reads no windows
            return found
        tokens = self.windows(recipe.calibration)
        needs_hessians = recipe.hessian == "cached" or recipe.allocation is not None
        request = {
            "tokens": sha256_of(tokens), "model": self._model_hashes(), "device": self.device,
            "dtype": str(self.dtype), "rotation": self.rotation and sha256_of(self.rotation),
        }  # fmt: skip
        if recipe.hessian == "sequential" and recipe.needs_hessian:
            found["tokens"] = tokens
        if needs_hessians:
            hessians = self._hessians(tokens, request)
            found |= {"hessians": hessians} if recipe.hessian == "cached" else {}
        if recipe.needs_gradients or recipe.allocation is not None:
            slopes = self._gradients(tokens, request)
            found |= {"gradient_file": slopes} if recipe.needs_gradients else {}
        if recipe.allocation is not None:
            found["allocation_file"] = self._allocation(tokens, hessians, slopes, request)
        return found

    def _hessians(self, tokens: Path, request: dict) -> Path:
        path = self.path("hessians", rotation=self.recipe.rotation, calibration=self.recipe.calibration)
        return self.made(
            path, request,
            lambda: hessian_stage(
                self.model, self.rotation, tokens, path.parent, self.dtype, self.device, self.megabytes
            ),
        ).parent  # fmt: skip

    def _gradients(self, tokens: Path, request: dict) -> Path:
        path = self.path("gradients", rotation=self.recipe.rotation, calibration=self.recipe.calibration)
        return self.made(
            path, request,
            lambda: gradients(
                self.model, self.rotation, tokens, path, dtype=self.dtype, device=self.device,
                megabytes=self.megabytes,
            ),
        )  # fmt: skip

    def _allocation(self, tokens: Path, hessians: Path, slopes: Path, request: dict) -> Path:
        """The options of the recipe's allocation, chosen layer by layer."""
        recipe = self.recipe
        names = {"rotation": recipe.rotation, "calibration": str(recipe.calibration), "options": "options"}
        losses, path = self.path("sensitivity", **names), self.path("allocation", recipe="recipe")
        request = {**request, "recipe": recipe.decisive()}
        self.made(
            losses, request,
            lambda: measure_sensitivity(
                self.model, self.rotation, tokens, hessians, slopes, recipe.options, losses.parent, recipe.blocks,
                self.dtype, self.device, self.megabytes,
            ),
        )  # fmt: skip
        return self.made(path, request, lambda: allocate_stage(recipe, losses, path))

    def _model_hashes(self) -> dict:
        """What identifies the model."""
        return read_json(self.model / "source.json")["sha256"]
