"""Evaluation of a checkpoint: all texts and tasks in one pass over its blocks, scores kept by text and task."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obr.checkpoints import referred
from obr.checkpoints.external.blocks import ExternalBlocks
from obr.checkpoints.external.folder import external_path
from obr.checkpoints.files import LAYERS, MANIFEST
from obr.checkpoints.format import CheckpointBlocks
from obr.checkpoints.packed_linear import PackedBlocks
from obr.config.recipe import Recipe
from obr.errors import ObrError
from obr.evaluation.block_pass import run
from obr.evaluation.likelihood import BATCH_TOKENS, Answers
from obr.evaluation.perplexity import DENSE, TextRun, Windows
from obr.evaluation.resume_point import ResumePoint
from obr.evaluation.tasks import CONFIG, read_task
from obr.evaluation.zero_shot import TaskRun, streamed_about
from obr.models import dtypes
from obr.models.blocks import StreamedBlocks
from obr.models.hidden_states import MemoryBudget
from obr.models.loading import load_tokenizer
from obr.models.side_files import side_files
from obr.runtime.files import read_json, sha256_of, write_json
from obr.runtime.provenance import model_hashes

if TYPE_CHECKING:
    import torch


KINDS = ("perplexity", "zero_shot")
STAGE = "evaluation.stage"  # whose code decides scores


@dataclass(frozen=True)
class Wanted:
    """A text or task that a checkpoint is evaluated on.

    Args:
        kind: "perplexity" or "zero_shot".
        name: of the score in the artefact.
        source: text file, or task folder.
        spec: settings of a text {"seqlen", "tokens", "bos"} or of a task {"limit", "batch_tokens", "bos"}, as in the
            config.
    """

    kind: str
    name: str
    source: Path
    spec: dict

    @property
    def label(self) -> str:
        """Such as "perplexity.wikitext2"."""
        return f"{self.kind}.{self.name}"

    def key(self, code: str | None) -> str:
        """Digest of what decides the score besides the model. code: digest of the stage's code.

        Raises:
            ObrError: the source is missing or broken.
        """
        if self.kind == "zero_shot":
            record = read_task(self.source)
            data = [record.get(key) for key in ("task", "sha256", "num_fewshot", "examples_sha256")]
            data.append(sha256_of(self.source / CONFIG))
        elif not self.source.is_file():
            raise ObrError(f"the text {self.source} does not exist; correct the path.")
        else:
            data = sha256_of(self.source)
        return _digest({"kind": self.kind, "spec": self.spec, "data": data, "code": code})


def evaluate_stage(
    checkpoint: Path,
    wanted: Sequence[Wanted],
    out: Path,
    *,
    recipe: Recipe | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    room: MemoryBudget | None = None,
    code: str | None = None,
    packed: bool = False,
) -> dict:
    """The stage: scores of a checkpoint on texts and tasks, in the file `out`; returns what the file holds.

    One block of the model is in memory at a time, and each is loaded once for all texts and tasks. Scores that `out`
    holds already, of the same checkpoint, settings and data, are kept and not computed again. An evaluation that is
    interrupted and repeated goes on near its block. There is one parameter for each option of `obr evaluate`.

    Args:
        recipe: whose activation settings apply; None for the checkpoint's own.
        dtype: of the computation, before the recipe's own.
        room: for the hidden states of all texts and prompts.
        code: digest of the code; scores of another code are computed again.
        packed: multiply packed weights, as `obr.load(..., packed=True)` does.

    Raises:
        ObrError: as `perplexity` and `zero_shot`, two scores of one name, or a folder that is not a whole checkpoint.
    """
    if len({w.label for w in wanted}) != len(wanted):
        raise ObrError("two scores have the same name; give each text and task a name of its own.")
    blocks, about = opened(Path(checkpoint), recipe, dtype, device, packed)
    keys = {w.label: w.key(code) for w in wanted}
    scores = _known(out, about)
    for kind in KINDS:
        for name, score in list(scores[kind].items()):
            if keys.get(f"{kind}.{name}", score["key"]) != score["key"]:
                del scores[kind][name]
    missing = [w for w in wanted if w.name not in scores[w.kind]]
    states = ResumePoint(
        out.with_name(f"{out.name}.states"), _digest({**about, "keys": [keys[w.label] for w in missing]})
    )
    computed = _scores(blocks, about["setting"], missing, room, states) if missing else []
    for one, score in zip(missing, computed, strict=True):
        scores[one.kind][one.name] = {"key": keys[one.label], **score}
    found = {**about, "computed": [w.label for w in missing], **scores}
    write_json(found, out)  # where nothing is missing, too: Snakemake goes by the time of the file
    states.drop()
    return found


def opened(
    folder: Path,
    recipe: Recipe | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    packed: bool = False,
) -> tuple[StreamedBlocks, dict]:
    """The blocks of a packed checkpoint, or of a model as it came, and what identifies them in an artefact.

    packed: weights are multiplied as they are packed.

    Raises:
        ObrError: the folder is neither, `recipe` is given for a model that is not compressed, or `packed` for what
            has no packed kernel.
    """
    is_ours = (folder / MANIFEST).exists() or not (folder / "config.json").exists()
    if packed and (external_path(folder) is not None or not is_ours):
        raise ObrError(f"{folder} is no checkpoint of this package, so its weights are not packed; leave out packed.")
    if external_path(folder) is not None:
        return _opened_external(folder, recipe, dtype, device)
    if is_ours:
        kind = PackedBlocks if packed else CheckpointBlocks
        blocks: StreamedBlocks = kind(folder, recipe, dtype, device)
        identity, settings = _identity(blocks.manifest), blocks.recipe.to_dict() | {"label": None}
    elif recipe is not None:
        raise ObrError(f"{folder} is a model that is not compressed, so no recipe applies to it; leave it out.")
    else:
        blocks = StreamedBlocks(folder, None, dtype, device)
        identity, settings = _digest(model_hashes(folder) or _hashes(folder)), None
    return blocks, _about(blocks, identity, settings, blocks.recipe.setting if settings else DENSE)


def _opened_external(folder: Path, recipe: Recipe | None, dtype, device: str | None) -> tuple[StreamedBlocks, dict]:
    """As `opened`, of a checkpoint that another program quantised."""
    blocks = ExternalBlocks(folder, recipe, dtype, device)
    place = blocks.path
    files = _hashes(blocks.directory) | ({place.name: sha256_of(place)} if place.is_file() else _hashes(place))
    return blocks, _about(blocks, _digest(files), blocks.recipe.to_dict() | {"label": None}, blocks.recipe.setting)


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of the files of a model folder that decide its scores: configuration, weights, tokenizer."""
    names = {"config.json", *(path.name for path in folder.glob("*.safetensors")), *side_files(folder)}
    return {name: sha256_of(folder / name) for name in sorted(names) if (folder / name).is_file()}


