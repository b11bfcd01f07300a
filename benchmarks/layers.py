"""Convolutions and dense layers of the networks that are timed, by their sizes: found by running them on PyTorch's meta device."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .models import build

NETS = ("resnet50", "densenet121", "vgg16_bn", "resnet18")


class Layer(NamedTuple):
    """A convolution of square maps and kernels; ``kernel`` 0 is a dense layer."""

    c_in: int
    c_out: int
    kernel: int
    stride: int = 1
    padding: int = 0
    size: int = 1

    def __str__(self) -> str:
        if not self.kernel:
            return f"dense {self.c_in}-{self.c_out}"
        return f"{self.kernel}x{self.kernel}{f'/{self.stride}' if self.stride > 1 else ''} {self.c_in}-{self.c_out} at {self.size}"

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1 if self.kernel else 1

    @property
    def taps(self) -> int:
        return max(self.kernel, 1) ** 2

    def product(self, batch: int, transposed: bool, itemsize: int) -> tuple[int, int, int]:
        """``(rows, columns, steps)`` of the forward or the transposed product, as `fisnet_cuda.ops.tiles` counts them."""
        if transposed:
            depth = self.c_out * self.taps * itemsize // self.stride**2
            return batch * self.size**2, self.c_in, -(-depth // 64)
        return batch * self.out_size**2, self.c_out, -(-self.c_in * self.taps * itemsize // 64)


def layers_of(net: str, size: int = 224) -> dict[Layer, int]:
    """The layers of a network for images of ``size``, in the order of the forward, and how often each occurs.

    Example:
        >>> list(layers_of("small", 32).items())[0]
        (Layer(c_in=3, c_out=32, kernel=3, stride=1, padding=1, size=32), 1)
    """
    with torch.device("meta"):
        model, found = build(net).eval(), Counter()

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        if isinstance(module, nn.Linear):
            found[Layer(module.in_features, module.out_features, 0)] += 1
        else:
            found[
                Layer(
                    module.in_channels, module.out_channels, module.kernel_size[0], module.stride[0], module.padding[0],
                    inputs[0].shape[-1],
                )
            ] += 1  # fmt: skip

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(note)
    model(torch.empty(1, 3, size, size, device="meta"))
    return dict(found)
