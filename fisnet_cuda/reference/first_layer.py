"""The z^B rule of the first layer and its adjoint (kernel 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear_maps import Geometry, dgrad, fprop, wgrad
from .phi import fold_maps, per_sample, ratio_backward, reuse, stabilise, sum_over_maps


def _bound(bound: Tensor, like: Tensor) -> Tensor:
    """A bound ``[C] or [1]`` shaped to be subtracted from ``like [N, C, ...]``, also with a K axis behind N; an image of
    bounds ``[1, C, ...]`` is that already."""
    if bound.dim() > 1:
        return bound
    return bound.view(1, -1, *[1] * (like.dim() - 2))


def _image(bound: Tensor, like: Tensor) -> Tensor:
    """The constant image of a bound, ``[C] or [1] -> [1, C, ...]``: its borders meet the layer's zero padding."""
    one = like[:1] if like.shape[0] else like.new_empty(1, *like.shape[1:])
    return torch.empty_like(one).copy_(_bound(bound, like))


def _signed(W: Tensor) -> tuple[Tensor, Tensor]:
    return W.clamp(min=0), W.clamp(max=0)


def _fprop_pair(x_plus: Tensor, x_minus: Tensor, W: Tensor, geometry: Geometry) -> Tensor:
    """``W+ x_plus + W- x_minus``, as one product over twice the channels where groups allow."""
    W_plus, W_minus = _signed(W)
    if geometry.groups > 1:
        return fprop(x_plus, W_plus, None, geometry) + fprop(x_minus, W_minus, None, geometry)
    axis = 1 if geometry.spatial else -1
    return fprop(torch.cat([x_plus, x_minus], axis), torch.cat([W_plus, W_minus], 1), None, geometry)


