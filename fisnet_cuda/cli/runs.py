"""A run and its data, as `validate`, `test` and `predict` need them."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch

from ..data.module import MaskedImageData
from ..data.samples import SPLITS
from ..data.split import drift, manifest_name, read_manifest
from ..errors import FisnetWarning, InputError
from ..train.checkpoint import load_run, run_config
from ..train.module import ISNetModule

__all__ = ["add_data_arguments", "add_run_arguments", "data_of", "device_of", "open_run"]


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say which run, on which images, where."""
    parser.add_argument("run", metavar="RUN", help="a run folder, or a checkpoint in it")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="which checkpoint of the folder [%(default)s]")
    add_data_arguments(parser)
    parser.add_argument("-b", "--batch-size", type=int, help="images a step [as in training]")
    parser.add_argument("--workers", type=int, help="processes that load images [as in training]")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="[the GPU where there is one]")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say where the images are."""
    parser.add_argument(
        "--path", help="where the run's images are now; or other images, then all of them are used but for what they declare"
    )
    parser.add_argument("--masks", help="their masks")


def device_of(args: argparse.Namespace) -> torch.device:
    """The device that is asked for, or the best that there is."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; fisnet-cuda info tells why")
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def open_run(args: argparse.Namespace, whole: str = "test", **overrides: Any) -> tuple[ISNetModule, MaskedImageData]:
    """The trained module, on the CPU, and its data module; see `data_of`.

    Raises:
        InputError: there is no such run, or the data are of other classes or another form than the network's.
    """
    module = load_run(args.run, which=args.which)
    return module, data_of(module, args, whole, **overrides)


def data_of(module: ISNetModule, args: argparse.Namespace, whole: str = "test", **overrides: Any) -> MaskedImageData:
    """The data of the run's config.yaml, with what the command line says instead; in the splits of the training.

    Args:
        module: of the run.
        args: ``run``, ``path``, ``masks``, ``batch_size``, ``workers``.
        whole: the split of images that are not the run's own and declare none.
        **overrides: replace settings of the data.
    """
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
    try:
        data = MaskedImageData(**settings)
    except InputError as error:
        named = settings.get("path")
        if args.path or not isinstance(named, str) or Path(named).exists():
            raise
        raise InputError(f"{error}, where the config.yaml of {args.run} has its images: say where they are now with --path") from None
    if tuple(data.spec.classes) != tuple(module.spec.classes):
        raise InputError(
            f"the images are of the classes {', '.join(data.spec.classes)}, and {args.run} knows {', '.join(module.spec.classes)}"
        )
    _take_splits(data, args, whole)
    return data


def _take_splits(data: MaskedImageData, args: argparse.Namespace, whole: str) -> None:
    """Each sample's split is that of the training, whatever has come to the data or left them since."""
    run = Path(args.run)
    file = (run if run.is_dir() else run.parent) / "split.csv"
    rows = read_manifest(file) if file.is_file() else {}
    found = drift(rows, data.listing, data.splits)
    if args.path and (found.gone or not rows):  # other images: nobody has divided them
        samples = data.listing.samples
        data.splits = [whole if s.split is None and name in SPLITS else name for s, name in zip(samples, data.splits)]
        return
    if not rows:
        return
    unknown = set(found.new)
    for i, sample in enumerate(data.listing.samples):
        name = manifest_name(sample.name)
        if data.splits[i] not in ("", *SPLITS):
            continue  # of a further test set
        if name not in unknown:
            data.splits[i] = rows[name].split or ""
        elif sample.split is None:
            data.splits[i] = ""
    if any(found):
        warnings.warn(
            f"the images are not those of the training any more: {found}. Each keeps the split that {file} has for it; new ones count "
            "where the data declare their split, and nowhere else",
            FisnetWarning,
            stacklevel=2,
        )
