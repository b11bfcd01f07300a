"""What does a training step with heatmaps cost on a GPU? One network in one precision, in one process.

Contestants: plain, eager and under torch.compile; every variant of ISNet with the CUDA kernels, a fused one wherever the
dispatcher has found it faster; Selective and Dual with the library's products everywhere, which shows what fusing gains;
Selective by the PyTorch reference, eager and compiled, and compiled with the kernels; its maps by autograd's double backward;
CUDA-graph replay of plain and Selective; the authors' code when its folder is given. All are timed in turn. Original, whose
step takes as many maps as classes, runs beside plain in rounds of its own.

What the dispatcher has not measured before is measured in a step of its own, when nothing else runs on the GPU, before graphs
are captured and anything is timed. Compiled code keeps the choices that were known when it was compiled.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import fisnet_cuda as fc
from benchmarks import choices, common, gpu_worker, verify
from benchmarks.cases import CASES, DOUBLE_BACKWARD, PLAIN, VARIANTS, Setup, TrainingStep
from benchmarks.common import Bar, Report, Times, cell
from benchmarks.gpu_worker import Turn
from benchmarks.kernels import own_code

AUTHORS, ORIGINAL = "authors", "original"
# ResNet-50, bf16, 224 pixels
LIMITS = {
    "selective": {"over_plain": 1.2, "over_compiled_plain": 1.7},
    "dual": {"over_plain": 1.9, "over_compiled_plain": 2.7},
}
BUSY_MS = 20.0  # a step is repeated between two looks at the clock until so much has passed

COLUMNS = {
    "net": lambda row: f"{row['model']} at {row['size']}",
    "precision": cell("precision"),
    "training step": cell("text"),
    "classes": cell("classes"),
    "ms": cell("ms", 2),
    "over plain": cell("over_plain"),
    "over compiled plain": cell("over_compiled_plain"),
    "over library products": cell("over_library_products"),
    "peak, MiB": cell("peak_mib", 0),
    "peak over plain": cell("peak_over_plain"),
}


@dataclass(frozen=True)
class Contestant:
    """One way to make a training step.

    Args:
        case: of `benchmarks.cases`, or "authors".
        backend: "auto" is the kernels, "reference" plain PyTorch.
        products: "library" forces the library's products with pointwise kernels; "" is what the dispatcher chooses.
        compiled: under torch.compile.
        replayed: captured in a CUDA graph.
    """

    case: str
    backend: str = "auto"
    products: str = ""
    compiled: bool = False
    replayed: bool = False

    @property
    def chooses(self) -> bool:
        """Whether the dispatcher decides what it runs."""
        return self.case in VARIANTS and self.backend == "auto" and not self.products

    @property
    def key(self) -> str:
        """Its name in the rows.

        Example:
            >>> Contestant("selective", "reference", compiled=True).key
            'selective_reference_compiled'
        """
        words = [self.case, "reference" * (self.backend == "reference"), self.products]
        words += ["compiled" * self.compiled, "graph" * self.replayed]
        return "_".join(filter(None, words))

    @property
    def text(self) -> str:
        """Its name in the table.

        Example:
            >>> Contestant("dual").text
            'dual, kernels'
        """
        words = [self.case.replace("_", " ")]
        if self.case in VARIANTS:
            words.append(f"{self.products} products" if self.products else "kernels" if self.backend == "auto" else "PyTorch reference")
        return ", ".join(words + ["compiled"] * self.compiled + ["CUDA graph"] * self.replayed)


PLAIN_COMPILED = Contestant(PLAIN, compiled=True)
# in order of importance: preparing may run out of time
EAGER = [
    Contestant(PLAIN), Contestant("selective"), Contestant("stochastic"), Contestant("dual"),
    Contestant("selective", products="library"), Contestant("dual", products="library"), Contestant("selective", "reference"),
    Contestant(DOUBLE_BACKWARD), Contestant(ORIGINAL),
]  # fmt: skip
COMPILED = [
    PLAIN_COMPILED, Contestant("selective", "reference", compiled=True), Contestant("selective", compiled=True),
    Contestant("selective", products="library", compiled=True),
]  # fmt: skip
REPLAYED = [
    Contestant(PLAIN, replayed=True), Contestant("selective", replayed=True),
    Contestant("selective", products="library", replayed=True),
]  # fmt: skip
AUTHORS_STEP = Contestant(AUTHORS)


def run(options: argparse.Namespace) -> Report:
    """Check, prepare and compile; time when it is our turn."""
    report = Report("step", "Time of a training step", common.settings_of(options), common.environment(options.device), COLUMNS)
    turn = Turn(options, report)
    setup = common.setup_of(options, model=options.model, classes=options.classes)
    with gpu_worker.emulating(options.device) as reason:
        if reason:
            report.note(f"the kernels cannot run emulated, the reference runs in their place: {reason}")
        made = _prepared(options, report, turn, setup)
        turn.wait()
        if PLAIN in made:
            _decided(report, turn, setup, made)
            with choices.postponed():  # a step that measures is no step
                _captured(turn, setup, made)
                _measure(options, report, turn, setup, made)
    turn.save()
    return report


# ---- preparing -----------------------------------------------------------------------------------------------


@dataclass
class Made:
    """A contestant that is ready.

    Args:
        contestant: which.
        step: one training step.
        own: bytes that it holds between two steps, the shared network included.
        peak: of memory in MiB, weights, gradients, optimizer state and activations; NaN on a CPU.
        postponed: calls that ran candidate 0 when it was made because nothing was to be measured then.
    """

    contestant: Contestant
    step: Callable[[], None]
    own: int
    peak: float
    postponed: int = 0


def _prepared(options: argparse.Namespace, report: Report, turn: Turn, setup: Setup) -> dict[str, Made]:
    """Contestants by key, after a few steps of each; those to be replayed are not captured yet."""
    contestants = _left(turn, setup, wanted(options))
    if not contestants:
        return {}
    wrong = turn.attempt("check in float64", lambda: _wrong(options, setup, contestants))
    if wrong is None:
        report.wrong = True
        report.lack(setup.model, "nothing but plain is timed, the results could not be checked")
        contestants = [c for c in contestants if c.case == PLAIN]
    for case, reason in (wrong or {}).items():
        report.drop(f"{setup.model}, {case}", reason)
    found: dict[str, Made] = {}
    shared = setup.network()
    for contestant in contestants:
        if contestant.case in (wrong or {}):
            continue
        if contestant == PLAIN_COMPILED and not options.wait:
            _decided(report, turn, setup, found)  # nobody disturbs it: what is compiled now keeps its choices
        made = turn.attempt(
            f"{setup.model} at {setup.size}, {setup.precision}, {contestant.text}",
            lambda contestant=contestant: _made(options, setup, shared, contestant),
        )
        if made is not None:
            found[contestant.key] = made
            if contestant.compiled and contestant.chooses and made.postponed:
                report.note(f"{contestant.text}: compiled before all of its products were measured, those run candidate 0")
    return found


def wanted(options: argparse.Namespace) -> list[Contestant]:
    """Who takes part."""
    contestants = list(EAGER)
    if options.compiler != "none":
        contestants += COMPILED[: options.compiled]
    if options.graphs:
        contestants += REPLAYED
    return [c for c in contestants if c.case in (PLAIN, *options.cases)] + [AUTHORS_STEP] * bool(options.authors)


def _left(turn: Turn, setup: Setup, contestants: list[Contestant]) -> list[Contestant]:
    """Those that no earlier run has timed, and what they are compared with; nobody where all have been."""
    left = [c for c in contestants if not turn.known(**setup.as_row(), case=c.key)]
    if not left:
        return []
    library = [c for c in contestants if c.products and any(o.chooses and o.case == c.case for o in left)]
    return [c for c in contestants if c in (*left, *library, Contestant(PLAIN), PLAIN_COMPILED)]


def _wrong(options: argparse.Namespace, setup: Setup, contestants: Sequence[Contestant]) -> dict[str, str]:
    cases = [case for case in dict.fromkeys(c.case for c in contestants) if case in CASES]
    with gpu_worker.alone(options.device), choices.postponed():
        return verify.training_cases(setup, cases)


def _made(options: argparse.Namespace, setup: Setup, shared: nn.Module, contestant: Contestant) -> Made:
    """The contestant, warm. The dispatcher does not measure here, beside other workers: see `_decided`.

    All train the ``shared`` network where they leave it as it is: waiting workers must fit the GPU together.
    """
    for p in shared.parameters():
        p.grad = None
    before = torch.cuda.memory_allocated() if setup.device == "cuda" else 0
    own = contestant.case in (DOUBLE_BACKWARD, AUTHORS)
    weights = 0 if own else sum(t.numel() * t.element_size() for t in (*shared.parameters(), *shared.buffers()))

    def made() -> Made:
        if contestant.case == AUTHORS:
            training: TrainingStep = AuthorsStep(setup, options.authors)
        else:
            training = TrainingStep(contestant.case, setup, backend=contestant.backend, model=None if own else shared)
        if contestant.compiled:
            training.net = _compiled(training.explainer, options.compiler)
        step = Forced(training, f"*={contestant.products}") if contestant.products else training
        with choices.postponed() as waiting:
            step()
            for p in training.parameters:
                p.grad = None
            held = weights + (torch.cuda.memory_allocated() - before if setup.device == "cuda" else 0)
            return Made(contestant, step, held, _peak(step, training, held), waiting.refused)

    if contestant.compiled:  # no lock: compiling takes minutes of one core, and little of the GPU
        return made()
    with gpu_worker.alone(setup.device):
        return made()


class Forced:
    """A step with the dispatcher's hands tied, as ``FISNET_DISPATCH`` would.

    Args:
        step: what runs.
        rules: of `fisnet_cuda.dispatch.forced`.
    """

    def __init__(self, step: TrainingStep, rules: str) -> None:
        self.step, self.rules = step, rules

    @property
    def explainer(self) -> nn.Module:
        """The step's."""
        return self.step.explainer

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The step's."""
        return self.step.parameters

    def __call__(self) -> None:
        with fc.dispatch.forced(self.rules):
            self.step()


