"""The CUDA kernels behind the ops: one file an op, each with functions of `fisnet_cuda.reference`'s names and signatures.

A function brings its operands into one dtype and one dense memory layout, calls the operator ``torch.ops.fisnet.<name>``
of the extension (csrc/bind), and hands the results back as the reference would. Beside it stands the operator's fake
kernel, which gives the shapes, dtypes and strides that the C++ returns.

Importing this package needs the extension loaded: only `fisnet_cuda._backend` does that.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

KERNELS: dict[str, Callable] = {}


def kernel_for(function: Callable) -> Callable:
    """Decorator: this function serves the reference's function of the same name."""
    KERNELS[function.__name__] = function
    return function


for _module in pkgutil.iter_modules(__path__):  # every file adds its kernels: there is no list to keep
    importlib.import_module(f"{__name__}.{_module.name}")
