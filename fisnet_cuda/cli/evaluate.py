"""Does the shortcut still work? Metrics with confidence intervals for every test set, background share of the heatmaps, pointing
game, insertion and deletion, background swap; writes evaluation.json, evaluation.md and evaluation.png.

  fisnet-cuda evaluate runs/isnet --set external=other/images,masks=other/masks --compare runs/standard
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ..data.dataset import MaskedImages
from ..data.module import MaskedImageData
from ..data.split import read_manifest
from ..errors import InputError
from ..evaluate import Evaluation, Options, evaluate
from ..evaluate.faithfulness import BASELINES
from ..files import check_folder
from ..train.checkpoint import WHICH, checkpoint_path, load_run
from ..train.module import ISNetModule
from .console import quiet, say, settings_kept
from .runs import add_data_arguments, data_of, device_of

__all__ = ["add_arguments", "parse_set", "run"]

_SET = ("masks", "form", "mask_suffix", "mask_from")
_TABLES = ("columns", "keys")  # columns.image=file: as in fit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fisnet-cuda evaluate``."""
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="further runs beside it (a standard classifier, say)")
    parser.add_argument("--checkpoint", default="best", metavar="best|last|FILE", help="which checkpoint of RUN [%(default)s]")
    parser.add_argument(
        "--set", action="append", default=[], dest="sets", metavar="NAME=PATH[,masks=DIR][,...]",
        help=f"a further test set, say one in which the shortcut is broken; options: {', '.join(_SET)}, "
        "columns.image and the like, keys.image and the like; may be repeated",
    )  # fmt: skip
    parser.add_argument("--split", choices=("test", "val", "train", "none"), default="test",
                        help="of the run's own data: test (and its groups), val, train, or none of it [%(default)s]")  # fmt: skip
    add_data_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="where to write [RUN/evaluation]")
    parser.add_argument(
        "--samples", type=int, metavar="N", help="at most N images of each set, drawn by the seed, for a quick look [all]"
    )
    parser.add_argument("--bootstrap", type=int, default=2000, metavar="N", help="resamples behind the intervals [%(default)s]")
    parser.add_argument("--tolerance", type=int, default=0, metavar="PIXELS", help="of the pointing game [%(default)s]")
    parser.add_argument("--swap-images", type=int, default=512, metavar="N",
                        help="at most N images of each set for the background swap; 0: none [%(default)s]")  # fmt: skip
    parser.add_argument("--no-faithfulness", action="store_true", help="leave out insertion and deletion, the slow part")
    parser.add_argument("--faithfulness-samples", type=int, default=Options.samples, metavar="N",
                        help="images of each set for insertion and deletion [%(default)s]")  # fmt: skip
    parser.add_argument(
        "--faithfulness-steps", type=int, default=Options.steps, metavar="N", help="parts that pixels change in [%(default)s]"
    )
    parser.add_argument("--insertion", choices=BASELINES, default=Options.insertion, help="what pixels are inserted into [%(default)s]")
    parser.add_argument("--deletion", choices=BASELINES, default=Options.deletion, help="what deleted pixels become [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of bootstrap, samples and random orders [%(default)s]")
    parser.add_argument("-b", "--batch-size", type=int, default=64, help="images a step [%(default)s]")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="[the GPU where there is one]")


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints the verdict and a table, writes the three files."""
    _check(args)
    with quiet(), settings_kept():
        device = device_of(args)
        paths = [args.run, *args.compare]
        # a checkpoint's file is RUN's own: the other runs are taken at their best then
        modules = [_load(p, args.checkpoint if i == 0 or args.checkpoint in WHICH else "best") for i, p in enumerate(paths)]
        for path, (module, _) in zip(paths, modules):  # before hours of work
            theirs, ours = module.spec.classes, modules[0][0].spec.classes
            if theirs != ours:
                raise InputError(f"{path} tells {_some(theirs)} apart and {args.run} tells {_some(ours)}: they cannot be compared")
        evaluations = [_one(path, name, *loaded, args, device) for path, name, loaded in zip(paths, names(paths), modules)]
        whole = evaluations[0].beside(*evaluations[1:])
        folder = Path(args.run)
        written = whole.write(args.out or (folder if folder.is_dir() else folder.parent) / "evaluation")
        say(whole.summary())
        say("written: " + ", ".join(map(str, written.values())))
    return 0


def parse_set(text: str) -> tuple[str, dict[str, Any]]:
    """``NAME=PATH[,masks=DIR][,...]`` as a name and options of a test set.

    Raises:
        InputError: it has another form, or an unknown option.

    Example:
        >>> parse_set("external=data/b.csv,masks=data/masks")
        ('external', {'path': 'data/b.csv', 'masks': 'data/masks'})
        >>> parse_set("external=data/b.csv,columns.image=file")[1]["columns"]
        {'image': 'file'}
    """
    name, equals, rest = text.partition("=")
    path, *options = re.split(r",(?=[\w.]+=)", rest)
    if not equals or not re.fullmatch(r"[\w .+-]+", name) or not path:
        raise InputError(f"--set {text}: write NAME=PATH or NAME=PATH,masks=DIR, NAME of letters, digits, space and .+-_")
    found: dict[str, Any] = {"path": path}
    for option in options:
        key, _, value = option.partition("=")
        table, _, role = key.partition(".")
        if table in _TABLES and role:
            found.setdefault(table, {})[role] = value
        elif key in _SET:
            found[key] = value
        else:
            allowed = [*_SET, *(f"{table}.NAME" for table in _TABLES)]
            raise InputError(f"--set {text}: there is no option {key!r}; options: {', '.join(allowed)}")
    return name, found


def names(paths: Sequence[str]) -> list[str]:
    """What to call runs: the folder's name, or the whole path where two have the same.

    Example:
        >>> names(["runs/a", "runs/b/best.ckpt"]), names(["x/a", "y/a"])
        (['a', 'b/best.ckpt'], ['x/a', 'y/a'])
    """
    short = ["/".join(Path(p).resolve().parts[-2:]) if Path(p).suffix == ".ckpt" else Path(p).resolve().name for p in paths]
    return [s if short.count(s) == 1 else str(p) for s, p in zip(short, paths)]


def _check(args: argparse.Namespace) -> None:
    for name, least in (("samples", 1), ("batch_size", 1), ("seed", 0), ("bootstrap", 100), ("tolerance", 0), ("swap_images", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    given = [parse_set(text)[0] for text in args.sets]
    twice = [name for name in given if given.count(name) > 1]
    if twice:
        raise InputError(f"--set {twice[0]}= is given twice: give every set a name of its own")
    if args.out:
        check_folder(args.out)  # now, not after the work


def _one(path: str, name: str, module: ISNetModule, file: Path, args: argparse.Namespace, device: torch.device) -> Evaluation:
    """One run on its own data and the sets of the command line."""
    module.to(device)
    data = _data(module, path, args)
    known = _trained_on(path)
    wanted: dict[str, torch.Tensor] = {}
    notes: dict[str, list[str]] = {}
    for subset in _subsets(data, args):
        wanted[subset], notes[subset] = _draw(data, subset, args)
        if known is None:
            notes[subset].append(f"{name} keeps no hashes of its training images (split.csv): overlap with them was not looked for")
            continue
        seen = sum(data.store.hashes[i] in known for i in wanted[subset].tolist())
        if seen and subset != "train":
            of = f"{seen} of {len(wanted[subset])} images"
            notes[subset].append(f"{of} are among the training images of {name} (equal pixels): the numbers are too good")
    loaders = {subset: _Batches(data, indices, args.batch_size, device) for subset, indices in wanted.items()}
    faithful = Options(
        samples=0 if args.no_faithfulness else args.faithfulness_samples, steps=args.faithfulness_steps, insertion=args.insertion,
        deletion=args.deletion, batch_size=args.batch_size,
    )  # fmt: skip
    facts = {
        "checkpoint": str(file),
        "backbone": str(module.hparams.get("backbone", "")),
        "variant": str(module.hparams.get("variant", "")),
        "data": str(data.listing.root),
        **({"swap_background": data.swap_background} if data.swap_background else {}),
        **({"sets": list(args.sets)} if args.sets else {}),
    }
    return evaluate(
        module, loaders, name=name, bootstrap=args.bootstrap, tolerance=args.tolerance, faithful=faithful,
        swap_images=args.swap_images, seed=args.seed,
        identities=dict.fromkeys(wanted, data.store.hashes), notes=notes, facts=facts, progress=True,
    )  # fmt: skip


def _load(path: str, checkpoint: str) -> tuple[ISNetModule, Path]:
    if checkpoint in WHICH:
        file = checkpoint_path(path, checkpoint)
    else:
        file = Path(checkpoint)
        if not file.is_file() and not (Path(path) / checkpoint).is_file():
            raise InputError(f"--checkpoint {checkpoint}: there is no such file; give best, last or a checkpoint")
        file = file if file.is_file() else Path(path) / checkpoint
    return load_run(file), file


def _data(module: ISNetModule, path: str, args: argparse.Namespace) -> MaskedImageData:
    """The run's data and the further sets; only what is evaluated is decoded."""
    from ..train.checkpoint import run_config

    sets = dict(parse_set(text) for text in args.sets)
    own = {} if args.path else (run_config(path).get("data") or {}).get("tests") or {}
    clash = [name for name in sets if name in own]
    if clash:
        raise InputError(f"--set {clash[0]}=: the run has a test set of this name already; give another name")
    needed = SimpleNamespace(run=path, path=args.path, masks=args.masks, batch_size=args.batch_size, workers=0)
    data = data_of(module, needed, args.split if args.split != "none" else "test", tests={**own, **sets}, augment="none")
    keep = {args.split, *own, *sets} if args.split == "test" else {args.split, *sets}
    chosen = [i for i, split in enumerate(data.splits) if split in keep]
    if not chosen:
        raise InputError(f"{path} has no images in its split {args.split!r} and no --set is given: there is nothing to evaluate")
    data.listing = replace(data.listing, samples=tuple(data.listing.samples[i] for i in chosen))
    data.splits = [data.splits[i] for i in chosen]
    data.tests = tuple(name for name in data.tests if name in keep)
    return data


