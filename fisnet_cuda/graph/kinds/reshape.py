"""Reshapes, permutations, copies and casts: relevance is put back in place, in whatever form it comes."""

import torch

from ...ops.layout import memory_format
from ..ir import Slot


def nonneg(b, node) -> bool:
    return b.nonneg[node.inputs[0]]


def forward(b, index, node) -> None:
    fn, operands = _call(node)
    b.emit_forward(index, node.kind, fn, (Slot(node.inputs[0]), *operands))


def relevance(b, index, node, stream) -> None:
    source = node.inputs[0]
    if not _folds(b, node):
        stream.settle(index, node.name)
    for form, slot in stream.contributions[index]:
        stream.give(source, form, tuple(_back(b, node, s) for s in slot) if form == "S" else _back(b, node, slot))


def sums(stream, index, node) -> tuple:
    """``(P, two_sided, bias)`` for z+ through a BatchNorm after it: those of its input, moved as the value is."""
    if not _folds(stream.b, node):
        return stream.part(index)
    P, two_sided, bias = stream.sums(node.inputs[0])
    fn, operands = _call(node)
    P = P if node.kind in ("copy", "cast") else stream.b.emit(node.name, None, node.kind, fn, (P, *operands))
    return P, two_sided, bias


def _folds(b, node) -> bool:
    """Whether a BatchNorm behind ``node`` folds into the map before it: a bias per channel cannot follow to other axes."""
    return node.kind in ("copy", "cast") or not _has_bias(b, node.inputs[0])


def _has_bias(b, index) -> bool:
    node = b.graph.nodes[index]
    if node.kind in ("conv", "linear"):
        return node.attrs["bias"] is not None
    return node.kind in ("concat", "copy", "cast") and any(_has_bias(b, source) for source in node.inputs)


def bound(b, index, node, low, high) -> tuple:
    """The input's bounds for z^B, moved as the value is."""
    fn, operands = _call(node)
    if node.kind == "reshape":
        fn, operands = _reshape_sample, (b.shape(index),)
    return tuple(b.emit(node.name, None, node.kind, fn, (s, *operands)) for s in (low, high))


def _call(node) -> tuple:
    attrs = node.attrs
    if node.kind == "copy":
        return _same, ()
    if node.kind == "cast":
        return _cast, (attrs["dtype"],)
    if node.kind == "permute":
        return (torch.transpose, attrs["dims"]) if attrs.get("swap") else (torch.permute, (attrs["dims"],))
    return _reshape, (attrs["fn"], attrs["settings"])


def _back(b, node, slot):
    if slot is None or node.kind in ("copy", "cast"):
        return slot
    if node.kind == "permute":
        return b.emit(node.name, None, "permute", _unpermute, (slot, node.attrs["dims"], bool(node.attrs.get("swap"))))
    source = node.inputs[0]
    return b.emit(node.name, None, "reshape", _restored, (slot, b.shape(source), b.layout(source)))


def _same(x):
    return x  # the program overwrites no value that anyone still reads


def _cast(x, dtype):
    return x.to(dtype)


class _InRows(torch.autograd.Function):
    """``x.contiguous()``, whose gradient comes back in the layout of ``x``, for all that stands before."""

    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout
        return x.contiguous()

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous(memory_format=ctx.layout), None


def _reshape(x, fn, settings):
    layout = memory_format(x)
    if layout != torch.contiguous_format and _to_rows(x.dim(), fn, settings):  # that copies a map whose channels are innermost
        x = _InRows.apply(x, layout)
    y = fn(x, *settings)
    if y.shape[0] != x.shape[0]:
        raise ValueError(f"a reshape from {tuple(x.shape)} to {tuple(y.shape)} mixes the samples: axis 0 must stay the batch")
    return y


def _to_rows(axes, fn, settings):
    """Whether a reshape leaves two axes, the samples and one other, of ``axes``."""
    if fn is torch.flatten:
        start, end = settings
        return axes - end % axes + start % axes == 2
    return fn is torch.reshape and len(settings[0]) == 2


def _reshape_sample(r, shape):
    return r.reshape(r.shape[0], *shape)


def _restored(r, shape, layout):
    """Relevance in the shape and the layout of the value before the reshape: all that stands before it goes on in that layout."""
    r = _reshape_sample(r, shape)
    return r if layout == torch.contiguous_format else r.contiguous(memory_format=layout)


def _unpermute(r, dims, swap):
    if swap:
        return r.transpose(*dims)
    back = [0] * len(dims)
    for position, dim in enumerate(dims):
        back[dim % len(dims)] = position
    return r.permute(back)
