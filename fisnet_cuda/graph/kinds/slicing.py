"""Slices of channels or positions: relevance goes back between zeros, in whatever form it comes."""

from ... import ops
from ...ops.linear_ops import chunk_bounds
from ..ir import Slot


def nonneg(b, node) -> bool:
    return b.nonneg[node.inputs[0]]


def _bounds(node) -> tuple:
    return node.attrs["dim"], node.attrs.get("start", 0), node.attrs.get("stop"), node.attrs.get("chunk")


def forward(b, index, node) -> None:
    b.emit_forward(index, "slice", _slice, (Slot(node.inputs[0]), *_bounds(node)))


def relevance(b, index, node, stream) -> None:
    source = node.inputs[0]
    for form in ("g", "R"):
        slots = stream.of_form(index, form)
        if form == "g":
            slots = slots + [stream._g_of_pair(index, p, node.name) for p in stream.of_form(index, "S")]
        if slots:
            operands = (stream.sum(slots, node.name), *_bounds(node), b.shape(source))
            stream.give(source, form, b.emit(node.name, None, "slice^T", _unslice, operands))


def bound(b, index, node, low, high) -> tuple:
    """The same slice of the input's bounds for z^B."""
    return tuple(b.emit(node.name, None, "bounds", _slice, (v, *_bounds(node))) for v in (low, high))


def _slice(x, dim, start, stop, chunk):
    if chunk is not None:
        start, stop = chunk_bounds(x.shape[dim], *chunk)
    y = ops.slice_op(x, dim, start, stop)
    if y.shape[0] != x.shape[0]:
        raise ValueError(f"a slice of axis {dim} of {tuple(x.shape)} picks samples: axis 0 must stay the batch")
    return y


def _unslice(g, dim, start, stop, chunk, in_shape):
    if chunk is not None:
        start, stop = chunk_bounds(in_shape[dim % g.dim() - 1], *chunk)
    return ops.slice_transposed(g, dim, start, stop, in_shape)
