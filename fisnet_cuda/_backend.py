"""Which implementation runs: the only file that knows whether the CUDA extension exists.

Ops ask `kernel(name, backend, tensor)` for a function of `fisnet_cuda.reference`'s name and signature: the one in
`fisnet_cuda.ops.cuda` for CUDA tensors where the extension is installed, else the reference itself.
"""

from __future__ import annotations

import importlib
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


@lru_cache(maxsize=1)
def _load() -> tuple[dict[str, Callable] | None, str]:
    """The kernels by the names of `reference`, or None and the reason why there are none."""
    library = next(Path(__file__).parent.glob("_C*.so"), None)
    if library is None:
        return None, build_note() or "this installation has no compiled CUDA kernels (pure-Python install)"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return None, f"the CUDA kernels failed to load: {error}"
    return importlib.import_module("fisnet_cuda.ops.cuda").KERNELS, ""


def build_note() -> str:
    """What setup.py left about a build without kernels; empty when it left nothing."""
    note = Path(__file__).with_name("_build_note.txt")
    return note.read_text().strip() if note.exists() else ""


def check_backend(backend: str) -> str:
    """``backend`` itself; ValueError for a name that does not exist, RuntimeError for "cuda" without the extension."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "cuda" and _load()[0] is None:
        raise RuntimeError(f"backend='cuda': {_load()[1]}. Use backend='auto' or 'reference'; see fisnet_cuda.info().")
    return backend


def implementation(name: str, backend: str, device: torch.device | None = None, operands: tuple = ()) -> str:
    """The implementation that op ``name`` has: "reference" or "cuda", on ``device`` when it is known.

    A kernel that does not serve every setting has a predicate ``serves`` of the op's operands, which returns why not.
    """
    kernels = _load()[0]
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
    kernels, reason = _load()
    if kernels is None:
        check_backend(backend)
        _warn_once(reason)
        return getattr(reference, name)
    return kernels.get(name) or getattr(reference, name)


@lru_cache(maxsize=1)
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"CUDA tensors run the PyTorch reference: {reason}. It is correct but slower; see fisnet_cuda.info().",
        FisnetWarning,
        stacklevel=3,
    )


def info() -> dict[str, str | bool]:
    """What runs here and why: versions, devices, and whether the CUDA kernels are there.

    Returns:
        A dict of strings and booleans; "kernels" says which implementation CUDA tensors get, "reason" why there are no
        kernels, "remedy" what to do about it (both empty when there are).

    Example:
        >>> import fisnet_cuda as fc
        >>> fc.info()["reference"]
        True
    """
    from . import __version__

    kernels, reason = _load()
    remedy = "" if kernels else "nothing to do on a CPU; for GPU kernels install a build of fisnet_cuda with CUDA"
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
        "remedy": remedy,
    }
