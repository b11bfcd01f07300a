"""What the tests of all kernels share: the shared cases on the test's device, comparison with the reference, layouts, operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from emulator import SCHEDULES, configure
from helpers import EXACT, Case, error, randn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from fisnet_cuda import _backend, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

# ----------------------------------------------------------------------------------------------------------------------
# The shared cases


def on(case: Case, device: str) -> Case:
    """The case with its op on ``device``; its tensors, and what is compared, stay on the CPU."""
    if device == "cpu":
        return case
    return case._replace(op=lambda *tensors: case.op(*(t.to(device) for t in tensors)).cpu())


# ----------------------------------------------------------------------------------------------------------------------
# Kernels beside the reference


def run(name: str, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
    """The kernel ``name`` itself: never the reference."""
    tensor = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
    function = _backend.kernel(name, "auto", tensor)
    assert function is not getattr(reference, name), f"{name} runs the reference"
    return function(*args, **kwargs)


def against_reference(name: str, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
    """Run the kernel; its error against the reference in float64 is at most twice that of the reference in its own dtype,
    plus what one rounding of the operands and of the result makes. Returns what the kernel returned."""

    def reference_of(change: Callable[[Tensor], Tensor]) -> tuple[Tensor | None, ...]:
        changed = tree_map(lambda v: change(v) if isinstance(v, Tensor) else v, (args, kwargs))
        return getattr(reference, name)(*changed[0], **changed[1])

    def perturbed(t: Tensor) -> Tensor:
        return t.double() * (1 + torch.finfo(t.dtype).eps * randn(*t.shape, seed=t.numel()).sign().to(t.device))

    got = run(name, *args, **kwargs)
    exact, usual, floor = (reference_of(change) for change in (Tensor.double, Tensor.clone, perturbed))
    assert len(got) == len(exact)
    for i, (g, u, f, x) in enumerate(zip(got, usual, floor, exact)):
        assert (g is None) == (x is None), f"{name}, result {i}: None in one of them"
        if x is None:
            continue
        # in float64 the reference is itself what is exact
        allowed = EXACT if g.dtype == torch.float64 else 2 * error(u, x) + error(f, x) + torch.finfo(g.dtype).eps
        seen = error(g, x)
        assert seen <= allowed, f"{name}, result {i}, {g.dtype}: error {seen:.3g}, allowed {allowed:.3g}"
    return got


# ----------------------------------------------------------------------------------------------------------------------
# Layouts


def channels_last(t: Tensor) -> Tensor:
    """``t`` with its channels innermost, where it has pixels."""
    return t.contiguous(memory_format=CHANNELS_LAST[t.dim()]) if t.dim() in CHANNELS_LAST else t.contiguous()


def unaligned(t: Tensor) -> Tensor:
    """``t`` with its strides, one element behind a 16-byte boundary."""
    offset = t.new_empty(t.numel() + 1)
    assert t.numel() == 0 or offset.data_ptr() % 16 == 0
    return torch.as_strided(offset, t.size(), t.stride(), 1).copy_(t)


def same(got: Tensor, want: Tensor) -> bool:
    """Bit by bit in the emulator. On a GPU the compiler may fuse other products and sums in a kernel for single elements than
    in that for vectors: one rounding apart."""
    if got.device.type == "cpu":
        return torch.equal(got, want)
    unit = torch.finfo(got.dtype).eps
    return torch.allclose(got, want, rtol=2 * unit, atol=unit * want.abs().max().item())


# ----------------------------------------------------------------------------------------------------------------------
# Repeats, schedules, operators


def schedules(device: str) -> Iterator[tuple]:
    """Every order of the emulator's threads and blocks, set while it is the turn; on a GPU three runs."""
    for schedule in SCHEDULES if device == "cpu" else range(3):
        if device == "cpu":
            configure(*schedule)
        yield schedule


def repeats(device: str, function: Callable[[], tuple[Tensor | None, ...]]) -> None:
    """Every result is the same, bit by bit, in every schedule and every time."""
    first = None
    for schedule in schedules(device):
        now = function()
        first = first or now
        for i, (a, b) in enumerate(zip(first, now)):
            assert a is None or torch.equal(a, b), f"result {i} differs in schedule {schedule}"


def opcheck(name: str, *args: Any) -> None:
    """``torch.library.opcheck`` of ``fisnet::<name>``, and the fake kernel's shapes, dtypes and strides."""
    operator = getattr(torch.ops.fisnet, name).default
    torch.library.opcheck(operator, args)
    real = operator(*args)
    with FakeTensorMode() as mode:
        fake = operator(*tree_map(lambda v: mode.from_tensor(v) if isinstance(v, Tensor) else v, args))
    for i, (r, f) in enumerate(zip(real, fake)):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()), f"{name}, result {i}"
