"""GroupNorm, LayerNorm and InstanceNorm: affine maps per sample, their statistics detached, ``g_in = scale . g``.

Shared with the forward: ``rstd`` of every group.
"""

import torch
from torch import Tensor

from ... import ops
from ..ir import Slot


def nonneg(b, node) -> bool:
    return False


def forward(b, index, node) -> None:
    attrs = node.attrs
    fn = _group_norm if attrs["norm"] == "group" else _layer_norm
    operands = (Slot(node.inputs[0]), attrs["weight"], attrs["bias"], *attrs["settings"])
    (rstd,) = b.emit_forward(index, f"{attrs['norm']}_norm", fn, operands, extra=1)
    b.shared[("rstd", index)] = Slot(rstd)


def relevance(b, index, node, stream) -> None:
    g = stream.take_g(index, node.name)
    fn = _group_scale if node.attrs["norm"] == "group" else _layer_scale
    rstd = b.shared[("rstd", index)]
    scale = b.once(("scale", index), lambda: b.emit(node.name, None, "scale", fn, (node.attrs["weight"], rstd, b.shape(index))))
    apply = ops.channel_scale if node.attrs["norm"] == "group" else _times
    stream.give(node.inputs[0], "g", b.emit(node.name, None, "norm", apply, (g, scale)))


def _group_norm(x: Tensor, weight, bias, groups: int, eps: float):
    n, c = x.shape[:2]
    y, _, rstd = torch.native_group_norm(x, weight, bias, n, c, x[0, 0].numel(), groups, eps)
    return y, rstd.detach()


def _group_scale(weight, rstd: Tensor, shape: tuple) -> Tensor:
    scale = rstd.repeat_interleave(shape[0] // rstd.shape[1], 1)
    return scale if weight is None else scale * weight


def _layer_norm(x: Tensor, weight, bias, shape: tuple, eps: float):
    y, _, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
    return y, rstd.detach()


def _layer_scale(weight, rstd: Tensor, shape: tuple) -> Tensor:
    scale = rstd if weight is None else rstd * weight
    return scale.expand(rstd.shape[0], *shape)


def _times(g, scale):
    return ops.times(scale, g)
