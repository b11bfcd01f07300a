"""`EMA`: validate and keep an exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from ..errors import InputError

__all__ = ["EMA"]


class EMA(pl.Callback):
    """Exponential moving average of the weights: used in validation, and what checkpoints hold as their weights.

    After optimizer step t = 1, 2, ...::

        average = d_t average + (1 - d_t) weights,    d_t = min(decay, t / (t + 9))

    The ramp lets short trainings forget their first weights, too (as in TensorFlow's ``ExponentialMovingAverage`` with
    ``num_updates``). Averaged are parameters and BatchNorm's running statistics; all else (C1 and C2, counters) is the current
    model's.

    In a checkpoint ``state_dict`` is the average, so that whoever loads it gets the averaged net, and ``current_model_state`` the
    weights to go on from, as `lightning.pytorch.callbacks.WeightAveraging` has it. That one is not used here: it pairs tensors of
    two copies of the module by position, buffers included, and tuning replaces the buffers of C1 and C2 in one of the two.

    Args:
        decay: 0 <= decay < 1; the average looks back about 1 / (1 - decay) steps.

    Raises:
        InputError: ``decay`` out of range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"ema must be a decay in [0, 1), such as 0.999, got {decay}")
        self.decay = decay
        self.updates = 0
        self._average: dict[str, Tensor] = {}
        self._swapped = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with the model's own weights, unless a checkpoint brought an average."""
        for key, weight in _averaged(pl_module).items():
            start = self._average.get(key, weight)
            self._average[key] = start.detach().to(weight.device, copy=True)
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Take the weights in, if the optimizer has made a step (gradients may be accumulated over several batches)."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self.updates += 1
        share = 1 - min(self.decay, self.updates / (self.updates + 9))
        weights = _averaged(pl_module)
        torch._foreach_lerp_([self._average[key] for key in weights], [w.detach() for w in weights.values()], share)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average into the model."""
        self._swap(pl_module, True)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the weights back into the model."""
        self._swap(pl_module, False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the model with the average."""
        self._swap(pl_module, True)
        self._average, self._swapped = {}, False

    def _swap(self, pl_module: pl.LightningModule, averaged: bool) -> None:
        if not self._average or self._swapped == averaged:
            return
        self._swapped = averaged
        with torch.no_grad():
            for key, weight in _averaged(pl_module).items():
                other = self._average[key]
                kept = weight.clone()
                weight.copy_(other)
                other.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """The number of updates; the average itself is the checkpoint's ``state_dict``."""
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.updates = state_dict["updates"]

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Exchange the weights of the checkpoint for the average, and keep them beside it."""
        if not self._average or self._swapped:
            return
        key_of = {id(weight): key for key, weight in _averaged(pl_module).items()}
        tensors = pl_module.state_dict(keep_vars=True)
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            key: self._average[key_of[id(tensors[key])]] if key in tensors and id(tensors[key]) in key_of else value
            for key, value in checkpoint["state_dict"].items()
        }

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the average, and give the model (which has loaded it as its weights) those to go on from.

        Raises:
            InputError: the checkpoint is of a run without EMA.
        """
        if trainer.state.fn != "fit":
            return
        if "current_model_state" not in checkpoint:
            raise InputError("this run was trained without EMA up to here: resume it without --ema, or start a new run")
        self._average = {key: checkpoint["state_dict"][key].clone() for key in _averaged(pl_module)}
        pl_module.load_state_dict(checkpoint["current_model_state"], strict=pl_module.strict_loading)


def _averaged(module: nn.Module) -> dict[str, Tensor]:
    """State-dict key -> tensor of all that is averaged, each tensor once (weights may be shared)."""
    found: dict[int, tuple[str, Tensor]] = {}
    for key, value in module.state_dict(keep_vars=True).items():
        statistic = key.rpartition(".")[2] in ("running_mean", "running_var")
        if isinstance(value, Tensor) and value.is_floating_point() and (isinstance(value, nn.Parameter) or statistic):
            found.setdefault(id(value), (key, value))
    return dict(found.values())
