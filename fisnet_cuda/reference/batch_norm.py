"""BatchNorm as the relevance pass sees it, and BatchNorm + addition + ReLU (kernel 4) with its backward (kernel 3)."""

from __future__ import annotations

from collections.abc import Sequence

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
    copies: int = 1,
    known: tuple[Tensor, int, Tensor, Tensor] | None = None,  # [N, part of C, ...], its first channel, [rest of C], [rest of C]
) -> tuple[Tensor, ...]:  # ([N, C, ...], [C], [C], *[N, C, ...])
    """``y = [relu](bn(x) [+ skip])`` with PyTorch's own primitives; returns ``(y, mean, rstd)`` as the forward used them.

    ``training`` normalises with the batch's statistics (and updates the running ones in place). ``mean`` and
    ``rstd = 1/sqrt(var + eps)`` (biased variance) are detached. ``copies - 1`` times y again follow: here the same tensor,
    whose gradients autograd adds up; a kernel gives every consumer an output of its own. ``known`` spares a kernel the
    statistics of channels that another BatchNorm has read before; here they come with ``y``.
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
        mean, rstd = running_mean, torch.rsqrt(running_var + eps)
    else:
        mean, rstd = mean.detach(), rstd.detach()
    return (y, mean, rstd, *(y for _ in range(copies - 1)))


def bn_act_backward(
    grads: Sequence[Tensor],  # of [N, C, ...]
    mask: Tensor | None,  # [ceil(numel / 8)]
    x: Tensor,  # [N, C, ...]
    mean: Tensor,  # [C]
    rstd: Tensor,  # [C]
    weight: Tensor | None = None,  # [C]
    training: bool = True,
    need_x: bool = True,
    need_params: bool = True,
    need_skip: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Adjoint of ``y = relu(bn(x) + skip)``: ``(x_bar, weight_bar, bias_bar, skip_bar)``, None where it is not needed.

    ``g = sum of grads`` where ``y > 0`` (`pack_mask`; None: no ReLU), ``xhat = (x - mean) rstd``, then
    ``x_bar = weight rstd (g - mean of g - xhat . mean of (g xhat))`` with the batch's statistics (``training``), else
    ``weight rstd g``; ``weight_bar = sum g xhat``, ``bias_bar = sum g``, ``skip_bar = g``. A dense ``x``.
    """
    axes, shape = [d for d in range(x.dim()) if d != 1], [-1 if d == 1 else 1 for d in range(x.dim())]
    g = sum(grads[1:], grads[0])
    if mask is not None:
        g = torch.where(unpack_mask(mask, x), g, 0)
    wide = g.to(rstd.dtype)
    xhat = (x.to(rstd.dtype) - mean.view(shape)) * rstd.view(shape)
    g_sum, gx_sum = wide.sum(axes), (wide * xhat).sum(axes)
    x_bar = None
    if need_x:
        scale = rstd if weight is None else weight * rstd
        count = x.numel() // x.shape[1] if x.numel() else 1
        x_bar = wide - (g_sum / count).view(shape) - xhat * (gx_sum / count).view(shape) if training else wide
        x_bar = (x_bar * scale.view(shape)).to(x.dtype)
    return x_bar, gx_sum if need_params else None, g_sum if need_params else None, g if need_skip else None


def pack_mask(y: Tensor) -> Tensor:  # [N, C, ...] -> [ceil(numel / 8)]
    """``y > 0`` of a dense ``y``, a bit an element: bit i of byte j is element ``8 j + i`` in the order of memory."""
    bits = torch.as_strided(y > 0, (y.numel(),), (1,)).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -y.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=y.device)).sum(1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, y: Tensor) -> Tensor:  # [ceil(numel / 8)] -> [N, C, ...]
    """The bits of `pack_mask` as booleans, shaped and laid out as ``y``."""
    bits = (mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return torch.as_strided(bits.bool().view(-1), y.shape, y.stride())


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
