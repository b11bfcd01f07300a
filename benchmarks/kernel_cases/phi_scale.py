"""LRP-epsilon at a ReLU and its adjoint (kernels 1 and 2)."""

import torch

from . import KernelCase, Sizes, read_and_written

EPS = 1e-2


def _forward(sizes, device, dtype):
    a = sizes.activation(device=device, dtype=dtype, seed=1)
    return (sizes.relevance(device=device, dtype=dtype, seed=2), a, EPS), {"keep_s": False}


def _forward_skip(sizes, device, dtype):
    args, kwargs = _forward(sizes, device, dtype)
    return args, {**kwargs, "skip": sizes.relevance(device=device, dtype=dtype, seed=3)}


def _backward(sizes, device, dtype):
    a = sizes.activation(device=device, dtype=dtype, seed=1)
    g = sizes.relevance(device=device, dtype=dtype, seed=2)
    s_bar = sizes.relevance(device=device, dtype=dtype, seed=3)
    return (s_bar, g * (a > 0), a, EPS), {}


def _forward_scale(sizes, device, dtype):
    args, kwargs = _forward(sizes, device, dtype)
    return args, {**kwargs, "scale": sizes.tensor(sizes.C, device=device, dtype=torch.float32, seed=4)}


def _backward_scale(sizes, device, dtype):
    args, kwargs = _backward(sizes, device, dtype)
    return args, {**kwargs, "scale": sizes.tensor(sizes.C, device=device, dtype=torch.float32, seed=4)}


CASES = [
    KernelCase("phi_scale", "phi_scale", _forward, read_and_written, rank=0),
    KernelCase("phi_scale/skip", "phi_scale", _forward_skip, read_and_written, rank=0),
    KernelCase("phi_scale/K3", "phi_scale", _forward, read_and_written, Sizes(N=16, K=3), rank=2),
    KernelCase("phi_scale/scale", "phi_scale", _forward_scale, read_and_written),
    KernelCase("phi_scale/contiguous", "phi_scale", _forward, read_and_written, Sizes(layout="contiguous"), rank=2),
    KernelCase("adjoint pair", "phi_scale_backward", _backward, read_and_written, rank=0),
    KernelCase("adjoint pair/scale", "phi_scale_backward", _backward_scale, read_and_written),
]
