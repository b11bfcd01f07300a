"""A run and its data, as `validate`, `test` and `predict` need them."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..data.module import MaskedImageData
from ..errors import InputError
from ..train.checkpoint import load_run, run_config
from ..train.module import ISNetModule

__all__ = ["add_run_arguments", "data_of", "device_of", "open_run"]


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say which run, on which images, where."""
    parser.add_argument("run", metavar="RUN", help="a run folder, or a checkpoint in it")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="which checkpoint of the folder [%(default)s]")
    parser.add_argument("--path", help="other images than those of the run's config.yaml")
    parser.add_argument("--masks", help="their masks")
    parser.add_argument("-b", "--batch-size", type=int, help="images a step [as in training]")
    parser.add_argument("--workers", type=int, help="processes that load images [as in training]")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="[the GPU where there is one]")


def device_of(args: argparse.Namespace) -> torch.device:
    """The device that is asked for, or the best that there is."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; fisnet-cuda info tells why")
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def open_run(args: argparse.Namespace, **overrides: Any) -> tuple[ISNetModule, MaskedImageData]:
    """The trained module, on the CPU, and its data module; ``overrides`` replace settings of the data.

    Raises:
        InputError: there is no such run, or the data are of other classes or another form than the network's.
    """
    module = load_run(args.run, which=args.which)
    return module, data_of(module, args, **overrides)


def data_of(module: ISNetModule, args: argparse.Namespace, **overrides: Any) -> MaskedImageData:
    """The data of the run's config.yaml, with what the command line says instead."""
    config = run_config(args.run)
    settings = {**config.get("data", {}), "seed": config.get("seed", 0)}
    if args.path:  # what says where the run's own images lie has nothing to say about others
        settings |= {"path": args.path, "masks": None, "form": "auto"}
        settings |= {name: None for name in ("train", "val", "test") if name in settings}
        settings |= {"tests": {}} if "tests" in settings else {}
    if args.masks:
        settings["masks"] = args.masks
    for name in ("batch_size", "workers"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    settings |= {"classes": list(module.spec.classes), **overrides}
    data = MaskedImageData(**settings)
    if tuple(data.spec.classes) != tuple(module.spec.classes):
        raise InputError(
            f"the images are of the classes {', '.join(data.spec.classes)}, and {args.run} knows {', '.join(module.spec.classes)}"
        )
    return data
