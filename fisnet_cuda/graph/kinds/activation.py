"""Activations other than ReLU: relevance passes through, ``R_z = R_a``; in gradient form ``s = a g / (z + e sign z)``.

Shared with the forward: input ``z`` and output ``a``.
"""

import torch.nn.functional as F

from ... import ops
from ..ir import Slot


def nonneg(b, node) -> bool:
    function, settings = node.attrs["function"], node.attrs["settings"]
    return function in ("relu6", "softplus") or (function == "hardtanh" and settings[0] >= 0)


def forward(b, index, node) -> None:
    function = node.attrs["function"]
    if function == "gelu":
        b.emit_forward(index, function, _gelu, (Slot(node.inputs[0]), *node.attrs["settings"]))
    else:
        b.emit_forward(index, function, getattr(F, function), (Slot(node.inputs[0]), *node.attrs["settings"]))


def _gelu(x, approximate):
    return F.gelu(x, approximate=approximate)


def relevance(b, index, node, stream) -> None:
    from . import wants_R

    source = node.inputs[0]
    R = stream.take_R(index, node.name)
    if wants_R(stream, source):
        stream.give(source, "R", R)
        return
    rule = stream.epsilon_at(index)
    eps = stream.eps_operand(source, rule)
    stream.give(source, "g", b.emit(node.name, rule, "ratio", ops.stabilised_ratio, (R, Slot(source), eps)))
