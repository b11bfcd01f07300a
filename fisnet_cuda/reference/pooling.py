"""Max pooling as a winner-takes-all linear map (kernel 11): forward with winners, its transpose and the adjoint.

Winners come in two forms. This file makes int64 positions in the flattened spatial axes, as PyTorch does. The kernels make
one byte, the position inside the window, ``kh * kernel_w + kw``; functions that get bytes need the pool's settings too.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .phi import Epsilon, phi_scale, phi_scale_backward

Pool = tuple  # (spatial, adaptive, settings), as `max_pool` takes them

_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_ADAPTIVE = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


def max_pool(x: Tensor, spatial: int, adaptive: bool, settings: tuple) -> tuple[Tensor, Tensor]:
    """``(values, winners)``: winners index the flattened spatial axes of ``x``; the first of equals wins.

    ``settings`` is (output_size,) for an adaptive pool, else (kernel_size, stride, padding, dilation, ceil_mode).
    """
    if adaptive:
        return _ADAPTIVE[spatial](x, *settings, return_indices=True)
    return _MAX_POOL[spatial](x, *settings, return_indices=True)


def pair(v: int | tuple[int, ...]) -> tuple[int, int]:
    """A setting of a 2-d pool, of rows and of columns."""
    return (v, v) if isinstance(v, int) else (v[0], v[-1])


def window_of(settings: tuple) -> tuple[int, ...]:
    """``(kernel, stride, padding, dilation)`` of a 2-d pool, each of rows and of columns: 8 numbers."""
    kernel, stride, padding, dilation, _ = settings
    return (*pair(kernel), *pair(kernel if stride is None else stride), *pair(padding), *pair(dilation))


def winner_positions(winners: Tensor, in_size: tuple[int, ...], pool: Pool | None) -> Tensor:
    """Winners as int64 positions in the flattened ``in_size``, from either form."""
    if winners.dtype != torch.uint8:
        return winners
    if pool is None:
        raise ValueError("winners are bytes (positions inside a window): pass the pool that made them, (spatial, adaptive, settings)")
    _, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w = window_of(pool[2])
    byte = winners.long()
    rows, columns = (torch.arange(n, device=winners.device) for n in winners.shape[2:])
    h = (rows * stride_h - pad_h).unsqueeze(-1) + byte.div(kernel_w, rounding_mode="floor") * dilation_h
    w = columns * stride_w - pad_w + byte.remainder(kernel_w) * dilation_w
    return h * in_size[1] + w


def _positions_last_but_channels(t: Tensor) -> Tensor:
    """``[N, C, *size] -> [N, positions, C]``: no copy in channels_last."""
    return t.flatten(2).transpose(1, 2) if not _channels_inside(t) else t.movedim(1, -1).flatten(1, -2)


def _channels_inside(t: Tensor) -> bool:
    return t.dim() > 2 and t.shape[1] > 1 and t.stride(1) == 1


def _expand_maps(winners: Tensor, maps: int) -> Tensor:
    if maps == 1:
        return winners
    return winners.unsqueeze(1).expand(-1, maps, *winners.shape[1:]).flatten(0, 1)


def max_pool_scatter(g: Tensor, winners: Tensor, in_size: tuple[int, ...], pool: Pool | None = None) -> Tensor:
    """The transpose: ``[N*K, C, *out] -> [N*K, C, *in_size]``; where windows overlap, contributions **add**."""
    winners = winner_positions(winners, in_size, pool)
    maps = g.shape[0] // max(winners.shape[0], 1) if winners.shape[0] else 1
    index = _expand_maps(winners, maps)
    if _channels_inside(g):
        index, source = _positions_last_but_channels(index), _positions_last_but_channels(g)
        out = g.new_zeros(g.shape[0], math.prod(in_size), g.shape[1]).scatter_add_(1, index, source)
        return out.unflatten(1, in_size).movedim(-1, 1)
    out = g.new_zeros(*g.shape[:2], math.prod(in_size)).scatter_add_(2, index.flatten(2), g.flatten(2))
    return out.unflatten(2, in_size)


def max_pool_gather(x: Tensor, winners: Tensor, pool: Pool | None = None) -> Tensor:
    """The adjoint of `max_pool_scatter`: ``[N*K, C, *in] -> [N*K, C, *out]``, the winners' values."""
    winners = winner_positions(winners, tuple(x.shape[2:]), pool)
    maps = x.shape[0] // max(winners.shape[0], 1) if winners.shape[0] else 1
    index = _expand_maps(winners, maps)
    out_size = winners.shape[2:]
    if _channels_inside(x):
        index = index.movedim(1, -1).flatten(1, -2)
        out = x.movedim(1, -1).flatten(1, -2).gather(1, index)
        return out.unflatten(1, out_size).movedim(-1, 1)
    return x.flatten(2).gather(2, index.flatten(2)).unflatten(2, out_size)


def max_pool_scatter_phi(
    g: Tensor,  # [N*K, C, *out]
    winners: Tensor,  # [N, C, *out]
    in_size: tuple[int, ...],
    pool: Pool | None,
    a: Tensor,  # [N, C, *in_size]
    eps: Epsilon,
    skip: Tensor | None = None,  # [N*K, C, *in_size]
) -> Tensor:  # [N*K, C, *in_size]
    """``s = phi(a) . (scatter(g) + skip)``: LRP-epsilon at the ReLU that made the pool's input ``a``."""
    return phi_scale(max_pool_scatter(g, winners, in_size, pool), a, eps, skip)[1]


def max_pool_scatter_phi_backward(
    s_bar: Tensor,  # [N*K, C, *in_size]
    s: Tensor,  # [N*K, C, *in_size]
    winners: Tensor,  # [N, C, *out]
    pool: Pool | None,
    a: Tensor,  # [N, C, *in_size]
    eps: Epsilon,
    need_a: bool = True,
    need_skip: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # ([N*K, C, *out], [N, C, *in_size], [N*K, C, *in_size])
    """``(g_bar, a_bar, skip_bar)``: ``skip_bar = phi(a) s_bar``, ``g_bar`` its winners, ``a_bar = e (s/a)(s_bar/(a + e))``."""
    skip_bar, a_bar, _ = phi_scale_backward(s_bar, s, a, eps, need_a=need_a)
    return max_pool_gather(skip_bar, winners, pool), a_bar, skip_bar if need_skip else None
