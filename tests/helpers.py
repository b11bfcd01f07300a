"""What several test files share: how numbers are compared, what every op must pass, and small random networks."""

import itertools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

EXACT = 1e-10  # float64, relative to the largest entry

# ----------------------------------------------------------------------------------------------------------------------
# Comparing


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest entry of ``want``; shapes must agree."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not want.numel():
        return 0.0
    assert torch.isfinite(want).all(), "the expected value is not finite"
    scale = want.abs().max().double().clamp_min(1e-300)
    return ((got.double() - want.double()).abs().max() / scale).item()


def close(got: Tensor, want: Tensor, bound: float = EXACT, what: str = "") -> None:
    """Float64 agreement; where everything expected is 0, everything must be 0."""
    seen = error(got, want)
    assert seen <= bound, f"{what}: relative error {seen:.3g}"


def grads(outputs: Any, inputs: list[Tensor], seed: int = 0) -> list[Tensor]:
    """Gradients of a random linear functional of the outputs, zeros where there is none."""
    outputs = [t for t in (outputs if isinstance(outputs, (tuple, list)) else [outputs]) if t.requires_grad]
    bars = [randn(*t.shape, seed=seed + i).to(t) for i, t in enumerate(outputs)]
    found = torch.autograd.grad(outputs, inputs, bars, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found)]


def close_grads(got: dict[str, Tensor], want: dict[str, Tensor], bound: float = EXACT) -> None:
    """Gradients by name, relative to the largest of all entries (a tiny gradient is the rounding of large ones)."""
    assert got.keys() == want.keys()
    scale = max(w.abs().max().item() for w in want.values())
    for name, w in want.items():
        seen = (got[name] - w).abs().max().item() / scale
        assert seen <= bound, f"gradient of {name}: error {seen:.3g} of the largest gradient"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rand(*shape: int, seed: int = 0, low: float = 0.0, high: float = 1.0) -> Tensor:
    uniform = torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return low + (high - low) * uniform


# ----------------------------------------------------------------------------------------------------------------------
# What every op must pass


class Case(NamedTuple):
    """An op beside the formula it must equal, both functions of the same tensors."""

    name: str
    op: Callable
    formula: Callable
    inputs: dict[str, Tensor]  # float64; each gets a gradient
    function: bool = True  # a torch.autograd.Function: first order only

    def __str__(self) -> str:
        return self.name


def _fresh(case: Case, dtype: torch.dtype = torch.float64, grad: bool = True) -> list[Tensor]:
    return [t.detach().to(dtype).clone().requires_grad_(grad) for t in case.inputs.values()]


def equals_formula(case: Case) -> None:
    """Value, and gradients by plain autograd of the formula."""
    got, want = _fresh(case), _fresh(case)
    y, y_want = case.op(*got), case.formula(*want)
    close(y, y_want, what="value")
    for name, g, w in zip(case.inputs, grads(y, got), grads(y_want, want)):
        close(g, w, what=f"gradient of {name}")


def gradcheck(case: Case) -> None:
    assert torch.autograd.gradcheck(case.op, _fresh(case))


def first_order(case: Case) -> None:
    """Backward twice gives the same; a second derivative of a Function raises instead of being wrong."""
    inputs = _fresh(case)
    y = case.op(*inputs)
    once, twice = grads(y, inputs), grads(y, inputs)
    assert all(torch.equal(a, b) for a, b in zip(once, twice))
    if not case.function:
        return
    y_bar = randn(*y.shape, seed=5).to(y.device).requires_grad_()
    first = torch.autograd.grad(y, inputs, y_bar, create_graph=True, allow_unused=True)
    total = sum(g.sum() for g in first if g is not None)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        total.backward()


def any_inputs_may_ask(case: Case) -> None:
    """Gradients do not depend on which of the inputs ask for one."""
    inputs = _fresh(case)
    full = grads(case.op(*inputs), inputs)
    for ask in itertools.product((False, True), repeat=len(inputs)):
        some = [t.detach().clone().requires_grad_(a) for t, a in zip(inputs, ask)]
        y = case.op(*some)
        assert y.requires_grad == any(ask)
        asked = [t for t in some if t.requires_grad]
        for g, w in zip(grads(y, asked) if asked else [], [f for f, a in zip(full, ask) if a]):
            close(g, w)


