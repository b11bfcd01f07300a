"""Relevance through convolutions and dense layers: the transposed product as a forward op, and with it the ReLU's phi."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dispatch, reference
from .._backend import kernel
from ..reference import Geometry
from . import library
from .layout import laid_out_as, undivided
from .linear_maps import _compute_dtype
from .phi import _check_maps, as_epsilon, gathered


class _TransposedPhi(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, s, W, factor, a, skip, scale, rest, a_in, eps, eps_in, geometry, in_size, handed_over, copies, alias, backend
    ):  # fmt: skip
        given, s = s, undivided(s.to(W.dtype))
        out, after = dispatch.run(
            "transposed_phi", backend, s, W, Geometry(*geometry), in_size, factor, a, eps, skip, scale, rest
        )
        own_phi = a is not None and not handed_over  # whose adjoint is taken here
        tensors = [after, a, scale, eps if isinstance(eps, Tensor) else None] if own_phi else [None] * 4
        ctx.save_for_backward(s, W, factor, a_in, eps_in if isinstance(eps_in, Tensor) else None, *tensors)
        ctx.eps, ctx.eps_in = (None if isinstance(e, Tensor) else e for e in (eps, eps_in))
        ctx.geometry, ctx.alias, ctx.backend = geometry, alias, backend
        ctx.has_skip, ctx.has_rest = skip is not None, rest is not None
        ctx.set_materialize_grads(False)  # a consumer without a gradient costs nothing
        if copies == 1 and not alias:
            return out
        return out, *([given.detach()] if alias else []), *(out.detach() for _ in range(copies - 1))

    @staticmethod
    @once_differentiable
    def backward(ctx, *bars):
        s, W, factor, a_in, eps_in, after, a, scale, eps = ctx.saved_tensors
        need_s, need_W, need_factor, need_a, _, need_scale, _, need_a_in = ctx.needs_input_grad[:8]
        eps, eps_in = ctx.eps if eps is None else eps, ctx.eps_in if eps_in is None else eps_in
        geometry, backend = Geometry(*ctx.geometry), ctx.backend
        s_bar = W_bar = factor_bar = a_bar = skip_bar = scale_bar = rest_bar = a_in_bar = None
        s_join = bars[1] if ctx.alias else None
        out_bar, out_join = gathered((bars[0], *bars[1 + ctx.alias :]))
        if out_bar is not None:
            g_bar = out_bar
            if a is not None:
                if ctx.has_rest and out_join is not None:  # rest's gradient is the whole of it
                    out_bar, out_join = out_bar + out_join, None
                g_bar, a_bar, scale_bar = kernel("phi_scale_backward", backend, after)(
                    out_bar, after, a, eps, scale, need_a, need_scale, out_join
                )
            skip_bar, rest_bar = g_bar if ctx.has_skip else None, out_bar if ctx.has_rest else None
            g_bar = laid_out_as(g_bar.to(W.dtype), s)
            if need_W:
                folds = factor is not None and library.folds_into_weight(s, W)
                scaled = s if factor is None or folds else s * library.columns(factor, s, geometry)
                W_bar = kernel("wgrad", backend, g_bar)(g_bar, scaled, W, geometry)
                if folds:  # the gradient of the folded weight holds that of the factor
                    factor_bar = library.row_sums(W_bar * W) if need_factor else None
                    W_bar = W_bar.mul_(factor.to(W.dtype).view(-1, *[1] * (W.dim() - 1)))
            need_sum, total = need_factor and factor_bar is None, None
            if a_in is not None and (need_s or need_a_in or need_sum):
                s_bar, a_in_bar, total = dispatch.run(
                    "fprop_adjoint", backend, g_bar, W, geometry, factor, a_in, s, eps_in, s_join, need_a_in, need_sum
                )
            elif need_s or need_sum:
                s_bar, total = library.fprop_with_factor(g_bar, W, geometry, factor, s, need_sum, backend)
            factor_bar = total if need_sum else factor_bar
        elif s_join is not None:  # only the other readers of s have a gradient
            s_bar, a_in_bar, _ = kernel("phi_scale_backward", backend, s)(s_join, s, a_in, eps_in, None, need_a_in, False)
        return s_bar, W_bar, factor_bar, a_bar, skip_bar, scale_bar, rest_bar, a_in_bar, *[None] * 8


def transposed_phi(
    s: Tensor,  # [N*K, C_out, ...]
    W: Tensor,  # [C_out, C_in/groups, *kernel]
    geometry: Geometry,
    in_size: tuple[int, ...],
    factor: Tensor | None = None,  # [C_out]
    a: Tensor | None = None,  # [N, C_in, *in_size]
    eps: float | Tensor = 0.0,
    skip: Tensor | None = None,  # [N*K, C_in, *in_size]
    scale: Tensor | None = None,  # [C_in]
    rest: Tensor | None = None,  # [N*K, C_in, *in_size]
    source: tuple[Tensor, float | Tensor] | None = None,  # ([N, C_out, ...], eps)
    *,
    handed_over: bool = False,
    copies: int = 1,
    alias: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:  # [N*K, C_in, *in_size]
    """Relevance through a linear map and LRP-epsilon at the ReLU before it: ``s' = phi(a) . (W^T (factor . s) + skip)``.

    `transposed` and `phi_scale` in one pass (semantics.md section 1; Bach et al. 2015; Faster ISNet, arXiv 2401.08409), and
    like that with ``scale . s' + rest`` through the BatchNorm before the ReLU. Its backward is first order: phi's adjoint,
    one product for ``s``, one for ``W``. Deterministic where the library's convolutions are. Under autocast the product runs
    in the autocast dtype.

    A fused kernel joins a product with the phi **behind** it here, and with the phi **before** it in the backward. So that
    both passes over memory are saved, a program may move phi's adjoint from the op that made ``s`` (``handed_over``) to the
    one that reads it (``source``). The two belong together: with only one of them, gradients are wrong.

    Args:
        s: relevance per unit of pre-activation ``[N*K, C_out, ...]`` (dense: ``[N*K, ..., C_out]``). Gets a gradient.
        W: weight ``[C_out, C_in/groups, *kernel]`` (dense: ``[C_out, C_in]``). Gets a gradient.
        geometry: `conv_geometry(...)` or `linear_geometry()`.
        in_size: spatial size of the map's input (ignored by a dense layer).
        factor: factor ``[C_out]`` of the BatchNorm that follows the map. Gets a gradient.
        a: the ReLU's output and the map's input, ``[N, C_in, *in_size]``, >= 0; None for no ReLU (phi is 1). Gets a gradient.
        eps: epsilon >= 0, absolute, in units of ``a``; or ``[N, 1, ...]`` from `relative_epsilon`, constant.
        skip: what other consumers of ``a`` give, shaped as the result. Gets a gradient.
        scale: a per-channel factor ``[C_in]`` (a BatchNorm before the ReLU). Gets a gradient.
        rest: what other consumers give the BatchNorm's input, shaped as the result; needs ``scale``. Gets a gradient.
        source: for programs: ``(a, eps)`` of the ReLU at which ``s`` was made by an op with ``handed_over``. The gradient of
            ``s`` is then that of the ``g`` before phi, and this ``a`` gets its gradient here.
        handed_over: for programs: the one reader of the result has ``source``. What comes back is taken as the gradient of
            ``W^T (factor . s) + skip``, and ``a`` gets none.
        copies: how many consumers the result will have, as in `phi_scale`.
        alias: with ``source``: also return ``s``, for its other readers; their gradient is joined in the same pass.
        backend: "auto", "reference" or "cuda".

    Returns:
        ``[N*K, C_in, *in_size]``; with ``alias`` or ``copies`` > 1 a tuple: the result, ``s``, the result again. All of it is
        shared memory: do not change it in place.

    Raises:
        ValueError: channels of ``s`` and ``W`` do not match; ``a`` is no input of the map, or ``s`` does not fit the source's
            ``a``; an option without what it needs.

    Example:
        >>> import torch
        >>> from fisnet_cuda.ops import linear_geometry
        >>> s, W, a = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[0.0, 1.0]])
        >>> transposed_phi(s, W, linear_geometry(), (), a=a, eps=1.0)
        tensor([[0., 3.]])
    """
    in_size = tuple(in_size)
    _check(s, W, geometry, in_size, a)
    if scale is not None or rest is not None or handed_over or copies != 1:
        _check_options(a, scale, rest, handed_over, copies)
    if alias and source is None:
        raise ValueError("alias is for the other readers of a handed over s: pass source=(a, eps) of its ReLU")
    a_in, eps_in = None, 0.0
    if source is not None:
        a_in, eps_in = source[0], as_epsilon(source[1])
        _check_maps("s", s, a_in)
    eps, W = as_epsilon(eps), W.to(_compute_dtype(s))
    if not torch.is_grad_enabled():
        made, _ = dispatch.run(
            "transposed_phi", backend, s.to(W.dtype), W, geometry, in_size, factor, a, eps, skip, scale, rest, keep_s=False
        )
        return made if copies == 1 and not alias else _with_copies((made, s) if alias else made, copies)
    # autograd adds the gradients of one tensor as cheaply as the reference would
    own = 1 if copies == 1 or kernel("phi_scale", backend, s) is reference.phi_scale else copies
    made = _TransposedPhi.apply(
        s, W, factor, a, skip, scale, rest, a_in, eps, eps_in, tuple(geometry), in_size, handed_over, own, alias, backend
    )
    return made if own == copies else _with_copies(made, copies)


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
        >>> from fisnet_cuda.ops import linear_geometry
        >>> transposed(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0, 1.0], [0.0, 3.0, 1.0]]), linear_geometry(), ())
        tensor([[1., 6., 3.]])
    """
    return transposed_phi(s, W, geometry, in_size, scale, backend=backend)


