"""BatchNorm: for relevance a per-channel affine map with the statistics that the forward really used, detached.

A BatchNorm that alone reads a convolution is folded into it (`Builder.merged`) and does nothing here. Any other is an affine
map of its own: ``g_in = scale . g``, and under z+ it folds into every map that it reads (`fisnet_cuda.ops.rules.plus_affine`).

Shared with the forward: mean and ``rstd``.

A channel's batch statistics are the same for every BatchNorm that reads it. Where one reads the concatenation of a value that
another one has read before and of a new part, as in a dense block, only the part is measured (`_known`).
"""

from ... import ops
from ...ops.rules import plus_affine
from ...rules import ZPlus
from ..ir import Slot


def nonneg(b, node) -> bool:
    return False


def forward(b, index, node) -> None:
    attrs, eps = node.attrs, float(node.attrs["eps"])
    operands = (
        Slot(node.inputs[0]), attrs["weight"], attrs["bias"], attrs["running_mean"], attrs["running_var"], attrs["counter"],
        attrs["training"], attrs["momentum"], eps, _known(b, node, eps),
    )  # fmt: skip
    fn = _bn_act if attrs["tracks"] else _untracked_bn_act
    mean, rstd = b.emit_forward(index, "bn", fn, operands, extra=2, kernel="bn_act", backend=b.backend)
    statistics = Slot(mean), Slot(rstd)
    b.shared[("statistics", index)] = statistics
    measured = *statistics, attrs["training"], attrs["running_mean"]
    b.shared.setdefault(("measured", _original(b, node.inputs[0]), eps), measured)


def _known(b, node, eps: float) -> tuple | None:
    """Operands of a BatchNorm behind a concatenation of two, of which one has been measured: the other one, whether it is the
    first, and ``(mean, rstd, training, running mean)`` of the BatchNorm that measured."""
    source = b.graph.nodes[_original(b, node.inputs[0])]
    if source.kind != "concat" or len(source.inputs) != 2 or source.attrs["dim"] != 1:
        return None
    for position, part in enumerate(source.inputs):
        measured = b.shared.get(("measured", _original(b, source.inputs[1 - position]), eps))
        if measured is not None:
            return (Slot(part), position == 0, *measured)
    return None


def _original(b, value: int) -> int:
    """The value that ``value`` is a copy of (of a copy), or itself."""
    while b.graph.nodes[value].kind == "copy":
        value = b.graph.nodes[value].inputs[0]
    return value


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


def _bn_act(x, weight, bias, mean, var, counter, training, momentum, eps, known, *rest, **options):
    """`ops.tracked_bn_act` beside what `_known` found: it holds where that BatchNorm used the batch's statistics."""
    if known is not None:
        part, ahead, known_mean, known_rstd, trained, running_mean = known
        batch = trained or running_mean is None
        known = (part, 0 if ahead else known_mean.shape[0], known_mean, known_rstd) if batch else None
    return ops.tracked_bn_act(x, weight, bias, mean, var, counter, training, momentum, eps, *rest, known=known, **options)


def _untracked_bn_act(x, weight, bias, mean, var, counter, training, *rest, **options):
    """``track_running_stats=False`` set after the layer was made: train mode leaves the running statistics alone."""
    if training:
        mean = var = counter = None
    return _bn_act(x, weight, bias, mean, var, counter, training, *rest, **options)


def _scale(weight, rstd):
    return rstd if weight is None else weight * rstd
