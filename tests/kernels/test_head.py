"""Kernels of the head: eta's start, z+ start, the global average pool's transpose fused with the rules at its ReLU."""

import pytest
import torch
from emulator import SCHEDULES, emulated
from helpers import close, error, grads, rand, randn
from test_head import (  # tests/ops: the cases that every implementation must pass
    EPS,
    EPS_PLUS,
    ETA,
    ETA_CHECKS,
    PLUS,
    POOLED,
    POOLED_DUAL,
    K,
    N,
    alive,
    classes,
    eta_case,
    every_check,
    plus_case,
    pooled_case,
    pooled_dual_case,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from fisnet_cuda import ops, reference
from fisnet_cuda.isnet.variants import eta_gradient

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])

# ---- eta -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", ETA_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("count", "maps"), ETA)
def test_eta_start(device, count, maps, check):
    check(eta_case(count, maps, device))


@dtypes
@pytest.mark.parametrize("count", [1, 3, 256, 300, 1000])
def test_eta_start_dtypes(device, count, dtype):
    """float32 or wider inside and out, whatever the logits' dtype; their gradient has their own."""
    wide = torch.promote_types(dtype, torch.float32)
    logits = (2 * randn(N, count, seed=1)).to(device, dtype).requires_grad_()
    index = classes(N, K, count).to(device)
    start = ops.eta_start(logits, index, 1e-2)
    assert start.dtype == wide
    exact_logits = logits.detach().double().requires_grad_()
    exact = reference.eta_start(exact_logits, index, 1e-2)
    close(start, exact, 20 * torch.finfo(wide).eps)
    (got,), (want,) = grads(start, [logits]), grads(exact, [exact_logits])
    assert got.dtype == dtype
    close(got, want, 40 * torch.finfo(wide).eps + torch.finfo(dtype).eps)


def test_eta_of_far_apart_logits_stays_finite(device):
    """(The authors' exp(-Z) overflows beyond 88.)"""
    logits = torch.tensor([[500.0, -500.0, 0.0]], device=device).requires_grad_()
    for c in range(3):
        start = ops.eta_start(logits, torch.tensor([[c]], device=device), 1e-2)
        want = reference.eta_start(logits.detach(), torch.tensor([[c]], device=device), 1e-2)
        close(start, want, 1e-6)
        assert torch.isfinite(grads(start, [logits])[0]).all()


def test_a_class_that_does_not_exist_shows(device):
    logits = randn(2, 4).to(device)
    start = ops.eta_start(logits, torch.tensor([[4, 1], [-1, 0]], device=device), 1e-2)
    assert start.isnan().all(2).tolist() == [[True, False], [True, False]]


def test_variants_use_it(device):
    logits, index = randn(N, 5).to(device), classes(N, 2, 5).to(device)
    assert torch.equal(eta_gradient(logits, index, 1e-2), ops.eta_start(logits, index, 1e-2))


# ---- z+ start ------------------------------------------------------------------------------------------------------------


@every_check
@pytest.mark.parametrize(("shape", "bias"), PLUS)
def test_plus_start(device, shape, bias, check):
    check(plus_case(shape, bias, device))


def test_plus_start_of_nothing(device):
    """0/0 is 0, with or without a bias; a wider bias widens the result, as PyTorch's addition does."""
    zero = torch.zeros(1, 4, device=device)
    assert not ops.plus_start(zero, None, 0.0).any()
    assert not ops.plus_start(zero, torch.full((4,), -1.0, device=device), 0.0).any()
    P = torch.ones(1, 4, device=device, dtype=torch.bfloat16).requires_grad_()
    s = ops.plus_start(P, torch.ones(4, device=device), 1.0)
    assert s.dtype == torch.float32
    assert grads(s, [P])[0].dtype == torch.bfloat16


def test_plus_start_gives_the_bias_no_gradient(device):
    bias = torch.ones(3, device=device, requires_grad=True)
    assert not ops.plus_start(torch.ones(1, 3, device=device), bias, 1.0).requires_grad


# ---- global average pool ---------------------------------------------------------------------------------------------------


@every_check
@pytest.mark.parametrize(("size", "maps"), POOLED)
def test_pooled_phi(device, size, maps, check):
    check(alive(pooled_case(size, maps, device)))


