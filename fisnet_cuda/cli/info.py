"""Versions and devices, and whether the CUDA kernels are there: what a bug report should begin with."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

PACKAGES = ("lightning", "kornia", "torchmetrics", "jsonargparse", "torchvision", "timm", "tensorboard", "onnx", "onnxruntime")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fisnet-cuda info``."""
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints what runs here, and why."""
    found = collect()
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    width = max(map(len, found))
    for name, value in found.items():
        if value in ("", []):
            continue
        if isinstance(value, bool):
            value = "yes" if value else "no"
        for index, line in enumerate(value if isinstance(value, list) else [value]):
            print(f"{name if index == 0 else '':<{width}}  {line}")
    return 0


def collect() -> dict[str, Any]:
    """`fisnet_cuda.info`, and beside it the packages of the command line, the devices, and where things are kept."""
    import torch

    import fisnet_cuda
    from fisnet_cuda.dispatch import cache

    found: dict[str, Any] = fisnet_cuda.info()
    found["cpu"] = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    found["gpus"] = [_gpu(index) for index in range(torch.cuda.device_count())]
    for name in PACKAGES:
        found[name] = _version(name)
    found["kernel choices"] = str(cache.default_path() or "kept nowhere: there is no cache folder")
    found["package"] = os.path.dirname(fisnet_cuda.__file__)
    return found


def _gpu(index: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return f"{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute {properties.major}.{properties.minor}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
