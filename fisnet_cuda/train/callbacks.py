"""`callbacks`: all that a training run has beside the module and the data."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl

from ..errors import InputError
from .averaging import EMA
from .checkpoints import Checkpoints, EarlyStop
from .divergence import DivergenceGuard
from .heatmaps import HeatmapFigures
from .resume import WholeEpochs
from .run_folder import RunFolder
from .swap import NAMES, SwapCheck

__all__ = ["callbacks"]


def callbacks(
    run: str | Path,
    *,
    monitor: str = "val/loss",
    mode: str = "auto",
    patience: int | None = None,
    ema: float | None = None,
    figures_every: int = 1,
    figures_images: int = 6,
    swap_every: int = 1,
    swap_images: int = 512,
    checkpoint_every_steps: int | None = None,
    checkpoint_every_minutes: float | None = 10.0,
    divergence_factor: float | None = 20.0,
) -> list[pl.Callback]:
    """The callbacks of a run, in the order in which they rely on each other.

    Args:
        run: the run's folder: metrics.csv, summary.json, split.csv, data_report.*, last.ckpt, best.ckpt, heatmaps/.
        monitor: the metric that chooses best.ckpt and stops early.
        mode: whether "min" or "max" of it is better; "auto": by its name.
        patience: stop when it has not improved for so many epochs; None: never.
        ema: decay of an exponential moving average of the weights, e.g. 0.999; None: no average.
        figures_every: epochs between two figures of heatmaps; 0: none.
        figures_images: rows of such a figure.
        swap_every: epochs between two background swaps, which tell from validation images and their masks whether the classifier uses
            the background though its heatmap be quiet; 0: none.
        swap_images: at most so many validation images for that.
        checkpoint_every_steps: write last.ckpt also within an epoch, after so many steps of the optimizer; None: do not.
        checkpoint_every_minutes: write last.ckpt also within an epoch, after so many minutes; None: do not.
        divergence_factor: stop when the loss exceeds so many times what it was at first; None: only when it is not finite.

    Returns:
        For ``Trainer(callbacks=...)``. A `MaskedImageData` and an `ISNetModule` are expected, and others do, with less in the folder.

    Raises:
        InputError: a setting is out of range.

    Example:
        >>> [type(callback).__name__ for callback in callbacks("runs/a", patience=5, figures_every=0)]
        ['DivergenceGuard', 'SwapCheck', 'WholeEpochs', 'EarlyStop', 'RunFolder', 'Checkpoints']
    """
    if monitor in NAMES and swap_every != 1:  # told now, not after the first epoch that has no swap
        raise InputError(f"monitor {monitor} needs a background swap in every epoch: set swap_every to 1, got {swap_every}")
    return [
        DivergenceGuard(factor=divergence_factor),
        *([HeatmapFigures(run, figures_every, figures_images)] if figures_every else []),
        *([SwapCheck(swap_every, swap_images)] if swap_every else []),
        *([EMA(ema)] if ema is not None else []),  # after those two, which use its weights
        WholeEpochs(),
        *([EarlyStop(monitor, patience, mode=mode)] if patience is not None else []),
        RunFolder(run),  # before Checkpoints, so that they hold the epoch's row
        Checkpoints(run, monitor, mode=mode, every_steps=checkpoint_every_steps, every_minutes=checkpoint_every_minutes),
    ]