def any_layout(case: Case) -> None:
    """Slices of larger tensors, channels_last and reversed axes give what contiguous inputs give."""
    inputs = _fresh(case)
    y = case.op(*inputs)
    want = grads(y, inputs)
    for layout in (_sliced, _channels_last, _transposed):
        got = [layout(t.detach()).requires_grad_() for t in inputs]
        again = case.op(*got)
        close(again, y.detach(), what=layout.__name__)
        for name, g, w in zip(case.inputs, grads(again, got), want):
            close(g, w, what=f"{layout.__name__} gradient of {name}")


def _sliced(t: Tensor) -> Tensor:
    big = t.new_full([2 * size + 1 for size in t.shape], torch.nan)
    part = big[tuple(slice(1, None, 2) for _ in t.shape)]
    return part.copy_(t)


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.clone()


def _transposed(t: Tensor) -> Tensor:
    return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))


def any_dtype(case: Case, draws: int = 5) -> None:
    """float32, bfloat16, float16: at most twice the error of the formula in that dtype, plus a rounding floor.

    The floor is what one rounding more of the inputs and of the result makes in float64; errors are the largest over a
    few inputs and cotangents, since that of a sum of few terms is luck.
    """
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        unit = torch.finfo(dtype).eps
        errors: dict[str, list] = {}
        for seed in range(draws):
            shapes = [t.shape for t in case.inputs.values()]
            drawn = [t * rand(*t.shape, seed=seed + i, low=0.9, high=1.1).to(t.device) for i, t in enumerate(case.inputs.values())]
            drawn = [t.to(dtype) for t in drawn]
            rounded = [t.double() * (1 + unit * randn(*shape, seed=seed).sign().to(t.device)) for t, shape in zip(drawn, shapes)]
            ways = (case.op, drawn), (case.formula, drawn), (case.formula, rounded)
            exact, *others = (
                _value_and_grads(fn, [t.detach().clone().requires_grad_() for t in inputs], seed)
                for fn, inputs in ((case.formula, [t.double() for t in drawn]), *ways)
            )
            assert others[0][0].dtype == dtype
            for name, want, *found in zip(["value", *case.inputs], exact, *others):
                errors.setdefault(name, []).append([error(f, want) for f in found])
        for name, found in errors.items():
            got, usual, floor = (max(e) for e in zip(*found))
            allowed = 2 * usual + floor + unit
            assert got <= allowed, f"{dtype} {name}: error {got:.3g}, allowed {allowed:.3g}"


def _value_and_grads(fn: Callable, inputs: list[Tensor], seed: int) -> list[Tensor]:
    y = fn(*inputs)
    return [y.detach(), *grads(y, inputs, seed)]


CHECKS = (equals_formula, gradcheck, first_order, any_inputs_may_ask, any_layout, any_dtype)


