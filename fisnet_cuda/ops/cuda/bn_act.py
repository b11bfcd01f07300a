"""BatchNorm + addition + ReLU and its backward (kernels 4 and 3): csrc/kernels/bn_act.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernel_for
from .layout import acc_dtype, dense, fit, is_channels_last, vector

_MOST_GRADS = 4  # that one kernel joins; BnBackwardParams::kMostGrads


class _BnAct(torch.autograd.Function):
    # mean and rstd are operands, not results: constants to everyone but this backward, which knows that they are the batch's
    @staticmethod
    def forward(ctx, x, weight, bias, skip, mean, rstd, batch_statistics, relu, copies):
        keep_mask = relu and any(ctx.needs_input_grad)
        y, mask = torch.ops.fisnet.bn_apply(x, mean, rstd, weight, bias, skip, relu, keep_mask)
        ctx.save_for_backward(x, weight, mean, rstd, mask if keep_mask else None)
        ctx.batch_statistics = batch_statistics
        ctx.set_materialize_grads(False)  # a consumer without a gradient costs nothing
        return (y, *(y.detach() for _ in range(copies - 1)))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, weight, mean, rstd, mask = ctx.saved_tensors
        given = [g for g in grads if g is not None]
        if not given:
            return (None,) * 9
        need_x, need_weight, need_bias, need_skip, *_ = ctx.needs_input_grad
        gx, gweight, gbias, gskip = bn_act_backward(
            given, mask, x, mean, rstd, weight, ctx.batch_statistics, need_x, need_weight or need_bias, need_skip
        )
        return gx, gweight if need_weight else None, gbias if need_bias else None, gskip, None, None, None, None, None


@kernel_for
def bn_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, momentum: float, eps: float, skip: Tensor | None = None, relu: bool = False, copies: int = 1,
    known: tuple[Tensor, int, Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See `fisnet_cuda.reference.bn_act`; the copies are aliases whose gradients the backward joins in one kernel."""
    if skip is not None and skip.dtype != x.dtype:
        x = x.to(torch.promote_types(x.dtype, skip.dtype))
    (x,) = dense(x)
    skip, weight, bias = _like(skip, x), vector(weight, x), vector(bias, x)
    if training:
        mean, rstd = batch_statistics(x, running_mean, running_var, momentum, eps, known)
    else:
        mean, rstd = running_mean, torch.rsqrt(running_var + eps)
    statistics = vector(mean, x), vector(rstd, x)
    if torch.is_grad_enabled():
        ys = _BnAct.apply(x, weight, bias, skip, *statistics, training, relu, copies)
    else:
        ys = (torch.ops.fisnet.bn_apply(x, *statistics, weight, bias, skip, relu, False)[0],) * copies
    return (ys[0], mean, rstd, *ys[1:])


def batch_statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float,
    known: tuple[Tensor, int, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(mean, rstd)`` of a dense ``x``; moves the running statistics in place. Reads only the part that is not ``known``."""
    running = running_mean, running_var
    given = [None if t is None else t.contiguous() for t in running]
    others = ()
    if known is not None:
        part, first, mean, rstd = known
        if part.dtype == x.dtype and mean.dtype == acc_dtype(x):  # else what is known is less exact than x
            (x,), others = dense(part), (mean, rstd, first)
    mean, rstd = torch.ops.fisnet.bn_statistics(x.detach(), *given, momentum, eps, *others)
    for t, moved in zip(running, given):
        if moved is not t:
            t.copy_(moved)
    return mean, rstd


@kernel_for
def bn_act_backward(
    grads: Sequence[Tensor], mask: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None = None,
    training: bool = True, need_x: bool = True, need_params: bool = True, need_skip: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """See `fisnet_cuda.reference.bn_act_backward`; ``x`` is dense, as the mask is packed in its order of memory."""
    joined = [_like(g, x) for g in grads[: _MOST_GRADS - 1]]
    rest = grads[_MOST_GRADS - 1 :]
    if rest:
        joined.append(_like(rest[0] if len(rest) == 1 else sum(rest), x))
    whole = mask is None and len(joined) == 1  # then the gradient of skip is what came in
    gx, gweight, gbias, gskip = torch.ops.fisnet.bn_act_backward(
        joined, mask, x, mean, rstd, weight, training, need_x, need_params, need_skip and not whole
    )
    return (
        gx if need_x else None,
        gweight if need_params else None,
        gbias if need_params else None,
        (joined[0] if whole else gskip) if need_skip else None,
    )


def _like(t: Tensor | None, x: Tensor) -> Tensor | None:
    """``t`` in the dtype and the layout of a dense ``x``."""
    return None if t is None else fit(t.to(x.dtype), is_channels_last(x))


@torch.library.register_fake("fisnet::bn_statistics")
def _(x, running_mean, running_var, momentum, eps, known_mean=None, known_rstd=None, first=0):
    channels = x.shape[1] + (0 if known_mean is None else known_mean.shape[0])
    return tuple(x.new_empty(channels, dtype=acc_dtype(x)) for _ in range(2))


@torch.library.register_fake("fisnet::bn_apply")
def _(x, mean, rstd, weight, bias, skip, relu, keep_mask):
    return torch.empty_like(x), x.new_empty((x.numel() + 7) // 8 if keep_mask else 0, dtype=torch.uint8)


@torch.library.register_fake("fisnet::bn_act_backward")
def _(grads, mask, x, mean, rstd, weight, batch_statistics, need_x, need_params, need_skip):
    gx, gskip = (torch.empty_like(x) if need else x.new_empty(0) for need in (need_x, need_skip))
    gweight, gbias = (x.new_empty(x.shape[1] if need_params else 0, dtype=acc_dtype(x)) for _ in range(2))
    return gx, gweight, gbias, gskip