def _compiled(net: nn.Module, compiler: str) -> Callable:
    """The network under torch.compile, in code of its own: else contestants of one class would share what was compiled."""
    return torch.compile(own_code(lambda *args, **kwargs: net(*args, **kwargs)), backend=compiler, fullgraph=True)


def _peak(step: Callable[[], None], training: Any, held: int) -> float:
    """Peak memory of a step in MiB, where ``held`` bytes of what is allocated now are the contestant's; NaN on a CPU."""
    if training.setup.device != "cuda":
        return math.nan
    for p in training.parameters:
        p.grad = None
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - start + held) / 2**20


def _decided(report: Report, turn: Turn, setup: Setup, made: dict[str, Made]) -> None:
    """Let the dispatcher measure what is left to measure, now that nobody disturbs it, in a part of the time at most."""
    choosing = [m for m in made.values() if m.contestant.chooses and not m.contestant.compiled]
    found = choices.decide((m.step for m in choosing), choices.SHARE * turn.seconds)
    label = f"{setup.model} at {setup.size}, {setup.precision}"
    if found.fresh:
        report.note(f"{label}: {found.fresh} new choices of the dispatcher took {found.seconds:.1f} s, no part of any step's time")
        for m in choosing:
            with choices.postponed():
                m.peak = _peak(m.step, m.step, m.own)
    if found.refused:
        report.note(f"{label}: no time to measure {found.refused} calls, which run candidate 0")


