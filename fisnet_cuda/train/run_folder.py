"""`RunFolder`: what a run leaves behind to be read by people and programs."""

from __future__ import annotations

import csv
import io
import platform
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint

from ..files import make_folder, write_json, write_text

__all__ = ["RunFolder"]


class RunFolder(Checkpoint):
    """Writes into the run's folder, each file whole or not at all:

    * ``metrics.csv``: one row an epoch, ``epoch`` (from 0), ``step`` (of the optimizer, at its end), all metrics of the epoch,
      ``lr`` and ``seconds`` (training and validation). The rows travel in the checkpoints: a run that is resumed, also into
      another folder or from an earlier checkpoint, has each epoch once, as if it had never been stopped.
    * ``split.csv``: which sample is in which split; ``data_report.md`` and ``.json``: what was found in the data.
    * ``summary.json``, when training ends, also by an error: how it ended, the last and the best epoch, versions and devices.

    A `Checkpoint` only in that Lightning calls those last: after the module's ``on_train_epoch_end``, so that what is logged there
    has its column. Stands before `Checkpoints` in the list of callbacks, whose files then hold the row of their epoch.

    Args:
        run: the folder; made when training starts.
    """

    def __init__(self, run: str | Path) -> None:
        self.run = Path(run)
        self.rows: list[dict[str, float]] = []
        self._spent = 0.0  # seconds of this epoch in runs before this one
        self._open = False  # within an epoch
        self._validation: dict[str, float] = {}

    @property
    def best_model_path(self) -> str:
        """What ``ckpt_path="best"`` means to Lightning; empty if there is none."""
        best = self.run / "best.ckpt"
        return str(best) if best.exists() else ""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what is known before training, and drop the rows of epochs that come again."""
        data = getattr(trainer, "datamodule", None)
        if not trainer.is_global_zero:
            return
        make_folder(self.run)
        self._write(trainer)
        if hasattr(data, "report"):
            write_text(self.run / "data_report.md", f"{data.report}\n")
            write_json(self.run / "data_report.json", data.report.to_dict())
        if hasattr(data, "store") and hasattr(data, "splits"):
            from ..data.split import write_manifest

            write_manifest(self.run / "split.csv", data.listing, data.splits, data.store.hashes)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._start = self._begun = time.monotonic()
        self._open = True
        self._earlier = sum(row["seconds"] for row in self.rows) + self._spent

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the epoch's clock; not called when an epoch is resumed in its middle."""
        self._start, self._spent, self._open = time.monotonic(), 0.0, True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the metrics: an epoch without validation has none, though Lightning still shows the last ones."""
        if not trainer.sanity_checking:
            self._validation = {name: value for name, value in _numbers(trainer).items() if name.startswith("val")}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch's row."""
        row: dict[str, float] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        row |= {name: value for name, value in _numbers(trainer).items() if name.startswith("train")} | self._validation
        if trainer.optimizers:
            row["lr"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        row["seconds"] = round(self._seconds(), 3)
        self._validation, self._open = {}, False
        self.rows = [*(r for r in self.rows if r["epoch"] < row["epoch"]), row]
        self._write(trainer)

    def _seconds(self) -> float:
        return self._spent + time.monotonic() - self._start

    def _write(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and self.rows:
            write_text(self.run / "metrics.csv", table(self.rows))

    # ---- the end -----------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the summary of a run that has ended."""
        interrupted = trainer.state.status == "interrupted"
        early = trainer.should_stop and (trainer.max_epochs in (None, -1) or trainer.current_epoch < trainer.max_epochs)
        self._summary(trainer, pl_module, "interrupted" if interrupted else "stopped early" if early else "finished")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write the summary of a run that has failed."""
        if trainer.state.fn == "fit" and hasattr(self, "_begun"):
            kind = "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed"
            text = str(exception).strip().splitlines() or [type(exception).__name__]
            self._summary(trainer, pl_module, kind, error=None if kind == "interrupted" else text[0])

    def _summary(self, trainer: pl.Trainer, pl_module: pl.LightningModule, ended: str, error: str | None = None) -> None:
        if not trainer.is_global_zero:
            return
        best = next((c.best for c in trainer.checkpoint_callbacks if getattr(c, "best", None)), None)
        row = next((row for row in self.rows if best and row["epoch"] == best["epoch"]), None)
        monitor = next((c.monitor for c in trainer.checkpoint_callbacks if hasattr(c, "monitor")), None)
        write_json(
            self.run / "summary.json",
            {
                "ended": ended,
                **({"error": error} if error else {}),
                "epochs": len(self.rows),
                "steps": trainer.global_step,
                "seconds": round(self._earlier + time.monotonic() - self._begun, 3),
                "monitor": monitor,
                "best": row,
                "last": self.rows[-1] if self.rows else None,
                "c1_c2": getattr(pl_module, "tuned", None),
                "parameters": sum(p.numel() for p in pl_module.parameters()),
                "processes": trainer.world_size,
                "device": _device(pl_module.device),
                "precision": str(trainer.precision),
                "versions": _versions(),
            },
        )

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """One place in a checkpoint, whatever the folder."""
        return "fisnet_cuda.RunFolder"

    def state_dict(self) -> dict[str, Any]:
        """All rows, and what is known of an epoch that is not over."""
        return {
            "rows": [dict(row) for row in self.rows],
            "seconds": self._seconds() if self._open else 0.0,
            "validation": dict(self._validation),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.rows = [dict(row) for row in state_dict["rows"]]
        self._spent, self._validation = state_dict["seconds"], dict(state_dict["validation"])


def _numbers(trainer: pl.Trainer) -> dict[str, float]:
    """The metrics of now; to be asked for on every process, since computing them may ask the others."""
    return {name: float(value) for name, value in sorted(trainer.callback_metrics.items()) if value.numel() == 1}


def table(rows: list[dict[str, float]]) -> str:
    """Rows as CSV: a column for each key of any row, "seconds" the last; empty where a row has none.

    Example:
        >>> print(table([{"epoch": 0, "a": 1 / 3, "seconds": 1.5}, {"epoch": 1, "b": float("nan"), "seconds": 2.0}]), end="")
        epoch,a,b,seconds
        0,0.333333333,,1.5
        1,,nan,2
    """
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("lr", "seconds")))
    columns += [key for key in ("lr", "seconds") if any(key in row for row in rows)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row[key]) if key in row else "" for key in columns])
    return text.getvalue()


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.9g}"  # 9 digits tell any two float32 apart


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()})"


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("fisnet-cuda", "torch", "lightning", "kornia"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
