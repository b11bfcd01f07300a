"""Products of linear maps with their LRP work (kernels 8, 9, 10 and 12), at layers of ResNet-50, VGG-16 and DenseNet-121.

What they are compared with as "eager" is candidate 0 of the dispatcher: the library's product, then the project's own pointwise
kernel. float32 products are TF32, the library's too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisnet_cuda import reference
from fisnet_cuda.ops import library

from ..layers import Layer
from . import KernelCase, Sizes, read_and_written

EPS, EPS_PLUS = 1e-2, 1e-3
WIDE = Layer(256, 64, 1, size=56)  # bound by memory
DEEP = Layer(128, 128, 3, padding=1, size=28)
STRIDED = Layer(256, 256, 3, 2, 1, 28)
VGG = Layer(512, 512, 3, padding=1, size=14)
DENSENET = Layer(512, 128, 1, size=28)
HEAD = Layer(2048, 1000, 0)
MAIN = ("linear_act", "transposed_phi", "fprop_adjoint")  # in every layer of every variant but Dual


def _out_channels(layer: Layer, sizes: Sizes) -> int:
    """At other input channels than the layer's: odd or even as those are."""
    if layer.c_in == sizes.C:
        return layer.c_out
    return sizes.C + 2 if sizes.C % 2 else 2 * sizes.C


