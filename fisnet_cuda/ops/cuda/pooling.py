"""Max pools with one-byte winners, their transpose, and the transpose fused with phi (kernel 11): csrc/kernels/max_pool.cu."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import reference
from ...reference.pooling import window_of
from . import kernel_for
from .layout import dense, fit, is_channels_last, split_eps

_ONE_BYTE = 256


def _unserved(spatial: int, adaptive: bool, settings: tuple) -> str:
    """Why the kernels do not serve this pool: those run the reference, whose winners are int64. Empty when they do."""
    if spatial != 2 or adaptive:
        return "max_pool: the kernel is for 2-d pools with windows of one size"
    kernel_h, kernel_w = window_of(settings)[:2]
    if kernel_h * kernel_w > _ONE_BYTE:
        return f"max_pool: a winner is one byte, and the window has {kernel_h} x {kernel_w} pixels"
    return ""


def _out_size(in_size: torch.Size, settings: tuple) -> tuple[int, int] | None:
    """The pool's output size; None where PyTorch refuses the settings."""
    kernel, stride, padding, dilation = (window_of(settings)[i : i + 2] for i in range(0, 8, 2))
    out = []
    for size, k, s, p, d in zip(in_size, kernel, stride, padding, dilation):
        reach = d * (k - 1) + 1
        if min(size, k, s, d) < 1 or p < 0 or p > k // 2:
            return None
        n = (size + 2 * p - reach + (s - 1 if settings[4] else 0)) // s + 1
        n -= settings[4] and (n - 1) * s >= size + p  # the last window starts inside the image or its left padding
        if n < 1:
            return None
        out.append(n)
    return out[0], out[1]


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, out_size, window):
        y, winners = torch.ops.fisnet.max_pool(x, out_size, window)
        ctx.save_for_backward(winners)
        ctx.in_size, ctx.window = x.shape[2:], window
        ctx.mark_non_differentiable(winners)
        ctx.set_materialize_grads(False)
        return y, winners

    @staticmethod
    @once_differentiable
    def backward(ctx, y_bar, _):
        if y_bar is None:
            return None, None, None
        (winners,) = ctx.saved_tensors
        (y_bar,) = dense(y_bar)
        return torch.ops.fisnet.max_pool_scatter(y_bar, _beside(winners, y_bar), ctx.in_size, ctx.window), None, None


@kernel_for
def max_pool(x: Tensor, spatial: int, adaptive: bool, settings: tuple) -> tuple[Tensor, Tensor]:
    """See `fisnet_cuda.reference.max_pool`; 2-d windows of at most 256 pixels have one-byte winners."""
    out_size = None
    if not _unserved(spatial, adaptive, settings) and x.dim() == 4 and x.is_floating_point():
        out_size = _out_size(x.shape[2:], settings)
    if out_size is None:
        return reference.max_pool(x, spatial, adaptive, settings)
    (x,) = dense(x)
    window = window_of(settings)
    if torch.is_grad_enabled() and x.requires_grad:
        return _MaxPool.apply(x, out_size, window)
    return torch.ops.fisnet.max_pool(x, out_size, window)


@kernel_for
def max_pool_scatter(g: Tensor, winners: Tensor, in_size: tuple[int, ...], pool: tuple | None = None) -> Tensor:
    """See `fisnet_cuda.reference.max_pool_scatter`."""
    if winners.dtype != torch.uint8 or pool is None:  # without the pool, bytes are refused there
        return reference.max_pool_scatter(g, winners, in_size, pool)
    (g,) = dense(g)
    return torch.ops.fisnet.max_pool_scatter(g, _beside(winners, g), in_size, window_of(pool[2]))


@kernel_for
def max_pool_gather(x: Tensor, winners: Tensor, pool: tuple | None = None) -> Tensor:
    """See `fisnet_cuda.reference.max_pool_gather`."""
    if winners.dtype != torch.uint8 or pool is None:
        return reference.max_pool_gather(x, winners, pool)
    (x,) = dense(x)
    return torch.ops.fisnet.max_pool_gather(x, _beside(winners, x), window_of(pool[2]))


