"""Patterns for Dual: its two products of one layer become one instruction, in the forward and in relevance.

What an instruction does is settled when it runs, by device and mode, and costs nothing: with kernels for the two-map ops
(`fisnet_cuda.ops.dual_linear`) W+ is never made and the z+ product is made by the forward; without them each instruction runs
the library's products one by one, at the place and in the order in which they stood before, with one W+ for all of them.

Memory: sums that the forward makes are alive from there until relevance has read them. A training step keeps them for its
backward in any case (or has dropped them by then, in a dense block), so its peak, where relevance ends and the backward
starts, stays what it was. Without gradients they would all be alive at once for nothing but speed: there the forward leaves
them to relevance, which makes and drops one after the other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from .._backend import has_kernel
from ..ops import rules as rule_ops
from .ir import Instr, Slot, slots_in
from .kinds.linear import _signed_positive

if TYPE_CHECKING:
    from .fuse import _Program

_FORWARD = ("conv", "linear", "conv_relu", "linear_relu")


def dual_fprop(p: _Program, position: int) -> None:
    """A map's forward and the product of its z+ rule, which read one input and one weight."""
    first = p.instrs[position]
    if first.op not in _FORWARD or first.rule or (first.op in _FORWARD[:2] and first.fn is not ops.fprop):
        return
    x, W, bias, geometry = first.operands
    for plus_at in p.readers[x.index]:
        plus = p.instrs[plus_at]
        if plus.layer != first.layer or not plus.rule:
            continue
        found = _denominator_of(p, first, plus_at) or _sum_of(first, plus_at, plus)
        if found is None:
            continue
        later_at, later, gamma, plus_bias = found
        p.replace(later_at, later, *{plus_at} - {later_at})
        fused = replace(first, op=f"dual_{first.op}", fn=_fprop, operands=(x, W, bias, geometry, gamma, plus_bias))
        options = (("relu", first.op.endswith("_relu")), ("backend", p.backend))
        p.replace(position, replace(fused, outs=(first.outs[0], plus.outs[0]), kernel="dual_fprop", options=options))
        return


def _denominator_of(p: _Program, first: Instr, plus_at: int) -> tuple | None:
    """``(position, instruction, gamma, bias of the sum)`` of z+ made from a layer's product that only z+ reads."""
    x, W, bias, geometry = first.operands
    plus = p.instrs[plus_at]
    if plus.fn is not ops.fprop or (plus.operands[0], plus.operands[3]) != (x, geometry):
        return None
    weight_at, P = p.made_by(plus.operands[1], "W+"), plus.outs[0]
    readers = p.readers.get(P, [])
    if weight_at is None or len(readers) != 1 or not p.only_reader(P, readers[0]):
        return None
    weight, z_plus = p.instrs[weight_at], p.instrs[readers[0]]
    if weight.operands[0] != W or z_plus.op != "z+" or z_plus.operands[0] != Slot(P):
        return None  # the start of the z+ map, say
    scale, gamma = weight.operands[1], None
    if scale is not None:
        scale_at = p.made_by(scale, "bn_fold", "bn_scale")
        if scale_at is None:
            return None
        gamma = p.instrs[scale_at].operands[0]  # rstd > 0: the sign of the scale is known before the statistics are
    *factor, shift = z_plus.operands[1:]
    operands = (Slot(P), x, plus.operands[1], *(factor or (None,)), shift, geometry)
    return readers[0], replace(z_plus, fn=_denominator, operands=operands), gamma, bias if scale is None else None


def _sum_of(first: Instr, plus_at: int, plus: Instr) -> tuple | None:
    """The same for a sum that a BatchNorm of several maps reads: it stays an instruction, which fills in what is missing."""
    x, W, _, geometry = first.operands
    if plus.fn is not rule_ops.plus_product or plus.operands != (x, W, geometry, False):
        return None
    return plus_at, replace(plus, fn=_sum, operands=(Slot(plus.outs[0]), x, W, geometry)), None, None


