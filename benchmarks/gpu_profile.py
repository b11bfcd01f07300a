"""Which kernels does a training step spend its time in? torch.profiler's table of one case, to know what to tune next."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common, gpu_worker
from benchmarks.cases import CASES, TrainingStep
from benchmarks.common import Report, cell
from benchmarks.gpu_worker import Turn

COLUMNS = {
    "kernel": lambda row: row["kernel"][:90],
    "launches a step": cell("launches", 0),
    "ms a step": cell("ms", 3),
    "share": lambda row: f"{row['share']:.1%}",
}


def run(options: argparse.Namespace) -> Report:
    """Warm up, and profile a few steps when it is our turn."""
    title = f"Kernels of a training step: {options.model}, {options.case}, {options.precision}"
    report = Report("profile", title, common.settings_of(options), common.environment(options.device), COLUMNS)
    turn = Turn(options, report)
    setup = common.setup_of(options, model=options.model, classes=10)
    with gpu_worker.emulating(options.device):
        with gpu_worker.alone(options.device):
            step = TrainingStep(options.case, setup)
            for _ in range(2):
                step()
        turn.wait()
        activities = [ProfilerActivity.CUDA if options.device == "cuda" else ProfilerActivity.CPU]
        with profile(activities=activities) as seen:
            for _ in range(options.steps):
                step()
            if options.device == "cuda":
                torch.cuda.synchronize()
    own = "self_device_time_total" if options.device == "cuda" else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, own))
    total = sum(getattr(event, own) for event in events) or 1.0
    for event in events[: options.top]:
        microseconds = getattr(event, own)
        report.add(
            kernel=event.key, launches=event.count / options.steps, ms=microseconds / 1e3 / options.steps,
            share=microseconds / total,
        )  # fmt: skip
    turn.say(f"{total / 1e3 / options.steps:.1f} ms a step in {len(events)} kernels")
    turn.save()
    return report


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    p = common.parser(__doc__)
    gpu_worker.options_of(p)
    p.add_argument("--model", default="resnet50")
    p.add_argument("--case", choices=CASES, default="selective")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--size", type=int, default=224, help="height and width of the images")
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--top", type=int, default=40, help="how many kernels to show")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = arguments().parse_args(argv)
    if options.quick:
        options.model, options.batch, options.size, options.steps = "small", 2, 32, 1
    common.prepare(options)
    return gpu_worker.finish(run(options), options)


if __name__ == "__main__":
    gpu_worker.leave(main())
