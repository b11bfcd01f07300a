"""What the user sees while Lightning works: a line that moves, one line an epoch, and none of Lightning's own talk."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.warnings import PossibleUserWarning

from .errors import one_line, rank

__all__ = ["READING", "Console", "ordered", "quiet", "say", "settings_kept", "table", "words"]

# logged name -> (heading, width); what a run does not log is left out
COLUMNS = {
    "train/loss": ("train loss", 10),
    "train/classification": ("class.", 7),
    "train/heatmap": ("heatmap", 8),
    "train/swapped": ("swapped", 7),
    "val/loss": ("val loss", 9),
    "val/accuracy": ("accuracy", 8),
    "val/balanced_accuracy": ("balanced", 8),
    "val/macro_f1": ("macro F1", 8),
    "val/auroc": ("AUROC", 7),
    "val/background_share": ("background", 10),
    "val/swap_gap": ("swap gap", 8),
}
LEGEND = (
    "train loss = (1 - P) class. + P heatmap; 1 is best of accuracy, balanced (accuracy), macro F1 and AUROC;\n"
    "background = share of relevance outside the masks, 0 is best; swap gap = accuracy lost on another class's background, 0 is\n"
    "best; all but the training losses are of the validation images"
)

SWAPPED = "swapped = share of the training images that had another one's background"

_LEFT_BEHIND = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "CUBLAS_WORKSPACE_CONFIG")


def say(text: str = "") -> None:
    """Prints on standard output, in the first process only."""
    if not rank():
        print(text, flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Lightning's tips, banners and advice are left out; this package's own warnings, and others', are one line each."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning_utilities")]
    levels = [logger.level for logger in loggers]
    seen: set[str] = set()

    def show(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        line = one_line(message)
        if not rank() and line not in seen:
            seen.add(line)
            print(f"warning: {line}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        warnings.filterwarnings("ignore", module=r"lightning(_utilities|_fabric)?(\.|$)")
        warnings.filterwarnings("ignore", module=r"torch\.(jit|distributed|onnx)(\.|$)")
        warnings.filterwarnings("ignore", message=".*(num_workers|Grad strides|sanity|litlogger|lr_scheduler.step).*")
        warnings.showwarning = show
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """True float32 unless a command says otherwise (on a GPU torch's default is TF32 in convolutions, which would make `validate`
    differ from the training); and what is one for the whole process is afterwards what it was: TF32, deterministic algorithms, cuDNN's
    benchmark, the random states of torch, Python and numpy, and what Lightning and torch leave in the environment."""
    state, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    environment = {name: os.environ.get(name) for name in _LEFT_BEHIND}
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    tf32 = cudnn.allow_tf32, matmul.allow_tf32
    benchmark, deterministic = cudnn.benchmark, cudnn.deterministic
    algorithms, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python)
        np.random.set_state(numpy)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        cudnn.allow_tf32, matmul.allow_tf32 = tf32
        cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)


class Console(ProgressBar):
    """Lightning's progress bar, as this tool shows it: on a terminal a line on standard error that moves with the steps, and
    everywhere one line an epoch on standard output.

    Args:
        epochs: print the table of epochs (of `fit`).
    """

    def __init__(self, epochs: bool = True) -> None:
        super().__init__()
        self.epochs, self.on = epochs, True
        self.moves = sys.stderr.isatty()
        self.shown = 0.0
        self.columns: list[str] = []
        self.start = time.perf_counter()

    def disable(self) -> None:
        """Shows nothing from now on."""
        self.on = False

    def enable(self) -> None:
        """Shows again."""
        self.on = True

    # ---- the line that moves -----------------------------------------------------------------------------------------

    def _move(self, label: str, done: int, total: float, note: str = "") -> None:
        now = time.perf_counter()
        if not (self.on and self.moves) or (now - self.shown < 0.1 and done < total):
            return
        self.shown = now
        share = min(1.0, done / total) if total and total != float("inf") else 0.0
        bar = "#" * round(24 * share)
        sys.stderr.write(f"\r{f'{label} [{bar:-<24}] {done}/{total} {now - self.start:4.0f} s  {note}'[:110]:<110}")
        sys.stderr.flush()

    def _clear(self) -> None:
        if self.on and self.moves:
            sys.stderr.write("\r" + 110 * " " + "\r")
            sys.stderr.flush()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The clock of the epoch."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One step further. The loss is read only when it is shown: reading it waits for the device."""
        if not (self.on and self.moves) or time.perf_counter() - self.shown < 0.1:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        note = f"loss {float(loss):.4f}" if isinstance(loss, torch.Tensor) else ""
        self._move(f"epoch {trainer.current_epoch + 1}/{_total(trainer)}", batch_idx + 1, self.total_train_batches, note)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """One batch of the evaluation further."""
        self._evaluating(trainer, "validation", trainer.num_val_batches)

    def on_test_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """One batch of the test further."""
        self._evaluating(trainer, "test", trainer.num_test_batches)

    def on_predict_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """One batch of the prediction further."""
        self._evaluating(trainer, "predict", trainer.num_predict_batches)

    def on_validation_start(self, *_: Any) -> None:
        """Counting begins."""
        self.done = 0

    on_test_start = on_predict_start = on_validation_start

    def _evaluating(self, trainer: Trainer, label: str, batches: Any) -> None:
        self.done = getattr(self, "done", 0) + 1
        self._move(label, self.done, sum(batches) if isinstance(batches, list) else batches)

    # ---- one line an epoch -------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch's line."""
        self._clear()
        found = trainer.callback_metrics  # in every process: they may have to be gathered from the others
        if not (self.on and self.epochs):
            return
        metrics = {name: float(value) for name, value in found.items()}
        if not self.columns or not set(metrics) & set(COLUMNS) <= set(self.columns):
            if not self.columns:
                say("\n" + LEGEND + (f"\n{SWAPPED}" if "train/swapped" in metrics else ""))
            self.columns = [name for name in COLUMNS if name in metrics]
            say(f"{'epoch':>9} {'time':>7}  " + "  ".join(f"{COLUMNS[n][0]:>{COLUMNS[n][1]}}" for n in self.columns))
        cells = [f"{metrics[n]:>{COLUMNS[n][1]}.4f}" if n in metrics else " " * COLUMNS[n][1] for n in self.columns]
        epoch = f"{trainer.current_epoch + 1}/{_total(trainer)}"
        say(f"{epoch:>9} {time.perf_counter() - self.start:>5.1f} s  " + "  ".join(cells))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The error's line begins on a fresh line."""
        self._clear()


