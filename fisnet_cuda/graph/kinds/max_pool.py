"""Max pools: the winner takes all, overlapping windows add; under z+ it gets ``a_w R / (a_w + e)``.

Shared with the forward: the winners' positions.
"""

import torch

from ... import ops
from ...ops.rules import where_nonneg
from ...rules import ZPlus
from ..ir import Slot


def nonneg(b, node) -> bool:
    return b.nonneg[node.inputs[0]]


def forward(b, index, node) -> None:
    operands = (Slot(node.inputs[0]), *_pool(node))
    (winners,) = b.emit_forward(index, "max_pool", ops.max_pool, operands, extra=1, kernel="max_pool", backend=b.backend)
    b.shared[("winners", index)] = Slot(winners)


def _pool(node) -> tuple:
    return node.attrs["spatial"], node.attrs["adaptive"], node.attrs["settings"]


def relevance(b, index, node, stream) -> None:
    source = node.inputs[0]
    rule = stream.rule(index)
    own = [c for c in stream.contributions[index] if c[0] != "S"]
    if isinstance(rule, ZPlus) and own:
        g = [_own_g(b, index, node, stream, rule, own)]
        # a BatchNorm folded into this pool has its own denominator already
        g += [stream._g_of_pair(index, pair, node.name) for pair in stream.of_form(index, "S")]
        total = stream.sum(g, node.name)
    else:
        total = stream.take_g(index, node.name)
    operands = (total, b.shared[("winners", index)], b.size(source), _pool(node))
    kernel = "max_pool_scatter"
    g = b.emit(node.name, rule, "max_pool^T", ops.max_pool_transposed, operands, kernel=kernel, backend=b.backend)
    stream.give(source, "g", g)


def _own_g(b, index, node, stream, rule, own) -> Slot:
    """The pool's own denominator, ``R / (v + e)``; where ``R = v . g`` and ``v >= 0`` that is ``phi(v) . g``, in one pass."""
    alone = stream.alone(index, own)
    eps = float(rule.eps)
    if b.nonneg[index] and not alone.of_form(index, "R"):
        operands = (alone.take_g(index, node.name), Slot(index), eps, None)
        return b.emit(node.name, rule, "phi_scale z+", ops.phi_scale, operands, kernel="phi_scale", backend=b.backend)
    operands = (alone.take_R(index, node.name), Slot(index), b.nonneg[index], eps)
    return b.emit(node.name, rule, "ratio z+", _plus_ratio, operands)


def _plus_ratio(R, v, nonneg, eps):
    s = ops.stabilised_ratio(R, v if nonneg else torch.relu(v), eps, True)
    return s if nonneg else where_nonneg(v, s)
