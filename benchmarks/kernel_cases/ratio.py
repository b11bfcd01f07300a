"""The stabilised division and its adjoint."""

from . import KernelCase, Sizes, read_and_written

EPS = 1e-2


def _forward(sizes, device, dtype):
    z = sizes.tensor(sizes.N, sizes.C, sizes.H, sizes.W, device=device, dtype=dtype, seed=1)
    return (sizes.relevance(device=device, dtype=dtype, seed=2), z, EPS), {}


def _backward(sizes, device, dtype):
    (R, z, _), _ = _forward(sizes, device, dtype)
    s_bar = sizes.relevance(device=device, dtype=dtype, seed=3)
    return (s_bar, R, z + EPS * z.sign()), {}


CASES = [
    KernelCase("ratio", "ratio", _forward, read_and_written, rank=2),
    KernelCase("ratio/K3", "ratio", _forward, read_and_written, Sizes(N=16, K=3), rank=2),
    KernelCase("ratio adjoint", "ratio_backward", _backward, read_and_written, rank=2),
]
