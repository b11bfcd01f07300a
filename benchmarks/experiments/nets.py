"""The classifiers of the experiments, by name, and the layers that deep supervision looks at."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from fisnet_cuda import nets

__all__ = ["NETS", "build_net", "supervised"]


def convnet(
    classes: int, channels: int, size: tuple[int, int], norm: bool = False, widths: tuple[int, ...] = (16, 32, 64),
    stem: tuple[int, int] = (5, 2),
) -> nn.Module:  # fmt: skip
    """A small net for drawings: a 5x5 convolution of stride 2, then 3x3 convolutions, each with ReLU and a 2x2 max pool, and one
    linear layer that sees every position.

    Args:
        classes, channels: of the task.
        size: height and width of its images.
        norm: a BatchNorm behind each convolution.
        widths: channels of the convolutions.
        stem: kernel size and stride of the first one.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    c_in = channels
    for i, width in enumerate(widths, start=1):
        kernel, stride = stem if i == 1 else (3, 1)
        layers[f"conv{i}"] = nn.Conv2d(c_in, width, kernel, stride, kernel // 2, bias=not norm)
        if norm:
            layers[f"norm{i}"] = nn.BatchNorm2d(width)
        layers[f"relu{i}"] = nn.ReLU()
        layers[f"pool{i}"] = nn.MaxPool2d(2)
        c_in = width
    layers["flatten"] = nn.Flatten()
    with torch.no_grad():
        features = nn.Sequential(layers).eval()(torch.zeros(1, channels, *size)).shape[1]
    layers["classifier"] = nn.Linear(features, classes)
    return nn.Sequential(layers)


def poolnet(classes: int, channels: int, size: tuple[int, int], widths: tuple[int, ...] = (16, 32, 64, 64)) -> nn.Module:
    """A small net for many classes: four conv-BN-ReLU stages of stride 2, 1, 1, 1 with max pools between, a global average and
    one linear layer, whose cost hardly grows with the classes."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    c_in = channels
    for i, width in enumerate(widths, start=1):
        layers[f"conv{i}"] = nn.Conv2d(c_in, width, 3, 2 if i == 1 else 1, 1, bias=False)
        layers[f"norm{i}"], layers[f"relu{i}"] = nn.BatchNorm2d(width), nn.ReLU()
        if i < len(widths):
            layers[f"pool{i}"] = nn.MaxPool2d(2)
        c_in = width
    layers["average"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    layers["classifier"] = nn.Linear(c_in, classes)
    return nn.Sequential(layers)


def resnet18_slim(classes: int, channels: int, size: tuple[int, int], widths: tuple[int, ...] = (16, 32, 64, 128)) -> nn.Module:
    """ResNet-18 with a quarter of its channels: the same depth, skips and BatchNorms for about a sixteenth of the arithmetic."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"], layers["bn1"] = nn.Conv2d(channels, widths[0], 7, 2, 3, bias=False), nn.BatchNorm2d(widths[0])
    layers["relu"], layers["maxpool"] = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    c_in = widths[0]
    for i, width in enumerate(widths, start=1):
        stride = 1 if i == 1 else 2
        skip = None if i == 1 else nn.Sequential(nn.Conv2d(c_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        layers[f"layer{i}"] = nn.Sequential(nets.BasicBlock(c_in, width, stride, skip), nets.BasicBlock(width, width, 1, None))
        c_in = width
    layers["avgpool"], layers["flatten"], layers["fc"] = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, classes)
    return nn.Sequential(layers)


Build = Callable[[int, int, tuple[int, int]], nn.Module]  # (classes, channels, (H, W)) -> the classifier

# name -> how it is made, and the layers whose maps deep supervision looks at (semantics.md section 5)
NETS: dict[str, tuple[Build, tuple[str, ...]]] = {
    "convnet": (convnet, ("relu1", "relu2", "relu3")),
    "convnet_bn": (lambda classes, channels, size: convnet(classes, channels, size, norm=True), ("relu1", "relu2", "relu3")),
    "convnet3": (partial(convnet, stem=(3, 1)), ("relu1", "relu2", "relu3")),
    "convnet3_bn": (partial(convnet, norm=True, stem=(3, 1)), ("relu1", "relu2", "relu3")),
    "poolnet": (poolnet, ("relu1", "relu2", "relu3", "relu4")),
    "small": (lambda classes, channels, size: nets.small(classes, channels), ("2", "6", "10")),
    "resnet18": (lambda classes, channels, size: nets.resnet18(classes, channels), ("layer1", "layer2", "layer3", "layer4")),
    "resnet18_slim": (resnet18_slim, ("layer1", "layer2", "layer3", "layer4")),
    "densenet121": (
        lambda classes, channels, size: nets.densenet121(classes, channels),
        ("features.transition1.relu", "features.transition2.relu", "features.transition3.relu", "relu"),
    ),
}


def build_net(name: str, classes: int, channels: int, size: tuple[int, int], seed: int) -> nn.Module:
    """A net by name; its initial weights hang on the seed alone, so that every system of a seed starts from the same ones."""
    if name not in NETS:
        raise ValueError(f"net must be one of {', '.join(NETS)}, got {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETS[name][0](classes, channels, size).to(memory_format=torch.channels_last)


def supervised(name: str) -> tuple[str, ...]:
    """The layers that deep supervision looks at."""
    return NETS[name][1]
