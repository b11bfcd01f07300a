"""what a trained classifier looks at: heatmaps of new images, as PNG grids, and as .npy with a JSON index.

Red speaks for the class that is explained, blue against it, and the scale stands beside each map. No labels are needed; with
--masks the outline of the foreground is drawn and the share of relevance in the background is told."""

from __future__ import annotations

import argparse
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..files import atomic, check_folder, make_folder, write_json

if TYPE_CHECKING:
    from ..train.module import ISNetModule

__all__ = ["add_arguments", "find_images", "find_masks", "run"]

MOST_MAPS = 5  # beside each other in a figure; .npy files have all
INDEX = "heatmaps.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fisnet-cuda heatmap``."""
    parser.add_argument("images", nargs="+", metavar="IMG", help="image files, folders of them, or quoted globs ('scans/**/*.png')")
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="a run folder, or a checkpoint in it")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="which checkpoint of the folder [%(default)s]")
    parser.add_argument("--masks", nargs="+", metavar="DIR|FILE", help="a folder of masks of the images' names, or mask files")
    parser.add_argument(
        "--target", nargs="+", default=["predicted"], metavar="CLASS", help="explain: predicted, classes by name, or all [predicted]"
    )
    parser.add_argument("--rules", metavar="PRESET", help="LRP rules by a preset's name, such as epsilon_plus [those of training]")
    parser.add_argument("--out", type=Path, default=Path("heatmaps"), metavar="DIR", help="folder to write to [%(default)s]")
    parser.add_argument("--grid", type=_positive, metavar="N", help="pages of N images instead of a figure an image")
    parser.add_argument("--scale", choices=("each", "shared"), default="each", help="each map's own, or one a figure [%(default)s]")
    parser.add_argument("--overlay", action="store_true", help="draw the maps over the image")
    parser.add_argument("-b", "--batch-size", type=_positive, default=16, help="images at once [%(default)s]")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="[the GPU where there is one]")


def run(args: argparse.Namespace) -> int:
    """Reads all images, so that an unreadable one is told before anything is written; then explains, draws and writes."""
    from .console import quiet, settings_kept

    with quiet(), settings_kept():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from ..plot import Row, background_share, heatmap_grid
    from ..train.checkpoint import checkpoint_path, load_run

    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; fisnet-cuda info tells why")
    check_folder(args.out)
    files, left_out = find_images(args.images)
    masks, unmatched = find_masks(files, args.masks)
    module = load_run(args.checkpoint, args.device or ("cuda" if torch.cuda.is_available() else "cpu"), args.which)
    classes = module.spec.classes
    targets, rules = _targets(args.target, classes), _rule_map(args.rules, module.spec)
    items = _read(files, masks, module, _mask_options(args.checkpoint))
    make_folder(args.out)

    names = _names(files)
    entries: list[dict[str, Any]] = []
    page: list[Row] = []
    pages = 0
    for item, name, logits, maps, explained in _explained(module, items, names, targets, rules, args.batch_size):
        probabilities = logits.double().softmax(0)
        predicted = int(probabilities.argmax())
        truth = item.file.parent.name if item.file.parent.name in classes else None
        shares = [background_share(m, item.mask) if item.mask is not None else None for m in maps]
        with atomic(args.out / f"{name}.npy") as temporary, open(temporary, "wb") as stream:
            np.save(stream, maps.numpy())
        shown = sorted(range(len(maps)), key=lambda k: -float(probabilities[explained[k]]))[:MOST_MAPS]
        titles = {_title(classes[explained[k]], explained[k] == predicted): maps[k] for k in sorted(shown)}
        text = f"{item.file.name}\npredicted: {classes[predicted]}, {100 * float(probabilities[predicted]):.1f}\N{NO-BREAK SPACE}%"
        text += f"\nits folder: {truth}" if truth else ""
        row = Row(item.image, item.mask, titles, text, None if truth is None else classes[predicted] == truth)
        if args.grid:
            page.append(row)
            figure = f"page-{pages + 1:03}.png"
            if len(page) == args.grid or len(entries) + 1 == len(items):
                _draw(heatmap_grid, args, figure, page, module)
                page, pages = [], pages + 1
        else:
            figure = f"{name}.png"
            _draw(heatmap_grid, args, figure, [row], module)
        entries.append(
            {
                "file": str(item.file), "mask": None if item.mask_file is None else str(item.mask_file), "figure": figure,
                "npy": f"{name}.npy", "predicted": classes[predicted], "folder_says": truth,
                "probabilities": dict(zip(classes, probabilities.tolist())), "logits": dict(zip(classes, logits.tolist())),
                "explained": [classes[k] for k in explained], "background_share": shares,
                "relevance_sum": [float(m.double().sum()) for m in maps],
            }
        )  # fmt: skip
    index = {
        "checkpoint": str(checkpoint_path(args.checkpoint, args.which)), "target": " ".join(args.target), "classes": list(classes),
        "rules": args.rules or "those of training",
        "npy": "float32 [K, C, H, W]: relevance of each explained class, in the unit of its logit",
        "background_share": "share of |relevance| outside the mask, 0 is best; null: no mask, or a map of zeros", "images": entries,
    }  # fmt: skip
    write_json(args.out / INDEX, index)
    _say(args, entries, left_out, unmatched, pages, len(targets or [0]))
    return 0