def dual_transposed_phi(p: _Program, position: int) -> None:
    """Both maps' transposed products of one layer, and both rules at the ReLU before it."""
    phi = p.instrs[position]
    if phi.op != "dual_phi":
        return
    g, g_plus = phi.operands[:2]
    at, plus_at = (p.made_by(o, *names) for o, names in ((g, ("conv^T", "linear^T")), (g_plus, ("conv+^T", "linear+^T"))))
    if at is None or plus_at is None or not p.only_reader(g.index, position) or not p.only_reader(g_plus.index, position):
        return
    operands = _both(p, at, plus_at)
    if operands is None:
        return
    one, plus, (early, late) = p.instrs[at], p.instrs[plus_at], sorted((at, plus_at))
    # without kernels the products run where they stood, and free s and W+ there; with them s and s+ just pass through
    rule, made = f"{plus.rule} | {one.rule}", (g.index, g_plus.index)
    products = Instr(f"dual_{one.op}", _products, operands, made, one.layer, rule, "dual_transposed_phi", one.options)
    _, _, W, _, geometry, in_size, factor, _ = operands
    p.replace(late, products, early)
    fused = replace(phi, op="dual_phi", fn=_transposed_phi, kernel="dual_transposed_phi")
    p.replace(position, replace(fused, operands=(g, g_plus, W, geometry, in_size, factor, phi.operands[2:], None)))


def dual_transposed(p: _Program, position: int) -> None:
    """Both maps' transposed products of one layer, wherever the two stand, where no such ReLU is before it."""
    one = p.instrs[position]
    if one.op not in ("conv^T", "linear^T"):
        return
    for plus_at, plus in enumerate(p.instrs):
        if plus is None or plus.layer != one.layer or plus.op != f"{one.op[:-2]}+^T":
            continue
        operands = _both(p, position, plus_at)
        place = None if operands is None else _place(p, position, plus_at)
        if place is not None:
            fused = Instr(
                f"dual_{one.op}", _transposed, (*operands, None), (one.outs[0], plus.outs[0]), one.layer,
                f"{plus.rule} | {one.rule}", "dual_transposed_phi", one.options,
            )  # fmt: skip
            p.replace(place, fused, plus_at if place == position else position)
        return


def hand_over(p: _Program, position: int) -> None:
    """The adjoint of a `dual_phi` goes to the products that alone read its results: one pass in the backward."""
    consumer, reader = p.instrs[position], position
    if consumer.fn is _transposed_phi:
        reader = p.made_by(consumer.operands[0], "dual_conv^T", "dual_linear^T")
    elif consumer.fn is not _transposed:
        return
    s, s_plus = p.instrs[reader].operands[:2]
    at = p.made_by(s, "dual_phi")
    if at is None or p.instrs[at].outs != (s.index, s_plus.index):
        return
    if not p.only_reader(s.index, reader) or not p.only_reader(s_plus.index, reader):
        return
    producer = p.instrs[at]
    if producer.fn is _transposed_phi:
        before, handing = producer.operands[-2], replace(producer, options=(*producer.options, ("passes_on", True)))
    elif producer.fn is ops.dual_phi:
        before, handing = producer.operands[2:], replace(producer, fn=_dual_phi_handed_over)
    else:
        return
    p.replace(position, replace(consumer, operands=(*consumer.operands[:-1], before)))
    p.replace(at, handing)


def spare_weight(p: _Program, position: int) -> None:
    """W+ is made where its readers need it: not if each of them makes it on its own."""
    weight = p.instrs[position]
    if weight.op == "W+" and all(p.instrs[at].fn in (_denominator, _transposed, _products) for at in p.readers.get(weight.outs[0], [])):
        p.replace(position, replace(weight, fn=_positive_weight, options=(("backend", p.backend),)))


def _both(p: _Program, at: int, plus_at: int) -> tuple | None:
    """Operands of the two transposed products as those of `_products`, if they belong together."""
    one, plus = p.instrs[at], p.instrs[plus_at]
    plain = all(instr.kernel and len(instr.operands) == 5 for instr in (one, plus))  # one product each, nothing behind it
    if not plain or one.layer != plus.layer:
        return None
    s, W, geometry, in_size, factor = one.operands
    s_plus, W_plus, *same, factor_plus = plus.operands
    weight_at = p.made_by(W_plus, "W+")
    if weight_at is None or p.instrs[weight_at].operands != (W, factor) or same != [geometry, in_size]:
        return None
    return s, s_plus, W, W_plus, geometry, in_size, factor, factor_plus


