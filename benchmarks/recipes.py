"""Recipes measured side by side on one model: perplexity, layer error, time and peak memory, one CSV line a run.

    python benchmarks/recipes.py --model DIR --calibration TEXT --test wiki.test.raw --out out.csv --seeds 0 1 2 \\
        --recipe "method=gptq bits=4" --recipe "method=gptq bits=4 column_order=hessian"

Runs that the CSV file has already are not repeated. Each runs in a process of its own, whose peak memory, before the
evaluation, is counted. `relative_error` is the mean over layers of what each leaves of its own target.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from obr.config.recipe_settings import command_line, parse_settings
from timing import machine

FIELDS = ["model", "calibration", "windows", "seqlen", "reverse", "test", "tokens", "seed", "recipe"]
FOUND = ["perplexity", "relative_error", "held_out_error", "bits_per_weight", "zeros", "seconds", "peak_mb"]


def main() -> None:
    args = arguments()
    lines = args.recipes.read_text(encoding="utf-8").splitlines() if args.recipes else []
    entries = [line.split("#")[0].strip() for line in lines]
    for words in [*args.recipe, *filter(None, entries)]:
        for seed in args.seeds:
            settings = {
                "model": args.model.name, "calibration": args.calibration.name, "windows": args.windows,
                "seqlen": args.seqlen, "reverse": args.reverse, "test": args.test.name, "tokens": args.tokens,
                "seed": seed, "recipe": command_line(parse_settings(words.split())),
            }  # fmt: skip
            if settings in finished(args.out, args.threads):
                continue
            job = {**vars(args), "recipe": words, "seed": seed, "rotated": "rotation=" in words}
            command = [sys.executable, __file__, "--job", json.dumps(job, default=str)]
            result = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
            append(args.out, {**settings, **json.loads(result.stdout.splitlines()[-1])})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--calibration", type=Path, required=True, help="text of the calibration windows")
    parser.add_argument("--test", type=Path, required=True, help="text of the perplexity; *.raw is read as WikiText")
    parser.add_argument("--out", type=Path, required=True, help="CSV file, continued")
    parser.add_argument("--recipe", action="append", default=[], help="settings of one recipe")
    parser.add_argument("--recipes", type=Path, help="file with the settings of one recipe a line")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of calibration windows and rotation")
    parser.add_argument("--windows", type=int, default=16, help="of calibration")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a calibration window")
    parser.add_argument("--reverse", action="store_true", help="take the calibration windows in reverse order")
    parser.add_argument("--tokens", type=int, default=6144, help="of the test text")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window of the test text")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def finished(out: Path, threads: int) -> list[dict]:
    """The settings of the runs in a CSV file."""
    if not out.exists():
        return []
    with out.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["threads"]) == threads]
    typed = {"windows": int, "seqlen": int, "tokens": int, "seed": int, "reverse": lambda text: text == "True"}
    return [{name: typed.get(name, str)(row[name]) for name in FIELDS} for row in rows]


def append(out: Path, row: dict) -> None:
    new = not out.exists()
    with out.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*FIELDS, *FOUND, *machine()])
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row["recipe"], f"seed {row['seed']}: {row['perplexity']:.2f}", flush=True)


@torch.no_grad()
def run(job: dict) -> dict:
    """Compress and evaluate as one job says; returns what was found."""
    import obr

    torch.set_num_threads(job["threads"])
    tokens = calibrated(job["model"], text_of(job["calibration"]), job["windows"], job["seqlen"], job["seed"])
    entry = parse_settings(job["recipe"].split())
    model = obr.load_model(job["model"], device="cpu")
    rotation = entry.pop("rotation", None)
    if rotation:
        obr.rotate(model, rotation, seed=job["seed"])
    started = time.monotonic()
    if entry["method"] != "dense":
        obr.compress(model, tokens.flip(0) if job["reverse"] else tokens, entry, progress=False)
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    windows = tested(job["model"], text_of(job["test"]), job["length"], job["tokens"])
    found = {"perplexity": obr.perplexity(model, windows), "seconds": round(seconds, 1), "peak_mb": round(peak)}
    return found | about(getattr(model, "obr_report", None)) | machine()


def text_of(path: Path | str) -> str:
    """A text file's text; that of *.raw is joined as WikiText's rows are."""
    from obr.data.texts import wikitext_rows

    text = Path(path).read_text(encoding="utf-8")
    return "\n\n".join(wikitext_rows(text)) if str(path).endswith(".raw") else text


def calibrated(model: Path | str, text: str, windows: int, seqlen: int, seed: int = 0) -> torch.Tensor:
    """Calibration windows; each begins with BOS where the family needs it."""
    import obr

    tokenizer, needs_bos = tokenizer_of(model)
    bos = "window" if needs_bos else None
    return obr.calibration_tokens(tokenizer, text, nsamples=windows, seqlen=seqlen, seed=seed, bos=bos)


def tested(model: Path | str, text: str, length: int, tokens: int) -> torch.Tensor:
    """Windows of a perplexity; each begins with BOS where the family needs it."""
    import obr

    tokenizer, needs_bos = tokenizer_of(model)
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    return obr.evaluation_windows(ids, length, tokens, tokenizer.bos_token_id if needs_bos else None)


def tokenizer_of(model: Path | str) -> tuple:
    """(tokenizer, whether the model's family needs BOS)."""
    from transformers import AutoConfig, AutoTokenizer

    from obr.models.architectures import layout_of

    return AutoTokenizer.from_pretrained(model), layout_of(AutoConfig.from_pretrained(model)).needs_bos


def about(report) -> dict:
    """Means of a report over layers, errors over the layers that have one, sizes by weights."""
    if report is None:
        return {"relative_error": 0.0, "held_out_error": None, "bits_per_weight": 16.0, "zeros": 0.0}
    size = sum(row.rows * row.columns for row in report.layers)
    unseen = [row.held_out_error for row in report.layers if row.held_out_error == row.held_out_error]
    return {
        "relative_error": sum(row.relative_error for row in report.layers) / len(report.layers),
        "held_out_error": sum(unseen) / len(unseen) if unseen else None,
        "bits_per_weight": report.recipe.bits_per_weight,
        "zeros": sum(row.zeros * row.rows * row.columns for row in report.layers) / size,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        print(json.dumps(run(json.loads(sys.argv[2]))))
    else:
        main()
