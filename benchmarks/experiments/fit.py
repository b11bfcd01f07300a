"""Trains one system: the same loop for all of them."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .systems import Setting, Stage, System, build
from .tasks import Task, batches, epoch_steps

__all__ = ["Clock", "Fitted", "fit", "training_clock"]

Clock = Callable[[], float]

# called at the end of every epoch of the last stage: (system, rows of the history so far) -> numbers of the history's row
Watch = Callable[[System, int], Mapping[str, float]]


@dataclass
class Fitted:
    """A trained system.

    Attributes:
        system: in eval mode.
        steps: of the optimizer that were done.
        seconds: of training by the clock of `fit`, measurements left out. By the default clock other work on the machine counts:
            not a benchmark.
        history: a row an epoch: means of the loss's parts over its steps, and what was watched.
        diverged: the loss was not finite; the training ended there.
    """

    system: System
    steps: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    diverged: bool = False


def training_clock(device: torch.device | str) -> Clock:
    """The clock for comparisons at equal time: CPU time of this thread where PyTorch trains in it alone, else wall time.

    With one thread on the CPU, forward and backward run in the calling thread; its CPU time is the wall time of a core that does
    nothing else, whatever else the machine does.

    Example:
        >>> threads = torch.get_num_threads()
        >>> torch.set_num_threads(1)
        >>> training_clock("cpu").__name__, training_clock("cuda").__name__
        ('thread_time', 'perf_counter')
        >>> torch.set_num_threads(threads)
    """
    alone = torch.device(device).type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if alone else time.perf_counter


def fit(
    setting: Setting,
    task: Task,
    watch: Watch | None = None,
    tell: Callable[[int, str], None] | None = None,
    every: int = 0,
    clock: Clock | None = None,
) -> Fitted:
    """Trains one system on a task.

    SGD with momentum, gradients clipped at norm 1, a learning rate that falls to 0 along half a cosine within each stage: over
    ``setting.steps`` steps, or over ``setting.seconds`` of training time where steps is 0.

    Args:
        setting: what and how.
        task: the images, on the device to train on.
        watch: measures the net after every epoch of the last stage; its time is not counted.
        tell: progress: (steps so far, the newest numbers).
        every: steps between two rows of the history; 0: an epoch.
        clock: seconds; what ``setting.seconds`` and the reported seconds are counted by; None: `training_clock` of the task's device.

    Returns:
        The trained system. A loss that is not finite ends the training (``diverged``).
    """
    clock = clock or training_clock(task.train.images.device)
    with torch.random.fork_rng(devices=[task.train.images.device] if task.train.images.is_cuda else []):
        torch.manual_seed(setting.seed)
        fitted = Fitted(build(setting, task))
        stages = fitted.system.stages()
        for index, stage in enumerate(stages):
            _run(fitted, stage, setting, task, index, watch if index == len(stages) - 1 else None, tell, every, clock)
            if fitted.diverged:
                break
    fitted.system.eval()
    return fitted


def _run(
    fitted: Fitted, stage: Stage, setting: Setting, task: Task, index: int, watch: Watch | None,
    tell: Callable[[int, str], None] | None, every: int, clock: Clock,
) -> None:  # fmt: skip
    system, stage_start = fitted.system, clock()
    parameters = stage.parameters()
    optimizer = torch.optim.SGD(parameters, lr=setting.lr, momentum=setting.momentum)
    steps, seconds = round(setting.steps * stage.share), setting.seconds * stage.share
    per_epoch = epoch_steps(task, setting.batch)
    sums: dict[str, torch.Tensor] = {}
    spent, counted = clock() - stage_start, 0
    source = batches(task, setting.batch, setting.seed + 1_000_003 * index)
    system.train()
    for step in itertools.count(1):
        start = clock()
        done = (step - 1) / steps if steps else spent / seconds
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = setting.lr * 0.5 * (1 + math.cos(math.pi * done))
        loss, parts = stage.loss(next(source))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0) + value
        counted += 1
        fitted.steps += 1
        last = step == steps
        epoch_ends = step % (every or per_epoch) == 0 or last
        finite = bool(torch.isfinite(loss)) if epoch_ends or step % 10 == 0 or tell else True
        spent += clock() - start
        if tell is not None:
            tell(fitted.steps, stage.name)
        if not finite:
            fitted.diverged = True
            break
        if epoch_ends:
            row: dict[str, Any] = {"stage": stage.name, "epoch": round(step / per_epoch, 2), "step": step, "train_seconds": spent}
            row |= {f"train_{name}": float(value) / counted for name, value in sums.items()}
            sums, counted = {}, 0
            if watch is not None:
                row |= watch(system, len(fitted.history))
                system.train()
            fitted.history.append(row)
    fitted.seconds += spent
