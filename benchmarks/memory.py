"""How much memory does a training step take at its peak, next to a plain one?

Each case runs forward, loss and backward a few times in a process of its own (`benchmarks.peak`), in turn, several
times over. On a CPU the peak is that of the whole process, PyTorch and the weights included; on a GPU that of the
tensors. The optimizer is left out: what it takes is the same for every case.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common, figures
from benchmarks.cases import CASES, DOUBLE_BACKWARD, PLAIN, Setup
from benchmarks.common import Bar, Report, Spread, cell
from fisnet_cuda.progress import Progress

# over plain: what the authors' code takes (architecture.md)
LIMITS = {
    ("resnet18", "selective"): 1.4, ("resnet18", "dual"): 2.5,
    ("densenet121", "selective"): 2.0, ("densenet121", "dual"): 4.9,
}  # fmt: skip

COLUMNS = {
    "net": cell("model"),
    "training step": lambda row: figures.TEXTS[row["case"]].replace("\n", " "),
    "classes": cell("classes"),
    "peak, MiB": cell("peak_mib", 0),
    "over plain": cell("over_plain"),
}


def measure(cases: Sequence[tuple[str, Setup]], repeats: int, steps: int, threads: int | None) -> list[list[float]]:
    """Peaks in MiB of each case, one for each repeat; a fresh process for every one.

    Args:
        cases: case and setup.
        repeats: how often all cases are run, in turn.
        steps: training steps in each process.
        threads: of PyTorch; None is its own choice.
    """
    peaks: list[list[float]] = [[] for _ in cases]
    progress, done = Progress("peak memory", repeats * len(cases)), 0
    for _ in range(repeats):
        for (case, setup), found in zip(cases, peaks):
            request = {"case": case, "steps": steps, "threads": threads, "setup": asdict(setup)}
            command = [sys.executable, "-m", "benchmarks.peak", json.dumps(request)]
            run = subprocess.run(command, cwd=common.ROOT, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(run.stdout.splitlines()[-1])["peak_mib"])
            done += 1
            progress.update(done, f"{setup.model}, {case}")
    return peaks


def run(options: argparse.Namespace) -> Report:
    """Measure, and compare with the limits."""
    report = Report(
        "memory", "Peak memory of a training step", common.settings_of(options),
        common.environment(options.device), COLUMNS,
    )  # fmt: skip
    for model in options.models:
        setup = common.setup_of(options, model=model, classes=options.classes)
        cases = [(case, setup) for case in (PLAIN, *options.cases)]
        peaks = measure(cases, options.repeats, options.steps, options.threads)
        for (case, _), peak in zip(cases, peaks):
            ratio = Spread.of([p / plain for p, plain in zip(peak, peaks[0])])
            report.add(
                **setup.as_row(), case=case, peak_mib=Spread.of(peak), over_plain=ratio, all_mib=peak,
                steps=options.steps,
            )  # fmt: skip
            limit = LIMITS.get((model, case))
            if limit:
                name = f"peak memory, {model}, {case} over plain"
                report.bars.append(Bar(name, ratio, limit, judged=common.is_protocol(setup)))
    return report


def draw(report: Report, path: Path) -> None:
    """One panel a network: MiB of each case."""
    panels = []
    for model in dict.fromkeys(row["model"] for row in report.rows):
        rows = [row for row in report.rows if row["model"] == model]
        plain = rows[0]["peak_mib"]["p50"]
        items = [
            figures.Item(
                figures.TEXTS[row["case"]],
                Spread(**row["peak_mib"]),
                figures.COLOURS[row["case"]],
                target=plain * LIMITS[model, row["case"]] if (model, row["case"]) in LIMITS else None,
                text=f"{row['peak_mib']['p50']:.0f} MiB, {row['over_plain']['p50']:.2f}x",
            )
            for row in rows
        ]
        panels.append(figures.Panel(figures.model_title(rows[0]), items))
    figures.bars(
        path, "Peak memory of a training step", figures.machine(report.environment), panels,
        "MiB, whole process" if report.settings["device"] == "cpu" else "MiB, tensors on the GPU",
        target_text="target: no more than the authors' code takes over plain",
    )  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    p = common.parser(__doc__)
    p.add_argument("--models", nargs="+", default=["resnet18", "densenet121"])
    p.add_argument(
        "--cases", nargs="+", choices=CASES[1:],
        default=["selective", "stochastic", "contrast", "dual", "original", DOUBLE_BACKWARD],
    )  # fmt: skip
    p.add_argument("--classes", type=int, default=10)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--size", type=int, default=112, help="height and width of the images")
    p.add_argument("--steps", type=int, default=4, help="training steps in each process")
    p.add_argument("--repeats", type=int, default=3, help="processes for each case")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = arguments().parse_args(argv)
    if options.quick:
        options.models, options.cases, options.steps, options.repeats = ["small"], ["selective"], 2, 1
        options.batch, options.size = 2, 32
    common.prepare(options)
    return common.finish(run(options), options, draw)


if __name__ == "__main__":
    sys.exit(main())
