"""BatchNorm as the relevance pass sees it, and the forward of BatchNorm + addition + ReLU (kernel 4)."""

from __future__ import annotations

import torch
from torch import Tensor


def bn_act(
    x: Tensor,  # [N, C, ...]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    running_mean: Tensor | None,  # [C]
    running_var: Tensor | None,  # [C]
    training: bool,
    momentum: float,
    eps: float,
    skip: Tensor | None = None,  # [N, C, ...]
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # ([N, C, ...], [C], [C])
    """``y = [relu](bn(x) [+ skip])`` with PyTorch's own primitives; returns ``(y, mean, rstd)`` as the forward used them.

    ``training`` normalises with the batch's statistics (and updates the running ones in place). ``mean`` and
    ``rstd = 1/sqrt(var + eps)`` (biased variance) are detached.
    """
    if x.numel():
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
    else:  # an empty batch has no statistics, and that kernel's backward divides by its size
        y = torch.batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps, False)
        mean, rstd = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    if skip is not None:
        y = y.add_(skip) if y.dtype == skip.dtype and y.shape == skip.shape else y + skip
    if relu:
        y = y.relu_()
    if not training:  # native_batch_norm leaves both empty on some devices; buffers need no detach
        return y, running_mean, torch.rsqrt(running_var + eps)
    return y, mean.detach(), rstd.detach()


def affine_scale_shift(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, linear_bias: Tensor | None,
    constant_bias: bool = True,
) -> tuple[Tensor, Tensor]:  # ([C], [C])
    """``(scale, b~)`` of a folded BatchNorm: ``scale = gamma rstd``, ``b~ = (b - mean) scale + beta``.

    gamma keeps its gradient; the statistics are detached, and with ``constant_bias`` ``b`` and ``beta`` too (semantics of the
    z+ and z^B rules).
    """
    scale = rstd if weight is None else weight * rstd
    centre = -mean if linear_bias is None else _bias(linear_bias, constant_bias) - mean
    shift = centre * scale
    return scale, shift if bias is None else shift + _bias(bias, constant_bias)


def _bias(b: Tensor, constant: bool) -> Tensor:
    return b.detach() if constant else b
