"""The backbone that `plan` and `bench` are asked about."""

from __future__ import annotations

import argparse
import json
from typing import Any

from torch import nn

from ..data.spec import InputSpec
from ..errors import InputError
from .errors import nearest

__all__ = ["add_backbone_arguments", "backbone_path", "build"]


def backbone_path(name: str) -> str:
    """An import path; the names of `fisnet_cuda.nets` do without theirs.

    Example:
        >>> backbone_path("resnet18"), backbone_path("torchvision.models.resnet50")
        ('fisnet_cuda.nets.resnet18', 'torchvision.models.resnet50')
    """
    from .. import nets

    if name in nets.__all__:
        return f"fisnet_cuda.nets.{name}"
    if "." not in name:
        near = nearest(name, nets.__all__)
        raise InputError(f"this package has no net {name!r}{near}; others go by import path, such as torchvision.models.vgg16")
    return name


def add_backbone_arguments(parser: argparse.ArgumentParser, size: int) -> None:
    """Options that say which network on which images."""
    parser.add_argument("--backbone-args", type=_mapping, default={}, metavar="JSON", help="keyword arguments of the backbone")
    parser.add_argument("--classes", type=_positive, default=2, help="number of classes [%(default)s]")
    parser.add_argument("--channels", type=_positive, default=3, help="channels of the images, 1 or 3 [%(default)s]")
    help_size = f"height and width of the images, or one number [{size}]"
    parser.add_argument("--size", type=_positive, nargs="+", default=[size], help=help_size)


def build(name: str, args: argparse.Namespace) -> tuple[nn.Module, InputSpec]:
    """The classifier, and what its input is."""
    from ..train.backbone import build_backbone

    if len(args.size) > 2:
        raise InputError(f"--size takes one or two numbers, got {len(args.size)}")
    size = (args.size[0], args.size[-1])
    spec = InputSpec(size, args.channels, tuple(str(index) for index in range(args.classes)))
    return build_backbone(backbone_path(name), args.backbone_args, spec), spec


def _positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON mapping such as '{{\"width\": 64}}'")
    return value
