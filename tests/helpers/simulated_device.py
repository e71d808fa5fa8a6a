"""A CUDA device simulated on the CPU, so that code for GPUs runs, and is watched, where there is none.

    python tests/helpers/simulated_device.py ARGUMENTS OF obr

`activate` makes "cuda" a device of this process; simulated_device.cpp is what computes there. It cannot be undone, so
a process of its own is started for it. From then on everything in Python that names a device may say "cuda", and
tensors there say that they lie on "cuda:0". An operation on tensors of different devices fails as on CUDA. The folder
simulated_gpu on the PYTHONPATH activates it in every Python process.

`watched` counts what happens on the device in a piece of code. The memory has no end, or is of as many bytes as the
variable OBR_SIMULATED_BYTES says. Times between events are the host's. Not simulated: kernels' own memory, streams,
half precision that CUDA sums in another order, and errors that CUDA reports late.
"""

import ctypes
import os
import shutil
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

SOURCE = Path(__file__).with_suffix(".cpp")
PRETENDED, REAL = "cuda", "hpu"
LIMIT = "OBR_SIMULATED_BYTES"
CAPABILITY = (9, 0)
LISTENER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int64, ctypes.c_char_p)

_library: ctypes.CDLL | None = None
_listeners: list["Watch"] = []


def can_be_built() -> bool:
    """Whether there is a C++ compiler."""
    return bool(os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"))


def library() -> ctypes.CDLL:
    """The device, compiled once and kept in the project's cache; half a minute."""
    from obr.runtime.compiler import build

    torch_folder = Path(torch.__file__).parent
    flags = [
        "-O1",
        "-std=c++20",
        "-shared",
        "-fPIC",
        "-w",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    flags += [f"-I{torch_folder}/include", f"-I{torch_folder}/include/torch/csrc/api/include"]
    flags += [f"-L{torch_folder}/lib", f"-DTORCH_{torch.__version__.split('+')[0].replace('.', '_')}"]
    flags += [f"-Wl,--no-as-needed,-rpath,{torch_folder}/lib", "-ltorch_cpu", "-lc10"]
    return build([SOURCE], flags)


@dataclass
class Watch:
    """What happened on the device: events by kind and by the line of the package that caused them.

    kinds: "to device" and "to host" for copies, "wait" for a synchronisation: a number, a size or an error that the
    host waits for. Copies to the host wait, too.
    """

    counts: Counter = field(default_factory=Counter)
    sizes: Counter = field(default_factory=Counter)
    places: Counter = field(default_factory=Counter)
    operations: int = 0
    peak: int = 0
    before: int = 0
    after: int = 0

    @property
    def waits(self) -> int:
        """Times that the host waited for the device."""
        return self.counts["wait"] + self.counts["to host"]

    def to_dict(self) -> dict:
        return {
            "counts": dict(self.counts), "bytes": dict(self.sizes), "waits": self.waits,
            "operations": self.operations, "peak": self.peak, "before": self.before, "after": self.after,
            "places": {f"{kind} {what} {place}": n for (kind, what, place), n in self.places.most_common()},
        }  # fmt: skip


@contextmanager
def watched() -> Iterator[Watch]:
    """Counts events while it is open; `peak`, `before` and `after` are bytes alive on the device."""
    watch, device = Watch(), library_in_use()
    device.simulated_restart()
    watch.before = device.simulated_alive()
    _listeners.append(watch)
    try:
        yield watch
    finally:
        _listeners.remove(watch)
        watch.after, watch.peak = device.simulated_alive(), device.simulated_peak()
        watch.operations = device.simulated_operations()


def library_in_use() -> ctypes.CDLL:
    assert _library is not None, "activate() comes first"
    return _library


@LISTENER
def _heard(event: bytes, size: int, what: bytes) -> None:
    for watch in _listeners:
        kind = event.decode()
        watch.counts[kind] += 1
        watch.sizes[kind] += size
        watch.places[kind, what.decode(), _place()] += 1


def _place() -> str:
    """File and function of the innermost frame of the package: "methods/grid.py:112 _best_of"."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/workflow/obr/" in path and not path.endswith(("runtime/gpu.py",)):
            return f"{path.partition('/workflow/obr/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return threading.current_thread().name


def activate() -> None:
    """Make "cuda" a device of this process, simulated."""
    global _library
    if _library is not None:
        return
    _library = library()
    _library.simulated_alive.restype = _library.simulated_peak.restype = ctypes.c_int64
    _library.simulated_operations.restype = ctypes.c_int64
    if LIMIT in os.environ:
        _library.simulated_limit(ctypes.c_int64(int(os.environ[LIMIT])))
    _library.simulated_listen(_heard)
    _pretend_cuda()
    _Named().__enter__()  # for good
    run = threading.Thread.run
    threading.Thread.run = lambda self: _named(run, self)  # modes are a thread's own


class _Named(TorchFunctionMode):
    """Has every function of PyTorch take "cuda" for the simulated device, and tensors say that they lie on "cuda"."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.device:  # a name alone
            return function(*args, **kwargs)
        if function == _DEVICE:
            return _pretended(function(*args))
        if function == _IS_CUDA:
            return args[0].device.type == REAL
        if function is torch.Tensor.cuda:
            return args[0].to(REAL)
        if function is torch.Tensor.pin_memory:
            return args[0]
        if function is torch.Tensor.get_device:
            return 0 if args[0].device.type == REAL else -1
        return function(*map(_real, args), **{name: _real(value) for name, value in kwargs.items()})


def _named(function, *args):
    with _Named():
        function(*args)


_DEVICE, _IS_CUDA = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__


def _real(value):
    if isinstance(value, torch.device):
        return torch.device(REAL, value.index or 0) if value.type == PRETENDED else value
    if isinstance(value, str) and value.partition(":")[0] == PRETENDED:
        return value.replace(PRETENDED, REAL, 1)
    return value


def _pretended(device: torch.device) -> torch.device:
    return torch.device(PRETENDED, device.index or 0) if device.type == REAL else device


def _pretend_cuda() -> None:
    """What is asked of torch.cuda and of autocast, which no function mode sees."""
    module = types.ModuleType(f"torch.{REAL}")  # which PyTorch imports when it first meets the device
    module._lazy_init, module.is_available = lambda: None, lambda: True
    module.device_count, module.current_device, module.manual_seed_all = lambda: 1, lambda: 0, lambda seed: None
    module._is_in_bad_fork = lambda: False
    torch._register_device_module(REAL, module)
    sys.modules[module.__name__] = module
    cuda = torch.cuda
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count, cuda.current_device = lambda: 1, lambda: 0
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.get_device_name = lambda device=None: "simulated device"
    cuda.get_device_capability = lambda device=None: CAPABILITY
    cuda.get_device_properties = lambda device=None: _properties()
    cuda.device = cuda.device_of = lambda device: nullcontext()
    cuda.synchronize = cuda.empty_cache = cuda.init = lambda *_, **__: None
    cuda.Stream, cuda.Event, cuda.stream, cuda.current_stream = _Stream, _Event, lambda _: nullcontext(), _Stream
    torch.Tensor.record_stream = lambda self, stream: None  # which takes no stream of another class
    cuda.manual_seed_all = cuda.manual_seed = lambda seed: None
    cuda.memory_allocated = lambda device=None: library_in_use().simulated_alive()
    cuda.max_memory_allocated = cuda.max_memory_reserved = lambda device=None: library_in_use().simulated_peak()
    cuda.reset_peak_memory_stats = lambda device=None: library_in_use().simulated_restart()
    for name in ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype"):
        setattr(torch, name, _with_real_device(getattr(torch, name)))
    begin = torch.amp.autocast_mode.autocast.__init__
    torch.amp.autocast_mode.autocast.__init__ = lambda self, device_type, *rest, **named: begin(
        self, _real(device_type), *rest, **named
    )


def _properties() -> types.SimpleNamespace:
    """What PyTorch tells of a device; of this one as if it were a small one."""
    memory = int(os.environ.get(LIMIT, 2**40))
    return types.SimpleNamespace(
        name="simulated device", major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=memory,
        multi_processor_count=1, L2_cache_size=2**20, uuid="simulated",
    )  # fmt: skip


class _Event:
    """Of a device on which everything is over when it has begun; the time between two of them is the host's."""

    def __init__(self, *_, **__):
        self.at = None

    def record(self, stream=None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        return 1e3 * (end.at - self.at)

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Stream:
    def __init__(self, *_, **__):
        pass

    def wait_event(self, event: _Event) -> None:
        assert isinstance(event, _Event)

    def wait_stream(self, stream: "_Stream") -> None:
        assert isinstance(stream, _Stream)

    def synchronize(self) -> None:
        pass


def _with_real_device(function):
    return lambda *args, **kwargs: function(*map(_real, args), **{k: _real(v) for k, v in kwargs.items()})


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # what jobs reserve
    activate()
    from obr.cli.main import main

    sys.exit(main(sys.argv[1:]))
