"""Times of several things side by side, on a machine that others use, too."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

__all__ = ["Spread", "interleaved"]


class Spread(NamedTuple):
    """The 20th, 50th and 80th percentile of times, in milliseconds."""

    p20: float
    p50: float
    p80: float


def interleaved(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    every: Mapping[str, int] | None = None,
    device: torch.device | str = "cpu",
    tick: Callable[[int], None] | None = None,
) -> dict[str, Spread]:
    """Times steps in turn within each round, in one process: whatever else the machine is doing hits them alike.

    A round that is not counted comes first: it warms caches and allocators. The order turns by one from round to round, so that none
    always comes after the same other one.

    Args:
        steps: name -> what is timed.
        rounds: how often each is timed.
        every: name -> n, for slow ones: only in every n-th round.
        device: what is waited for before the clock is read.
        tick: called after each round with the number of rounds done, the first one included.

    Returns:
        name -> percentiles of its times.

    Example:
        >>> times = interleaved({"short": lambda: None, "long": lambda: sum(range(9_999))}, 3)
        >>> times["short"].p50 < times["long"].p50
        True
    """
    device, every = torch.device(device), dict(every or {})
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if turn % every.get(name, 1):
                continue
            _wait(device)
            start = time.perf_counter()
            steps[name]()
            _wait(device)
            if turn > 0 or rounds < every.get(name, 1):  # of a slow one that has no other turn, the first counts
                times[name].append(1e3 * (time.perf_counter() - start))
        if tick is not None:
            tick(turn + 1)
    share = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return {name: Spread(*torch.tensor(values, dtype=torch.float64).quantile(share).tolist()) for name, values in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
