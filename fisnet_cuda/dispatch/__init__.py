"""Which of several implementations runs a fused op: the library's product with own pointwise kernels, or a fused kernel.

The ops are those of `fisnet_cuda.reference.linear_phi`. Candidate 0, ``library``, is always the library's convolution or matrix
product followed by the project's pointwise kernels. Where the compiled extension has a fused kernel that serves a call, each of
its tile shapes is one more candidate, ``fused/<tile>``.

On the first use of a key (op, shapes, dtypes, layouts, settings, math mode, GPU, versions) on a GPU, outside of CUDA-graph
capture and tracing, every candidate is verified and timed on the live tensors, with a cold L2 cache. A fused one is taken if it
is at least 3 % faster in both of two rounds, and no less exact than the library by more than a factor of two; one that is wrong
is never used for that key, and one warning says so. The choice is kept in a JSON file, ``$FISNET_CACHE`` or
``fisnet_cuda/dispatch.json`` in the user's cache folder. Measuring takes some ten milliseconds a key, and memory for the exact
result; where that is not to be had, candidate 0 runs. A choice hangs on a measurement: runs that must agree bit by bit share the
file, or force their candidates.

During capture, and in code that torch.compile traces, nothing is measured: the choice is what the cache holds, else candidate 0.
So run one step before you capture or compile, or keep the file of an earlier run. Compiled code keeps what it was compiled with,
and runs candidate 0 for sizes that are dynamic. float32 kernels compute in TF32, so they are candidates only where PyTorch may
use TF32 itself: ``torch.backends.cudnn.conv.fp32_precision`` for convolutions, ``torch.backends.cuda.matmul.fp32_precision`` for
dense layers (or the older ``allow_tf32``).

``FISNET_DISPATCH`` forces or forbids candidates by op, without measuring: ``FISNET_DISPATCH="*=library"``,
``"transposed_phi=fused"`` (the best guess of the tiles), ``"linear_act=fused/128x64,dual_*=-fused"``. `forced` does so for a
block of code, `report` prints what was measured; so does ``python -m fisnet_cuda.dispatch``.

Example:
    >>> import torch, fisnet_cuda as fc
    >>> net = fc.ISNet(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)))
    >>> with fc.dispatch.forced("*=library"):
    ...     out = net(torch.rand(5, 4), relevance=True)
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from .. import _backend
from ..ops import library
from . import policy as _policy
from .cache import Cache, default_path
from .choose import Dispatcher
from .key import OPS, flags, gpu, signature, versions
from .policy import LIBRARY, Policy
from .table import paragraphs
from .timing import CudaTimer

__all__ = ["OPS", "clear", "decisions", "forced", "planned", "report", "reset", "run"]


def run(name: str, backend: str, *operands: Any, **options: Any) -> tuple:
    """Run op ``name`` of `fisnet_cuda.reference.linear_phi` by the implementation chosen for these operands.

    Args:
        name: the op.
        backend: "auto", "reference" or "cuda".
        operands, options: the op's own, a tensor first.

    Returns:
        The op's results.

    Example:
        >>> import torch
        >>> from fisnet_cuda.reference import linear_geometry
        >>> run("linear_act", "auto", torch.ones(1, 2), torch.tensor([[1.0, -3.0]]), linear_geometry(), relu=True)
        (tensor([[0.]]),)
    """
    if backend == "reference" or operands[0].device.type not in _backend.KERNEL_DEVICES:
        return getattr(library, name)(*operands, **options, backend=backend)
    candidate = _traced(name, operands, options) if torch.compiler.is_dynamo_compiling() else _choice(name, operands, options)
    if candidate == LIBRARY:
        return getattr(library, name)(*operands, **options, backend=backend)
    return _backend.fused(name)(*operands, **options, tile=candidate[len("fused/") :])


_MOST = 10_000  # choices looked up cheaply: settings that change at every step must not pile up


class _Active:
    """A policy, and the choices made under it by the cheap look-up's key."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.settled: dict[tuple, str] = {}


# Thread-safe by the context; autograd's own threads do not inherit it, and take the newest `forced` of any thread
_context: ContextVar[_Active | None] = ContextVar("fisnet_dispatch", default=None)
_entered: list[_Active] = []


@functools.lru_cache(maxsize=1)
def _environment() -> _Active:
    return _Active(Policy.parse(os.environ.get(_policy.VARIABLE, "")))


@functools.lru_cache(maxsize=1)
def _dispatcher() -> Dispatcher:
    return Dispatcher(_backend.fused, CudaTimer(), Cache(default_path()))


def _active() -> _Active:
    active = _context.get()
    if active is None and _entered and torch._C._current_graph_task_id() != -1:
        return _entered[-1]
    return active or _environment()


