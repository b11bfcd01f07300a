"""z+ through a BatchNorm that reads several maps, and its adjoint, at DenseNet-121's first block."""

import torch

from . import KernelCase, Sizes, read_and_written

EPS = 1e-2
SIZES = Sizes(N=64, C=128)


def _forward(sizes, device, dtype):
    R = sizes.relevance(device=device, dtype=dtype, seed=1)
    P, M = (sizes.activation(device=device, dtype=dtype, seed=seed) for seed in (2, 3))
    k, c = (sizes.tensor(sizes.C, device=device, dtype=torch.float32, seed=seed) for seed in (4, 5))
    return (R, P, P - M, k, c.abs(), EPS), {}


def _backward(sizes, device, dtype):
    (R, P, u, k, _, _), _ = _forward(sizes, device, dtype)
    plus_bar, minus_bar = (sizes.relevance(device=device, dtype=dtype, seed=seed) for seed in (6, 7))
    return (plus_bar, minus_bar, R, P + EPS, P, u, k), {}


CASES = [
    KernelCase("plus_affine", "plus_affine", _forward, read_and_written, SIZES, rank=2),
    KernelCase("plus_affine adjoint", "plus_affine_backward", _backward, read_and_written, SIZES, rank=2),
]
