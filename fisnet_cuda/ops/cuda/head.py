"""The classifier's head (kernel 11): eta's start, z+ start, the global average pool fused with phi: csrc/kernels/head.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernel_for
from .layout import acc_dtype, dense, one_dtype, split_eps


@kernel_for
def eta_start(logits: Tensor, index: Tensor, eta_eps: float) -> Tensor:
    """See `fisnet_cuda.reference.eta_start`."""
    return torch.ops.fisnet.eta_start(logits.contiguous(), index.contiguous(), eta_eps)


@kernel_for
def eta_start_backward(start_bar: Tensor, logits: Tensor, index: Tensor, eta_eps: float) -> Tensor:
    """See `fisnet_cuda.reference.eta_start_backward`."""
    start_bar = start_bar.to(acc_dtype(logits)).contiguous()
    return torch.ops.fisnet.eta_start_backward(start_bar, logits.contiguous(), index.contiguous(), eta_eps)


@kernel_for
def plus_start(P: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """See `fisnet_cuda.reference.plus_start`."""
    P, bias = _dense_rows(P, bias)
    return torch.ops.fisnet.plus_start(P, bias, eps)


@kernel_for
def plus_start_backward(s_bar: Tensor, P: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """See `fisnet_cuda.reference.plus_start_backward`."""
    dtype_P = P.dtype
    s_bar, P, bias = _dense_rows(s_bar, P, bias)
    return torch.ops.fisnet.plus_start_backward(s_bar, P, bias, eps).to(dtype_P)


@kernel_for
def pooled_phi(g: Tensor, a: Tensor, eps: float | Tensor) -> Tensor:
    """See `fisnet_cuda.reference.pooled_phi`."""
    a, g = dense(a, g)
    number, eps_n = split_eps(eps, a)
    return torch.ops.fisnet.pooled_phi(_flat(g), a, number, eps_n, None, None, 0.0)[0]


@kernel_for
def pooled_phi_backward(
    s_bar: Tensor, s: Tensor, g: Tensor, a: Tensor, eps: float | Tensor, need_a: bool = True
) -> tuple[Tensor, Tensor | None]:
    """See `fisnet_cuda.reference.pooled_phi_backward`."""
    dtypes, shape = (g.dtype, a.dtype), g.shape
    a, s_bar, g = dense(a, s_bar, g)
    number, eps_n = split_eps(eps, a)
    g_bar, a_bar, _, _ = torch.ops.fisnet.pooled_phi_backward(
        s_bar, None, _flat(g), a, number, eps_n, None, None, 0.0, need_a
    )
    return g_bar.view(shape).to(dtypes[0]), a_bar.to(dtypes[1]) if need_a else None


@kernel_for
def pooled_dual_phi(
    g: Tensor, g_plus: Tensor, a: Tensor, z_plus: Tensor, eps: float | Tensor, eps_plus: float
) -> tuple[Tensor, Tensor]:
    """See `fisnet_cuda.reference.pooled_dual_phi`."""
    a, z_plus, g, g_plus = dense(a, z_plus, g, g_plus)
    number, eps_n = split_eps(eps, a)
    return torch.ops.fisnet.pooled_phi(_flat(g), a, number, eps_n, _flat(g_plus), z_plus, eps_plus)


@kernel_for
def pooled_dual_phi_backward(
    s_bar: Tensor, s_plus_bar: Tensor, g: Tensor, g_plus: Tensor, a: Tensor, s: Tensor, s_plus: Tensor, z_plus: Tensor,
    eps: float | Tensor, eps_plus: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `fisnet_cuda.reference.pooled_dual_phi_backward`."""
    dtypes, shape = [t.dtype for t in (g, g_plus, a, z_plus)], g.shape
    a, z_plus, s_bar, s_plus_bar, g, g_plus = dense(a, z_plus, s_bar, s_plus_bar, g, g_plus)
    number, eps_n = split_eps(eps, a)
    g_bar, a_bar, g_plus_bar, z_plus_bar = torch.ops.fisnet.pooled_phi_backward(
        s_bar, s_plus_bar, _flat(g), a, number, eps_n, _flat(g_plus), z_plus, eps_plus, True
    )
    bars = (g_bar.view(shape), g_plus_bar.view(shape), a_bar, z_plus_bar)
    return tuple(bar.to(dtype) for bar, dtype in zip(bars, dtypes))


def _flat(g: Tensor) -> Tensor:
    """``[N*K, C, 1, ...] -> [N*K, C]``, contiguous."""
    return g.reshape(g.shape[:2])


def _dense_rows(*tensors: Tensor | None) -> list[Tensor | None]:
    """``[..., C]`` in one dtype, contiguous."""
    return [None if t is None else t.contiguous() for t in one_dtype(*tensors)]


@torch.library.register_fake("fisnet::eta_start")
def _(logits, index, eta_eps):
    return logits.new_empty((*index.shape, logits.shape[1]), dtype=acc_dtype(logits))


@torch.library.register_fake("fisnet::eta_start_backward")
def _(start_bar, logits, index, eta_eps):
    return torch.empty_like(logits)


@torch.library.register_fake("fisnet::plus_start")
def _(P, bias, eps):
    return torch.empty_like(P)


@torch.library.register_fake("fisnet::plus_start_backward")
def _(s_bar, P, bias, eps):
    return torch.empty_like(P)


@torch.library.register_fake("fisnet::pooled_phi")
def _(g, a, eps, eps_n, g_plus, z_plus, eps_plus):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = torch.contiguous_format if a.is_contiguous() else formats[a.dim()]
    s = torch.empty((g.shape[0], *a.shape[1:]), dtype=a.dtype, device=a.device, memory_format=memory_format)
    return s, a.new_empty(0) if z_plus is None else torch.empty_like(a)


@torch.library.register_fake("fisnet::pooled_phi_backward")
def _(s_bar, s_plus_bar, g, a, eps, eps_n, g_plus, z_plus, eps_plus, need_a):
    return (
        torch.empty_like(g),
        torch.empty_like(a) if need_a else a.new_empty(0),
        g.new_empty(0) if z_plus is None else torch.empty_like(g_plus),
        a.new_empty(0) if z_plus is None else torch.empty_like(a),
    )