def _choice(name: str, operands: tuple, options: dict) -> str:
    active = _active()
    key = (name, operands[0].device, flags(), signature(operands), tuple(options), signature(options.values()))
    try:
        found = active.settled.get(key)
    except TypeError:  # a symbolic size has no hash
        return LIBRARY
    if found is not None:
        return found
    choice = _dispatcher().choose(name, operands, options, active.policy)
    if choice.settled:
        if len(active.settled) >= _MOST:
            active.settled.clear()
        active.settled[key] = choice.name
    return choice.name


def _traced(name: str, operands: tuple, options: dict) -> str:
    """`_choice` for code that torch.compile traces: it sees sizes, not data; they must be constants."""
    for v in (*operands, *options.values()):
        for n in _sizes(v):
            if not has_static_value(n):
                return LIBRARY
    return _constant(name, operands[0].device, signature(operands), tuple(options), signature(options.values()))


def _sizes(v: Any) -> tuple:
    """The numbers in an operand that torch.compile may keep symbolic."""
    if isinstance(v, Tensor):
        return (*v.shape, *v.stride())
    values = v if isinstance(v, tuple) else (v,)
    return tuple([n for n in values if isinstance(n, (int, float))])


@torch.compiler.assume_constant_result
def _constant(name: str, device: torch.device, operands: tuple, names: tuple, options: tuple) -> str:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import _disable_current_modes

    def stand_in(v: Any) -> Any:
        if isinstance(v, tuple) and v and isinstance(v[0], torch.dtype):
            dtype, shape, strides = v
            return torch.empty_strided(shape, strides, dtype=dtype, device=device)
        return v

    with _disable_current_modes(), FakeTensorMode():
        return _choice(name, tuple(map(stand_in, operands)), dict(zip(names, map(stand_in, options))))


@contextlib.contextmanager
def forced(rules: str) -> Iterator[None]:
    """Force or forbid candidates inside a block of code, in this thread and in the backward passes that it starts.

    The rules come after those of ``FISNET_DISPATCH``, so they win. A forced kernel is neither measured nor verified, and runs
    in float32 even where TF32 is off; where it does not serve a call, candidate 0 runs and one warning says so.

    Args:
        rules: as in ``FISNET_DISPATCH``: ``"op=library"``, ``"op=fused"``, ``"op=fused/<tile>"``, ``"op=-fused/<tile>"``,
            comma-separated; ops and tiles may be patterns (``*``).

    Raises:
        ValueError: a rule that names no op or no candidate.

    Example:
        >>> with forced("*=fused, dual_*=library"):
        ...     planned("transposed_phi"), planned("dual_fprop")
        ('fused', 'library')
    """
    active = _Active(_active().policy.then(Policy.parse(rules, "forced(...)")))
    token = _context.set(active)
    _entered.append(active)
    try:
        yield
    finally:
        _entered.remove(active)
        _context.reset(token)


def planned(name: str) -> str:
    """What runs op ``name`` where its kernels are: "library", the forced candidate, or "library|fused", measured at first use.

    Example:
        >>> planned("transposed_phi")
        'library|fused'
    """
    policy = _active().policy
    return policy.forced(name) or ("library|fused" if policy.allows(name, "fused/") else LIBRARY)


def decisions(everything: bool = False) -> list[dict]:
    """What was measured, as data: of this machine's GPUs and versions, or all that the cache holds.

    Args:
        everything: also the decisions of other GPUs and versions.

    Returns:
        A dict a key: "op", "operands" (name to dtype, shape and layout), "mode", "gpu", "versions", "choice", "medians"
        (milliseconds of both rounds, by candidate), "margins" (gain over candidate 0 in the worse round), "errors" (relative, of
        each output) and "blacklisted" (why, by candidate).

    Example:
        >>> {d["op"] for d in decisions()} <= set(OPS)
        True
    """
    entries = list(_dispatcher().cache.entries().values())
    if everything:
        return entries
    here = {gpu(torch.device("cuda", i)) for i in range(torch.cuda.device_count())} if torch.cuda.is_available() else set()
    return [e for e in entries if e.get("gpu") in here and e.get("versions") == versions()]


def report(everything: bool = False) -> None:
    """Print `decisions`: for each key its candidates, medians of both rounds, margin over candidate 0, and who is out, and why.

    Example:
        >>> import contextlib, io
        >>> with contextlib.redirect_stdout(io.StringIO()) as told:
        ...     report()
    """
    print(paragraphs(decisions(everything)))


def clear() -> Path | None:
    """Forget all decisions, in this process and in the file, which is returned."""
    cache = _dispatcher().cache
    cache.clear()
    reset()
    return cache.path


def reset() -> None:
    """Read ``FISNET_DISPATCH`` and the cache anew at the next call.

    Example:
        >>> reset()
    """
    _environment.cache_clear()
    _dispatcher.cache_clear()
    for active in _entered:
        active.settled.clear()
