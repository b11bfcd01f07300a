"""Metrics of a run on its test images, subset by subset."""

from __future__ import annotations

import argparse
from typing import Any

from lightning.pytorch import LightningDataModule

from ..errors import InputError
from .console import READING, ordered, quiet, say, settings_kept, words
from .runs import add_run_arguments, open_run
from .validate import metrics_of

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fisnet-cuda test``."""
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints a table: a row a metric, a column a subset."""
    with quiet(), settings_kept():
        module, data = open_run(args)
        data.prepare_data()
        data.setup("test")
        if not data.subsets():
            raise InputError(f"{args.run} has no test images: give some with --path, or with fisnet-cuda evaluate --set")
        columns = {name: metrics_of(module, _Subset(data, name), "test", args) for name in data.subsets()}
        say(subsets_table(columns, {name: len(subset) for name, subset in data.subsets().items()}))
        say(READING)
        say(f"with confidence intervals and a figure: fisnet-cuda evaluate {args.run}")
    return 0


def subsets_table(columns: dict[str, dict[str, float]], counts: dict[str, int]) -> str:
    """Metrics of several subsets side by side.

    Example:
        >>> print(subsets_table({"test": {"test/accuracy": 0.5}, "test/A": {"test/accuracy": 1.0}}, {"test": 4, "test/A": 2}))
                    test  test/A
        images         4       2
        accuracy  0.5000  1.0000
    """
    metrics = ordered(dict.fromkeys(name for values in columns.values() for name in values))
    first = max(map(len, ["images", *map(words, metrics)]))
    width = {name: max(len(name), 6) for name in columns}
    lines = [" " * first + "".join(f"  {name:>{width[name]}}" for name in columns)]
    lines.append(f"{'images':<{first}}" + "".join(f"  {counts[name]:>{width[name]}}" for name in columns))
    for metric in metrics:
        cells = [f"{values[metric]:.4f}" if metric in values else "" for values in columns.values()]
        lines.append(f"{words(metric):<{first}}" + "".join(f"  {cell:>{width[name]}}" for cell, name in zip(cells, columns)))
    return "\n".join(line.rstrip() for line in lines)


class _Subset(LightningDataModule):
    """One subset of a data module's test images, prepared as the data module does."""

    def __init__(self, data: Any, name: str) -> None:
        super().__init__()
        self.data, self.name = data, name

    def test_dataloader(self) -> Any:
        return self.data.loader(self.name)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.data.prepare(batch)
