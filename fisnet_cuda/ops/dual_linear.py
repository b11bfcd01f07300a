"""Dual's two maps through one linear layer, side by side: W is read once, and ``W+ = max(sign . W, 0)`` is never stored."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dispatch, reference
from .._backend import kernel
from ..reference import Geometry
from . import library
from .layout import laid_out_as, undivided
from .linear_maps import _autocasting, _compute_dtype, _signed
from .phi import as_epsilon


class _DualFprop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, shift, sign, shift_plus, geometry, backend):
        ctx.save_for_backward(x, W, sign)
        ctx.geometry, ctx.backend = geometry, backend
        ctx.set_materialize_grads(False)
        return dispatch.run("dual_fprop", backend, x, W, Geometry(*geometry), sign, shift, shift_plus)

    @staticmethod
    @once_differentiable
    def backward(ctx, z_bar, P_bar):
        x, W, sign = ctx.saved_tensors
        geometry, backend, in_size = Geometry(*ctx.geometry), ctx.backend, tuple(x.shape[2:])
        need_x, need_W, need_shift = ctx.needs_input_grad[:3]
        x_bar = W_bar = shift_bar = None
        z_bar, P_bar = (None if bar is None else laid_out_as(bar, x) for bar in (z_bar, P_bar))
        if need_x and z_bar is not None and P_bar is not None:
            (x_bar,) = dispatch.run("dual_transposed_sum", backend, z_bar, P_bar, W, geometry, in_size, sign)
        elif need_x and z_bar is not None:
            x_bar = kernel("dgrad", backend, x)(z_bar, W, geometry, in_size)
        elif need_x and P_bar is not None:
            x_bar = kernel("dgrad", backend, x)(P_bar, reference.folded_plus(W, sign), geometry, in_size)
        if need_W:
            wgrad = kernel("wgrad", backend, x)
            W_bar = None if z_bar is None else wgrad(x, z_bar, W, geometry)
            if P_bar is not None:
                through = _where_positive(wgrad(x, P_bar, W, geometry), reference.folded(W, sign))
                through = through if sign is None else _signed(through, sign)
                W_bar = through if W_bar is None else W_bar.add_(through)
        if need_shift and z_bar is not None:
            shift_bar = z_bar.sum(_all_but_channels(z_bar, geometry))
        return x_bar, W_bar, shift_bar, None, None, None, None


def dual_fprop(
    x: Tensor,  # [N, C_in, ...]
    W: Tensor,  # [C_out, C_in/groups, *kernel]
    geometry: Geometry,
    sign: Tensor | None = None,  # [C_out]
    shift: Tensor | None = None,  # [C_out]
    shift_plus: Tensor | None = None,  # [C_out]
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # ([N, C_out, ...], [N, C_out, ...])
    """The forward of a linear map and the sum that its z+ rule divides by: ``(W x + shift, max(sign . W, 0) x + shift_plus)``.

    z+ of Dual ISNet, semantics.md section 4 (Faster ISNet, arXiv 2401.08409); for inputs >= 0. Its backward is first order.
    Deterministic where the library's convolutions are. Under autocast it runs in the autocast dtype.

    Args:
        x: ``[N, C_in, ...]``, >= 0 (dense: channels last). Gets a gradient.
        W: weight ``[C_out, C_in/groups, *kernel]``. Gets a gradient.
        geometry: `conv_geometry(...)` or `linear_geometry()`.
        sign: ``[C_out]`` of -1, 0 and 1, that of the scale of the BatchNorm behind the map; constant; None is all 1.
        shift: the map's own bias ``[C_out]``. Gets a gradient, from the first result.
        shift_plus: what is added to the second result, ``[C_out]``; a constant of the rule.
        backend: "auto", "reference" or "cuda".

    Returns:
        ``(z, P)``, each ``[N, C_out, ...]``.

    Example:
        >>> import torch
        >>> from fisnet_cuda.ops import linear_geometry
        >>> dual_fprop(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]]), linear_geometry())
        (tensor([[1.]]), tensor([[3.]]))
    """
    if _autocasting(x):
        dtype = _compute_dtype(x)
        x, W = x.to(dtype), W.to(dtype)
        shift, shift_plus = (None if v is None else v.to(dtype) for v in (shift, shift_plus))
    sign, shift_plus = (None if v is None else v.detach() for v in (sign, shift_plus))
    if not torch.is_grad_enabled():
        return dispatch.run("dual_fprop", backend, x, W, geometry, sign, shift, shift_plus)
    return _DualFprop.apply(x, W, shift, sign, shift_plus, tuple(geometry), backend)


class _DualTransposedPhi(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, s, s_plus, W, factor, a, z_plus, a_before, z_plus_before, eps, eps_plus, eps_before, eps_plus_before,
        geometry, in_size, handed_over, backend,
    ):  # fmt: skip
        s, s_plus = undivided(s), undivided(s_plus)
        out = dispatch.run("dual_transposed_phi", backend, s, s_plus, W, Geometry(*geometry), in_size, factor, a, z_plus, eps, eps_plus)
        own = (None,) * 4 if a is None or handed_over else (a, *out, z_plus)  # a consumer runs dual_phi's adjoint, or none is there
        relative = [e if isinstance(e, Tensor) else None for e in (eps, eps_before)]
        ctx.save_for_backward(s, s_plus, W, factor, *own, a_before, z_plus_before, *relative)
        ctx.eps, ctx.eps_before = (None if isinstance(e, Tensor) else e for e in (eps, eps_before))
        ctx.eps_plus, ctx.eps_plus_before = eps_plus, eps_plus_before
        ctx.geometry, ctx.backend = geometry, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g_bar, g_plus_bar):
        s, s_plus, W, factor, a, s_out, s_plus_out, z_plus, a_before, z_plus_before, eps, eps_before = ctx.saved_tensors
        geometry, backend = Geometry(*ctx.geometry), ctx.backend
        need_s, need_s_plus, need_W, need_factor, _, _, need_a_before, need_z_before = ctx.needs_input_grad[:8]
        a_bar = z_plus_bar = s_bar = s_plus_bar = W_bar = factor_bar = a_before_bar = z_before_bar = None
        if a is not None:
            g_bar, g_plus_bar, a_bar, z_plus_bar = kernel("dual_phi_backward", backend, s)(
                g_bar, g_plus_bar, a, s_out, s_plus_out, z_plus, ctx.eps if eps is None else eps, ctx.eps_plus
            )
        g_bar, g_plus_bar = (laid_out_as(bar.to(W.dtype), s) for bar in (g_bar, g_plus_bar))
        folded = reference.folded(W, factor)
        if a_before is not None and (need_s or need_s_plus or need_a_before or need_z_before):
            eps_before = ctx.eps_before if eps_before is None else eps_before
            s_bar, s_plus_bar, a_before_bar, z_before_bar = dispatch.run(
                "dual_fprop_adjoint", backend, g_bar, g_plus_bar, folded, geometry, None, a_before, s, s_plus, z_plus_before,
                eps_before, ctx.eps_plus_before,
            )  # fmt: skip
        if a_before is None:
            fprop = kernel("fprop", backend, s)
            s_bar = fprop(g_bar, folded, None, geometry) if need_s else None
            s_plus_bar = fprop(g_plus_bar, folded.clamp(min=0), None, geometry) if need_s_plus else None
        if need_W or need_factor:
            wgrad = kernel("wgrad", backend, s)
            folded_bar = wgrad(g_bar, s, W, geometry).add_(_where_positive(wgrad(g_plus_bar, s_plus, W, geometry), folded))
            factor_bar = library.row_sums(folded_bar * W) if need_factor else None
            W_bar = reference.folded(folded_bar, factor) if need_W else None
        return (s_bar, s_plus_bar, W_bar, factor_bar, a_bar, z_plus_bar, a_before_bar, z_before_bar, *(None,) * 8)


def dual_transposed_phi(
    s: Tensor,  # [N, C_out, ...]
    s_plus: Tensor,  # [N, C_out, ...]
    W: Tensor,  # [C_out, C_in/groups, *kernel]
    geometry: Geometry,
    in_size: tuple[int, ...],
    factor: Tensor | None = None,  # [C_out]
    a: Tensor | None = None,  # [N, C_in, *in_size]
    z_plus: Tensor | None = None,  # [N, C_in, *in_size]
    eps: float | Tensor = 0.0,
    eps_plus: float = 0.0,
    *,
    before: tuple | None = None,
    handed_over: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # ([N, C_in, *in_size], [N, C_in, *in_size])
    """Both maps of Dual back through a linear map, ``g = W~^T s`` and ``g+ = W~+^T s+``, and through the ReLU before it.

    ``W~ = factor . W``, ``W~+ = max(W~, 0)``; then `dual_phi` where ``a`` is given (Faster ISNet, arXiv 2401.08409;
    semantics.md sections 1 and 4). Its backward is first order. Deterministic where the library's convolutions are. Under
    autocast it runs in the autocast dtype.

    The adjoint of a `dual_phi` reads the result of the products of the layer before it in the backward, so one kernel does
    both: the op that reads ``(s, s_plus)`` can take over the adjoint of the `dual_phi` that made them (``before``), which is
    told so (``handed_over``) and passes on what it gets. Correct only where nothing else reads that pair.

    Args:
        s, s_plus: relevance per unit of pre-activation of the two maps, ``[N, C_out, ...]``. Get gradients.
        W: weight ``[C_out, C_in/groups, *kernel]``. Gets a gradient.
        geometry: `conv_geometry(...)` or `linear_geometry()`.
        in_size: spatial size of the map's input (ignored by a dense layer).
        factor: scale ``[C_out]`` of the BatchNorm that follows the map. Gets a gradient.
        a: the ReLU's output before the map, ``[N, C_in, *in_size]``, >= 0. Gets a gradient, unless ``handed_over``.
        z_plus: the positive part of its pre-activation, shaped as ``a``. Gets a gradient, unless ``handed_over``.
        eps, eps_plus: as in `dual_phi`, at ``a``.
        before: ``(a, z_plus, eps, eps_plus)`` of the `dual_phi` that made ``s`` and ``s_plus``, if it is handed over to this
            op: their gradients are then those of its ``g`` and ``g_plus``, and its ``a`` and ``z_plus`` get gradients here.
        handed_over: whether the op that reads the results takes over the adjoint of this one's `dual_phi`.
        backend: "auto", "reference" or "cuda".

    Returns:
        ``(s', s+')`` at the ReLU before, or ``(g, g+)`` without ``a``; each ``[N, C_in, *in_size]``.

    Raises:
        ValueError: the two maps differ in shape, or have other channels than ``W``; ``a`` without ``z_plus``.

    Example:
        >>> import torch
        >>> from fisnet_cuda.ops import linear_geometry
        >>> s, W = torch.tensor([[1.0]]), torch.tensor([[2.0, -3.0]])
        >>> dual_transposed_phi(s, s, W, linear_geometry(), ())
        (tensor([[ 2., -3.]]), tensor([[2., 0.]]))
    """
    if s.shape != s_plus.shape:
        raise ValueError(f"s_plus must have the shape of s, {tuple(s.shape)}, got {tuple(s_plus.shape)}")
    channels = s.shape[1 if geometry.spatial else -1]
    if channels != W.shape[0]:
        raise ValueError(f"s has {channels} channels and W has {W.shape[0]} outputs: they must be equal")
    if (a is None) != (z_plus is None):
        raise ValueError("a and z_plus go together: pass both (a ReLU before the map) or neither")
    dtype = _compute_dtype(s)
    s, s_plus, W = s.to(dtype), s_plus.to(dtype), W.to(dtype)
    eps, in_size = as_epsilon(eps), tuple(in_size)
    if not torch.is_grad_enabled():
        return dispatch.run("dual_transposed_phi", backend, s, s_plus, W, geometry, in_size, factor, a, z_plus, eps, eps_plus)
    a_before, z_plus_before, eps_before, eps_plus_before = before or (None, None, 0.0, 0.0)
    return _DualTransposedPhi.apply(
        s, s_plus, W, factor, a, z_plus, a_before, z_plus_before, eps, float(eps_plus), as_epsilon(eps_before),
        float(eps_plus_before), tuple(geometry), in_size, handed_over, backend,
    )  # fmt: skip


class _DualPhiHandedOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, g_plus, a, z_plus, eps, eps_plus, backend):
        return kernel("dual_phi", backend, g)(g, g_plus, a, z_plus, eps, eps_plus)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_bar, g_plus_bar):
        return g_bar, g_plus_bar, None, None, None, None, None


def dual_phi_handed_over(
    g: Tensor, g_plus: Tensor, a: Tensor, z_plus: Tensor, eps: float | Tensor, eps_plus: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`dual_phi` whose adjoint is taken over by the `dual_transposed_phi` that alone reads its results (``before``).

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1)
        >>> dual_phi_handed_over(one, one, one, 3 * one, eps=1.0, eps_plus=1.0)
        (tensor([[0.5000]]), tensor([[0.2500]]))
    """
    if not torch.is_grad_enabled():
        return kernel("dual_phi", backend, g)(g, g_plus, a, z_plus, as_epsilon(eps), float(eps_plus))
    return _DualPhiHandedOver.apply(g, g_plus, a, z_plus, as_epsilon(eps), float(eps_plus), backend)


def _where_positive(t: Tensor, W: Tensor) -> Tensor:
    """``t`` where ``W > 0``, else 0: the derivative of the positive part."""
    return torch.ops.aten.threshold_backward(t, W, 0)


def _all_but_channels(t: Tensor, geometry: Geometry) -> list[int]:
    return [0, *range(2, t.dim())] if geometry.spatial else list(range(t.dim() - 1))
