"""Patterns around linear maps: what a product's kernel does while the product is still in registers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .ir import Slot

if TYPE_CHECKING:
    from .fuse import _Program


def transposed_phi(p: _Program, position: int) -> None:
    """ReLU, then a linear map, backwards: the ReLU's phi (and the BatchNorm before it) behind the transposed product."""
    phi = p.instrs[position]
    if phi.op not in ("phi_scale", "phi_scale_bn"):
        return
    g, a, eps, skip, *behind = phi.operands
    at, other = _product(p, position, (g, skip))
    if at is None:
        return
    product = p.instrs[at]
    op = product.op + phi.op.replace("phi_scale", "_phi")
    rule = product.rule if product.rule == phi.rule else f"{product.rule} | {phi.rule}"
    p.replace(position, replace(product, op=op, operands=(*product.operands, a, eps, other, *behind), outs=phi.outs, rule=rule), at)


def transposed_add(p: _Program, position: int) -> None:
    """What a linear map gives to a value, and what another reader gives."""
    add = p.instrs[position]
    if add.op != "add" or not all(isinstance(operand, Slot) for operand in add.operands):
        return
    at, other = _product(p, position, add.operands)
    # where the other one is what the map reads (a skip past one map), its gradients are better joined there
    if at is not None and p.instrs[at].operands[0] != other:
        product = p.instrs[at]
        operands = (*product.operands, None, 0.0, other)
        p.replace(position, replace(product, op=f"{product.op}_add", operands=operands, outs=add.outs), at)


def _product(p: _Program, position: int, summands: tuple) -> tuple[int | None, Slot | None]:
    """Where the transposed product is made that alone ``position`` reads as one of two summands, and the other summand.

    Of two products the later one: the other one's result is there by then.
    """
    found = []
    for which, operand in enumerate(summands):
        at = p.made_by(operand, "conv^T", "linear^T", "conv+^T", "linear+^T")
        if at is not None and p.instrs[at].kernel == "transposed_phi" and p.only_reader(operand.index, position):
            found.append((at, which))
    if not found:
        return None, None
    at, which = max(found)
    return at, summands[1 - which]
