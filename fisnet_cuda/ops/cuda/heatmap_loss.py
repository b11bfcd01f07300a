"""`heatmap_loss` and its adjoint (kernel 6): csrc/kernels/heatmap_loss.cu."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...reference.heatmap_loss import gwrp_terms
from . import kernel_for
from .layout import acc_dtype, is_channels_last

_FOREGROUNDS = {"hybrid": 0, "L2": 1, "L1": 2}
_NORMALIZATIONS = {"absRoIMean": 0, "RoIMean": 1, "none": 2}
# Interleaved maps of so few channels are read where they lie, although every channel's pass touches all of them: heatmaps of
# images. Inner maps have hundreds of channels, and one copy costs less than that.
_MOST_INTERLEAVED = 4


@kernel_for
def heatmap_loss(
    R: Tensor, mask: Tensor, *, d: float, E: float, c1: float | Tensor, c2: float | Tensor, foreground: str, normalization: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `fisnet_cuda.reference.heatmap_loss`."""
    R = _maps(R.flatten(0, 1))
    mask = mask.detach()
    if mask.dtype not in (torch.bool, torch.uint8):
        mask = mask.to(acc_dtype(R))
    pixels = math.prod(R.shape[2:])
    # the number of ranks whose weights the dtype can tell apart from 0; 0 asks for the mean
    k = 0 if d == 1 else min(gwrp_terms(d, torch.finfo(acc_dtype(R)).eps), pixels)
    (c1, c1_k), (c2, c2_k) = _split(c1, R), _split(c2, R)
    args = R, mask.contiguous(), d, k, E, c1, c2, c1_k, c2_k, _FOREGROUNDS[foreground], _NORMALIZATIONS[normalization]
    if not (torch.is_grad_enabled() and R.requires_grad):
        return torch.ops.fisnet.heatmap_loss(*args, False)[:2]
    return _HeatmapLoss.apply(*args)


def _maps(R: Tensor) -> Tensor:  # [N*K, C, *spatial], dense
    if R.shape[1] <= _MOST_INTERLEAVED and is_channels_last(R):
        return R
    return R.contiguous()


def _split(c: float | Tensor, R: Tensor) -> tuple[float, Tensor | None]:
    """``(number, [1] or [K] or None)``."""
    if isinstance(c, Tensor):
        return 0.0, c.detach().to(R.device, acc_dtype(R)).reshape(-1).contiguous()
    return c, None


class _HeatmapLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, R, mask, d, k, E, c1, c2, c1_k, c2_k, foreground, normalization):
        background_loss, foreground_loss, slope_G, slope_F, index = torch.ops.fisnet.heatmap_loss(
            R, mask, d, k, E, c1, c2, c1_k, c2_k, foreground, normalization, True
        )
        ctx.save_for_backward(R, mask, slope_G, slope_F, index)
        ctx.d, ctx.k, ctx.normalization = d, k, normalization
        return background_loss, foreground_loss

    @staticmethod
    @once_differentiable
    def backward(ctx, background_bar, foreground_bar):
        R, mask, slope_G, slope_F, index = ctx.saved_tensors
        bars = [bar if bar.stride(0) == 0 else bar.contiguous() for bar in (background_bar, foreground_bar)]
        R_bar = torch.ops.fisnet.heatmap_loss_backward(*bars, R, mask, slope_G, slope_F, index, ctx.d, ctx.k, ctx.normalization)
        return R_bar, *[None] * 10


@torch.library.register_fake("fisnet::heatmap_loss")
def _(R, mask, d, k, E, c1, c2, c1_k, c2_k, foreground, normalization, keep):
    def acc(*shape: int) -> Tensor:
        return R.new_empty(shape, dtype=acc_dtype(R))

    N, rows = mask.shape[0], R.shape[0] * R.shape[1]
    index = R.new_empty((rows, k) if keep and k else (0,), dtype=torch.int32)
    return acc(N), acc(N), acc(rows), acc(R.shape[0], 2), index


@torch.library.register_fake("fisnet::heatmap_loss_backward")
def _(background_bar, foreground_bar, R, mask, slope_G, slope_F, index, d, k, normalization):
    return torch.empty_like(R)
