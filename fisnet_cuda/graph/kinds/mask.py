"""Dropout: ``g`` goes through the mask that the forward drew (scaled as there), relevance itself stays.

Shared with the forward: the mask, None when dropout is off.
"""

import torch
import torch.nn.functional as F

from ... import ops
from ..ir import Slot


def nonneg(b, node) -> bool:
    return b.nonneg[node.inputs[0]]


def forward(b, index, node) -> None:
    attrs = node.attrs
    operands = (Slot(node.inputs[0]), attrs["p"], attrs["feature"], attrs["training"])
    (mask,) = b.emit_forward(index, "dropout", _dropout, operands, extra=1)
    b.shared[("mask", index)] = Slot(mask)


def relevance(b, index, node, stream) -> None:
    source, mask = node.inputs[0], b.shared[("mask", index)]
    for R in stream.of_form(index, "R"):
        stream.give(source, "R", R)
    pairs = [stream._g_of_pair(index, pair, node.name) for pair in stream.of_form(index, "S")]
    for g in stream.of_form(index, "g") + pairs:
        stream.give(source, "g", b.emit(node.name, None, "mask", _masked, (g, mask)))


def bound(b, index, node, low, high) -> tuple:
    """The input's bounds for z^B: a dropped value is 0, the others are scaled."""
    operands = (low, high, b.shared[("mask", index)], node.attrs["p"])
    return b.emit(node.name, None, "bounds", _bounds, operands, outs=2)


def _dropout(x, p, feature, training):
    if not training or p == 0:
        return x, None
    # dropout of ones draws the same numbers as dropout of x, and is the mask that relevance needs
    mask = (torch.feature_dropout if feature else F.dropout)(torch.ones_like(x), p, True)
    return x * mask, mask


def _masked(g, mask):
    return g if mask is None else ops.times(mask, g)


def _bounds(low, high, mask, p):
    if mask is None:
        return low, high
    factor = 1 / (1 - p) if p < 1 else 0.0
    return (low * factor).clamp(max=0), (high * factor).clamp(min=0)
