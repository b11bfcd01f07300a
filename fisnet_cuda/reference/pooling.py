"""Max pooling as a winner-takes-all linear map (kernel 11): forward with indices, its transpose and the adjoint."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_ADAPTIVE = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


def max_pool(x: Tensor, spatial: int, adaptive: bool, settings: tuple) -> tuple[Tensor, Tensor]:
    """``(values, winners)``: winners index the flattened spatial axes of ``x``; the first of equals wins.

    ``settings`` is (output_size,) for an adaptive pool, else (kernel_size, stride, padding, dilation, ceil_mode).
    """
    if adaptive:
        return _ADAPTIVE[spatial](x, *settings, return_indices=True)
    return _MAX_POOL[spatial](x, *settings, return_indices=True)


def _positions_last_but_channels(t: Tensor) -> Tensor:
    """``[N, C, *size] -> [N, positions, C]``: no copy in channels_last."""
    return t.flatten(2).transpose(1, 2) if not _channels_inside(t) else t.movedim(1, -1).flatten(1, -2)


def _channels_inside(t: Tensor) -> bool:
    return t.dim() > 2 and t.shape[1] > 1 and t.stride(1) == 1


def _expand_maps(winners: Tensor, maps: int) -> Tensor:
    if maps == 1:
        return winners
    return winners.unsqueeze(1).expand(-1, maps, *winners.shape[1:]).flatten(0, 1)


def max_pool_scatter(g: Tensor, winners: Tensor, in_size: tuple[int, ...]) -> Tensor:
    """The transpose: ``[N*K, C, *out] -> [N*K, C, *in_size]``; where windows overlap, contributions **add**."""
    maps = g.shape[0] // max(winners.shape[0], 1) if winners.shape[0] else 1
    index = _expand_maps(winners, maps)
    if _channels_inside(g):
        index, source = _positions_last_but_channels(index), _positions_last_but_channels(g)
        out = g.new_zeros(g.shape[0], _product(in_size), g.shape[1]).scatter_add_(1, index, source)
        return out.unflatten(1, in_size).movedim(-1, 1)
    out = g.new_zeros(*g.shape[:2], _product(in_size)).scatter_add_(2, index.flatten(2), g.flatten(2))
    return out.unflatten(2, in_size)


def max_pool_gather(x: Tensor, winners: Tensor) -> Tensor:
    """The adjoint of `max_pool_scatter`: ``[N*K, C, *in] -> [N*K, C, *out]``, the winners' values."""
    maps = x.shape[0] // max(winners.shape[0], 1) if winners.shape[0] else 1
    index = _expand_maps(winners, maps)
    out_size = winners.shape[2:]
    if _channels_inside(x):
        index = index.movedim(1, -1).flatten(1, -2)
        out = x.movedim(1, -1).flatten(1, -2).gather(1, index)
        return out.unflatten(1, out_size).movedim(-1, 1)
    return x.flatten(2).gather(2, index.flatten(2)).unflatten(2, out_size)


def _product(sizes: tuple[int, ...]) -> int:
    n = 1
    for size in sizes:
        n *= size
    return n
