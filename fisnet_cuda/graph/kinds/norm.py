"""GroupNorm, LayerNorm and InstanceNorm: affine maps per sample, their statistics detached, ``g_in = scale . g``.

Under z+ they fold into the map before them, as BatchNorm does.

Shared with the forward: mean and ``rstd`` of every group.
"""

import math

import torch
from torch import Tensor

from ... import ops
from ...rules import ZPlus
from ..ir import Slot


def nonneg(b, node) -> bool:
    return False


def forward(b, index, node) -> None:
    attrs = node.attrs
    operands = (Slot(node.inputs[0]), attrs["weight"], attrs["bias"], *attrs["settings"])
    b.shared[("statistics", index)] = b.emit_forward(index, f"{attrs['norm']}_norm", _NORMS[attrs["norm"]], operands, extra=2)


def relevance(b, index, node, stream) -> None:
    attrs, source, rule = node.attrs, node.inputs[0], stream.rule(index)
    mean, rstd = (Slot(s) for s in b.shared[("statistics", index)])
    layer = attrs["norm"] == "layer"
    stream.settle(index, node.name)
    operands = (attrs["weight"], rstd, b.shape(index), layer)
    scale = b.once(("scale", index), lambda: b.emit(node.name, None, "norm_scale", _scale, operands))
    if isinstance(rule, ZPlus):
        R = stream.take_R(index, node.name)
        P, two_sided, bias = stream.sums(source)
        dense = b.graph.nodes[source].kind == "linear"
        operands = (R, P, Slot(source) if two_sided else None, bias, scale, attrs["bias"], mean, layer, dense, float(rule.eps))
        plus, minus = b.emit(node.name, rule, "affine z+", _plus, operands, outs=2)
        stream.give(source, "S", (plus, minus if two_sided else None))
        return
    g = stream.take_g(index, node.name)
    stream.give(source, "g", b.emit(node.name, None, "norm", ops.times, (scale, g)))


_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def _group_norm(x: Tensor, weight, bias, groups: int, eps: float):
    n, c = x.shape[:2]
    layout = _LAYOUTS.get(x.dim()) if x.device.type == "cpu" else None  # as F.group_norm
    if layout is None or not x.is_contiguous(memory_format=layout):
        x = x.contiguous()
    y, mean, rstd = torch.native_group_norm(x, weight, bias, n, c, math.prod(x.shape[2:]), groups, eps)
    return y, mean.detach(), rstd.detach()


def _layer_norm(x: Tensor, weight, bias, shape: tuple, eps: float):
    y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
    return y, mean.detach(), rstd.detach()


def _instance_norm(x: Tensor, weight, bias, eps: float):
    """As PyTorch computes it: a BatchNorm over the channels of all samples."""
    n, c = x.shape[:2]
    weight, bias = (None if p is None else p.repeat(n) for p in (weight, bias))
    flat = x.contiguous().view(1, n * c, *x.shape[2:])
    y, mean, rstd = torch.native_batch_norm(flat, weight, bias, None, None, True, 0.0, eps)
    return y.view(x.shape), mean.detach().view(n, c), rstd.detach().view(n, c)


_NORMS = {"group": _group_norm, "layer": _layer_norm, "instance": _instance_norm}


def _spread(statistic: Tensor, shape: tuple, layer: bool) -> Tensor:
    """A statistic of every group, broadcastable against ``[N, *shape]``."""
    if layer:
        return statistic
    channels = statistic.repeat_interleave(shape[0] // statistic.shape[1], 1)
    return channels.view(*channels.shape, *[1] * (len(shape) - 1))


def _vector(v: Tensor, rank: int, last: bool) -> Tensor:
    """A parameter of the last axes, or of the channels, broadcastable against a value of ``rank`` axes."""
    return v if last else v.view(-1, *[1] * (rank - 2))


def _scale(weight, rstd: Tensor, shape: tuple, layer: bool) -> Tensor:
    scale = _spread(rstd, shape, layer)
    scale = scale if weight is None else scale * _vector(weight, len(shape) + 1, layer)
    return scale.expand(rstd.shape[0], *shape)


def _plus(R, P, u, map_bias, k, beta, mean, layer, dense, eps):
    """`fisnet_cuda.ops.rules.plus_affine` with a scale a sample: ``(k+ s, |k-| s)``, ``s = R / (k+ P + |k-| M + b~+ + e)``."""
    mean = _spread(mean, tuple(P.shape[1:]), layer)
    map_bias = None if map_bias is None else _vector(map_bias, P.dim(), dense)
    shift = (-mean if map_bias is None else map_bias.detach() - mean) * k
    if beta is not None:
        shift = shift + _vector(beta.detach(), P.dim(), layer)
    k_plus, k_minus = torch.relu(k), torch.relu(-k)
    z = k_plus * P + torch.relu(shift)
    if u is not None:
        z = z + k_minus * (P - u if map_bias is None else P - u + map_bias)
    s = ops.stabilised_ratio(R, z, eps, True)
    return ops.times(k_plus, s), None if u is None else ops.times(k_minus, s)
