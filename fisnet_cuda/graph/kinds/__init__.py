"""The kinds of LRP nodes: one file each, with the forward, the relevance per rule, and what the two share.

A kind module has three functions: ``nonneg(b, node)`` says whether its value is never negative, ``forward(b, index, node)``
emits its forward, ``relevance(b, index, node, stream)`` takes the contributions at its value and gives its inputs theirs.
Two are optional: ``sums(stream, index, node)``, the two sums of z+ for a norm layer that reads the value, and ``bound(b, index,
node, low, high)``, the bounds of the value for z^B, of kinds that may stand in front of a first layer.
"""

from __future__ import annotations

from types import ModuleType

from ..ir import Node
from . import (
    activation,
    add,
    affine,
    avg_pool,
    batch_norm,
    concat,
    host,
    linear,
    linear_map,
    mask,
    max_pool,
    norm,
    relu,
    reshape,
    slicing,
    source,
)

_KINDS = {
    "input": source,
    "host": host,
    "conv": linear,
    "linear": linear,
    "batch_norm": batch_norm,
    "norm": norm,
    "constant": affine,
    "relu": relu,
    "activation": activation,
    "pool_max": max_pool,
    "pool_avg": avg_pool,
    "add": add,
    "concat": concat,
    "reshape": reshape,
    "permute": reshape,
    "copy": reshape,
    "cast": reshape,
    "slice": slicing,
    "linear_map": linear_map,
    "mask": mask,
}


def of(node: Node) -> ModuleType:
    """The module that implements the node's kind."""
    return _KINDS[node.kind]


def moves(node: Node) -> bool:
    """Whether the node only moves, copies or rescales values, so that bounds of its input are bounds of its value."""
    if node.kind == "linear_map":
        return linear_map.copies(node)
    return hasattr(of(node), "bound") and node.attrs.get("fixed", True)


def wants_R(stream, value: int) -> bool:
    """Whether the node that makes ``value`` works on relevance itself (else on relevance per unit, ``g``)."""
    from ...rules import Epsilon, ZPlus

    b = stream.b
    node = b.graph.nodes[value]
    if node.kind in ("conv", "linear"):
        return not isinstance(stream.rule(value), Epsilon)
    if node.kind == "batch_norm":
        if value in b.merged_into:
            return wants_R(stream, b.merged_into[value])
        return isinstance(stream.rule(value), ZPlus)
    if node.kind == "activation":
        return True
    mixes = node.kind in ("norm", "add", "pool_max", "pool_avg", "constant")
    if mixes or (node.kind == "linear_map" and not linear_map.copies(node)):
        return isinstance(stream.rule(value), ZPlus)
    if node.kind == "relu" and isinstance(stream.rule(value), Epsilon):
        return False
    return any(wants_R(stream, source) for source in node.inputs)  # it passes on what it gets
