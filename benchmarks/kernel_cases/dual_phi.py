"""Both rules of Dual at a ReLU, and their adjoint (kernel 7)."""

from . import KernelCase, Sizes, read_and_written

EPS = 1e-2


def _forward(sizes, device, dtype):
    a = sizes.activation(device=device, dtype=dtype, seed=1)
    g, g_plus = (sizes.relevance(device=device, dtype=dtype, seed=seed) for seed in (2, 3))
    z_plus = a + sizes.activation(device=device, dtype=dtype, seed=4)
    return (g, g_plus, a, z_plus, EPS, EPS), {}


def _backward(sizes, device, dtype):
    (g, g_plus, a, z_plus, eps, eps_plus), _ = _forward(sizes, device, dtype)
    s_bar, s_plus_bar = (sizes.relevance(device=device, dtype=dtype, seed=seed) for seed in (5, 6))
    alive = a > 0
    return (s_bar, s_plus_bar, a, g * alive, g_plus * alive, z_plus, eps, eps_plus), {}


CASES = [
    KernelCase("dual_phi", "dual_phi", _forward, read_and_written),
    KernelCase("dual_phi/contiguous", "dual_phi", _forward, read_and_written, Sizes(layout="contiguous"), rank=2),
    KernelCase("dual_phi adjoint", "dual_phi_backward", _backward, read_and_written),
]
