"""`dual_phi` and its adjoint on the kernels: the shared cases, and what only a kernel can get wrong."""

import itertools

import pytest
import torch
from common import DTYPES, against_reference, channels_last, on, opcheck, repeats, run, same, unaligned
from helpers import CHECKS, equals_formula, rand, randn
from test_phi import dual_case

from fisnet_cuda import ops

EPS, EPS_PLUS = 0.01, 0.02
SHAPES = {"odd": (2, 3, 5, 3), "whole": (2, 8, 3, 3), "blocks": (3, 24, 20, 19), "one pixel": (3, 40, 1, 1), "volume": (2, 8, 2, 3, 2),
          "dense": (5, 40), "odd dense": (3, 7), "one": (1, 1)}  # fmt: skip
CONTIGUOUS = torch.Tensor.contiguous


def operands(shape, dtype, device, layout=CONTIGUOUS):
    """``g, g_plus, a, z_plus`` with dead units, and cotangents ``s_bar, s_plus_bar``."""
    a = randn(*shape, seed=3).clamp(min=0)
    tensors = [randn(*shape, seed=1), randn(*shape, seed=2), a, a + rand(*shape, seed=4), randn(*shape, seed=5), randn(*shape, seed=6)]
    return [layout(t.to(device, dtype)) for t in tensors]


def eps_of(kind, a):
    return kind if kind != "relative" else rand(a.shape[0], *[1] * (a.dim() - 1), seed=7, low=0.01).to(a)