@every_check
@pytest.mark.parametrize("size", POOLED_DUAL)
def test_pooled_dual_phi(device, size, check):
    check(alive(pooled_dual_case(size, device)))


def pooled_operands(size, layout, dtype, device, maps, channels):
    like = {"device": device, "dtype": dtype}
    g = randn(N * maps, channels, 1, 1, seed=1).to(**like)
    a = rand(N, channels, *size, seed=2, low=-0.5).relu().to(**like).contiguous(memory_format=layout)
    z_plus = rand(N, channels, *size, seed=3).to(**like).contiguous(memory_format=layout)
    s_bar = randn(N * maps, channels, *size, seed=4).to(**like).contiguous(memory_format=layout)
    return g, a, z_plus, s_bar


def pooled_results(operands, dual, backend, dtype=None):
    """Every result and gradient, of one map's rule or of both."""
    g, a, z_plus, s_bar = (t.detach() if dtype is None else t.detach().to(dtype) for t in operands)
    leaves = [t.requires_grad_() for t in ((g, g.flip(1).contiguous(), a, z_plus) if dual else (g, a))]
    if dual:
        s = ops.pooled_dual_phi(*leaves, EPS, EPS_PLUS, backend=backend)
        return [*s, *torch.autograd.grad(s, leaves, (s_bar, s_bar.flip(0).contiguous(memory_format=_format(s_bar))))]
    s = ops.pooled_phi(*leaves, EPS, backend=backend)
    return [s, *torch.autograd.grad(s, leaves, s_bar)]


def _format(t):
    return torch.contiguous_format if t.is_contiguous() else torch.channels_last


@layouts
@dtypes
@pytest.mark.parametrize(("channels", "size"), [(16, (7, 7)), (5, (3, 4)), (40, (2, 4)), (300, (1, 2)), (8, (9, 13))])
@pytest.mark.parametrize("which", ["K1", "K3", "dual"])
def test_pooled_against_float64(device, which, channels, size, dtype, layout):
    """By the 2x rule, with dead units; results have the dtype and the layout of ``a``."""
    operands = pooled_operands(size, layout, dtype, device, 3 if which == "K3" else 1, channels)
    dual = which == "dual"
    got = pooled_results(operands, dual, "auto")
    usual = pooled_results(operands, dual, "reference")
    exact = pooled_results(operands, dual, "reference", torch.float64)
    for ours, theirs, want in zip(got, usual, exact, strict=True):
        assert ours.dtype == dtype
        assert ours.shape[2:] == (1, 1) or ours.is_contiguous(memory_format=layout)
        floor = 16 if dtype is torch.float64 else 2  # in float64 the expected value is rounded too
        assert error(ours, want) <= 2 * error(theirs, want) + floor * torch.finfo(dtype).eps


@pytest.mark.parametrize("eps", ["zero", "relative"])
def test_other_epsilons(device, eps):
    g, a, z_plus, _ = pooled_operands((3, 4), torch.channels_last, torch.float64, device, 1, 8)
    eps = 0.0 if eps == "zero" else ops.relative_epsilon(a, 0.1)
    for backend_results in zip(*(both(g, a, z_plus, eps, backend) for backend in ("auto", "reference"))):
        close(*backend_results)


def both(g, a, z_plus, eps, backend):
    leaves = [t.detach().requires_grad_() for t in (g, a)]
    s = ops.pooled_phi(*leaves, eps, backend=backend)
    dual_leaves = [t.detach().requires_grad_() for t in (g, g + 1, a, z_plus)]
    pair = ops.pooled_dual_phi(*dual_leaves, eps, 0.0, backend=backend)
    return [s.detach(), *grads(s, leaves), *(t.detach() for t in pair), *grads(pair, dual_leaves)]


@layouts
def test_relevance_is_kept(device, layout):
    """With e = 0 and everything alive phi is 1: the sum over the pixels is g."""
    g, a, _, _ = pooled_operands((5, 6), layout, torch.float64, device, K, 8)
    s = ops.pooled_phi(g, a + 1, 0.0)
    close(s.sum((2, 3)), g.flatten(1))


# ---- how it runs -----------------------------------------------------------------------------------------------------------


