"""Max pools (winner takes all, overlaps add) and average pools, forward and transposed."""

import pytest
import torch
from helpers import CHECKS, Case, close, equals_formula, grads, over_maps, rand, randn
from hypothesis import given
from hypothesis import strategies as st

from fisnet_cuda import ops, reference

N, K = 2, 3
F = torch.nn.functional
MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
ADAPTIVE_MAX = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}
AVG = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
ADAPTIVE_AVG = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}

# spatial, adaptive, settings, size of the input
MAX_POOLS = {
    "2": (2, False, (2, 2, 0, 1, False), (4, 4)),
    "overlapping": (2, False, (3, 2, 1, 1, False), (5, 6)),
    "stride-1": (2, False, (3, 1, 1, 1, False), (4, 3)),
    "no-stride": (2, False, (2, None, 0, 1, False), (5, 4)),
    "ceil": (2, False, (2, 2, 0, 1, True), (5, 3)),
    "dilated": (2, False, ((2, 3), (1, 2), (0, 1), (2, 1), False), (5, 6)),
    "adaptive": (2, True, ((2, 3),), (5, 4)),
    "global": (2, True, (1,), (3, 3)),
    "1d": (1, False, (3, 2, 1, 1, False), (7,)),
    "1d-adaptive": (1, True, (3,), (7,)),
    "3d": (3, False, (2, 1, 0, 1, False), (3, 2, 3)),
    "one-pixel": (2, False, (1, 1, 0, 1, False), (1, 1)),
}
# kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
AVG_POOLS = {
    "2": (2, False, (2, 2, 0, False, True, None), (4, 4)),
    "overlapping": (2, False, (3, 2, 1, False, True, None), (5, 6)),
    "without-pad": (2, False, (3, 2, 1, False, False, None), (5, 6)),
    "ceil": (2, False, ((2, 3), (2, 2), (0, 1), True, True, None), (5, 4)),
    "divisor": (2, False, (2, None, 0, False, True, 3), (4, 5)),
    "adaptive": (2, True, ((2, 3),), (5, 4)),
    "global": (2, True, (1,), (3, 2)),
    "global-none": (2, True, ((1, None),), (3, 2)),
    "1d": (1, False, (3, 2, 1, False, False), (7,)),
    "1d-ceil": (1, False, ((2,), None, (0,), True, True), (5,)),
    "1d-adaptive": (1, True, (3,), (7,)),
    "1d-global": (1, True, (1,), (4,)),
    "3d": (3, False, (2, 1, 1, False, True, None), (3, 2, 3)),
    "3d-adaptive": (3, True, (2,), (3, 2, 3)),
    "3d-global": (3, True, (1,), (2, 2, 2)),
    "one-pixel": (2, False, (1, 1, 0, False, True, None), (1, 1)),
}


def plain(table, adaptive_table, spatial, adaptive, settings):
    fn = (adaptive_table if adaptive else table)[spatial]
    return lambda x: fn(x, *settings)


