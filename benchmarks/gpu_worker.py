"""How a benchmark runs under `benchmarks.gpu`: it prepares beside others, waits for its turn, and measures alone.

Compiling takes most of the time and little of the GPU, so all workers compile at once, while tests run; only then are
they timed, one after the other. A worker prints one line for each piece of news, ``READY`` when it is prepared, and
then waits for ``go SECONDS`` on its standard input. Its report is a JSON file that is whole at every moment. What an earlier
run has already measured it leaves out.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from benchmarks import common, gpu_resume
from benchmarks.common import Report

READY, GO = "READY", "go"
ALONE = "ALONE"  # what a worker says that has the GPU for itself: others may start, and wait for it
LOCK = Path(tempfile.gettempdir()) / "fisnet-gpu-memory.lock"
T = TypeVar("T")


class OutOfTimeError(Exception):
    """The time for preparing is over."""


def options_of(p: argparse.ArgumentParser) -> None:
    """The options that workers have beside those of every benchmark."""
    p.add_argument("--part", type=Path, help="write the rows to this JSON file as they come")
    p.add_argument("--wait", action="store_true", help="when prepared, print READY and wait for 'go SECONDS'")
    p.add_argument("--until", type=float, help="prepare no longer than this moment (seconds since 1970)")
    p.add_argument("--earlier", type=Path, help="rows of an earlier run in a JSON file: what is there is not measured again")
    p.add_argument("--seconds", type=float, default=60.0, help="time for measuring, where nobody says 'go SECONDS'")


class Turn:
    """A worker's side of the protocol.

    Args:
        options: parsed options, of `options_of` among others.
        report: grows with the rows; saved by `save`.
    """

    def __init__(self, options: argparse.Namespace, report: Report) -> None:
        self.options, self.report = options, report
        self.seconds: float = options.seconds
        self.begin = time.perf_counter()  # of the turn
        self.earlier: list[dict[str, Any]] = json.loads(options.earlier.read_text()) if options.earlier else []

    def known(self, **fields: Any) -> bool:
        """Whether an earlier run has rows with these fields, all of them whole and right; says so."""
        found = [row for row in self.earlier if all(row.get(key) == value for key, value in fields.items())]
        if not found or not all(map(gpu_resume.is_good, found)):
            return False
        self.say(f"{', '.join(str(value) for value in fields.values() if not isinstance(value, dict))}: done before")
        return True

    @property
    def left(self) -> float:
        """Seconds of the turn that are left."""
        return self.seconds - (time.perf_counter() - self.begin)

    def say(self, text: str) -> None:
        """One line of progress."""
        print(text, flush=True)

    def save(self) -> None:
        """Write what there is so far."""
        if self.options.part:
            common.save_json(self.report.content(), self.options.part)

    def attempt(self, what: str, make: Callable[[], T], late: bool = False) -> T | None:
        """``make()``, stopped when the time for preparing is over; a failure is missing in the report, and gives None.

        What a failure says matters, yet it must not take the other contestants with it. What comes ``late``, in the turn
        itself, is not stopped.
        """
        start = time.perf_counter()
        try:
            with alarm(None if late else self.options.until):
                made = make()
        except OutOfTimeError:
            self.report.lack(what, "preparing it took longer than there was time")
        except Exception as error:
            self.report.lack(what, brief(error))
        else:
            if made is not None:
                self.say(f"{what}: prepared in {time.perf_counter() - start:.1f} s")
                return made
        free()
        self.save()
        return None

    def wait(self) -> None:
        """Report that everything is prepared; return when it is this worker's turn, end when nobody waits for it."""
        self.save()
        if not self.options.wait:
            self.begin = time.perf_counter()
            return
        free()
        print(READY, flush=True)
        word, _, seconds = sys.stdin.readline().partition(" ")
        if word != GO:
            raise SystemExit(0)
        self.seconds, self.begin = float(seconds), time.perf_counter()
        threading.Thread(target=_end_with_input, daemon=True).start()


def _end_with_input() -> None:
    """End when nobody waits any more: who was killed could not end its workers, which would disturb the next run's."""
    for _ in sys.stdin:
        pass
    os._exit(1)


@contextlib.contextmanager
def alarm(until: float | None) -> Iterator[None]:
    """Inside, `OutOfTimeError` is raised when the clock passes ``until``; at once when it has passed."""
    if until is None:
        yield
        return

    def ring(*_: Any) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, ring)
    # again and again: compilers catch exceptions of all kinds
    signal.setitimer(signal.ITIMER_REAL, max(until - time.time(), 1e-3), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def alone(device: str) -> Iterator[None]:
    """Only one worker at a time runs inside on a GPU: several large steps together might not fit its memory."""
    if device != "cuda":
        yield
        return
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
            torch.cuda.synchronize()
        finally:
            free()


def finish(report: Report, options: argparse.Namespace) -> int:
    """Without ``--part``, where nobody collects it, show the report and write it; returns the exit code."""
    if not options.part:
        print(report.markdown())
        common.save_json(report.content(), report.path(options.out, ".json"))
    return int(report.wrong or report.failed)


def leave(code: int) -> NoReturn:
    """End the process at once: tearing PyTorch down takes seconds, for which the next worker would wait."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def free() -> None:
    """Hand cached GPU memory back, so that other processes can have it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def brief(error: BaseException) -> str:
    """Kind and first line of an exception."""
    lines = str(error).strip().split("\n")
    return f"{type(error).__name__}: {lines[0][:200]}"


@contextlib.contextmanager
def emulating(device: str) -> Iterator[str]:
    """On "cpu", the kernels run emulated inside (without checks, which tests make); yields why not, or ""."""
    if device == "cuda":
        yield ""
        return
    sys.path.append(str(common.ROOT / "tests"))
    import emulator

    reason = emulator.needs()
    with contextlib.nullcontext() if reason else emulator.emulated(checks=False):
        yield reason
