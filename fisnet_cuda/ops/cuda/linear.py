"""What the fused kernels of linear maps share: which operands they serve, and how they see them.

A kernel sees every map as ``[N, C, H, W]`` with its channels innermost; a dense layer ``[N, ..., C]`` is a 1x1 convolution over
``[N, C, T, 1]``, T positions of all axes between.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...reference import Geometry
from ..tiles import SMALLEST, ranked

MOST_POSITIONS = 2**31 - 128  # kMostRows of csrc/device/linear.h
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refused(geometry: Geometry, W: Tensor, main: Tensor, *others: Tensor | None, size: tuple[int, ...] = ()) -> str:
    """Why the kernels cannot run a map with these operands; empty when they can. ``size``: a convolution's result, spatial axes."""
    if geometry.spatial not in (0, 2):
        return f"a {geometry.spatial}-d convolution"
    if geometry.groups != 1:
        return "groups"
    if main.dtype not in DTYPES or any(t is not None and t.dtype != main.dtype for t in (W, *others)):
        return "operands of several dtypes"
    if not main.numel() or not W.numel():
        return "no elements"
    if geometry.spatial == 2 and main.stride(1) != 1 and not main.is_contiguous(memory_format=torch.channels_last):
        return "a map whose channels are not innermost"
    result = main.shape[0] * math.prod(size) if geometry.spatial else 0
    if W.numel() > 2**31 - 1 or max(positions(main, geometry), result) > MOST_POSITIONS:
        return "a map of more than 2^31 - 128 positions"
    return ""


def as_map(t: Tensor | None, geometry: Geometry) -> Tensor | None:
    """``t`` as the kernels see it; a copy only where its channels are not innermost."""
    if t is None:
        return None
    if geometry.spatial:
        return t.contiguous(memory_format=torch.channels_last)
    n, c = t.shape[0], t.shape[-1]
    return t.contiguous().view(n, -1, 1, c).permute(0, 3, 1, 2)


def as_slice(t: Tensor | None, geometry: Geometry) -> Tensor | None:
    """`as_map` for an operand that may also be neighbouring channels of a larger map, as a dense block has them: no copy then."""
    if t is None or not geometry.spatial or t.is_contiguous(memory_format=torch.channels_last):
        return as_map(t, geometry)
    _, c, height, width = t.shape
    pitch = t.stride(3) if width > 1 else t.stride(2) if height > 1 else t.stride(0)
    strides = (pitch * height * width, 1, pitch * width, pitch)
    fits = all(size == 1 or stride == wanted for size, stride, wanted in zip(t.shape, t.stride(), strides))
    return t if fits and pitch >= c else as_map(t, geometry)


def as_weight(W: Tensor, geometry: Geometry) -> Tensor:
    """``W`` as ``[C_out, C_in, R, S]`` with its channels innermost."""
    return W.contiguous(memory_format=torch.channels_last) if geometry.spatial else W.contiguous().view(*W.shape, 1, 1)


def from_map(t: Tensor, geometry: Geometry, like: Tensor) -> Tensor:
    """A result as the op returns it; ``like`` has its axes between the samples and the channels (dense layers)."""
    if geometry.spatial:
        return t
    return t.permute(0, 2, 3, 1).reshape(t.shape[0], *like.shape[1:-1], t.shape[1])


def settings(geometry: Geometry) -> tuple[int, int, int, int, int, int]:
    """Stride, padding and dilation of both axes."""
    if not geometry.spatial:
        return (1, 1, 0, 0, 1, 1)
    return (*geometry.stride, *geometry.padding, *geometry.dilation)


def out_size(W: Tensor, geometry: Geometry, in_size: tuple[int, ...]) -> tuple[int, ...]:
    """Spatial size of a convolution's output."""
    sizes = zip(in_size, W.shape[2:], geometry.stride, geometry.padding, geometry.dilation)
    return tuple((size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, pad, dilation in sizes)


def tile_choices(
    result: int, columns: int, main: Tensor, W: Tensor, geometry: Geometry, pair: bool = False, prologue: bool = False
) -> tuple[str, ...]:
    """Names of the tile shapes for a product, best guess first; ``result`` counts its rows (positions of all samples)."""
    if main.dtype == torch.float64:
        return (SMALLEST,)
    vector = 16 // main.element_size()
    wide = W.shape[0] % vector == 0 and W.shape[1] % vector == 0
    depth = W.numel() // columns * main.element_size()
    if result > positions(main, geometry):  # transposed: with a stride, every result sees some of the taps
        depth //= math.prod(geometry.stride)
    return ranked(result, columns, -(-depth // 64), main.device, wide, pair, prologue)


def positions(t: Tensor, geometry: Geometry) -> int:
    """Samples times positions of a map."""
    return t.shape[0] * math.prod(t.shape[2:]) if geometry.spatial else t.numel() // t.shape[-1]


def new_map(like: Tensor, n: int, c: int, height: int, width: int) -> Tensor:
    """For fake kernels: ``[N, C, H, W]`` with its channels innermost, strides as the operators return them."""
    return torch.empty((n, c, height, width), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