def transposed_of(pool, x):
    """The transpose at ``x`` by plain autograd: PyTorch adds where windows overlap. Differentiable in ``g``."""

    def fn(g):
        with torch.enable_grad():
            v = x.to(g.dtype).repeat_interleave(g.shape[0] // max(len(x), 1), 0).requires_grad_()
            return torch.autograd.grad(pool(v), v, g, create_graph=True)[0]

    return fn


def max_case(name, maps=1):
    spatial, adaptive, settings, size = MAX_POOLS[name]
    pool = plain(MAX, ADAPTIVE_MAX, spatial, adaptive, settings)
    x = randn(N, 3, *size, seed=1)
    y, winners = ops.max_pool(x, spatial, adaptive, settings)
    return Case(
        f"{name}-K{maps}", lambda g: ops.max_pool_transposed(g, winners, size, (spatial, adaptive, settings)), transposed_of(pool, x),
        {"g": randn(N * maps, *y.shape[1:], seed=2)},
    )  # fmt: skip


def avg_case(name, maps=1):
    spatial, adaptive, settings, size = AVG_POOLS[name]
    pool = plain(AVG, ADAPTIVE_AVG, spatial, adaptive, settings)
    x = randn(N, 3, *size, seed=1)
    return Case(
        f"{name}-K{maps}", lambda g: ops.avg_pool_transposed(g, spatial, adaptive, settings, size), transposed_of(pool, x),
        {"g": randn(N * maps, *pool(x).shape[1:], seed=2)}, function=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", MAX_POOLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_max_pool(name, dtype):
    spatial, adaptive, settings, size = MAX_POOLS[name]
    x = randn(N, 3, *size).to(dtype).requires_grad_()
    y, winners = ops.max_pool(x, spatial, adaptive, settings)
    want = plain(MAX, ADAPTIVE_MAX, spatial, adaptive, settings)(x)
    assert torch.equal(y, want)
    assert torch.equal(x.detach().flatten(2).gather(2, winners.flatten(2)), y.detach().flatten(2))
    bar = randn(*y.shape, seed=3).to(dtype)
    assert torch.equal(*(torch.autograd.grad(v, x, bar)[0] for v in (y, want)))


def test_the_first_of_equals_wins():
    _, winners = ops.max_pool(torch.zeros(1, 1, 4, 4), 2, False, (2, 2, 0, 1, False))
    assert winners.flatten().tolist() == [0, 2, 8, 10]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", [max_case("overlapping", K), max_case("adaptive"), max_case("1d", K), max_case("3d")], ids=str)
def test_max_pool_transposed(case, check):
    check(case)


@pytest.mark.parametrize("maps", [1, K])
@pytest.mark.parametrize("name", MAX_POOLS)
def test_every_max_pool_transposed(name, maps):
    equals_formula(max_case(name, maps))


def phi_case(name, maps, skip, eps=0.1):
    """The transpose fused with phi, against the two ops apart."""
    pool, size = MAX_POOLS[name][:3], MAX_POOLS[name][3]
    a = rand(N, 3, *size, seed=1, low=-0.5).relu()
    y, winners = ops.max_pool(a, *pool)
    inputs = {"g": randn(N * maps, *y.shape[1:], seed=2), "a": a + 0.1}  # away from the kink, for gradcheck
    if skip:
        inputs["skip"] = randn(N * maps, 3, *size, seed=3)

    def formula(g, a, skip=None):
        joined = reference.max_pool_scatter(g, winners, size, pool)
        return ops.phi_scale(joined, a, eps, skip, backend="reference")

    op = lambda g, a, skip=None: ops.max_pool_transposed_phi(g, winners, size, pool, a, eps, skip)  # noqa: E731
    return Case(f"{name}-K{maps}{'-skip' if skip else ''}", op, formula, inputs)


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", [phi_case("overlapping", 1, True), phi_case("2", K, False), phi_case("1d", K, True)], ids=str)
def test_max_pool_transposed_phi(case, check):
    check(case)


def test_max_pool_transposed_phi_wants_the_pool_s_input():
    g, winners = torch.ones(1, 1, 2), torch.zeros(1, 1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"a must be \(1, 1, 4\), the pool's input, got \(1, 1, 3\)"):
        ops.max_pool_transposed_phi(g, winners, (4,), None, torch.ones(1, 1, 3), 0.1)


@pytest.mark.parametrize("name", [name for name, pool in MAX_POOLS.items() if pool[:2] == (2, False)])
def test_winners_as_bytes(name):
    """The kernels' winners, positions inside a window: the reference reads them too, given the pool."""
    *pool, size = MAX_POOLS[name]
    y, winners = ops.max_pool(randn(N, 3, *size), *pool, backend="reference")
    kernel, stride, pad, dilation = (reference.pooling.window_of(pool[2])[i : i + 2] for i in range(0, 8, 2))
    h, w = winners // size[1], winners % size[1]
    rows, columns = (torch.arange(n) for n in winners.shape[2:])
    kh = (h - (rows * stride[0] - pad[0]).unsqueeze(-1)) // dilation[0]
    kw = (w - (columns * stride[1] - pad[1])) // dilation[1]
    bytes_ = (kh * kernel[1] + kw).to(torch.uint8)
    g, x = randn(N * K, *y.shape[1:], seed=2), randn(N * K, 3, *size, seed=3)
    pool = tuple(pool)
    assert torch.equal(reference.max_pool_scatter(g, bytes_, size, pool), reference.max_pool_scatter(g, winners, size))
    assert torch.equal(reference.max_pool_gather(x, bytes_, pool), reference.max_pool_gather(x, winners))
    with pytest.raises(ValueError, match="winners are bytes"):
        reference.max_pool_scatter(g, bytes_, size)


def test_overlapping_windows_keep_all_relevance():
    """(The authors' LRP-Block overwrites where windows meet, and loses about a third.)"""
    case = max_case("overlapping", K)
    g = case.inputs["g"]
    close(case.op(g).sum((1, 2, 3)), g.sum((1, 2, 3)))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_max_pool_layouts(layout):
    """In channels_last nothing is copied: the result keeps the layout; winners may come in either."""
    x = randn(N, 3, 5, 6)
    y, winners = ops.max_pool(x.contiguous(memory_format=layout), *MAX_POOLS["overlapping"][:3])
    g = randn(N * K, *y.shape[1:], seed=1)
    want = torch.cat([ops.max_pool_transposed(g[i::K], winners.contiguous(), (5, 6)) for i in range(K)])
    got = ops.max_pool_transposed(g.contiguous(memory_format=layout), winners, (5, 6))
    assert got.is_contiguous(memory_format=layout)
    close(torch.cat([got[i::K] for i in range(K)]), want)


def test_maps_are_separate():
    x = randn(N, 3, 5, 6)
    y, winners = ops.max_pool(x, *MAX_POOLS["overlapping"][:3])
    g = randn(N * K, *y.shape[1:])
    apart = over_maps(lambda r, v: ops.max_pool_transposed(r, v, (5, 6)), g, winners)
    close(ops.max_pool_transposed(g, winners, (5, 6)), apart, 0.0)


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", [avg_case("overlapping", K), avg_case("global"), avg_case("1d"), avg_case("ceil")], ids=str)
def test_avg_pool_transposed(case, check):
    check(case)


@pytest.mark.parametrize("name", AVG_POOLS)
def test_every_avg_pool(name):
    spatial, adaptive, settings, size = AVG_POOLS[name]
    x = randn(N, 3, *size)
    want = plain(AVG, ADAPTIVE_AVG, spatial, adaptive, settings)(x)
    assert torch.equal(ops.avg_pool(x, spatial, adaptive, settings), want)
    equals_formula(avg_case(name, K))


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.booleans(), st.booleans(), st.booleans())
def test_windows_of_every_size(size, kernel, stride, padding, ceil, include, average):
    padding = min(padding, kernel // 2)
    size = max(size, kernel - 2 * padding)
    try:
        if average:
            AVG_POOLS["drawn"] = (2, False, (kernel, stride, padding, ceil, include, None), (size, size + 1))
            equals_formula(avg_case("drawn", 2))
        else:
            MAX_POOLS["drawn"] = (2, False, (kernel, stride, padding, 1, ceil), (size, size + 1))
            equals_formula(max_case("drawn", 2))
    finally:
        AVG_POOLS.pop("drawn", None), MAX_POOLS.pop("drawn", None)


@pytest.mark.parametrize("case", [max_case("overlapping"), avg_case("overlapping"), avg_case("global"), avg_case("1d")], ids=str)
def test_empty_batch(case):
    g = case.inputs["g"][:0].detach().requires_grad_()
    if case.function:
        winners = torch.zeros(g.shape, dtype=torch.long)
        back = ops.max_pool_transposed(g, winners, (5, 6))
    else:
        back = case.op(g)
    assert back.shape == (0, *case.op(case.inputs["g"]).shape[1:])
    assert grads(back, [g])[0].shape == g.shape