def everything(device, layout):
    logits = randn(N, 300).float().to(device).requires_grad_()
    start = ops.eta_start(logits, classes(N, K, 300).to(device), 1e-2)
    results = [start, *grads(start, [logits])]
    for maps, dual in ((K, False), (1, False), (1, True)):
        results += pooled_results(pooled_operands((5, 7), layout, torch.float32, device, maps, 12), dual, "auto")
    return [t.detach() for t in results]


@layouts
def test_repeatable(device, layout):
    """Bit for bit."""
    assert all(torch.equal(a, b) for a, b in zip(*(everything(device, layout) for _ in range(2)), strict=True))


@layouts
def test_any_schedule(layout):
    """The order of threads and blocks changes no bit."""
    seen = []
    for schedule in SCHEDULES:
        with emulated(*schedule):
            seen.append(everything("cpu", layout))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@layouts
def test_pointers_off_16_bytes(device, layout):
    def off(t):
        return torch.empty(t.numel() + 1, dtype=t.dtype, device=device)[1:].as_strided(t.shape, t.stride(), 1).copy_(t)

    operands = pooled_operands((4, 4), layout, torch.float32, device, 1, 8)
    for dual in (False, True):
        for got, want in zip(pooled_results(tuple(map(off, operands)), dual, "auto"), pooled_results(operands, dual, "auto")):
            close(got, want, 1e-6)
    P = rand(2, 8).float().to(device)
    close(ops.plus_start(off(P), None, 0.1), ops.plus_start(P, None, 0.1), 1e-6)


def test_empty_batch(device):
    empty = {"device": device, "requires_grad": True}
    logits = torch.empty(0, 5, **empty)
    assert grads(ops.eta_start(logits, torch.empty(0, 2, dtype=torch.long, device=device), 1e-2), [logits])[0].shape == (0, 5)
    P = torch.empty(0, 5, **empty)
    assert grads(ops.plus_start(P, None, 0.1), [P])[0].shape == (0, 5)
    g, a = torch.empty(0, 4, 1, 1, **empty), torch.empty(0, 4, 2, 3, **empty)
    s = ops.pooled_phi(g, a, 0.1)
    assert s.shape == a.shape
    assert [t.shape for t in grads(s, [g, a])] == [g.shape, a.shape]
    pair = ops.pooled_dual_phi(g, g, a, a, 0.1, 0.1)
    assert [t.shape for t in grads(pair, [g, a])] == [g.shape, a.shape]


@layouts
def test_opcheck_and_fake_strides(device, layout):
    """Schemas, and fake kernels that give the real shapes, dtypes and strides."""
    fisnet = torch.ops.fisnet
    logits, index = randn(N, 5).to(device, torch.bfloat16), classes(N, K, 5).to(device)
    start = fisnet.eta_start(logits, index, 0.1)
    P = rand(N, 5).float().to(device)
    g, a, z_plus, s_bar = pooled_operands((3, 4), layout, torch.float32, device, 1, 8)
    g, eps_n = g.flatten(1), torch.ones(N, device=device)
    g3, s3 = g.repeat(K, 1), torch.cat([s_bar] * K).contiguous(memory_format=layout)
    calls = [
        (fisnet.eta_start, (logits, index, 0.1)),
        (fisnet.eta_start_backward, (start, logits, index, 0.1)),
        (fisnet.plus_start, (P, P[0].contiguous(), 0.1)),
        (fisnet.plus_start_backward, (P, P, None, 0.1)),
        (fisnet.pooled_phi, (g3, a, 0.1, None, None, None, 0.0)),
        (fisnet.pooled_phi, (g, a, 0.0, eps_n, g, z_plus, 0.1)),
        (fisnet.pooled_phi_backward, (s3, None, g3, a, 0.1, None, None, None, 0.0, True)),
        (fisnet.pooled_phi_backward, (s3, None, g3, a, 0.1, None, None, None, 0.0, False)),
        (fisnet.pooled_phi_backward, (s_bar, s_bar, g, a, 0.1, eps_n, g, z_plus, 0.1, True)),
    ]
    for op, args in calls:
        torch.library.opcheck(op, args)
        real = op(*args)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
        for r, f in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (real, fake)), strict=True):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())