def _about(blocks: StreamedBlocks, identity: str, settings: dict | None, setting: str) -> dict:
    return {
        "checkpoint": identity,
        "recipe": settings,
        "setting": setting,
        "dtype": dtypes.name_of(blocks.dtype),
        "device": blocks.target.type + (", packed weights" if isinstance(blocks, PackedBlocks) else ""),
    }


def _identity(manifest: dict) -> str:
    """Digest of the files that decide what a checkpoint computes; a checkpoint that is made again has the same."""
    files = {name: digest for name, digest in manifest["files"].items() if name != LAYERS}
    weights = manifest.get(referred.ENTRY, {}).get("files", {})
    return _digest({"files": files, "weights": {name: file["sha256"] for name, file in weights.items()}})


def _known(out: Path, about: dict) -> dict[str, dict]:
    """The scores that `out` holds of this checkpoint and setting, by kind."""
    known = read_json(out) if out.exists() else {}
    same = all(known.get(name) == json.loads(json.dumps(value)) for name, value in about.items())
    if not same and any(known.get(kind) for kind in KINDS):
        print(f"{out} holds scores of another checkpoint or setting, which are replaced.", file=sys.stderr)
    return {kind: dict(known.get(kind, {})) if same else {} for kind in KINDS}


def _scores(
    blocks: StreamedBlocks,
    setting: str,
    wanted: Sequence[Wanted],
    room: MemoryBudget | None,
    resume: ResumePoint,
) -> list[dict]:
    """What the artefact holds of each text and task."""
    started, tokenizer = time.monotonic(), load_tokenizer(blocks.directory)
    runs: list[Any] = []
    parts: list[Any] = []
    for one in wanted:
        if one.kind == "perplexity":
            runs.append(TextRun(blocks, tokenizer, one.source, one.spec, setting))
            parts.append(Windows(blocks, runs[-1].windows))
        else:
            limit, bos = one.spec.get("limit"), one.spec.get("bos")
            batch_tokens = one.spec.get("batch_tokens") or BATCH_TOKENS
            runs.append(TaskRun(one.source, blocks.config, tokenizer, limit, bos))
            runs[-1].about |= streamed_about(blocks, batch_tokens)
            parts.append(Answers(blocks, runs[-1].requests, runs[-1].max_length, batch_tokens))
    values = run(blocks, parts, room, "evaluate", resume)
    found = [one.result(value) for one, value in zip(runs, values, strict=True)]
    # The time of the pass is shared out by the tokens that passed through the blocks.
    tokens = [sum(rows * length for rows, length in part.shapes) for part in parts]
    seconds = time.monotonic() - started
    for score, count in zip(found, tokens, strict=True):
        score |= {"tokens_computed": count, "seconds": round(seconds * count / sum(tokens), 3)}
    return found


def _digest(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
