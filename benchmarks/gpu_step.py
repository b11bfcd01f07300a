"""What does a training step with heatmaps cost on a GPU? One network in one precision, in one process.

Contestants: plain, eager and under torch.compile; every variant of ISNet with the CUDA kernels; Selective by the PyTorch
reference, eager and compiled, and compiled with the kernels; its maps by autograd's double backward; CUDA-graph replay
of plain and Selective; the authors' code when its folder is given. All are timed in turn. Original, whose step takes
as many maps as classes, runs beside plain in rounds of its own.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import fisnet_cuda as fc
from benchmarks import common, gpu_worker, verify
from benchmarks.cases import CASES, DOUBLE_BACKWARD, PLAIN, VARIANTS, Setup, TrainingStep
from benchmarks.common import Bar, Report, Times, cell
from benchmarks.gpu_worker import Turn

AUTHORS, ORIGINAL = "authors", "original"
LIMITS = {"over_plain": 1.5, "over_compiled_plain": 2.1}  # Selective, ResNet-50, bf16
BUSY_MS = 20.0  # a step is repeated between two looks at the clock until so much has passed

COLUMNS = {
    "net": lambda row: f"{row['model']} at {row['size']}",
    "precision": cell("precision"),
    "training step": cell("text"),
    "classes": cell("classes"),
    "ms": cell("ms", 2),
    "over plain": cell("over_plain"),
    "over compiled plain": cell("over_compiled_plain"),
    "peak, MiB": cell("peak_mib", 0),
    "peak over plain": cell("peak_over_plain"),
}


@dataclass(frozen=True)
class Contestant:
    """One way to make a training step.

    Args:
        case: of `benchmarks.cases`, or "authors".
        backend: "auto" is the kernels, "reference" plain PyTorch.
        compiled: under torch.compile.
        replayed: captured in a CUDA graph.
    """

    case: str
    backend: str = "auto"
    compiled: bool = False
    replayed: bool = False

    @property
    def key(self) -> str:
        """Its name in the rows.

        Example:
            >>> Contestant("selective", "reference", compiled=True).key
            'selective_reference_compiled'
        """
        marks = ("reference", self.backend == "reference"), ("compiled", self.compiled), ("graph", self.replayed)
        return "_".join([self.case, *(word for word, true in marks if true)])

    @property
    def text(self) -> str:
        """Its name in the table.

        Example:
            >>> Contestant("dual").text
            'dual, kernels'
        """
        words = [self.case.replace("_", " ")]
        if self.case in VARIANTS:
            words.append("kernels" if self.backend == "auto" else "PyTorch reference")
        return ", ".join(words + ["compiled"] * self.compiled + ["CUDA graph"] * self.replayed)


PLAIN_COMPILED = Contestant(PLAIN, compiled=True)
# in order of importance: preparing may run out of time
EAGER = [
    Contestant(PLAIN), Contestant("selective"), Contestant("dual"), Contestant("stochastic"),
    Contestant("selective", "reference"), Contestant(DOUBLE_BACKWARD), Contestant(ORIGINAL),
]  # fmt: skip
COMPILED = [
    PLAIN_COMPILED, Contestant("selective", "reference", compiled=True), Contestant("selective", compiled=True),
]  # fmt: skip
REPLAYED = [Contestant(PLAIN, replayed=True), Contestant("selective", replayed=True)]
AUTHORS_STEP = Contestant(AUTHORS)


def run(options: argparse.Namespace) -> Report:
    """Check, prepare and compile; time when it is our turn."""
    report = Report("step", "Time of a training step", common.settings_of(options), common.environment(options.device), COLUMNS)
    turn = Turn(options, report)
    setup = common.setup_of(options, model=options.model, classes=options.classes)
    with gpu_worker.emulating(options.device) as reason:
        if reason:
            report.note(f"the kernels cannot run emulated, the reference runs in their place: {reason}")
        steps, peaks = _prepared(options, report, turn, setup)
        turn.wait()
        if PLAIN in steps:
            _measure(options, report, turn, setup, steps, peaks)
    turn.save()
    return report


# ---- preparing -----------------------------------------------------------------------------------------------


def _prepared(
    options: argparse.Namespace, report: Report, turn: Turn, setup: Setup
) -> tuple[dict[str, Callable[[], None]], dict[str, float]]:
    """Steps that have run a few times, and the peak of memory of each in MiB."""
    contestants = [c for c in EAGER if c.case in (PLAIN, *options.cases)]
    if options.compiler != "none":
        contestants += [c for c in COMPILED[: options.compiled] if c.case in (PLAIN, *options.cases)]
    if options.graphs:
        contestants += [c for c in REPLAYED if c.case in (PLAIN, *options.cases)]
    if options.authors:
        contestants.append(AUTHORS_STEP)
    wrong = turn.attempt("check in float64", lambda: _wrong(options, setup, contestants))
    if wrong is None:
        report.wrong = True
        report.note(f"{setup.model}: nothing but plain is timed, the results could not be checked")
        contestants = [c for c in contestants if c.case == PLAIN]
    for case, reason in (wrong or {}).items():
        report.drop(f"{setup.model}, {case}", reason)
    steps: dict[str, Callable[[], None]] = {}
    peaks: dict[str, float] = {}
    shared = setup.network()
    for contestant in contestants:
        if contestant.case in (wrong or {}):
            continue
        made = turn.attempt(
            f"{setup.model} at {setup.size}, {setup.precision}, {contestant.text}",
            lambda contestant=contestant: _made(options, setup, shared, contestant),
        )
        if made is not None:
            steps[contestant.key], peaks[contestant.key] = made
    return steps, peaks


def _wrong(options: argparse.Namespace, setup: Setup, contestants: Sequence[Contestant]) -> dict[str, str]:
    cases = [case for case in dict.fromkeys(c.case for c in contestants) if case in CASES]
    with gpu_worker.alone(options.device):
        return verify.training_cases(setup, cases)


def _made(
    options: argparse.Namespace, setup: Setup, shared: nn.Module, contestant: Contestant
) -> tuple[Callable[[], None], float]:
    """The step, warm, and its peak memory in MiB: weights, gradients, optimizer state and activations.

    All train the ``shared`` network where they leave it as it is: waiting workers must fit the GPU together.
    """
    for p in shared.parameters():
        p.grad = None
    before = torch.cuda.memory_allocated() if setup.device == "cuda" else 0
    own = contestant.case in (DOUBLE_BACKWARD, AUTHORS)
    weights = 0 if own else sum(t.numel() * t.element_size() for t in (*shared.parameters(), *shared.buffers()))

    def made() -> tuple[TrainingStep, float]:
        if contestant.case == AUTHORS:
            step: TrainingStep = AuthorsStep(setup, options.authors)
        else:
            step = TrainingStep(contestant.case, setup, backend=contestant.backend, model=None if own else shared)
        if contestant.compiled:
            step.net = torch.compile(step.explainer, backend=options.compiler, fullgraph=True)
        step()
        if setup.device != "cuda":
            return step, math.nan
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return step, (torch.cuda.max_memory_allocated() - before + weights) / 2**20

    if contestant.compiled:  # no lock: compiling takes minutes of one core, and little of the GPU
        return made()
    with gpu_worker.alone(setup.device):
        step, peak = made()
        if contestant.replayed:
            return captured(step, setup.device, getattr(step.explainer, "generator", None)), peak
        return step, peak


def captured(
    step: Callable[[], None], device: str, generator: torch.Generator | None = None, warmup: int = 3
) -> Callable[[], None]:
    """A step as a CUDA graph, which replays its kernels without the host; on a CPU the step itself.

    What the step makes (gradients among it) lives in the graph's own memory and is overwritten by every replay.

    Args:
        step: captured after ``warmup`` calls.
        device: "cuda" or "cpu".
        generator: of random draws in the step, beside PyTorch's default one.
        warmup: calls before the capture, on the stream of the capture; on a CPU too.
    """
    if device != "cuda":
        for _ in range(warmup):
            step()
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


class AuthorsStep(TrainingStep):
    """A training step of Selective ISNet by the authors' LRP-Flex (``ISNetFlexTorch.py``), with our loss.

    Args:
        setup: the network and its input.
        folder: a checkout of PedroRASB/FasterISNet.
    """

    def __init__(self, setup: Setup, folder: Path) -> None:
        super().__init__(PLAIN, setup)
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        for module in self.net.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        flex = importlib.import_module("ISNetFlexTorch").ISNetFlex(
            model=self.net, architecture=setup.model, selective=True, Zb=True, multiple=False,
            HiddenLayerPenalization=False, randomLogit=False, explainLabels=False,
        )  # fmt: skip
        self.case, self.net = AUTHORS, _Authors(flex)


class _Authors(nn.Module):
    """Their module, called like ours."""

    def __init__(self, flex: nn.Module) -> None:
        super().__init__()
        self.flex = flex

    def forward(self, x: Tensor, relevance: bool = True) -> fc.ISNetOutput:
        out = self.flex(x, runLRPFlex=True)
        logits, maps = out["output"], out["LRPFlex"]["input"]
        heatmaps = maps.reshape(x.shape[0], -1, *x.shape[1:])
        return fc.ISNetOutput(logits, heatmaps, {}, logits.argmin(1, keepdim=True))


# ---- timing --------------------------------------------------------------------------------------------------


def _measure(
    options: argparse.Namespace, report: Report, turn: Turn, setup: Setup, steps: dict[str, Callable[[], None]],
    peaks: dict[str, float],
) -> None:  # fmt: skip
    label = f"{setup.model} at {setup.size}, {setup.precision}"
    slow = [key for key in steps if key == ORIGINAL]
    for keys, share, rounds in (
        ([key for key in steps if key not in slow], 0.75, options.rounds),
        ([PLAIN, *slow] if slow else [], 0.25, max(common.LEAST_ROUNDS, options.rounds // 4)),
    ):
        if not keys:
            continue
        calls = _calls(steps[PLAIN], setup.device) if ORIGINAL not in keys else 1
        group = {key: steps[key] for key in keys}
        seconds = share * turn.seconds
        times = common.interleave(group, rounds, options.warmup, options.device, label, seconds, calls)
        _rows(report, turn, setup, times, peaks, calls)
        turn.save()
    selective = next((row for row in report.rows if row["case"] == "selective"), None)
    if selective and (setup.model, setup.precision, setup.size) == ("resnet50", "bf16", 224):
        judged = "H100" in report.environment["device"]
        for over, limit in LIMITS.items():
            if over in selective:
                name = f"training step, {label}, selective {over.replace('_', ' ')}"
                report.bars.append(Bar(name, common.Spread(**selective[over]), limit, judged=judged))


def _calls(step: Callable[[], None], device: str) -> int:
    if device != "cuda":
        return 1
    step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return max(1, min(10, math.ceil(BUSY_MS / (1e3 * (time.perf_counter() - start)))))


def _rows(report: Report, turn: Turn, setup: Setup, times: Times, peaks: dict[str, float], calls: int) -> None:
    texts = {c.key: c.text for c in (*EAGER, *COMPILED, *REPLAYED, AUTHORS_STEP)}
    for key in times.ms:
        if key == PLAIN and any(row["case"] == PLAIN for row in report.rows):
            continue  # beside Original, for the ratio only
        row: dict[str, Any] = {"ms": times.spread(key), "over_plain": times.ratio(key, PLAIN)}
        if PLAIN_COMPILED.key in times.ms:
            row["over_compiled_plain"] = times.ratio(key, PLAIN_COMPILED.key)
        if not math.isnan(peaks.get(key, math.nan)):
            row["peak_mib"], row["peak_over_plain"] = peaks[key], peaks[key] / peaks[PLAIN]
        report.add(
            **setup.as_row(), case=key, text=texts[key], **row, rounds=len(times.ms[key]), calls=calls, all_ms=times.ms[key]
        )
        turn.say(f"{texts[key]}: {row['ms'].p50:.2f} ms, {row['over_plain'].p50:.2f} times plain")


# ---- the command ---------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    p = common.parser(__doc__)
    gpu_worker.options_of(p)
    p.add_argument("--model", default="resnet50")
    p.add_argument("--cases", nargs="+", choices=CASES[1:], default=list(CASES[1:]), help="beside plain")
    p.add_argument("--classes", type=int, default=10)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--size", type=int, default=224, help="height and width of the images")
    p.add_argument("--rounds", type=int, default=20, help="how often each is timed, while there is time")
    p.add_argument("--warmup", type=int, default=2, help="rounds before that")
    p.add_argument("--compiler", default="inductor", help="backend of torch.compile; none leaves it out")
    p.add_argument("--compiled", type=int, default=3, help="how many are compiled: plain, the reference, the kernels")
    p.add_argument("--graphs", action="store_true", help="also replay plain and Selective as CUDA graphs")
    p.add_argument("--authors", type=Path, help="folder of the authors' code (PedroRASB/FasterISNet)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = arguments().parse_args(argv)
    if options.quick:
        options.model, options.batch, options.size, options.classes = "small", 2, 32, 3
        options.rounds, options.warmup = 3, 1
        options.compiler = "aot_eager" if options.compiler == "inductor" else options.compiler
    common.prepare(options)
    return gpu_worker.finish(run(options), options)


if __name__ == "__main__":
    gpu_worker.leave(main())
