"""``python -m fisnet_cuda.demo.images FOLDER``: the demo's digits as files, to try the command line on.

Writes ``FOLDER/digits.csv`` (columns ``image,mask,label,split,group``) with its PNG files. The training and validation images are
biased: a square in the background betrays the class. Each test digit is there three times, in the groups ``biased``, ``unbiased``
(no square) and ``confounded`` (the square lies).
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import InputError
from ..files import atomic, make_folder, write_text
from ..progress import Progress
from .digits import CLASSES, MARKS, Batch, Canvas, Marks, Originals, load_originals, render

COLUMNS = ("image", "mask", "label", "split", "group")
VAL_SHARE = 1 / 6  # of the digits that are not for testing


def write_images(folder: str | Path, drawings: int = 3, seed: int = 0, size: int = 32) -> Path:
    """Write the data set.

    No digit (scan) is in two splits, whatever the drawing.

    Args:
        folder: where to; made if it is not there.
        drawings: how often each training digit is drawn, turned, scaled and shifted anew.
        seed: draws splits, digits and squares.
        size: height and width in pixels, 32 or more.

    Returns:
        The path of ``digits.csv``, written last: where it is, the data are whole.

    Raises:
        InputError: ``drawings`` or ``size`` is too small, or the folder cannot be written to.
    """
    if drawings < 1:
        raise InputError(f"drawings must be 1 or more, got {drawings}")
    if size < 32:
        raise InputError(f"size must be 32 pixels or more, got {size}")
    folder = make_folder(folder)
    learn, test = load_originals(seed)
    train, val = _split(learn, seed)
    canvas = _enlarged(size)
    parts: list[tuple[str, Marks, Originals, int]] = [("train", "biased", train, drawings), ("val", "biased", val, 1)]
    parts += [("test", marks, test, 1) for marks in MARKS]
    progress = Progress("Writing digits", sum(len(o) * times for *_, o, times in parts), sys.stderr)
    rows: list[tuple[object, ...]] = []
    for split, marks, originals, times in parts:
        picks = torch.arange(len(originals)).repeat(times)
        # one state for all test groups: they differ in their squares only
        generator = torch.Generator().manual_seed(seed + 1 + ("train", "val", "test").index(split))
        batch = render(originals, picks, marks, generator, canvas)
        for i in range(len(batch)):
            rows.append(_write(folder, split, marks, int(originals.index[picks[i]]), i // len(originals), batch, i))
            progress.update(len(rows))
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    return write_text(folder / "digits.csv", table.getvalue())


def _enlarged(size: int) -> Canvas:
    plain = Canvas()
    k = size / plain.height
    return Canvas(
        size, size, round(plain.strip * k), round(plain.margin * k), round(plain.side * k),
        (plain.digit[0] * k, plain.digit[1] * k), plain.turn,
    )  # fmt: skip


def _split(originals: Originals, seed: int) -> tuple[Originals, Originals]:
    """Training and validation scans, class by class."""
    generator = torch.Generator().manual_seed(seed)
    val = torch.zeros(len(originals), dtype=torch.bool)
    for c in range(CLASSES):
        members = torch.nonzero(originals.labels == c).flatten()
        val[members[torch.randperm(len(members), generator=generator)[: round(VAL_SHARE * len(members))]]] = True
    return tuple(Originals(originals.pixels[w], originals.labels[w], originals.index[w]) for w in (~val, val))  # type: ignore[return-value]


def _write(folder: Path, split: str, marks: Marks, scan: int, drawing: int, batch: Batch, i: int) -> tuple[object, ...]:
    from PIL import Image  # comes with matplotlib, which the demo needs

    label = int(batch.labels[i])
    name = Path(split if split != "test" else f"test_{marks}") / str(label) / f"{scan:04d}_{drawing}.png"
    for kind, pixels in (("images", batch.images), ("masks", batch.masks)):
        with atomic(folder / kind / name) as temporary:
            Image.fromarray((pixels[i, 0] * 255).round().to(torch.uint8).numpy()).save(temporary)
    return (Path("images") / name).as_posix(), (Path("masks") / name).as_posix(), label, split, marks


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the data set; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fisnet_cuda.demo.images", description=__doc__.partition("\n\n")[2])
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--drawings", type=int, default=3, help="drawings of each training digit [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="draws splits, digits and squares [%(default)s]")
    parser.add_argument("--size", type=int, default=32, help="height and width in pixels [%(default)s]")
    args = parser.parse_args(argv)
    try:
        table = write_images(args.folder, args.drawings, args.seed, args.size)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"error: {error.name} is missing: pip install 'fisnet_cuda[demo]'", file=sys.stderr)
        return 2
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
