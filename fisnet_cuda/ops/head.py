"""The classifier's head: where relevance starts, and how it leaves a global average pool; differentiable to first order."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._backend import kernel
from .phi import as_epsilon


class _EtaStart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, index, eta_eps, backend):
        ctx.save_for_backward(logits, index)
        ctx.eta_eps, ctx.backend = eta_eps, backend
        return kernel("eta_start", backend, logits)(logits, index, eta_eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, start_bar):
        logits, index = ctx.saved_tensors
        return kernel("eta_start_backward", ctx.backend, logits)(start_bar, logits, index, ctx.eta_eps), None, None, None


def eta_start(
    logits: Tensor,  # [N, C]
    index: Tensor,  # [N, K]
    eta_eps: float,
    *,
    backend: str = "auto",
) -> Tensor:  # [N, K, C]
    """Start of Selective ISNet: the gradient of ``eta = log(P_c + t) - log(1 - P_c + t)`` by the logits, ``P = softmax``.

    ``start_j = (1/(P_c + t) + 1/(1 - P_c + t)) P_c (delta_jc - P_j)`` (semantics.md section 3; Faster ISNet, arXiv 2401.08409).
    Deterministic; float32 or wider inside, whatever the dtype of the logits and autocast.

    Args:
        logits: ``[N, C]``. Gets a gradient.
        index: the class ``c`` of every map, ``[N, K]``, int64, in ``[0, C)``.
        eta_eps: ``t`` >= 0; 1e-2 in the paper.
        backend: "auto", "reference" or "cuda".

    Returns:
        Relevance per unit of each logit, ``[N, K, C]``, float32 or wider, contiguous.

    Raises:
        ValueError: ``logits`` is not ``[N, C]``, or ``index`` not ``[N, K]``.

    Example:
        >>> import torch
        >>> eta_start(torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.long), 0.0)
        tensor([[[ 1., -1.]]])
    """
    if logits.dim() != 2 or index.dim() != 2 or index.shape[0] != logits.shape[0]:
        raise ValueError(f"logits must be [N, C] and index [N, K], got {tuple(logits.shape)} and {tuple(index.shape)}")
    return _EtaStart.apply(logits, index, float(eta_eps), backend)


class _PlusStart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, P, bias, eps, backend):
        ctx.save_for_backward(P, bias)
        ctx.eps, ctx.backend = eps, backend
        return kernel("plus_start", backend, P)(P, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, s_bar):
        P, bias = ctx.saved_tensors
        return kernel("plus_start_backward", ctx.backend, P)(s_bar, P, bias, ctx.eps), None, None, None


def plus_start(
    P: Tensor,  # [..., C]
    bias: Tensor | None,  # [C]
    eps: float,
    *,
    backend: str = "auto",
) -> Tensor:  # [..., C]
    """Start of Dual's z+ map: ``s+ = z+ / (z+ + e)``, ``z+ = P + max(b, 0)`` of the last dense layer.

    It explains all logits at once, each by its own positive sum (semantics.md section 4; Faster ISNet, arXiv 2401.08409).
    Deterministic.

    Args:
        P: the sums of positive contributions, ``[..., C]``, >= 0. Gets a gradient.
        bias: ``[C]`` or None; a constant of the rule.
        eps: epsilon >= 0, absolute, in units of ``z``.
        backend: "auto", "reference" or "cuda".

    Returns:
        Relevance per unit of ``z+``, ``[..., C]``; 0/0 is 0.

    Example:
        >>> import torch
        >>> plus_start(torch.tensor([[1.0, 2.0]]), torch.tensor([-1.0, 1.0]), 1.0)
        tensor([[0.5000, 0.7500]])
    """
    return _PlusStart.apply(P, None if bias is None else bias.detach(), float(eps), backend)


class _PooledPhi(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, a, eps, backend):
        s = kernel("pooled_phi", backend, g)(g, a, eps)
        relative = isinstance(eps, Tensor)
        ctx.save_for_backward(s, g, a, eps if relative else None)
        ctx.eps, ctx.backend = None if relative else eps, backend
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx, s_bar):
        s, g, a, eps = ctx.saved_tensors
        eps = ctx.eps if eps is None else eps
        g_bar, a_bar = kernel("pooled_phi_backward", ctx.backend, s)(s_bar, s, g, a, eps, ctx.needs_input_grad[1])
        return g_bar, a_bar, None, None


def pooled_phi(
    g: Tensor,  # [N*K, C, 1, ...]
    a: Tensor,  # [N, C, ...]
    eps: float | Tensor,
    *,
    backend: str = "auto",
) -> Tensor:  # [N*K, C, ...]
    """Relevance through a global average pool and LRP-epsilon at the ReLU before it: ``s = phi(a) . g / (H W)``.

    `avg_pool_transposed` and `phi_scale` in one pass (semantics.md section 1; Bach et al. 2015). Deterministic.

    Args:
        g: relevance per unit of the pool's output, ``[N*K, C, 1, ...]``. Gets a gradient.
        a: the ReLU's output, ``[N, C, ...]``, >= 0. Gets a gradient.
        eps: epsilon >= 0, absolute, in units of ``a``; or ``[N, 1, ...]`` from `relative_epsilon`, constant.
        backend: "auto", "reference" or "cuda".

    Returns:
        Relevance per unit of pre-activation, ``[N*K, C, ...]``, laid out as ``a``.

    Raises:
        ValueError: ``g`` is not ``[N*K, C, 1, ...]`` over the shape of ``a``.

    Example:
        >>> import torch
        >>> pooled_phi(torch.tensor([[[8.0]]]), torch.tensor([[[0.0, 1.0, 3.0, 0.0]]]), eps=1.0)
        tensor([[[0.0000, 1.0000, 1.5000, 0.0000]]])
    """
    _check_pooled("g", g, a)
    return _PooledPhi.apply(g, a, as_epsilon(eps), backend)


class _PooledDualPhi(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, g_plus, a, z_plus, eps, eps_plus, backend):
        s, s_plus = kernel("pooled_dual_phi", backend, g)(g, g_plus, a, z_plus, eps, eps_plus)
        relative = isinstance(eps, Tensor)
        ctx.save_for_backward(g, g_plus, a, s, s_plus, z_plus, eps if relative else None)
        ctx.eps, ctx.eps_plus, ctx.backend = None if relative else eps, eps_plus, backend
        return s, s_plus

    @staticmethod
    @once_differentiable
    def backward(ctx, s_bar, s_plus_bar):
        *tensors, eps = ctx.saved_tensors
        bars = kernel("pooled_dual_phi_backward", ctx.backend, s_bar)(
            s_bar, s_plus_bar, *tensors, ctx.eps if eps is None else eps, ctx.eps_plus
        )
        return *bars, None, None, None


def pooled_dual_phi(
    g: Tensor,  # [N, C, 1, ...]
    g_plus: Tensor,  # [N, C, 1, ...]
    a: Tensor,  # [N, C, ...]
    z_plus: Tensor,  # [N, C, ...]
    eps: float | Tensor,
    eps_plus: float,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # ([N, C, ...], [N, C, ...])
    """Both rules of Dual at the ReLU before a global average pool: `dual_phi` of the pool's transposes, in one pass.

    ``s = phi(a) g / (H W)``, ``s+ = a (g+ / (H W)) / (z+ + e)``; Faster ISNet, arXiv 2401.08409; semantics.md sections 1 and 4.
    Deterministic.

    Args:
        g, g_plus: relevance per unit of the pool's output of the two maps, ``[N, C, 1, ...]``. Get gradients.
        a: the ReLU's output, ``[N, C, ...]``, >= 0. Gets a gradient.
        z_plus: the positive part of its pre-activation, ``[N, C, ...]``. Gets a gradient.
        eps: of the epsilon rule, a number or ``[N, 1, ...]``.
        eps_plus: of the z+ rule, a number.
        backend: "auto", "reference" or "cuda".

    Returns:
        ``(s, s_plus)``, each ``[N, C, ...]``.

    Raises:
        ValueError: shapes do not fit each other.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1, 2)
        >>> pooled_dual_phi(2 * one[..., :1], 2 * one[..., :1], one, 3 * one, eps=1.0, eps_plus=1.0)
        (tensor([[[0.5000, 0.5000]]]), tensor([[[0.2500, 0.2500]]]))
    """
    for name, t in (("g", g), ("g_plus", g_plus)):
        _check_pooled(name, t, a)
    if g.shape != g_plus.shape or g.shape[0] != a.shape[0] or z_plus.shape != a.shape:
        raise ValueError(f"g and g_plus must have one map a sample, and z_plus the shape of a, {tuple(a.shape)}")
    return _PooledDualPhi.apply(g, g_plus, a, z_plus, as_epsilon(eps), float(eps_plus), backend)


def _check_pooled(name: str, g: Tensor, a: Tensor) -> None:
    n = a.shape[0]
    ones = (1,) * (a.dim() - 2)
    if g.shape[1:] != (a.shape[1], *ones) or (g.shape[0] % n if n else g.shape[0]):
        wanted = ", ".join(map(str, (a.shape[1], *ones)))
        raise ValueError(f"{name} must be [N*K, {wanted}] over the activation's N={n}, got {tuple(g.shape)}")
