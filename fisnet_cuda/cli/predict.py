"""Class probabilities of images, as CSV: masks and labels are not needed."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..files import atomic, check_folder
from ..progress import Progress
from .console import quiet, say, settings_kept
from .runs import add_run_arguments, device_of, open_run

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fisnet-cuda predict``."""
    add_run_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="[predictions.csv in the run folder]")


def run(args: argparse.Namespace) -> int:
    """Writes one line an image: name, predicted class, its probability, every class's, and the label where it is known."""
    folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
    out = args.out or folder / "predictions.csv"
    if out.is_dir():
        raise InputError(f"--out {out} is a folder: name a file")
    check_folder(out.parent)  # now, not after the work
    with quiet(), settings_kept(), torch.no_grad():
        module, data = open_run(args)
        device = device_of(args)
        module.to(device).eval()
        data.prepare_data()
        data.setup("predict")
        loader = data.predict_dataloader()
        progress, rows = Progress("predict", max(1, len(loader))), []
        for done, batch in enumerate(loader, 1):
            batch = data.prepare({key: value.to(device) for key, value in batch.items()})
            probabilities = module.net(batch["image"]).float().softmax(1).cpu()
            rows += [
                _row(data.listing.samples[index], p.tolist(), module.spec.classes)
                for index, p in zip(batch["index"].tolist(), probabilities)
            ]
            progress.update(done)
        with atomic(out) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["name", "predicted", "probability", *(f"p({name})" for name in module.spec.classes), "label"])
            writer.writerows(rows)
    known = [row for row in rows if row[-1]]
    right = sum(row[1] == row[-1] for row in known)
    say(f"{len(rows)} images: {out}" + (f"; {right} of {len(known)} that have a label are right" if known else ""))
    return 0


def _row(sample: Any, probabilities: list[float], classes: tuple[str, ...]) -> list[str]:
    top = max(range(len(classes)), key=probabilities.__getitem__)
    label = "" if sample.label is None else classes[sample.label]
    return [sample.name, classes[top], f"{probabilities[top]:.6f}", *(f"{p:.6f}" for p in probabilities), label]