def _with_copies(made: Tensor | tuple[Tensor, ...], copies: int) -> Tensor | tuple[Tensor, ...]:
    """The result, alone or before the alias of ``s``, and the same tensor again for its other consumers."""
    if copies == 1:
        return made
    first, *others = made if isinstance(made, tuple) else (made,)
    return first, *others, *[first] * (copies - 1)


def _check_options(a: Tensor | None, scale: Tensor | None, rest: Tensor | None, handed_over: bool, copies: int) -> None:
    """What stands behind the product has what it needs."""
    if rest is not None and scale is None:
        raise ValueError("rest is added behind scale: pass scale too, or add it yourself")
    if a is None:
        raise ValueError("scale, handed_over and copies belong to the ReLU's phi: pass a, its output")
    if handed_over and (scale is not None or copies != 1):
        raise ValueError("handed_over is for a result with one reader and without scale: pass scale=None, copies=1")
    if copies < 1:
        raise ValueError(f"copies must be at least 1 (the result itself), got {copies}")


def _check(s: Tensor, W: Tensor, geometry: Geometry, in_size: tuple[int, ...], a: Tensor | None) -> None:
    """``s`` fits the outputs of ``W``, and ``a`` its inputs."""
    of_s, (outputs, inputs, *_) = s.shape, W.shape
    channels = of_s[1 if geometry.spatial else -1]
    if channels != outputs:
        raise ValueError(f"s has {channels} channels and W has {outputs} outputs: they must be equal")
    if a is None:
        return
    sample = (inputs * geometry.groups, *in_size) if geometry.spatial else (*of_s[1:-1], inputs)
    n, *of_a = a.shape
    if tuple(of_a) != sample or (of_s[0] % n if n else of_s[0]):
        wanted = ", ".join(map(str, sample))
        raise ValueError(f"a must be [N, {wanted}], the map's input, and s [N*K, ...]: got {tuple(a.shape)} and {tuple(of_s)}")
