"""Every case of `benchmarks.gpu` at its real sizes, dtypes, layouts and variants, once, without a GPU: over fake tensors.

Each worker of ``make gpu`` gets the arguments that a real run would give it, and runs its own code on `benchmarks.fake_gpu`: a
wrong shape, dtype, stride or argument shows up here and not on a GPU that is paid for. Fused products are run too, every tile
shape at every layer. Values are missing: no result is checked, and no time is taken, printed or written.

    python -m benchmarks.gpu_fake                     # everything
    python -m benchmarks.gpu_fake --only kernels "resnet18 at 28"

Exit code: 0; 1 when a case does not run; 2 when there can be no fake GPU here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import fisnet_cuda as fc
from benchmarks import (
    choices,
    common,
    dispatch,
    fake_gpu,
    gpu,
    gpu_profile,
    gpu_report,
    gpu_resume,
    gpu_step,
    gpu_turn,
    gpu_worker,
    kernels,
    verify,
)
from benchmarks.cases import Setup
from benchmarks.common import Report, Times, markdown_table
from fisnet_cuda import _backend

CANNOT = (
    "values: no result is compared, and a check by value counts as passed",
    "times: they are made up, so every fused product is chosen that there is, and none is shown",
    "torch.compile: contestants that are compiled (tests/package/test_fake_cuda.py compiles a small net over fake tensors)",
    "CUDA graphs: what is captured runs, nothing is replayed",
    "torch.profiler: the step runs, its kernels have made-up names",
    "memory: nothing takes any",
    "the tests marked gpu, compute-sanitizer, and others' code (zennit, captum, the authors')",
)
# once is enough
ONCE: dict[str, tuple[str, ...]] = {
    "kernels": ("--rounds", "1", "--least-rounds", "1", "--warmup", "0", "--compiler", "none"),
    "gpu_step": ("--rounds", "1", "--warmup", "0", "--compiler", "none"),
    "classes": ("--rounds", "1", "--original-rounds", "1", "--warmup", "0"),
    "heatmap": ("--rounds", "1", "--warmup", "0"),
    "gpu_profile": ("--steps", "1"),
    "dispatch": (),
}


# ---- what is run ---------------------------------------------------------------------------------------------


def plan(options: argparse.Namespace) -> dict[str, Callable[[], tuple[int, list[str]]]]:
    """name -> what runs it and returns how many cases ran, and what went wrong."""
    real = gpu.parse(["--batch", str(options.batch), "--profile", "--zennit", str(fake_gpu.ROOT)])
    found: dict[str, Callable[[], tuple[int, list[str]]]] = {"machine": _machine, "launches": _launches}
    for worker in gpu.workers(real):
        found[worker.name] = lambda worker=worker: _reported(lambda: _worker(worker.command))
    return {name: run for name, run in found.items() if not options.only or any(part in name for part in options.only)}


def _machine() -> tuple[int, list[str]]:
    json.dumps(gpu_report.describe("cuda"))
    return 1, []


def _launches() -> tuple[int, list[str]]:
    """What compute-sanitizer and the first launches see: every kernel in every dtype and layout."""
    spec = importlib.util.spec_from_file_location("sanitize", gpu.SANITIZE)
    script = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(script)  # type: ignore[union-attr]
    return script.run("cuda")


def _worker(command: Sequence[str]) -> Report:
    """A worker's report; its own code with its own arguments."""
    module, *argv = command
    name = module.removeprefix("benchmarks.")
    if name == "gpu_turn":
        benchmark, options = gpu_turn.parse([*argv, *ONCE[argv[0]]])
        options.seconds = 1e9
        common.prepare(options)
        with replaced((verify, "training_cases", _checked)):
            return gpu_turn.run(benchmark, options)
    options = sys.modules[module].arguments().parse_args([*argv, *ONCE[name]])
    options.seconds = 1e9
    common.prepare(options)
    if name == "dispatch":
        with mock.patch.object(dispatch.Net, "measure", _decided_and_seen):
            return dispatch.run(options, Timed())
    if name == "gpu_step":
        with replaced(
            (choices, "decide", _not_decided), (common, "interleave", _not_run), (verify, "training_cases", _checked),
            (gpu_step, "_peak", _no_memory),
        ):  # fmt: skip
            return gpu_step.run(options)
    if name == "gpu_profile":
        with replaced((gpu_profile, "profile", Profile)):
            return gpu_profile.run(options)
    return kernels.run(options)


def _reported(run: Callable[[], Report]) -> tuple[int, list[str]]:
    """What a report says went wrong; its table and its file are made as in a real run."""
    report = run()
    markdown_table(report.columns, [row for row in report.rows if "wrong" not in row])
    json.dumps(report.content())
    wrong = [*report.missing, *[note for note in report.notes if "is wrong" in note or "is WRONG" in note]]
    if not report.rows:
        wrong.append("there is no row")
    return sum(map(gpu_resume.is_good, report.rows)), wrong


