"""Candidate 0 of every fused op: the library's convolution or matrix product, then the project's own pointwise kernel.

Names and signatures are those of `fisnet_cuda.reference.linear_phi`; every function also takes ``backend``. They know
nothing of fused kernels: `fisnet_cuda.dispatch` chooses between these and the fused ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._backend import kernel
from ..reference import Geometry
from ..reference.phi import Epsilon


def columns(v: Tensor, like: Tensor, geometry: Geometry) -> Tensor:
    """A per-output vector ``[C_out]`` shaped to multiply ``like``, an output of the map."""
    return v.to(like.dtype).view(-1, *[1] * geometry.spatial)


def row_sums(W: Tensor) -> Tensor:
    """The sum of each output's weights ``[C_out]``, in whatever layout they are."""
    return W.sum(tuple(range(1, W.dim())))


def folds_into_weight(s: Tensor, W: Tensor) -> bool:
    """BatchNorm's scale goes where there is less to multiply: early layers have small weights, late ones small maps."""
    return W.numel() < s.numel()


def transposed(s: Tensor, W: Tensor, factor: Tensor | None, geometry: Geometry, in_size: tuple, backend: str) -> Tensor:
    """``W~^T s``."""
    if factor is not None:
        if folds_into_weight(s, W):
            W = reference.folded(W, factor)
        else:
            s = s * columns(factor, s, geometry)
    return kernel("dgrad", backend, s)(s, W, geometry, in_size)


