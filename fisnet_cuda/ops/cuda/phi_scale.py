"""`phi_scale` and its adjoint (kernels 1 and 2): csrc/kernels/phi_scale.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernel_for
from .layout import acc_dtype, dense, split_eps, vector


@kernel_for
def phi_scale(
    g: Tensor, a: Tensor, eps: float | Tensor, skip: Tensor | None = None, scale: Tensor | None = None,
    rest: Tensor | None = None, keep_s: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `fisnet_cuda.reference.phi_scale`."""
    g, a, skip, rest = dense(g, a, skip, rest)
    number, eps_n = split_eps(eps, a)
    out, s = torch.ops.fisnet.phi_scale(g, a, number, eps_n, skip, vector(scale, a), rest, keep_s)
    return out, out if scale is None else s


@kernel_for
def phi_scale_backward(
    s_bar: Tensor, s: Tensor, a: Tensor, eps: float | Tensor, scale: Tensor | None = None, need_a: bool = True,
    need_scale: bool = True, join: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See `fisnet_cuda.reference.phi_scale_backward`."""
    dtype_a = a.dtype
    s, s_bar, a, join = dense(s, s_bar, a, join)
    number, eps_n = split_eps(eps, a)
    need_scale = need_scale and scale is not None
    g_bar, a_bar, scale_bar = torch.ops.fisnet.phi_scale_backward(
        s_bar, s, a, number, eps_n, vector(scale, a), need_a, need_scale, join
    )
    return g_bar, a_bar.to(dtype_a) if need_a else None, scale_bar.to(scale.dtype) if need_scale else None


@torch.library.register_fake("fisnet::phi_scale")
def _(g, a, eps, eps_n, skip, scale, rest, keep_s):
    return torch.empty_like(g), torch.empty_like(g) if scale is not None and keep_s else g.new_empty(0)


@torch.library.register_fake("fisnet::phi_scale_backward")
def _(s_bar, s, a, eps, eps_n, scale, need_a, need_scale, join=None):
    a_bar = torch.empty_like(a) if need_a else a.new_empty(0)
    with_scale = need_scale and scale is not None
    scale_bar = a.new_empty(a.shape[1], dtype=acc_dtype(a)) if with_scale else a.new_empty(0)
    return torch.empty_like(s_bar), a_bar, scale_bar
