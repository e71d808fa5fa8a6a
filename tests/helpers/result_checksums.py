"""Checksums of what a run has computed: python tests/helpers/result_checksums.py RESULTS [OTHER].

Of every tensor, score and table below a folder of results, without what no result depends on: seconds, versions,
digests of code, places of files. With a second folder, what differs; exit status 1 if anything does.
"""

import csv
import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

SKIPPED = ("logs", "benchmarks", "kernels", "config")
# Keys of JSON files that say how or when a result was made, not what it is.
ABOUT = (
    "code",
    "seconds",
    "made_from",
    "files",
    "software",
    "versions",
    "processors",
    "recipe",
    "run",
    "source",
    "path",
)
COLUMNS = ("seconds", "time")


def checksums(results: Path) -> dict[str, str]:
    """{file, or file and tensor: sha256}."""
    found = {}
    for path in sorted(results.rglob("*")):
        name = path.relative_to(results).as_posix()
        if not path.is_file() or name.split("/")[0] in SKIPPED or "kernels" in path.name:
            continue
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(key).contiguous()
                    content = tensor.flatten().view(torch.uint8).numpy().tobytes()
                    about = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
                    found[f"{name} {key}"] = hashlib.sha256(about + content).hexdigest()
        else:
            found[name] = hashlib.sha256(_content(path)).hexdigest()
    return found


def _content(path: Path) -> bytes:
    if path.suffix == ".json":
        return json.dumps(_results(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True).encode()
    if path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as file:
            rows = [{k: v for k, v in row.items() if k not in COLUMNS} for row in csv.DictReader(file)]
        return json.dumps(rows).encode()
    return path.read_bytes()


def _results(value):
    if isinstance(value, dict):
        return {key: _results(part) for key, part in value.items() if key not in ABOUT}
    return [_results(part) for part in value] if isinstance(value, list) else value


def main(folders: list[str]) -> int:
    first, *others = (checksums(Path(folder)) for folder in folders)
    if not others:
        print(json.dumps(first, indent=1))
        return 0
    unlike = [name for name in sorted(first.keys() | others[0].keys()) if first.get(name) != others[0].get(name)]
    print(f"{len(first)} and {len(others[0])} checksums, {len(unlike)} differ", *unlike, sep="\n")
    return bool(unlike)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
