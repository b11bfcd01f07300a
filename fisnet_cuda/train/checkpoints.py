"""`Checkpoints` (``last.ckpt``, ``best.ckpt``) and `EarlyStop`."""

from __future__ import annotations

import difflib
import math
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping

from ..errors import FisnetWarning, InputError
from ..files import atomic
from .resume import tuning, weighed_by

__all__ = ["Checkpoints", "EarlyStop", "direction"]

_MORE_IS_BETTER = (
    "accuracy", "auroc", "auc", "f1", "precision", "recall", "specificity", "sensitivity", "foreground_share", "swap_same",
    "swap_other",
)  # fmt: skip
_LOOK_EVERY = 16  # steps between two looks at the clock that all processes agree on


def direction(monitor: str, mode: str = "auto") -> str:
    """``mode``, or for "auto": "max" for metrics that are better when larger, "min" for losses and all else.

    Raises:
        InputError: ``mode`` is none of "auto", "min", "max".

    Example:
        >>> direction("val/loss"), direction("val/balanced_accuracy")
        ('min', 'max')
    """
    if mode not in ("auto", "min", "max"):
        raise InputError(f"mode must be auto, min or max, got {mode!r}")
    if mode != "auto":
        return mode
    return "max" if any(word in monitor.lower() for word in _MORE_IS_BETTER) else "min"


