"""`HeatmapFigures`: how the heatmaps of the same few images change in the course of training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ..errors import FisnetWarning, InputError
from .resume import tuning

__all__ = ["HeatmapFigures", "pick"]


class HeatmapFigures(pl.Callback):
    """Draws ``heatmaps/epoch-0004.png`` after the validation of every ``every``-th epoch, and of the first one.

    The images are the same all along: of the validation split (of training, if there is none), in turns of every class, and with
    masks before those without. Each is explained for the class that is predicted, and, where that is wrong, also for the true one.
    Drawn with the weights that are validated: the averaged ones, if there is an `EMA` (which must come later in the list). The first
    process draws; the others wait for it at the epoch's next common step.

    Args:
        run: the run's folder.
        every: epochs between two figures.
        images: rows of a figure.
    """

    def __init__(self, run: str | Path, every: int = 1, images: int = 6) -> None:
        if every < 1 or images < 1:
            raise InputError(f"figures_every and figures_images must be at least 1, got {every} and {images}")
        self.run, self.every, self.images = Path(run), every, images
        self._batch: dict[str, Tensor] | None = None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw, if it is this epoch's turn."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._draw(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw, where there is no validation."""
        if not sum(trainer.num_val_batches):
            self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch
        if not trainer.is_global_zero or (epoch and (epoch + 1) % self.every):
            return
        data = trainer.datamodule
        if not all(hasattr(data, name) for name in ("subset", "prepare", "listing")) or not hasattr(pl_module, "explain"):
            return
        if self._batch is None:
            self._split = "val" if "val" in data.splits else "train"
            subset = data.subset(self._split)
            self._batch = data.prepare(subset.__getitems__(pick(subset.labels, subset.store.has_mask[subset.indices], self.images)))
        from ..plot import heatmap_grid

        which = "Validation" if self._split == "val" else "Training"
        epochs = f"{epoch + 1} epoch{'s' if epoch else ''}"
        stage = "before C1 and C2 are tuned, " if tuning(pl_module) else ""
        try:
            heatmap_grid(
                self.run / "heatmaps" / f"epoch-{epoch:04d}.png",
                rows(pl_module, data, self._batch),
                title=f"{which} images after {epochs} ({stage}step {trainer.global_step})",
            )
        except (OSError, InputError) as error:  # no room on the disk, say; a figure is not worth a training
            warnings.warn(f"the heatmaps of epoch {epoch} could not be drawn: {error}", FisnetWarning, stacklevel=2)


def pick(labels: Tensor, has_mask: Tensor, count: int) -> list[int]:
    """Positions of ``count`` samples: the classes in turns, those with masks first, else in the order of the data.

    Example:
        >>> pick(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([False, True, True, True, False]), 4)
        [1, 3, 2, 4]
    """
    queues = []
    for label in labels.unique().tolist():
        of_class = (labels == label).nonzero().flatten()
        queues.append(of_class[torch.sort(has_mask[of_class].int(), descending=True, stable=True).indices].tolist())
    turns = [queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue)]
    return turns[:count]


def rows(pl_module: Any, data: Any, batch: dict[str, Tensor]) -> list[Any]:
    """A `fisnet_cuda.plot.Row` for each sample of a prepared batch."""
    from ..plot import Row

    spec, labels = pl_module.spec, batch["label"].cpu()
    predicted = pl_module.explain(batch["image"], target="predicted")
    told = predicted.explained[:, 0].cpu()
    probabilities = predicted.logits.float().softmax(1).cpu()
    true = pl_module.explain(batch["image"], target="label", labels=batch["label"])
    images = spec.denormalise(batch["image"].float()).cpu()
    made = []
    for i, index in enumerate(batch["index"].tolist()):
        label, class_ = int(labels[i]), int(told[i])
        maps = {f"for {spec.classes[class_]} (predicted)": predicted.heatmaps[i, 0].float().cpu()}
        if label not in (-1, class_):
            maps[f"for {spec.classes[label]} (true)"] = true.heatmaps[i, 0].float().cpu()
        name = data.listing.samples[index].name
        truth = spec.classes[label] if label >= 0 else "unknown"
        text = f"{name}\ntrue: {truth}\npredicted: {spec.classes[class_]}, {100 * float(probabilities[i, class_]):.0f} %"
        mask = batch["mask"][i, 0].float().cpu() if bool(batch["has_mask"][i]) else None
        made.append(Row(images[i], mask, maps, text, None if label < 0 else label == class_))
    return made
