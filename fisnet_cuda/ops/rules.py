"""The rules beyond epsilon, as compositions of the three products of a linear map: z+, alpha-beta, gamma, w^2, flat.

Each takes relevance ``R [N*K, C_out, ...]`` of a map's outputs (BatchNorm folded into ``W`` and ``bias``) and returns either
``g`` with ``R_in = a . g`` or ``R_in`` itself, as it says. ``signed`` tells whether ``a`` may be negative: maps behind a
ReLU save half of the products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._backend import has_kernel, kernel
from ..reference import Geometry
from .library import constant_bn
from .linear_maps import fprop, positive_part
from .linear_phi import transposed
from .phi import stabilised_ratio, times


def channel_bias(t: Tensor, geometry: Geometry) -> Tensor:
    """A per-output vector ``[C_out]`` shaped to be added to the map's output."""
    return t.view(-1, *[1] * geometry.spatial)


def negative_part(W: Tensor) -> Tensor:
    """``max(-W, 0)``, the magnitude of the negative weights.

    Example:
        >>> import torch
        >>> negative_part(torch.tensor([[1.0, -2.0]]))
        tensor([[0., 2.]])
    """
    return positive_part(W, -W.new_ones(W.shape[0]))


def plus_products(a: Tensor, W: Tensor, geometry: Geometry, signed: bool) -> tuple[Tensor, Tensor]:
    """``(P, M)``: the sums of the positive and of the negative contributions (both >= 0) to each output, without bias.

    ``P = W+ a+ + |W-| |a-|``, ``M = |W-| a+ + W+ |a-|``; so ``W a = P - M``.

    Example:
        >>> import torch
        >>> from fisnet_cuda.ops import linear_geometry
        >>> plus_products(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]]), linear_geometry(), signed=False)
        (tensor([[3.]]), tensor([[2.]]))
    """
    W_plus, W_minus = positive_part(W), negative_part(W)
    if not signed:
        return fprop(a, W_plus, None, geometry), fprop(a, W_minus, None, geometry)
    up, down = torch.relu(a), torch.relu(-a)
    P = fprop(up, W_plus, None, geometry) + fprop(down, W_minus, None, geometry)
    return P, fprop(up, W_minus, None, geometry) + fprop(down, W_plus, None, geometry)


def plus_product(a: Tensor, W: Tensor, geometry: Geometry, signed: bool) -> Tensor:
    """``P`` of `plus_products` alone.

    Example:
        >>> import torch
        >>> from fisnet_cuda.ops import linear_geometry
        >>> plus_product(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]]), linear_geometry(), signed=False)
        tensor([[3.]])
    """
    if not signed:
        return fprop(a, positive_part(W), None, geometry)
    P = fprop(torch.relu(a), positive_part(W), None, geometry)
    return P + fprop(torch.relu(-a), negative_part(W), None, geometry)


