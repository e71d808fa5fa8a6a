"""The numeric tests under every set of instructions that PyTorch's libraries can be held to: `make test-processors`.

Each setting is an environment in which layers are compressed first. Settings whose results are equal to the last bit
need not be told apart, so the tests run once for each different result (with --every, in every setting). A limit
above what the processor has changes nothing.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
FILES = [
    "methods",
    *("calibration/test_collect_hessians.py", "calibration/test_asymmetric.py", "mixed_precision/test_allocate.py"),
    *("checkpoints/test_packing.py", "checkpoints/test_packed_linear.py", "checkpoints/test_verify.py"),
    *("compression/test_stage.py", "compression/test_held_out_errors.py"),
    *("rotations/test_registry.py", "kernels/test_int4.py"),
]
ISA = [
    *("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16"),
    *("AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16"),
]
BFLOAT16 = {"OBR_PRODUCTS": "bfloat16"}
# oneDNN takes products in bfloat16, MKL those in float32, PyTorch itself the rest.
SETTINGS: list[dict[str, str]] = [
    {},
    {"OBR_PRODUCTS": "float32"},
    BFLOAT16,
    *({"ATEN_CPU_CAPABILITY": name} for name in ("default", "avx2", "avx512")),
    *({"MKL_CBWR": name} for name in ("COMPATIBLE", "SSE4_2", "AVX", "AVX2", "AVX512", "AUTO")),
    *({"MKL_ENABLE_INSTRUCTIONS": name} for name in ("SSE4_2", "AVX", "AVX2", "AVX512")),
    *({"ONEDNN_MAX_CPU_ISA": name} for name in ("SSE41", "AVX2", "AVX512_CORE")),
    *({"ONEDNN_MAX_CPU_ISA": name, **BFLOAT16} for name in ISA),
    *({"OMP_NUM_THREADS": str(count)} for count in (1, 2, 3)),
    {"CXX": "false"},  # without a compiler
]
CASES = [
    {"method": "rtn", "bits": 3, "group": 32},
    {"method": "gptq"},
    {"method": "sparsegpt_gptq"},
    {"method": "obr_rtn"},
    {"method": "obr_gptq"},
    {"method": "obr_gptq", "pattern": "2:4"},
    {"method": "joint", "sweeps": 8},
    {"method": "joint", "sweeps": 4, "pattern": "2:4"},
    {"method": "joint", "sweeps": 8, "scope": "layer"},
]


def compress(out: Path) -> None:
    """Write codes and relative errors of some layers to `out`, as this process's environment makes them."""
    sys.path.insert(0, str(TESTS))
    from helpers.layer_samples import golden, layer
    from obr.methods.restore import restore

    layers = [layer(40, 160), golden(TESTS / "fixtures/small.npz")[1:3]]
    found = [restore(weight, hessian, **case) for weight, hessian in layers for case in CASES]
    torch.save([(restored.codes, restored.relative_error) for restored in found], out)


def results(setting: dict[str, str]) -> list | None:
    """What `compress` makes in an environment; None if it asks for instructions that the processor lacks."""
    with tempfile.TemporaryDirectory() as folder:
        out, environment = Path(folder) / "out", {**os.environ, **setting}
        if "CXX" in setting:
            environment["OBR_CACHE"] = folder
        command = [sys.executable, __file__, "--compress", str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode == -signal.SIGILL:
            return None
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed with status {done.returncode}: {done.stderr[-2000:]}")
        return torch.load(out)


def compared(found: list, first: list) -> str:
    """How results differ from the first ones."""
    pairs = list(zip(found, first, strict=True))
    codes = max(float((one[0] != other[0]).float().mean()) for one, other in pairs)
    error = max(abs(one[1] / other[1] - 1) for one, other in pairs)
    return f"at most {100 * codes:.2f} % of a layer's codes, {error:.1e} of its relative error"


def tested(setting: dict[str, str], files: list[str]) -> tuple[bool, str]:
    """Whether the tests pass in an environment, and pytest's last line."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(str(TESTS / file) for file in files),
    ]
    with tempfile.TemporaryDirectory() as folder:
        cache = {"OBR_CACHE": folder} if "CXX" in setting else {}
        done = subprocess.run(
            command, env={**os.environ, **setting, **cache}, capture_output=True, text=True, cwd=TESTS.parent
        )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, "; ".join([*failed, done.stdout.strip().splitlines()[-1]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", default=FILES, help="folders or files of tests/, such as methods")
    parser.add_argument("--every", action="store_true", help="run the tests in every setting")
    parser.add_argument("--compress", type=Path, metavar="OUT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compress:
        compress(arguments.compress)
        return 0
    from obr.runtime import processor

    print(processor.summary(processor.description("cpu")), flush=True)
    kinds: list[tuple[str, list]] = []
    passed = True
    for setting in SETTINGS:
        started, found = time.monotonic(), results(setting)
        name = " ".join(f"{key}={value}" for key, value in setting.items()) or "as it is"
        if found is None:
            print(f"{name}: not on this processor", flush=True)
            continue
        same = next((other for other, known in kinds if equal(found, known)), None)
        outcome = f"identical to: {same}" if same else "the first"
        if same is None:
            outcome = compared(found, kinds[0][1]) if kinds else outcome
            kinds.append((name, found))
        if same is None or arguments.every:
            right, line = tested(setting, arguments.files)
            passed, outcome = passed and right, f"{outcome}; {line}"
        print(f"{name}: {outcome} ({time.monotonic() - started:.0f} s)", flush=True)
    print("All tests pass in every setting." if passed else "Tests failed.")
    return not passed


def equal(one: list, other: list) -> bool:
    """Whether results are equal to the last bit."""
    return all(torch.equal(a, c) and b == d for (a, b), (c, d) in zip(one, other, strict=True))


if __name__ == "__main__":
    sys.exit(main())
