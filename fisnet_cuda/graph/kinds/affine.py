"""``x + c``, ``x - c`` (relevance unchanged: the constant takes its share as a bias does) and ``x * c``, ``x / c``."""

import operator

from ... import ops
from ..ir import Param, Slot


def nonneg(b, node) -> bool:
    c = node.attrs["constant"]
    positive = not isinstance(c, Param) and isinstance(c, (int, float)) and c >= 0
    return positive and b.nonneg[node.inputs[0]] and node.attrs["fn"] is not operator.sub


def forward(b, index, node) -> None:
    b.emit_forward(index, node.attrs["fn"].__name__, node.attrs["fn"], (Slot(node.inputs[0]), node.attrs["constant"]))


def relevance(b, index, node, stream) -> None:
    source = node.inputs[0]
    g = stream.take_g(index, node.name)
    if node.attrs["scales"]:
        operands = (g, node.attrs["constant"], node.attrs["fn"], b.shape(source))
        g = b.emit(node.name, None, "constant", _scaled, operands)
    stream.give(source, "g", g)


def _scaled(g, constant, fn, in_shape):
    """``fn(g, c)`` with ``c`` read per sample: a constant of several values has the rank of the activation or less."""
    if getattr(constant, "dim", lambda: 0)() > len(in_shape) and constant.shape[0] != 1:
        return ops.times(fn(constant.new_ones(1), constant), g)
    return fn(g, constant)
