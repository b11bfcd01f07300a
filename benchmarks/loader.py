"""Can the data keep up with the training step?

A batch from decoded images, as training takes it (indexing, float, augmentation of image and mask, normalisation), next to a
plain training step and one with heatmaps, in turn, in one process. Before anything is timed, a batch is compared with the images
that it was made of, and augmented masks with the images that they were made equal to.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common, figures
from benchmarks.cases import PLAIN, Setup, TrainingStep
from benchmarks.common import Bar, Report, Spread, cell
from fisnet_cuda.data.dataset import MaskedImages, as_it_is
from fisnet_cuda.data.sampler import EpochBatches, EpochLoader
from fisnet_cuda.data.spec import InputSpec
from fisnet_cuda.data.store import Store
from fisnet_cuda.data.transforms import PRESETS, Augmentation, prepare

TARGET = 20.0  # percent of a plain step: at least five times as fast
PROTOCOL = Setup("resnet18", batch=16, size=224)
JUDGED = ("none", "light")  # "strong" blurs, and is for those who have the time
TEXTS = {
    "plain": "plain training step", "selective": "training step, Selective",
    "none": "batch, no augmentation", "light": "batch, augmentation light", "strong": "batch, augmentation strong",
}  # fmt: skip
COLOURS = {"plain": figures.GREY, "selective": figures.ORANGE, "none": figures.SKY, "light": figures.BLUE, "strong": figures.PURPLE}

COLUMNS = {
    "net": cell("model"),
    "what": lambda row: TEXTS[row["case"]],
    "ms": cell("ms", 1),
    "images a second": cell("images_per_second", 0),
    "% of a plain step": cell("percent_of_plain"),
}


class Batches:
    """One prepared batch a call, on and on through shuffled epochs.

    Args:
        setup: batch, size and device.
        augmentation: a preset.
        images: how many are cached.
    """

    def __init__(self, setup: Setup, augmentation: str, images: int) -> None:
        draw = torch.Generator().manual_seed(0)
        size = (setup.size, setup.size)
        pixels = torch.randint(256, (images, 3, *size), generator=draw, dtype=torch.uint8)
        masks = torch.zeros(images, 1, *size, dtype=torch.uint8)
        masks[..., setup.size // 4 : -setup.size // 4, setup.size // 4 : -setup.size // 4] = 255
        labels = torch.randint(setup.classes, (images,), generator=draw)
        self.store = Store(pixels, masks, torch.ones(images, dtype=torch.bool), labels)
        batches = EpochBatches(images, setup.batch, shuffle=True, drop_last=True)
        self.loader = EpochLoader(MaskedImages(self.store), batches, as_it_is)
        classes = tuple(map(str, range(setup.classes)))
        self.spec = InputSpec(size, 3, classes, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        self.augmentation, self.device = Augmentation(augmentation), setup.device
        self.batches, self.count = self._endless(), 0

    def _endless(self) -> Iterator[dict[str, Any]]:
        for epoch in range(sys.maxsize):
            self.loader.set_epoch(epoch)
            yield from self.loader

    def __call__(self) -> dict[str, Any]:
        batch = {key: value.to(self.device, non_blocking=True) for key, value in next(self.batches).items()}
        self.count += 1
        return prepare(batch, self.spec, self.augmentation, seed=self.count)


def wrong(batches: Batches) -> str:
    """What is wrong with a batch; nothing: ''."""
    batch = batches()
    index = batch["index"].cpu()
    images, masks = (batches.spec.denormalise(batch["image"]).cpu(), batch["mask"].cpu())
    if not torch.equal(batch["label"].cpu(), batches.store.labels[index]):
        return "labels of other images"
    if not len(batches.augmentation):
        expected = batches.store.images[index].float() / 255
        off = float((images - expected).abs().max())
        return f"images are off by {off:.1e}" if off > 1e-5 else ""
    if torch.equal(batches()["mask"].cpu(), masks):  # before augmentation all masks are the same
        return "two batches in a row have the same masks"
    # an image that is its own mask: what happens to one happens to the other
    mask = torch.nn.functional.interpolate(torch.rand(4, 1, 8, 8), 64, mode="bilinear")
    geometry = Augmentation({key: value for key, value in batches.augmentation.options.items() if key in _GEOMETRY}, soft_masks=True)
    image, mask = geometry(mask.expand(-1, 3, -1, -1), mask, seed=1)
    off = float((image - mask).abs().max())
    return f"image and mask are moved apart: off by {off:.1e}" if off > 1e-5 else ""


_GEOMETRY = ("flip", "vertical_flip", "rotate", "translate", "scale")


def run(options: argparse.Namespace) -> Report:
    """Check, time, and compare with the target."""
    report = Report(
        "loader", "Time of a batch from the cache, next to a training step", common.settings_of(options),
        common.environment(options.device), COLUMNS,
    )  # fmt: skip
    setup = common.setup_of(options, model=options.model)
    steps: dict[str, Callable[[], object]] = {case: TrainingStep(case, setup) for case in (PLAIN, "selective")}
    for preset in PRESETS:
        batches = Batches(setup, preset, options.images)
        reason = wrong(batches)
        if reason:
            report.drop(TEXTS[preset], reason)
        else:
            steps[preset] = batches
    times = common.interleave(steps, options.rounds, options.warmup, options.device, f"loader, {setup.model}")
    for case in steps:
        spread = times.spread(case)
        rate = Spread.of([1e3 * setup.batch / ms for ms in times.ms[case]])
        share = _percent(times.ratio(case, PLAIN))
        report.add(**setup.as_row(), case=case, ms=spread, images_per_second=rate, percent_of_plain=share, all_ms=times.ms[case])
    judged = setup == PROTOCOL and torch.get_num_threads() == 2
    for preset in JUDGED:
        share = _percent(times.ratio(preset, PLAIN)) if preset in steps else None
        report.bars.append(Bar(f"{TEXTS[preset]}, of a plain step of {setup.model}", share, TARGET, unit=" %", judged=judged))
    return report


def _percent(ratio: Spread) -> Spread:
    return Spread(*(100 * value for value in ratio))


def draw(report: Report, path: Path) -> None:
    """Shares of the plain step."""
    items = [
        figures.Item(
            TEXTS[row["case"]],
            Spread(**row["percent_of_plain"]),
            COLOURS[row["case"]],
            target=TARGET if row["case"] in JUDGED else None,
            text=f"{row['percent_of_plain']['p50']:.1f} %, {_ms(row['ms']['p50'])}",
        )
        for row in report.rows
    ]
    panel = figures.Panel(figures.model_title(report.rows[0]), items)
    figures.bars(
        path, "Can the data keep up with the training step?", figures.machine(report.environment), [panel],
        "time, % of a plain training step (shorter is better)",
    )  # fmt: skip


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 10 else f"{value:.1f} ms"


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    p = common.parser(__doc__)
    p.add_argument("--model", default="resnet18")
    p.add_argument("--classes", type=int, default=10)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--size", type=int, default=224, help="height and width of the images")
    p.add_argument("--images", type=int, default=512, help="how many are cached")
    p.add_argument("--rounds", type=int, default=20, help="how often each is timed")
    p.add_argument("--warmup", type=int, default=3, help="rounds before that")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = arguments().parse_args(argv)
    if options.quick:
        options.model, options.batch, options.size, options.images = "small", 2, 32, 8
        options.rounds, options.warmup = 3, 1
    common.prepare(options)
    return common.finish(run(options), options, draw)


if __name__ == "__main__":
    sys.exit(main())
