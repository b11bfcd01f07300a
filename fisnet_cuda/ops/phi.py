"""What LRP-epsilon and Dual do at a ReLU, differentiable to first order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from .._backend import kernel

# The Functions here take ctx in forward: with setup_context, torch binds the arguments by signature at every call, 14 us
# that small networks (and CUDA launches) would wait for.


def gathered(bars: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a result's consumers as two summands, ``(s_bar, join)``; None for what nobody gave."""
    given = [bar for bar in bars if bar is not None]
    if len(given) > 2:
        given = [given[0], sum(given[2:], given[1])]
    return given[0] if given else None, given[1] if len(given) > 1 else None


class _PhiScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, a, eps, skip, scale, rest, copies, handed_over, backend):
        out, s = kernel("phi_scale", backend, g)(g, a, eps, skip, scale, rest)
        ctx.handed_over = handed_over
        if handed_over:
            ctx.has_skip = skip is not None
            return out
        relative = isinstance(eps, Tensor)
        ctx.save_for_backward(s, a, scale, eps if relative else None)
        ctx.eps = None if relative else eps
        ctx.has_skip, ctx.has_rest, ctx.backend = skip is not None, rest is not None, backend
        ctx.set_materialize_grads(False)  # a consumer without a gradient costs nothing
        return out if copies == 1 else (out, *(out.detach() for _ in range(copies - 1)))

    @staticmethod
    @once_differentiable
    def backward(ctx, *s_bars):
        if ctx.handed_over:
            return s_bars[0], None, None, s_bars[0] if ctx.has_skip else None, *[None] * 5
        s, a, scale, eps = ctx.saved_tensors
        s_bar, join = gathered(s_bars)
        if s_bar is None:
            return (None,) * 9
        if ctx.has_rest and join is not None:  # rest's gradient is the whole of it
            s_bar, join = s_bar + join, None
        g_bar, a_bar, scale_bar = kernel("phi_scale_backward", ctx.backend, s)(
            s_bar, s, a, ctx.eps if eps is None else eps, scale, ctx.needs_input_grad[1], ctx.needs_input_grad[4], join
        )
        return g_bar, a_bar, None, g_bar if ctx.has_skip else None, scale_bar, s_bar if ctx.has_rest else None, *[None] * 3