# ---- files -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    """An image as the network sees it: uint8 [C, H, W], and its mask [H, W] in [0, 1]."""

    file: Path
    image: Tensor
    mask_file: Path | None
    mask: Tensor | None


def find_images(given: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The image files that arguments stand for, each once, and what folders hold beside them (names with reasons).

    Raises:
        InputError: an argument stands for nothing.
    """
    from ..data._paths import MASK_FOLDERS, missing, walk

    files: list[Path] = []
    left_out: list[str] = []
    for word in given:
        path = Path(word)
        if path.is_dir():
            found, ignored = walk(path)
            own = [f for f in found if not set(map(str.lower, f.folders)) & MASK_FOLDERS and not f.path.stem.lower().endswith("_mask")]
            if not own:
                raise InputError(f"the folder {path} holds no images")
            left_out += ignored + [f"{f.path}: a mask, by its name" for f in found if f not in own]
            files += [f.path for f in own]
        elif path.exists():
            files.append(path)
        elif glob.has_magic(word):
            found_paths = sorted(p for p in map(Path, glob.glob(word, recursive=True)) if p.is_file())
            if not found_paths:
                raise InputError(f"no file matches {word}")
            files += found_paths
        else:
            raise missing(path, "image")
    return list(dict.fromkeys(files)), left_out


def find_masks(images: Sequence[Path], given: Sequence[str] | None) -> tuple[list[Path | None], int]:
    """The mask of each image, by its name: the same stem, or that and "_mask", in folders of the same names.

    masks/normal/7.png is never the mask of images/TB/7.png: folders below what is given (below the files' common folder) must be the
    image's last ones. Of several masks the one in the most alike folders is taken. As many mask files as images, none of which has
    an image's name, are taken in the order given.

    Returns:
        A mask or None for each image, and how many images have none.

    Raises:
        InputError: a path does not exist; no mask fits any image; two fit one equally.
    """
    from ..data._paths import MASK_FOLDERS, missing, walk

    if not given:
        return [None] * len(images), 0
    masks: dict[Path, tuple[str, ...]] = {}  # the folders that an image must lie in
    singles: list[Path] = []
    for word in given:
        path = Path(word)
        if path.is_dir():
            masks.update((f.path, f.folders) for f in walk(path)[0])
        elif path.exists():
            singles.append(path)
        else:
            raise missing(path, "--masks")
    if singles:
        common = os.path.commonpath([file.absolute().parent for file in singles])
        masks.update((file, file.absolute().parent.relative_to(common).parts) for file in singles)
    by_stem: dict[str, list[Path]] = {}
    for mask in masks:
        by_stem.setdefault(mask.stem.removesuffix("_mask"), []).append(mask)

    def fits(image: Path, mask: Path) -> bool:
        folders = tuple(name for name in masks[mask] if name.lower() not in MASK_FOLDERS)
        return not folders or image.absolute().parts[-1 - len(folders) : -1] == folders

    result = [_nearest(image, [mask for mask in by_stem.get(image.stem, []) if fits(image, mask)]) for image in images]
    if not any(result):
        if len(masks) == len(images) and not any(Path(word).is_dir() for word in given):
            return list(masks), 0
        raise InputError(f"--masks: none of the {len(masks)} masks has the name (and folder) of an image, such as {images[0]}; give as "
                         f"many mask files as images to pair them in order")  # fmt: skip
    return result, result.count(None)


def _nearest(image: Path, masks: list[Path]) -> Path | None:
    masks = [m for m in masks if m.absolute() != image.absolute()]
    if len(masks) < 2:
        return masks[0] if masks else None
    folders = image.absolute().parts[:-1]

    def alike(mask: Path) -> int:
        pairs = zip(reversed(folders), reversed(mask.absolute().parts[:-1]))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(folders))

    ranked = sorted(masks, key=alike, reverse=True)
    if alike(ranked[0]) == alike(ranked[1]):
        raise InputError(f"--masks: both {ranked[0]} and {ranked[1]} fit {image}: name a folder with one of them")
    return ranked[0]


def _mask_options(checkpoint: str) -> dict[str, Any]:
    """Masks are read as in training, where the run's settings lie beside the checkpoint."""
    from ..train.checkpoint import run_config

    try:
        data = run_config(checkpoint).get("data", {})
    except InputError:  # a checkpoint that was copied elsewhere: the defaults
        return {}
    names = {"mask_threshold": "threshold", "soft_masks": "soft", "invert_masks": "invert", "mask_values": "foreground"}
    return {ours: data[name] for name, ours in names.items() if data.get(name) is not None}


def _read(files: list[Path], masks: list[Path | None], module: ISNetModule, options: dict[str, Any]) -> list[_Item]:
    from ..data.images import read_sample
    from ..data.samples import Sample

    items, failed = [], []
    for file, mask in zip(files, masks):
        try:
            read = read_sample(Sample(str(file), file, mask), module.spec, **options)
        except InputError as error:
            failed.append(str(error))
            continue
        items.append(_Item(file, read.image, mask, None if read.mask is None else read.mask[0].float() / 255))
    if failed:
        more = f" (and {len(failed) - 1} more of {len(files)})" if len(failed) > 1 else ""
        raise InputError(f"{failed[0]}{more}; nothing was written")
    return items


def _names(files: list[Path]) -> list[str]:
    """What the files written for an image are called: its stem, with its folders in front where stems repeat."""
    names = [file.stem for file in files]
    for depth in range(1, max(len(f.absolute().parts) for f in files)):
        if len(set(names)) == len(names):
            return names
        names = [
            "__".join([*file.absolute().parts[-1 - depth : -1], file.stem]).replace(os.sep, "") if names.count(name) > 1 else name
            for file, name in zip(files, names)
        ]
    return [name if names.count(name) == 1 else file.name for file, name in zip(files, names)]  # a.png beside a.jpg


# ---- what is explained -------------------------------------------------------------------------------------------------


def _targets(words: list[str], classes: tuple[str, ...]) -> list[int] | None:
    """Classes by their index; None: the predicted one."""
    from .errors import nearest

    if words in (["predicted"], ["all"]) and words[0] not in classes:
        return None if words == ["predicted"] else list(range(len(classes)))
    unknown = [word for word in words if word not in classes]
    if unknown:
        raise InputError(f"--target: there is no class {unknown[0]!r}{nearest(unknown[0], classes)}; classes: {', '.join(classes)}; "
                         f"or predicted, or all")  # fmt: skip
    return list(dict.fromkeys(classes.index(word) for word in words))


def _rule_map(preset: str | None, spec: Any) -> Any:
    from .. import rules

    if preset is None:
        return None
    if preset not in rules.presets():
        raise InputError(f"--rules: there is no preset {preset!r}; presets: {', '.join(sorted(rules.presets()))}")
    chosen = rules.presets()[preset]
    if isinstance(chosen.first, rules.ZB):  # the true bounds of normalised images
        chosen = replace(chosen, first=rules.ZB(spec.low, spec.high))
    return chosen


def _explained(
    module: ISNetModule, items: list[_Item], names: list[str], targets: list[int] | None, rules: Any, batch_size: int
) -> Iterator[tuple[_Item, str, Tensor, Tensor, list[int]]]:
    """Item, name, logits [C], relevance float32 [K, C_in, H, W] and the K classes, batch by batch."""
    from ..isnet.explain import relevance
    from ..progress import Progress

    progress = Progress("heatmaps", max(1, len(items)))
    for start in range(0, len(items), batch_size):
        part = items[start : start + batch_size]
        x = module.spec.normalise(torch.stack([item.image for item in part]).to(module.device))
        with torch.no_grad():
            chosen = None if targets is None else torch.tensor(targets, device=x.device).expand(len(part), -1)
            if rules is None:
                out = module.explain(x, "predicted" if chosen is None else chosen)
                logits, maps, explained = out.logits, out.heatmaps, out.explained
            else:
                logits = module(x)
                explained = logits.argmax(1, keepdim=True) if chosen is None else chosen
                maps = relevance(module.net.model, x, explained, rules)
        rows = zip(part, names[start:], logits.float().cpu(), maps.float().cpu(), explained.tolist())
        yield from rows
        progress.update(start + len(part))


def _title(name: str, predicted: bool) -> str:
    return f"for {name} (predicted)" if predicted else f"for {name}"


def _draw(heatmap_grid: Any, args: argparse.Namespace, figure: str, rows: list[Any], module: ISNetModule) -> None:
    def image(row: Any) -> Tensor:
        return row.image.float() / 255

    rules = f", rules {args.rules}" if args.rules else ""
    heatmap_grid(
        args.out / figure, [replace(row, image=image(row)) for row in rows], scale=args.scale, overlay=args.overlay,
        title=f"{Path(args.checkpoint).name}: {module.variant}{rules}",
    )  # fmt: skip


def _say(
    args: argparse.Namespace, entries: list[dict[str, Any]], left_out: list[str], unmatched: int, pages: int, classes: int
) -> None:
    if left_out:
        print(f"left out: {left_out[0]}" + (f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""))
    if args.masks and unmatched:
        print(f"{unmatched} of {len(entries)} images have no mask of their name: no outline, no background share")
    if not args.masks:
        print("no masks: --masks FOLDER draws outlines and measures the background")
    if classes > MOST_MAPS:
        print(f"figures show the {MOST_MAPS} most probable of {classes} classes; the .npy files have all")
    shares = [s for entry in entries for s in entry["background_share"] if s is not None and s == s]
    if shares:
        mean = 100 * sum(shares) / len(shares)
        print(f"relevance in the background: {mean:.1f} % on average (0 is best), {100 * max(shares):.1f} % at most")
    figures = f"{pages} pages" if args.grid else f"{len(entries)} figures"
    print(f"{len(entries)} images, {figures}: {args.out} (relevance in .npy, index in {INDEX})")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number >= 1")
    return int(text)
