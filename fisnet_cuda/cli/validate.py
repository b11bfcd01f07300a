"""Metrics of a run on its validation images."""

from __future__ import annotations

import argparse

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from .console import READING, Console, quiet, say, settings_kept, table
from .runs import add_run_arguments, device_of, open_run

__all__ = ["add_arguments", "metrics_of", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fisnet-cuda validate``."""
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints a table of metrics."""
    with quiet(), settings_kept():
        module, data = open_run(args, "val")
        metrics = metrics_of(module, data, "validate", args)
        say(table(metrics, f"validation images of {data.hparams.get('path', '') or args.run}"))
        say(READING)
    return 0


def metrics_of(module: LightningModule, data: LightningDataModule, what: str, args: argparse.Namespace) -> dict[str, float]:
    """Lightning's ``trainer.validate`` or ``trainer.test``, quietly."""
    trainer = Trainer(
        accelerator="gpu" if device_of(args).type == "cuda" else "cpu",
        devices=1,
        logger=False,
        callbacks=[Console(epochs=False)],
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,  # heatmaps are of this package's own autograd functions
    )
    found = getattr(trainer, what)(module, datamodule=data, verbose=False)
    return {name: value for part in found for name, value in part.items()}
