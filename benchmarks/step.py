"""What does a training step with heatmaps cost, next to a plain one?

All cases are timed in turn, in one process. Beside fisnet_cuda's variants: Selective's heatmaps by autograd's
double backward (the same maps to rounding) and, with ``--compile``, plain and Selective under ``torch.compile``.
Before a network is timed, its heatmaps and gradients are checked in float64; a case that fails is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common, figures, memory, verify
from benchmarks.cases import CASES, DOUBLE_BACKWARD, PLAIN, Setup, TrainingStep
from benchmarks.common import Bar, Report, Spread, cell

TARGETS = {
    ("resnet18", "selective"): 2.3, ("resnet18", "stochastic"): 2.3, ("resnet18", "contrast"): 2.3, ("resnet18", "dual"): 4.6,
    ("densenet121", "selective"): 2.6, ("densenet121", "stochastic"): 2.6, ("densenet121", "contrast"): 2.6,
    ("densenet121", "dual"): 5.2,
}  # fmt: skip
# 6 and 12 times a forward's arithmetic, over 3 times for a plain step
BOUNDS = {"selective": 2.0, "stochastic": 2.0, "contrast": 2.0, "dual": 4.0}
COMPILED = "_compiled"

COLUMNS = {
    "net": cell("model"),
    "training step": lambda row: figures.TEXTS[row["case"]].replace("\n", " "),
    "ms": cell("ms", 1),
    "over plain": cell("over_plain"),
    "peak, MiB": cell("peak_mib", 0),
    "peak over plain": cell("peak_over_plain"),
}
COMPILED_COLUMN = {"over compiled plain": cell("over_compiled_plain")}


def run(options: argparse.Namespace) -> Report:
    """Check, time, and compare with the targets."""
    report = Report(
        "step", "Time of a training step", common.settings_of(options), common.environment(options.device),
        {**COLUMNS, **(COMPILED_COLUMN if options.compile else {})},
    )  # fmt: skip
    for model in options.models:
        setup = common.setup_of(options, model=model, classes=options.classes)
        cases = _correct(report, setup, [PLAIN, *options.cases])
        peaks = _peaks(options, setup, cases)
        steps = {case: TrainingStep(case, setup) for case in cases}
        if options.compile:
            steps |= _compiled(report, setup, [case for case in (PLAIN, "selective") if case in cases])
        times = common.interleave(steps, options.rounds, options.warmup, options.device, f"step, {model}")
        for case in steps:
            row = {"ms": times.spread(case), "over_plain": times.ratio(case, PLAIN), "all_ms": times.ms[case]}
            if PLAIN + COMPILED in steps:
                row["over_compiled_plain"] = times.ratio(case, PLAIN + COMPILED)
            if case in peaks:
                row["peak_mib"], row["peak_over_plain"] = peaks[case]
            report.add(**setup.as_row(), case=case, **row)
        for case in options.cases:
            if (model, case) in TARGETS:
                ratio = times.ratio(case, PLAIN) if case in steps else None
                judged = common.is_protocol(setup)
                report.bars.append(
                    Bar(f"training step, {model}, {case} over plain", ratio, TARGETS[model, case], judged=judged)
                )
    return report


def _correct(report: Report, setup: Setup, cases: Sequence[str]) -> list[str]:
    """The cases whose results are right; the others are said to be wrong."""
    wrong = verify.training_cases(setup, cases)
    for case, reason in wrong.items():
        report.drop(f"{setup.model}, {case}", reason)
    return [case for case in cases if case not in wrong]


def _peaks(options: argparse.Namespace, setup: Setup, cases: Sequence[str]) -> dict[str, tuple[Spread, Spread]]:
    """case -> peak memory in MiB and over plain: from a result of memory.py with these settings, or measured."""
    if options.peaks:
        rows = json.loads(options.peaks.read_text())["rows"]
        same = [row for row in rows if all(row[key] == value for key, value in setup.as_row().items())]
        return {row["case"]: (Spread(**row["peak_mib"]), Spread(**row["over_plain"])) for row in same}
    if not options.repeats:
        return {}
    found = memory.measure([(case, setup) for case in cases], options.repeats, 4, options.threads)
    return {
        case: (Spread.of(peak), Spread.of([p / plain for p, plain in zip(peak, found[0])])) for case, peak in zip(cases, found)
    }


def _compiled(report: Report, setup: Setup, cases: Sequence[str]) -> dict[str, TrainingStep]:
    """Compiled steps, after their first run; those that cannot be compiled are noted."""
    if setup.device == "cpu" and not shutil.which(os.environ.get("CXX", "c++")):
        report.note("torch.compile needs a C++ compiler for the CPU, and there is none; set CXX")
        return {}
    steps = {}
    for case in cases:
        print(f"compiling {setup.model}, {case}; this takes minutes", file=sys.stderr)
        step = TrainingStep(case, setup, compiled=True)
        try:
            step()
        except Exception as error:
            reason = str(error).strip().split("\n")[0][:200]
            report.note(f"{setup.model}, {case} does not compile: {type(error).__name__}: {reason}")
        else:
            steps[case + COMPILED] = step
    return steps


def draw(report: Report, path: Path) -> None:
    """One panel a network: time over plain of each case."""
    panels = []
    for model in dict.fromkeys(row["model"] for row in report.rows):
        rows = [row for row in report.rows if row["model"] == model]
        items = [
            figures.Item(
                figures.TEXTS[row["case"]],
                Spread(**row["over_plain"]),
                figures.COLOURS[row["case"]],
                target=TARGETS.get((model, row["case"])),
                bound=BOUNDS.get(row["case"]),
                text=f"{row['over_plain']['p50']:.2f}x, {row['ms']['p50']:.0f} ms",
            )
            for row in rows
        ]
        panels.append(figures.Panel(figures.model_title(rows[0]), items))
    figures.bars(
        path, "What a training step with heatmaps costs", figures.machine(report.environment), panels,
        "time of a training step over a plain one", target_text="target: at most this",
        bound_text="bound: the arithmetic alone",
    )  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    p = common.parser(__doc__)
    p.add_argument("--models", nargs="+", default=["resnet18", "densenet121"])
    p.add_argument(
        "--cases", nargs="+", choices=CASES[1:], default=["selective", "stochastic", "contrast", "dual", DOUBLE_BACKWARD],
        help="beside plain; original makes a heatmap for every class",
    )  # fmt: skip
    p.add_argument("--classes", type=int, default=10)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--size", type=int, default=112, help="height and width of the images")
    p.add_argument("--rounds", type=int, default=40, help="how often each step is timed")
    p.add_argument("--warmup", type=int, default=5, help="rounds before that")
    p.add_argument("--compile", action="store_true", help="also under torch.compile, which takes minutes")
    p.add_argument("--repeats", type=int, default=3, help="processes for each peak of memory; 0: none")
    p.add_argument("--peaks", type=Path, help="take the peaks from this result of memory.py instead")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = arguments().parse_args(argv)
    if options.quick:
        options.models, options.batch, options.size, options.repeats = ["small"], 2, 32, 0
        options.rounds, options.warmup = 3, 1
    common.prepare(options)
    return common.finish(run(options), options, draw)


if __name__ == "__main__":
    sys.exit(main())
