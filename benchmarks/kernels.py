"""What does each kernel cost, next to a copy of as many bytes, to eager PyTorch and to torch.compile?

Every case of `benchmarks.kernel_cases`, in bfloat16 and float32. Results are checked before anything is timed: against
float64, with at most twice the error that PyTorch makes in the same dtype, and twice the same bits. Then the kernel, the
reference in eager PyTorch, the same under torch.compile and a device copy of the case's bytes are timed in turn by CUDA
events, the L2 cache flushed before each. The copy is the floor: "share" is its time over the kernel's.

Products of linear maps are timed with every tile shape that is compiled, the best guess as "kernel", and against what the
dispatcher would run without them in place of eager PyTorch: the library's product and the project's own pointwise kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import fisnet_cuda as fc
from benchmarks import common, gpu_worker
from benchmarks.common import Bar, Report, Spread, Times, cell
from benchmarks.gpu_worker import Turn
from benchmarks.kernel_cases import KernelCase, Sizes, all_cases
from fisnet_cuda import _backend

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64}
KERNEL, EAGER, COMPILED, COPY = "kernel", "eager", "compiled", "copy"
TF32 = 2.0**-10  # the unit of operands with 10 bits behind the point
FLUSH = 2**29  # bytes, several times any L2 cache; writing them also gives the host a head start over the GPU
# time over the floor, at the sizes of ResNet-50's first stage: 85 % of a copy's bandwidth, and twice the floor
NEAR_COPY, NEAR_FLOOR = 1 / 0.85, 2.0
POINTWISE = ("phi", "bn_")
OTHERS = ("zb", "loss")

COLUMNS = {
    "kernel": cell("case"),
    "dtype": cell("dtype"),
    "ms": cell("ms", 3),
    "GB/s": cell("gb_s", 0),
    "share of copy": cell("share"),
    "TFLOP/s": cell("tflop_s", 0),
    "tiles, ms": lambda row: ", ".join(f"{name} {ms['p50']:.3f}" for name, ms in row.get("tiles", {}).items()) or "-",
    "eager over kernel": cell("eager_over"),
    "compiled over kernel": cell("compiled_over"),
    "peak, MiB": cell("peak_mib", 0),
    "sizes": lambda row: " ".join(f"{key}={value}" for key, value in row["sizes"].items()),
}


def run(options: argparse.Namespace) -> Report:
    """Check and compile the cases; time them when it is our turn."""
    report = Report(
        "kernels", "Time of single kernels", common.settings_of(options), common.environment(options.device), COLUMNS
    )
    turn = Turn(options, report)
    with gpu_worker.emulating(options.device) as reason:
        if reason:
            report.note(f"the kernels cannot run emulated: {reason}")
        ready = _prepared(options, report, turn)
        turn.wait()
        _measure(options, report, turn, ready)
    turn.save()
    return report


def selected(options: argparse.Namespace) -> list[tuple[KernelCase, str]]:
    """This worker's cases and dtypes, the most valuable first."""
    share, shares = (int(n) for n in options.share.split("/"))
    cases = [case for case in all_cases() if not options.cases or any(name in case.name for name in options.cases)]
    pairs = [(case, dtype) for dtype in options.dtypes for case in cases]
    pairs.sort(key=lambda pair: pair[0].rank + options.dtypes.index(pair[1]))
    return pairs[share - 1 :: shares]


def shrink(case: KernelCase, odd: bool = True) -> KernelCase:
    """The case at sizes for the CPU, odd ones, that are no multiple of anything."""
    s = case.sizes
    c = min(s.C, 5 if odd else 8)
    return replace(case, sizes=replace(s, N=min(s.N, 2), C=c, H=min(s.H, 9), W=min(s.W, 11)))


# ---- contestants ---------------------------------------------------------------------------------------------


