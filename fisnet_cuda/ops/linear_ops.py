"""Maps that are linear and have no parameters: padding, means, slices, resizing, shuffles; each with its transpose.

The transposes are PyTorch's own backward primitives called as forward ops, so their derivative is first order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_op(x: Tensor, op: str, settings: tuple) -> Tensor:
    """Run ``op`` ("mean", "sum", "pad", "interpolate", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle").

    Example:
        >>> import torch
        >>> linear_op(torch.ones(1, 2, 3), "sum", ((2,), False))
        tensor([[3., 3.]])
    """
    if op in ("mean", "sum"):
        dims, keepdim = settings
        return getattr(torch, op)(x, dims, keepdim)
    if op == "pad":
        pad, mode, value = settings
        return F.pad(x, pad, mode, value) if mode == "constant" else F.pad(x, pad, mode)
    if op == "interpolate":
        size, factor, mode, align_corners, recompute = settings
        return F.interpolate(x, size, factor, mode, align_corners, recompute)
    if op == "pixel_shuffle":
        return F.pixel_shuffle(x, *settings)
    if op == "pixel_unshuffle":
        return F.pixel_unshuffle(x, *settings)
    if op == "channel_shuffle":
        return _shuffle(x, settings[0])
    raise ValueError(f"unknown linear op {op!r}")


def linear_op_transposed(g: Tensor, op: str, settings: tuple, in_shape: tuple[int, ...]) -> Tensor:
    """The transpose of `linear_op` for inputs ``[N, *in_shape]``: ``g [N*K, *out_shape] -> [N*K, *in_shape]``.

    Example:
        >>> import torch
        >>> linear_op_transposed(torch.tensor([[3.0]]), "mean", ((2,), False), (1, 3))
        tensor([[[1., 1., 1.]]])
    """
    shape = (g.shape[0], *in_shape)
    if op in ("mean", "sum"):
        dims, keepdim = settings
        dims = sorted(d % len(shape) for d in dims)
        if not keepdim:
            for d in dims:
                g = g.unsqueeze(d)
        count = 1
        for d in dims:
            count *= shape[d] if op == "mean" else 1
        return (g / count if count > 1 else g).expand(shape)
    if op == "pad":
        pad, mode, _ = settings
        if mode == "constant":
            return F.pad(g, tuple(-p for p in pad))
        name = {"reflect": "reflection", "replicate": "replication"}[mode]
        backward = getattr(torch.ops.aten, f"{name}_pad{len(pad) // 2}d_backward")
        return backward(g, g.new_empty(1).expand(shape), pad)
    if op == "interpolate":
        return _interpolate_transposed(g, settings, shape)
    if op == "pixel_shuffle":
        return F.pixel_unshuffle(g, *settings)
    if op == "pixel_unshuffle":
        return F.pixel_shuffle(g, *settings)
    if op == "channel_shuffle":
        return _shuffle(g, g.shape[1] // settings[0])
    raise ValueError(f"unknown linear op {op!r}")


def _shuffle(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


_UPSAMPLE = {
    ("nearest", 1): "upsample_nearest1d", ("nearest", 2): "upsample_nearest2d", ("nearest", 3): "upsample_nearest3d",
    ("linear", 1): "upsample_linear1d", ("bilinear", 2): "upsample_bilinear2d",
    ("bicubic", 2): "upsample_bicubic2d", ("trilinear", 3): "upsample_trilinear3d",
}  # fmt: skip


def _interpolate_transposed(g: Tensor, settings: tuple, shape: tuple[int, ...]) -> Tensor:
    _, factor, mode, align_corners, recompute = settings
    spatial = len(shape) - 2
    name = _UPSAMPLE.get((mode, spatial))
    if name is None:
        raise ValueError(f"interpolate with mode {mode!r} has no transpose here: use {sorted({m for m, _ in _UPSAMPLE})}")
    backward = getattr(torch.ops.aten, f"{name}_backward")
    # PyTorch passes the given factors on to the kernel unless they are to be recomputed from the sizes
    given = [None] * spatial
    if factor is not None and not recompute:
        given = [float(f) for f in (factor if isinstance(factor, (tuple, list)) else (factor,) * spatial)]
    corner = () if mode == "nearest" else (bool(align_corners),)
    return backward(g, g.shape[2:], shape, *corner, *given)


def slice_op(x: Tensor, dim: int, start: int, stop: int | None) -> Tensor:
    """``x[..., start:stop, ...]`` along ``dim``.

    Example:
        >>> import torch
        >>> slice_op(torch.arange(4).view(1, 4), 1, 1, -1)
        tensor([[1, 2]])
    """
    return x[(slice(None),) * (dim % x.dim()) + (slice(start, stop),)]


def slice_transposed(g: Tensor, dim: int, start: int, stop: int | None, in_shape: tuple[int, ...]) -> Tensor:
    """The transpose of `slice_op`: ``g`` between zeros, ``[N*K, *in_shape]``.

    Example:
        >>> import torch
        >>> slice_transposed(torch.ones(1, 2), 1, 1, 3, (4,))
        tensor([[0., 1., 1., 0.]])
    """
    dim = dim % g.dim()
    size = in_shape[dim - 1]
    first, last, _ = slice(start, stop).indices(size)
    pad = [0, 0] * (g.dim() - dim - 1) + [first, size - max(last, first)]
    return F.pad(g, pad)


def chunk_bounds(size: int, index: int, chunks: int) -> tuple[int, int]:
    """``(start, stop)`` of part ``index`` of ``torch.chunk`` over an axis of ``size``.

    Example:
        >>> chunk_bounds(5, 1, 2)
        (3, 5)
    """
    step = -(-size // chunks)
    return min(index * step, size), min((index + 1) * step, size)
