"""Run another benchmark's `run` as a worker of `benchmarks.gpu`: ``python -m benchmarks.gpu_turn classes --device cuda``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import choices, common, gpu_worker
from benchmarks.common import Report
from benchmarks.gpu_worker import Turn

NAMES = ("classes", "heatmap")


def parse(argv: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """The benchmark that the first argument names, and its options with those of a worker."""
    if not argv or argv[0] not in NAMES:
        raise SystemExit(f"which benchmark? One of {', '.join(NAMES)}")
    benchmark = importlib.import_module(f"benchmarks.{argv[0]}")
    p: argparse.ArgumentParser = benchmark.arguments()
    gpu_worker.options_of(p)
    options = p.parse_args(argv[1:])
    sys.path.extend(str(folder) for folder in getattr(options, "path", []))
    return benchmark, options


def run(benchmark: ModuleType, options: argparse.Namespace) -> Report:
    """Run the benchmark when it is our turn; what it has found is written as it comes."""
    name = benchmark.__name__.rpartition(".")[2]
    turn = Turn(options, Report(name, "", common.settings_of(options), common.environment(options.device), {}))

    def seen(report: Report) -> None:
        turn.report = report
        turn.save()

    with gpu_worker.emulating(options.device):
        turn.wait()
        with choices.postponed(choices.SHARE * turn.seconds):  # the first rounds decide, and are not counted
            seen(benchmark.run(options, seen, turn.seconds))
    for row in turn.report.rows:
        turn.say(f"{row['case']}, {row['model']}, {row['classes']} classes: {row['ms']['p50']:.2f} ms")
    return turn.report


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    benchmark, options = parse(sys.argv[1:] if argv is None else argv)
    common.prepare(options)
    return int(run(benchmark, options).wrong)


if __name__ == "__main__":
    gpu_worker.leave(main())
