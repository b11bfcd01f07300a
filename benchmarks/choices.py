"""The dispatcher's choices in benchmarks: measured when nothing else runs, postponed while others do, and never timed as a step."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fisnet_cuda import dispatch
from fisnet_cuda.dispatch.cache import VARIABLE
from fisnet_cuda.dispatch.timing import Timer, not_real

SHARE = 0.4  # of a benchmark's turn that may go into what the dispatcher has not measured before


def dispatcher() -> Any:
    """The process's dispatcher, with its timer and its cache."""
    return dispatch._dispatcher()


def _fresh() -> Any:
    """The dispatcher after a look at the file, in which other processes may have left something."""
    timer = dispatcher().timer
    dispatch.reset()
    dispatcher().timer = timer
    return dispatcher()


@contextlib.contextmanager
def kept_in(path: Path, timer: Timer | None = None) -> Iterator[None]:
    """Inside, choices live in the file ``path`` instead of the user's, measured by ``timer`` if one is given."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(path)
    dispatch.reset()
    if timer is not None:
        dispatcher().timer = timer
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
        dispatch.reset()


class _Until:
    """A timer that measures until a moment, and no longer.

    Args:
        timer: measures.
        until: `time.perf_counter` then; 0 for a moment that has passed.
    """

    def __init__(self, timer: Timer, until: float = 0.0) -> None:
        self.timer, self.until = timer, until
        self.refused = 0  # how many calls would have been measured

    def cannot(self, values: Iterable[Any]) -> str:
        if time.perf_counter() < self.until:
            return self.timer.cannot(values)
        self.refused += 1
        return "nothing is measured now"

    def round(self, candidates: Any) -> list[float]:
        return self.timer.round(candidates)


@contextlib.contextmanager
def postponed(seconds: float = 0.0) -> Iterator[_Until]:
    """Inside, nothing is measured (after so many seconds): a call runs what is known to be fastest, else candidate 0.

    For work beside other work on the same GPU, whose times would say nothing, and for what is timed itself. What other processes
    have found by now is known.
    """
    found = _fresh()
    before, found.timer = found.timer, _Until(found.timer, time.perf_counter() + seconds if seconds else 0.0)
    try:
        yield found.timer
    finally:
        dispatcher().timer = before


@dataclass(frozen=True)
class Decided:
    """What `decide` did: seconds, choices that are new, calls for whose measurement there was no time."""

    seconds: float
    fresh: int
    refused: int


def decide(steps: Iterable[Callable[[], object]], seconds: float) -> Decided:
    """Run each step once, so that what it runs is measured where nobody has done it, for at most so many seconds."""
    with postponed(max(seconds, 1e-9)) as timer:
        known, start = len(dispatcher().cache.entries()), time.perf_counter()
        for step in steps:
            step()
        return Decided(time.perf_counter() - start, len(dispatcher().cache.entries()) - known, timer.refused)


class MadeUp:
    """A timer for machines without a GPU: no times, but made-up ones, for which each tile is better than the one before.

    They exercise everything around a measurement, and say nothing.
    """

    def cannot(self, values: Iterable[Any]) -> str:
        """Real tensors of any device can be given made-up times."""
        return not_real([v for v in values if isinstance(v, Tensor)])

    def round(self, candidates: Any) -> list[float]:
        """1 for candidate 0, then less and less."""
        return [1 - 0.1 * i for i in range(len(candidates))]
