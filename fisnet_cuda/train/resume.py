"""`WholeEpochs`: what Lightning does not keep in a checkpoint, and a resumed run needs to be equal to one that was never stopped."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ..errors import FisnetWarning, InputError

__all__ = ["WholeEpochs", "tuning", "weighed_by"]

_KEY = "fisnet_cuda_epoch"


def tuning(pl_module: pl.LightningModule) -> bool:
    """Whether the classifier is still trained alone, before C1 and C2 are tuned: those losses compare with no later ones."""
    return getattr(pl_module, "tuning", False)


def weighed_by(pl_module: pl.LightningModule, monitor: str) -> float | None:
    """P, if ``monitor`` is a loss that P weighs the two parts of: such losses compare with those of the same P only."""
    loss = getattr(pl_module, "loss", None)
    return float(loss.P_now) if monitor in ("train/loss", "val/loss") and hasattr(loss, "P_now") else None


class WholeEpochs(pl.Callback):
    """Makes an epoch that was stopped and resumed equal to a whole one.

    * Averages of numbers over the epoch: Lightning forgets in a resume what was logged before it. Every process's sums so far
      go into checkpoints taken in mid-epoch, and are added to those of the first batch after the resume. (torchmetrics that
      are logged belong to the module, and so does keeping their states.)
    * The loader's place in the epoch: Lightning does not pass it on when a schedule has asked for the number of steps, because
      then the loader was made before the checkpoint was read (``estimated_stepping_batches``).
    * Schedules that wait for a plateau: Lightning steps them after the last hook of an epoch in which a checkpoint can be
      taken, and not at all in the epoch that was resumed in its middle. Here they are stepped before the checkpoint of the
      epoch's end, and not before C1 and C2 are tuned. They wait anew when P, and with it the loss that they watch, is another.
    """

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._plateaus: list[tuple[Any, int]] = []
        self._validated = False
        self._P: float | None = None  # of the loss that the plateaus compare with

    @property
    def state_key(self) -> str:
        """One place in a checkpoint."""
        return "fisnet_cuda.WholeEpochs"

    def state_dict(self) -> dict[str, Any]:
        """What the plateaus compare with."""
        return {"P": self._P}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing."""
        self._P = state_dict["P"]

    # ---- averages ----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add every process's sums, if the epoch is not over."""
        progress = trainer.fit_loop.epoch_progress.current
        if trainer.state.fn != "fit" or progress.started == progress.processed:
            return
        mine = _sums(trainer)
        everyone: list[Any] = [mine]
        if trainer.world_size > 1:
            everyone = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, mine)
        checkpoint[_KEY] = everyone

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take this process's sums."""
        everyone = checkpoint.get(_KEY, [])
        if everyone and len(everyone) != trainer.world_size:
            warnings.warn(
                f"the run was stopped in mid-epoch with {len(everyone)} processes and resumes with {trainer.world_size}: the train/ "
                "averages of this epoch count only the batches from here on",
                FisnetWarning,
                stacklevel=2,
            )
        elif everyone:
            self._sums = everyone[trainer.global_rank]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell the loader where to go on, and take the plateau schedules over."""
        trainer.fit_loop._load_combined_loader_states()
        self._plateaus = []
        for config in trainer.lr_scheduler_configs:
            if config.reduce_on_plateau and config.interval == "epoch":
                self._plateaus.append((config, config.frequency))
                config.frequency = sys.maxsize  # never due for Lightning

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """After the first batch of the resumed run: add what came before it."""
        if not self._sums:
            return
        results = trainer.fit_loop.epoch_loop._results
        for key in [key for key in self._sums if key in results]:
            result, before = results[key], self._sums.pop(key)
            merge = result.meta.reduce_fx if result.meta.is_max_reduction or result.meta.is_min_reduction else torch.add
            result.value = merge(before["value"].to(result.value), result.value)
            if result.meta.is_mean_reduction:
                result.cumulated_batch_size = before["count"].to(result.cumulated_batch_size) + result.cumulated_batch_size
            result._computed = None

    # ---- plateau schedules -------------------------------------------------------------------------------------------

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that the epoch has validation metrics of its own."""
        self._validated = self._validated or not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Step the plateau schedules.

        Raises:
            InputError: what they watch is not there.
        """
        self._sums = {}
        validated, self._validated = self._validated, False
        if tuning(pl_module):
            return
        for config, every in self._plateaus:
            if (trainer.current_epoch + 1) % every or (config.monitor.startswith("val") and not validated):
                continue
            value = trainer.callback_metrics.get(config.monitor)
            if value is None:
                raise InputError(f"the plateau schedule watches {config.monitor!r}, which is not logged; there are: {_names(trainer)}")
            P = weighed_by(pl_module, config.monitor)
            if self._P is not None and P != self._P:
                config.scheduler.best, config.scheduler.num_bad_epochs = config.scheduler.mode_worse, 0
            self._P = P
            pl_module.lr_scheduler_step(config.scheduler, value)


def _names(trainer: pl.Trainer) -> str:
    return ", ".join(sorted(trainer.callback_metrics)) or "none"


def _sums(trainer: pl.Trainer) -> dict[str, dict[str, Tensor]]:
    """What `log` has summed up in this epoch, by Lightning's own keys."""
    sums = {}
    for key, result in trainer.fit_loop.epoch_loop._results.items():
        if result.is_tensor and result.meta.on_epoch and not result.meta.is_custom_reduction and not result.has_reset:
            sums[key] = {"value": result.value.detach().cpu()}
            if result.meta.is_mean_reduction:
                sums[key]["count"] = result.cumulated_batch_size.cpu()
    return sums
