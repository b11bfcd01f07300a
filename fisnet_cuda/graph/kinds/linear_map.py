"""Linear maps without parameters: mean, sum, padding, resizing, shuffles; transposed as they are.

Under z+ a mean divides by its own value as an average pool does; copies (padding, nearest resizing, shuffles) keep relevance.
"""

from ... import ops
from ...rules import ZPlus
from ..ir import Slot


def nonneg(b, node) -> bool:
    bicubic = node.attrs["op"] == "interpolate" and node.attrs["settings"][2] == "bicubic"
    return b.nonneg[node.inputs[0]] and not bicubic


def forward(b, index, node) -> None:
    b.emit_forward(index, node.attrs["op"], ops.linear_op, (Slot(node.inputs[0]), node.attrs["op"], node.attrs["settings"]))


def relevance(b, index, node, stream) -> None:
    source, op = node.inputs[0], node.attrs["op"]
    rule = stream.rule(index)
    settings = (op, node.attrs["settings"], b.shape(source))
    if isinstance(rule, ZPlus) and op in ("mean", "sum"):
        R = stream.take_R(index, node.name)
        operands = (R, Slot(source), b.nonneg[source], *settings, float(rule.eps))
        stream.give(source, "g", b.emit(node.name, rule, f"{op}^T z+", _plus, operands))
        return
    g = stream.take_g(index, node.name)
    stream.give(source, "g", b.emit(node.name, None, f"{op}^T", ops.linear_op_transposed, (g, *settings)))


def _plus(R, v, nonneg, op, settings, in_shape, eps):
    up = v if nonneg else v.clamp(min=0)
    s = ops.stabilised_ratio(R, ops.linear_op(up, op, settings), eps, True)
    g = ops.linear_op_transposed(s, op, settings, in_shape)
    return g if nonneg else ops.times((v >= 0).to(g.dtype), g)
