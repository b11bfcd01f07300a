"""Convolutions and dense layers, with the BatchNorm that follows folded in: the transposed product, per rule.

Shared with the forward: the input ``a`` (for rules that look at it) and, for z^B, the pre-activation or the ReLU after it.
"""

import torch

from ... import ops
from ...ops import rules as rule_ops
from ...rules import ZB, AlphaBeta, Epsilon, Flat, Gamma, WSquare, ZPlus
from ..ir import Slot
from .batch_norm import scale_of, scale_shift_of


def nonneg(b, node) -> bool:
    return False


def forward(b, index, node) -> None:
    attrs = node.attrs
    operands = (Slot(node.inputs[0]), attrs["weight"], attrs["bias"], attrs["geometry"])
    dense_bn = node.kind == "linear" and index in b.merged
    b.emit_forward(index, node.kind, _fprop_2d if dense_bn else ops.fprop, operands)


def relevance(b, index, node, stream) -> None:
    rule = stream.rule(index)
    emit = {
        Epsilon: _epsilon, ZB: _zb, ZPlus: _zplus, Gamma: _general, AlphaBeta: _general, WSquare: _general, Flat: _general,
    }[type(rule)]  # fmt: skip
    emit(b, index, node, stream, rule)


def _in_size(b, node):
    return b.size(node.inputs[0]) if node.kind == "conv" else ()


def _epsilon(b, index, node, stream, rule) -> None:
    out = b.output_of(index)
    g = stream.take_g(out, node.name)
    scale = scale_of(b, out) if out != index else None
    operands = (g, node.attrs["weight"], node.attrs["geometry"], _in_size(b, node), scale)
    s = b.emit(node.name, rule, f"{node.kind}^T", ops.transposed_phi, operands, kernel="transposed_phi", backend=b.backend)
    stream.give(node.inputs[0], "g", s)


def _folded(b, index, node, constant_bias=True) -> tuple:
    """``(W~, b~)`` as operands: BatchNorm folded in, or the layer's own."""
    out = b.output_of(index)
    if out == index:
        return node.attrs["weight"], _detached_bias(b, index, node) if constant_bias else node.attrs["bias"]
    scale, shift = scale_shift_of(b, out, node.attrs["bias"], constant_bias)
    W = b.once(("folded", index), lambda: b.emit(node.name, None, "fold", _fold, (node.attrs["weight"], scale)))
    return W, shift


def _detached_bias(b, index, node):
    """The layer's own bias, which gets no gradient from relevance (semantics.md sections 2 and 4)."""
    if node.attrs["bias"] is None:
        return None
    return b.once(("bias", index), lambda: b.emit(node.name, None, "bias", torch.detach, (node.attrs["bias"],)))


def _zb(b, index, node, stream, rule) -> None:
    out = b.output_of(index)
    R = stream.take_R(out, node.name)
    W, shift = _folded(b, index, node)
    # the pre-activation matters only where R is not 0: behind a ReLU its output is as good, and need not be kept twice;
    # unless R came as such, from a rule that gives relevance to dead units too (w^2, flat)
    users = b.users[out]
    behind_relu = len(users) == 1 and b.graph.nodes[users[0]].kind == "relu" and not stream.of_form(users[0], "R")
    z = users[0] if behind_relu else out
    low, high = b.bounds(node.inputs[0], rule.low, rule.high)
    geometry, shape = node.attrs["geometry"], node.attrs.get("shape")
    operands = (R, Slot(node.inputs[0]), Slot(z), W, shift, low, high, float(rule.eps), geometry, shape)
    heatmap = b.emit(node.name, rule, "zb", _zb_with_bounds, operands, kernel="zb", backend=b.backend)
    stream.give(node.inputs[0], "R", heatmap)


def _zplus(b, index, node, stream, rule) -> None:
    out, source = b.output_of(index), node.inputs[0]
    attrs, signed = node.attrs, not b.nonneg[node.inputs[0]]
    eps = float(rule.eps)
    pairs = stream.of_form(out, "S")
    if signed or pairs:
        _zplus_two_sided(b, index, node, stream, rule, pairs)
        return
    # one product: W+ where the BatchNorm's scale is positive, |W-| where it is negative
    geometry = attrs["geometry"]
    scale = shift = None
    if out != index:
        scale, shift = scale_shift_of(b, out, attrs["bias"])
    else:
        shift = _detached_bias(b, index, node)
    W = b.emit(node.name, rule, "W+", _signed_positive, (attrs["weight"], scale))
    P = b.emit(node.name, rule, f"{node.kind}+", ops.fprop, (Slot(source), W, None, geometry))
    factor = None if scale is None else b.emit(node.name, rule, "|scale|", torch.abs, (scale,))
    everything = stream.of_form(index, "all")
    if everything and not geometry.spatial and scale is None:
        s = _start(b, node, rule, P, shift)
    else:
        if geometry.spatial or scale is not None:
            z_plus = b.emit(node.name, rule, "z+", rule_ops.plus_denominator, (P, factor, shift), backend=b.backend)
        else:
            z_plus = b.emit(node.name, rule, "z+", rule_ops.plus_linear_denominator, (P, shift))
        if everything:
            s = _start(b, node, rule, z_plus, None)
        else:
            R = stream.take_R(out, node.name)
            s = b.emit(node.name, rule, "ratio", ops.stabilised_ratio, (R, z_plus, eps, True))
    operands = (s, W, geometry, _in_size(b, node), factor)
    g = b.emit(node.name, rule, f"{node.kind}+^T", ops.transposed_phi, operands, kernel="transposed_phi", backend=b.backend)
    stream.give(source, "g", g)


