"""How long candidates take on the live tensors."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

RUNS = 15  # of each candidate in a round
WARM_UP = 3
HEAD_START = 200_000, 20_000_000  # least and most GPU clock cycles, about 0.1 and 10 ms, that the host has to launch a candidate
CLOCK = 2e9  # such cycles a second


class Timer(Protocol):
    """What the dispatcher needs of a clock."""

    def cannot(self, values: Iterable[Any]) -> str:
        """Why these operands cannot be timed now; empty when they can."""

    def round(self, candidates: Sequence[Callable[[], object]]) -> list[float]:
        """The median time of each candidate in milliseconds, measured in turns."""


def not_real(tensors: Sequence[Tensor]) -> str:
    """Why running something on ``tensors`` would not run it: they, or what looks on, only stand for a computation."""
    if any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return "tensors without data"
    if _get_current_dispatch_mode() is not None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "a trace"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a function transform"
    return ""


class CudaTimer:
    """CUDA events on the current stream, with a cold L2 cache."""

    def __init__(self, runs: int = RUNS):
        self.runs = runs

    def cannot(self, values: Iterable[Any]) -> str:
        """See `Timer`."""
        tensors = [v for v in values if isinstance(v, Tensor)]
        if reason := not_real(tensors):
            return reason
        if not all(t.is_cuda for t in tensors):
            return "tensors that are not on a GPU"
        if torch.cuda.is_current_stream_capturing():
            return "a CUDA graph being captured"
        return ""

    def round(self, candidates: Sequence[Callable[[], object]]) -> list[float]:
        """See `Timer`: for the current device and stream.

        Before each run a buffer larger than the L2 cache is written, and the GPU waits until the host has launched the run:
        the time is the GPU's, whatever the host does.
        """
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        flush = torch.empty(max(2 * l2, 1 << 26), dtype=torch.uint8, device="cuda")
        spans: list[list[tuple]] = [[] for _ in candidates]
        host = max(min(_seconds(candidate) for _ in range(WARM_UP)) for candidate in candidates)
        wait = head_start(host)
        for _ in range(self.runs):
            for candidate, span in zip(candidates, spans):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()
                torch.cuda._sleep(wait)
                start.record()
                candidate()
                end.record()
                span.append((start, end))
        torch.cuda.current_stream().synchronize()
        return [statistics.median(start.elapsed_time(end) for start, end in span) for span in spans]


def head_start(host: float) -> int:
    """Clock cycles that the GPU waits for a host that launches the slowest candidate in ``host`` seconds."""
    least, most = HEAD_START
    return min(max(least, int(2 * host * CLOCK)), most)


def _seconds(run: Callable[[], object]) -> float:
    """What the host needs for ``run``; the GPU works on."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Inside, nothing is recorded for a backward pass, autocast is off, and ``device`` is the current one."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda" and torch.cuda.is_available():
            stack.enter_context(torch.cuda.device(device))
        yield
