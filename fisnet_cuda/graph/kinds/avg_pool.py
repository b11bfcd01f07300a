"""Average pools: their transpose; under z+ with their own denominator, ``s = R / (pooled + e)``.

Shared with the forward: for z+ the pool's output.
"""

import torch

from ... import ops
from ...ops.rules import by_sign, where_nonneg
from ...rules import ZPlus
from ..ir import Slot


def nonneg(b, node) -> bool:
    return b.nonneg[node.inputs[0]]


def _settings(node) -> tuple:
    return node.attrs["spatial"], node.attrs["adaptive"], node.attrs["settings"]


def forward(b, index, node) -> None:
    b.emit_forward(index, "avg_pool", ops.avg_pool, (Slot(node.inputs[0]), *_settings(node)))


def relevance(b, index, node, stream) -> None:
    source = node.inputs[0]
    rule = stream.rule(index)

    def transposed(slot):
        operands = (slot, *_settings(node), b.size(source))
        return b.emit(node.name, rule, "avg_pool^T", ops.avg_pool_transposed, operands)

    if not isinstance(rule, ZPlus):
        stream.give(source, "g", transposed(stream.take_g(index, node.name)))
        return
    own = [c for c in stream.contributions[index] if c[0] != "S"]
    if own:
        g = transposed(_own_g(b, index, node, stream, rule, own))
        if not b.nonneg[source]:
            g = b.emit(node.name, rule, "part", where_nonneg, (Slot(source), g))
        stream.give(source, "g", g)
    for plus, minus in stream.of_form(index, "S"):  # a BatchNorm folded into this pool: no denominator of its own
        up = transposed(plus)
        if not b.nonneg[source]:
            down = transposed(plus if minus is None else minus)
            up = b.emit(node.name, rule, "by_sign", by_sign, (Slot(source), up, down))
        stream.give(source, "g", up)


def _own_g(b, index, node, stream, rule, own) -> Slot:
    """``R / (pooled + e)``; where ``R = pooled . g`` and the pool has nothing negative that is ``phi(pooled) . g``, in one pass."""
    alone, source = stream.alone(index, own), node.inputs[0]
    eps = float(rule.eps)
    if b.nonneg[source] and not alone.of_form(index, "R"):
        operands = (alone.take_g(index, node.name), Slot(index), eps, None)
        return b.emit(node.name, rule, "phi_scale z+", ops.phi_scale, operands, kernel="phi_scale", backend=b.backend)
    operands = (alone.take_R(index, node.name), Slot(source), Slot(index), b.nonneg[source], *_settings(node), eps)
    return b.emit(node.name, rule, "ratio z+", _plus_ratio, operands)


def _plus_ratio(R, v, pooled, nonneg, spatial, adaptive, settings, eps):
    up = pooled if nonneg else ops.avg_pool(torch.relu(v), spatial, adaptive, settings)
    return ops.stabilised_ratio(R, up, eps, True)
