"""Linear maps without parameters: mean, sum, padding, resizing, shuffles; transposed as they are.

Padding, shuffles and nearest resizing copy values: relevance goes back to where they came from, in whatever form it comes.
The others mix values: under z+ they divide by their own value, as an average pool does.
"""

import torch

from ... import ops
from ...ops.rules import by_sign, where_nonneg
from ...rules import ZPlus
from ..ir import Slot


def nonneg(b, node) -> bool:
    bicubic = node.attrs["op"] == "interpolate" and node.attrs["settings"][2] == "bicubic"
    return b.nonneg[node.inputs[0]] and not bicubic


def copies(node) -> bool:
    """Whether every output is a copy of one input, or 0."""
    op, settings = node.attrs["op"], node.attrs["settings"]
    return op not in ("mean", "sum", "interpolate") or (op == "interpolate" and settings[2] == "nearest")


def forward(b, index, node) -> None:
    b.emit_forward(index, node.attrs["op"], _run, (Slot(node.inputs[0]), node.attrs["op"], node.attrs["settings"]))


def relevance(b, index, node, stream) -> None:
    source, op = node.inputs[0], node.attrs["op"]
    rule = stream.rule(index)
    settings = (op, node.attrs["settings"], b.shape(source))

    def transposed(slot):
        return b.emit(node.name, None, f"{op}^T", ops.linear_op_transposed, (slot, *settings))

    if copies(node):
        for form in ("g", "R"):
            slots = stream.of_form(index, form)
            if form == "g":
                slots = slots + [stream._g_of_pair(index, p, node.name) for p in stream.of_form(index, "S")]
            if slots:
                stream.give(source, form, transposed(stream.sum(slots, node.name)))
        return
    if not isinstance(rule, ZPlus):
        stream.give(source, "g", transposed(stream.take_g(index, node.name)))
        return
    own = [c for c in stream.contributions[index] if c[0] != "S"]
    if own:
        R = stream.alone(index, own).take_R(index, node.name)
        operands = (R, Slot(source), b.nonneg[source], *settings, float(rule.eps))
        stream.give(source, "g", b.emit(node.name, rule, f"{op}^T z+", _plus, operands))
    for plus, minus in stream.of_form(index, "S"):  # a BatchNorm folded into this map: no denominator of its own
        up = transposed(plus)
        if not b.nonneg[source]:
            up = b.emit(node.name, rule, "by_sign", by_sign, (Slot(source), up, up if minus is None else transposed(minus)))
        stream.give(source, "g", up)


def sums(stream, index, node) -> tuple:
    """``(P, two_sided, bias)`` for z+ through a BatchNorm after it."""
    b, source = stream.b, node.inputs[0]
    if b.nonneg[index] or copies(node):
        return stream.part(index)
    operands = (Slot(source), node.attrs["op"], node.attrs["settings"])
    return b.emit(node.name, ZPlus(), f"{node.attrs['op']}+", _run_part, operands), True, None


def bound(b, index, node, low, high) -> tuple:
    """The input's bounds for z^B, copied as the input is."""
    settings = (node.attrs["op"], node.attrs["settings"])
    return tuple(b.emit(node.name, None, "bounds", ops.linear_op, (v, *settings)) for v in (low, high))


def _run(x, op, settings):
    y = ops.linear_op(x, op, settings)
    if y.shape[:1] != x.shape[:1]:
        raise ValueError(f"{op} over axis 0 of {tuple(x.shape)} mixes the samples: axis 0 must stay the batch")
    return y


def _run_part(x, op, settings):
    return ops.linear_op(torch.relu(x), op, settings)


def _plus(R, v, nonneg, op, settings, in_shape, eps):
    up = v if nonneg else torch.relu(v)
    s = ops.stabilised_ratio(R, ops.linear_op(up, op, settings), eps, True)
    g = ops.linear_op_transposed(s, op, settings, in_shape)
    return g if nonneg else where_nonneg(v, g)
