"""Relevance through convolutions and dense layers: the transposed product as a forward op."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from .._backend import kernel
from ..reference import Geometry, conv_geometry, linear_geometry

__all__ = ["Geometry", "channel_scale", "conv_geometry", "fprop", "linear_geometry", "positive_part", "transposed"]


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, W, scale, geometry, in_size, backend):
        ctx.save_for_backward(s, W, scale)
        ctx.geometry, ctx.backend = geometry, backend
        return _transposed(s, W, scale, Geometry(*geometry), in_size, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_bar):
        s, W, scale = ctx.saved_tensors
        need_s, need_W, need_scale = ctx.needs_input_grad[:3]
        geometry = Geometry(*ctx.geometry)
        fprop, wgrad = kernel("fprop", ctx.backend, g_bar), kernel("wgrad", ctx.backend, g_bar)
        s_bar = W_bar = scale_bar = None
        if scale is None:
            s_bar = fprop(g_bar, W, None, geometry) if need_s else None
            W_bar = wgrad(g_bar, s, W, geometry) if need_W else None
        elif _folds_into_weight(s, W):
            factor = _rows(scale, W)
            s_bar = fprop(g_bar, W * factor, None, geometry) if need_s else None
            if need_W or need_scale:
                folded_bar = wgrad(g_bar, s, W, geometry)
                scale_bar = (folded_bar * W).flatten(1).sum(1) if need_scale else None
                W_bar = folded_bar.mul_(factor) if need_W else None
        else:
            factor = _channels(scale, s, geometry)
            if need_s or need_scale:
                s_bar = fprop(g_bar, W, None, geometry)
            if need_scale:
                over = [0, *range(2, s.dim())] if geometry.spatial else list(range(s.dim() - 1))
                scale_bar = (s_bar * s).sum(over)
            s_bar = s_bar * factor if need_s else None
            W_bar = wgrad(g_bar, s * factor, W, geometry) if need_W else None
        return s_bar, W_bar, scale_bar, None, None, None


def _transposed(s: Tensor, W: Tensor, scale: Tensor | None, geometry: Geometry, in_size: tuple, backend: str) -> Tensor:
    if scale is not None:
        if _folds_into_weight(s, W):
            W = W * _rows(scale, W)
        else:
            s = s * _channels(scale, s, geometry)
    return kernel("dgrad", backend, s)(s, W, geometry, in_size)


def _folds_into_weight(s: Tensor, W: Tensor) -> bool:
    """BatchNorm's scale goes where there is less to multiply: early layers have small weights, late ones small maps."""
    return W.numel() < s.numel()


def _rows(scale: Tensor, W: Tensor) -> Tensor:
    return scale.to(W.dtype).view(-1, *[1] * (W.dim() - 1))


def _channels(scale: Tensor, s: Tensor, geometry: Geometry) -> Tensor:
    scale = scale.to(s.dtype)
    return reference.phi.channel_view(scale, s) if geometry[0] else scale


def transposed(
    s: Tensor,  # [N*K, C_out, ...]
    W: Tensor,  # [C_out, C_in/groups, *kernel]
    geometry: Geometry,
    in_size: tuple[int, ...],
    scale: Tensor | None = None,  # [C_out]
    *,
    backend: str = "auto",
) -> Tensor:  # [N*K, C_in, *in_size]
    """Relevance through a linear map: ``g = W^T (scale . s)``, the step ``g_(l-1) = W~^T s_l`` of LRP.

    Its backward is first order, three ordinary products: ``s_bar = scale . (W g_bar)``, ``W_bar = wgrad(g_bar, scale s)``,
    ``scale_bar = <s, W g_bar>`` per channel (semantics.md section 1; Faster ISNet, arXiv 2401.08409). Deterministic where
    the library's convolutions are. Under autocast it runs in the autocast dtype.

    Args:
        s: relevance per unit of pre-activation ``[N*K, C_out, ...]`` (dense: ``[N*K, ..., C_out]``). Gets a gradient.
        W: weight ``[C_out, C_in/groups, *kernel]`` (dense: ``[C_out, C_in]``). Gets a gradient.
        geometry: `conv_geometry(...)` or `linear_geometry()`.
        in_size: spatial size of the map's input (ignored by a dense layer).
        scale: factor ``[C_out]`` of the BatchNorm that follows the map. Gets a gradient.
        backend: "auto", "reference" or "cuda".

    Returns:
        Relevance per unit of the map's input, ``[N*K, C_in, *in_size]``.

    Raises:
        ValueError: channels of ``s`` and ``W`` do not match.

    Example:
        >>> import torch
        >>> transposed(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0, 1.0], [0.0, 3.0, 1.0]]), linear_geometry(), ())
        tensor([[1., 6., 3.]])
    """
    channels = s.shape[1 if geometry.spatial else -1]
    if channels != W.shape[0]:
        raise ValueError(f"s has {channels} channels and W has {W.shape[0]} outputs: they must be equal")
    dtype = _compute_dtype(s)
    s, W = s.to(dtype), W.to(dtype)
    if not torch.is_grad_enabled():
        return _transposed(s, W, scale, geometry, tuple(in_size), backend)
    return _Transposed.apply(s, W, scale, tuple(geometry), tuple(in_size), backend)


def _autocasting(t: Tensor) -> bool:
    """Whether autocast is on where ``t`` lives (the meta device knows none)."""
    return t.device.type != "meta" and torch.is_autocast_enabled(t.device.type)


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
