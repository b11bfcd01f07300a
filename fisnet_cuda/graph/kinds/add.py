"""Residual addition: ``g`` goes to both branches (epsilon acts once, in the ReLU after the sum); z+ divides,
``R_x = x+ R / (x+ + y+ + e)``.

Shared with the forward: for z+ the two summands.
"""

import torch

from ... import ops
from ...rules import ZPlus
from ..ir import Slot


def nonneg(b, node) -> bool:
    return all(b.nonneg[source] for source in node.inputs)


def forward(b, index, node) -> None:
    b.emit_forward(index, "add", add, tuple(Slot(source) for source in node.inputs))


def relevance(b, index, node, stream) -> None:
    rule = stream.rule(index)
    if not isinstance(rule, ZPlus):
        g = stream.take_g(index, node.name)
        for source in node.inputs:
            stream.give(source, "g", g)
        return
    for plus, minus in stream.of_form(index, "S"):  # a BatchNorm folded into this sum: no denominator of its own
        for source in node.inputs:
            pair = plus, None if b.nonneg[source] else minus
            stream.give(source, "g", stream._g_of_pair(source, pair, node.name))
    own = [c for c in stream.contributions[index] if c[0] != "S"]
    if not own:
        return
    R = stream.alone(index, own).take_R(index, node.name)
    x, y = node.inputs
    flags = (b.nonneg[x], b.nonneg[y])
    r = b.emit(node.name, rule, "add_z+", _plus_add, (R, Slot(x), Slot(y), flags, float(rule.eps)))
    for source in node.inputs:
        if b.nonneg[source]:
            stream.give(source, "g", r)
        else:  # the summand's positive part times r; its negative part gets none
            stream.give(source, "R", b.emit(node.name, rule, "times+", _times_positive, (Slot(source), r)))


def add(x, y):
    """The sum of two activations of one shape."""
    check_shapes(x, y)
    return x + y


def check_shapes(x, y):
    """Relevance of a sum goes to both summands as it is."""
    if x.shape != y.shape:
        raise ValueError(
            f"a sum of activations {tuple(x.shape)} and {tuple(y.shape)} has no LRP rule here: bring both to one shape first "
            "(repeat, torch.cat, a resize)"
        )


def _plus_add(R, x, y, nonneg, eps):
    x, y = (v if sure else torch.relu(v) for v, sure in zip((x, y), nonneg))
    return ops.stabilised_ratio(R, x + y, eps, True)


def _times_positive(v, r):
    return ops.times(torch.relu(v), r)