def fprop_with_factor(
    g_bar: Tensor, W: Tensor, geometry: Geometry, factor: Tensor | None, s: Tensor, need_factor: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    """``(factor . u, sum s . u)``, ``u = W g_bar``: the adjoint of `transposed` with respect to ``s`` and ``factor``."""
    fprop, factor_bar = kernel("fprop", backend, g_bar), None
    if factor is None:
        return fprop(g_bar, W, None, geometry), None
    if not need_factor and folds_into_weight(s, W):
        return fprop(g_bar, reference.folded(W, factor), None, geometry), None
    u = fprop(g_bar, W, None, geometry)
    if need_factor:
        factor_bar = reference.phi.channel_dot(u, s) if geometry.spatial else (u * s).flatten(0, -2).sum(0)
        factor_bar = factor_bar.to(factor.dtype)
    return u.mul_(columns(factor, u, geometry)), factor_bar


def constant_bn(x: Tensor, scale: Tensor, shift: Tensor | None, skip: Tensor | None, relu: bool, backend: str) -> Tensor:
    """``[relu](scale . x + shift + skip)`` in one pass: a BatchNorm of mean 0 and variance 1."""
    one = torch.ones(x.shape[1], dtype=scale.dtype, device=x.device)
    return kernel("bn_act", backend, x)(x, scale, shift, torch.zeros_like(one), one, False, 0.0, 0.0, skip, relu)[0]


def linear_act(
    x: Tensor, W: Tensor, geometry: Geometry, scale: Tensor | None = None, shift: Tensor | None = None,
    skip: Tensor | None = None, relu: bool = False, pre_scale: Tensor | None = None, pre_shift: Tensor | None = None,
    *, backend: str = "auto",
) -> tuple[Tensor]:  # fmt: skip
    """See `fisnet_cuda.reference.linear_act`."""
    constants = scale is not None or pre_scale is not None
    if constants and geometry.spatial == 0 and x.dim() != 2:  # BatchNorm's channels are axis 1
        return reference.linear_act(x, W, geometry, scale, shift, skip, relu, pre_scale, pre_shift)
    if pre_scale is not None:
        x = constant_bn(x, pre_scale, pre_shift, None, True, backend)
    y = kernel("fprop", backend, x)(x, W, shift if scale is None else None, geometry)
    if scale is not None:
        return (constant_bn(y, scale, shift, skip, relu, backend),)
    if skip is not None:
        y = y.add_(skip)
    return (torch.relu_(y) if relu else y,)


def transposed_phi(
    s: Tensor, W: Tensor, geometry: Geometry, in_size: tuple[int, ...], factor: Tensor | None = None,
    a: Tensor | None = None, eps: Epsilon = 0.0, skip: Tensor | None = None, scale: Tensor | None = None,
    rest: Tensor | None = None, keep_s: bool = True, *, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `fisnet_cuda.reference.transposed_phi`."""
    g = transposed(s, W, factor, geometry, in_size, backend)
    if a is None:
        if skip is not None:
            g = g.add_(skip) if g.dtype == skip.dtype else g + skip
        return g, g
    return kernel("phi_scale", backend, g)(g, a, eps, skip, scale, rest, keep_s)


def fprop_adjoint(
    g_bar: Tensor, W: Tensor, geometry: Geometry, factor: Tensor | None, a: Tensor, s: Tensor, eps: Epsilon,
    join: Tensor | None = None, need_a: bool = True, need_factor: bool = True, *, backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See `fisnet_cuda.reference.fprop_adjoint`."""
    s_bar, factor_bar = fprop_with_factor(g_bar, W, geometry, factor, s, need_factor, backend)
    run = kernel("phi_scale_backward", backend, s)
    if join is not None and run is reference.phi_scale_backward and join.dtype == s_bar.dtype:
        s_bar, join = s_bar.add_(join), None  # the product's own memory is warm
    g_bar_in, a_bar, _ = run(s_bar, s, a, eps, None, need_a, False, join)
    return g_bar_in, a_bar, factor_bar


def dual_fprop(
    x: Tensor, W: Tensor, geometry: Geometry, sign: Tensor | None = None, shift: Tensor | None = None,
    shift_plus: Tensor | None = None, *, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `fisnet_cuda.reference.dual_fprop`."""
    fprop = kernel("fprop", backend, x)
    return fprop(x, W, shift, geometry), fprop(x, reference.folded_plus(W, sign), shift_plus, geometry)


def dual_transposed_phi(
    s: Tensor, s_plus: Tensor, W: Tensor, geometry: Geometry, in_size: tuple[int, ...], factor: Tensor | None = None,
    a: Tensor | None = None, z_plus: Tensor | None = None, eps: Epsilon = 0.0, eps_plus: float = 0.0, *, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `fisnet_cuda.reference.dual_transposed_phi`."""
    dgrad, W = kernel("dgrad", backend, s), reference.folded(W, factor)
    g, g_plus = dgrad(s, W, geometry, in_size), dgrad(s_plus, W.clamp(min=0), geometry, in_size)
    return (g, g_plus) if a is None else kernel("dual_phi", backend, g)(g, g_plus, a, z_plus, eps, eps_plus)


def dual_fprop_adjoint(
    g_bar: Tensor, g_plus_bar: Tensor, W: Tensor, geometry: Geometry, factor: Tensor | None, a: Tensor, s: Tensor,
    s_plus: Tensor, z_plus: Tensor, eps: Epsilon, eps_plus: float, *, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `fisnet_cuda.reference.dual_fprop_adjoint`."""
    fprop, W = kernel("fprop", backend, g_bar), reference.folded(W, factor)
    s_bar, s_plus_bar = fprop(g_bar, W, None, geometry), fprop(g_plus_bar, W.clamp(min=0), None, geometry)
    return kernel("dual_phi_backward", backend, s)(s_bar, s_plus_bar, a, s, s_plus, z_plus, eps, eps_plus)


def dual_transposed_sum(
    z_bar: Tensor, P_bar: Tensor, W: Tensor, geometry: Geometry, in_size: tuple[int, ...], sign: Tensor | None = None,
    *, backend: str = "auto",
) -> tuple[Tensor]:  # fmt: skip
    """See `fisnet_cuda.reference.dual_transposed_sum`."""
    dgrad = kernel("dgrad", backend, z_bar)
    x_bar = dgrad(z_bar, W, geometry, in_size)
    return (x_bar.add_(dgrad(P_bar, reference.folded_plus(W, sign), geometry, in_size)),)
