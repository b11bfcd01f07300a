"""`plus_affine` and its adjoint on the kernels: autograd of the formula, the reference, and what only a kernel can get wrong."""

import itertools

import pytest
import torch
from common import CHANNELS_LAST, DTYPES, against_reference, channels_last, on, opcheck, repeats, run, same, unaligned
from helpers import CHECKS, Case, rand, randn

from fisnet_cuda.ops import rules

EPS = 0.02
# vectors that cross from one channel to the next, cover several, or lie in one; one block and several
SHAPES = {"odd": (2, 3, 5, 3), "crossing": (2, 8, 3, 3), "whole": (2, 16, 4, 4), "blocks": (3, 24, 20, 19), "one pixel": (3, 40, 1, 1),
          "volume": (2, 8, 2, 3, 2), "dense": (5, 40), "odd dense": (3, 7), "sequence": (2, 8, 5), "one": (1, 1)}  # fmt: skip
CONTIGUOUS = torch.Tensor.contiguous


def operands(shape, maps, dtype, device, layout=CONTIGUOUS):
    """``R, P, u, plus_bar, minus_bar`` of one layout, and ``k`` (of both signs, 0 among them) and ``c``."""
    n, *size = shape
    P = rand(*shape, seed=1)
    k, c = randn(size[0], seed=5), rand(size[0], seed=6)
    k[2::5] = 0
    R, plus_bar, minus_bar = (randn(n * maps, *size, seed=i) for i in (2, 4, 7))
    tensors = R, P, P - rand(*shape, seed=3), plus_bar, minus_bar
    return [*(layout(t.to(device, dtype)) for t in tensors), k.to(device, dtype), c.to(device, dtype)]


def forward_and_backward(R, P, u, plus_bar, minus_bar, k, c, eps=EPS):
    plus, minus, s, den = against_reference("plus_affine", R, P, u, k, c, eps)
    if u is None:
        minus_bar = None
    return plus, minus, s, den, *against_reference("plus_affine_backward", plus_bar, minus_bar, s, den, P, u, k)


def shared_case(maps, with_M, size=(3, 4)):
    """`rules.plus_affine` beside its formula (semantics.md section 4), as a function of ``R, P [, M], gamma``."""
    channels = [randn(size[0], seed=i) for i in (1, 2, 3)]
    mean, beta, bias = (v.view(-1, *[1] * (len(size) - 1)) for v in channels)
    rstd = rand(size[0], seed=4, low=0.5)
    gamma = randn(size[0], seed=9)
    gamma = gamma + 0.2 * gamma.sign()
    inputs = {"R": randn(2 * maps, *size, seed=6), "P": rand(2, *size, seed=7, low=0.1)}
    if with_M:
        inputs["M"] = rand(2, *size, seed=8, low=0.1)
    inputs["gamma"] = gamma

    def op(R, P, *rest):
        M, gamma = (*rest,) if with_M else (None, *rest)
        flat = [v.flatten().to(P) for v in (bias, beta, mean, rstd)]
        u = None if M is None else P - M + bias.to(P)
        plus, minus = rules.plus_affine(R, P, u, flat[0], gamma, flat[1], flat[2], flat[3], EPS)
        return plus if M is None else torch.stack([plus, minus])

    def formula(R, P, *rest):
        M, gamma = (*rest,) if with_M else (None, *rest)
        k = (gamma * rstd.to(P)).view(mean.shape)
        shift = (bias.to(P) - mean.to(P)) * k + beta.to(P)
        z = k.clamp(min=0) * P + shift.clamp(min=0) + EPS + (0 if M is None else (-k).clamp(min=0) * M)
        s = (R.unflatten(0, (2, maps)) / z[:, None]).flatten(0, 1)
        plus, minus = s * k.clamp(min=0), s * (-k).clamp(min=0)
        return plus if M is None else torch.stack([plus, minus])

    return Case(f"K{maps}{'-M' * with_M}-{len(size) + 1}d", op, formula, inputs)


