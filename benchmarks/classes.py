"""How does the time of a training step grow with the number of classes?

Selective, Stochastic, Contrast (this project's own) and Dual make one or two heatmaps a sample: their step may grow
as a plain step does, whose last layer grows, and no more. Original makes a heatmap for every class: its time must
grow linearly, not faster.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common, figures, verify
from benchmarks.cases import PLAIN, Setup, TrainingStep
from benchmarks.common import Bar, Report, Spread, Times, cell

CONSTANT, ORIGINAL = ("selective", "stochastic", "contrast", "dual"), "original"
EXPONENT = 1.1  # of Original's time over the number of classes; 1 is linear
COUNTS = [2, 10, 100, 1000]

COLUMNS = {
    "net": cell("model"),
    "training step": lambda row: figures.TEXTS[row["case"]],
    "classes": cell("classes"),
    "ms": cell("ms", 1),
    "over plain": cell("over_plain"),
    "growth since the fewest, ms": cell("growth_ms", 1),
}


def run(options: argparse.Namespace, seen: Callable[[Report], None] = lambda report: None, seconds: float | None = None) -> Report:
    """Check, time, and compare growth.

    Args:
        options: of `arguments`.
        seen: given the report as it grows.
        seconds: about so long for the rounds.
    """
    report = Report(
        "classes", "Time of a training step against the number of classes", common.settings_of(options),
        common.environment(options.device), COLUMNS,
    )  # fmt: skip

    def measure(cases: Sequence[str], told: Sequence[str], setups: dict[int, Setup], rounds: int, share: float) -> Times:
        def tell(times: Times, partial: bool = True) -> None:
            report.forget_partial()
            _rows(report, times, told, setups, partial)
            seen(report)

        times = _measure(options, cases, setups, rounds, tell, None if seconds is None else share * seconds)
        tell(times, partial=False)
        return times

    for model in options.models:
        setups = {count: common.setup_of(options, model=model, classes=count) for count in sorted(options.classes)}
        first = setups[min(setups)]
        wrong = verify.training_cases(first, (*CONSTANT, ORIGINAL))
        for case, reason in wrong.items():
            report.drop(f"{model}, {case}", reason)
        right = [case for case in CONSTANT if case not in wrong]
        times = measure([PLAIN, *right], [PLAIN, *right], setups, options.rounds, 0.7)
        _growth(report, times, right, setups)
        if ORIGINAL not in wrong:
            few = _affordable(report, options, setups)
            times = measure([PLAIN, ORIGINAL], [ORIGINAL], few, options.original_rounds, 0.3)
            _linear(report, times, few)
    return report


def _key(case: str, classes: int) -> str:
    return f"{case}, {classes} classes"


def _measure(
    options: argparse.Namespace, cases: Sequence[str], setups: dict[int, Setup], rounds: int, seen: Callable[[Times], None],
    seconds: float | None,
) -> Times:  # fmt: skip
    """All cases at all numbers of classes in turn, so that their differences are free of drift."""
    steps = {_key(case, c): TrainingStep(case, setup) for c, setup in setups.items() for case in cases}
    label = f"classes, {setups[min(setups)].model}"
    return common.interleave(steps, rounds, min(rounds, options.warmup), options.device, label, seconds, seen=seen)


def _affordable(report: Report, options: argparse.Namespace, setups: dict[int, Setup]) -> dict[int, Setup]:
    """The numbers of classes at which Original stays within its time."""
    few: dict[int, Setup] = {}
    seconds, before = 0.0, 1
    for classes, setup in setups.items():
        expected = seconds * classes / before * (options.original_rounds + 1)
        if expected > options.original_seconds:
            left_out = ", ".join(str(c) for c in setups if c >= classes)
            report.note(
                f"{setup.model}: Original is not measured at {left_out} classes: at {classes} it would take "
                f"{expected:.0f} s, more than --original-seconds {options.original_seconds:g}"
            )
            break
        step = TrainingStep(ORIGINAL, setup)
        step()
        start = time.perf_counter()
        step()
        seconds, before = time.perf_counter() - start, classes
        few[classes] = setup
    return few


def _rows(report: Report, times: Times, cases: Sequence[str], setups: dict[int, Setup], partial: bool) -> None:
    first = min(setups)
    for case in cases:
        for classes, setup in setups.items():
            key = _key(case, classes)
            report.add(
                **setup.as_row(), case=case, ms=times.spread(key),
                over_plain=times.ratio(key, _key(PLAIN, classes)),
                growth_ms=Spread.of(_differences(times, case, first, classes)), all_ms=times.ms[key],
                partial=partial,
            )  # fmt: skip


def _differences(times: Times, case: str, first: int, last: int) -> list[float]:
    """Milliseconds that each round took longer with ``last`` classes than with ``first``."""
    return [b - a for a, b in zip(times.ms[_key(case, first)], times.ms[_key(case, last)])]


def _growth(report: Report, times: Times, cases: Sequence[str], setups: dict[int, Setup]) -> None:
    """Growth beyond the plain step's own, round by round."""
    first, last = min(setups), max(setups)
    plain = _differences(times, PLAIN, first, last)
    model = setups[first].model
    for case in (PLAIN, *cases):
        growth = Spread.of(_differences(times, case, first, last))
        share = times.ratio(_key(case, last), _key(case, first))
        report.notes.append(
            f"{model}, {case}: {first} to {last} classes is {growth.text()} ms more, {share.text(3)} times the time"
        )
    for case in CONSTANT:
        name = f"{model}, {case}: growth from {first} to {last} classes beyond the plain step's"
        beyond = None
        if case in cases:
            own = _differences(times, case, first, last)
            beyond = Spread.of([a - b for a, b in zip(own, plain)])
        report.bars.append(Bar(name, beyond, 0.0, " ms", judged=(first, last) == (2, 1000), by="p20"))