def forward_and_backward(tensors, eps):
    g, g_plus, a, z_plus, s_bar, s_plus_bar = tensors
    s, s_plus = against_reference("dual_phi", g, g_plus, a, z_plus, eps, EPS_PLUS)
    return s, s_plus, *against_reference("dual_phi_backward", s_bar, s_plus_bar, a, s, s_plus, z_plus, eps, EPS_PLUS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", [dual_case("both", EPS), dual_case("both", "relative")], ids=str)
def test_shared(device, case, check):
    check(on(case, device))


@pytest.mark.parametrize("which", ["s", "s_plus"])
def test_when_one_result_is_used(device, which):
    equals_formula(on(dual_case(which, EPS), device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes(device, shape, dtype):
    for layout, eps in itertools.product((CONTIGUOUS, channels_last), (EPS, 0.0, "relative")):
        tensors = operands(SHAPES[shape], dtype, device, layout)
        results = forward_and_backward(tensors, eps_of(eps, tensors[2]))
        assert all(r.stride() == tensors[0].stride() for r in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned(device, dtype):
    """Operands one element behind a 16-byte boundary, all or one of them, give what aligned ones give."""
    aligned = operands(SHAPES["whole"], dtype, device)
    want = forward_and_backward(aligned, EPS)
    for i in (*range(len(aligned)), None):
        got = forward_and_backward([unaligned(t) if i in (j, None) else t for j, t in enumerate(aligned)], EPS)
        assert all(same(x, y) for x, y in zip(got, want))
    got = forward_and_backward([channels_last(t) for t in aligned], EPS)
    assert all(same(x, y) for x, y in zip(got, want))


def test_mixed_dtypes_and_layouts(device):
    """The widest dtype, the layout of the first tensor; slices and expanded cotangents come along."""
    g, g_plus, a, z_plus, *_ = operands(SHAPES["whole"], torch.float32, device)
    want = run("dual_phi", g, g_plus, a, z_plus, EPS, EPS_PLUS)
    got = run("dual_phi", channels_last(g), g_plus, a, z_plus, EPS, EPS_PLUS)
    assert all(r.is_contiguous(memory_format=torch.channels_last) for r in got)
    assert all(same(x, y) for x, y in zip(got, want))
    wide = torch.stack([a, a], -1)
    assert all(same(x, y) for x, y in zip(run("dual_phi", g, g_plus, wide[..., 1], z_plus, EPS, EPS_PLUS), want))
    mixed = [t.clone().requires_grad_() for t in (g, g_plus.bfloat16(), a.bfloat16(), z_plus)]
    s, s_plus = ops.dual_phi(*mixed, EPS, EPS_PLUS)
    assert s.dtype == s_plus.dtype == torch.float32
    (s.sum() + 2 * s_plus.sum()).backward()
    assert all(t.grad.dtype == t.dtype and torch.isfinite(t.grad).all() for t in mixed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [EPS, 0.0, "relative"])
@pytest.mark.parametrize("eps_plus", [EPS_PLUS, 0.0])
def test_dead_units(device, dtype, eps, eps_plus):
    """Where a = 0 all results but ``g+``'s sums are 0, also with z+ = e = 0; nothing is NaN."""
    g, g_plus, a, z_plus, s_bar, s_plus_bar = operands(SHAPES["whole"], dtype, device)
    z_plus[a == 0] = 0
    e = eps_of(eps, a)
    s, s_plus = run("dual_phi", g, g_plus, a, z_plus, e, eps_plus)
    results = run("dual_phi_backward", s_bar, s_plus_bar, a, s, s_plus, z_plus, e, eps_plus)
    assert all(torch.isfinite(t).all() for t in (s, s_plus, *results))
    assert not any(t[a == 0].any() for t in (s, s_plus, *results))


@pytest.mark.parametrize("value", [1e-38, 1e-30, 1e-8, 1e8, 1e30])
def test_activations_of_any_size(device, value):
    """``s+ / a`` is ``g+ / (z+ + e)`` however small a is."""
    for count in (1, 8):
        a = torch.full((1, count), value, device=device)
        one = torch.ones_like(a)
        s, s_plus = run("dual_phi", one, one, a, a, EPS, EPS)
        g_bar, g_plus_bar, a_bar, z_plus_bar = run("dual_phi_backward", one, one, a, s, s_plus, a, EPS, EPS)
        v = a.double()
        phi = v / (v + EPS)
        for got, want in ((s, phi), (s_plus, phi), (g_bar, phi), (g_plus_bar, phi), (z_plus_bar, -v / (v + EPS) ** 2),
                          (a_bar, EPS / (v + EPS) ** 2 + 1 / (v + EPS))):  # fmt: skip
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-37)


def test_empty(device):
    for shape in ((0, 3, 2, 2), (2, 3, 0), (0, 5)):
        tensors = operands(shape, torch.float32, device)
        for eps in (EPS, 0.0, "relative"):
            assert all(r.shape == shape for r in forward_and_backward(tensors, eps_of(eps, tensors[2])))


def test_repeats(device):
    for layout, dtype in itertools.product((CONTIGUOUS, channels_last), (torch.float32, torch.bfloat16)):
        g, g_plus, a, z_plus, s_bar, s_plus_bar = operands(SHAPES["blocks"], dtype, device, layout)
        repeats(device, lambda t=(g, g_plus, a, z_plus, EPS, EPS_PLUS): run("dual_phi", *t))
        repeats(device, lambda t=(s_bar, s_plus_bar, a, g, g_plus, z_plus, EPS, EPS_PLUS): run("dual_phi_backward", *t))


@pytest.mark.parametrize("shape", ["odd", "one pixel", "volume", "odd dense"])
def test_operators(device, shape):
    g, g_plus, a, z_plus, s_bar, s_plus_bar = operands(SHAPES[shape], torch.bfloat16, device, channels_last)
    eps_n = torch.full((len(a),), 0.1, dtype=a.dtype, device=device)
    for eps in ((EPS, None), (0.0, eps_n)):
        opcheck("dual_phi", g, g_plus, a, z_plus, *eps, EPS_PLUS)
        opcheck("dual_phi_backward", s_bar, s_plus_bar, a, g, g_plus, z_plus, *eps, EPS_PLUS)


def test_operators_refuse(device):
    g, g_plus, a, z_plus, *_ = operands(SHAPES["whole"], torch.float32, device)
    for bad in (
        (g[:1], g_plus, a, z_plus, EPS, None, EPS_PLUS),
        (g, g_plus.double(), a, z_plus, EPS, None, EPS_PLUS),
        (g, g_plus, a, channels_last(z_plus), EPS, None, EPS_PLUS),
        (g, g_plus, a, z_plus, EPS, torch.ones(3, device=device), EPS_PLUS),
        (g[..., ::2], g_plus[..., ::2], a[..., ::2], z_plus[..., ::2], EPS, None, EPS_PLUS),
    ):
        with pytest.raises(RuntimeError, match="dual_phi: "):
            torch.ops.fisnet.dual_phi(*bad)
