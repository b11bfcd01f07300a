"""Training steps of an ISNet over fake tensors on "cuda", eagerly and compiled, with the library's products or fused ones;
prints which of the extension's operators ran.

    python tests/package/fake_cuda_step.py [--stand-in FILE.so] [--without-kernels] [--variants ...] [--ways ...]

Prints JSON: {variant: {way: [operators]}}.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os

parser = argparse.ArgumentParser()
parser.add_argument("--stand-in", help="a library that gives a CPU build of torch a CUDA device")
parser.add_argument("--without-kernels", action="store_true", help="as if the extension were not installed")
parser.add_argument("--variants", nargs="+", default=("original", "selective", "stochastic", "dual", "contrast"))
parser.add_argument("--ways", nargs="+", default=("eager", "channels_last", "fused", "compiled", "fused compiled"))
options = parser.parse_args()
if options.stand_in:
    ctypes.CDLL(options.stand_in)  # before torch

import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fisnet_cuda as fc
from fisnet_cuda import _backend

CLASSES = 5


class Net(nn.Module):
    """A bit of every layer that has kernels: first layer, BatchNorms, ReLUs, pools, a sum, a dense layer, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn, self.pool = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.MaxPool2d(3, 2, 1)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.own_bn, self.plain, self.both_bn = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(16)
        self.conv3, self.pool3 = nn.Conv2d(16, 8, 3, 1, 1), nn.MaxPool2d(2)
        self.conv4, self.average, self.head = nn.Conv2d(8, 8, 3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.pool(torch.relu(self.stem_bn(self.stem(x))))
        y = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(y)) + x)
        y = torch.relu(self.plain(torch.relu(self.own_bn(x))))
        x = torch.relu(self.both_bn(torch.cat([x, y], 1)))
        x = torch.relu(self.conv4(self.pool3(torch.relu(self.conv3(x)))))
        return self.head(torch.flatten(self.average(x), 1))


class Spy(TorchDispatchMode):
    """Which operators of the extension run, on which device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fisnet":
            assert all(t.device.type == "cuda" for t in args if isinstance(t, torch.Tensor)), func
            self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


def on_fake_cuda(net: nn.Module, memory_format: torch.memory_format) -> None:
    """Fake parameters and buffers on "cuda" in place of the real ones; inside a FakeTensorMode."""
    for m in net.modules():
        for name, p in list(m._parameters.items()):
            if p is not None:
                value = torch.empty(p.shape, dtype=p.dtype, device="cuda")
                m._parameters[name] = nn.Parameter(value.contiguous(memory_format=memory_format) if p.dim() == 4 else value)
        for name, b in list(m._buffers.items()):
            if b is not None:
                m._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cuda")


def step(variant: str, way: str) -> list[str]:
    """One training step; the names of the operators that it ran (or, compiled, that its graphs hold)."""
    torch._dynamo.reset()
    net, loss, seen = fc.ISNet(Net(), variant), fc.ISNetLoss(d=0.9), set()
    memory_format = torch.contiguous_format if way in ("eager", "compiled") else torch.channels_last
    rules = "*=fused" if way.startswith("fused") else ""  # of the dispatcher: nothing can be measured here

    def run(x, y, masks):
        return loss(net(x, relevance=True), y, masks)[0]

    def look(graph, _):
        for node in graph.graph.nodes:
            # an operator that changes an operand stands behind a wrapper that makes it functional
            for op in (node.target, *node.args[:1]):
                if getattr(op, "namespace", "") == "fisnet":
                    seen.add(op.name())
        return make_boxed_func(graph.forward)

    # backend="aot_eager", with a look at the graphs
    compiled = torch.compile(run, fullgraph=True, backend=aot_autograd(fw_compiler=look))
    with FakeTensorMode():
        on_fake_cuda(net, memory_format)
        x = torch.rand(4, 3, 32, 32, device="cuda").contiguous(memory_format=memory_format)
        batch = x, torch.zeros(4, dtype=torch.long, device="cuda"), torch.ones(4, 1, 32, 32, device="cuda")
        spy = Spy()
        with fc.dispatch.forced(rules):
            if way.endswith("compiled"):
                compiled(*batch).backward()
            else:
                with spy:
                    total = run(*batch)
                    assert total.device.type == "cuda"
                    total.backward()
    for name, p in net.named_parameters():
        assert isinstance(p.grad, FakeTensor), name
        assert (p.grad.device.type, p.grad.shape) == ("cuda", p.shape), name
    return sorted(seen | spy.seen)


def as_cudnn_does(input: torch.Tensor, weight: torch.Tensor, backend: object) -> torch.memory_format:
    """A convolution's layout. A CPU build of torch knows its own convolutions only, and takes them for contiguous."""
    last = any(t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (input, weight))
    return torch.channels_last if last else torch.contiguous_format


if __name__ == "__main__":
    if options.stand_in:
        torch._C._conv_determine_backend_memory_format = as_cudnn_does
    if options.without_kernels:
        _backend.LIBRARY = _backend.LIBRARY.with_name("_C.missing.so")
    print(json.dumps({variant: {way: step(variant, way) for way in options.ways} for variant in options.variants}), flush=True)
    os._exit(0)  # the stand-in's device has a thread of autograd's that nothing would end