class Operands:
    """A layer's tensors; at other sizes than its own, it keeps its kernel and stride."""

    def __init__(self, layer: Layer, sizes: Sizes, device: str, dtype: torch.dtype) -> None:
        self.layer, self.sizes, self.on = layer, sizes, {"device": device, "dtype": dtype}
        self.c_in, self.c_out = sizes.C, _out_channels(layer, sizes)
        self.geometry = reference.conv_geometry(2, layer.stride, layer.padding, 1, 1) if layer.kernel else reference.linear_geometry()
        self.in_size = (sizes.H, sizes.W) if layer.kernel else ()
        self.out_size = tuple((size + 2 * layer.padding - layer.kernel) // layer.stride + 1 for size in self.in_size)

    def _map(self, c: int, size: tuple[int, ...], seed: int) -> Tensor:
        return self.sizes.tensor(self.sizes.N, c, *size, seed=seed, **self.on)

    def inputs(self, seed: int) -> Tensor:
        return self._map(self.c_in, self.in_size, seed)

    def outputs(self, seed: int) -> Tensor:
        return self._map(self.c_out, self.out_size, seed)

    @property
    def W(self) -> Tensor:
        kernel = (self.layer.kernel,) * 2 if self.layer.kernel else ()
        return self.sizes.tensor(self.c_out, self.c_in, *kernel, seed=1, **self.on) / (self.c_in * self.layer.taps) ** 0.5

    def channels(self, count: int, seed: int) -> Tensor:
        return self.sizes.tensor(count, seed=seed, **{**self.on, "dtype": torch.float32})

    def signs(self) -> Tensor:
        return self.channels(self.c_out, 2).sign()


def _linear_act(o: Operands):
    scale, shift = o.channels(o.c_out, 3), o.channels(o.c_out, 4)
    return (o.inputs(5), o.W, o.geometry, scale, shift, o.outputs(6), True), {}


def _prologue(o: Operands):
    pre = {"pre_scale": o.channels(o.c_in, 3), "pre_shift": o.channels(o.c_in, 4)}
    return (o.inputs(5), o.W, o.geometry, o.channels(o.c_out, 6), o.channels(o.c_out, 7), None, True), pre


def _transposed_phi(o: Operands):
    return (o.outputs(3), o.W, o.geometry, o.in_size, o.channels(o.c_out, 4), o.inputs(5).relu(), EPS), {}


def _transposed_phi_skip(o: Operands):
    args, _ = _transposed_phi(o)
    return args, {"skip": o.inputs(6)}


def _fprop_adjoint(o: Operands):
    a = o.outputs(4).relu()
    return (o.inputs(3), o.W, o.geometry, o.channels(o.c_out, 5), a, o.outputs(6) * (a > 0), EPS), {}


def _dual_fprop(o: Operands):
    return (o.inputs(3).relu(), o.W, o.geometry, o.signs()), {}


def _dual_transposed_phi(o: Operands):
    a = o.inputs(5).relu()
    return (
        o.outputs(3), o.outputs(4), o.W, o.geometry, o.in_size, o.channels(o.c_out, 6), a, a + o.inputs(7).relu(), EPS, EPS_PLUS,
    ), {}  # fmt: skip


def _dual_fprop_adjoint(o: Operands):
    a = o.outputs(5).relu()
    return (
        o.inputs(3), o.inputs(4), o.W, o.geometry, o.channels(o.c_out, 6), a, o.outputs(7) * (a > 0), o.outputs(8) * (a > 0),
        a + o.outputs(9).relu(), EPS, EPS_PLUS,
    ), {}  # fmt: skip


def _dual_transposed_sum(o: Operands):
    return (o.outputs(3), o.outputs(4), o.W, o.geometry, o.in_size, o.signs()), {}


def _case(kernel: str, setting: str, layer: Layer, make: Callable[[Operands], tuple[tuple, dict[str, Any]]], net: str) -> KernelCase:
    side = layer.size if layer.kernel else 1

    def flops(sizes: Sizes) -> int:
        products = 2 if kernel.startswith("dual") else 1
        positions = layer._replace(size=sizes.H).out_size * layer._replace(size=sizes.W).out_size
        return 2 * products * sizes.N * positions * sizes.C * _out_channels(layer, sizes) * layer.taps

    return KernelCase(
        f"{kernel}{setting}/{net} {layer}", kernel, lambda sizes, device, dtype: make(Operands(layer, sizes, device, dtype)),
        read_and_written, Sizes(C=layer.c_in, H=side, W=side), getattr(library, kernel), flops=flops,
        rank=0 if net == "resnet" and layer.kernel and kernel in MAIN else 1,
    )  # fmt: skip


CASES = [
    _case("linear_act", "", WIDE, _linear_act, "resnet"),
    _case("linear_act", "", DEEP, _linear_act, "resnet"),
    _case("linear_act", "", STRIDED, _linear_act, "resnet"),
    _case("linear_act", "/prologue", DENSENET, _prologue, "densenet"),
    _case("transposed_phi", "", WIDE, _transposed_phi, "resnet"),
    _case("transposed_phi", "/skip", WIDE, _transposed_phi_skip, "resnet"),
    _case("transposed_phi", "", DEEP, _transposed_phi, "resnet"),
    _case("transposed_phi", "", STRIDED, _transposed_phi, "resnet"),
    _case("transposed_phi", "", VGG, _transposed_phi, "vgg"),
    _case("transposed_phi", "", HEAD, _transposed_phi, "resnet"),
    _case("fprop_adjoint", "", WIDE, _fprop_adjoint, "resnet"),
    _case("fprop_adjoint", "", DEEP, _fprop_adjoint, "resnet"),
    _case("fprop_adjoint", "", STRIDED, _fprop_adjoint, "resnet"),
    _case("fprop_adjoint", "", VGG, _fprop_adjoint, "vgg"),
    *(_case("dual_fprop", "", layer, _dual_fprop, "resnet") for layer in (WIDE, DEEP)),
    *(_case("dual_transposed_phi", "", layer, _dual_transposed_phi, "resnet") for layer in (WIDE, DEEP)),
    *(_case("dual_fprop_adjoint", "", layer, _dual_fprop_adjoint, "resnet") for layer in (WIDE, DEEP)),
    *(_case("dual_transposed_sum", "", layer, _dual_transposed_sum, "resnet") for layer in (WIDE, DEEP)),
]
