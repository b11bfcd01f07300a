"""`SwapCheck`: in the course of training, whether the classifier uses the background, though its heatmap be quiet."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ..errors import InputError
from ..evaluate.swap import BackgroundSwap, SwapPlan, choose_images, mask_kinds, plan_swap, swap_sums

__all__ = ["SwapCheck"]

SEED = 0  # of images and donors: the same in every epoch and run, so that these compare
NAMES = ("val/swap_gap", "val/swap_gap_low", "val/swap_same", "val/swap_other", "val/swap_follows")
_LEFT_OUT = "background swap left out: "
_NEEDED = ("subset", "prepare")


class SwapCheck(pl.Callback):
    """Swaps the backgrounds of validation images (`fisnet_cuda.evaluate.background_swap`) after the validation of the first and of
    every ``every``-th epoch, and says when training ends what came of it, crossed with the heatmap's background share.

    Logs ``val/swap_same`` and ``val/swap_other``, the accuracies with a background of the same and of another class, ``val/swap_gap``,
    their difference, ``val/swap_gap_low``, the lower end of its 95 % interval, and ``val/swap_follows``, the share of the answers that
    follow the foreign background.

    The images and who swaps with whom are the same all along. Measured with the weights that are validated: the averaged ones, if
    there is an `EMA` (which must come later in the list). Several processes take an equal share of the images each, and their counts
    are added up: all log the same numbers, those of one process. Random state, modes and weights stay as they are. Where there are no
    masks, no validation split or a single class, this is said once, and nothing is computed.

    Args:
        every: epochs between two checks.
        images: at most so many, drawn once.

    Raises:
        InputError: an argument is out of range.

    Example:
        >>> SwapCheck(every=2, images=256).images
        256
    """

    def __init__(self, every: int = 1, images: int = 512) -> None:
        if every < 1:
            raise InputError(f"swap_every must be at least 1, or 0 for no background swaps, got {every}")
        if images < 4:
            raise InputError(f"swap_images must be at least 4 (two images of two classes), got {images}")
        self.every, self.images = every, images
        self._plan: SwapPlan | None = None
        self._positions = torch.zeros(0, dtype=torch.int64)
        self._last: dict[str, Any] = {}  # epoch, sums, share: of the last check

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say it where there is nothing to check on."""
        if not sum(trainer.num_val_batches):
            trainer.print(f"{_LEFT_OUT}there is no validation split")

    # ---- measuring ---------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch that is not checked has none of these metrics: Lightning would go on showing the last ones."""
        if trainer.state.fn == "fit" and not self._due(trainer):
            for name in NAMES:
                trainer.callback_metrics.pop(name, None)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap, if it is this epoch's turn."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or not self._due(trainer):
            return
        if self._plan is None:
            self._plan, why = self._prepare(trainer, pl_module)
            if why:
                trainer.print(f"{_LEFT_OUT}{why}")
        if not len(self._plan.rows):
            return
        result = self._measure(trainer, pl_module)
        values = (result.gap.value, result.gap.low, result.same.value, result.other.value, result.follows.value)
        for name, value in zip(NAMES, values):
            # every process has the same number already; Lightning wants to be told to average it
            pl_module.log(name, torch.tensor(value, device=pl_module.device), on_step=False, on_epoch=True, sync_dist=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the background share of the same weights."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._last.get("epoch") == trainer.current_epoch:
            share = trainer.callback_metrics.get("val/background_share")
            self._last["share"] = math.nan if share is None else float(share)

    def _due(self, trainer: pl.Trainer) -> bool:
        epoch = trainer.current_epoch
        return epoch == 0 or (epoch + 1) % self.every == 0

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[SwapPlan, str]:
        """Who swaps with whom, and, if nobody does, why."""
        nobody = plan_swap(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
        data = getattr(trainer, "datamodule", None)
        if not all(hasattr(data, name) for name in _NEEDED):
            return nobody, "it needs subset() and prepare() of a MaskedImageData"
        subset = data.subset("val")
        has_mask = subset.store.has_mask[subset.indices]
        if not bool(has_mask.any()):
            return nobody, "no validation image has a mask"
        self._positions = choose_images(subset.labels, has_mask & (subset.labels >= 0), self.images, SEED)
        places = torch.arange(len(self._positions)).split(_size(data))
        kinds = [mask_kinds(self._fetch(trainer, pl_module, at)[1]).cpu() for at in places]
        plan = plan_swap(subset.labels[self._positions], torch.cat([torch.zeros(0, dtype=torch.int64), *kinds]), SEED)
        why = ", ".join(f"{count} validation images {reason}" for reason, count in plan.left_out.items())
        return plan, "" if len(plan.rows) else why or "no validation image has both a mask and a label"

    def _fetch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, places: Tensor) -> tuple[Tensor, Tensor]:
        data = trainer.datamodule
        batch = data.subset("val").__getitems__(self._positions[places].tolist())
        batch = data.prepare({key: value.to(pl_module.device) for key, value in batch.items()})
        return batch["image"], batch["mask"]

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> BackgroundSwap:
        device = pl_module.device
        modes = [(part, part.training) for part in pl_module.modules()]
        pl_module.eval()
        try:
            # a network that draws in eval mode leaves the generators as they were
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), trainer.precision_plugin.forward_context():
                sums = swap_sums(
                    pl_module, lambda places: self._fetch(trainer, pl_module, places), self._plan,
                    part=slice(trainer.global_rank, None, trainer.world_size), batch_size=_size(trainer.datamodule),
                )  # fmt: skip
        finally:
            for part, training in modes:
                part.training = training
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums.to(device), reduce_op="sum").cpu()
        self._last = {
            "epoch": trainer.current_epoch, "sums": sums.tolist(), "guessing": self._plan.guessing,
            "left_out": dict(self._plan.left_out), "share": math.nan,
        }  # fmt: skip
        return self._result()

    def _result(self) -> BackgroundSwap:
        return BackgroundSwap.of(self._last["sums"], self._last["guessing"], self._last["left_out"])

    # ---- the end -----------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what came of it."""
        if not self._last:
            return
        result, variant = self._result(), getattr(pl_module, "variant", "")
        trained = bool(getattr(getattr(trainer, "datamodule", None), "swap_background", 0))
        epochs = self._last["epoch"] + 1
        where = f"{result.n} validation images, after {epochs} epoch{'s' * (epochs > 1)}"
        trainer.print(f"background swap ({where}): {result.says(self._last['share'], variant, trained)}")

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """One place in a checkpoint."""
        return "fisnet_cuda.SwapCheck"

    def state_dict(self) -> dict[str, Any]:
        """What was found last: a run that is resumed behind its last epoch can say it."""
        return {"last": dict(self._last)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._last = dict(state_dict["last"])


def _size(data: Any) -> int:
    return int(getattr(data, "batch_size", 64))  # known to fit: three of them are held, one is in the network
