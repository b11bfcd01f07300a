"""Classifiers to start from, of ``torch.nn`` alone: torchvision's topologies and ``state_dict`` keys, without torchvision.

Weights are PyTorch's default initialisation; nothing is downloaded. A ``state_dict`` of torchvision's ResNets and VGG loads into
them as it is. All take images ``[N, in_channels, H, W]`` and return logits ``[N, num_classes]``.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

__all__ = ["densenet121", "resnet18", "resnet34", "resnet50", "small", "vgg16_bn"]


def small(num_classes: int = 1000, in_channels: int = 3) -> nn.Sequential:
    """Three conv-BN-ReLU stages, two max pools between them, a global average and one linear layer; for quick runs.

    Example:
        >>> small(5)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 5])
    """
    layers: list[nn.Module] = []
    for c_in, c_out in ((in_channels, 32), (32, 64), (64, 128)):
        layers += [_conv3x3(c_in, c_out), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if c_out < 128 else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(128, num_classes))


def resnet18(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """ResNet-18 (He et al. 2016)."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, in_channels)


def resnet34(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """ResNet-34 (He et al. 2016)."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, in_channels)


def resnet50(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """ResNet-50, stride in the 3x3 convolution."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels)


def densenet121(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """DenseNet-121 (Huang et al. 2017)."""
    return DenseNet(32, (6, 12, 24, 16), 64, num_classes, in_channels)


def vgg16_bn(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """VGG-16 with BatchNorm (Simonyan and Zisserman 2015)."""
    plan = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
    return VGG(plan, num_classes, in_channels)


def _conv3x3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)


def _conv1x1(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip connection."""

    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(c_in, width, stride), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = _conv3x3(width, width), nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a skip connection."""

    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv1x1(c_in, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv3x3(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv1x1(width, 4 * width), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """A 7x7 stem, four stages of residual blocks, a global average and one linear layer."""

    def __init__(
        self, block: type[BasicBlock | Bottleneck], blocks: tuple[int, ...], num_classes: int, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(64), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        for index, (width, count) in enumerate(zip((64, 128, 256, 512), blocks), start=1):
            stage: list[nn.Module] = []
            for stride in (1 if index == 1 else 2, *[1] * (count - 1)):
                out, downsample = width * block.expansion, None
                if stride > 1 or channels != out:
                    downsample = nn.Sequential(_conv1x1(channels, out, stride), nn.BatchNorm2d(out))
                stage.append(block(channels, width, stride, downsample))
                channels = out
            self.add_module(f"layer{index}", nn.Sequential(*stage))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class DenseLayer(nn.Module):
    """BN-ReLU-conv1x1-BN-ReLU-conv3x3 on everything that the block has made so far."""

    def __init__(self, c_in: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(c_in), nn.ReLU(inplace=True)
        self.conv1 = _conv1x1(c_in, 4 * growth)
        self.norm2, self.relu2 = nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(4 * growth, growth)

    def forward(self, features: list[Tensor]) -> Tensor:
        bottleneck = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(bottleneck)))


class DenseBlock(nn.ModuleDict):
    """Layers that each see the outputs of all layers before."""

    def __init__(self, layers: int, c_in: int, growth: int) -> None:
        super().__init__({f"denselayer{i + 1}": DenseLayer(c_in + i * growth, growth) for i in range(layers)})

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """A 7x7 stem, dense blocks with BN-ReLU-conv-pool transitions, BN-ReLU, a global average, one linear layer."""

    def __init__(self, growth: int, blocks: tuple[int, ...], c_stem: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(in_channels, c_stem, 7, 2, 3, bias=False),
                norm0=nn.BatchNorm2d(c_stem),
                relu0=nn.ReLU(inplace=True),
                pool0=nn.MaxPool2d(3, 2, 1),
            )
        )
        channels = c_stem
        for index, layers in enumerate(blocks, start=1):
            self.features.add_module(f"denseblock{index}", DenseBlock(layers, channels, growth))
            channels += layers * growth
            if index < len(blocks):
                transition = OrderedDict(
                    norm=nn.BatchNorm2d(channels),
                    relu=nn.ReLU(inplace=True),
                    conv=_conv1x1(channels, channels // 2),
                    pool=nn.AvgPool2d(2, 2),
                )
                self.features.add_module(f"transition{index}", nn.Sequential(transition))
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        # a module where torchvision calls the function, so that the baselines can exchange every ReLU
        self.relu, self.avgpool = nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.relu(self.features(x)))
        return self.classifier(torch.flatten(x, 1))


class VGG(nn.Module):
    """3x3 convolutions with BatchNorm, max pools ("M"), and three linear layers with dropout."""

    def __init__(self, plan: tuple[int | str, ...], num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for width in plan:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.features, self.avgpool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(channels * 49, 4096), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(4096, num_classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
