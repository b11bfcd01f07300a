"""Products of linear maps with the LRP work that stands right behind them (kernels 8, 9, 10 and 12).

A fused kernel computes each of these while the product is still in registers; here they are the composition that defines
them. ``factor`` is the scale of the BatchNorm folded into the map, ``W~ = factor . W`` per output channel, and
``W~+ = max(W~, 0)`` is what the z+ rule sees of it.
"""

from __future__ import annotations

from torch import Tensor

from .linear_maps import Geometry, dgrad, fprop
from .phi import Epsilon, channel_dot, dual_phi, dual_phi_backward, phi_scale, phi_scale_backward


def _columns(v: Tensor, geometry: Geometry) -> Tensor:
    """A per-output vector ``[C_out]`` beside the map's output (dense maps have their channels last)."""
    return v.view(-1, *[1] * geometry.spatial)


def folded(W: Tensor, factor: Tensor | None) -> Tensor:
    """``W~ = factor . W`` per output channel, in the dtype of ``W``."""
    return W if factor is None else W * factor.to(W.dtype).view(-1, *[1] * (W.dim() - 1))


def folded_plus(W: Tensor, factor: Tensor | None) -> Tensor:
    """``W~+ = max(factor . W, 0)``, what the z+ rule sees of ``W``; ``factor`` may be the scale or its sign."""
    return folded(W, factor).clamp(min=0)


def linear_act(
    x: Tensor,  # [N, C_in, ...]
    W: Tensor,  # [C_out, C_in, *kernel]
    geometry: Geometry,
    scale: Tensor | None = None,  # [C_out]
    shift: Tensor | None = None,  # [C_out]
    skip: Tensor | None = None,  # [N, C_out, ...]
    relu: bool = False,
    pre_scale: Tensor | None = None,  # [C_in]
    pre_shift: Tensor | None = None,  # [C_in]
) -> tuple[Tensor]:  # [N, C_out, ...]
    """``y = [relu](scale . (W x') + shift + skip)``, ``x' = relu(pre_scale . x + pre_shift)`` where those are given, else x."""
    if pre_scale is not None:
        x = (x * _columns(pre_scale, geometry) + _columns(pre_shift, geometry)).relu_().to(x.dtype)
    y = fprop(x, W, None, geometry)
    dtype = y.dtype
    if scale is not None:
        y = y * _columns(scale, geometry)
    if shift is not None:
        y = y + _columns(shift, geometry)
    if skip is not None:
        y = y + skip
    y = y.to(dtype)
    return (y.relu_() if relu else y,)


def transposed_phi(
    s: Tensor,  # [N*K, C_out, ...]
    W: Tensor,  # [C_out, C_in, *kernel]
    geometry: Geometry,
    in_size: tuple[int, ...],
    factor: Tensor | None = None,  # [C_out]
    a: Tensor | None = None,  # [N, C_in, *in_size]
    eps: Epsilon = 0.0,
    skip: Tensor | None = None,  # [N*K, C_in, *in_size]
    scale: Tensor | None = None,  # [C_in]
    rest: Tensor | None = None,  # [N*K, C_in, *in_size]
    keep_s: bool = True,
) -> tuple[Tensor, Tensor]:  # ([N*K, C_in, *in_size], [N*K, C_in, *in_size])
    """``s' = phi(a) . (W~^T s + skip)``; returns ``(scale . s' + rest, s')`` as `phi_scale` does. Without ``a``, phi is 1."""
    g = dgrad(s, folded(W, factor), geometry, in_size)
    if a is None:
        g = g if skip is None else g + skip
        return g, g
    return phi_scale(g, a, eps, skip, scale, rest, keep_s)


