"""The heatmap loss in plain PyTorch: the CPU path, and what the kernels are tested against.

Same names, arguments and shapes as `fisnet_cuda.ops.heatmap_loss`, which checks the arguments and documents
them; here they are taken as right. A composition of differentiable PyTorch ops: nothing depends on values, so
there is no host sync and no data-dependent shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-10  # under the foreground mean, and under the foreground's area; as in the authors' code
_MAX_ODDS = 1e7 - 1  # G / E at u = G / (G + E) = 1 - 1e-7


def gwrp_terms(d: float, tolerance: float) -> int:
    """How many of the largest values `gwrp` needs for a relative error of ``tolerance``; 0 <= d < 1."""
    if d == 0:
        return 1
    return math.ceil(math.log(tolerance / (1 + tolerance)) / math.log(d))  # d^k / (1 - d^k) <= tolerance


def gwrp(x: Tensor, d: float) -> Tensor:
    """Global weighted rank pooling over the last axis: ``sum_i d^i sort_desc(x)_i / sum_i d^i``."""
    if d == 1:
        return x.mean(-1)
    n = x.shape[-1]
    k = gwrp_terms(d, torch.finfo(x.dtype).eps)
    x = x.topk(k, dim=-1).values if k < n else x.sort(dim=-1, descending=True).values
    # In float64, because a power of a rounded d is off by i roundings; on the device, because a copy would be
    # a sync.
    weights = torch.pow(d, torch.arange(x.shape[-1], dtype=torch.float64, device=x.device))
    return (x * (weights / weights.sum()).to(x.dtype)).sum(-1)


def resize_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Adaptive average pooling of ``mask`` [N, C, *spatial] to ``size``, then 1 where anything is above 0."""
    if mask.shape[2:] == torch.Size(size):
        return mask
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(size) - 1]
    return (pool(mask.detach().float(), tuple(size)) > 0).to(mask.dtype)


def heatmap_loss(
    R: Tensor,  # [N, K, C, *spatial]
    mask: Tensor,  # [N, 1 or C, *spatial]
    *,
    d: float,
    E: float,
    c1: float | Tensor,  # a number, [1] or [K]
    c2: float | Tensor,  # a number, [1] or [K]
    foreground: str,
    normalization: str,
) -> tuple[Tensor, Tensor]:  # [N], [N]
    """Background and foreground loss of each sample; see `fisnet_cuda.ops.heatmap_loss.heatmap_loss`."""
    R = R if R.dtype == torch.float64 else R.float()
    M = mask.detach().to(R.dtype).unsqueeze(1)  # [N, 1, 1 or C, *spatial]
    if isinstance(c1, Tensor):
        c1 = c1.to(R)
    if isinstance(c2, Tensor):
        c2 = c2.to(R)

    pixels = tuple(range(2, R.dim()))  # channels included
    A = R.abs()
    inside = (A * M).sum(pixels)  # [N, K], F of the equations
    area = M.sum(pixels) * (R.shape[2] // M.shape[2])  # [N, 1]

    # Background. GWRP is linear in a positive factor, so the normalisation acts on [N, K, C] numbers, not on
    # the maps.
    G = gwrp((A * (1 - M)).flatten(3), d)
    if normalization == "absRoIMean":
        G = G / (inside / (area + _EPS) + _EPS).unsqueeze(-1)
    elif normalization == "RoIMean":
        G = G / ((R * M).sum(pixels) / (area + _EPS) + _EPS).abs().unsqueeze(-1)
    else:
        G = G * math.prod(R.shape[2:])
    # -log(1 - u) with u = G / (G + E), written as log(1 + G / E): no cancellation near u = 0 and u = 1.
    background = (G / E).clamp(max=_MAX_ODDS).log1p().mean((1, 2))

    # Foreground: too little relevance (left), too much (right).
    left = ((inside / c1).clamp(max=1) - 1).square()
    if foreground == "L1":
        right = (inside - c2).clamp(min=0)
    elif foreground == "L2":
        right = (inside / c1 - c2 / c1).clamp(min=0).square()
    else:  # hybrid: the square saturates at 1, where inside = c1 + c2 and the line takes over
        right = (inside / c1 - c2 / c1).clamp(min=0, max=1).square() + (inside - (c1 + c2)).clamp(min=0)
    return background, (left + right).mean(1)
