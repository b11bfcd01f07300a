"""The classifier's head (kernel 11): eta's start, z+ start, the global average pool fused with the rules at its ReLU."""

import torch

from fisnet_cuda._backend import kernel

from . import KernelCase, Sizes, read_and_written

EPS, ETA_EPS, CLASSES = 1e-2, 1e-2, 1000
HEAD = Sizes(C=2048, H=7, W=7)  # ResNet-50


def _index(sizes, device):
    generator = torch.Generator(device).manual_seed(3)
    return torch.randint(0, CLASSES, (sizes.N, sizes.K), generator=generator, device=device)


def _eta(sizes, device, dtype):
    logits = sizes.tensor(sizes.N, CLASSES, device=device, dtype=dtype, seed=1)
    return (logits, _index(sizes, device), ETA_EPS), {}


def _eta_backward(sizes, device, dtype):
    args, _ = _eta(sizes, device, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return (sizes.tensor(sizes.N, sizes.K, CLASSES, device=device, dtype=wide, seed=2), *args), {}


def _plus(sizes, device, dtype):
    P = sizes.tensor(sizes.N, CLASSES, device=device, dtype=dtype, seed=1).relu()
    return (P, sizes.tensor(CLASSES, device=device, dtype=dtype, seed=2), EPS), {}


def _pooled(sizes, device, dtype):
    g = sizes.tensor(sizes.N * sizes.K, sizes.C, 1, 1, device=device, dtype=dtype, seed=2)
    return (g, sizes.activation(device=device, dtype=dtype, seed=1), EPS), {}


def _pooled_backward(sizes, device, dtype):
    (g, a, eps), _ = _pooled(sizes, device, dtype)
    s = kernel("pooled_phi", "auto", a)(g, a, eps)
    return (sizes.relevance(device=device, dtype=dtype, seed=3), s, g, a, eps), {}


def _pooled_backward_traffic(args, kwargs, outputs):
    """``s`` need not be read: it is known from ``g`` and ``a``."""
    s_bar, _, *rest = args
    return read_and_written((s_bar, *rest), kwargs, outputs)


def _dual(sizes, device, dtype):
    (g, a, eps), _ = _pooled(sizes, device, dtype)
    g_plus = sizes.tensor(sizes.N, sizes.C, 1, 1, device=device, dtype=dtype, seed=4)
    return (g, g_plus, a, sizes.activation(device=device, dtype=dtype, seed=5), eps, EPS), {}


CASES = [
    KernelCase("eta_start", "eta_start", _eta, read_and_written, HEAD),
    KernelCase("eta_start/adjoint", "eta_start_backward", _eta_backward, read_and_written, HEAD),
    KernelCase("plus_start", "plus_start", _plus, read_and_written, HEAD, rank=2),
    KernelCase("pooled_phi", "pooled_phi", _pooled, read_and_written, HEAD),
    KernelCase("pooled_phi/adjoint", "pooled_phi_backward", _pooled_backward, _pooled_backward_traffic, HEAD),
    KernelCase("pooled_dual_phi", "pooled_dual_phi", _dual, read_and_written, HEAD, rank=2),
]