def monitored(trainer: pl.Trainer, monitor: str) -> float:
    """The metric's value now.

    Raises:
        InputError: it is not logged; names what is, and the nearest.
    """
    metrics = trainer.callback_metrics
    if monitor not in metrics:
        names = sorted(metrics)
        near = difflib.get_close_matches(monitor, names, 1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise InputError(f"monitor {monitor!r} is not logged{hint}; there are: {', '.join(names) or 'none'}")
    return float(metrics[monitor])


class Checkpoints(Checkpoint):
    """Keeps ``last.ckpt``, to resume from, and ``best.ckpt``, of the epoch with the best ``monitor``; each is whole or the one before.

    ``last.ckpt`` is written at the end of each epoch and, as asked for, within epochs. There only after a step of the optimizer
    (gradients that wait for more batches are in no checkpoint), and neither after the last batch nor where validation is due:
    Lightning takes a checkpoint from there for one of after the validation. Both hold all that a resume needs.

    Epochs before C1 and C2 are tuned (where ``module.tuning``) are never the best, nor those with a monitor that is not
    finite. A loss is compared with those of the same P: where P has a schedule, the best is of the epochs with the last P so far.
    Without validation there is no best.

    Args:
        run: the folder.
        monitor: name of a logged metric.
        mode: "min" or "max"; "auto": by `direction`.
        every_steps: also after this many steps of the optimizer.
        every_minutes: also after this many minutes since the last one.
    """

    def __init__(
        self,
        run: str | Path,
        monitor: str = "val/loss",
        *,
        mode: str = "auto",
        every_steps: int | None = None,
        every_minutes: float | None = None,
    ) -> None:
        for name, value in (("checkpoint_every_steps", every_steps), ("checkpoint_every_minutes", every_minutes)):
            if value is not None and value <= 0:
                raise InputError(f"{name} must be more than 0, got {value}")
        self.run, self.monitor, self.mode = Path(run), monitor, direction(monitor, mode)
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self.best: dict[str, Any] | None = None  # epoch, step and value
        self._P: float | None = None  # that the best was weighed by
        self._value: float | None = None  # of this epoch's validation
        self._due = False
        self._seen = 0

    @property
    def best_model_path(self) -> str:
        """What ``ckpt_path="best"`` means to Lightning; empty if there is none."""
        return str(self.run / "best.ckpt") if self.best else ""

    @property
    def last_model_path(self) -> str:
        """Where last.ckpt is; empty if there is none."""
        last = self.run / "last.ckpt"
        return str(last) if last.exists() else ""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that there is the best.ckpt of which the checkpoint knows that is resumed from; it may be in another run's folder."""
        if self.best is None:
            return
        there = None
        if trainer.is_global_zero:
            mine, other = self.run / "best.ckpt", Path(trainer.ckpt_path or self.run).parent / "best.ckpt"
            there = next((path for path in (mine, other) if _epoch(path) == self.best["epoch"]), None)
            if there == other != mine:
                with atomic(mine) as copy:
                    shutil.copyfile(other, copy)
        if trainer.strategy.broadcast(there is None):
            warnings.warn(
                f"{self.run / 'best.ckpt'} is not that of epoch {self.best['epoch']}, the best so far: the best of the epochs from "
                "here on will be kept",
                FisnetWarning,
                stacklevel=2,
            )
            self.best = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting steps and minutes; remove what a run that was killed while it saved has left."""
        self._time, self._step = time.monotonic(), trainer.global_step
        if trainer.is_global_zero:
            for left in (*self.run.glob(".last-*.ckpt"), *self.run.glob(".best-*.ckpt")):
                left.unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save within the epoch, if it is time to."""
        if trainer.global_step == self._step:  # gradients are still accumulated
            return
        self._step = trainer.global_step
        if self.every_steps and trainer.global_step % self.every_steps == 0:
            self._due = True
        if self.every_minutes:
            self._due = self._due or self._time_is_up(trainer)
        done = batch_idx + 1
        if not self._due or done >= trainer.num_training_batches or _validation_due(trainer, done):
            return
        self._save(trainer, best=False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the monitor: an epoch without validation has none, though Lightning still shows the last one.

        Raises:
            InputError: the monitor is not logged.
        """
        if not trainer.sanity_checking and (self.monitor in trainer.callback_metrics or not self._of_training):
            self._value = monitored(trainer, self.monitor)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, and say whether the epoch is the best so far.

        Raises:
            InputError: the monitor is not logged.
        """
        value = monitored(trainer, self.monitor) if self._of_training else self._value
        better = value is not None and not tuning(pl_module) and math.isfinite(value)
        P = weighed_by(pl_module, self.monitor)
        if better and self.best is not None and P == self._P:
            better = value < self.best["value"] if self.mode == "min" else value > self.best["value"]
        better = trainer.strategy.broadcast(better)
        if better:
            self.best = {"epoch": trainer.current_epoch, "step": trainer.global_step, "value": value}
            self._P = P
        self._value = None
        self._save(trainer, best=better)

    @property
    def _of_training(self) -> bool:
        return self.monitor.startswith("train")

    def _time_is_up(self, trainer: pl.Trainer) -> bool:
        up = time.monotonic() - self._time >= 60 * self.every_minutes
        if trainer.world_size == 1:
            return up
        self._seen += 1  # a look at the others' clocks waits for them, so not at every step
        return self._seen % _LOOK_EVERY == 0 and trainer.strategy.reduce_boolean_decision(up, all=False)

    def _save(self, trainer: pl.Trainer, best: bool) -> None:
        if trainer.is_global_zero:
            with atomic(self.run / "last.ckpt") as temporary:
                trainer.save_checkpoint(temporary, weights_only=False)
                if best:  # before last.ckpt, whose state says that it is there
                    with atomic(self.run / "best.ckpt") as copy:
                        shutil.copyfile(temporary, copy)
        else:
            trainer.save_checkpoint(self.run / "last.ckpt", weights_only=False)  # takes part and writes nothing
        self._time, self._due = time.monotonic(), False

    @property
    def state_key(self) -> str:
        """One place in a checkpoint, whatever the settings."""
        return "fisnet_cuda.Checkpoints"

    def state_dict(self) -> dict[str, Any]:
        """The best so far, and this epoch's value."""
        return {"best": self.best, "value": self._value, "P": self._P, "monitor": self.monitor, "mode": self.mode}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the best so far, if it is that of the same metric."""
        if (state_dict["monitor"], state_dict["mode"]) == (self.monitor, self.mode):
            self.best, self._value, self._P = state_dict["best"], state_dict["value"], state_dict["P"]


def _epoch(path: Path) -> int | None:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["epoch"]
    except Exception:  # not there, or not a checkpoint: either way it is not the one
        return None


def _validation_due(trainer: pl.Trainer, batches: int) -> bool:
    every = trainer.val_check_batch
    return trainer.enable_validation and isinstance(every, int) and batches % every == 0


class EarlyStop(EarlyStopping):
    """Lightning's `EarlyStopping` that passes over the epochs before C1 and C2 are tuned, and before P's schedule has come to its
    last value (their losses compare with no later ones). Runs that were killed after it had decided to stop stay stopped; a larger
    patience given in a resume holds.

    Args:
        monitor: name of a logged metric.
        patience: validations without improvement until the training stops.
        mode: "min" or "max"; "auto": by `direction`.
    """

    def __init__(self, monitor: str = "val/loss", patience: int = 10, *, mode: str = "auto") -> None:
        if patience < 1:
            raise InputError(f"patience must be at least 1, got {patience}")
        super().__init__(monitor, patience=patience, mode=direction(monitor, mode), strict=False, check_finite=False)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See that there will be something to look at.

        Raises:
            InputError: the monitor is of the validation, and the data have none.
        """
        super().setup(trainer, pl_module, stage)
        splits = getattr(getattr(trainer, "datamodule", None), "splits", None)
        if stage == "fit" and self.monitor.startswith("val") and splits is not None and "val" not in splits:
            raise InputError(f"patience goes by {self.monitor}, and there is no validation split: leave patience out")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that had stopped stays so."""
        trainer.should_stop = trainer.should_stop or self.wait_count >= self.patience

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the monitor, unless C1 and C2 are yet to be tuned."""
        if self._counts(trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the monitor, where validation does not come once an epoch."""
        if self._counts(trainer, pl_module):
            super().on_validation_end(trainer, pl_module)

    def _counts(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether this epoch's value compares with those before and says something of those to come."""
        schedule = getattr(getattr(pl_module, "loss", None), "P", None)
        return not (tuning(pl_module) or (isinstance(schedule, Mapping) and max(schedule) > trainer.current_epoch))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on waiting, with the patience of now."""
        patience = self.patience
        super().load_state_dict(state_dict)
        self.patience = patience
        self.best_score = torch.as_tensor(self.best_score)
