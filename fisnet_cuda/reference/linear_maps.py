"""The three products of a linear map, convolution or dense layer, and its transpose without detours.

``fprop`` is ``W a``, ``dgrad`` its transpose ``W^T s`` (a relevance pass is one of these), ``wgrad`` the weight's share of
``<s, W a>``. They are closed under differentiation: the adjoint of dgrad is fprop with respect to ``s`` and wgrad with
respect to ``W``, so relevance needs no double backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Geometry(NamedTuple):
    """What a linear map needs besides its weight: ``spatial`` 0 is a dense layer on the last axis."""

    spatial: int
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


def conv_geometry(spatial: int, stride, padding, dilation, groups: int) -> Geometry:
    """Geometry of a convolution; an int or a sequence for each of stride, padding and dilation."""

    def each(v) -> tuple[int, ...]:
        values = (v,) if isinstance(v, int) else tuple(v)
        return values * spatial if len(values) == 1 else values

    return Geometry(spatial, each(stride), each(padding), each(dilation), groups)


def linear_geometry() -> Geometry:
    """Geometry of a dense layer."""
    return Geometry(0)


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}

# Below this many input channels a strided dgrad runs as a stride-1 convolution: oneDNN pads the 3 channels of an image
# to a full vector, and PyTorch has no good plan for it in contiguous layout either.
_FEW_CHANNELS = 8


def fprop(x: Tensor, W: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``W x + bias``: ``[N, C_in, ...] -> [N, C_out, ...]`` (dense: on the last axis)."""
    if geometry.spatial == 0:
        return F.linear(x, W, bias)
    _, stride, padding, dilation, groups = geometry
    return _CONV[geometry.spatial](x, W, bias, stride, padding, dilation, groups)


def dgrad(s: Tensor, W: Tensor, geometry: Geometry, in_size: tuple[int, ...]) -> Tensor:
    """``W^T s``: ``[N, C_out, ...] -> [N, C_in, *in_size]``; ``in_size`` is the spatial size of the map's input."""
    if geometry.spatial == 0:
        return torch.matmul(s, W)
    spatial, stride, padding, dilation, groups = geometry
    few = groups == 1 and W.shape[1] <= _FEW_CHANNELS and s.device.type == "cpu"
    if few and spatial == 2 and stride[0] == stride[1] > 1 and dilation == (1, 1):
        return _dgrad_few_channels(s, W, stride[0], padding, in_size)
    kernel = W.shape[2:]
    span = [
        (o - 1) * st - 2 * p + d * (k - 1) + 1
        for o, st, p, d, k in zip(s.shape[2:], stride, padding, dilation, kernel)
    ]
    rest = [i - n for i, n in zip(in_size, span)]  # inputs that the last window does not reach
    return _CONV_TRANSPOSE[spatial](s, W, None, stride, padding, rest, groups, dilation)


def wgrad(x: Tensor, s: Tensor, W: Tensor, geometry: Geometry) -> Tensor:
    """``d <s, W x> / d W``, shaped and laid out as ``W`` (whose values do not matter)."""
    if geometry.spatial == 0:
        return s.flatten(0, -2).transpose(0, 1) @ x.flatten(0, -2)
    if weight_dominates(x, W, geometry):
        return _wgrad_by_windows(x, s, W, geometry)
    spatial, stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution_backward(
        s, x, W, None, stride, padding, dilation, False, [0] * spatial, groups, [False, True, False]
    )[1]


def weight_dominates(x: Tensor, W: Tensor, geometry: Geometry) -> bool:
    """Whether the weight is so much larger than the map ``x`` that its gradient is best written once, by one matrix product.

    The last stages of a network at small batches: oneDNN writes the weight gradient in its own layout and converts it,
    which costs several times the product itself. CPU, plain 2-d convolutions.
    """
    if geometry.spatial != 2 or geometry.groups != 1 or geometry.dilation != (1, 1) or x.device.type != "cpu":
        return False
    return W.numel() >= (2 if W.shape[2:] == (1, 1) else 20) * x.numel()


def _wgrad_by_windows(x: Tensor, s: Tensor, W: Tensor, geometry: Geometry) -> Tensor:
    """``sum over positions of s (x) window(x)``: one product, straight into the layout of ``W``."""
    c_out, c_in, kh, kw = W.shape
    (sh, sw), (ph, pw) = geometry.stride, geometry.padding
    if ph or pw:
        x = F.pad(x, (pw, pw, ph, ph))
    windows = x.unfold(2, kh, sh).unfold(3, kw, sw)  # [N, C_in, out, out, kh, kw]
    channels_inside = W.is_contiguous(memory_format=torch.channels_last)
    order = (0, 2, 3, 4, 5, 1) if channels_inside else (0, 2, 3, 1, 4, 5)
    product = s.movedim(1, -1).reshape(-1, c_out).t() @ windows.permute(order).reshape(-1, c_in * kh * kw)
    return product.view(c_out, kh, kw, c_in).permute(0, 3, 1, 2) if channels_inside else product.view(W.shape)


def _dgrad_few_channels(s: Tensor, W: Tensor, stride: int, padding: tuple[int, ...], in_size: tuple[int, ...]) -> Tensor:
    """dgrad as one stride-1 convolution to ``C_in stride^2`` channels and a pixel shuffle.

    With input position ``i + p = stride q + r`` and tap ``k = r + stride j`` the transposed convolution reads
    ``x[q, r] = sum_j s[q - j] W[r + stride j]``: for each phase ``r`` a full convolution with every stride-th tap.
    """
    c_out, c_in, kh, kw = W.shape
    th, tw = -(-kh // stride), -(-kw // stride)  # taps a phase
    phases = F.pad(W, (0, stride * tw - kw, 0, stride * th - kh)).view(c_out, c_in, th, stride, tw, stride)
    phases = phases.permute(1, 3, 5, 0, 2, 4).flip(4, 5).reshape(c_in * stride**2, c_out, th, tw)
    layout = torch.channels_last if s.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    x = F.conv2d(s, phases.contiguous(memory_format=layout), padding=(th - 1, tw - 1))
    x = F.pixel_shuffle(x, stride)
    (top, left), (height, width) = padding, in_size
    short = left + width - x.shape[3], top + height - x.shape[2]
    if max(short) > 0:  # inputs that no window reaches
        x = F.pad(x, (0, max(short[0], 0), 0, max(short[1], 0)))
    return x[:, :, top : top + height, left : left + width]