def fprop_adjoint(
    g_bar: Tensor,  # [N*K, C_in, *in_size]
    W: Tensor,  # [C_out, C_in, *kernel]
    geometry: Geometry,
    factor: Tensor | None,  # [C_out]
    a: Tensor,  # [N, C_out, ...]
    s: Tensor,  # [N*K, C_out, ...]
    eps: Epsilon,
    join: Tensor | None = None,  # [N*K, C_out, ...]
    need_a: bool = True,
    need_factor: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # ([N*K, C_out, ...], [N, C_out, ...], [C_out])
    """The adjoint of ``g -> s = phi(a) g -> W~^T s`` at ``g_bar`` of its result.

    With ``u = W g_bar`` and ``s_bar = factor . u + join``: ``g_bar' = phi(a) s_bar``, ``a_bar = e (s/a) (s_bar/(a + e))``
    summed over K, ``factor_bar = sum s . u`` per channel (the homogeneity identity ``<W~_c, W~_bar_c> / factor_c`` without
    its division).
    """
    u = fprop(g_bar, W, None, geometry)
    s_bar = u if factor is None else u * _columns(factor.to(u.dtype), geometry)
    if join is not None:
        s_bar = s_bar + join
    g_bar_in, a_bar, _ = phi_scale_backward(s_bar, s, a, eps, None, need_a)
    factor_bar = None
    if need_factor and factor is not None:
        factor_bar = channel_dot(u, s) if geometry.spatial else (u * s).flatten(0, -2).sum(0)
    return g_bar_in, a_bar, factor_bar


def dual_fprop(
    x: Tensor,  # [N, C_in, ...], >= 0
    W: Tensor,  # [C_out, C_in, *kernel]
    geometry: Geometry,
    sign: Tensor | None = None,  # [C_out] of -1, 0, 1
    shift: Tensor | None = None,  # [C_out]
    shift_plus: Tensor | None = None,  # [C_out]
) -> tuple[Tensor, Tensor]:  # ([N, C_out, ...], [N, C_out, ...])
    """``(W x + shift, max(sign . W, 0) x + shift_plus)``: what the forward and the z+ rule need of a map, side by side."""
    return fprop(x, W, shift, geometry), fprop(x, folded_plus(W, sign), shift_plus, geometry)


def dual_transposed_phi(
    s: Tensor,  # [N, C_out, ...]
    s_plus: Tensor,  # [N, C_out, ...]
    W: Tensor,  # [C_out, C_in, *kernel]
    geometry: Geometry,
    in_size: tuple[int, ...],
    factor: Tensor | None = None,  # [C_out]
    a: Tensor | None = None,  # [N, C_in, *in_size]
    z_plus: Tensor | None = None,  # [N, C_in, *in_size]
    eps: Epsilon = 0.0,
    eps_plus: float = 0.0,
) -> tuple[Tensor, Tensor]:  # each [N, C_in, *in_size]
    """``g = W~^T s``, ``g+ = W~+^T s+``, and then both rules at the ReLU before (`dual_phi`); without ``a``, ``(g, g+)``."""
    W = folded(W, factor)
    g, g_plus = dgrad(s, W, geometry, in_size), dgrad(s_plus, W.clamp(min=0), geometry, in_size)
    return (g, g_plus) if a is None else dual_phi(g, g_plus, a, z_plus, eps, eps_plus)


def dual_fprop_adjoint(
    g_bar: Tensor,  # [N, C_in, *in_size]
    g_plus_bar: Tensor,  # [N, C_in, *in_size]
    W: Tensor,  # [C_out, C_in, *kernel]
    geometry: Geometry,
    factor: Tensor | None,  # [C_out]
    a: Tensor,  # [N, C_out, ...]
    s: Tensor,  # [N, C_out, ...]
    s_plus: Tensor,  # [N, C_out, ...]
    z_plus: Tensor,  # [N, C_out, ...]
    eps: Epsilon,
    eps_plus: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # each [N, C_out, ...]
    """The adjoint of `dual_phi` and the two transposed products behind it: ``(g_bar', g+_bar', a_bar, z+_bar)``."""
    W = folded(W, factor)
    s_bar, s_plus_bar = fprop(g_bar, W, None, geometry), fprop(g_plus_bar, W.clamp(min=0), None, geometry)
    return dual_phi_backward(s_bar, s_plus_bar, a, s, s_plus, z_plus, eps, eps_plus)


def dual_transposed_sum(
    z_bar: Tensor,  # [N, C_out, ...]
    P_bar: Tensor,  # [N, C_out, ...]
    W: Tensor,  # [C_out, C_in, *kernel]
    geometry: Geometry,
    in_size: tuple[int, ...],
    sign: Tensor | None = None,  # [C_out] of -1, 0, 1
) -> tuple[Tensor]:  # [N, C_in, *in_size]
    """``W^T z_bar + max(sign . W, 0)^T P_bar``: the input's gradient of `dual_fprop`."""
    return (dgrad(z_bar, W, geometry, in_size) + dgrad(P_bar, folded_plus(W, sign), geometry, in_size),)
