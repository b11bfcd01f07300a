"""Programs with and without the patterns of fused linear maps, and those patterns with the two-map ops switched on.

fused.without(monkeypatch)    # until the test ends: programs as the patterns find them
fused.forced(monkeypatch)     # ...: the fused ops run on a CPU too, by candidate 0 of the dispatcher; returns their calls
fused.run(net, x)             # (output, gradients of a function of heatmaps and logits)
"""

import torch

from fisnet_cuda import dispatch
from fisnet_cuda.graph import fuse, fuse_dual, fuse_forward

OWN = (fuse_dual, fuse_forward)


def without(monkeypatch):
    rest = tuple(p for p in fuse.PATTERNS if p.__module__ not in {module.__name__ for module in OWN})
    monkeypatch.setattr(fuse, "PATTERNS", rest)


def forced(monkeypatch, spy=True):
    calls, real = [], dispatch.run
    if spy:
        monkeypatch.setattr(dispatch, "run", lambda name, *rest, **options: calls.append(name) or real(name, *rest, **options))
    for module in OWN:
        monkeypatch.setattr(module, "has_kernel", lambda *_: True)
    return calls


def run(net, x, grad=True):
    net.zero_grad()
    with torch.set_grad_enabled(grad):
        out = net(x, relevance=True)
    if not grad:
        return out, {}
    weights = torch.linspace(-1, 2, out.heatmaps.numel(), dtype=x.dtype).view(out.heatmaps.shape)
    inner = sum((h.square().sum() for h in out.hidden.values()), out.logits.square().sum())
    ((out.heatmaps * weights).sum() + out.heatmaps.square().sum() + inner).backward()
    return out, {n: p.grad.clone() for n, p in net.model.named_parameters() if p.grad is not None}


def instructions(net, training=True):
    lowered = net._programs[training][0].lowered
    return lowered.forward, lowered.relevance
