"""`ratio` and its adjoint on the kernels: the shared cases, and what only a kernel can get wrong."""

import itertools

import pytest
import torch
from common import DTYPES, against_reference, channels_last, on, opcheck, repeats, run, same, unaligned
from helpers import CHECKS, rand, randn
from test_phi import plain_cases

from fisnet_cuda import ops

EPS = 0.01
SHAPES = {"odd": (2, 3, 5, 3), "whole": (2, 8, 3, 3), "blocks": (3, 24, 20, 19), "one pixel": (3, 40, 1, 1), "volume": (2, 8, 2, 3, 2),
          "dense": (5, 40), "rows": (2, 3, 8), "one": (1, 1), "numbers": (5,)}  # fmt: skip
CONTIGUOUS = torch.Tensor.contiguous


def operands(shape, maps, dtype, device, layout=CONTIGUOUS, nonneg=False):
    """``R, z, s_bar``; z keeps away from 0, where a low-precision reference would know no digits of the quotient."""
    n, *size = shape
    z = randn(*shape, seed=1)
    z = z + 0.1 * z.sign()
    tensors = randn(n * maps, *size, seed=2), z.abs() if nonneg else z, randn(n * maps, *size, seed=3)
    return [layout(t.to(device, dtype)) for t in tensors]


def eps_of(kind, z):
    return kind if kind != "relative" else rand(z.shape[0], *[1] * (z.dim() - 1), seed=7, low=0.01).to(z)