def _linear(report: Report, times: Times, setups: dict[int, Setup]) -> None:
    """Original's exponent between neighbouring numbers of classes, and its slope."""
    counts = sorted(setups)
    for low, high in pairwise(counts):
        exponent = Spread.of(
            [
                math.log(b / a) / math.log(high / low)
                for a, b in zip(times.ms[_key(ORIGINAL, low)], times.ms[_key(ORIGINAL, high)])
            ]
        )
        slope = Spread.of([d / (high - low) for d in _differences(times, ORIGINAL, low, high)])
        model = setups[low].model
        name = f"{model}, original: exponent from {low} to {high} classes (1 is linear)"
        report.bars.append(Bar(name, exponent, EXPONENT, "", judged=not report.settings["quick"]))
        report.notes.append(f"{model}, original: {slope.text()} ms a class from {low} to {high} classes")


def draw(report: Report, path: Path) -> None:
    """One panel a network: a line for each case."""
    panels = {}
    for model in dict.fromkeys(row["model"] for row in report.rows):
        rows = [row for row in report.rows if row["model"] == model]
        lines = []
        for case in dict.fromkeys(row["case"] for row in rows):
            own = [row for row in rows if row["case"] == case]
            lines.append(
                figures.Line(
                    figures.TEXTS[case],
                    [row["classes"] for row in own],
                    [Spread(**row["ms"]) for row in own],
                    figures.COLOURS[case],
                    dashed=case == PLAIN,
                )
            )
        panels[figures.model_title(rows[0])] = lines
    figures.growth(
        path, "What more classes cost", figures.machine(report.environment), panels,
        "time of a training step, milliseconds",
    )  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    p = common.parser(__doc__)
    p.add_argument("--models", nargs="+", default=["small", "resnet18"])
    p.add_argument("--classes", type=int, nargs="+", default=COUNTS)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--size", type=int, default=112, help="height and width of the images")
    p.add_argument("--rounds", type=int, default=30, help="how often each step is timed")
    p.add_argument("--warmup", type=int, default=3, help="rounds before that")
    p.add_argument("--original-rounds", type=int, default=5, help="the same for Original")
    p.add_argument(
        "--original-seconds", type=float, default=120.0,
        help="Original is left out at a number of classes where its rounds would take longer",
    )  # fmt: skip
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = arguments().parse_args(argv)
    if options.quick:
        options.models, options.classes, options.batch, options.size = ["small"], [2, 10], 2, 32
        options.rounds, options.original_rounds, options.warmup = 3, 2, 1
    common.prepare(options)
    return common.finish(run(options), options, draw)


if __name__ == "__main__":
    sys.exit(main())