SHARED = [
    shared_case(1, True), shared_case(3, True), shared_case(1, False), shared_case(3, False, (3, 2, 3)),
    shared_case(1, True, (4,)),
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_shared(device, case, check):
    check(on(case, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes(device, shape, dtype):
    layouts = (CONTIGUOUS, channels_last) if len(SHAPES[shape]) in CHANNELS_LAST else (CONTIGUOUS,)
    for layout, maps, with_u in itertools.product(layouts, (1, 3), (True, False)):
        R, P, u, plus_bar, minus_bar, k, c = operands(SHAPES[shape], maps, dtype, device, layout)
        plus, minus, s, den, R_bar, P_bar, u_bar, *_ = forward_and_backward(R, P, u if with_u else None, plus_bar, minus_bar, k, c)
        assert plus.stride() == s.stride() == R_bar.stride() == R.stride()
        assert den.stride() == P_bar.stride() == P.stride()
        assert (minus is None) == (u_bar is None) == (not with_u)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned(device, dtype):
    """Operands one element behind a 16-byte boundary, all or one of them, give what aligned ones give."""
    aligned = operands(SHAPES["whole"], 3, dtype, device, channels_last)
    want = forward_and_backward(*aligned)
    for i in (*range(len(aligned)), None):
        got = forward_and_backward(*[unaligned(t) if i in (j, None) else t for j, t in enumerate(aligned)])
        assert all(same(x, y) for x, y in zip(got[:7], want[:7]))
        for x, y in zip(got[7:], want[7:]):  # sums over other orders
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    got = forward_and_backward(*map(CONTIGUOUS, aligned))
    assert all(same(x, y) for x, y in zip(got[:7], want[:7]))


def test_one_adjoint_is_absent(device):
    """A ``minus`` that nobody used has no cotangent: as if it were 0."""
    R, P, u, plus_bar, minus_bar, k, c = operands(SHAPES["crossing"], 3, torch.float32, device)
    _, _, s, den = run("plus_affine", R, P, u, k, c, EPS)
    zeros = run("plus_affine_backward", plus_bar, torch.zeros_like(minus_bar), s, den, P, u, k)
    absent = against_reference("plus_affine_backward", plus_bar, None, s, den, P, u, k)
    assert all(torch.equal(x, y) for x, y in zip(zeros, absent))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_denominators(device, dtype):
    """Rounding cannot take the denominator below e; where it is 0 it reads 1; channels with k = 0 get no relevance."""
    R, P, u, plus_bar, minus_bar, k, c = operands(SHAPES["crossing"], 3, dtype, device)
    for eps in (EPS, 0.0):
        plus, minus, _, den = run("plus_affine", R, P, P + 1e3, -k.abs(), c, eps)  # u > P cannot be, but for rounding
        assert torch.equal(den[:, k != 0], torch.full_like(den[:, k != 0], eps or 1.0))
        assert not plus.any()
        for with_u in (u, None):
            zero = torch.zeros_like
            results = run("plus_affine", zero(R), zero(P), None if with_u is None else zero(u), k, zero(c), eps)
            assert torch.equal(results[-1], torch.full_like(P, eps or 1.0))
            assert not any(t.any() for t in results[:3] if t is not None)
            bars = plus_bar, None if with_u is None else minus_bar
            found = run("plus_affine_backward", *bars, zero(R), results[-1], zero(P), with_u, k)
            assert all(torch.isfinite(t).all() for t in found if t is not None)
        plus, minus, *_ = run("plus_affine", R, P, u, k, c, EPS)
        assert not plus[:, k <= 0].any()
        assert not minus[:, k >= 0].any()


def test_mixed_dtypes_and_layouts(device):
    """Vectors keep their own dtype; maps take the widest of theirs and the layout of the first."""
    R, P, u, plus_bar, minus_bar, k, c = operands(SHAPES["crossing"], 3, torch.bfloat16, device)
    plus, minus, s, den = run("plus_affine", R, P, u, k.float(), c.float(), EPS)
    assert {t.dtype for t in (plus, minus, s, den)} == {torch.bfloat16}
    *_, k_bar, c_bar = run("plus_affine_backward", plus_bar, minus_bar, s, den, P, u, k.float())
    assert k_bar.dtype == c_bar.dtype == torch.float32
    last = run("plus_affine", channels_last(R), P, u, k.float(), c.float(), EPS)
    assert all(same(x, y) for x, y in zip(last, (plus, minus, s, den)))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in last)
    assert run("plus_affine", R.float(), P, u, k, c, EPS)[0].dtype == torch.float32


def test_empty(device):
    for shape in ((0, 3, 2, 2), (2, 3, 0, 2), (0, 5)):
        for maps, with_u in itertools.product((1, 3), (True, False)):
            R, P, u, plus_bar, minus_bar, k, c = operands(shape, maps, torch.float32, device)
            *_, k_bar, c_bar = forward_and_backward(R, P, u if with_u else None, plus_bar, minus_bar, k, c)
            assert k_bar.shape == c_bar.shape == k.shape
            assert not k_bar.any()
            assert not c_bar.any()


def test_repeats(device):
    for layout, dtype, shape in itertools.product((CONTIGUOUS, channels_last), (torch.float32, torch.bfloat16), ("odd", "blocks")):
        R, P, u, plus_bar, minus_bar, k, c = operands(SHAPES[shape], 2, dtype, device, layout)
        _, _, s, den = run("plus_affine", R, P, u, k, c, EPS)
        repeats(device, lambda t=(R, P, u, k, c, EPS): run("plus_affine", *t))
        repeats(device, lambda t=(plus_bar, minus_bar, s, den, P, u, k): run("plus_affine_backward", *t))


@pytest.mark.parametrize("shape", ["odd", "one pixel", "volume", "odd dense"])
def test_operators(device, shape):
    R, P, u, plus_bar, minus_bar, k, c = operands(SHAPES[shape], 3, torch.bfloat16, device, channels_last)
    k, c = k.float(), c.float()
    for with_u in (u, None):
        opcheck("plus_affine", R, P, with_u, k, c, EPS)
        opcheck("plus_affine_backward", plus_bar, minus_bar if with_u is not None else None, R, P, P, with_u, k)


def test_operators_refuse(device):
    R, P, u, _, _, k, c = operands(SHAPES["whole"], 3, torch.float32, device)
    for bad in (
        (R[:5], P, u, k, c), (R, P, u.double(), k, c), (R, P, channels_last(u), k, c), (R, P, u, k[:3], c),
        (R, P, u, k, c.double()),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="plus_affine: "):
            torch.ops.fisnet.plus_affine(*bad, EPS)
