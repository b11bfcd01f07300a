"""Run another benchmark's `run` as a worker of `benchmarks.gpu`: ``python -m benchmarks.gpu_turn classes --device cuda``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import choices, common, gpu_worker
from benchmarks.common import Report
from benchmarks.gpu_worker import Turn

NAMES = ("classes", "heatmap")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in NAMES:
        raise SystemExit(f"which benchmark? One of {', '.join(NAMES)}")
    benchmark = importlib.import_module(f"benchmarks.{argv[0]}")
    p: argparse.ArgumentParser = benchmark.arguments()
    gpu_worker.options_of(p)
    options = p.parse_args(argv[1:])
    sys.path.extend(str(folder) for folder in getattr(options, "path", []))
    common.prepare(options)
    turn = Turn(options, Report(argv[0], "", common.settings_of(options), common.environment(options.device), {}))
    with gpu_worker.emulating(options.device):
        turn.wait()
        with choices.postponed(choices.SHARE * turn.seconds):  # the first rounds decide, and are not counted
            turn.report = benchmark.run(options)
    for row in turn.report.rows:
        turn.say(f"{row['case']}, {row['model']}, {row['classes']} classes: {row['ms']['p50']:.2f} ms")
    turn.save()
    return int(turn.report.wrong)


if __name__ == "__main__":
    gpu_worker.leave(main())
