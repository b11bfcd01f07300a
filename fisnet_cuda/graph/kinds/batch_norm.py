"""BatchNorm: for relevance a per-channel affine map with the statistics that the forward really used, detached.

A BatchNorm that alone reads a convolution is folded into it (`Builder.merged`) and does nothing here. Any other is an affine
map of its own: ``g_in = scale . g``, and under z+ it folds into every map that it reads (`fisnet_cuda.ops.rules.plus_affine`).

Shared with the forward: mean and ``rstd``.
"""

from ... import ops
from ...ops.rules import plus_affine
from ...rules import ZPlus
from ..ir import Slot


def nonneg(b, node) -> bool:
    return False


def forward(b, index, node) -> None:
    attrs = node.attrs
    operands = (
        Slot(node.inputs[0]), attrs["weight"], attrs["bias"], attrs["running_mean"], attrs["running_var"], attrs["counter"],
        attrs["training"], attrs["momentum"], float(attrs["eps"]),
    )  # fmt: skip
    fn = ops.tracked_bn_act if attrs["tracks"] else _untracked_bn_act
    mean, rstd = b.emit_forward(index, "bn", fn, operands, extra=2, kernel="bn_act", backend=b.backend)
    b.shared[("statistics", index)] = Slot(mean), Slot(rstd)


def relevance(b, index, node, stream) -> None:
    source = node.inputs[0]
    stream.settle(index, node.name)
    if index in b.merged_into:
        stream.contributions[source] = list(stream.contributions[index])
        return
    attrs = node.attrs
    mean, rstd = b.statistics(index)
    rule = stream.rule(index)
    if isinstance(rule, ZPlus):
        R = stream.take_R(index, node.name)
        P, two_sided, bias = stream.sums(source)
        u = Slot(source) if two_sided else None
        operands = (R, P, u, bias, attrs["weight"], attrs["bias"], mean, rstd, float(rule.eps))
        plus, minus = b.emit(
            node.name, rule, "affine z+", plus_affine, operands, outs=2, kernel="plus_affine", backend=b.backend
        )
        stream.give(source, "S", (plus, minus if two_sided else None))
        return
    scale = scale_of(b, index)
    g = stream.take_g(index, node.name)
    stream.give(source, "g", b.emit(node.name, None, "scale", ops.channel_scale, (g, scale)))


def scale_of(b, index) -> Slot:
    """``gamma rstd`` of BatchNorm ``index``, emitted once for all maps."""
    folded = b.shared.get(("scale_shift", index, True))
    if folded is not None:  # another map folds this BatchNorm already
        return folded[0]
    node = b.graph.nodes[index]
    rstd = b.statistics(index)[1]
    return b.once(("scale", index), lambda: b.emit(node.name, None, "bn_scale", _scale, (node.attrs["weight"], rstd)))


def scale_shift_of(b, index, bias, constant_bias=True) -> tuple[Slot, Slot]:
    """``(scale, b~)`` of BatchNorm ``index`` folded into a map with ``bias``; biases and beta are constants or not."""
    node = b.graph.nodes[index]
    operands = (node.attrs["weight"], node.attrs["bias"], *b.statistics(index), bias, constant_bias)
    return b.once(
        ("scale_shift", index, constant_bias), lambda: b.emit(node.name, None, "bn_fold", ops.affine_scale_shift, operands, outs=2)
    )


def _untracked_bn_act(x, weight, bias, mean, var, counter, training, *rest, **options):
    """``track_running_stats=False`` set after the layer was made: train mode leaves the running statistics alone."""
    if training:
        mean = var = counter = None
    return ops.tracked_bn_act(x, weight, bias, mean, var, counter, training, *rest, **options)


def _scale(weight, rstd):
    return rstd if weight is None else weight * rstd
