"""Which implementation runs: the only file that knows whether the CUDA extension exists.

Ops ask `kernel(name, backend, tensor)` for a function of `fisnet_cuda.reference`'s name and signature: the one in
`fisnet_cuda.ops.cuda` for CUDA tensors where the extension is installed, else the reference itself.
"""

from __future__ import annotations

import importlib
import json
import platform
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from . import reference
from .errors import FisnetWarning

BACKENDS = ("auto", "reference", "cuda")
KERNEL_DEVICES = frozenset({"cuda"})  # where the extension's kernels run (tests add "cpu", where the emulator serves them)
LIBRARY = Path(__file__).with_name("_C.abi3.so")
_KERNELS: dict[str, Callable] = {}  # by the names of `reference`; empty until the extension is asked for

BUILD = "pip install --no-build-isolation -e ."
REMEDY = (
    "nothing to do on a CPU. For GPU kernels: in a checkout, with a CUDA toolkit (nvcc) and g++ in reach, "
    f"`FISNET_CUDA_BUILD=1 {BUILD}` in the environment that has torch (with setuptools, wheel and ninja)"
)


@lru_cache(maxsize=1)
def _load() -> tuple[dict[str, Callable] | None, str]:
    """The kernels by the names of `reference`, or None and the reason why there are none."""
    if not LIBRARY.exists():
        return None, build_note() or "this installation has no compiled CUDA kernels (pure-Python install)"
    try:
        torch.ops.load_library(LIBRARY)
        _KERNELS.update(importlib.import_module("fisnet_cuda.ops.cuda").KERNELS)
    except Exception as error:  # whatever is wrong with it, the reference still runs; torch puts the cause behind its own words
        return None, f"the CUDA kernels failed to load: {error.__cause__ or error}"
    return _KERNELS, ""


# torch.compile would trace into a cached function, and cannot follow the loading of a library: it takes the answer as it is.
@torch.compiler.assume_constant_result
def _missing() -> str:
    """Why there are no kernels; empty when there are."""
    return _load()[1]


def build_note() -> str:
    """What setup.py left about a build without kernels; empty when it left nothing."""
    note = Path(__file__).with_name("_build_note.txt")
    return note.read_text().strip() if note.exists() else ""


def check_backend(backend: str) -> str:
    """``backend`` itself; ValueError for a name that does not exist, RuntimeError for "cuda" without the extension."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "cuda" and (reason := _missing()):
        raise RuntimeError(f"backend='cuda': {reason}. Use backend='auto' or 'reference'; see fisnet_cuda.info().")
    return backend


def implementation(name: str, backend: str, device: torch.device | None = None, operands: tuple = ()) -> str:
    """The implementation that op ``name`` has: "reference" or "cuda", on ``device`` when it is known.

    A kernel that does not serve every setting has a predicate ``serves`` of the op's operands, which returns why not. An op
    that `fisnet_cuda.dispatch` chooses for has "library", where it has no fused kernel too, or what that module's `planned` says.
    """
    kernels = _load()[0]
    dispatch = importlib.import_module("fisnet_cuda.dispatch")  # it needs this module first
    if name in dispatch.OPS:
        here = device is None or device.type in KERNEL_DEVICES
        if backend == "reference" or kernels is None or not here:
            return "reference"
        return dispatch.planned(name) if name in kernels else dispatch.LIBRARY
    if backend == "reference" or kernels is None or name not in kernels:
        return "reference"
    if operands and getattr(kernels[name], "serves", lambda *_: "")(*operands):
        return "reference"
    if backend == "cuda" or (device is not None and device.type in KERNEL_DEVICES):
        return "cuda"
    return "reference" if device is not None else "cuda|reference"


def kernel(name: str, backend: str, tensor: Tensor) -> Callable:
    """The function that runs op ``name`` for ``tensor``.

    "auto" goes by the tensor's device; a CUDA tensor without the extension runs the reference and warns once with the
    reason; "cuda" without it raises.
    """
    if backend == "reference" or tensor.device.type not in KERNEL_DEVICES:
        if backend == "cuda":
            raise RuntimeError(f"backend='cuda' needs tensors on a GPU, got one on {tensor.device}: move the input")
        return getattr(reference, name)
    if reason := _missing():
        check_backend(backend)
        _warn_once(reason)
        return getattr(reference, name)
    return _KERNELS.get(name) or getattr(reference, name)


def fused(name: str) -> Callable | None:
    """The fused kernel of op ``name``, for `fisnet_cuda.dispatch`; None without one."""
    return None if _missing() else _KERNELS.get(name)


def has_kernel(name: str, backend: str, tensor: Tensor) -> bool:
    """Whether a kernel, and not the reference, runs op ``name`` for ``tensor``; raises and warns as `kernel` does."""
    return kernel(name, backend, tensor) is not getattr(reference, name)


_warned: set[str] = set()


@torch.compiler.assume_constant_result
def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"CUDA tensors run the PyTorch reference: {reason}. It is correct but slower; see fisnet_cuda.info().",
            FisnetWarning,
            stacklevel=3,
        )


def build_info() -> dict:
    """What the extension was built with, ``{}`` without it: CUDA version, archs, compiler, and its kernels with their registers."""
    return json.loads(torch.ops.fisnet.build_info()) if _load()[0] is not None else {}


def info() -> dict[str, str | bool]:
    """What runs here and why: versions, devices, and whether the CUDA kernels are there.

    Returns:
        A dict of strings and booleans; "kernels" says whether CUDA tensors get kernels, "reason" why there are none,
        "remedy" what to do about it (both empty when there are). "kernels_cuda", "kernels_archs" and "kernels_compiler" say
        what the kernels were built with (empty without them).

    Example:
        >>> import fisnet_cuda as fc
        >>> fc.info()["reference"]
        True
    """
    from . import __version__

    kernels, reason = _load()
    built = build_info()
    return {
        "fisnet_cuda": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda or "none (CPU build of torch)",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": str(torch.get_num_threads()),
        "reference": True,
        "kernels": kernels is not None,
        "reason": reason,
        "remedy": REMEDY if reason else "",
        **{f"kernels_{key}": built.get(key, "") for key in ("cuda", "archs", "compiler")},
    }
