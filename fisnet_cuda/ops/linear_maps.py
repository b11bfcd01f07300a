"""Convolutions and dense layers forward, and what their relevance needs beside the transposed product (`linear_phi`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from ..reference import Geometry, conv_geometry, linear_geometry

__all__ = ["Geometry", "channel_scale", "conv_geometry", "fprop", "linear_geometry", "positive_part"]


def _autocasting(t: Tensor) -> bool:
    """Whether autocast is on where ``t`` lives (the meta device knows none)."""
    device = t.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _compute_dtype(s: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on (forward and backward then see the same one), else that of ``s``."""
    if s.is_floating_point() and _autocasting(s) and s.dtype != torch.float64:
        return torch.get_autocast_dtype(s.device.type)
    return s.dtype


class _Fprop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, bias, geometry):
        ctx.save_for_backward(x, W)
        ctx.geometry = geometry
        return reference.fprop(x, W, bias, Geometry(*geometry))

    @staticmethod
    @once_differentiable
    def backward(ctx, y_bar):
        x, W = ctx.saved_tensors
        geometry = Geometry(*ctx.geometry)
        need_x, need_W, need_bias = ctx.needs_input_grad[:3]
        x_bar = reference.dgrad(y_bar, W, geometry, tuple(x.shape[2:])) if need_x else None
        W_bar = reference.wgrad(x, y_bar, W, geometry) if need_W else None
        return x_bar, W_bar, y_bar.sum((0, 2, 3)) if need_bias else None, None


def fprop(x: Tensor, W: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``W x + bias`` by PyTorch's own primitive: ``[N, C_in, ...] -> [N, C_out, ...]``.

    The backward is PyTorch's too, but for convolutions whose weight is much larger than their map (on a CPU), where one
    matrix product gives the weight gradient faster.

    Example:
        >>> import torch
        >>> fprop(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]), None, linear_geometry())
        tensor([[3.]])
    """
    plain = not torch.is_grad_enabled() or x.dtype != W.dtype or _autocasting(x)
    if plain or not reference.weight_dominates(x, W, geometry):
        return reference.fprop(x, W, bias, geometry)
    return _Fprop.apply(x, W, bias, tuple(geometry))


def channel_scale(g: Tensor, scale: Tensor) -> Tensor:
    """``scale . g`` for a per-channel ``scale [C]`` or a per-sample one ``[N, C]`` (GroupNorm), ``g [N*K, C, ...]``.

    Example:
        >>> import torch
        >>> channel_scale(torch.ones(1, 2, 1), torch.tensor([2.0, 3.0])).flatten()
        tensor([2., 3.])
    """
    if scale.dim() == 1:
        return g * reference.phi.channel_view(scale, g)
    g_k, scale_k = reference.phi.per_sample(g, scale.view(*scale.shape, *[1] * (g.dim() - scale.dim())))
    scaled = g_k * scale_k
    return reference.phi.fold_maps(scaled, g)


class _PositivePart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, W, sign):
        W_plus = W.clamp(min=0) if sign is None else _signed(W, sign).clamp_(min=0)
        ctx.save_for_backward(W_plus, sign)
        return W_plus

    @staticmethod
    @once_differentiable
    def backward(ctx, W_plus_bar):
        W_plus, sign = ctx.saved_tensors
        masked = torch.ops.aten.threshold_backward(W_plus_bar, W_plus, 0)
        return (masked if sign is None else _signed(masked, sign)), None


def _signed(W: Tensor, sign: Tensor) -> Tensor:
    return W * sign.view(-1, *[1] * (W.dim() - 1))


def positive_part(W: Tensor, sign: Tensor | None = None) -> Tensor:
    """``max(sign . W, 0)``: the weights of the z+ rule for outputs whose BatchNorm scale has this sign.

    Args:
        W: weight ``[C_out, ...]``. Gets a gradient.
        sign: ``[C_out]`` of -1, 0 and 1, constant; None is all 1.

    Returns:
        A tensor shaped as ``W``.

    Example:
        >>> import torch
        >>> positive_part(torch.tensor([[1.0, -2.0], [1.0, -2.0]]), torch.tensor([1.0, -1.0]))
        tensor([[1., 0.],
                [0., 2.]])
    """
    return _PositivePart.apply(W, None if sign is None else sign.detach())
