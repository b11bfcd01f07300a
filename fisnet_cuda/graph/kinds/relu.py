"""ReLU: where LRP-epsilon acts. In gradient form ``s = phi(a) . g``; every other rule passes relevance through unchanged.

Shared with the forward: its own output ``a``.
"""

import torch

from ... import ops
from ..ir import Slot


def nonneg(b, node) -> bool:
    return True


def forward(b, index, node) -> None:
    b.emit_forward(index, "relu", torch.relu, (Slot(node.inputs[0]),))


def relevance(b, index, node, stream) -> None:
    from . import wants_R

    source = node.inputs[0]
    if wants_R(stream, source):
        stream.give(source, "R", stream.take_R(index, node.name))
        return
    rule = stream.epsilon_at(index)
    eps = stream.eps_operand(index, rule)
    g = stream.of_form(index, "g") + [stream._g_of_pair(index, p, node.name) for p in stream.of_form(index, "S")]
    if g:
        # two consumers are joined inside the op (a block's end: the next convolution and the skip)
        first, skip = (g[0], None) if len(g) == 1 else (stream.sum(g[:-1], node.name), g[-1])
        operands = (first, Slot(index), eps, skip)
        s = b.emit(node.name, rule, "phi_scale", ops.phi_scale, operands, kernel="phi_scale", backend=b.backend)
        stream.give(source, "g", s)
    R = stream.of_form(index, "R")
    if R:  # from a rule that gives relevance to dead units too (w^2, flat): the pre-activation carries it
        total = stream.sum(R, node.name)
        s = b.emit(node.name, rule, "ratio", ops.stabilised_ratio, (total, Slot(source), eps))
        stream.give(source, "g", s)
