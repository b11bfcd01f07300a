"""Pointwise passes of LRP-epsilon and of Dual: what happens at a ReLU (kernels 1, 2 and 7)."""

from __future__ import annotations

import torch
from torch import Tensor

Epsilon = float | Tensor  # a number, or [N, 1, ...]


def per_sample(r: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """View relevance ``r [N*K, ...]`` beside activations ``a [N, ...]`` so that they broadcast over K without a copy."""
    if r.shape[0] == a.shape[0]:
        return r, a
    return r.unflatten(0, (a.shape[0], -1)), a.unsqueeze(1)


def fold_maps(r: Tensor, a: Tensor) -> Tensor:
    """Back from a `per_sample` view: ``[N, K, ...] -> [N*K, ...]``; ``a`` is the activation it was seen beside."""
    return r.flatten(0, 1) if r.dim() > a.dim() else r


def per_sample_eps(eps: Epsilon, r: Tensor, a: Tensor) -> Epsilon:
    """Epsilon beside `per_sample` views: a relative epsilon is ``[N, 1, ...]`` and needs the K axis too."""
    return eps.unsqueeze(1) if isinstance(eps, Tensor) and r.shape[0] != a.shape[0] else eps


def sum_over_maps(t: Tensor, a: Tensor) -> Tensor:
    """Sum ``t`` (a `per_sample` view) over K, when it has a K axis."""
    return t.sum(1) if t.dim() > a.dim() else t


def channel_view(scale: Tensor, like: Tensor) -> Tensor:
    """``scale [C]`` shaped to multiply ``like [N, C, ...]``."""
    return scale.view(-1, *[1] * (like.dim() - 2))


def channel_dot(p: Tensor, q: Tensor) -> Tensor:
    """``sum over everything but channels of p . q``, for ``[N, C, ...]``: the gradient of a per-channel factor."""
    return (p * q).sum([0, *range(2, p.dim())])


def reuse(work: Tensor | None) -> Tensor | None:
    """``out=`` for a tensor whose values nobody needs any more: fresh memory costs more than most of the math here.

    Under torch.compile None: it plans memory itself, and refuses an ``out=`` that is not contiguous.
    """
    return None if torch.compiler.is_compiling() else work


def stabilise(z: Tensor, eps: Epsilon, nonneg: bool = False) -> Tensor:
    """``z + e sign z`` with ``sign 0 = +1``; where that is 0 (``z = e = 0``) the result is 1, so that 0/0 reads 0.

    ``nonneg`` says that ``z >= 0`` everywhere, which needs no sign.
    """
    if nonneg:
        den = z + eps
    else:
        e = eps if isinstance(eps, Tensor) else z.new_full((), eps)
        den = z + 0.0  # a copy to work in, with +0 for -0
        den = torch.copysign(e, den, out=reuse(den)).add_(z)
    if isinstance(eps, float) and eps > 0:
        return den
    return torch.where(den == 0, 1.0, den)


def _divide(x: Tensor, den: Tensor) -> Tensor:
    """``x / den``, in the memory of ``den`` where the result fits."""
    return torch.div(x, den, out=reuse(den) if den.shape == x.shape and den.dtype == x.dtype else None)


def ratio(R: Tensor, z: Tensor, eps: Epsilon, nonneg: bool = False) -> tuple[Tensor, Tensor]:
    """``s = R / (z + e sign z)`` over K maps; returns ``(s, denominator)``: ``([N*K, ...], [N, ...])``."""
    den = stabilise(z, eps, nonneg)
    R_k, den_k = per_sample(R, den)
    s = R_k / den_k
    return fold_maps(s, den), den


def ratio_backward(s_bar: Tensor, s: Tensor, den: Tensor, need_z: bool = True) -> tuple[Tensor, Tensor | None]:
    """``(R_bar, z_bar)``: ``R_bar = s_bar / den``, ``z_bar = -s R_bar`` summed over K."""
    s_bar_k, den_k = per_sample(s_bar, den)
    R_bar = s_bar_k / den_k
    R_bar = fold_maps(R_bar, den)
    if not need_z:
        return R_bar, None
    return R_bar, sum_over_maps(per_sample(s * R_bar, den)[0], den).neg_()


def relative_epsilon(a: Tensor, eps: float) -> Tensor:
    """``e = eps . rms(a)`` of each sample, detached, ``[N, 1, ...]``; float32 or wider inside; never 0."""
    dims = list(range(1, a.dim()))
    a = a.detach()
    wide = torch.promote_types(a.dtype, torch.float32)
    rms = torch.linalg.vector_norm(a, dim=dims, keepdim=True, dtype=wide) / max(a[0].numel() if len(a) else 1, 1) ** 0.5
    return (eps * rms).clamp_min(torch.finfo(a.dtype).tiny).to(a.dtype)


def phi_scale(
    g: Tensor,  # [N*K, C, ...]
    a: Tensor,  # [N, C, ...]
    eps: Epsilon,
    skip: Tensor | None = None,  # [N*K, C, ...]
    scale: Tensor | None = None,  # [C]
    rest: Tensor | None = None,  # [N*K, C, ...]
    keep_s: bool = True,
) -> tuple[Tensor, Tensor]:  # ([N*K, C, ...], [N*K, C, ...])
    """``s = phi(a) . (g + skip)``; returns ``(scale . s + rest, s)``, the same tensor twice without ``scale``.

    Without ``keep_s`` (no backward follows) the first result may take the memory of the second.
    """
    joined = g if skip is None else g + skip
    joined, a_k = per_sample(joined, a)
    if isinstance(eps, float) and eps == 0:
        s = joined * (a_k > 0)
    else:
        t = a_k + per_sample_eps(eps, g, a)
        t = torch.div(a_k, t, out=reuse(t))
        # t can be reused in place only where it already has the size and dtype of the result
        s = t.mul_(joined) if t.shape == joined.shape and t.dtype == joined.dtype else t * joined
    s = fold_maps(s, a)
    if scale is None:
        return s, s
    factor = channel_view(scale, s)
    out = None if keep_s or s.requires_grad else reuse(s)
    return (torch.mul(s, factor, out=out) if rest is None else torch.addcmul(rest, s, factor, out=out)), s


def phi_scale_backward(
    s_bar: Tensor,  # [N*K, C, ...]
    s: Tensor,  # [N*K, C, ...]
    a: Tensor,  # [N, C, ...]
    eps: Epsilon,
    scale: Tensor | None = None,  # [C]
    need_a: bool = True,
    need_scale: bool = True,
    join: Tensor | None = None,  # [N*K, C, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # ([N*K, C, ...], [N, C, ...], [C])
    """``g_bar = phi(a) s_bar`` (skip's gradient too), ``a_bar = e (s/a) (s_bar/(a + e))``, ``scale_bar``.

    ``join`` is what a second consumer gave, added to ``s_bar``.

    The ratios are formed first, so that products of small numbers do not underflow; a dead unit (a = 0) has s = 0 and
    gets a_bar = 0, which the ReLU before it would make of any value.
    """
    scale_bar = None
    if join is not None:
        s_bar = s_bar + join
    if scale is not None:
        if need_scale:
            scale_bar = channel_dot(s_bar, s)
        s_bar = s_bar * channel_view(scale, s_bar)
    s_bar_k, a_k = per_sample(s_bar, a)
    if isinstance(eps, float) and eps == 0:
        g_bar, a_bar = s_bar_k * (a_k > 0), None
    else:
        e = per_sample_eps(eps, s, a)
        u = _divide(s_bar_k, a_k + e)
        g_bar, a_bar = u * a_k, None
        if need_a:
            s_k = s.view(s_bar_k.shape) if s.shape != s_bar_k.shape else s
            ratio = _divide(s_k, a_k.clamp_min(torch.finfo(a.dtype).tiny))
            a_bar = sum_over_maps(ratio.mul_(u).mul_(e), a)
    return fold_maps(g_bar, a), a_bar, scale_bar


def dual_phi(
    g: Tensor,  # [N, C, ...]
    g_plus: Tensor,  # [N, C, ...]
    a: Tensor,  # [N, C, ...]
    z_plus: Tensor,  # [N, C, ...]
    eps: Epsilon,
    eps_plus: float,
) -> tuple[Tensor, Tensor]:  # ([N, C, ...], [N, C, ...])
    """Both rules of Dual at one ReLU: ``s = phi(a) g``, ``s+ = a g+ / (z+ + e)``."""
    den = stabilise(z_plus, eps_plus, nonneg=True)
    return phi_scale(g, a, eps)[1], torch.div(a * g_plus, den, out=reuse(den))


def dual_phi_backward(
    s_bar: Tensor,  # [N, C, ...]
    s_plus_bar: Tensor,  # [N, C, ...]
    a: Tensor,  # [N, C, ...]
    s: Tensor,  # [N, C, ...]
    s_plus: Tensor,  # [N, C, ...]
    z_plus: Tensor,  # [N, C, ...]
    eps: Epsilon,
    eps_plus: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # each [N, C, ...]
    """``(g_bar, g+_bar, a_bar, z+_bar)``: ``z+_bar = -s+ s+_bar/(z+ + e)``, ``a_bar`` = epsilon's ``+ s+ s+_bar/a``."""
    g_bar, a_bar, _ = phi_scale_backward(s_bar, s, a, eps)
    u = stabilise(z_plus, eps_plus, nonneg=True)
    u = torch.div(s_plus_bar, u, out=reuse(u))
    g_plus_bar = a * u
    z_plus_bar = u.mul_(s_plus).neg_()
    # s+/a = g+/(z+ + e) is finite at a = 0, but there the ReLU before cuts the gradient: 0 is as good
    plus = (s_plus / a.clamp_min(torch.finfo(a.dtype).tiny)).mul_(s_plus_bar)
    return g_bar, g_plus_bar, plus if a_bar is None else a_bar.add_(plus), z_plus_bar
