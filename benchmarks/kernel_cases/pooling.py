"""Max pools with one-byte winners, their transpose, and the transpose fused with phi (kernel 11)."""

from functools import lru_cache

import torch.nn.functional as F

from fisnet_cuda import reference
from fisnet_cuda._backend import kernel
from fisnet_cuda.reference.pooling import winner_positions

from . import KernelCase, Sizes, nbytes, read_and_written

EPS = 1e-2
STEM = (2, False, (3, 2, 1, 1, False))  # ResNet
VGG = (2, False, (2, 2, 0, 1, False))
STEM_SIZES, VGG_SIZES = Sizes(C=64, H=112, W=112), Sizes(C=64, H=224, W=224)


def _pooled(sizes, device, dtype, pool):
    """The pool's input, the winners as this device's implementation makes them, relevance of the output."""
    a = sizes.activation(device=device, dtype=dtype, seed=1)
    y, winners = kernel("max_pool", "auto", a)(a, *pool)
    g = sizes.tensor(sizes.N * sizes.K, *y.shape[1:], device=device, dtype=dtype, seed=2)
    return a, winners, g


def _forward(pool):
    return lambda sizes, device, dtype: ((sizes.activation(device=device, dtype=dtype, seed=1), *pool), {})


def _scatter(pool):
    def make(sizes, device, dtype):
        _, winners, g = _pooled(sizes, device, dtype, pool)
        return (g, winners, (sizes.H, sizes.W), pool), {}

    return make


def _gather(pool):
    def make(sizes, device, dtype):
        _, winners, _ = _pooled(sizes, device, dtype, pool)
        return (sizes.relevance(device=device, dtype=dtype, seed=3), winners, pool), {}

    return make


def _scatter_phi(pool):
    def make(sizes, device, dtype):
        a, winners, g = _pooled(sizes, device, dtype, pool)
        return (g, winners, (sizes.H, sizes.W), pool, a, EPS), {}

    return make


def _scatter_phi_backward(pool):
    def make(sizes, device, dtype):
        a, winners, g = _pooled(sizes, device, dtype, pool)
        s = kernel("max_pool_scatter_phi", "auto", a)(g, winners, (sizes.H, sizes.W), pool, a, EPS)
        s_bar = sizes.relevance(device=device, dtype=dtype, seed=3)
        return (s_bar, s, winners, pool, a, EPS), {"need_skip": False}

    return make


_positions = lru_cache(maxsize=1)(winner_positions)  # eager PyTorch keeps int64 positions: making them is not timed


def _eager_scatter(g, winners, in_size, pool):
    return reference.max_pool_scatter(g, _positions(winners, in_size, pool), in_size)


def _eager_gather(x, winners, pool):
    return reference.max_pool_gather(x, _positions(winners, tuple(x.shape[2:]), pool))


def _eager_scatter_phi(g, winners, in_size, pool, a, eps):
    return reference.max_pool_scatter_phi(g, _positions(winners, in_size, pool), in_size, None, a, eps)


def _eager_scatter_phi_backward(s_bar, s, winners, pool, a, eps, need_skip):
    positions = _positions(winners, tuple(a.shape[2:]), pool)
    return reference.max_pool_scatter_phi_backward(s_bar, s, positions, None, a, eps, need_skip=need_skip)


def _eager(x, spatial, adaptive, settings):
    """PyTorch's own pool, with its int64 indices."""
    return F.max_pool2d(x, *settings, return_indices=True)


def _forward_traffic(args, kwargs, outputs):
    """x read, y written, one byte a winner (whatever winners the implementation has)."""
    y = outputs[0]
    return nbytes(args, y) + y.numel()


_CONTIGUOUS = Sizes(C=64, H=224, W=224, layout="contiguous")
_PHI = (read_and_written, VGG_SIZES, _eager_scatter_phi)
_ADJOINT = (read_and_written, VGG_SIZES, _eager_scatter_phi_backward)

CASES = [
    KernelCase("max_pool/stem", "max_pool", _forward(STEM), _forward_traffic, STEM_SIZES, _eager),
    KernelCase("max_pool/vgg", "max_pool", _forward(VGG), _forward_traffic, VGG_SIZES, _eager),
    KernelCase("max_pool/vgg contiguous", "max_pool", _forward(VGG), _forward_traffic, _CONTIGUOUS, _eager, rank=2),
    KernelCase("max_pool_scatter/stem", "max_pool_scatter", _scatter(STEM), read_and_written, STEM_SIZES, _eager_scatter),
    KernelCase("max_pool_scatter/vgg", "max_pool_scatter", _scatter(VGG), read_and_written, VGG_SIZES, _eager_scatter),
    KernelCase("max_pool_gather/stem", "max_pool_gather", _gather(STEM), read_and_written, STEM_SIZES, _eager_gather),
    KernelCase("max_pool_scatter_phi/vgg", "max_pool_scatter_phi", _scatter_phi(VGG), *_PHI),
    KernelCase("max_pool_scatter_phi/adjoint", "max_pool_scatter_phi_backward", _scatter_phi_backward(VGG), *_ADJOINT),
]
