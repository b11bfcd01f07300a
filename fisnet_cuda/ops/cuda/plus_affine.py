"""`plus_affine` and its adjoint (z+ through a BatchNorm that reads several maps): csrc/kernels/plus_affine.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernel_for
from .layout import acc_dtype, dense, vector


@kernel_for
def plus_affine(
    R: Tensor, P: Tensor, u: Tensor | None, k: Tensor, c: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """See `fisnet_cuda.reference.plus_affine`."""
    R, P, u = dense(R, P, u)
    plus, minus, s, den = torch.ops.fisnet.plus_affine(R, P, u, vector(k, P), vector(c, P), eps)
    return plus, None if u is None else minus, s, den


@kernel_for
def plus_affine_backward(
    plus_bar: Tensor, minus_bar: Tensor | None, s: Tensor, den: Tensor, P: Tensor, u: Tensor | None, k: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """See `fisnet_cuda.reference.plus_affine_backward`."""
    s, plus_bar, minus_bar, den, P, u = dense(s, plus_bar, minus_bar, den, P, u)
    R_bar, P_bar, u_bar, sums = torch.ops.fisnet.plus_affine_backward(plus_bar, minus_bar, s, den, P, u, vector(k, P))
    return R_bar, P_bar, None if u is None else u_bar, *sums.to(k.dtype).unbind()


@torch.library.register_fake("fisnet::plus_affine")
def _(R, P, u, k, c, eps):
    minus = R.new_empty(0) if u is None else torch.empty_like(R)
    return torch.empty_like(R), minus, torch.empty_like(R), torch.empty_like(P)


@torch.library.register_fake("fisnet::plus_affine_backward")
def _(plus_bar, minus_bar, s, den, P, u, k):
    u_bar = P.new_empty(0) if u is None else torch.empty_like(P)
    return torch.empty_like(plus_bar), torch.empty_like(P), u_bar, P.new_empty(2, P.shape[1], dtype=acc_dtype(P))
