"""Which kernel runs each layer's products, and what is gained? Every choice of the dispatcher in a training step, measured again.

A first step decides every layer on live tensors, as in any training: candidate 0 (the library's product and the project's
pointwise kernels) and each tile shape of the fused kernel, verified and timed with a cold L2 cache. A second step measures each
chosen kernel and candidate 0 anew, in turns: the numbers that judge a choice are not those that made it. Layers of the same
shapes share a choice, and a row.

Exit code: 1 when a chosen kernel is slower than candidate 0, when a kernel computed something wrong, or when nothing could be
measured. Without a GPU the kernels run emulated and times are made up: choices are made and checked, but no time is shown.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import itertools
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import fisnet_cuda as fc
from benchmarks import choices, common, gpu_worker
from benchmarks.cases import VARIANTS, Setup, TrainingStep
from benchmarks.choices import MadeUp
from benchmarks.common import Bar, Report, Spread, cell
from benchmarks.gpu_worker import Turn
from benchmarks.models import MODELS
from fisnet_cuda import _backend
from fisnet_cuda.dispatch.key import Key, tf32
from fisnet_cuda.dispatch.policy import LIBRARY, VARIABLE
from fisnet_cuda.dispatch.timing import CudaTimer, Timer, undisturbed
from fisnet_cuda.ops import library

AGAIN, DOUBTFUL = 3, 7  # rounds of the second measurement; of one that says "slower", for noise must not decide
UNDECIDED = "not measured"


def run(options: argparse.Namespace, timer: Timer | None = None) -> Report:
    """Decide every layer, measure the choices again, and say what they gain.

    Args:
        options: of `arguments`.
        timer: measures; CUDA events by default, and made-up times without a GPU.
    """
    report = Report(
        "dispatch", "Which kernel runs each layer, and what it gains", common.settings_of(options),
        common.environment(options.device), COLUMNS,
    )  # fmt: skip
    report.settings["made_up"] = made_up = timer is None and options.device == "cpu"
    turn = Turn(options, report)
    timer = timer or (MadeUp() if made_up else CudaTimer())
    with contextlib.ExitStack() as stack:
        reason = stack.enter_context(gpu_worker.emulating(options.device))
        path = options.cache or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "dispatch.json"
        stack.enter_context(choices.kept_in(path, timer))
        if reason:
            report.note(f"the kernels cannot run emulated, so there is nothing to choose from: {reason}")
        if made_up:
            report.note("no GPU here: the choices were made by made-up times, to see that everything works, and no time is shown")
        if os.environ.get(VARIABLE):
            report.note(f"{VARIABLE} is set: what it forces is not measured")
        pairs = itertools.product(options.models, options.cases)
        nets = [Net(options, report, turn, timer, model, case) for model, case in pairs if not _known(turn, options, model, case)]
        if options.first:
            _decide_first(options, turn, nets)
        turn.wait()
        for net in nets:
            if turn.left <= 0:
                report.lack(net.label, "the time was over")
                continue
            try:
                net.measure()
            except Exception as error:
                report.lack(net.label, gpu_worker.brief(error))
                report.failed = True
            gpu_worker.free()
            turn.save()
    turn.save()
    return report


def _known(turn: Turn, options: argparse.Namespace, model: str, case: str) -> bool:
    """Whether an earlier run has the choices of a network."""
    fields = {key: getattr(options, key) for key in ("size", "batch", "precision")}
    return turn.known(model=model, case=case, classes=options.classes, **fields)


def _decide_first(options: argparse.Namespace, turn: Turn, nets: Sequence[Net]) -> None:
    """Decide while others wait for the GPU, so that they find these choices."""
    with gpu_worker.alone(options.device):
        print(gpu_worker.ALONE, flush=True)
        begin = time.perf_counter()
        for net in nets:
            left = options.first - (time.perf_counter() - begin)
            if left > 0:
                turn.attempt(f"{net.label}, choices", lambda net=net, left=left: net.decided(left))
                gpu_worker.free()


# ---- what a step runs ----------------------------------------------------------------------------------------


@dataclass
class Use:
    """A call that the dispatcher decides, and the layers whose calls are the same.

    Args:
        key: of the decision.
        calls: in one step.
        layers: names, each once.
        again: milliseconds of candidate 0 and of the chosen kernel, measured after the decision.
        why: there is no decision; empty where there is one.
    """

    key: Key
    calls: int = 0
    layers: dict[str, None] = field(default_factory=dict)
    again: dict[str, list[float]] = field(default_factory=dict)
    why: str = ""

    @property
    def entry(self) -> Mapping[str, Any]:
        """The decision; one without candidates where nothing was measured."""
        nothing = {"choice": LIBRARY, "medians": {}, "margins": {}, "errors": {}, "blacklisted": {}}
        return {**nothing, **(choices.dispatcher().cache.get(str(self.key)) or {})}


class Watch:
    """Sees every call of `fisnet_cuda.dispatch.run` in a training step, and the layer that it belongs to.

    Args:
        step: an ISNet's.
        look: what to do with a call after it has run: ``look(use, name, operands, options)``.
    """

    def __init__(self, step: TrainingStep, look: Callable[[Use, str, tuple, dict], None] | None = None) -> None:
        self.step, self.look = step, look
        self.uses: dict[str, Use] = {}
        self._layer = ""
        self._nodes: set[Any] = set()  # of autograd's graph, whose layer is known

    def __call__(self) -> dict[str, Use]:
        """Run the step; returns what it used, in the order of the first call."""
        inner = fc.dispatch.run

        def run(name: str, backend: str, *operands: Any, **options: Any) -> tuple:
            outputs = inner(name, backend, *operands, **options)
            if backend != "reference" and operands[0].device.type in _backend.KERNEL_DEVICES:
                self._see(name, operands, options)
            return outputs

        fc.dispatch.run = run
        try:
            with self._named():
                self.step()
        finally:
            fc.dispatch.run = inner
            self._nodes.clear()
        return self.uses

    def _see(self, name: str, operands: tuple, options: dict) -> None:
        key = Key.of(name, operands, options)
        use = self.uses.setdefault(str(key), Use(key))
        use.calls += 1
        use.layers[self._layer] = None
        if self.look is not None and use.calls == 1:
            self.look(use, name, operands, options)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Inside, instructions of the relevance programs say which layer they serve, when they run and in their backward."""
        programs = {id(p): p for pair in self.step.explainer._programs.values() for p in pair}.values()
        before = [(program, program._forward, program._relevance) for program in programs]
        for program, forward, relevance in before:
            program._forward = self._wrapped(forward, program.lowered.forward)
            program._relevance = self._wrapped(relevance, program.lowered.relevance)
        try:
            yield
        finally:
            for program, forward, relevance in before:
                program._forward, program._relevance = forward, relevance

    def _wrapped(self, calls: tuple, instrs: tuple) -> tuple:
        return tuple(call._replace(fn=self._naming(call.fn, instr.layer)) for call, instr in zip(calls, instrs, strict=True))

    def _naming(self, fn: Callable, layer: str) -> Callable:
        def named(*args: Any, **kwargs: Any) -> Any:
            self._layer = layer
            result = fn(*args, **kwargs)
            self._mark(result, layer)
            return result

        return named

    def _mark(self, result: Any, layer: str) -> None:
        """Every node of autograd's graph that is new since the last instruction is this one's."""
        nodes = [t.grad_fn for t in _tensors(result)]
        while nodes:
            node = nodes.pop()
            if node is None or node in self._nodes:
                continue
            self._nodes.add(node)
            node.register_prehook(functools.partial(self._enter, layer))
            nodes += [following for following, _ in node.next_functions]

    def _enter(self, layer: str, *_: Any) -> None:
        self._layer = layer


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (tuple, list)):
        return [t for part in value for t in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


# ---- one network ---------------------------------------------------------------------------------------------


class Net:
    """One network under one variant of ISNet.

    Args:
        options, report, turn: of the run.
        timer: measures again.
        model, case: which.
    """

    def __init__(
        self, options: argparse.Namespace, report: Report, turn: Turn, timer: Timer, model: str, case: str
    ) -> None:  # fmt: skip
        self.report, self.turn, self.timer, self.case = report, turn, timer, case
        self.setup: Setup = common.setup_of(options, model=model, classes=options.classes)
        self.label = f"{model} at {options.size}, {options.precision}, {case}"
        self.made_up: bool = report.settings["made_up"]
        self.seconds, self.fresh = 0.0, 0  # of deciding

    def decided(self, seconds: float) -> TrainingStep:
        """The step, after one run of it: then all choices are made that nobody has made before, if the time suffices."""
        step = TrainingStep(self.case, self.setup)
        found = choices.decide([step], seconds)
        self.seconds, self.fresh = self.seconds + found.seconds, self.fresh + found.fresh
        if found.refused:
            self.turn.say(f"{self.label}: there was no time for {found.refused} choices")
        return step

    def measure(self) -> None:
        """Decide what is undecided, measure the choices again, and add the rows."""
        step = self.decided(self.turn.left)
        with choices.postponed():
            uses = Watch(step, self._look)()
        rows = [self._row(use) for use in uses.values()]
        for row in sorted(rows, key=lambda row: -(row["margin"] or 0.0)):
            self.report.add(**row)
        self._sum_up(rows)

    def _look(self, use: Use, name: str, operands: tuple, options: dict) -> None:
        choice, kernel = use.entry["choice"], _backend.fused(name)
        if not (use.entry["medians"] or use.entry["blacklisted"]):
            use.why = _why_not(kernel, name, operands, options)
        elif choice != LIBRARY:
            self._again(use, choice, kernel, name, operands, options)

    def _again(self, use: Use, choice: str, kernel: Callable, name: str, operands: tuple, options: dict) -> None:
        """Measure candidate 0 and the chosen kernel on live tensors once more; longer where the kernel seems to be slower."""
        runs = [
            functools.partial(getattr(library, name), *operands, **options),
            functools.partial(kernel, *operands, **options, tile=choice.split("/", 1)[1]),
        ]
        use.again = {LIBRARY: [], choice: []}
        with undisturbed(operands[0].device):
            for rounds in (AGAIN, DOUBTFUL):
                while len(use.again[choice]) < rounds:
                    for times, ms in zip(use.again.values(), self.timer.round(runs)):
                        times.append(ms)
                if not _slower(*use.again.values()):
                    return

    def _row(self, use: Use) -> dict[str, Any]:
        entry, choice = use.entry, use.entry["choice"]
        ratio = None
        if use.again:
            ratio = Spread.of([t / t0 for t, t0 in zip(use.again[choice], use.again[LIBRARY])])
        row = {
            **self.setup.as_row(), "case": self.case, "op": use.key.op, "operands": dict(use.key.operands), "mode": use.key.mode,
            "layers": list(use.layers), "calls": use.calls, "choice": choice, "measured": bool(entry["medians"]), "why": use.why,
            "medians": entry["medians"], "margin": entry["margins"].get(choice), "margins": entry["margins"], "again": use.again,
            "over_library": ratio, "slower": bool(use.again) and _slower(*use.again.values()), "errors": entry["errors"],
            "blacklisted": entry["blacklisted"], "made_up": self.made_up,
        }  # fmt: skip
        if self.made_up:  # no number that could be taken for a measurement
            row.update(medians={}, margins={}, margin=None, again={}, over_library=None)
        return row

    def _sum_up(self, rows: list[dict[str, Any]]) -> None:
        report, label = self.report, self.label
        if not rows:
            if self.setup.device == "cuda":
                report.note(f"{label}: no call went through the dispatcher")
                report.failed = True
            return
        measured = [row for row in rows if row["measured"]]
        fused = [row for row in rows if row["choice"] != LIBRARY]
        text = f"{label}: {len(rows)} choices for {sum(row['calls'] for row in rows)} calls a step, {len(fused)} of them fused"
        reasons = Counter(row["why"] for row in rows if row["why"])
        text += "".join(f"; {count} {UNDECIDED}, {why}" for why, count in reasons.most_common())
        report.note(text)
        if self.setup.device == "cuda" and not measured:
            report.note(f"{label}: nothing was measured")
            report.failed = True
        for row in rows:
            what = f"{label}, {', '.join(grouped(row['layers']))}, {row['op']}"
            for name, reason in row["blacklisted"].items():
                report.wrong = True
                report.note(f"{what}: {name} is WRONG, {reason}")
            if row["slower"]:
                report.failed = True
                how = "" if self.made_up else f", {row['over_library'].p50:.3f} times"
                report.note(f"{what}: {row['choice']} was chosen and is SLOWER than candidate 0{how}")
        if self.made_up:
            self.turn.say(text)
            return
        report.note(f"{label}: deciding took {self.seconds:.1f} s for {self.fresh} new choices; never part of a step's time")
        worst = max((row["over_library"] for row in fused), default=None, key=lambda ratio: ratio.p50)
        if worst is not None:
            report.bars.append(Bar(f"{label}, time of the worst chosen kernel over candidate 0", worst, 1.0))
        before, saved = self._totals(rows)
        report.note(f"{label}: candidate 0 takes {before:.2f} ms a step in these ops, the choices save {saved:.2f} ms of it")
        self.turn.say(f"{text}; they save {saved:.2f} of {before:.2f} ms")

    @staticmethod
    def _totals(rows: list[dict[str, Any]]) -> tuple[float, float]:
        """Milliseconds a step of candidate 0, and what the choices save of them; of calls that were measured."""
        before = saved = 0.0
        for row in rows:
            if row["medians"]:
                t0 = statistics.median(row["again"].get(LIBRARY) or row["medians"][LIBRARY])
                before += row["calls"] * t0
            if row["again"]:
                saved += row["calls"] * (t0 - statistics.median(row["again"][row["choice"]]))
        return before, saved


def _why_not(kernel: Callable | None, name: str, operands: tuple, options: dict) -> str:
    """Why a call has no decision."""
    if kernel is None:
        return "there is no fused kernel"
    if why := kernel.serves(*operands, **options):
        return f"the fused kernel does not serve {why}"
    if operands[0].dtype == torch.float32 and not tf32(name, operands, options):
        return "float32 products, where TF32 is off"
    if fc.dispatch.planned(name) != "library|fused":
        return f"forced to {fc.dispatch.planned(name)}"
    return "no time or memory for it, or a result that tells nothing (zero, not finite)"


def _slower(library_ms: Sequence[float], chosen_ms: Sequence[float]) -> bool:
    """Whether the chosen kernel is slower than candidate 0 in the median of the rounds."""
    return statistics.median(t / t0 for t, t0 in zip(chosen_ms, library_ms)) > 1


# ---- for people ----------------------------------------------------------------------------------------------


def grouped(layers: Iterable[str]) -> list[str]:
    """Layer names, those that differ in one number together.

    Example:
        >>> grouped(["layer1.0.conv1", "layer1.1.conv1", "layer1.2.conv1", "layer2.0.conv1", "fc"])
        ['layer1.[0-2].conv1', 'layer2.0.conv1', 'fc']
    """
    found: list[tuple[str, list[str]]] = []  # a name, and the numbers that stand in it
    for layer in layers:
        for index, (shape, numbers) in enumerate(found):
            split = _fits(shape, layer) if numbers else _differ(shape, layer)
            if split:
                found[index] = (split[0], [*numbers, *split[1]])
                break
        else:
            found.append((layer, []))
    return [shape.replace(HOLE, _ranges(numbers)) for shape, numbers in found]


HOLE = "\0"


def _differ(first: str, second: str) -> tuple[str, list[str]] | None:
    """The common name of two that differ in one number."""
    a, b = (re.split(r"(\d+)", name) for name in (first, second))
    places = [i for i, (x, y) in enumerate(zip(a, b)) if x != y]
    if len(a) != len(b) or len(places) != 1 or places[0] % 2 == 0:
        return None
    (i,) = places
    return "".join([*a[:i], HOLE, *a[i + 1 :]]), [a[i], b[i]]


def _fits(shape: str, name: str) -> tuple[str, list[str]] | None:
    """The number with which ``shape`` is ``name``."""
    before, after = shape.split(HOLE)
    number = re.fullmatch(re.escape(before) + r"(\d+)" + re.escape(after), name)
    return (shape, [number[1]]) if number else None


def _ranges(numbers: Sequence[str]) -> str:
    values = sorted({int(n) for n in numbers})
    runs: list[list[int]] = []
    for v in values:
        if runs and v == runs[-1][1] + 1:
            runs[-1][1] = v
        else:
            runs.append([v, v])
    return "[" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "]"


def shapes(operands: Mapping[str, str]) -> str:
    """What is multiplied: the first operand, the weight, the stride where it is not 1.

    Example:
        >>> shapes({"s": "bfloat16[64,256,56,56] channels_last", "W": "bfloat16[256,64,1,1]", "geometry": "(2,(2,2),(0,0),(1,1),1)"})
        '64x256x56x56 by 256x64x1x1, stride 2'
    """
    first = next(iter(operands.values()))
    sizes = [re.sub(r".*\[(.*)\].*", r"\1", operand).replace(",", "x") for operand in (first, operands["W"])]
    stride = ast.literal_eval(operands["geometry"])[1] if "geometry" in operands else ()
    return " by ".join(sizes) + (f", stride {max(stride)}" if max(stride, default=1) > 1 else "")


def with_what(row: Mapping[str, Any]) -> str:
    """The op, and its further operands that are there."""
    more = [name for name, word in row["operands"].items() if "[" in word and name != "W"][1:]
    return " +".join([row["op"], *more])


def _us(row: Mapping[str, Any], name: str) -> str:
    return " ".join(f"{1e3 * t:.1f}" for t in row["medians"][name])


def _others(row: Mapping[str, Any]) -> str:
    """Every fused candidate: medians of both rounds, gain over candidate 0, error; or why it is out."""
    told = []
    for name in dict.fromkeys([*row["errors"], *row["medians"], *row["blacklisted"]]):
        if name == LIBRARY:
            continue
        if name in row["blacklisted"]:
            told.append(f"{name} OUT: {row['blacklisted'][name]}")
            continue
        words = [name, *([_us(row, name), f"{row['margins'][name]:+.1%}"] if name in row["medians"] else [])]
        told.append(" ".join([*words, f"error {_error(row, name)}"]))
    return "; ".join(told) or row["why"]


def _error(row: Mapping[str, Any], name: str) -> str:
    return f"{max(row['errors'].get(name) or [0.0]):.1e}"


COLUMNS = {
    "net": lambda row: f"{row['model']} at {row['size']}, {row['precision']}, {row['case']}",
    "layers": lambda row: ", ".join(grouped(row["layers"])),
    "op": with_what,
    "dtype": lambda row: next(iter(row["operands"].values())).split("[")[0],
    "sizes": lambda row: shapes(row["operands"]),
    "calls": cell("calls"),
    "choice": lambda row: (row["choice"] + " (made up)" * row["made_up"]) if row["measured"] else UNDECIDED,
    "margin": lambda row: "-" if row["margin"] is None else f"{row['margin']:+.1%}",
    "again, over candidate 0": lambda row: "-" if row["over_library"] is None else cell("over_library", 3)(row),
    "candidate 0, us in both rounds": lambda row: _us(row, LIBRARY) if row["medians"] else "-",
    "its error": lambda row: _error(row, LIBRARY) if row["errors"] else "-",
    "fused candidates: us in both rounds, gain, error": _others,
}


def draw(report: Report, path: Path) -> None:
    """A panel a network: the time of the best fused kernel of each choice over candidate 0's, sorted."""
    from benchmarks import figures  # needs matplotlib

    panels: dict[str, list[figures.Dot]] = {}
    for row in report.rows:
        ratios = {n: max(t / t0 for t, t0 in zip(row["medians"][n], row["medians"][LIBRARY])) for n in row["margins"]}
        if not ratios:
            continue
        chosen = row["choice"] != LIBRARY
        value = Spread(**row["over_library"]) if chosen else Spread(*[min(ratios.values())] * 3)
        label = f"{', '.join(grouped(row['layers']))[:60]}  {row['op']}  {shapes(row['operands'])}"
        panels.setdefault(COLUMNS["net"](row), []).append(figures.Dot(label, value, chosen))
    figures.dots(
        path, "What fused kernels gain, layer by layer", figures.machine(report.environment), panels,
        "time over the library's product with pointwise kernels",
        chosen_text="chosen (measured again after the choice)", other_text="not chosen (the best one)",
    )  # fmt: skip


# ---- the command ---------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    p = common.parser(__doc__)
    gpu_worker.options_of(p)
    p.add_argument("--models", nargs="+", choices=MODELS, default=["resnet50", "resnet18", "densenet121", "vgg16_bn"])
    p.add_argument("--cases", nargs="+", choices=VARIANTS, default=["selective", "dual"])
    p.add_argument("--classes", type=int, default=10)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--size", type=int, default=224, help="height and width of the images")
    p.add_argument("--cache", type=Path, help="keep the choices in this file, and believe those that are there; a fresh one")
    p.add_argument("--first", type=float, default=0.0, help="decide for so many seconds, alone on the GPU, before READY")
    p.set_defaults(seconds=600.0, precision="bf16")
    return p


def main(argv: Sequence[str] | None = None, timer: Timer | None = None) -> int:
    """The command; returns the exit code."""
    options = arguments().parse_args(argv)
    if options.quick:
        options.models, options.batch, options.size, options.classes = ["small"], 2, 16, 3
    common.prepare(options)
    report = run(options, timer)
    if options.part or report.settings["made_up"] or not any(row["margins"] for row in report.rows):
        return gpu_worker.finish(report, options)
    return common.finish(report, options, draw)


if __name__ == "__main__":
    gpu_worker.leave(main())
