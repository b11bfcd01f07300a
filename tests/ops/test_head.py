"""The head: eta's start, z+ start, a global average pool's transpose fused with the rules at its ReLU."""

import pytest
import torch
from helpers import CHECKS, Case, close, rand, randn

from fisnet_cuda import ops
from fisnet_cuda.isnet.variants import eta, eta_gradient

N, K = 2, 3
EPS, EPS_PLUS = 0.1, 0.3


def classes(n, maps, count, seed=0):
    return torch.randint(0, count, (n, maps), generator=torch.Generator().manual_seed(seed))


def eta_case(count, maps, device, eta_eps=1e-2):
    index = classes(N, maps, count).to(device)
    return Case(
        f"{count}-K{maps}", lambda logits: ops.eta_start(logits, index, eta_eps),
        lambda logits: eta_formula(logits, index, eta_eps), {"logits": 2 * randn(N, count, seed=1).to(device)},
    )  # fmt: skip


def eta_formula(logits, index, eta_eps):
    """Autograd's gradient of eta itself; its own dtype, as users would write it."""
    with torch.enable_grad():
        logits = logits if logits.requires_grad else logits.detach().requires_grad_()
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        e = eta(wide, index, eta_eps)
        parts = [torch.autograd.grad(e[:, k].sum(), wide, create_graph=True)[0] for k in range(index.shape[1])]
        return torch.stack(parts, 1)


def plus_case(shape, bias, device, eps=EPS):
    b = randn(shape[-1], seed=2).to(device) if bias else None

    def formula(P):
        z = P if b is None else P + b.to(P.dtype).clamp(min=0)
        return z / (z + eps)

    op = lambda P: ops.plus_start(P, None if b is None else b.to(P.dtype), eps)  # noqa: E731
    return Case(f"{shape}", op, formula, {"P": rand(*shape).to(device)})


def pooled_case(size, maps, device, eps=EPS, channels=3):
    ones = (1,) * len(size)
    inputs = {"g": randn(N * maps, channels, *ones, seed=1), "a": rand(N, channels, *size, seed=2, low=-0.5).relu()}

    def formula(g, a):
        a_k = a.repeat_interleave(maps, 0)
        return a_k / (a_k + eps) * (g / a[0, 0].numel())

    return Case(f"{size}-K{maps}", lambda g, a: ops.pooled_phi(g, a, eps), formula, {k: t.to(device) for k, t in inputs.items()})


def pooled_dual_case(size, device, channels=3):
    ones = (1,) * len(size)
    inputs = {
        "g": randn(N, channels, *ones, seed=1), "g_plus": randn(N, channels, *ones, seed=2),
        "a": rand(N, channels, *size, seed=3, low=-0.5).relu(), "z_plus": rand(N, channels, *size, seed=4),
    }  # fmt: skip

    def formula(g, g_plus, a, z_plus):
        count = a[0, 0].numel()
        # a dead unit's share of z+ gives `a` no gradient: the ReLU before it would cut it
        plus = a * (a > 0) * (g_plus / count) / (z_plus + EPS_PLUS)
        return torch.cat([a / (a + EPS) * (g / count), plus + 0 * a * plus.detach()])

    op = lambda *t: torch.cat(ops.pooled_dual_phi(*t, EPS, EPS_PLUS))  # noqa: E731
    return Case(f"{size}", op, formula, {k: t.to(device) for k, t in inputs.items()})


def alive(case):
    """Activations away from 0: at a kink the difference quotient means nothing, and dead units pass no gradient."""
    return case._replace(inputs={k: t + 0.1 if k == "a" else t for k, t in case.inputs.items()})


ETA_CHECKS = [check for check in CHECKS if check.__name__ != "any_dtype"]  # its result is float32 or wider
ETA = [(2, 1), (10, K), (1, 1)]
PLUS = [((N, 5), True), ((N, 8), False), ((N, 3, 7), True)]
POOLED = [((3, 2), K), ((7, 7), 1), ((5,), K), ((2, 1, 3), 1), ((1, 1), K)]
POOLED_DUAL = [(3, 2), (5,), (1, 1)]
every_check = pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)


@pytest.mark.parametrize("check", ETA_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("count", "maps"), ETA)
def test_eta_start(count, maps, check):
    check(eta_case(count, maps, "cpu"))


def test_eta_start_in_half_precision():
    """float32 inside and out; the gradient has the dtype of the logits."""
    logits = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.bfloat16).requires_grad_()
    start = ops.eta_start(logits, torch.tensor([[1]]), 1e-2)
    assert start.dtype == torch.float32
    close(start, ops.eta_start(logits.double(), torch.tensor([[1]]), 1e-2).detach(), 1e-6)
    assert torch.autograd.grad(start.square().sum(), logits)[0].dtype == torch.bfloat16


def test_variants_use_it():
    logits, index = randn(N, 5), classes(N, 2, 5)
    assert torch.equal(eta_gradient(logits, index, 1e-2), ops.eta_start(logits, index, 1e-2))


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"logits must be \[N, C\] and index \[N, K\], got \(2, 3\) and \(2,\)"):
        ops.eta_start(torch.ones(2, 3), torch.zeros(2, dtype=torch.long), 1e-2)
    with pytest.raises(ValueError, match=r"g must be \[N\*K, 3, 1, 1\] over the activation's N=2, got \(2, 3\)"):
        ops.pooled_phi(torch.ones(2, 3), torch.ones(2, 3, 4, 4), 0.1)
    with pytest.raises(ValueError, match="one map a sample"):
        ops.pooled_dual_phi(torch.ones(4, 3, 1), torch.ones(4, 3, 1), torch.ones(2, 3, 4), torch.ones(2, 3, 4), 0.1, 0.1)


@every_check
@pytest.mark.parametrize(("shape", "bias"), PLUS)
def test_plus_start(shape, bias, check):
    check(plus_case(shape, bias, "cpu"))


@every_check
@pytest.mark.parametrize(("size", "maps"), POOLED)
def test_pooled_phi(size, maps, check):
    check(alive(pooled_case(size, maps, "cpu")))


@every_check
@pytest.mark.parametrize("size", POOLED_DUAL)
def test_pooled_dual_phi(size, check):
    check(alive(pooled_dual_case(size, "cpu")))