def _place(p: _Program, *both: int) -> int | None:
    """Which of two positions has the operands of both instructions before it and the readers of their results behind it."""
    early, late = sorted(both)
    if all(at > late for slot in p.instrs[early].outs for at in p.readers.get(slot, [])):
        return late
    made = [p.maker.get(slot, -1) for slot in slots_in(p.instrs[late].operands)]
    return early if all(at < early for at in made) else None


# ---- what runs -----------------------------------------------------------------------------------------------------------


def _made_by_the_forward(backend: str, t: Tensor) -> bool:
    """Whether the forward makes the z+ sums, and nobody makes W+ (see above)."""
    return torch.is_grad_enabled() and has_kernel("dual_fprop", backend, t)


def _fprop(x, W, bias, geometry, gamma, plus_bias, *, relu=False, backend="auto"):
    """``(y, z+ sum or None)``; without a BatchNorm the sum has its bias already."""
    if _made_by_the_forward(backend, x):
        sign = None if gamma is None else torch.sign(gamma.detach())
        shift_plus = None if plus_bias is None else plus_bias.detach().clamp(min=0)
        y, P = ops.dual_fprop(x, W, geometry, sign, bias, shift_plus, backend=backend)
    elif relu and has_kernel("linear_act", backend, x):
        return ops.linear_act(x, W, geometry, None, bias, None, True, backend=backend), None
    else:
        y, P = ops.fprop(x, W, bias, geometry), None
    if not relu:
        return y, P
    return torch.relu_(y) if geometry.spatial else torch.relu(y), P  # a dense layer's may be a view of what the kernel wrote


def _positive_weight(W, scale, *, backend):
    return None if _made_by_the_forward(backend, W) else _signed_positive(W, scale)


def _sum(P, x, W, geometry):
    """The sum of positive contributions; ``P`` is None where the forward left it to relevance."""
    return rule_ops.plus_product(x, W, geometry, False) if P is None else P


def _denominator(P, x, W_plus, factor, shift, geometry, *, backend="auto"):
    """z+; ``P`` is None where the forward left it to relevance."""
    if P is not None:
        return P if factor is None else rule_ops.plus_denominator(P, factor, shift, backend=backend)
    P = ops.fprop(x, W_plus, None, geometry)
    if geometry.spatial or factor is not None:
        return rule_ops.plus_denominator(P, factor, shift, backend=backend)
    return rule_ops.plus_linear_denominator(P, shift)


def _products(s, s_plus, W, W_plus, geometry, in_size, factor, factor_plus, *, backend="auto"):
    """``(g, g+)``; or ``(s, s+)`` as they came, where the fused op makes both products and what is behind them."""
    if has_kernel("dual_fprop", backend, s):
        return s, s_plus
    g = ops.transposed(s, W, geometry, in_size, factor, backend=backend)
    return g, ops.transposed(s_plus, W_plus, geometry, in_size, factor_plus, backend=backend)


def _transposed(s, s_plus, W, W_plus, geometry, in_size, factor, factor_plus, before, *, backend="auto"):
    """``(g, g+)``."""
    if has_kernel("dual_fprop", backend, s):
        return ops.dual_transposed_phi(s, s_plus, W, geometry, in_size, factor, before=before, backend=backend)
    return _products(s, s_plus, W, W_plus, geometry, in_size, factor, factor_plus, backend=backend)


def _transposed_phi(t, t_plus, W, geometry, in_size, factor, phi, before, *, passes_on=False, backend="auto"):
    """Both rules at the ReLU behind `_products`."""
    if has_kernel("dual_fprop", backend, t):
        return ops.dual_transposed_phi(
            t, t_plus, W, geometry, in_size, factor, *phi, before=before, handed_over=passes_on, backend=backend
        )
    return ops.dual_phi(t, t_plus, *phi, backend=backend)


def _dual_phi_handed_over(*operands, backend="auto"):
    fused = has_kernel("dual_fprop", backend, operands[0])
    return (ops.dual_phi_handed_over if fused else ops.dual_phi)(*operands, backend=backend)
