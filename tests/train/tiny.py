"""A Lightning module whose validation metrics are what the test says."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.warnings import PossibleUserWarning

from fisnet_cuda.data.sampler import EpochBatches, EpochLoader


class Tiny(pl.LightningModule):
    """A line through made points; ``val/loss`` of epoch e is ``values[e]``."""

    def __init__(self, values, tuning_epochs=0, lr=0.1):
        super().__init__()
        self.values, self.tuning_epochs, self.lr = values, tuning_epochs, lr
        torch.manual_seed(0)
        self.line = torch.nn.Linear(3, 1)

    @property
    def tuning(self):
        return self.current_epoch < self.tuning_epochs

    def training_step(self, batch, batch_idx):
        loss = self.line(batch).square().mean()
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log_dict({"val/loss": self.values[self.current_epoch], "val/accuracy": self.values[self.current_epoch] / 10})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def fit(run, values, callbacks, *, module=Tiny, ckpt_path=None, batch_size=4, tuning_epochs=0, **trainer):
    """Trains for as many epochs as there are values; 6 steps each. Returns the trainer."""
    points = torch.randn(26, 3, generator=torch.Generator().manual_seed(1))
    loaders = [
        EpochLoader(points, EpochBatches(26, batch_size, shuffle=True, drop_last=True)),
        EpochLoader(points[:5], EpochBatches(5, batch_size)),
    ]
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        made = pl.Trainer(**options, max_epochs=len(values), num_sanity_val_steps=0, callbacks=callbacks, **trainer)
        made.fit(module(values, tuning_epochs), *loaders, ckpt_path=ckpt_path, weights_only=True)
    return made
