"""llama.cpp's 4-bit products, as a rival: a Q4_0 weight in the repacked form that its CPU backend prefers.

The libraries come with the Python binding, which pip builds for the machine it is on:

    pip install llama-cpp-python

Others are found through the environment variable OBR_GGML, a folder with libggml-base.so and libggml-cpu.so.
"""

import ctypes
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from obr.errors import ObrError

F32, Q4_0 = 0, 2  # of ggml_type
OVERHEAD = 1 << 20  # bytes of a context without data: descriptions of a few tensors and a graph
REPACKED = "_Z35ggml_backend_cpu_repack_buffer_typev"


class _Parameters(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@cache
def libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """libggml-base and libggml-cpu. Raises ObrError where they are not."""
    named, package = os.environ.get("OBR_GGML"), find_spec("llama_cpp")
    if not named and package is None:
        raise ObrError("llama.cpp is not installed; run pip install llama-cpp-python, or leave its row out.")
    folder = Path(named) if named else Path(package.origin).parent / "lib"
    try:
        base, cpu = (ctypes.CDLL(str(folder / f"libggml-{part}.so"), ctypes.RTLD_GLOBAL) for part in ("base", "cpu"))
        repacked = getattr(cpu, REPACKED)
    except (OSError, AttributeError) as error:
        raise ObrError(f"{folder} has no ggml libraries that fit ({error}); reinstall llama-cpp-python.") from error
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for function, arguments, result in (
        (base.ggml_init, [_Parameters], pointer),
        (base.ggml_new_tensor_2d, [pointer, ctypes.c_int, size, size], pointer),
        (base.ggml_mul_mat, [pointer, pointer, pointer], pointer),
        (base.ggml_new_graph, [pointer], pointer),
        (base.ggml_build_forward_expand, [pointer, pointer], None),
        (base.ggml_backend_alloc_ctx_tensors_from_buft, [pointer, pointer], pointer),
        (base.ggml_backend_alloc_ctx_tensors, [pointer, pointer], pointer),
        (base.ggml_backend_tensor_set, [pointer, pointer, ctypes.c_size_t, ctypes.c_size_t], None),
        (base.ggml_backend_tensor_get, [pointer, pointer, ctypes.c_size_t, ctypes.c_size_t], None),
        (base.ggml_quantize_chunk, [ctypes.c_int, pointer, pointer, size, size, size, pointer], ctypes.c_size_t),
        (base.ggml_backend_graph_compute, [pointer, pointer], ctypes.c_int),
        (base.ggml_free, [pointer], None),
        (base.ggml_backend_buffer_free, [pointer], None),
        (cpu.ggml_backend_cpu_init, [], pointer),
        (cpu.ggml_backend_cpu_set_n_threads, [pointer, ctypes.c_int], None),
        (repacked, [], pointer),
    ):
        function.argtypes, function.restype = arguments, result
    return base, cpu


class Product:
    """x (t, n) by a Q4_0 copy of `weight` (r, n): 4 bits a weight and a 16-bit scale for every 32, 4.5 in all."""

    def __init__(self, weight: Tensor, tokens: int, threads: int):
        base, cpu = libraries()
        rows, columns = weight.shape
        self.bytes = rows * columns // 32 * 18
        self.backend = cpu.ggml_backend_cpu_init()
        cpu.ggml_backend_cpu_set_n_threads(self.backend, threads)
        held, moving = (base.ggml_init(_Parameters(OVERHEAD, None, True)) for _ in range(2))
        stored = base.ggml_new_tensor_2d(held, Q4_0, columns, rows)
        self.x = base.ggml_new_tensor_2d(moving, F32, columns, tokens)
        self.out = base.ggml_mul_mat(moving, stored, self.x)
        self.graph = base.ggml_new_graph(moving)
        base.ggml_build_forward_expand(self.graph, self.out)
        buffer = base.ggml_backend_alloc_ctx_tensors_from_buft(held, getattr(cpu, REPACKED)())
        buffers = [buffer, base.ggml_backend_alloc_ctx_tensors(moving, self.backend)]
        if not all(buffers):
            raise ObrError("ggml has no memory, or no repacked form of Q4_0 on this processor; leave its row out.")
        values, codes = weight.float().contiguous(), torch.empty(self.bytes, dtype=torch.uint8)
        base.ggml_quantize_chunk(Q4_0, values.data_ptr(), codes.data_ptr(), 0, rows, columns, None)
        base.ggml_backend_tensor_set(stored, codes.data_ptr(), 0, self.bytes)
        self.shape = (tokens, rows)

    def set(self, x: Tensor) -> None:
        libraries()[0].ggml_backend_tensor_set(self.x, x.float().contiguous().data_ptr(), 0, 4 * x.numel())

    def run(self) -> None:
        if libraries()[0].ggml_backend_graph_compute(self.backend, self.graph):
            raise ObrError("ggml could not compute the product; reinstall llama-cpp-python.")

    def result(self) -> Tensor:
        out = torch.empty(self.shape)
        libraries()[0].ggml_backend_tensor_get(self.out, out.data_ptr(), 0, 4 * out.numel())
        return out
