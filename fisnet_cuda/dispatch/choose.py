"""The choice itself: measured once, verified, remembered. Pure logic over a timer, a cache and the candidates."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import FisnetWarning
from ..ops import library
from .cache import Cache
from .key import Key, tf32
from .policy import LIBRARY, Policy, matches
from .timing import Timer, undisturbed
from .verify import Verifier, exact

GAIN = 0.03  # what a fused kernel must be faster by, in both rounds
ROUNDS = 2
PATIENCE = 20  # calls whose results tell nothing (all zero; overflow, until a loss scaler adapts) before candidate 0 stays


@dataclass(frozen=True)
class Candidate:
    """One way to run a call; ``poison`` fills the outputs with NaN first, where the candidate can."""

    name: str
    run: Callable[..., tuple]

    @property
    def poisoned(self) -> Callable[[], tuple]:
        """The run whose unwritten elements are NaN."""
        return functools.partial(self.run, poison=True)


@dataclass(frozen=True)
class Choice:
    """The candidate to run; ``settled`` when later calls of the same key may take it unasked."""

    name: str
    settled: bool


def select(medians: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    """The fastest of ``names``, by its worse round; candidate 0 unless it gains `GAIN` in every round.

    Example:
        >>> select({"library": [1.0, 1.0], "fused/a": [0.9, 0.98], "fused/b": [0.96, 0.97]}, ["fused/a", "fused/b"])
        'fused/b'
    """
    gains = {n: margin(medians, n) for n in names if n in medians}
    best = max(gains, key=gains.__getitem__, default=LIBRARY)
    return best if gains.get(best, 0.0) >= GAIN else LIBRARY


def margin(medians: Mapping[str, Sequence[float]], name: str) -> float:
    """What a candidate gains over candidate 0 in its worse round: ``1 - t / t_0``."""
    # rounded, so that 3 % is 3 % whatever the last bit of a quotient says
    return round(min(1 - t / t0 if t0 > 0 else 0.0 for t, t0 in zip(medians[name], medians[LIBRARY])), 12)


class Dispatcher:
    """Chooses a candidate for a call.

    Args:
        fused: the fused kernel of an op by its name, or None.
        timer: see `Timer`.
        cache: of decisions.
    """

    def __init__(self, fused: Callable[[str], Callable | None], timer: Timer, cache: Cache):
        self.fused, self.timer, self.cache = fused, timer, cache
        self._tuning = threading.Lock()
        self._attempts: dict[str, int] = {}  # of keys whose calls told nothing
        self._said: set[tuple] = set()

    def choose(self, name: str, operands: tuple, options: dict, policy: Policy) -> Choice:
        """The candidate for this call; measures where that is allowed and has not been done."""
        forced, kernel = policy.forced(name), self.fused(name)
        if forced == LIBRARY:
            return Choice(LIBRARY, True)
        if _symbolic([*operands, *options.values()]):
            return Choice(LIBRARY, False)  # a size that is not known has no key
        why, tiles = self._tiles(kernel, operands, options)
        names = policy.allowed(name, [f"fused/{tile}" for tile in tiles])
        if forced:
            fitting = [n for n in names if matches(n, forced)]
            if not fitting:
                self._say((name, forced, why), f"{name} is forced to {forced}, which {_refusal(why, names)}; candidate 0 runs")
            return Choice(fitting[0] if fitting else LIBRARY, True)
        if not names or (operands[0].dtype == torch.float32 and not tf32(name, operands, options)):
            return Choice(LIBRARY, True)
        return self._by_measurement(Key.of(name, operands, options), kernel, names, operands, options)

    def _tiles(self, kernel: Callable | None, operands: tuple, options: dict) -> tuple[str, tuple[str, ...]]:
        if kernel is None:
            return "has no kernel here", ()
        if why := kernel.serves(*operands, **options):
            return f"does not serve this call ({why})", ()
        return "", tuple(kernel.tiles(*operands, **options))

    def _by_measurement(self, key: Key, kernel: Callable, names: list[str], operands: tuple, options: dict) -> Choice:
        text = str(key)
        entry = self.cache.get(text)
        if entry is not None and all(n in entry["medians"] or n in entry["blacklisted"] for n in names):
            return Choice(select(entry["medians"], names) if entry["medians"] else LIBRARY, True)
        if self._attempts.get(text, 0) >= PATIENCE:
            return Choice(LIBRARY, True)
        if self.timer.cannot([*operands, *options.values()]) or not self._tuning.acquire(blocking=False):
            return Choice(LIBRARY, False)  # another thread is measuring: this call does not wait
        try:
            entry = self._measure(key, kernel, names, operands, options)
        except Exception as error:  # out of memory, or PyTorch refuses the exact result: training goes on
            self._attempts[text] = PATIENCE
            reason = f"{type(error).__name__}: {error}"
        else:
            reason = ""
        finally:
            self._tuning.release()
        if reason:  # here, where the error's frames and their tensors are gone
            _warn(f"{key.short}: its candidates could not be measured, candidate 0 runs. {reason}")
            return Choice(LIBRARY, True)
        if entry is None:
            self._attempts[text] = self._attempts.get(text, 0) + 1
            return Choice(LIBRARY, False)
        self.cache.put(text, entry)
        return Choice(entry["choice"], True)

    def _measure(self, key: Key, kernel: Callable, names: list[str], operands: tuple, options: dict) -> dict | None:
        """Verify and time all candidates; the cache's entry, or None where this call's result can tell nothing."""
        first = Candidate(LIBRARY, functools.partial(getattr(library, key.op), *operands, **options))
        fused = [Candidate(n, functools.partial(kernel, *operands, **options, tile=n.split("/", 1)[1])) for n in names]
        with undisturbed(operands[0].device):
            verdict = self._verify(key, first, fused, operands, options)
            if verdict is None:
                return None
            errors, wrong = verdict
            good = [first, *(c for c in fused if c.name not in wrong)]
            rounds = [self.timer.round([c.run for c in good]) for _ in range(ROUNDS)] if len(good) > 1 else []
        medians = {c.name: list(times) for c, *times in zip(good, *rounds)} if rounds else {}
        choice = select(medians, names) if medians else LIBRARY
        return {
            "op": key.op, "operands": dict(key.operands), "mode": key.mode, "gpu": key.gpu, "versions": key.versions,
            "choice": choice, "medians": medians, "margins": {n: margin(medians, n) for n in medians if n != LIBRARY},
            "errors": errors, "blacklisted": wrong,
        }  # fmt: skip

    def _verify(self, key: Key, first: Candidate, fused: list[Candidate], operands: tuple, options: dict) -> tuple | None:
        precise = exact(key.op, operands, options)
        verifier = Verifier(key.op, operands, options, precise, first.run(), tf32(key.op, operands, options))
        if verifier.cannot():
            return None
        errors, wrong = {LIBRARY: verifier.errors}, {}
        for candidate in fused:
            try:
                errors[candidate.name], reason = verifier.check(candidate.poisoned())
            except Exception as error:
                if out_of_memory(error):
                    raise
                errors[candidate.name], reason = [], f"it raises {type(error).__name__}: {error}"
            if reason:
                wrong[candidate.name] = reason
                _warn(f"{key.short}: {candidate.name} is not used here, {reason}")
        return errors, wrong

    def _say(self, what: tuple, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            _warn(message)


def out_of_memory(error: Exception) -> bool:
    """Whether a candidate failed for want of memory, which says nothing against it."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def _symbolic(values: Sequence[Any]) -> bool:
    return any(isinstance(n, torch.SymInt) for v in values if isinstance(v, Tensor) for n in (*v.shape, *v.stride()))


def _refusal(why: str, names: Sequence[str]) -> str:
    return why or (f"is none of {', '.join(names)}" if names else "has no tile for this call that is not forbidden")


def _warn(message: Any) -> None:
    warnings.warn(message, FisnetWarning, stacklevel=2)