def _start(b, node, rule, P, bias) -> Slot:
    """Dual's z+ map starts from all of the last layer's sums."""
    operands = (P, bias, float(rule.eps))
    return b.emit(node.name, rule, "start", ops.plus_start, operands, kernel="plus_start", backend=b.backend)


def _zplus_two_sided(b, index, node, stream, rule, pairs) -> None:
    """z+ where both signs of weights count: signed inputs, or a BatchNorm that reads this map among others."""
    out, source = b.output_of(index), node.inputs[0]
    geometry, signed = node.attrs["geometry"], not b.nonneg[node.inputs[0]]
    if out != index:
        W, shift = _folded(b, index, node)
        P = b.emit(node.name, rule, f"{node.kind}+", rule_ops.plus_product, (Slot(source), W, geometry, signed))
    else:
        W = node.attrs["weight"]
        P, shift = stream.sums(index)[0], _detached_bias(b, index, node)
    plus = [p for p, _ in pairs]
    minus = [m for _, m in pairs if m is not None]
    own = [c for c in stream.contributions[out] if c[0] in ("g", "R")]
    if own or stream.of_form(index, "all"):
        z_plus = b.emit(node.name, rule, "z+", _with_bias, (P, shift, geometry))
        eps = float(rule.eps)
        if own:
            R = stream.alone(out, own).take_R(out, node.name)
            plus.append(b.emit(node.name, rule, "ratio", ops.stabilised_ratio, (R, z_plus, eps, True)))
        else:
            plus.append(_start(b, node, rule, z_plus, None))
    s_minus = stream.sum(minus, node.name) if minus else None
    operands = (stream.sum(plus, node.name), s_minus, Slot(source), W, geometry, _in_size(b, node), signed)
    g = b.emit(node.name, rule, f"{node.kind}+^T", rule_ops.plus_transposed, operands, backend=b.backend)
    stream.give(source, "g", g)


def _general(b, index, node, stream, rule) -> None:
    out, source = b.output_of(index), node.inputs[0]
    R = stream.take_R(out, node.name)
    # gamma divides by the forward's own z, as epsilon does (and is epsilon at gamma = 0), so biases get their gradient
    W, bias = _folded(b, index, node, constant_bias=not isinstance(rule, Gamma))
    geometry, size, signed = node.attrs["geometry"], _in_size(b, node), not b.nonneg[source]
    if isinstance(rule, (WSquare, Flat)):
        operands = (R, Slot(source), W, geometry, size, isinstance(rule, Flat), float(rule.eps))
        stream.give(source, "R", b.emit(node.name, rule, f"{node.kind}^T", rule_ops.w_square, operands))
        return
    common = (R, Slot(source), W, bias, geometry, size, signed)
    if isinstance(rule, Gamma):
        g = b.emit(node.name, rule, f"{node.kind}^T", rule_ops.gamma, (*common, float(rule.gamma), float(rule.eps)))
    else:
        parts = (float(rule.alpha), float(rule.beta), float(rule.eps))
        g = b.emit(node.name, rule, f"{node.kind}^T", rule_ops.alpha_beta, (*common, *parts))
    stream.give(source, "g", g)


def _fprop_2d(x, W, bias, geometry):
    if x.dim() != 2:
        raise ValueError(
            f"BatchNorm1d with {W.shape[0]} features behind a Linear with as many outputs needs inputs [N, C], got "
            f"{tuple(x.shape)}: which axis holds the channels is ambiguous there"
        )
    return ops.fprop(x, W, bias, geometry)


def _fold(W, scale):
    return W * scale.view(-1, *[1] * (W.dim() - 1))


def _signed_positive(W, scale):
    return ops.positive_part(W, None if scale is None else torch.sign(scale.detach()))


def _with_bias(P, shift, geometry):
    return P if shift is None else P + rule_ops.channel_bias(shift.clamp(min=0), geometry)


def _zb_with_bounds(R, x, z, W, shift, low, high, eps, geometry, shape=None, carrier=None, backend="auto"):
    """`ops.zb`; ``shape``, that of the weight where it is known, tells the plan whether a kernel serves the layer."""
    return ops.zb(R, x, z, W, shift, _bound(low, x), _bound(high, x), eps, geometry, carrier, backend=backend)


def _bound(bound, x):
    """A bound as a tensor beside ``x``, filled on its device (no copy from the host, so CUDA graphs can record it)."""
    if isinstance(bound, torch.Tensor):
        return bound
    values = bound if isinstance(bound, tuple) else (bound,)
    return torch.cat([x.new_full((1,), float(v)) for v in values])