@kernel_for
def max_pool_scatter_phi(
    g: Tensor, winners: Tensor, in_size: tuple[int, ...], pool: tuple | None, a: Tensor, eps: float | Tensor,
    skip: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `fisnet_cuda.reference.max_pool_scatter_phi`."""
    if winners.dtype != torch.uint8 or pool is None:
        return reference.max_pool_scatter_phi(g, winners, in_size, pool, a, eps, skip)
    a, g, skip = dense(a, g, skip)
    number, eps_n = split_eps(eps, a)
    winners = _beside(winners, a, g, skip)
    return torch.ops.fisnet.max_pool_scatter_phi(g, winners, a, number, eps_n, skip, window_of(pool[2]))


@kernel_for
def max_pool_scatter_phi_backward(
    s_bar: Tensor, s: Tensor, winners: Tensor, pool: tuple | None, a: Tensor, eps: float | Tensor, need_a: bool = True,
    need_skip: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See `fisnet_cuda.reference.max_pool_scatter_phi_backward`."""
    if winners.dtype != torch.uint8 or pool is None:
        return reference.max_pool_scatter_phi_backward(s_bar, s, winners, pool, a, eps, need_a, need_skip)
    dtype_a = a.dtype
    s, s_bar, a = dense(s, s_bar, a)
    number, eps_n = split_eps(eps, a)
    g_bar, a_bar, skip_bar = torch.ops.fisnet.max_pool_scatter_phi_backward(
        s_bar, s if need_a else None, _beside(winners, s, s_bar, a), a, number, eps_n, window_of(pool[2]), need_a, need_skip
    )
    return g_bar, a_bar.to(dtype_a) if need_a else None, skip_bar if need_skip else None


# What `plan` asks: a reason not to serve an instruction with these operands, or nothing.
max_pool.serves = lambda x, spatial, adaptive, settings: _unserved(spatial, adaptive, settings)
max_pool_scatter.serves = lambda g, winners, in_size, pool: _unserved(*pool)
max_pool_scatter_phi.serves = lambda g, winners, in_size, pool, *rest: _unserved(*pool)


def _beside(winners: Tensor, *tensors: Tensor | None) -> Tensor:
    """The winners in the layout of the tensors they stand beside."""
    last = any(t is not None and is_channels_last(t) for t in tensors)
    return fit(winners, last)


def _like(t: Tensor, shape: tuple[int, ...], *others: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """A new ``[N, C, h, w]`` in the layout that the binding picks for these operands."""
    last = next((is_channels_last(o) for o in (t, *others) if o is not None and not o.is_contiguous()), False)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or t.dtype, device=t.device, memory_format=memory_format)


@torch.library.register_fake("fisnet::max_pool")
def _(x, out_size, window):
    shape = (*x.shape[:2], *out_size)
    return _like(x, shape), _like(x, shape, dtype=torch.uint8)


@torch.library.register_fake("fisnet::max_pool_scatter")
def _(g, winners, in_size, window):
    return _like(g, (*g.shape[:2], *in_size), winners)


@torch.library.register_fake("fisnet::max_pool_gather")
def _(x, winners, window):
    return _like(x, (*x.shape[:2], *winners.shape[2:]), winners)


@torch.library.register_fake("fisnet::max_pool_scatter_phi")
def _(g, winners, a, eps, eps_n, skip, window):
    return _like(g, (*g.shape[:2], *a.shape[2:]), winners, a, skip)


@torch.library.register_fake("fisnet::max_pool_scatter_phi_backward")
def _(s_bar, s, winners, a, eps, eps_n, window, need_a, need_skip):
    return (
        _like(s_bar, (*s_bar.shape[:2], *winners.shape[2:]), winners, a),
        torch.empty_like(a) if need_a else a.new_empty(0),
        torch.empty_like(s_bar) if need_skip else s_bar.new_empty(0),
    )
