"""Concatenation: relevance is cut into the parts' slices, in whatever form it comes."""

import torch

from ..ir import Slot


def nonneg(b, node) -> bool:
    return all(b.nonneg[source] for source in node.inputs)


def forward(b, index, node) -> None:
    if "fn" in node.attrs:  # copies of one value side by side: repeat, expand
        b.emit_forward(index, node.attrs["fn"].name, node.attrs["fn"], (Slot(node.inputs[0]), *node.attrs["settings"]))
        return
    parts = tuple(Slot(source) for source in node.inputs)
    b.emit_forward(index, "concat", _concat, (parts, node.attrs["dim"]))


def relevance(b, index, node, stream) -> None:
    dim = node.attrs["dim"]
    shapes = tuple(b.shape(source) for source in node.inputs)

    def cut(slot):
        return b.emit(node.name, None, "slices", _slices, (slot, dim, shapes), outs=len(shapes))

    for form in ("g", "R"):
        slots = stream.of_form(index, form)
        if slots:
            for source, part in zip(node.inputs, cut(stream.sum(slots, node.name))):
                stream.give(source, form, part)
    pairs = stream.of_form(index, "S")
    if pairs:
        plus = cut(stream.sum([p for p, _ in pairs], node.name))
        negative = [m for _, m in pairs if m is not None]
        minus = cut(stream.sum(negative, node.name)) if negative else (None,) * len(plus)
        for source, p, m in zip(node.inputs, plus, minus):
            # a value that is never negative has no negative sum to receive the second half
            stream.give(source, "S", (p, None if b.nonneg[source] else m))


def bound(b, index, node, low, high) -> tuple:
    """The input's bounds for z^B, one after the other as the parts are."""
    return tuple(b.emit(node.name, None, "bounds", torch.cat, (parts, node.attrs["dim"])) for parts in (low, high))


def _concat(parts, dim):
    y = torch.cat(parts, dim)
    if y.shape[0] != parts[0].shape[0]:
        raise ValueError(f"cat along axis {dim} of {tuple(parts[0].shape)} mixes the samples: axis 0 must stay the batch")
    return y


def _slices(r, dim, shapes):
    axis = dim % r.dim()
    return torch.split(r, [shape[axis - 1] for shape in shapes], axis)
