"""`ratio` and its adjoint: csrc/kernels/ratio.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernel_for
from .layout import dense, split_eps


@kernel_for
def ratio(R: Tensor, z: Tensor, eps: float | Tensor, nonneg: bool = False) -> tuple[Tensor, Tensor]:
    """See `fisnet_cuda.reference.ratio`."""
    R, z = dense(R, z)
    return torch.ops.fisnet.ratio(R, z, *split_eps(eps, z), nonneg)


@kernel_for
def ratio_backward(s_bar: Tensor, s: Tensor, den: Tensor, need_z: bool = True) -> tuple[Tensor, Tensor | None]:
    """See `fisnet_cuda.reference.ratio_backward`."""
    s, s_bar, den = dense(s, s_bar, den)
    R_bar, z_bar = torch.ops.fisnet.ratio_backward(s_bar, s, den, need_z)
    return R_bar, z_bar if need_z else None


@torch.library.register_fake("fisnet::ratio")
def _(R, z, eps, eps_n, nonneg):
    return torch.empty_like(R), torch.empty_like(z)


@torch.library.register_fake("fisnet::ratio_backward")
def _(s_bar, s, den, need_z):
    return torch.empty_like(s_bar), torch.empty_like(den) if need_z else den.new_empty(0)
