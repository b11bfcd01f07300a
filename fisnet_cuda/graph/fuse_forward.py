"""Patterns for the forward: a linear map with its BatchNorm, skip and ReLU in one instruction.

Whether one kernel runs it is settled at run time: a BatchNorm with the batch's statistics needs the whole product first, and
without kernels the layers run one by one as ever, to the last bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .. import ops
from .._backend import has_kernel
from .fuse_dual import _fprop as _dual_fprop
from .kinds.add import check_shapes
from .kinds.linear import _fprop_2d

if TYPE_CHECKING:
    from .fuse import _Program


def linear_act(p: _Program, position: int) -> None:
    """``relu(W a + b + skip)``."""
    relu = p.instrs[position]
    if relu.op != "add_relu":
        return
    for at, skip in sorted(_summands(p, relu.operands, position), reverse=True):  # the later map is the block's last one
        first = p.instrs[at]
        fused = replace(first, op=f"{first.op}_add_relu", operands=(*first.operands, relu.operands[skip]), outs=relu.outs)
        p.replace(position, replace(fused, **map_settings(p)), at)
        return


def linear_bn(p: _Program, position: int) -> None:
    """``[relu](bn(W a) [+ skip])``, with the product of Dual's z+ rule where the map has one."""
    bn = p.instrs[position]
    if bn.op not in ("bn", "bn_relu", "bn_add_relu"):
        return
    at = p.made_by(bn.operands[0], "conv", "linear", "dual_conv")
    if at is None or not p.only_reader(bn.operands[0].index, position) or p.instrs[at].fn not in (ops.fprop, _fprop_2d, _dual_fprop):
        return
    first = p.instrs[at]
    operands = (first.operands, bn.operands[1:10], *(bn.operands[10:] or (None, False)))
    options = (("fprop", first.fn), ("bn", bn.fn), *bn.options)
    p.replace(
        position,
        replace(bn, op=f"{first.op}_{bn.op}", fn=_linear_bn_act, operands=operands, outs=(*bn.outs, *first.outs[1:]), options=options),
        at,
    )


def map_settings(p: _Program) -> dict:
    """What runs ``relu(W a + b [+ skip])``, as fields of an instruction."""
    return {"fn": _linear_act, "kernel": "linear_act", "options": (("backend", p.backend),)}


def _summands(p: _Program, operands: tuple, position: int) -> list[tuple[int, int]]:
    """``(where a linear map makes one summand, index of the other)``, for maps that nobody else reads."""
    found = []
    for which, operand in enumerate(operands):
        at = p.made_by(operand, "conv", "linear")
        if at is not None and p.instrs[at].fn is ops.fprop and p.only_reader(operand.index, position):
            found.append((at, 1 - which))
    return found


# ---- what runs -----------------------------------------------------------------------------------------------------------


def _linear_act(x, W, bias, geometry, skip=None, *, backend="auto"):
    if has_kernel("linear_act", backend, x):
        return ops.linear_act(x, W, geometry, None, bias, skip, True, backend=backend)
    y = ops.fprop(x, W, bias, geometry)
    if skip is None:
        return torch.relu_(y)
    check_shapes(y, skip)
    return torch.relu_(y + skip)


def _linear_bn_act(product, norm, skip, relu, *, fprop, bn, copies=1, backend="auto"):
    """``(y, mean, rstd, [z+ sum], *copies of y)``."""
    dual = fprop is _dual_fprop
    if not torch.is_grad_enabled() and fprop is not _fprop_2d and has_kernel("linear_act", backend, product[0]):
        x, W, bias, geometry = product[:4]
        weight, beta, mean, var, _, training, _, eps, _ = norm
        if not training and mean is not None:  # a constant
            scale, shift, rstd = ops.constant_batch_norm(weight, beta, mean, var, eps, bias)
            y = ops.linear_act(x, W, geometry, scale, shift, skip, relu, backend=backend)
            return (y, mean, rstd, *(None,) * dual, *(y,) * (copies - 1))
    rest = (skip, relu) if relu else ()
    if not dual:
        return bn(fprop(*product), *norm, *rest, copies=copies, backend=backend)
    z, P = fprop(*product, backend=backend)
    y, mean, rstd, *others = bn(z, *norm, *rest, copies=copies, backend=backend)
    return (y, mean, rstd, P, *others)
