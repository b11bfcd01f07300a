"""`DivergenceGuard`: a training that has come apart ends at once, with advice, and without spoiling its checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    from .module import ISNetModule

__all__ = ["DivergedError", "DivergenceGuard"]


class DivergedError(InputError):
    """The loss is not finite any more, or has exploded; the message is one line and says what usually helps."""

    exit_code = 1  # of the command line: the settings could be used, but training failed


class DivergenceGuard(pl.Callback):
    """Stops a training whose loss is not finite or has exploded, with a `DivergedError`.

    The loss is watched on its device at every step; the host looks every ``every`` batches, at the end of an epoch and before a
    checkpoint is written, which then is not: a checkpoint on the disk always has finite weights. All processes stop together.

    Exploded means that the mean over about ``window`` steps exceeds ``factor`` times what it was over the first ``window`` steps, or
    than chance's ``log(classes)`` if that was more; the count starts anew when the loss becomes another one (C1 and C2 tuned,
    another P). The advice (a larger d, a lower learning rate, clipping at norm 1) is that of Bassi et al., Nature Communications
    15:291 (2024) and their code.

    Args:
        every: batches between two looks; each waits for the device once.
        window: steps of the running mean.
        factor: > 1; None: only losses that are not finite end the training.

    Raises:
        InputError: an argument is out of range.

    Example:
        >>> pl.Trainer(callbacks=[DivergenceGuard()], logger=False, accelerator="cpu")  # doctest: +ELLIPSIS
        <lightning.pytorch.trainer.trainer.Trainer object at ...>
    """

    def __init__(self, every: int = 25, window: int = 20, factor: float | None = 20.0) -> None:
        for name, value in (("every", every), ("window", window)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if factor is not None and not factor > 1:
            raise InputError(f"factor must be > 1, or None to look for non-finite losses only, got {factor}")
        self.every, self.window, self.factor = every, window, factor
        self._phase: list[Any] = []
        self._seen = 0  # steps of this phase
        self._values: Tensor | None = None  # running mean; its reference, inf while not known yet
        self._bad_step: Tensor | None = None  # -1: none

    # ---- watching ----------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: pl.Trainer, module: ISNetModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs if isinstance(outputs, Tensor) else outputs.get("total", outputs["loss"])  # "loss" is divided by accumulation
        self._watch(loss.detach().float(), module, trainer.fit_loop.epoch_loop.total_batch_idx)
        if (batch_idx + 1) % self.every == 0:
            self._look(trainer, module)

    def _watch(self, loss: Tensor, module: ISNetModule, step: int) -> None:
        phase = [bool(getattr(module, "tuning", False)), float(module.loss.P_now)]
        if phase != self._phase:
            self._phase, self._seen, self._values = phase, 0, None
        if self._bad_step is None or self._bad_step.device != loss.device:
            self._bad_step = torch.full((), -1 if self._bad_step is None else int(self._bad_step), device=loss.device)
        if self._values is None:
            self._values = loss.new_tensor([0.0, math.inf])
        elif self._values.device != loss.device:
            self._values = self._values.to(loss.device)
        self._seen += 1
        running, reference = self._values.unbind()
        running = running + (loss - running) / min(self._seen, self.window)
        if self._seen == self.window:
            reference = running.clamp(min=math.log(max(2, len(module.spec.classes))))
        bad = ~loss.isfinite()
        if self.factor is not None:
            bad = bad | (running > self.factor * reference)
        first = bad & (self._bad_step < 0)
        self._bad_step = torch.where(first, step, self._bad_step)
        # what the values were when it went wrong is kept for the message
        noticed = (self._bad_step >= 0) & ~first
        self._values = torch.where(noticed, self._values, torch.stack([running, reference]))

    # ---- looking -----------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: pl.Trainer, module: ISNetModule) -> None:
        self._look(trainer, module)

    def on_validation_start(self, trainer: pl.Trainer, module: ISNetModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._look(trainer, module)  # or an epoch's validation would be that of a net that is lost

    def on_save_checkpoint(self, trainer: pl.Trainer, module: ISNetModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            self._look(trainer, module, weights=True)

    def _look(self, trainer: pl.Trainer, module: ISNetModule, weights: bool = False) -> None:
        diverged = self._bad_step is not None and int(self._bad_step) >= 0
        if weights and not diverged:  # a finite loss may have had a gradient that was not
            diverged = not _finite_weights(module)
        if trainer.strategy.reduce_boolean_decision(diverged, all=False):
            raise DivergedError(self._message(trainer, module, diverged))

    # ---- saying ------------------------------------------------------------------------------------------------------

    def _message(self, trainer: pl.Trainer, module: ISNetModule, here: bool) -> str:
        step = int(self._bad_step) if self._bad_step is not None else -1
        where = f"in step {step + 1} (epoch {trainer.current_epoch})" if step >= 0 else f"by step {trainer.global_step}"
        running, reference = self._values.tolist() if self._values is not None else (math.nan, math.nan)
        if step >= 0 and math.isfinite(running):
            what = f"training has diverged: the loss rose to {running:.4g} {where}, from {reference:.4g} at the start"
        elif step >= 0:
            what = f"training has diverged: the loss was not finite {where}"
        elif here:
            what = f"training has diverged: weights were not finite {where}"
        else:
            what = f"training has diverged in another process {where}"
        return f"{what}. {self._advice(trainer, module)} {last_checkpoint(trainer)}"

    def _advice(self, trainer: pl.Trainer, module: ISNetModule) -> str:
        h, clip, lines = module.hparams, trainer.gradient_clip_val, []
        if getattr(module, "variant", "") != "standard" and not module.tuning and h["d"] < 0.996:
            lines.append(f"raise d to 0.996 (it is {h['d']:g})")
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        lines.append(f"lower lr to {h['lr'] / 10:g} (it is {h['lr']:g})" if not rates or max(rates) <= h["lr"] else
                     f"lower the learning rate (it is {max(rates):g})")  # fmt: skip
        if not clip or clip > 1:
            lines.append(f"clip gradients at norm 1 (gradient_clip_val is {clip or 'off'})")
        if str(trainer.precision) == "16-mixed":
            lines.append("use precision bf16-mixed, whose range is that of float32")
        return f"What usually helps, one at a time: {'; '.join(lines)}."


def last_checkpoint(trainer: pl.Trainer) -> str:
    """A sentence that names the newest checkpoint on the disk."""
    paths = []
    for callback in trainer.checkpoint_callbacks:
        for name in ("_last_checkpoint_saved", "last_model_path", "best_model_path"):
            path = getattr(callback, name, "") or ""
            if path and Path(path).is_file():
                paths.append(Path(path))
    if not paths:
        return "No checkpoint was written before."
    return f"The last good checkpoint is {max(paths, key=lambda path: path.stat().st_mtime)}."


def _finite_weights(module: torch.nn.Module) -> bool:
    values = [v.detach() for v in (*module.parameters(), *module.buffers()) if v.is_floating_point()]
    return not values or bool(torch.stack([v.isfinite().all() for v in values]).all())
