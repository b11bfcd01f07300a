"""Max pool kernels: winners, the transpose and its adjoint, the transpose fused with phi; emulated, and on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from emulator import SCHEDULES, emulated
from helpers import CHECKS, Case, close, equals_formula, error, grads, rand, randn
from test_pooling import MAX_POOLS, max_case, transposed_of  # tests/ops: the cases that every implementation must pass
from torch._subclasses.fake_tensor import FakeTensorMode

from fisnet_cuda import _backend, ops, reference
from fisnet_cuda.reference.pooling import winner_positions

N, K = 2, 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])

# channels, size of the input, kernel_size, stride, padding, dilation, ceil_mode
WINDOWS = {
    "2x2": (8, (4, 6), (2, 2, 0, 1, False)),
    "overlapping": (16, (7, 9), (3, 2, 1, 1, False)),
    "stride-1": (8, (4, 5), (3, 1, 1, 1, False)),
    "dilated": (8, (7, 8), ((2, 3), (1, 2), (0, 1), (2, 1), False)),
    "dilated-overlapping": (8, (9, 8), (3, 1, 1, 2, False)),
    "ceil": (8, (5, 8), (2, 2, 0, 1, True)),
    "gaps": (8, (9, 7), (2, 4, 1, 1, False)),
    "odd-channels": (5, (5, 6), (3, 2, 1, 1, True)),
    "one-channel": (1, (6, 5), (2, 1, 0, 1, False)),
    "one-window": (8, (4, 3), ((4, 3), 1, 0, 1, False)),
    "one-pixel": (16, (1, 1), (1, 1, 0, 1, False)),
    "15x15": (8, (16, 17), (15, 1, 7, 1, False)),
    "256": (8, (16, 17), (16, None, 0, 1, False)),
}
windows = pytest.mark.parametrize("name", WINDOWS)


def pooled_input(name, layout, dtype, device, seed=1):
    channels, size, settings = WINDOWS[name]
    x = randn(N, channels, *size, seed=seed).to(device, dtype).contiguous(memory_format=layout)
    return x, settings


def moved(case, device):
    """A case with its inputs on the device; the formula stays where they are."""
    return case._replace(inputs={k: t.to(device) for k, t in case.inputs.items()})


# ---- forward -------------------------------------------------------------------------------------------------------------


@layouts
@dtypes
@windows
def test_values_and_winners_are_pytorch_s(device, name, dtype, layout):
    x, settings = pooled_input(name, layout, dtype, device)
    x.requires_grad_()
    y, winners = ops.max_pool(x, 2, False, settings)
    want, index = F.max_pool2d(x, *settings, return_indices=True)
    assert winners.dtype == torch.uint8
    assert torch.equal(y, want)
    assert torch.equal(winner_positions(winners, x.shape[2:], (2, False, settings)), index)
    assert y.is_contiguous(memory_format=layout)
    assert winners.is_contiguous(memory_format=layout)
    bar = randn(*y.shape, seed=3).to(device, dtype)
    (got,) = torch.autograd.grad(y, x, bar)
    (exact,) = torch.autograd.grad(F.max_pool2d(x.double(), *settings), x, bar.double())
    close(got, exact, 2 * torch.finfo(dtype).eps)


@layouts
def test_several_samples_a_thread(device, layout):
    """With blocks enough for a GPU, a thread takes several samples; their number is no multiple of the blocks."""
    x = randn(4099, 8, 2, 3, seed=1).float().to(device).contiguous(memory_format=layout).requires_grad_()
    settings = (2, 1, 0, 1, False)
    y, winners = ops.max_pool(x, 2, False, settings)
    want, index = F.max_pool2d(x, *settings, return_indices=True)
    assert torch.equal(y, want)
    assert torch.equal(winner_positions(winners, x.shape[2:], (2, False, settings)), index)
    bar = randn(*y.shape, seed=2).float().to(device).contiguous(memory_format=layout)
    (got,) = torch.autograd.grad(y, x, bar)
    (want,) = torch.autograd.grad(want, x, bar)
    close(got, want, 2 * torch.finfo(torch.float32).eps)
    back = _backend.kernel("max_pool_gather", "auto", x)(x.detach(), winners, (2, False, settings))
    assert torch.equal(back, x.detach().flatten(2).gather(2, index.flatten(2)).view_as(back))


@layouts
@pytest.mark.parametrize("value", [0.0, -torch.inf, torch.inf, torch.nan])
def test_the_first_of_equals_wins_and_nan_wins_over_all(device, value, layout):
    """(PyTorch's rule, bit for bit.)"""
    settings = (3, 2, 1, 1, False)
    everywhere = torch.full((1, 8, 5, 6), value, device=device).contiguous(memory_format=layout)
    somewhere = randn(1, 8, 5, 6).float().to(device).contiguous(memory_format=layout)
    somewhere[..., ::2, 1::3] = value
    for x in (everywhere, somewhere):
        y, winners = ops.max_pool(x, 2, False, settings)
        want, index = F.max_pool2d(x, *settings, return_indices=True)
        assert torch.equal(y.nan_to_num(7.0), want.nan_to_num(7.0))
        assert torch.equal(winner_positions(winners, (5, 6), (2, False, settings)), index)


@pytest.mark.parametrize(
    "pool",
    [(1, False, (3, 2, 1, 1, False)), (3, False, (2, 1, 0, 1, False)), (2, True, (2,)), (2, False, ((1, 257), 1, 0, 1, False))],
    ids=["1-d", "3-d", "adaptive", "257 pixels"],
)
def test_other_pools_run_the_reference_visibly(device, pool):
    size = {1: (7,), 2: (3, 300), 3: (3, 4, 3)}[pool[0]]
    x = randn(N, 3, *size).to(device)
    y, winners = ops.max_pool(x, *pool)
    want, index = reference.max_pool(x, *pool)
    assert torch.equal(y, want)
    assert torch.equal(winners, index)
    g = randn(*y.shape, seed=1).to(device)
    close(ops.max_pool_transposed(g, winners, size, pool), reference.max_pool_scatter(g, index, size))
    operands = (None, *pool)
    assert _backend.implementation("max_pool", "auto", torch.device("cuda"), operands) == "reference"
    assert _backend.implementation("max_pool_scatter", "auto", torch.device("cuda"), (None, None, None, pool)) == "reference"
    served = (None, 2, False, (16, 1, 0, 1, False))
    assert _backend.implementation("max_pool", "auto", torch.device("cuda"), served) == "cuda"


@pytest.mark.parametrize("settings", [(2, 2, 2, 1, False), (9, 1, 0, 1, False), (2, 2, 0, 0, False)])
def test_pytorch_s_own_errors(device, settings):
    x = randn(1, 2, 4, 4).to(device)
    with pytest.raises(RuntimeError) as want:
        F.max_pool2d(x, *settings)
    with pytest.raises(RuntimeError) as got:
        ops.max_pool(x, 2, False, settings)
    assert str(got.value) == str(want.value)


def test_bytes_need_the_pool(device):
    _, winners = ops.max_pool(randn(1, 2, 4, 4).to(device), 2, False, (2, 2, 0, 1, False))
    with pytest.raises(ValueError, match="winners are bytes"):
        ops.max_pool_transposed(randn(1, 2, 2, 2).to(device), winners, (4, 4))


# ---- the transpose -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("name", "maps"), [("overlapping", K), ("2", 1), ("dilated", K), ("adaptive", 1), ("1d", K)])
def test_transposed(device, name, maps, check):
    check(moved(on_device(name, maps, device), device))


@pytest.mark.parametrize("maps", [1, K])
@pytest.mark.parametrize("name", MAX_POOLS)
def test_every_pool_transposed(device, name, maps):
    equals_formula(moved(on_device(name, maps, device), device))


def on_device(name, maps, device):
    """`max_case` with winners that this device's implementation made."""
    if device == "cpu":
        return max_case(name, maps)
    spatial, adaptive, settings, size = MAX_POOLS[name]
    x = randn(N, 3, *size, seed=1).to(device)
    y, winners = ops.max_pool(x, spatial, adaptive, settings)
    return Case(
        name, lambda g: ops.max_pool_transposed(g, winners, size, (spatial, adaptive, settings)),
        transposed_of(lambda v: reference.max_pool(v, spatial, adaptive, settings)[0], x),
        {"g": randn(N * maps, *y.shape[1:], seed=2)},
    )  # fmt: skip


def run_all(name, layout, dtype, device, maps, skip=True):
    """Inputs, and every result of the pool's ops: transpose, adjoint, fused transpose and its gradients."""
    x, settings = pooled_input(name, layout, dtype, device)
    pool, size = (2, False, settings), tuple(x.shape[2:])
    a = x.relu()
    y, winners = ops.max_pool(a, *pool)
    g = randn(N * maps, *y.shape[1:], seed=2).to(device, dtype).contiguous(memory_format=layout)
    more = randn(N * maps, *x.shape[1:], seed=3).to(device, dtype).contiguous(memory_format=layout) if skip else None
    s_bar = randn(N * maps, *x.shape[1:], seed=4).to(device, dtype).contiguous(memory_format=layout)

    def results(scatter, gather, fused):
        leaves = [t.detach().requires_grad_() for t in (g, a, *([more] if skip else []))]
        s = fused(leaves[0], winners, size, pool, leaves[1], 0.1, leaves[2] if skip else None)
        bars = torch.autograd.grad(s, leaves, s_bar)
        return [scatter(g, winners, size, pool), gather(s_bar, winners, pool), s.detach(), *bars]

    return results


@pytest.mark.parametrize("maps", [1, K])
@layouts
@dtypes
@windows
def test_all_at_once_against_float64(device, name, dtype, layout, maps):
    """Transpose, adjoint and the fused op with its gradients, by the 2x rule: the reference in that dtype sets the bound."""
    results = run_all(name, layout, dtype, device, maps, skip=maps > 1)
    got = results(ops.max_pool_transposed, reference_or_kernel("max_pool_gather", device), ops.max_pool_transposed_phi)

    def reference_fused(g, winners, size, pool, a, eps, skip):
        joined = ops.max_pool_transposed(g, winners, size, pool, backend="reference")
        return ops.phi_scale(joined, a, eps, skip, backend="reference")

    usual = results(reference.max_pool_scatter, reference.max_pool_gather, reference_fused)
    wide = run_wide(name, layout, dtype, device, maps)
    exact = wide(reference.max_pool_scatter, reference.max_pool_gather, reference_fused)
    one_window = usual[1].shape[2:] == (1, 1)  # such a g has no layout to follow
    for ours, theirs, want in zip(got, usual, exact, strict=True):
        assert ours.dtype == dtype
        assert one_window or ours.is_contiguous(memory_format=layout)
        floor = 16 if dtype is torch.float64 else 2  # in float64 the expected value is rounded too
        assert error(ours, want) <= 2 * error(theirs, want) + floor * torch.finfo(dtype).eps


def run_wide(name, layout, dtype, device, maps):
    """The same inputs, rounded to ``dtype``, in float64."""
    channels, size, settings = WINDOWS[name]
    skip, pool = maps > 1, (2, False, settings)
    a = randn(N, channels, *size, seed=1).to(device, dtype).relu()
    y, winners = reference.max_pool(a, *pool)
    rounded = lambda *shape, seed: randn(*shape, seed=seed).to(device, dtype).double()  # noqa: E731
    g = rounded(N * maps, *y.shape[1:], seed=2)
    more = rounded(N * maps, *a.shape[1:], seed=3) if skip else None
    s_bar = rounded(N * maps, *a.shape[1:], seed=4)

    def results(scatter, gather, fused):
        leaves = [t.detach().requires_grad_() for t in (g, a.double(), *([more] if skip else []))]
        s = fused(leaves[0], winners, size, pool, leaves[1], 0.1, leaves[2] if skip else None)
        bars = torch.autograd.grad(s, leaves, s_bar)
        return [scatter(g, winners, size, pool), gather(s_bar, winners, pool), s.detach(), *bars]

    return results


def reference_or_kernel(name, device):
    return _backend.kernel(name, "auto", torch.empty(0, device=device))


@layouts
@windows
def test_all_relevance_is_kept(device, name, layout):
    """The sum over the input is the sum of g: overlapping windows add, nothing is lost."""
    x, settings = pooled_input(name, layout, torch.float64, device)
    y, winners = ops.max_pool(x, 2, False, settings)
    g = randn(N * K, *y.shape[1:], seed=2).to(device).contiguous(memory_format=layout)
    R = ops.max_pool_transposed(g, winners, tuple(x.shape[2:]), (2, False, settings))
    close(R.sum((2, 3)), g.sum((2, 3)))


def test_a_window_of_padding_alone(device):
    """Dilation can step over the whole image: such a window has no winner, takes no relevance and gives none."""
    x, pool = randn(1, 8, 1, 1).to(device), (2, False, (2, 1, 1, 2, False))
    y, winners = ops.max_pool(x, *pool)
    assert torch.equal(y, torch.full_like(y, -torch.inf))
    assert not ops.max_pool_transposed(torch.ones_like(y), winners, (1, 1), pool).any()
    assert not reference_or_kernel("max_pool_gather", device)(torch.ones_like(x), winners, pool).any()


# ---- fused with phi --------------------------------------------------------------------------------------------------------


def phi_case(name, maps, skip, device, eps=0.1):
    channels, size, settings = WINDOWS[name]
    pool = (2, False, settings)
    a = rand(N, min(channels, 3), *size, seed=1, low=-0.5).relu()
    with torch.no_grad():
        y, winners = ops.max_pool(a.to(device), *pool)
    inputs = {"g": randn(N * maps, *y.shape[1:], seed=2), "a": a}
    if skip:
        inputs["skip"] = randn(N * maps, *a.shape[1:], seed=3)
    index = winner_positions(winners, size, pool)

    def formula(g, a, skip=None):
        joined = reference.max_pool_scatter(g, index, size)
        return ops.phi_scale(joined, a, eps, skip, backend="reference")

    op = lambda g, a, skip=None: ops.max_pool_transposed_phi(g, winners, size, pool, a, eps, skip)  # noqa: E731
    return Case(f"{name}-K{maps}{'-skip' if skip else ''}", op, formula, {k: t.to(device) for k, t in inputs.items()})


@pytest.mark.parametrize("check", [c for c in CHECKS if c.__name__ != "gradcheck"], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("name", "maps", "skip"), [("overlapping", K, True), ("2x2", 1, False), ("dilated", K, False)])
def test_transposed_phi(device, name, maps, skip, check):
    check(phi_case(name, maps, skip, device))


@pytest.mark.parametrize("skip", [False, True])
def test_transposed_phi_gradcheck(device, skip):
    """At activations that are alive: at a kink the difference quotient means nothing."""
    case = phi_case("one-channel", K, skip, device)
    inputs = [t + 0.1 if name == "a" else t for name, t in case.inputs.items()]
    assert torch.autograd.gradcheck(case.op, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("relative", [False, True], ids=["eps 0", "relative eps"])
@layouts
def test_other_epsilons(device, relative, layout):
    x, settings = pooled_input("overlapping", layout, torch.float64, device)
    a = x.relu()
    eps = ops.relative_epsilon(a, 0.1) if relative else 0.0
    y, winners = ops.max_pool(a, 2, False, settings)
    pool, size = (2, False, settings), tuple(a.shape[2:])
    g = randn(N * K, *y.shape[1:], seed=2).to(device)
    leaves = [t.detach().requires_grad_() for t in (g, a)]
    s = ops.max_pool_transposed_phi(leaves[0], winners, size, pool, leaves[1], eps)
    want = ops.max_pool_transposed_phi(leaves[0], winners, size, pool, leaves[1], eps, backend="reference")
    close(s, want)
    for got, wanted in zip(grads(s, leaves), grads(want, leaves)):
        close(got, wanted)


# ---- how it runs -----------------------------------------------------------------------------------------------------------


def checked(name, layout, device, dtype=torch.float32):
    results = run_all(name, layout, dtype, device, K)
    gather = reference_or_kernel("max_pool_gather", device)
    return results(ops.max_pool_transposed, gather, ops.max_pool_transposed_phi)


@layouts
@pytest.mark.parametrize("name", ["overlapping", "odd-channels"])
def test_repeatable(device, name, layout):
    """Bit for bit."""
    once, twice = (checked(name, layout, device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice))


@layouts
@pytest.mark.parametrize("name", ["overlapping", "odd-channels"])
def test_any_schedule(name, layout):
    """The order of threads and blocks changes no bit."""
    seen = []
    for schedule in SCHEDULES:
        with emulated(*schedule):
            seen.append(checked(name, layout, "cpu"))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other))


