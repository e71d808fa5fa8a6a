"""The processor that computes: its name and instructions, and the dtype in which it takes large products.

Results depend on it in the last bits: libraries choose their kernels by its instructions, and bfloat16 products are
faster than float32 ones on some processors only. Manifests say both.
"""

import os
import platform
from pathlib import Path

import torch

from obr.errors import ObrError
from obr.runtime.compiler import processor_flags

PRODUCTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VARIABLE = "OBR_PRODUCTS"  # environment variable that names the dtype of the large products
# Environment variables by which libraries are held to fewer instructions than the processor has.
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")
MATRIX = ("avx512_bf16", "amx_bf16")  # flags of instructions for bfloat16 products, as Linux names them

_required: str | None = None


def product_dtype(device: str) -> torch.dtype:
    """The dtype of the large products on a device ("cpu", "cuda").

    That of `require_products` or else of the environment variable OBR_PRODUCTS; without either bfloat16 where the
    device has instructions for it, else float32. Measured on a CPU with AVX512_BF16: bfloat16 is 2.1 times as fast at
    576 x 1536, 2.3 times at 512 x 4096.

    Raises:
        ObrError: OBR_PRODUCTS has another value than "float32" and "bfloat16".
    """
    name = _required or os.environ.get(VARIABLE)
    if name:
        if name not in PRODUCTS:
            raise ObrError(f"{VARIABLE} is {name!r}; set it to {' or '.join(PRODUCTS)}, or unset it.")
        return PRODUCTS[name]
    if device == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def require_products(name: str | None) -> None:
    """Take large products in the dtype "float32" or "bfloat16" from now on, whatever OBR_PRODUCTS says; None: as it
    says."""
    global _required
    _required = name


def description(device: str) -> dict:
    """{name, instructions, limits, products}: of this processor, and of the large products on `device`.

    instructions: those that PyTorch uses, and those for bfloat16 products. limits: environment variables that
    withhold instructions.
    """
    flags = processor_flags()
    return {
        "name": _name(),
        "instructions": [torch.backends.cpu.get_cpu_capability(), *(flag for flag in MATRIX if flag in flags)],
        "limits": {name: os.environ[name] for name in LIMITS if os.environ.get(name)},
        "products": str(product_dtype(device)).removeprefix("torch."),
    }


def summary(processor: dict) -> str:
    """Such as "AMD EPYC 9654 (AVX512, avx512_bf16), bfloat16 products"."""
    limits = [f"{name}={value}" for name, value in processor["limits"].items()]
    return f"{processor['name']} ({', '.join(processor['instructions'] + limits)}), {processor['products']} products"


def _name() -> str:
    """The processor's own name, as Linux has it; the kind of machine elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
