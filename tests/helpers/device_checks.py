"""What the simulated device itself does: python tests/helpers/device_checks.py. A process of its own."""

import copy
import ctypes
import re
import sys
import threading
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import simulated_device

simulated_device.activate()

from geoopt import CanonicalStiefel, ManifoldParameter  # noqa: E402
from torch.nn import functional as F  # noqa: E402

GENERATOR = torch.Generator().manual_seed(0)
MIXED = "Expected all tensors to be on the same device"


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def refused(function, message: str = MIXED) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        function()


def check_names() -> None:
    x = normal(4, 6)
    for there in (x.to("cuda"), x.cuda(), x.to(torch.device("cuda", 0)), torch.zeros(4, 6, device="cuda:0")):
        assert (
            there.device == torch.device("cuda", 0)
            and there.device.type == "cuda"
            and there.is_cuda
            and there.pin_memory().get_device() == 0
        )
    there = x.cuda()
    for made in (torch.empty_like(there), there.new_ones(2), torch.tensor([1.0], device=there.device), there.T[1:]):
        assert made.is_cuda
    assert not there.cpu().is_cuda and torch.equal(there.cpu(), x)


def check_mixtures() -> None:
    here, there, places = normal(4, 6), normal(4, 6).cuda(), torch.tensor([1])
    refused(lambda: there + here)
    refused(lambda: there @ here.T)
    refused(lambda: torch.cat([there, here]))
    refused(lambda: torch.where(there > 0, there, here))
    refused(lambda: there.add_(here))
    refused(lambda: there.index_select(0, places))
    refused(lambda: here[places.cuda()], "indices should be either on cpu")
    refused(lambda: F.embedding(torch.zeros(1, 2, dtype=torch.long), there))
    refused(lambda: torch.rand(2, device="cuda", generator=torch.Generator()), "device type for generator")
    refused(lambda: there.long() @ there.long().T, "not implemented for 'Long'")
    assert torch.equal((there + torch.tensor(2.0)).cpu(), there.cpu() + 2)  # a number may lie on the host
    assert torch.equal(there[places].cpu(), there.cpu()[places])  # and so may places


def check_memory() -> None:
    before = simulated_device.library_in_use().simulated_alive()
    with simulated_device.watched() as watch:
        one = torch.zeros(1024, device="cuda")
        view, other = one[10:].view(2, -1), one + 1
        assert simulated_device.library_in_use().simulated_alive() == before + 8192
        one += other  # in place
        other = None
        view[0] = 3
        assert one[10:20].sum().item() == 30
    assert watch.peak - watch.before >= 8192 and watch.after - watch.before == 4096
    device = simulated_device.library_in_use()
    device.simulated_limit(ctypes.c_int64(device.simulated_alive() + 8192))
    for more in (lambda: torch.zeros(4096, device="cuda"), lambda: one[:, None] + one[:4]):
        refused(more, "CUDA out of memory")
    device.simulated_limit(ctypes.c_int64(2**62))


def check_events_are_timed() -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device("cuda:0"):
        start.record(), end.record()
    assert start.elapsed_time(end) >= 0


def check_events() -> None:
    x = normal(8, 8).cuda()
    with simulated_device.watched() as watch:
        x.cpu(), x.sum().item(), bool(x.any()), x[x > 0], x.nonzero(), torch.equal(x, x), x.tolist()
        assert watch.counts == {"to host": 2, "wait": 5}, watch.counts
        x[x > 0] = 0  # by a mask alone
        x[:, x[0] == 0] = 1
        x[torch.tensor([0])] = 2
        assert watch.counts["wait"] == 5 and watch.counts["to device"] == 1, watch.counts
        thread = threading.Thread(target=lambda: torch.ones(2).to("cuda"))
        thread.start()
        thread.join()
    assert watch.sizes["to host"] == 512
    assert watch.counts["to device"] == 2, "other threads know the device, too"


def check_gradients() -> None:
    layer = torch.nn.Linear(6, 3)
    twin = copy.deepcopy(layer).to("cuda")
    weight, x = twin.weight, normal(2, 6)
    layer(x).square().sum().backward()
    twin(x.cuda()).square().sum().backward()
    assert twin.to("cuda").weight is weight and torch.equal(weight.grad.cpu(), layer.weight.grad)
    assert torch.equal(copy.deepcopy(twin).weight.cpu(), layer.weight)
    layer.weight.data = weight.data
    assert layer.weight.is_cuda
    assert ManifoldParameter(torch.eye(4).cuda(), manifold=CanonicalStiefel()).is_cuda
    one = normal(1, 3, 8, 16).requires_grad_()
    two = one.detach().cuda().requires_grad_()
    outs = [F.scaled_dot_product_attention(q, q, q, is_causal=True) for q in (one, two)]
    for out in outs:
        out.sum().backward()
    assert torch.equal(outs[0], outs[1].cpu()) and torch.equal(one.grad, two.grad.cpu())


def check_linear_algebra() -> None:
    matrix = torch.eye(5) + 0.1 * torch.ones(5, 5)
    there = matrix.cuda()
    info = torch.empty((), dtype=torch.int32, device="cuda")
    factor, info = torch.linalg.cholesky_ex(there.mT, out=(there.mT, info))
    inverse = torch.cholesky_inverse(factor, out=factor)
    assert info.is_cuda and inverse.data_ptr() == there.data_ptr()
    assert torch.allclose(inverse.cpu() @ matrix, torch.eye(5), atol=1e-6)
    for found in (
        *torch.linalg.eigh(matrix.cuda()),
        *torch.linalg.svd(matrix.cuda()),
        torch.linalg.inv(matrix.cuda()),
    ):
        assert found.is_cuda


def check_inference_mode() -> None:
    x, weight = normal(4, 6).cuda(), normal(3, 6).cuda()
    with torch.inference_mode():
        out = F.linear(x, weight.float())
        assert out.is_inference() and not weight.t().is_inference() and out.t().is_inference()
    assert torch.equal(out.cpu(), F.linear(x.cpu(), weight.cpu()))


def check_autocast() -> None:
    x = normal(4, 4).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16 and (x @ x).softmax(-1).dtype == torch.float32
        assert torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", enabled=False):
            assert (x @ x).dtype == torch.float32
    assert not torch.is_autocast_enabled("cuda")


if __name__ == "__main__":
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check()
