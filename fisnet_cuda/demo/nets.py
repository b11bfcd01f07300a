"""The small classifier of the demo: an ordinary PyTorch module that knows nothing of relevance."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn


def small_net(classes: int = 10, size: int | None = 32, widths: Sequence[int] = (16, 32, 64)) -> nn.Sequential:
    """Three 3x3 convolutions, each followed by ReLU and a 2x2 max pool, and one linear layer.

    Args:
        classes: number of outputs.
        size: height and width of the input; the linear layer then sees every position. None averages over
            positions instead, so that the last layer stays cheap with many classes.
        widths: channels of the three convolutions.

    Returns:
        The network, for ``[N, 1, size, size]`` inputs.

    Example:
        >>> import torch
        >>> small_net()(torch.rand(2, 1, 32, 32)).shape
        torch.Size([2, 10])
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 1
    for i, width in enumerate(widths, start=1):
        layers[f"conv{i}"] = nn.Conv2d(channels, width, 3, padding=1)
        layers[f"relu{i}"] = nn.ReLU()
        layers[f"pool{i}"] = nn.MaxPool2d(2)
        channels = width
    if size is None:
        layers["average"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    positions = 1 if size is None else (size // 2 ** len(widths)) ** 2
    layers["classifier"] = nn.Linear(channels * positions, classes)
    return nn.Sequential(layers)