def _total(trainer: Trainer) -> str:
    return str(trainer.max_epochs) if trainer.max_epochs and trainer.max_epochs > 0 else "?"


def table(metrics: dict[str, float], title: str) -> str:
    """Metrics as an aligned table.

    Example:
        >>> print(table({"val/accuracy": 0.875, "val/loss": 0.5}, "validation"))
        validation
          accuracy  0.8750
          loss      0.5000
    """
    names = {name: words(name) for name in ordered(metrics)}
    width = max(map(len, names.values()), default=0)
    return "\n".join([title, *(f"  {word:<{width}}  {metrics[name]:.4f}" for name, word in names.items())])


FIRST = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "background_share")
READING = "accuracies, macro F1 and AUROC: 1 is best; background share and losses: less is better"


def ordered(names: Iterable[str]) -> list[str]:
    """Metrics in the order of their interest: what users ask for, then the parts of the loss."""
    names = list(names)
    first = [name for wanted in FIRST for name in names if name.split("/", 1)[-1] == wanted]
    return first + [name for name in names if name not in first]


def words(name: str) -> str:
    """A metric's name as people write it.

    Example:
        >>> words("val/macro_f1"), words("test/heatmap")
        ('macro F1', 'heatmap loss')
    """
    word = name.split("/", 1)[-1]
    losses = {part: f"{part} loss" for part in ("classification", "heatmap", "background", "foreground")}
    return {"macro_f1": "macro F1", "auroc": "AUROC", **losses}.get(word, word.replace("_", " "))