@layouts
def test_pointers_off_16_bytes(device, layout):
    """Tensors that start one element into their memory run the scalar path, with the same numbers."""
    x, settings = pooled_input("overlapping", layout, torch.float32, device)
    pool, size = (2, False, settings), tuple(x.shape[2:])

    def off(t):
        moved = torch.empty(t.numel() + 1, dtype=t.dtype, device=device)[1:].as_strided(t.shape, t.stride(), 1)
        return moved.copy_(t)

    a = x.relu()
    y, winners = ops.max_pool(a, *pool)
    y_off, winners_off = ops.max_pool(off(a), *pool)
    assert torch.equal(y, y_off)
    assert torch.equal(winners, winners_off)
    g = randn(N, *y.shape[1:], seed=2).float().to(device).contiguous(memory_format=layout)
    for shift in ((off, off, off), (lambda t: t, off, lambda t: t)):
        operands = [f(t) for f, t in zip(shift, (g, winners, a))]
        close(
            ops.max_pool_transposed_phi(operands[0], operands[1], size, pool, operands[2], 0.1),
            ops.max_pool_transposed_phi(g, winners, size, pool, a, 0.1), 1e-6,
        )  # fmt: skip


def test_layouts_may_differ(device):
    """g, winners and a each in either layout: the activation's (or g's) decides, the numbers stay."""
    x, settings = pooled_input("overlapping", torch.contiguous_format, torch.float64, device)
    pool, size = (2, False, settings), tuple(x.shape[2:])
    a = x.relu()
    y, winners = ops.max_pool(a, *pool)
    g = randn(N * K, *y.shape[1:], seed=2).to(device)
    want = ops.max_pool_transposed_phi(g, winners, size, pool, a, 0.1)
    last = lambda t: t.contiguous(memory_format=torch.channels_last)  # noqa: E731
    for operands in ((last(g), winners, a), (g, last(winners), a), (g, winners, last(a)), (last(g), winners, last(a))):
        close(ops.max_pool_transposed_phi(operands[0], operands[1], size, pool, operands[2], 0.1), want)
        close(ops.max_pool_transposed(operands[0], operands[1], size, pool), ops.max_pool_transposed(g, winners, size, pool))