def phi_scale(
    g: Tensor,  # [N*K, C, ...]
    a: Tensor,  # [N, C, ...]
    eps: float | Tensor,
    skip: Tensor | None = None,  # [N*K, C, ...]
    scale: Tensor | None = None,  # [C]
    rest: Tensor | None = None,  # [N*K, C, ...]
    *,
    copies: int = 1,
    handed_over: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:  # [N*K, C, ...]
    """LRP-epsilon through a ReLU in gradient form: ``s = phi(a) . (g + skip)``, ``phi(a) = a / (a + e)``.

    With ``scale`` and ``rest`` also through the BatchNorm before it: ``scale . s + rest``.

    Epsilon rule of Bach et al. 2015 in the form of semantics.md section 1 (Faster ISNet, arXiv 2401.08409): with
    ``R = a . g`` this is ``R / (z + e)`` wherever the unit is alive, and 0 where it is dead. Deterministic; any floating
    dtype; under autocast it runs in the dtype of its inputs.

    Args:
        g: relevance per unit of activation at the ReLU's output, ``[N*K, C, ...]`` (K maps a sample). Gets a gradient.
        a: the ReLU's output, ``[N, C, ...]``, >= 0. Gets a gradient.
        eps: epsilon >= 0, absolute, in units of ``a``; or ``[N, 1, ...]`` from `relative_epsilon`, constant.
        skip: a second consumer's share of ``g``, same shape. Gets a gradient.
        scale: a per-channel factor ``[C]`` (a BatchNorm before the ReLU). Gets a gradient.
        rest: what other consumers give the BatchNorm's input (in a dense block), shaped as ``g``; needs ``scale``. Gets a
            gradient.
        copies: how many consumers the result will have; each may get an output of its own (on a GPU one kernel then joins
            their gradients in the backward; elsewhere it is the same tensor).
        handed_over: for programs: the one reader of the result takes the adjoint of this phi (`transposed_phi` with
            ``source``). What comes back is taken as the gradient of ``g + skip``, and ``a`` gets none.
        backend: "auto", "reference" or "cuda".

    Returns:
        Relevance per unit of pre-activation, shaped and laid out as ``g``; with ``copies`` > 1 a tuple of that many times
        the same memory: do not change it in place.

    Raises:
        ValueError: ``g`` is not ``[N*K, ...]`` over the shape of ``a``; fewer than one copy; ``handed_over`` with ``scale`` or
            copies.

    Example:
        >>> import torch
        >>> phi_scale(torch.ones(1, 2), torch.tensor([[0.0, 0.03]]), eps=0.01)
        tensor([[0.0000, 0.7500]])
    """
    _check_maps("g", g, a)
    eps = as_epsilon(eps)
    if scale is None and rest is not None:
        raise ValueError("rest is added behind scale: pass scale too, or add it yourself")
    if copies < 1:
        raise ValueError(f"copies must be at least 1 (the result itself), got {copies}")
    if handed_over and (scale is not None or copies != 1):
        raise ValueError("handed_over is for a result with one reader and without scale: pass scale=None, copies=1")
    run = kernel("phi_scale", backend, g)
    if torch.is_grad_enabled() and run is not reference.phi_scale:
        return _PhiScale.apply(g, a, eps, skip, scale, rest, copies, handed_over, backend)
    if torch.is_grad_enabled():
        out = _PhiScale.apply(g, a, eps, skip, scale, rest, 1, handed_over, backend)
    else:
        out = run(g, a, eps, skip, scale, rest, keep_s=False)[0]
    return out if copies == 1 else (out,) * copies  # autograd adds the gradients as cheaply


class _DualPhi(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, g_plus, a, z_plus, eps, eps_plus, backend):
        s, s_plus = kernel("dual_phi", backend, g)(g, g_plus, a, z_plus, eps, eps_plus)
        relative = isinstance(eps, Tensor)
        ctx.save_for_backward(a, s, s_plus, z_plus, eps if relative else None)
        ctx.eps, ctx.eps_plus, ctx.backend = None if relative else eps, eps_plus, backend
        return s, s_plus

    @staticmethod
    @once_differentiable
    def backward(ctx, s_bar, s_plus_bar):
        a, s, s_plus, z_plus, eps = ctx.saved_tensors
        g_bar, g_plus_bar, a_bar, z_plus_bar = kernel("dual_phi_backward", ctx.backend, a)(
            s_bar, s_plus_bar, a, s, s_plus, z_plus, ctx.eps if eps is None else eps, ctx.eps_plus
        )
        return g_bar, g_plus_bar, a_bar, z_plus_bar, None, None, None


def dual_phi(
    g: Tensor,  # [N, C, ...]
    g_plus: Tensor,  # [N, C, ...]
    a: Tensor,  # [N, C, ...]
    z_plus: Tensor,  # [N, C, ...]
    eps: float | Tensor,
    eps_plus: float,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # ([N, C, ...], [N, C, ...])
    """Both rules of Dual ISNet at one ReLU: ``s = phi(a) g`` (epsilon) and ``s+ = a g+ / (z+ + e)`` (z+).

    Faster ISNet, arXiv 2401.08409; semantics.md sections 1 and 4. Deterministic.

    Args:
        g, g_plus: relevance per unit of activation of the two maps, ``[N, C, ...]``. Get gradients.
        a: the ReLU's output, ``[N, C, ...]``, >= 0. Gets a gradient.
        z_plus: the positive part of the pre-activation, ``W~+ a' + b~+``, ``[N, C, ...]``. Gets a gradient.
        eps: of the epsilon rule, a number or ``[N, 1, ...]``.
        eps_plus: of the z+ rule, a number.
        backend: "auto", "reference" or "cuda".

    Returns:
        ``(s, s_plus)``, each ``[N, C, ...]``.

    Raises:
        ValueError: the four tensors differ in shape.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1)
        >>> dual_phi(one, one, one, 3 * one, eps=1.0, eps_plus=1.0)
        (tensor([[0.5000]]), tensor([[0.2500]]))
    """
    for name, t in (("g_plus", g_plus), ("a", a), ("z_plus", z_plus)):
        if t.shape != g.shape:
            raise ValueError(f"{name} must have the shape of g, {tuple(g.shape)}, got {tuple(t.shape)}")
    return _DualPhi.apply(g, g_plus, a, z_plus, as_epsilon(eps), float(eps_plus), backend)


def relative_epsilon(a: Tensor, eps: float) -> Tensor:  # [N, C, ...] -> [N, 1, ...]
    """``e = eps . rms(a)``, the root mean square of each sample's own activation; detached, never 0.

    Args:
        a: activations ``[N, C, ...]``.
        eps: the fraction of the layer's scale, > 0.

    Returns:
        ``[N, 1, ...]`` in the dtype of ``a``: a map stays independent of the rest of the batch.

    Example:
        >>> import torch
        >>> relative_epsilon(torch.tensor([[3.0, 4.0, 0.0, 0.0]]), 0.1)
        tensor([[0.2500]])
    """
    return reference.relative_epsilon(a, eps)


class _Ratio(torch.autograd.Function):
    @staticmethod
    def forward(ctx, R, z, eps, nonneg, backend):
        s, den = kernel("ratio", backend, R)(R, z, eps, nonneg)
        ctx.save_for_backward(s, den)
        ctx.backend = backend
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx, s_bar):
        s, den = ctx.saved_tensors
        R_bar, z_bar = kernel("ratio_backward", ctx.backend, s)(s_bar, s, den, ctx.needs_input_grad[1])
        return R_bar, z_bar, None, None, None


def stabilised_ratio(
    R: Tensor,  # [N*K, ...]
    z: Tensor,  # [N, ...]
    eps: float | Tensor,
    nonneg: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:  # [N*K, ...]
    """``R / (z + e sign z)``, ``sign 0 = +1``, over K maps: relevance per unit of ``z``; 0/0 is 0.

    The division of every rule in ratio form (Bach et al. 2015). Deterministic.

    Args:
        R: relevance ``[N*K, ...]``. Gets a gradient.
        z: the value that carries it, ``[N, ...]``. Gets a gradient.
        eps: epsilon >= 0, a number or ``[N, 1, ...]`` (constant), in units of ``z``.
        nonneg: ``z`` is known to be >= 0 (the sums of z+), which saves passes.
        backend: "auto", "reference" or "cuda".

    Returns:
        Shaped as ``R``.

    Raises:
        ValueError: ``R`` is not ``[N*K, ...]`` over the shape of ``z``.

    Example:
        >>> import torch
        >>> stabilised_ratio(torch.ones(1, 2), torch.tensor([[1.0, -1.0]]), 1.0)
        tensor([[ 0.5000, -0.5000]])
    """
    _check_maps("R", R, z)
    eps = as_epsilon(eps)
    if not torch.is_grad_enabled():
        return kernel("ratio", backend, R)(R, z, eps, nonneg)[0]
    return _Ratio.apply(R, z, eps, nonneg, backend)


def times(v: Tensor, g: Tensor) -> Tensor:
    """``R = v . g`` over K maps: ``v [N, ...]``, ``g [N*K, ...]``.

    Example:
        >>> import torch
        >>> times(torch.tensor([[2.0]]), torch.tensor([[1.0], [3.0]]))
        tensor([[2.],
                [6.]])
    """
    _check_maps("g", g, v)
    g_k, v_k = reference.phi.per_sample(g, v)
    R = g_k * v_k
    return reference.phi.fold_maps(R, v)


def as_epsilon(eps: float | Tensor) -> float | Tensor:
    """An epsilon as ops keep it: a tensor (one a sample) as it is, a number as a float.

    Example:
        >>> as_epsilon(1)
        1.0
    """
    return eps if isinstance(eps, Tensor) else float(eps)


def _check_maps(name: str, r: Tensor, a: Tensor) -> None:
    """``r`` is ``[N*K, *rest]`` over ``a [N, *rest]``."""
    n = a.shape[0]
    if r.shape[1:] != a.shape[1:] or (r.shape[0] % n if n else r.shape[0]):
        raise ValueError(
            f"{name} must be [N*K, {', '.join(map(str, a.shape[1:]))}] over the activation's N={n}, got {tuple(r.shape)}"
        )