def by_sign(a: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """``up`` where ``a >= 0``, ``-down`` elsewhere, over K maps: the ``g`` that gives ``R = a+ up + |a-| down``."""
    if up.shape[0] == a.shape[0]:
        return torch.where(a >= 0, up, -down)
    k = up.shape[0] // a.shape[0]
    positive = (a >= 0).unsqueeze(1).expand(-1, k, *a.shape[1:]).flatten(0, 1)
    return torch.where(positive, up, -down)


def where_nonneg(v: Tensor, g: Tensor) -> Tensor:
    """``g`` where the value ``v [N, ...]`` is >= 0, else 0, over K maps: a negative contribution gets no z+ relevance.

    Example:
        >>> import torch
        >>> where_nonneg(torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 3.0]]))
        tensor([[2., 0.]])
    """
    return times((v >= 0).to(g.dtype), g)


def plus_transposed(
    s_plus: Tensor, s_minus: Tensor | None, a: Tensor, W: Tensor, geometry: Geometry, in_size: tuple[int, ...], signed: bool,
    *, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """``g`` with ``R = a . g`` for relevance per unit of ``P`` (``s_plus``) and of ``M`` (``s_minus``): z+ backwards.

    ``g = W+^T s_plus + |W-|^T s_minus`` for ``a >= 0``; for negative inputs the parts change places.

    Example:
        >>> import torch
        >>> from fisnet_cuda.ops import linear_geometry
        >>> a, W = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
        >>> plus_transposed(torch.ones(1, 1), None, a, W, linear_geometry(), (), signed=False)
        tensor([[3., 0.]])
    """
    W_plus = positive_part(W)
    up = transposed(s_plus, W_plus, geometry, in_size, backend=backend)
    if s_minus is None and not signed:
        return up
    W_minus = negative_part(W)
    if s_minus is not None:
        up = up + transposed(s_minus, W_minus, geometry, in_size, backend=backend)
    if not signed:
        return up
    down = transposed(s_plus, W_minus, geometry, in_size, backend=backend)
    if s_minus is not None:
        down = down + transposed(s_minus, W_plus, geometry, in_size, backend=backend)
    return by_sign(a, up, down)


def plus_denominator(P: Tensor, factor: Tensor | None, shift: Tensor | None, *, backend: str = "auto") -> Tensor:
    """``z+ = |scale| P + max(b~, 0)`` for the product ``P`` with weights already signed by ``scale``; as ``P``, ``[N, C, ...]``.

    Args:
        P: ``[N, C, ...]``. Gets a gradient.
        factor: ``|scale| [C]``, or None. Gets a gradient.
        shift: ``b~ [C]``, or None. Gets a gradient.
        backend: "auto", "reference" or "cuda".

    Example:
        >>> import torch
        >>> plus_denominator(torch.ones(1, 1, 1), torch.tensor([2.0]), torch.tensor([0.5]))
        tensor([[[2.5000]]])
    """
    shape = (-1, *[1] * (P.dim() - 2))
    if factor is None:
        return P if shift is None else P + torch.relu(shift).view(shape).to(P.dtype)
    if has_kernel("bn_act", backend, P):  # one pass here, and one for all three gradients
        return constant_bn(P, factor, torch.relu(shift), None, False, backend)
    return torch.addcmul(torch.relu(shift).view(shape), P, factor.view(shape)).to(P.dtype)


def plus_linear_denominator(P: Tensor, bias: Tensor | None) -> Tensor:
    """``z+ = P + max(b, 0)`` of a dense layer, whose channels are the last axis; the bias is detached.

    Example:
        >>> import torch
        >>> plus_linear_denominator(torch.ones(1, 2), torch.tensor([1.0, -1.0]))
        tensor([[2., 1.]])
    """
    return P if bias is None else P + bias.detach().clamp(min=0)


class _PlusAffine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, R, P, u, k, c, eps, backend):
        plus, minus, s, den = kernel("plus_affine", backend, R)(R, P, u, k, c, eps)
        ctx.save_for_backward(s, den, P, u, k)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return plus, minus

    @staticmethod
    @once_differentiable
    def backward(ctx, plus_bar, minus_bar):
        s, den, P, u, k = ctx.saved_tensors
        if plus_bar is None:
            plus_bar = torch.zeros_like(s)
        return *kernel("plus_affine_backward", ctx.backend, s)(plus_bar, minus_bar, s, den, P, u, k), None, None


def plus_affine(
    R: Tensor,  # [N*K, C, ...]
    P: Tensor,  # [N, C, ...]
    u: Tensor | None,  # [N, C, ...]
    bias: Tensor | None,  # [C]
    weight: Tensor | None,  # [C]
    beta: Tensor | None,  # [C]
    mean: Tensor,  # [C]
    rstd: Tensor,  # [C]
    eps: float,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:  # ([N*K, C, ...], [N*K, C, ...])
    """z+ through a BatchNorm that reads several maps (a concatenation): relevance per unit of their two sums.

    With ``P`` and ``M`` the sums of a map's positive and negative contributions (``u = P - M + b``), ``k = gamma rstd`` and
    ``b~ = (b - mean) k + beta``: ``z+ = k+ P + |k-| M + max(b~, 0)``, ``s = R / (z+ + e)``; returns ``(k+ s, |k-| s)``
    (semantics.md section 4: BatchNorm folds into each map before it, per consumer; Faster ISNet, arXiv 2401.08409).

    Args:
        R: relevance of the BatchNorm's output ``[N*K, C, ...]``. Gets a gradient.
        P: from `plus_product` (or the value itself where it is one positive contribution). Gets a gradient.
        u: the BatchNorm's input, from which ``M = P - u + b``; None says ``M = 0``. Gets a gradient.
        bias: the maps' own bias ``[C]`` or None, detached.
        weight, beta, mean, rstd: the BatchNorm's; gamma keeps its gradient.
        eps: of the z+ rule.
        backend: "auto", "reference" or "cuda".

    Returns:
        ``(k+ s, |k-| s)``; the second is None without ``u``.

    Example:
        >>> import torch
        >>> one = torch.ones(1)
        >>> plus_affine(torch.ones(1, 1), torch.ones(1, 1), None, None, one, 0 * one, 0 * one, one, 1.0)
        (tensor([[0.5000]]), None)
    """
    k = rstd if weight is None else weight * rstd
    shift = (-mean if bias is None else bias.detach() - mean) * k
    if beta is not None:
        shift = shift + beta.detach()
    c = shift.clamp(min=0)
    if bias is not None and u is not None:
        # u holds the map's bias; the bias is no contribution, and its gradient through u is taken back here
        c = torch.addcmul(c, (-k).clamp(min=0), bias)
    if not torch.is_grad_enabled():
        return kernel("plus_affine", backend, R)(R, P, u, k, c, float(eps))[:2]
    return _PlusAffine.apply(R, P, u, k, c, float(eps), backend)


def alpha_beta(
    R: Tensor, a: Tensor, W: Tensor, bias: Tensor | None, geometry: Geometry, in_size: tuple[int, ...], signed: bool,
    alpha: float, beta: float, eps: float,
) -> Tensor:  # fmt: skip
    """LRP-alpha-beta (Bach et al. 2015): ``R_in = a . g``, returns ``g``; positive and negative parts have their own sums.

    Example:
        >>> import torch
        >>> from fisnet_cuda.ops import linear_geometry
        >>> a, W = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, -1.0]])
        >>> a * alpha_beta(torch.ones(1, 1), a, W, None, linear_geometry(), (), False, 2.0, 1.0, 0.0)
        tensor([[ 2., -1.]])
    """
    P, M = plus_products(a, W, geometry, signed)
    if bias is not None:
        P, M = P + channel_bias(bias.clamp(min=0), geometry), M + channel_bias((-bias).clamp(min=0), geometry)
    # the negative sum is -M, so beta R / (-M - e) per unit of -contribution is +beta R / (M + e) per unit of M, negated
    s_plus, s_minus = alpha * stabilised_ratio(R, P, eps, True), -beta * stabilised_ratio(R, M, eps, True)
    return plus_transposed(s_plus, s_minus if beta else None, a, W, geometry, in_size, signed)


def gamma(
    R: Tensor, a: Tensor, W: Tensor, bias: Tensor | None, geometry: Geometry, in_size: tuple[int, ...], signed: bool,
    amount: float, eps: float,
) -> Tensor:  # fmt: skip
    """LRP-gamma (Montavon et al. 2019), for signed inputs and outputs: ``R_in = a . g``, returns ``g``.

    An output >= 0 favours its positive contributions, one < 0 its negative ones:
    ``z' = z + gamma (P + b+)`` or ``z - gamma (M + b-)``.

    Example:
        >>> import torch
        >>> from fisnet_cuda.ops import linear_geometry
        >>> a, W = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, -1.0]])
        >>> a * gamma(torch.ones(1, 1), a, W, None, linear_geometry(), (), False, 1.0, 0.0)
        tensor([[ 1.2000, -0.2000]])
    """
    P, M = plus_products(a, W, geometry, signed)
    if bias is not None:
        P, M = P + channel_bias(bias.clamp(min=0), geometry), M + channel_bias((-bias).clamp(min=0), geometry)
    z = P - M
    positive = z >= 0
    s = stabilised_ratio(R, torch.where(positive, z + amount * P, z - amount * M), eps)
    if s.shape[0] != a.shape[0]:
        positive = positive.unsqueeze(1).expand(-1, s.shape[0] // a.shape[0], *z.shape[1:]).flatten(0, 1)
    more = s * (1 + amount)
    s_plus, s_minus = torch.where(positive, more, s), -torch.where(positive, s, more)
    return plus_transposed(s_plus, s_minus, a, W, geometry, in_size, signed)


def w_square(R: Tensor, a: Tensor, W: Tensor, geometry: Geometry, in_size: tuple[int, ...], flat: bool, eps: float) -> Tensor:
    """LRP-w^2 (Montavon et al. 2017), or flat (every weight 1): returns ``R_in = V^T (R / (V 1 + e))``, ``V = W^2``.

    Example:
        >>> import torch
        >>> from fisnet_cuda.ops import linear_geometry
        >>> a, W = torch.zeros(1, 2), torch.tensor([[3.0, -1.0]])
        >>> w_square(torch.ones(1, 1), a, W, linear_geometry(), (), False, 0.0)
        tensor([[0.9000, 0.1000]])
    """
    V = torch.ones_like(W) if flat else W * W
    total = fprop(torch.ones_like(a[:1]), V, None, geometry)
    return transposed(stabilised_ratio(R, total.expand(a.shape[0], *total.shape[1:]), eps), V, geometry, in_size)
