"""``x + c``, ``x - c``: the constant takes its share as a bias does; ``x * c``, ``x / c``: ``g`` is scaled."""

import operator

import torch

from ... import ops
from ...rules import ZPlus
from ..ir import Slot


def nonneg(b, node) -> bool:
    c = node.attrs["constant"]
    positive = isinstance(c, (int, float)) and c >= 0
    return positive and b.nonneg[node.inputs[0]] and node.attrs["fn"] is not operator.sub


def forward(b, index, node) -> None:
    b.emit_forward(index, f"{node.attrs['fn'].__name__}_c", node.attrs["fn"], (Slot(node.inputs[0]), node.attrs["constant"]))


def relevance(b, index, node, stream) -> None:
    attrs, source, rule = node.attrs, node.inputs[0], stream.rule(index)
    own = stream.contributions[index]
    if index in b.near_input:  # in front of a first layer with a rule of its own: relevance stays where it is
        for R in stream.of_form(index, "R"):
            stream.give(source, "R", b.emit(node.name, None, "constant", _reduced, (R, b.shape(source))))
        own = [c for c in own if c[0] != "R"]
    if not own:
        return
    alone = stream.alone(index, own)
    operands = attrs["constant"], attrs["fn"], b.shape(source)
    if isinstance(rule, ZPlus):
        R = alone.take_R(index, node.name)
        fn = _plus_scale if attrs["scales"] else _plus_shift
        stream.give(source, "g", b.emit(node.name, rule, "constant z+", fn, (R, Slot(source), *operands, float(rule.eps))))
        return
    fn = _scaled if attrs["scales"] else _shifted
    g = alone.take_g(index, node.name)
    stream.give(source, "g", b.emit(node.name, None, "constant", fn, (g, *operands)))


def bound(b, index, node, low, high) -> tuple:
    """The input's bounds for z^B: the constant changes them as it changes the input."""
    operands = (low, high, node.attrs["fn"], node.attrs["constant"])
    return b.emit(node.name, None, "bounds", _bounds, operands, outs=2)


def _bounds(low, high, fn, constant):
    low, high = fn(low, constant), fn(high, constant)
    return low.minimum(high), low.maximum(high)


def _reduced(g, in_shape):
    """The sum over the axes that the constant broadcast."""
    return g if g.shape[1:] == in_shape else g.sum_to_size(g.shape[0], *in_shape)


def _shifted(g, constant, fn, in_shape):
    return _reduced(g, in_shape)


def _scaled(g, constant, fn, in_shape):
    """``fn(g, c)``, with ``c`` read per sample where it has a batch axis."""
    if getattr(constant, "dim", lambda: 0)() > len(in_shape) and constant.shape[0] != 1:
        factor = fn(constant.new_ones(1), constant)
        return _reduced(ops.times(factor.expand(-1, *g.shape[1:]), g), in_shape)
    return _reduced(fn(g, constant), in_shape)


def _plus_scale(R, x, constant, fn, in_shape, eps):
    z = fn(x, constant)
    s = ops.stabilised_ratio(R, torch.relu(z), eps, True)
    return _scaled(ops.times((z >= 0).to(s.dtype), s), constant, fn, in_shape)


def _plus_shift(R, x, constant, fn, in_shape, eps):
    z = torch.relu(x) + fn(x.new_zeros(1), constant).detach().clamp(min=0)
    s = ops.stabilised_ratio(R, z, eps, True)
    return _reduced(ops.times((x >= 0).to(s.dtype).expand_as(z), s), in_shape)
