"""`TuneC1C2`: the natural range of the heatmaps, measured in the course of training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from ..errors import InputError, one_line
from ..isnet.tuning import tune_c1_c2

if TYPE_CHECKING:
    from .module import ISNetModule

__all__ = ["TuneC1C2"]

TUNE = 3  # a purpose of randomness beside those of `ISNetModule`


class TuneC1C2(pl.Callback):
    """Sets C1 and C2 by `fisnet_cuda.tune_c1_c2` once ``tune_epochs`` epochs have trained the classifier alone.

    The maps are those of the training split without augmentation, or of ``tune_batches`` batches spread evenly over it. Every process
    computes them and takes the first one's numbers. They are kept in the module and its checkpoints; a run that is resumed after it
    does not tune again. `ISNetModule` brings this callback along by itself where ``tune_epochs`` is not 0.

    Source: Bassi et al., Nature Communications 15:291 (2024): C1 and C2 from a classifier trained a few epochs without the heatmap
    loss. Deviates: training goes on from that classifier instead of starting anew.
    """

    def setup(self, trainer: pl.Trainer, module: ISNetModule, stage: str) -> None:
        data = getattr(trainer, "datamodule", None)
        if stage == "fit" and module.tuning and not (hasattr(data, "loader") and hasattr(data, "prepare")):
            raise InputError("tune_epochs needs training images without augmentation, by loader() and prepare() of a MaskedImageData: "
                             "train with one, or set tune_epochs=0 and give c1 and c2")  # fmt: skip

    def on_train_batch_start(self, trainer: pl.Trainer, module: ISNetModule, batch: Any, batch_idx: int) -> None:
        # not on_train_epoch_start, which is left out when a run is resumed in mid-epoch
        if module.tuning and trainer.current_epoch >= module.hparams["tune_epochs"]:
            self.tune(trainer, module)

    def tune(self, trainer: pl.Trainer, module: ISNetModule) -> None:
        """Measures C1 and C2 now, and gives them to the module."""
        data = trainer.datamodule
        loader = data.loader("train")
        used, batches = chosen(len(loader), module.hparams["tune_batches"])
        module.reseed(TUNE, 0, 0)
        try:
            with trainer.precision_plugin.forward_context():  # the dtype of the training steps
                c1, c2 = tune_c1_c2(module.net, images(module, data, loader, batches))
        except ValueError as error:
            raise InputError(f"C1 and C2 cannot be tuned: {one_line(error)}") from error
        for given in (c1, c2):
            for layer, values in given.items():
                given[layer] = _of_first(trainer, values, module.device)
        module.set_ranges(c1, c2)
        where = f"{used} of {len(loader)} batches" if used < len(loader) else f"all {used} batches"
        for layer in c1:
            values = ", ".join(f"C1 = {low:.4g}, C2 = {high:.4g}" for low, high in zip(c1[layer].tolist(), c2[layer].tolist()))
            epochs = f"{trainer.current_epoch} epoch{'s' * (trainer.current_epoch > 1)}"
            trainer.print(f"tuned after {epochs} on {where} of the training split: {layer}: {values}")


def chosen(batches: int, wanted: int | None) -> tuple[int, set[int]]:
    """How many and which batches are used: spread evenly, as the split may be sorted by class.

    Example:
        >>> chosen(10, 3)
        (3, {0, 3, 6})
    """
    used = batches if wanted is None else min(wanted, batches)
    return used, {i * batches // used for i in range(used)} if used else set()


def images(module: ISNetModule, data: Any, loader: Any, batches: set[int]) -> Iterator[Tensor]:
    """Prepared images of the chosen batches, on the module's device; as a training step would see them, but for augmentation."""
    for i, batch in enumerate(loader):
        if i in batches:
            yield module._input(data.prepare(move_data_to_device(batch, module.device))["image"])


def _of_first(trainer: pl.Trainer, values: Tensor, device: torch.device) -> Tensor:
    """The first process's numbers, exactly: a float64 travels as its bits, which every device and backend can carry."""
    if trainer.world_size == 1:
        return values
    bits = values.view(torch.int64).to(device)
    return trainer.strategy.broadcast(bits, src=0).cpu().view(torch.float64)
