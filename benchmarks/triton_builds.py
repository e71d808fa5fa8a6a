"""Compile the Triton kernels of packed weights for GPUs that are not here, and say what each build takes.

    TRITON_INTERPRET=0 python benchmarks/triton_builds.py --out builds.csv    # needs Triton, no GPU; minutes

One line a build: registers of a thread, bytes on its stack (spilled registers), shared memory of a program, and how
many programs of it fit a multiprocessor by registers and shared memory.
"""

import argparse
import re
import subprocess
import tempfile
from itertools import product as combinations
from pathlib import Path

import pandas as pd
import torch

from obr.config.pattern import Pattern
from obr.kernels.gpu import product
from obr.kernels.gpu.layout import PARTS, Weight
from obr.runtime.files import write_text

ARCHITECTURES = (80, 90, 120)
PATTERNS = ("dense", "50 %", "2:4", "4:8", "8:16", "paired 4:8")
TOKENS = {"16-bit": torch.bfloat16, "8-bit": torch.int8}
REGISTERS = 65536  # of a multiprocessor, on all of these
SHARED = {80: 164, 90: 228, 120: 100}  # KiB of shared memory of a multiprocessor
POINTERS = {
    torch.int8: "*i8", torch.int32: "*i32", torch.uint8: "*u8", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.float32: "*fp32",
}  # fmt: skip
ALIGNED = ("columns", "words", "rows", "groups")  # whole numbers that are multiples of 16 in models


def weight_of(pattern: str, bits: int, group: int | None) -> Weight:
    """A small weight of a pattern; a build depends on its types and constants alone."""
    codes, parsed, mask = torch.zeros(16, 256, dtype=torch.int8), None, None
    if pattern == "50 %":
        mask = torch.arange(256).expand(16, -1) % 2 == 0
    elif pattern != "dense":
        parsed = Pattern.parse(pattern)
        mask = (torch.arange(256) % parsed.group < parsed.kept).expand(16, -1)
    return Weight.pack(codes, torch.ones(16, -(-256 // group) if group else 1), mask, parsed, bits, group)


def build(kernel: str, weight: Weight, tokens: torch.dtype, architecture: int) -> dict[str, int]:
    """What the kernel takes on that architecture, compiled as it is for a bias, 16-bit outputs and aligned sizes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, constants = getattr(product.programs(), kernel), product.constants_of(weight, kernel)
    warps = constants.pop("num_warps")
    if kernel != "unpack_rows":
        constants |= {"WHOLE": not tokens.is_floating_point, "BIAS": True}
    kinds = {part: POINTERS[getattr(weight, part).dtype] for part in PARTS}
    kinds |= {"x": POINTERS[tokens], "x_scale": "*fp32", "table": "*i32", "controls": "*i32"}
    kinds |= {"bias": "*bf16", "out": "*bf16"}
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if name in kinds or name in ALIGNED]
    source = ASTSource(function, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
    registers, stack = resources(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    fit = min(REGISTERS // (32 * warps * registers), (SHARED[architecture] << 10) // (shared + 1024))
    return {"registers": registers, "stack": stack, "shared": shared, "warps": warps, "programs": fit}


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack) as cuobjdump, which comes with Triton, reads them."""
    import triton.backends.nvidia as nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin/cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2])


def builds(
    kernels: list[str], patterns: list[str], architectures: list[int], bits: int = 4, group: int | None = None
) -> pd.DataFrame:
    """One line a kernel, pattern, type of tokens and architecture."""
    lines = []
    for kernel, pattern, (name, tokens), architecture in combinations(
        kernels, patterns, TOKENS.items(), architectures
    ):
        if kernel == "unpack_rows" and name == "8-bit":
            continue
        found = build(kernel, weight_of(pattern, bits, group), tokens, architecture)
        lines.append({"kernel": kernel, "pattern": pattern, "activations": name, "sm": architecture, **found})
        print(lines[-1], flush=True)
    return pd.DataFrame(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--kernels", nargs="+", default=list(product.BLOCKS), choices=list(product.BLOCKS))
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=PATTERNS)
    parser.add_argument("--sm", nargs="+", type=int, default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4))
    parser.add_argument("--group", type=int, metavar="G", help="columns that share a scale; default: all of a row")
    args = parser.parse_args()
    found = builds(args.kernels, args.patterns, args.sm, args.bits, args.group)
    write_text(found.to_csv(index=False), args.out)


if __name__ == "__main__":
    main()
