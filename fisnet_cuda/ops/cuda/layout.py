"""What kernels ask of their operands: one dtype, one dense memory layout."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..layout import CHANNELS_LAST, memory_format


def acc_dtype(t: Tensor) -> torch.dtype:
    """The dtype in which kernels accumulate, and take per-channel vectors, beside elements of ``t``."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def is_channels_last(t: Tensor) -> bool:
    """Whether ``t`` is dense with its channels innermost; a tensor that is also contiguous counts as contiguous."""
    return memory_format(t) != torch.contiguous_format


def one_dtype(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in the widest of their dtypes."""
    dtype = functools.reduce(torch.promote_types, {t.dtype for t in tensors if t is not None})
    return [None if t is None else t.to(dtype) for t in tensors]


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors ``[*, C, ...]`` in one dtype, the widest of theirs, and in one layout.

    The layout is that of the first tensor which has one: dense, and not contiguous and channels_last at once (one channel, or
    one pixel), nor a slice or broadcast that has to be copied anyway. Tensors that fit come back as they are.
    """
    last = next((is_channels_last(t) for t in tensors if t is not None and _decides(t)), False)
    return [None if t is None else fit(t, last) for t in one_dtype(*tensors)]


def _decides(t: Tensor) -> bool:
    """Whether ``t`` is dense in exactly one of the two layouts."""
    either = t.dim() in CHANNELS_LAST and t.is_contiguous(memory_format=CHANNELS_LAST[t.dim()])
    return t.is_contiguous() != either


def fit(t: Tensor, channels_last: bool) -> Tensor:
    """``t`` itself or a copy of it, dense in one of the two layouts."""
    return t.contiguous(memory_format=CHANNELS_LAST[t.dim()]) if channels_last else t.contiguous()


def vector(v: Tensor | None, like: Tensor) -> Tensor | None:
    """A per-channel vector as kernels take it: accumulation dtype, contiguous."""
    return None if v is None else v.to(acc_dtype(like)).contiguous()


def split_eps(eps: float | Tensor, a: Tensor) -> tuple[float, Tensor | None]:
    """``(number, [N] or None)``: an absolute epsilon, or one a sample in the dtype of ``a``."""
    if isinstance(eps, Tensor):
        return 0.0, eps.to(a.dtype).reshape(-1).contiguous()
    return eps, None