def _dgrad_pair(s: Tensor, W: Tensor, geometry: Geometry, in_size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``(W+^T s, W-^T s)``."""
    W_plus, W_minus = _signed(W)
    if geometry.groups > 1:
        return dgrad(s, W_plus, geometry, in_size), dgrad(s, W_minus, geometry, in_size)
    both = dgrad(s, torch.cat([W_plus, W_minus], 1), geometry, in_size)
    return both.chunk(2, 1 if geometry.spatial else -1)


def _wgrad_pair(x_plus: Tensor, x_minus: Tensor, s: Tensor, W: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Gradients of `_fprop_pair` with respect to ``(W+, W-)``, contracted with ``s``."""
    if geometry.groups > 1:
        return wgrad(x_plus, s, W, geometry), wgrad(x_minus, s, W, geometry)
    axis = 1 if geometry.spatial else -1
    return wgrad(torch.cat([x_plus, x_minus], axis), s, torch.cat([W, W], 1), geometry).chunk(2, 1)


def _ratio(R_out, x, z, W, shift, low, high, eps, geometry, carrier) -> tuple[Tensor, Tensor]:
    """``(s, denominator)`` of `zb`."""
    box = _fprop_pair(_image(low, x), _image(high, x), W, geometry)
    if shift is not None:
        bound = shift.clamp(min=0) * low.min() + shift.clamp(max=0) * high.max()
        box = box + bound.view(-1, *[1] * (geometry.spatial))
    den = z - box
    if eps > 0:
        signed_eps = torch.copysign(den.new_full((), eps), den)
        den, work = den.add_(signed_eps), signed_eps
    else:
        den, work = stabilise(den, eps), den
    if carrier is None:
        R_k, den_k = per_sample(R_out, den)
        s = R_k / den_k
    else:
        # `work` is a map of the right size that nobody needs any more
        R_k, share = per_sample(R_out, torch.div(carrier, den, out=reuse(work) if work is not den else None))
        s = share.mul_(R_k) if share.shape == R_k.shape and share.dtype == R_k.dtype else share * R_k
    return fold_maps(s, den), den


def zb(
    R_out: Tensor,  # [N*K, C_out, ...]
    x: Tensor,  # [N, C_in, ...]
    z: Tensor,  # [N, C_out, ...]
    W: Tensor,  # [C_out, C_in/groups, ...]
    shift: Tensor | None,  # [C_out]
    low: Tensor,  # [C_in] or [1]
    high: Tensor,  # [C_in] or [1]
    eps: float,
    geometry: Geometry,
    carrier: Tensor | None = None,  # [N, C_out, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # ([N*K, C_in, ...], [N*K, C_out, ...], [N, C_out, ...])
    """``R = (x - l) W+^T s + (x - h) W-^T s``, ``s = R_out / (z' + e sign z')``; returns ``(R, s, denominator)``.

    ``z' = z - (W+ l + b+ min l) - (W- h + b- max h)``, with ``W``, ``shift`` (= b) after folding BatchNorm, and ``z`` the
    pre-activation ``W x + b``, needed only where ``R_out`` is not 0 (so the output of a ReLU will do). With ``carrier``,
    ``R_out`` is relevance per unit of it: the product is taken here. An implementation that would rather compute ``s`` and
    the denominator twice than keep them returns None for both.
    """
    s, den = _ratio(R_out, x, z, W, shift, low, high, eps, geometry, carrier)
    c_plus, c_minus = _dgrad_pair(s, W, geometry, tuple(x.shape[2:]))
    (c_plus_k, x_k), (c_minus_k, _) = per_sample(c_plus, x), per_sample(c_minus, x)
    R = torch.addcmul((x_k - _bound(low, x)) * c_plus_k, x_k - _bound(high, x), c_minus_k)
    return fold_maps(R, x), s, den


def zb_backward(
    R_bar: Tensor,  # [N*K, C_in, ...]
    R_out: Tensor | None,  # [N*K, C_out, ...]
    s: Tensor | None,  # [N*K, C_out, ...]
    den: Tensor | None,  # [N, C_out, ...]
    x: Tensor,  # [N, C_in, ...]
    z: Tensor | None,  # [N, C_out, ...]
    W: Tensor,  # [C_out, C_in/groups, ...]
    shift: Tensor | None,  # [C_out]
    low: Tensor,  # [C_in] or [1]
    high: Tensor,  # [C_in] or [1]
    eps: float,
    geometry: Geometry,
    need_W: bool = True,
    need_x: bool = False,
    carrier: Tensor | None = None,  # [N, C_out, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``(R_out_bar, W_bar, shift_bar, x_bar, carrier_bar)``, the adjoint of `zb`, ``z`` differentiated as ``W x + b``.

    Operands are those of `zb`, with the ratios it returned; None for them says that they are to be computed again.
    ``R_out`` is read only then, and with a ``carrier``; ``z`` only then. Both may be None where they are not read.
    """
    if s is None or den is None:
        s, den = _ratio(R_out, x, z, W, shift, low, high, eps, geometry, carrier)
    R_bar_k, x_k = per_sample(R_bar, x)
    c_plus_bar, c_minus_bar = (x_k - _bound(low, x)) * R_bar_k, (x_k - _bound(high, x)) * R_bar_k
    if c_plus_bar.dim() > x.dim():
        c_plus_bar, c_minus_bar = c_plus_bar.flatten(0, 1), c_minus_bar.flatten(0, 1)
    s_bar = _fprop_pair(c_plus_bar, c_minus_bar, W, geometry)
    R_out_bar, z_bar = ratio_backward(s_bar, s, den)

    W_bar = shift_bar = x_bar = carrier_bar = None
    if carrier is not None:
        u, carrier_k = per_sample(R_out_bar, carrier)
        carrier_bar = sum_over_maps(per_sample(R_out, carrier)[0] * u, carrier)
        R_out_bar = u * carrier_k
        R_out_bar = fold_maps(R_out_bar, carrier)
    if need_W:
        plus, minus = _wgrad_pair(c_plus_bar, c_minus_bar, s, W, geometry)
        # the constant images are the same for every sample, so their share needs the batch's sum only
        box_plus, box_minus = _wgrad_pair(_image(low, x), _image(high, x), z_bar.sum(0, keepdim=True), W, geometry)
        signed = torch.where(W > 0, plus - box_plus, 0) + torch.where(W < 0, minus - box_minus, 0)
        W_bar = wgrad(x, z_bar, W, geometry) + signed
        if shift is not None:
            b_bar = z_bar.sum([0, *range(2, z_bar.dim())]) if geometry.spatial else z_bar.flatten(0, -2).sum(0)
            inside = 1 - torch.where(shift > 0, low.min(), 0) - torch.where(shift < 0, high.max(), 0)
            shift_bar = b_bar * inside
    if need_x:
        c_plus, c_minus = _dgrad_pair(s, W, geometry, tuple(x.shape[2:]))
        direct = sum_over_maps(per_sample(c_plus + c_minus, x)[0] * R_bar_k, x)
        x_bar = direct + dgrad(z_bar, W, geometry, tuple(x.shape[2:]))
    return R_out_bar, W_bar, shift_bar, x_bar, carrier_bar
