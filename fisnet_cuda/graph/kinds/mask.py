"""Dropout: ``g`` goes through the mask that the forward drew (scaled as there), relevance itself stays.

Shared with the forward: the mask, None when dropout is off.
"""

import torch
import torch.nn.functional as F

from ... import ops
from ..ir import Slot

_DROPOUT = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)


def nonneg(b, node) -> bool:
    return b.nonneg[node.inputs[0]]


def forward(b, index, node) -> None:
    attrs = node.attrs
    operands = (Slot(node.inputs[0]), attrs["p"], attrs["feature"], attrs["training"])
    (mask,) = b.emit_forward(index, "dropout", _dropout, operands, extra=1)
    b.shared[("mask", index)] = Slot(mask)


def relevance(b, index, node, stream) -> None:
    source = node.inputs[0]
    mask = b.shared[("mask", index)]
    for form, slot in stream.contributions[index]:
        if form == "R":
            stream.give(source, form, slot)
            continue
        parts = [None if s is None else b.emit(node.name, None, "mask", _masked, (s, mask)) for s in
                 (slot if form == "S" else (slot,))]  # fmt: skip
        stream.give(source, form, tuple(parts) if form == "S" else parts[0])


def _dropout(x, p, feature, training):
    if not training or p == 0:
        return x, None
    # dropout of ones draws the same numbers as dropout of x, and is the mask that relevance needs
    mask = _DROPOUT[feature](torch.ones_like(x), p, True)
    return x * mask, mask


def _masked(g, mask):
    return g if mask is None else ops.times(mask, g)
