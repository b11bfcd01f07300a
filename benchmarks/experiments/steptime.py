"""What a training step of every system costs, side by side: the trainings themselves share the machine and are no benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import commit, device_name
from fisnet_cuda.progress import Progress
from fisnet_cuda.timing import interleaved

from .jobs import Row, write_rows
from .systems import Setting, build
from .tasks import Task, batches, epoch_steps

__all__ = ["step_times"]


def step_times(path: Path, task: Task, settings: Sequence[Setting], rounds: int = 20) -> list[Row]:
    """Times one step of each system in turn, A B C A B C ..., in one process with PyTorch's present number of threads.

    A step is forward, loss, backward, clipping and SGD of every stage that the system has (a segmentation net, then the classifier);
    drawing and augmenting the batch is left out, it is the same for all.

    Args:
        path: the CSV file: ``system``, ``deep``, milliseconds ``ms_p20``, ``ms_p50``, ``ms_p80``, ``epoch_seconds`` (steps of an epoch
            times the median), ``ratio`` (median over that of the first setting).
        task: the images.
        settings: what is compared.
        rounds: how often each is timed.

    Returns:
        The rows.
    """
    batch = next(batches(task, settings[0].batch, seed=0))
    steps = {f"{s.system} {s.deep}": _step(s, task, batch) for s in settings}
    progress = Progress("time of a step", rounds + 1)
    times = interleaved(steps, rounds, device=task.train.images.device, tick=progress.update)
    facts = {"commit": commit(), "torch": torch.__version__, "device": device_name(task.train.images.device.type)}
    facts["threads"] = torch.get_num_threads()
    first, rows = times[next(iter(steps))].p50, []
    for setting, spread in zip(settings, times.values()):
        cost = {"ms_p20": spread.p20, "ms_p50": spread.p50, "ms_p80": spread.p80, "ratio": spread.p50 / first}
        cost["epoch_seconds"] = 1e-3 * spread.p50 * epoch_steps(task, setting.batch)
        rows.append({"system": setting.system, "deep": setting.deep, "batch": setting.batch, **cost, "rounds": rounds, **facts})
    write_rows(path, rows)
    return rows


def _step(setting: Setting, task: Task, batch: object) -> Callable[[], None]:
    system = build(setting, task)
    system.train()
    stages = []
    for stage in system.stages():
        parameters = stage.parameters()
        stages.append((stage, parameters, torch.optim.SGD(parameters, lr=1e-3, momentum=setting.momentum)))

    def step() -> None:
        for stage, parameters, optimizer in stages:
            loss, _ = stage.loss(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    return step
