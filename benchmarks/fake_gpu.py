"""A GPU of fake tensors: they have a shape, a dtype, strides and the device "cuda", and no data, so any size fits anywhere.

Autograd asks for an accelerator before it runs a backward pass over CUDA tensors; ``tests/package/fake_cuda.cpp`` is one that
computes nothing. It must be there before torch is, so `library` is preloaded into a process of its own. `device` stands in for
the rest of what CUDA's runtime is asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tests" / "package" / "fake_cuda.cpp"
NAME = "fake tensors"  # of the GPU
PRELOAD = "LD_PRELOAD"


def needs() -> str:
    """Why there can be no such GPU here; empty when there can."""
    if torch.version.cuda is not None:
        return "this torch has CUDA: fake tensors stand in for a GPU with a CPU build of torch"
    return "" if shutil.which("g++") else "g++ is missing: no stand-in for a CUDA device can be built"


def library() -> Path:
    """The accelerator that computes nothing, built where it is missing."""
    where = Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr,arg-type]
    digest = hashlib.sha256(SOURCE.read_bytes() + f"{where} {torch.__version__}".encode()).hexdigest()[:12]
    path = ROOT / "build" / f"fake_cuda-{digest}.so"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}")
        command = [
            "g++", "-shared", "-fPIC", "-std=c++20", f"-I{where}/include", str(SOURCE), "-o", str(new), f"-L{where}/lib", "-lc10",
            "-ltorch_cpu", f"-Wl,-rpath,{where}/lib",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the stand-in for a CUDA device does not compile:\n{done.stderr[-2000:]}")
        new.replace(path)
    return path


def enter(module: str, arguments: Sequence[str]) -> None:
    """Be in a process that has the accelerator: this one, or ``python -m module`` in its place."""
    path = str(library())
    if path not in os.environ.get(PRELOAD, ""):
        variables = {**os.environ, PRELOAD: " ".join(filter(None, [path, os.environ.get(PRELOAD)]))}
        os.execve(sys.executable, [sys.executable, "-m", module, *arguments], variables)


@contextlib.contextmanager
def device() -> Iterator[None]:
    """Inside, tensors on "cuda" are fake ones, and CUDA's runtime answers as a GPU would that takes a millisecond for anything."""
    cuda = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "synchronize": _nothing,
        "get_device_name": lambda *_: NAME, "get_device_properties": lambda *_: PROPERTIES, "is_bf16_supported": lambda *_, **__: True,
        "empty_cache": _nothing, "reset_peak_memory_stats": _nothing, "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 2**20, "Event": Event, "Stream": Stream, "current_stream": Stream,
        "stream": lambda *_: contextlib.nullcontext(), "device": lambda *_: contextlib.nullcontext(), "CUDAGraph": Graph,
        "graph": lambda *_, **__: contextlib.nullcontext(), "is_current_stream_capturing": lambda: False, "_sleep": _nothing,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for place, name, value in (
            (torch, "Generator", Generator), (nn.Module, "_apply", _apply), (fake_tensor, "init_gpu_context", _nothing),
            (torch._C, "_conv_determine_backend_memory_format", _as_cudnn_does), (torch.backends.cudnn, "version", lambda: 0),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(Fake())
        yield


def _nothing(*_: Any, **__: Any) -> None:
    """What has no effect without a GPU."""


PROPERTIES = SimpleNamespace(multi_processor_count=132, total_memory=80 * 2**30, L2_cache_size=50 * 2**20)


class Fake(FakeTensorMode):
    """Fake tensors whose values can be asked for: errors are 0, and whatever should be true is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool or (0.0 if args[0].is_floating_point() else 0)
        if func is torch.ops.aten.equal.default:
            return True
        if func is torch.ops.aten._to_copy.default and args[0].constant is not None:
            args[0].constant = None  # small constants keep their value, which would really be copied to the GPU
        return super().__torch_dispatch__(func, types, args, kwargs)


class Event:
    """Between any two of these lies a millisecond."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    record = synchronize = _nothing

    def elapsed_time(self, end: Event) -> float:
        """One millisecond."""
        return 1.0


class Stream:
    """Does everything in order."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    wait_stream = synchronize = _nothing


class Graph:
    """Captures nothing, and replays that."""

    register_generator_state = replay = _nothing


class Generator(torch.Generator):
    """A CPU's that says where it was asked to be."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        """Made on the CPU."""
        found = super().__new__(cls, "cpu")
        found.asked = torch.device("cuda", 0) if torch.device(device).type == "cuda" else torch.device(device)
        return found

    @property
    def device(self) -> torch.device:
        """Where it was asked to be."""
        return self.asked


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """``Module.to``: fake parameters cannot change in place, so new ones take their place."""
    for module in self.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(fn(p.detach()), requires_grad=p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = fn(b)
    return self


def _as_cudnn_does(input: Tensor, weight: Tensor, backend: object) -> torch.memory_format:
    """A convolution's layout. A CPU build of torch knows its own convolutions only, and takes them for contiguous."""
    last = any(t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (input, weight))
    return torch.channels_last if last else torch.contiguous_format