def forward_and_backward(R, z, s_bar, eps, nonneg=False):
    s, den = against_reference("ratio", R, z, eps, nonneg)
    return s, den, *against_reference("ratio_backward", s_bar, s, den)


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", [c for c in plain_cases() if c.name.startswith("ratio")], ids=str)
def test_shared(device, case, check):
    check(on(case, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes(device, shape, dtype):
    settings = itertools.product((CONTIGUOUS, channels_last), (1, 3), (EPS, 0.0, "relative"), (False, True))
    for layout, maps, eps, nonneg in settings:
        R, z, s_bar = operands(SHAPES[shape], maps, dtype, device, layout, nonneg)
        s, den, R_bar, z_bar = forward_and_backward(R, z, s_bar, eps_of(eps, z), nonneg)
        assert s.stride() == R_bar.stride() == R.stride()
        assert den.stride() == z_bar.stride() == z.stride()
        alone, absent = run("ratio_backward", s_bar, s, den, False)
        assert absent is None
        assert torch.equal(alone, R_bar)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned(device, dtype):
    """Operands one element behind a 16-byte boundary, all or one of them, give what aligned ones give."""
    aligned = operands(SHAPES["whole"], 3, dtype, device)
    want = forward_and_backward(*aligned, EPS)
    for i in (0, 1, 2, None):
        got = forward_and_backward(*[unaligned(t) if i in (j, None) else t for j, t in enumerate(aligned)], EPS)
        assert all(same(x, y) for x, y in zip(got, want))
    got = forward_and_backward(*map(channels_last, aligned), EPS)
    assert all(same(x, y) for x, y in zip(got, want))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [EPS, 0.0, "relative"])
def test_zero_denominators(device, dtype, eps):
    """``sign 0 = +1``, for -0 too; where z = e = 0 the denominator reads 1, so that 0 / 0 is 0."""
    z = torch.tensor([[0.0, -0.0, 1.0, -1.0, 0.0, -0.0, 2.0, -2.0]], dtype=dtype, device=device)
    R = torch.tensor([[0.0, 0.0, 2.0, 2.0, 1.0, 1.0, 0.0, 0.0]], dtype=dtype, device=device)
    e = eps_of(eps, z)
    for width in (8, 3):  # vectors, single elements
        s, den = run("ratio", R[:, :width], z[:, :width], e)
        v = z[:, :width]
        want = torch.where(v < 0, v - e, v + e)
        want = torch.where(want == 0, torch.ones_like(want), want)
        assert torch.equal(den, want)
        torch.testing.assert_close(s, R[:, :width] / want)
        assert not s[R[:, :width] == 0].any()
    s, den = run("ratio", R, z.abs(), e, True)
    assert torch.equal(den, torch.where(z.abs() + e == 0, torch.ones_like(z), z.abs() + e))


@pytest.mark.parametrize("value", [1e-40, 1e-38, -1e-30, 1e-8, -1e8, 1e30, -5e37])
def test_denominators_of_any_size(device, value):
    for count in (1, 8):
        z = torch.full((1, count), value, device=device)
        R = z * 3
        s, den = run("ratio", R, z, 0.0)
        torch.testing.assert_close(s.double(), R.double() / z.double(), rtol=1e-6, atol=0)
        assert torch.equal(den, z)
        R_bar, z_bar = run("ratio_backward", z * 5, s, den)
        torch.testing.assert_close(R_bar, torch.full_like(z, 5.0), rtol=1e-4, atol=0)
        torch.testing.assert_close(z_bar, torch.full_like(z, -15.0), rtol=1e-4, atol=0)


def test_what_is_not_finite_stays_so(device):
    z = torch.tensor([[1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e-40, 1.0, torch.inf]], device=device)
    R = torch.tensor([[torch.inf, torch.inf, 1.0, 1.0, 1.0, 1.0, torch.nan, torch.inf]], device=device)
    torch.testing.assert_close(run("ratio", R, z, 0.0)[0], R / z, equal_nan=True)
    torch.testing.assert_close(run("ratio_backward", R, R, z)[0], R / z, equal_nan=True)


def test_mixed_dtypes_and_layouts(device):
    R, z, _ = operands(SHAPES["whole"], 3, torch.float32, device)
    want = run("ratio", R, z, EPS)[0]
    got = run("ratio", channels_last(R), z, EPS)[0]
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert same(got, want)
    assert same(run("ratio", R, torch.stack([z, z], -1)[..., 0], EPS)[0], want)
    R, z = R.clone().requires_grad_(), z.bfloat16().requires_grad_()
    s = ops.stabilised_ratio(R, z, EPS)
    assert s.dtype == torch.float32
    s.sum().backward()
    assert (R.grad.dtype, z.grad.dtype) == (torch.float32, torch.bfloat16)


def test_empty(device):
    for shape in ((0, 3, 2, 2), (2, 3, 0, 2), (0, 5), (0,)):
        for maps, eps in itertools.product((1, 3), (EPS, 0.0, "relative")):
            R, z, s_bar = operands(shape, maps, torch.float32, device)
            forward_and_backward(R, z, s_bar, eps_of(eps, z))


def test_repeats(device):
    for layout, dtype in itertools.product((CONTIGUOUS, channels_last), (torch.float32, torch.bfloat16)):
        R, z, s_bar = operands(SHAPES["blocks"], 2, dtype, device, layout)
        repeats(device, lambda t=(R, z, EPS): run("ratio", *t))
        repeats(device, lambda t=(s_bar, R, z): run("ratio_backward", *t))


@pytest.mark.parametrize("shape", ["odd", "one pixel", "volume", "dense", "numbers"])
def test_operators(device, shape):
    R, z, s_bar = operands(SHAPES[shape], 3, torch.bfloat16, device, channels_last)
    eps_n = torch.full((len(z),), 0.1, dtype=z.dtype, device=device)
    opcheck("ratio", R, z, EPS, None, False)
    opcheck("ratio", R, z, 0.0, eps_n, True)
    for need in (True, False):
        opcheck("ratio_backward", s_bar, R, z, need)


def test_operators_refuse(device):
    R, z, _ = operands(SHAPES["whole"], 3, torch.float32, device)
    for bad in ((R[:5], z), (R, z.double()), (channels_last(R), z), (R[..., ::2], z[..., ::2])):
        with pytest.raises(RuntimeError, match="ratio: "):
            torch.ops.fisnet.ratio(*bad, EPS, None, False)