@layouts
def test_empty_batch(device, layout):
    x = randn(0, 8, 6, 5).to(device).contiguous(memory_format=layout).requires_grad_()
    pool = (2, False, (2, 2, 0, 1, False))
    y, winners = ops.max_pool(x, *pool)
    assert y.shape == winners.shape == (0, 8, 3, 2)
    g = y.detach().requires_grad_()
    for s in (ops.max_pool_transposed(g, winners, (6, 5), pool), ops.max_pool_transposed_phi(g, winners, (6, 5), pool, x, 0.1)):
        assert s.shape == x.shape
        assert grads(s, [g])[0].shape == g.shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@layouts
@pytest.mark.parametrize("size", [(7, 9), (1, 1)])
def test_opcheck_and_fake_strides(device, size, layout):
    """Schemas, and fake kernels that give the real shapes, dtypes and strides."""
    x = randn(N, 8, *size).float().to(device).contiguous(memory_format=layout)
    window = [3, 3, 2, 2, 1, 1, 1, 1]
    out_size = [(s + 1) // 2 for s in size]
    y, winners = torch.ops.fisnet.max_pool(x, out_size, window)
    g = torch.cat([y] * K).contiguous(memory_format=layout)
    s = torch.cat([x] * K).contiguous(memory_format=layout)
    eps_n = torch.ones(N, device=device)
    calls = [
        (torch.ops.fisnet.max_pool, (x, out_size, window)),
        (torch.ops.fisnet.max_pool_scatter, (g, winners, list(size), window)),
        (torch.ops.fisnet.max_pool_gather, (s, winners, window)),
        (torch.ops.fisnet.max_pool_scatter_phi, (g, winners, x, 0.1, None, s, window)),
        (torch.ops.fisnet.max_pool_scatter_phi, (g, winners, x, 0.0, eps_n, None, window)),
        (torch.ops.fisnet.max_pool_scatter_phi_backward, (s, s, winners, x, 0.1, None, window, True, True)),
        (torch.ops.fisnet.max_pool_scatter_phi_backward, (s, None, winners, x, 0.1, eps_n, window, False, False)),
    ]
    for op, args in calls:
        torch.library.opcheck(op, args)
        real = op(*args)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
        for r, f in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (real, fake)), strict=True):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())
