"""The heatmap loss with GWRP (kernel 6), forward alone and with its adjoint."""

import torch

from . import KernelCase, Sizes, nbytes

HEATMAPS = Sizes(N=64, K=1, C=3, H=224, W=224, layout="contiguous")
# d = 0.9 ranks 152 values of a channel, 0.996 ranks 3,978 (in shared memory), 0.9995 31,879 (sorted in global memory), 1 none
DECAYS = (0.9, 0.996, 0.9995, 1.0)
OPTIONS = {"E": 1.0, "c1": 1.0, "c2": 25.0, "foreground": "hybrid", "normalization": "absRoIMean"}


def _make(d, grad):
    def make(sizes, device, dtype):
        R = sizes.relevance(device=device, dtype=dtype, seed=1).unflatten(0, (sizes.N, sizes.K)).requires_grad_(grad)
        mask = torch.zeros(sizes.N, 1, sizes.H, sizes.W, dtype=torch.bool, device=device)
        mask[..., sizes.H // 4 : -sizes.H // 4, sizes.W // 4 : -sizes.W // 4] = True
        return (R, mask), {"d": d, **OPTIONS}

    return make


def _with_backward(function, R, mask, **options):
    background, foreground = function(R, mask, **options)
    return torch.autograd.grad(background.sum() + foreground.sum(), R)


def _both_traffic(args, kwargs, outputs):
    """R and the mask read by either pass, R_bar written."""
    return 2 * nbytes(args, kwargs) + nbytes(outputs)


def _rank(d, rank):
    """Rates near 1 are rare."""
    return rank if d == DECAYS[0] else 2


CASES = [
    KernelCase(
        f"heatmap_loss/d={d}", "heatmap_loss", _make(d, False), lambda args, kwargs, outputs: nbytes(args, kwargs), HEATMAPS,
        rank=_rank(d, 1),
    )
    for d in DECAYS
] + [
    KernelCase(
        f"heatmap_loss/d={d}/forward and backward", "heatmap_loss", _make(d, True), _both_traffic, HEATMAPS, run=_with_backward,
        rank=_rank(d, 0),
    )
    for d in DECAYS
]
