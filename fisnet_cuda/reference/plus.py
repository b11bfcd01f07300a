"""z+ through a BatchNorm that reads several maps (DenseNet's concatenations), and its adjoint."""

from __future__ import annotations

import torch
from torch import Tensor

from .phi import channel_dot, channel_view, fold_maps, per_sample, ratio_backward


def plus_affine(
    R: Tensor,  # [N*K, C, ...]
    P: Tensor,  # [N, C, ...]
    u: Tensor | None,  # [N, C, ...]
    k: Tensor,  # [C]
    c: Tensor,  # [C]
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """``(k+ s, |k-| s, s, denominator)`` with ``s = R / (z+ + e)``, ``z+ = |k| P - |k-| u + c``.

    ``P`` is the sum of the positive contributions and ``u = P - M`` the value itself, so this is ``k+ P + |k-| M + c``
    without a second product; ``u`` None says ``M = 0``. Rounding cannot take it below e: it is clamped there.
    """
    k_minus = (-k).clamp(min=0)
    den = torch.addcmul(channel_view(c + eps, P), P, channel_view(k.abs() if u is not None else k.clamp(min=0), P))
    if u is not None:
        den.addcmul_(u, channel_view(-k_minus, P)).clamp_(min=eps)
    if eps == 0:
        den = torch.where(den == 0, 1.0, den)
    R_k, den_k = per_sample(R, den)
    s = R_k / den_k
    s = fold_maps(s, P)
    plus = s * channel_view(k.clamp(min=0), s)
    return plus, None if u is None else s * channel_view(k_minus, s), s, den


def plus_affine_backward(
    plus_bar: Tensor,  # [N*K, C, ...]
    minus_bar: Tensor | None,  # [N*K, C, ...]
    s: Tensor,  # [N*K, C, ...]
    den: Tensor,  # [N, C, ...]
    P: Tensor,  # [N, C, ...]
    u: Tensor | None,  # [N, C, ...]
    k: Tensor,  # [C]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """``(R_bar, P_bar, u_bar, k_bar, c_bar)``, the adjoint of `plus_affine`."""
    k_plus, k_minus = k.clamp(min=0), (-k).clamp(min=0)
    s_bar = plus_bar * channel_view(k_plus, s)
    by_plus, by_minus = channel_dot(plus_bar, s), 0.0
    if minus_bar is not None:
        s_bar = torch.addcmul(s_bar, minus_bar, channel_view(k_minus, s))
        by_minus = channel_dot(minus_bar, s)
    R_bar, z_bar = ratio_backward(s_bar, s, den)
    by_P = channel_dot(z_bar, P)
    if u is None:
        P_bar, u_bar = z_bar * channel_view(k_plus, P), None
        k_bar = torch.where(k > 0, by_plus + by_P, 0.0)
    else:
        P_bar, u_bar = z_bar * channel_view(k.abs(), P), z_bar * channel_view(-k_minus, P)
        k_bar = torch.where(k > 0, by_plus + by_P, torch.where(k < 0, channel_dot(z_bar, u) - by_P - by_minus, 0.0))
    return R_bar, P_bar, u_bar, k_bar, z_bar.sum([0, *range(2, z_bar.dim())])