def _captured(turn: Turn, setup: Setup, made: dict[str, Made]) -> None:
    """Capture what is to be replayed, with the choices that are known."""
    for key, m in list(made.items()):
        if not m.contestant.replayed:
            continue
        generator = getattr(m.step.explainer, "generator", None)
        step = turn.attempt(m.contestant.text, lambda m=m, generator=generator: captured(m.step, setup.device, generator), late=True)
        if step is None:
            del made[key]
        else:
            m.step = step


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
    options: argparse.Namespace, report: Report, turn: Turn, setup: Setup, made: dict[str, Made]
) -> None:  # fmt: skip
    steps = {key: m.step for key, m in made.items()}
    label, left = f"{setup.model} at {setup.size}, {setup.precision}", turn.left
    slow = [key for key in steps if key == ORIGINAL]
    for keys, share, rounds in (
        ([key for key in steps if key not in slow], 0.75, options.rounds),
        ([PLAIN, *slow] if slow else [], 0.25, max(common.LEAST_ROUNDS, options.rounds // 4)),
    ):
        if not keys:
            continue
        calls = _calls(steps[PLAIN], setup.device) if ORIGINAL not in keys else 1
        group = {key: steps[key] for key in keys}
        beside = {PLAIN} if ORIGINAL in keys else set()  # for the ratio only

        def tell(times: Times, partial: bool = True, calls: int = calls, beside: set[str] = beside) -> None:
            report.forget_partial()
            _rows(report, setup, times, made, calls, beside, partial)
            turn.save()

        def failed(key: str, error: Exception) -> None:
            report.lack(f"{label}, {made[key].contestant.text}", gpu_worker.brief(error))
            if key == PLAIN:  # what all are compared with
                raise error

        times = common.interleave(
            group, rounds, options.warmup, options.device, label, share * left, calls, seen=tell, failed=failed
        )
        tell(times, partial=False)
        for key in times.ms:
            if key not in beside:
                turn.say(f"{made[key].contestant.text}: {times.spread(key).p50:.2f} ms, {times.ratio(key, PLAIN).p50:.2f} times plain")
    _bars(report, setup, label)


def _bars(report: Report, setup: Setup, label: str) -> None:
    if (setup.model, setup.precision, setup.size) != ("resnet50", "bf16", 224):
        return
    judged = "H100" in report.environment["device"]
    for row in report.rows:
        for over, limit in LIMITS.get(row["case"], {}).items():
            if over in row:
                name = f"training step, {label}, {row['case']} {over.replace('_', ' ')}"
                report.bars.append(Bar(name, common.Spread(**row[over]), limit, judged=judged))


def _calls(step: Callable[[], None], device: str) -> int:
    if device != "cuda":
        return 1
    step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return max(1, min(10, math.ceil(BUSY_MS / (1e3 * (time.perf_counter() - start)))))


def _rows(
    report: Report, setup: Setup, times: Times, made: dict[str, Made], calls: int, beside: Collection[str], partial: bool
) -> None:  # fmt: skip
    for key in times.ms:
        if key in beside:
            continue
        row: dict[str, Any] = {"ms": times.spread(key), "over_plain": times.ratio(key, PLAIN)}
        if PLAIN_COMPILED.key in times.ms:
            row["over_compiled_plain"] = times.ratio(key, PLAIN_COMPILED.key)
        m = made[key]
        library = key.replace(m.contestant.case, f"{m.contestant.case}_library", 1)
        if m.contestant.chooses and library in times.ms:
            row["over_library_products"] = times.ratio(key, library)
        if not math.isnan(m.peak):
            row["peak_mib"], row["peak_over_plain"] = m.peak, m.peak / made[PLAIN].peak
        text = m.contestant.text + (f" (cut off after {len(times.ms[key])} rounds)" if partial else "")
        report.add(
            **setup.as_row(), case=key, text=text, **row, rounds=len(times.ms[key]), calls=calls, all_ms=times.ms[key],
            partial=partial,
        )  # fmt: skip


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
    p.add_argument("--compiled", type=int, default=3, help="how many are compiled: plain, reference, kernels, library products")
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
