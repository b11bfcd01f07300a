"""The networks that are timed, by name: those of `fisnet_cuda.nets`, so nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fisnet_cuda import nets

MODELS: dict[str, Callable[[int], nn.Module]] = {
    name: getattr(nets, name) for name in ("resnet18", "resnet50", "densenet121", "vgg16_bn", "small")
}


def build(name: str, classes: int = 10) -> nn.Module:
    """A fresh network in train mode.

    Args:
        name: a key of `MODELS`.
        classes: number of outputs.

    Raises:
        ValueError: there is no such network.

    Example:
        >>> import torch
        >>> build("small", 5)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 5])
    """
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}; choose from {', '.join(MODELS)}")
    return MODELS[name](classes)