def over_maps(fn: Callable, r: Tensor, *per_sample: Any) -> Tensor:
    """``fn(r_k, ...)`` for each of the K maps apart, put together as ``[N*K, ...]``: what one call over K must equal.

    ``per_sample`` holds tensors ``[N, ...]``; ``r`` is ``[N*K, ...]``.
    """
    n = per_sample[0].shape[0]
    parts = r.unflatten(0, (n, -1)).unbind(1)
    return torch.stack([fn(part, *per_sample) for part in parts], 1).flatten(0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Networks given as the oracle's list of ops


class GraphNet(nn.Module):
    """A module that computes ``[(name, what, inputs), ...]`` (see oracles.py) in plain torch calls, as a user would."""

    def __init__(self, ops: list[tuple]):
        super().__init__()
        self.ops = [(n, w if isinstance(w, str) else None, (i,) if isinstance(i, str) else tuple(i)) for n, w, i in ops]
        for name, what, _ in ops:
            if not isinstance(what, str):
                self.add_module(name, what)

    def forward(self, x):
        values = {"x": x}
        for name, what, inputs in self.ops:
            v = [values[i] for i in inputs]
            if what is None:
                values[name] = getattr(self, name)(v[0])
            elif what == "add":
                values[name] = v[0] + v[1]
            elif what == "concat":
                values[name] = torch.cat(v, 1)
            elif what == "flatten":
                values[name] = torch.flatten(v[0], 1)
            elif what == "relu":
                values[name] = torch.relu(v[0])
        return values[name]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Float64 weights of about unit gain; BatchNorms with scales of both signs and 0, running statistics of their own."""
    g = torch.Generator().manual_seed(seed)
    model = model.double()
    for m in model.modules():
        if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)):
            fan_in = m.weight[0].numel()
            m.weight.data = torch.randn(m.weight.shape, generator=g, dtype=torch.float64) * (2 / fan_in) ** 0.5
            if m.bias is not None:
                m.bias.data = 0.2 * torch.randn(m.bias.shape, generator=g, dtype=torch.float64)
        elif isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.weight.data = 0.8 + 0.4 * torch.rand(m.weight.shape, generator=g, dtype=torch.float64)
            m.weight.data[::3] *= -1
            m.weight.data[1::5] = 0.0
            m.bias.data = 0.3 * torch.randn(m.bias.shape, generator=g, dtype=torch.float64) + 0.1
            m.running_mean.copy_(0.3 * torch.randn(m.weight.shape, generator=g, dtype=torch.float64))
            m.running_var.copy_(0.5 + torch.rand(m.weight.shape, generator=g, dtype=torch.float64))
    return model


def random_ops(seed: int, bn: bool = True) -> list[tuple]:
    """A small classifier of 3x9x9 images for 3 classes: convolutions, BatchNorms, residual sums, dense concatenations,
    preactivation, overlapping and average pools, grouped and strided convolutions, in random order."""
    rng = random.Random(seed)
    ops: list[tuple] = []
    state = {"last": "x", "c": 3, "size": 9}

    def add(kind: str, what: Any, inputs: Any = None) -> str:
        name = f"{kind}{len(ops)}"
        ops.append((name, what, inputs or state["last"]))
        state["last"] = name
        return name

    def conv(c_out: int, inputs: Any = None, c_in: int | None = None, k: int = 3, stride: int = 1, groups: int = 1) -> str:
        padding = k // 2
        c_in = c_in or state["c"]
        name = add("conv", nn.Conv2d(c_in, c_out, k, stride, padding, groups=groups, bias=rng.random() < 0.5), inputs)
        state["c"] = c_out
        state["size"] = (state["size"] + 2 * padding - k) // stride + 1
        return name

    def norm() -> None:
        if bn:
            add("bn", nn.BatchNorm2d(state["c"]))

    def relu() -> str:
        return add("relu", rng.choice([nn.ReLU(), "relu"]))

    conv(rng.choice([4, 6]), k=rng.choice([3, 5]), stride=rng.choice([1, 2]))
    norm()
    relu()
    for block in rng.sample(["plain", "residual", "dense", "preact", "max", "avg", "group"], 3):
        c, start = state["c"], state["last"]
        if block == "plain":
            conv(rng.choice([4, 6]))
            norm()
            relu()
        elif block == "group":
            conv(c, groups=2, k=1)
            norm()
            relu()
        elif block == "residual":
            conv(c)
            norm()
            relu()
            y = conv(c)
            norm()
            y = state["last"]
            if rng.random() < 0.5:  # the skip has its own map
                conv(c, start, c_in=c, k=1)
                norm()
                start = state["last"]
            add("add", "add", (y, start))
            relu()
        elif block == "dense":
            for _ in range(2):
                norm()
                relu()
                new = conv(2, c_in=state["c"])
                state["c"] = c + 2
                start = add("concat", "concat", (start, new))
                c += 2
            norm()
            relu()
        elif block == "preact":
            norm()
            relu()
            y = conv(c)
            add("add", "add", (y, start))
            norm()
            relu()
        elif state["size"] >= 4:
            pool = nn.MaxPool2d(3, 2, 1) if block == "max" else nn.AvgPool2d(2)
            state["size"] = (state["size"] - 1) // 2 + 1 if block == "max" else state["size"] // 2
            add("pool", pool)
    if rng.random() < 0.5:
        add("pool", nn.AdaptiveAvgPool2d(1))
        features = state["c"]
    else:
        features = state["c"] * state["size"] ** 2
    add("flatten", "flatten")
    if rng.random() < 0.5:
        add("fc", nn.Linear(features, 5))
        relu()
        features = 5
    add("head", nn.Linear(features, 3))
    return ops
