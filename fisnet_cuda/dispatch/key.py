"""What a decision is about: the op, its operands as far as speed goes, the math mode, the GPU and the versions."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from ..ops import library
from ..reference import linear_phi

OPS = tuple(n for n in vars(library) if n[0] != "_" and inspect.isfunction(getattr(linear_phi, n, None)))

_precision = torch._C._get_fp32_precision_getter  # answers whichever of torch's two TF32 settings was used last
_deterministic = torch._C._get_deterministic_algorithms
_benchmark = torch._C._get_cudnn_benchmark


def flags() -> tuple:
    """The process's settings that change which implementation is fastest; cheap, for every call reads them."""
    return _precision("cuda", "conv"), _precision("cuda", "matmul"), _deterministic(), _benchmark()


def signature(values: Iterable[Any]) -> tuple:
    """``values`` with tensors as ``(dtype, shape, strides)``: what a cheap look-up goes by."""
    return tuple([(v.dtype, v.shape, v.stride()) if isinstance(v, Tensor) else v for v in values])


def arguments(name: str, operands: tuple, options: dict) -> dict[str, Any]:
    """The operands of op ``name`` by the names of its reference, with the defaults of those that were not given."""
    bound = _signature(name).bind(*operands, **options)
    bound.apply_defaults()
    return bound.arguments


@functools.cache
def _signature(name: str) -> inspect.Signature:
    return inspect.signature(getattr(linear_phi, name))


def float32_is_tf32(name: str, operands: tuple, options: dict) -> bool:
    """Whether PyTorch itself may make float32 products of this op in TF32: cuDNN's setting for convolutions, else cuBLAS's."""
    spatial = arguments(name, operands, options)["geometry"][0]
    return _precision("cuda", "conv" if spatial else "matmul") == "tf32"


def tf32(name: str, operands: tuple, options: dict) -> bool:
    """Whether this call's own products may be TF32."""
    return operands[0].dtype == torch.float32 and float32_is_tf32(name, operands, options)


@dataclass(frozen=True)
class Key:
    """One decision's name. ``operands`` are pairs of a name and its dtype, shape and layout, or its value."""

    op: str
    operands: tuple[tuple[str, str], ...]
    mode: str
    gpu: str
    versions: str

    @classmethod
    def of(cls, name: str, operands: tuple, options: dict) -> Key:
        """The key of a call."""
        named = tuple((n, _word(v)) for n, v in arguments(name, operands, options).items() if v is not None)
        words = [("tf32" if tf32(name, operands, options) else "ieee") if operands[0].dtype == torch.float32 else ""]
        words += ["deterministic" if _deterministic() else "", "benchmark" if _benchmark() else ""]
        return cls(name, named, " ".join(filter(None, words)), gpu(operands[0].device), versions())

    def __str__(self) -> str:
        """A line that is the same in every process: the key of the JSON cache."""
        return json.dumps([self.op, dict(self.operands), self.mode, self.gpu, self.versions])

    @property
    def short(self) -> str:
        """Op and operands, for people."""
        return f"{self.op}({', '.join(f'{n}={v}' for n, v in self.operands)})"


def _word(v: Any) -> str:
    if isinstance(v, Tensor):
        return f"{str(v.dtype).removeprefix('torch.')}[{','.join(map(str, v.shape))}]{_layout(v)}"
    if isinstance(v, float):
        return "0" if v == 0 else "number"  # epsilon's value changes nobody's speed
    return repr(tuple(v) if isinstance(v, tuple) else v).replace(" ", "")


def _layout(t: Tensor) -> str:
    if t.is_contiguous():
        return ""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if t.dim() in formats and t.is_contiguous(memory_format=formats[t.dim()]):
        return " channels_last"
    return f" strides({','.join(map(str, t.stride()))})"


@functools.cache
def gpu(device: torch.device) -> str:
    """The name of a GPU; another device's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else device.type


@functools.cache
def versions() -> str:
    """Everything whose change makes old measurements worthless: torch, CUDA, cuDNN, this package and its compiled kernels."""
    from .. import __version__

    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {cudnn}, fisnet_cuda {__version__}, kernels {_built()}"


def _built() -> str:
    """A digest of the compiled kernels: another build may be faster or slower."""
    if not _backend.LIBRARY.exists():
        return "none"
    with open(_backend.LIBRARY, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()[:12]
