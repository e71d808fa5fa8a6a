"""The C library's allocator of memory."""

import ctypes


def return_freed_memory() -> None:
    """Hand memory that was freed back to the system, where the C library can: small tensors that stay between large
    ones that go keep it resident otherwise.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
