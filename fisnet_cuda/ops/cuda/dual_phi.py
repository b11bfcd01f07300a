"""`dual_phi` and its adjoint (kernel 7): csrc/kernels/dual_phi.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernel_for
from .layout import dense, split_eps


@kernel_for
def dual_phi(g: Tensor, g_plus: Tensor, a: Tensor, z_plus: Tensor, eps: float | Tensor, eps_plus: float) -> tuple[Tensor, Tensor]:
    """See `fisnet_cuda.reference.dual_phi`."""
    g, g_plus, a, z_plus = dense(g, g_plus, a, z_plus)
    return torch.ops.fisnet.dual_phi(g, g_plus, a, z_plus, *split_eps(eps, a), eps_plus)


@kernel_for
def dual_phi_backward(
    s_bar: Tensor, s_plus_bar: Tensor, a: Tensor, s: Tensor, s_plus: Tensor, z_plus: Tensor, eps: float | Tensor,
    eps_plus: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `fisnet_cuda.reference.dual_phi_backward`."""
    s, s_plus, s_bar, s_plus_bar, a, z_plus = dense(s, s_plus, s_bar, s_plus_bar, a, z_plus)
    return torch.ops.fisnet.dual_phi_backward(s_bar, s_plus_bar, a, s, s_plus, z_plus, *split_eps(eps, a), eps_plus)


@torch.library.register_fake("fisnet::dual_phi")
def _(g, g_plus, a, z_plus, eps, eps_n, eps_plus):
    return torch.empty_like(a), torch.empty_like(a)


@torch.library.register_fake("fisnet::dual_phi_backward")
def _(s_bar, s_plus_bar, a, s, s_plus, z_plus, eps, eps_n, eps_plus):
    return tuple(torch.empty_like(a) for _ in range(4))
