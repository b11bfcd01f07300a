"""The classifier's head: the start of relevance at the logits, and its way through a global average pool (kernel 11)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .phi import Epsilon, dual_phi, dual_phi_backward, phi_scale, phi_scale_backward, stabilise


def one_hot(index: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """``[N, K] -> [N, K, C]`` without looking at the values (``torch.nn.functional.one_hot`` does).

    Example:
        >>> import torch
        >>> one_hot(torch.tensor([[2]]), 3, torch.float32)
        tensor([[[0., 0., 1.]]])
    """
    return (index.unsqueeze(-1) == torch.arange(classes, device=index.device)).to(dtype)


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)


def _slope(P_c: Tensor, eta_eps: float) -> Tensor:
    """``d eta / d P_c``, times the ``P_c`` of softmax's derivative."""
    return (1 / (P_c + eta_eps) + 1 / (1 - P_c + eta_eps)) * P_c


def eta_start(
    logits: Tensor,  # [N, C]
    index: Tensor,  # [N, K]
    eta_eps: float,
) -> Tensor:  # [N, K, C]
    """``slope(P_c) (delta_jc - P_j)``: the gradient of ``eta = log(P_c + t) - log(1 - P_c + t)``; float32 or wider."""
    P = _softmax(logits)
    slope = _slope(P.gather(1, index), eta_eps)
    return slope.unsqueeze(-1) * (one_hot(index, logits.shape[1], P.dtype) - P.unsqueeze(1))


def eta_start_backward(
    start_bar: Tensor,  # [N, K, C]
    logits: Tensor,  # [N, C]
    index: Tensor,  # [N, K]
    eta_eps: float,
) -> Tensor:  # [N, C]
    """The adjoint with respect to the logits.

    With ``D_k = sum_j start_bar[k, j] P_j`` and ``w_k = slope'(P_c) (start_bar[k, c] - D_k)``:
    ``P_bar_j = sum_k (delta_jc w_k - slope_k start_bar[k, j])``, ``logits_bar = P (P_bar - <P_bar, P>)``.
    """
    P = _softmax(logits)
    P_c = P.gather(1, index)
    slope = _slope(P_c, eta_eps)
    derivative = eta_eps / (P_c + eta_eps).square() + (1 + eta_eps) / (1 - P_c + eta_eps).square()
    D = torch.einsum("nkj,nj->nk", start_bar, P)
    w = derivative * (start_bar.gather(2, index.unsqueeze(-1)).squeeze(-1) - D)
    P_bar = torch.einsum("nk,nkj->nj", -slope, start_bar).scatter_add_(1, index, w)
    total = (w * P_c - slope * D).sum(1, keepdim=True)
    return (P * (P_bar - total)).to(logits.dtype)


def _with_bias(P: Tensor, bias: Tensor | None) -> Tensor:
    return P if bias is None else P + bias.clamp(min=0)


def plus_start(
    P: Tensor,  # [..., C]
    bias: Tensor | None,  # [C]
    eps: float,
) -> Tensor:  # [..., C]
    """``s+ = z+ / (z+ + e)``, ``z+ = P + max(b, 0)``."""
    z_plus = _with_bias(P, bias)
    return z_plus / stabilise(z_plus, eps, nonneg=True)


def plus_start_backward(
    s_bar: Tensor,  # [..., C]
    P: Tensor,  # [..., C]
    bias: Tensor | None,  # [C]
    eps: float,
) -> Tensor:  # [..., C]
    """``P_bar = e s_bar / (z+ + e)^2``, as two quotients."""
    den = stabilise(_with_bias(P, bias), eps, nonneg=True)
    return s_bar / den * (eps / den)


def spread(g: Tensor, size: Sequence[int]) -> Tensor:
    """A global average pool's transpose: ``g [N*K, C, 1, ...] -> [N*K, C, *size]``, a view."""
    return (g / math.prod(size)).expand(*g.shape[:2], *size)


def _collect(g_bar: Tensor) -> Tensor:
    """The adjoint of `spread`."""
    return g_bar.sum(list(range(2, g_bar.dim())), keepdim=True).div_(math.prod(g_bar.shape[2:]))


def pooled_phi(
    g: Tensor,  # [N*K, C, 1, ...]
    a: Tensor,  # [N, C, ...]
    eps: Epsilon,
) -> Tensor:  # [N*K, C, ...]
    """``s = phi(a) . g / (H W)``: LRP-epsilon at the ReLU before a global average pool."""
    return phi_scale(spread(g, a.shape[2:]), a, eps)[1]


def pooled_phi_backward(
    s_bar: Tensor,  # [N*K, C, ...]
    s: Tensor,  # [N*K, C, ...]
    g: Tensor,  # [N*K, C, 1, ...]
    a: Tensor,  # [N, C, ...]
    eps: Epsilon,
    need_a: bool = True,
) -> tuple[Tensor, Tensor | None]:  # ([N*K, C, 1, ...], [N, C, ...])
    """``(g_bar, a_bar)``: ``g_bar`` is the mean of ``phi(a) s_bar`` over the pixels. (``s`` is known from ``g`` and ``a``.)"""
    g_bar, a_bar, _ = phi_scale_backward(s_bar, s, a, eps, need_a=need_a)
    return _collect(g_bar), a_bar


def pooled_dual_phi(
    g: Tensor,  # [N, C, 1, ...]
    g_plus: Tensor,  # [N, C, 1, ...]
    a: Tensor,  # [N, C, ...]
    z_plus: Tensor,  # [N, C, ...]
    eps: Epsilon,
    eps_plus: float,
) -> tuple[Tensor, Tensor]:  # ([N, C, ...], [N, C, ...])
    """Both rules of Dual there: ``s = phi(a) g / (H W)``, ``s+ = a (g+ / (H W)) / (z+ + e)``."""
    return dual_phi(spread(g, a.shape[2:]), spread(g_plus, a.shape[2:]), a, z_plus, eps, eps_plus)


def pooled_dual_phi_backward(
    s_bar: Tensor,  # [N, C, ...]
    s_plus_bar: Tensor,  # [N, C, ...]
    g: Tensor,  # [N, C, 1, ...]
    g_plus: Tensor,  # [N, C, 1, ...]
    a: Tensor,  # [N, C, ...]
    s: Tensor,  # [N, C, ...]
    s_plus: Tensor,  # [N, C, ...]
    z_plus: Tensor,  # [N, C, ...]
    eps: Epsilon,
    eps_plus: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # ([N, C, 1, ...], [N, C, 1, ...], [N, C, ...], [N, C, ...])
    """``(g_bar, g+_bar, a_bar, z+_bar)``, as `dual_phi_backward` with means over the pixels."""
    g_bar, g_plus_bar, a_bar, z_plus_bar = dual_phi_backward(s_bar, s_plus_bar, a, s, s_plus, z_plus, eps, eps_plus)
    return _collect(g_bar), _collect(g_plus_bar), a_bar, z_plus_bar
