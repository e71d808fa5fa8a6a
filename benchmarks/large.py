"""A model of Llama-2-7B's shape with random weights: two blocks compressed, the whole evaluated, on how much memory?

13.5 GB of sharded bfloat16 safetensors are written first, and removed afterwards unless they are to be kept; the
compressed checkpoint, whose other blocks stay at 16 bits, needs about as much again.
"""

import shutil
from pathlib import Path

from memory import RECIPE
from models import LLAMA_2_7B, Inputs, checkpoint_bytes, evaluation, write_model, write_questions, write_text
from obr.errors import ObrError
from peak import run_stage
from timing import counted, machine

SPARE = 2.3  # times the checkpoint: itself, the compressed one, and hidden states on the disk


def measure(
    scratch: Path, sizes: dict = LLAMA_2_7B, blocks: int = 2, windows: int = 4, seqlen: int = 256, keep: bool = False
) -> list[dict]:
    """Rows (stage, peak_mb, seconds). scratch: a folder; the model in it is reused if it is whole.

    Raises:
        ObrError: the disk has no room for it.
    """
    folder = scratch / "large"
    _check_room(scratch, folder, sizes)
    try:
        return _measure(folder, sizes, blocks, windows, seqlen)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _check_room(scratch: Path, folder: Path, sizes: dict) -> None:
    needed, free = SPARE * checkpoint_bytes(sizes), shutil.disk_usage(scratch).free
    if not (folder / "written").exists() and needed > free:
        raise ObrError(
            f"The large model needs {needed / 1e9:.0f} GB at {scratch} and {free / 1e9:.0f} GB are free; "
            "free some or name another folder with --scratch."
        )


def _measure(folder: Path, sizes: dict, blocks: int, windows: int, seqlen: int) -> list[dict]:
    inputs, out = Inputs.below(folder), folder / "compressed"
    if not (folder / "written").exists():
        write_model(inputs.model, sizes)
        write_text(inputs.text, sizes["vocab_size"], 2 * windows * seqlen)
        write_questions(inputs.questions, sizes["vocab_size"], max(1, windows * seqlen // 60))
        (folder / "written").touch()
    shutil.rmtree(out, ignore_errors=True)
    spec = {"nsamples": windows, "seqlen": seqlen}
    entry = {**RECIPE, "hessian": "sequential", "blocks": f"0:{blocks}"}
    threads = ["--threads", machine()["threads"]]
    model = ["--model", inputs.model]
    stages = {
        "Rotation": ["download-rotation", "--settings", {"kind": "quarot"}, *model, "--out", inputs.rotation],
        "Calibration windows": [
            "calibrate", "--settings", spec, *model, "--text", inputs.text, "--out", inputs.tokens,
        ],
        f"Compression of {counted(blocks, 'block')}, sequential": [
            "compress", "--recipe", entry, *model, "--rotation", inputs.rotation, "--tokens", inputs.tokens,
            "--out", out, *threads,
        ],
        "Evaluation": [
            "evaluate", out, *evaluation(inputs, windows, seqlen), "--out", folder / "scores.json", *threads,
        ],
    }  # fmt: skip
    size = checkpoint_bytes(sizes) / 1e9
    return [
        {"stage": name, **run_stage(*command), "blocks": sizes["num_hidden_layers"], "model_gb": size, **machine()}
        for name, command in stages.items()
    ]