class Contest:
    """One case in one dtype: what is timed, each a function without arguments.

    Args:
        case, dtype, device: what and where.
        compiler: backend of torch.compile; "none" leaves that out.
    """

    def __init__(self, case: KernelCase, dtype: str, device: str, compiler: str) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self.name = f"{case.name}, {dtype}"
        kernel, reference = _backend.kernel(case.kernel, "auto", torch.empty(0, device=device)), getattr(fc.reference, case.kernel)
        self.is_kernel = kernel is not reference  # without the extension the reference would run under the kernel's name
        self.tiles: Callable = getattr(kernel, "tiles", lambda *_, **__: ())
        self.kernel, self.reference = self._as_run(kernel), self._as_run(reference)
        self.eager = self._as_run(case.eager or reference)
        self.unit = torch.finfo(DTYPES[dtype]).eps
        if case.flops and dtype == "fp32":
            self.unit, self.eager = TF32, partial(with_tf32, self.eager)
        self.compiled: Callable | None = None
        if compiler != "none" and not case.flops:
            self.compiled = torch.compile(own_code(self.eager), backend=compiler, dynamic=False)

    def _as_run(self, function: Callable) -> Callable:
        """The function as the case runs it: by itself, unless the case says how."""
        return partial(self.case.run, function) if getattr(self.case, "run", None) else function

    def operands(self) -> tuple[tuple, dict[str, Any]]:
        """Arguments of the function, made anew: they are large, and none are kept."""
        return self.case.make(self.case.sizes, self.device, DTYPES[self.dtype])

    def shapes(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Callable]:
        """The kernel with every tile shape that it can run these operands with: name -> function, the best guess first."""
        return {name: partial(self.kernel, tile=name) for name in self.tiles(*args, **kwargs)}

    def problem(self) -> str:
        """What is wrong with the kernel's results, with any tile shape; empty when they are right."""
        args, kwargs = self.operands()
        with grad_where_asked(args):
            right = self._right(args, kwargs)
            usual, exact = results(right(*args, **kwargs)), results(right(*_double(args), **_double(kwargs)))
            for name, function in {"": self.kernel, **dict([*self.shapes(args, kwargs).items()][1:])}.items():
                got, again = results(function(*args, **kwargs)), results(function(*args, **kwargs))
                if problem := self._compared(got, again, usual, exact):
                    return f"{name}: {problem}" if name else problem
        return ""

    def _compared(self, got: list, again: list, usual: list, exact: list) -> str:
        if len({len(found) for found in (got, usual, exact)}) > 1:
            return f"{len(got)} results, the reference gives {len(usual)}"
        compared = 0
        for index, (mine, second, theirs, true) in enumerate(zip(got, again, usual, exact)):
            if mine is None:
                continue
            if not _same_bits(mine, second):
                return f"result {index} differs between two runs"
            if theirs is None or not (mine.is_floating_point() and theirs.is_floating_point()):
                continue  # masks and indices are each implementation's own
            if mine.shape != theirs.shape:
                return f"result {index} has shape {tuple(mine.shape)}, the reference gives {tuple(theirs.shape)}"
            error, allowed = relative_error(mine, true), 2 * relative_error(theirs, true) + 2 * self.unit
            if not error <= allowed:
                return f"result {index} has error {error:.2e}, allowed {allowed:.2e} (relative to the largest entry)"
            compared += 1
        return "" if compared else "no result could be compared"

    def _right(self, args: tuple, kwargs: dict[str, Any]) -> Callable:
        """What tells right from wrong: the reference, or the case's eager function where operands are a kernel's own form."""
        try:
            self.reference(*args, **kwargs)
        except Exception:
            if self.case.eager is None:
                raise
            return self.eager
        return self.reference

    def contestants(self, args: tuple, kwargs: dict[str, Any], traffic: int) -> dict[str, Callable[[], object]]:
        """name -> what is timed."""
        source = torch.empty(max(traffic // 2, 1), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        found: dict[str, Callable[[], object]] = {
            KERNEL: lambda: self.kernel(*args, **kwargs),
            EAGER: lambda: self.eager(*args, **kwargs),
        }
        if self.compiled is not None:
            compiled = self.compiled
            found[COMPILED] = lambda: compiled(*args, **kwargs)
        for name, function in [*self.shapes(args, kwargs).items()][1:]:
            found[name] = lambda function=function: function(*args, **kwargs)
        return {**found, COPY: lambda: target.copy_(source)}


def with_tf32(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call the function where PyTorch may use TF32, as the project's products do."""
    with tf32():
        return function(*args, **kwargs)


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """PyTorch may use TF32 inside."""
    conv, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = conv, matmul


def own_code(function: Callable) -> Callable:
    """The function called from code of its own: torch.compile counts its recompilations by code object."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)


def results(value: Any) -> list[Tensor | None]:
    """The results of a function in order, None where one is absent (None, or without elements)."""
    if isinstance(value, (tuple, list)):
        return [t for part in value for t in results(part)]
    return [value if isinstance(value, Tensor) and value.numel() else None]


def grad_where_asked(args: tuple) -> torch.set_grad_enabled:
    """Gradients are recorded only where an operand asks for one."""
    return torch.set_grad_enabled(any(isinstance(value, Tensor) and value.requires_grad for value in args))


def relative_error(got: Tensor, right: Tensor) -> float:
    """The largest difference over the largest entry; NaN where ``got`` has one."""
    if not right.numel():
        return 0.0
    got, right = got.detach().double(), right.detach()
    scale = right.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return ((got - right).abs().max() / scale).item()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _double(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_double(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _prepared(options: argparse.Namespace, report: Report, turn: Turn) -> list[Contest]:
    """Those that are right, compiled where that works."""
    ready = []
    for case, dtype in selected(options):
        if turn.known(case=case.name, dtype=dtype, sizes=asdict(_sized(options, case).sizes)):
            continue
        contest = turn.attempt(
            f"{case.name}, {dtype}", lambda case=case, dtype=dtype: _checked(options, report, case, dtype)
        )
        if contest is not None:
            ready.append(contest)
    for contest in ready:
        if contest.compiled is None:
            continue
        if turn.attempt(f"{contest.name}, torch.compile", lambda contest=contest: _compile(contest)) is None:
            contest.compiled = None
    return ready


def _sized(options: argparse.Namespace, case: KernelCase) -> KernelCase:
    return shrink(case) if options.tiny else case


def _checked(options: argparse.Namespace, report: Report, case: KernelCase, dtype: str) -> Contest | None:
    contest = Contest(_sized(options, case), dtype, options.device, options.compiler)
    if not contest.is_kernel:
        raise RuntimeError("there is no such kernel here; see fisnet_cuda.info()")
    try:
        with gpu_worker.alone(options.device):
            problem = contest.problem()
    except (gpu_worker.OutOfTimeError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a kernel that refuses its case is as wrong as one that computes something else
        problem = gpu_worker.brief(error)
    if problem:
        report.drop(contest.name, problem)
        report.add(case=case.name, kernel=case.kernel, dtype=dtype, sizes=asdict(contest.case.sizes), wrong=problem)
        return None
    return contest


def _compile(contest: Contest) -> bool:
    args, kwargs = contest.operands()
    with grad_where_asked(args):
        contest.compiled(*args, **kwargs)
    return True


# ---- timing --------------------------------------------------------------------------------------------------


class Clock:
    """Times of functions on one device: CUDA events around each, the L2 cache flushed before."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.flush = torch.empty(FLUSH if self.cuda else 0, dtype=torch.uint8, device=device)

    def round(self, steps: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Milliseconds of each function, run one after the other."""
        if not self.cuda:
            return {name: _host_ms(step) for name, step in steps.items()}
        events = {}
        for name, step in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            step()
            end.record()
            events[name] = (start, end)
        torch.cuda.synchronize()
        return {name: start.elapsed_time(end) for name, (start, end) in events.items()}


def _host_ms(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def _measure(options: argparse.Namespace, report: Report, turn: Turn, ready: list[Contest]) -> None:
    clock, begin = Clock(options.device), time.perf_counter()
    for index, contest in enumerate(ready):
        left = turn.seconds - (time.perf_counter() - begin)
        if left <= 0:
            for late in ready[index:]:
                report.lack(late.name, "not timed, the time was over")
            break
        try:
            _row(options, report, clock, contest, left / (len(ready) - index))
        except Exception as error:
            report.lack(contest.name, f"not timed, {gpu_worker.brief(error)}")
        turn.save()
        row = report.rows[-1] if report.rows else {}
        if row.get("case") == contest.case.name and "ms" in row:
            turn.say(f"{contest.name}: {row['ms']['p50']:.3f} ms, {row['share']['p50']:.0%} of a copy's bandwidth")


def _row(options: argparse.Namespace, report: Report, clock: Clock, contest: Contest, seconds: float) -> None:
    args, kwargs = contest.operands()
    with grad_where_asked(args):
        _timed(options, report, clock, contest, args, kwargs, seconds)


def _timed(
    options: argparse.Namespace, report: Report, clock: Clock, contest: Contest, args: tuple, kwargs: dict[str, Any],
    seconds: float,
) -> None:  # fmt: skip
    case = contest.case
    before = torch.cuda.memory_allocated() if clock.cuda else 0
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats()
    traffic = case.traffic(args, kwargs, contest.kernel(*args, **kwargs))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if clock.cuda else None
    steps = contest.contestants(args, kwargs, traffic)
    rounds: list[dict[str, float]] = []
    for _ in range(options.warmup):
        clock.round(steps)
    begin = time.perf_counter()
    while len(rounds) < options.rounds:
        if len(rounds) >= options.least_rounds and time.perf_counter() - begin > seconds:
            break
        rounds.append(clock.round(steps))
    times = Times({name: [found[name] for found in rounds] for name in steps})
    more = {f"{name}_over": times.ratio(name, KERNEL) for name in (EAGER, COMPILED) if name in steps}
    if shapes := [*contest.shapes(args, kwargs)]:
        more["tiles"] = {name: times.spread(name if index else KERNEL)._asdict() for index, name in enumerate(shapes)}
    if case.flops:
        more["tflop_s"] = Spread.of([case.flops(case.sizes) / ms / 1e9 for ms in times.ms[KERNEL]])
    over_copy = times.ratio(KERNEL, COPY)
    report.add(
        case=case.name, kernel=case.kernel, dtype=contest.dtype, sizes=asdict(case.sizes), ms=times.spread(KERNEL),
        gb_s=Spread.of([traffic / ms / 1e6 for ms in times.ms[KERNEL]]), share=times.ratio(COPY, KERNEL), **more,
        over_copy=over_copy, traffic_bytes=traffic, copy_gb_s=Spread.of([traffic / ms / 1e6 for ms in times.ms[COPY]]),
        peak_mib=peak, rounds=len(rounds), all_ms=times.ms,
    )  # fmt: skip
    limit = limit_of(case)
    if limit:
        judged = "H100" in report.environment["device"]
        report.bars.append(Bar(f"{contest.name}: time over a copy of its bytes", over_copy, limit, judged=judged))


def limit_of(case: KernelCase) -> float | None:
    """The target of a case: its time over that of a copy; pointwise kernels have one at ResNet-50's first stage."""
    if case.flops:
        return None  # bound by tensor cores as much; the dispatcher takes them only where they win
    if any(word in case.kernel for word in OTHERS):
        return NEAR_FLOOR
    return NEAR_COPY if case.sizes == Sizes() and any(word in case.kernel for word in POINTWISE) else None


# ---- the command ---------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    p = common.parser(__doc__)
    gpu_worker.options_of(p)
    p.add_argument("--cases", nargs="+", default=[], help="parts of names of cases; all of them")
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    p.add_argument("--rounds", type=int, default=40, help="how often each is timed, while there is time")
    p.add_argument("--least-rounds", type=int, default=20, help="how often however little time there is")
    p.add_argument("--warmup", type=int, default=3, help="rounds before that")
    p.add_argument("--share", default="1/1", help="2/3: the second third of the cases")
    p.add_argument("--compiler", default="inductor", help="backend of torch.compile; none leaves it out")
    p.add_argument("--tiny", action="store_true", help="small odd sizes, for a machine without a GPU")
    return p


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    p = arguments()
    if p.parse_args(argv).quick:  # what is asked for by name still holds
        p.set_defaults(tiny=True, rounds=3, least_rounds=3, warmup=1)
    options = p.parse_args(argv)
    if options.quick:
        options.compiler = "eager" if options.compiler == "inductor" else options.compiler
    common.prepare(options)
    return gpu_worker.finish(run(options), options)


if __name__ == "__main__":
    gpu_worker.leave(main())
