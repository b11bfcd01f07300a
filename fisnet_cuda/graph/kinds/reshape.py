"""Reshapes, flattens and permutations: relevance is put back in place, in whatever form it comes."""

import torch

from ..ir import Slot


def nonneg(b, node) -> bool:
    return b.nonneg[node.inputs[0]]


def forward(b, index, node) -> None:
    x = Slot(node.inputs[0])
    if node.kind == "permute":
        fn = torch.transpose if node.attrs.get("swap") else torch.permute
        dims = node.attrs["dims"]
        b.emit_forward(index, "permute", fn, (x, *dims) if node.attrs.get("swap") else (x, dims))
    else:
        b.emit_forward(index, "reshape", _reshape, (x, node.attrs["fn"], node.attrs["settings"]))


def relevance(b, index, node, stream) -> None:
    source = node.inputs[0]
    for form, slot in stream.contributions[index]:
        stream.give(source, form, tuple(_back(b, node, s) for s in slot) if form == "S" else _back(b, node, slot))


def _back(b, node, slot):
    if slot is None:
        return None
    if node.kind == "permute":
        return b.emit(node.name, None, "permute", _unpermute, (slot, node.attrs["dims"], bool(node.attrs.get("swap"))))
    return b.emit(node.name, None, "reshape", _unreshape, (slot, b.shape(node.inputs[0])))


def _reshape(x, fn, settings):
    y = fn(x, *settings)
    if y.shape[0] != x.shape[0]:
        raise ValueError(f"a reshape from {tuple(x.shape)} to {tuple(y.shape)} mixes the samples: axis 0 must stay the batch")
    return y


def _unreshape(r, shape):
    return r.reshape(r.shape[0], *shape)


def _unpermute(r, dims, swap):
    if swap:
        return r.transpose(*dims)
    back = [0] * len(dims)
    for position, dim in enumerate(dims):
        back[dim % len(dims)] = position
    return r.permute(back)