@contextlib.contextmanager
def replaced(*what: tuple[Any, str, Any]) -> Iterator[None]:
    """Inside, other functions: ``(module, name, value)``."""
    with contextlib.ExitStack() as stack:
        for place, name, value in what:
            stack.enter_context(mock.patch.object(place, name, value))
        yield


# ---- what stands in ------------------------------------------------------------------------------------------


class Timed:
    """A timer of the dispatcher that likes each candidate better than the one before; all have run when they were verified."""

    def cannot(self, values: Iterable[Any]) -> str:
        """Fake tensors are timed like others."""
        return ""

    def round(self, candidates: Sequence[Callable[[], object]]) -> list[float]:
        """1 for candidate 0, then less and less."""
        return [1 - 0.1 * i for i in range(len(candidates))]


class Profile:
    """torch.profiler's, which sees one kernel."""

    def __init__(self, activities: Sequence[Any]) -> None:
        self.seen = SimpleNamespace(key="at::native::kernel", count=1, self_device_time_total=1.0)

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None: ...

    def key_averages(self) -> list[Any]:
        """The one."""
        return [self.seen]


def _decided_and_seen(net: dispatch.Net) -> None:
    """One step, in which every candidate of every call is verified and run; then what `dispatch.Net.measure` says of each."""
    uses: dict[str, dispatch.Use] = {}
    run = fc.dispatch.run

    def seen(name: str, backend: str, *operands: Any, **options: Any) -> tuple:
        outputs = run(name, backend, *operands, **options)
        use = dispatch.Use(dispatch.Key.of(name, operands, options), 1, {"layer": None})
        if str(use.key) not in uses:
            uses[str(use.key)] = use
            net._look(use, name, operands, options)
        return outputs

    with replaced((fc.dispatch, "run", seen)):
        net.decided(net.turn.left)
    rows = [net._row(use) for use in uses.values()]
    for row in rows:
        net.report.add(**row)
    net._sum_up(rows)


def _not_decided(steps: Iterable[Callable[[], object]], seconds: float) -> choices.Decided:
    """The dispatcher's worker has decided every layer."""
    return choices.Decided(0.0, 1, 0)


def _not_run(steps: Mapping[str, Callable[[], object]], *_: Any, **__: Any) -> Times:
    """Each step has run when it was made."""
    return Times({name: [1.0] for name in steps})


def _no_memory(*_: Any) -> float:
    """Of a step that has run."""
    return 1.0


_right = verify.training_cases
_seen_models: set[str] = set()


def _checked(setup: Setup, cases: Iterable[str]) -> dict[str, str]:
    """Once a network, in float64, with as few classes as there can be: a map for each is a run for each."""
    if setup.model in _seen_models:
        return {}
    _seen_models.add(setup.model)
    return _right(replace(setup, classes=2), cases)


# ---- the command ---------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Run everything; returns the exit code."""
    count, failed, start = 0, [], time.process_time()
    for name, part in plan(options).items():
        begin, told, problems = time.process_time(), io.StringIO(), []
        with warnings.catch_warnings(record=True) as warned, _own_settings():
            warnings.simplefilter("always")
            try:
                with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                    cases, problems = part()
            except Exception as error:
                cases, problems = 0, [gpu_worker.brief(error)]
                if options.trace:
                    raise
        problems += [str(w.message) for w in warned if issubclass(w.category, fc.FisnetWarning)]
        count, failed = count + cases, failed + [f"{name}: {problem}" for problem in problems]
        print(f"{name}: {cases} cases, {time.process_time() - begin:.0f} s of one core", flush=True)
        for problem in problems:
            print(f"FAILED  {name}: {problem}", flush=True)
    print("\nWhat cannot go over fake tensors:", *(f"- {line}" for line in CANNOT), sep="\n")
    seconds = time.process_time() - start
    print(f"{count} cases at real sizes over fake tensors, {len(failed)} problems, {seconds:.0f} s of one core")
    return int(bool(failed))


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    """What a worker sets for its process is undone, and the dispatcher forgets."""
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    path, before = list(sys.path), os.environ.get(choices.VARIABLE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[choices.VARIABLE] = str(Path(folder) / "dispatch.json")
        fc.dispatch.reset()
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = tf32
            sys.path[:] = path
            os.environ.pop(choices.VARIABLE)
            if before is not None:
                os.environ[choices.VARIABLE] = before
            fc.dispatch.reset()


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--only", nargs="+", default=[], help="parts of names: launches, dispatch, kernels, 'resnet18 at 28'; all")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--trace", action="store_true", help="end at the first exception, with its traceback")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    options = arguments().parse_args(argv)
    reason = fake_gpu.needs() or _backend._load()[1]
    if reason:
        print(f"no fake GPU here: {reason}")
        return 2
    fake_gpu.enter("benchmarks.gpu_fake", argv)
    with fake_gpu.device():
        return run(options)


if __name__ == "__main__":
    gpu_worker.leave(main())