def _subsets(data: MaskedImageData, args: argparse.Namespace) -> list[str]:
    """Names of what is evaluated, in order."""
    found = [args.split] if args.split in ("val", "train") and args.split in data.splits else []
    found += [name for name in data.subsets() if name not in found]
    empty = [name for name in data.tests if name not in found]
    if empty:
        raise InputError(f"the test set {empty[0]!r} has no images")
    return found


def _draw(data: MaskedImageData, subset: str, args: argparse.Namespace) -> tuple[torch.Tensor, list[str]]:
    """Indices of the samples of a subset, and a note where these are not all."""
    indices = torch.as_tensor(data.subset(subset).indices)
    if args.samples is None or len(indices) <= args.samples:
        return indices, []
    chosen = np.sort(np.random.default_rng(args.seed).permutation(len(indices))[: args.samples])
    return indices[torch.as_tensor(chosen)], [f"{args.samples} of {len(indices)} images, drawn at random (--samples)"]


def _trained_on(path: str) -> set[str] | None:
    """Hashes of the images that the run was trained on, from its manifest; None where it has none."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if not (folder / "split.csv").is_file():
        return None
    rows = [row for row in read_manifest(folder / "split.csv").values() if row.split == "train"]
    return {row.sha256 for row in rows if row.sha256} or None


class _Batches:
    """Prepared batches of some samples, in order, on the device."""

    def __init__(self, data: MaskedImageData, indices: torch.Tensor, batch_size: int, device: torch.device) -> None:
        self.data, self.batch_size, self.device = data, batch_size, device
        self.subset = MaskedImages(data.store, indices)
        self.images = len(self.subset)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, self.images, self.batch_size):
            batch = self.subset.__getitems__(list(range(start, min(start + self.batch_size, self.images))))
            yield self.data.prepare({key: value.to(self.device) for key, value in batch.items()})


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
