"""The pointwise passes at a ReLU: `phi_scale`, `dual_phi`, and the divisions and products that go with them."""

import pytest
import torch
from helpers import CHECKS, Case, any_dtype, close, equals_formula, grads, over_maps, rand, randn

from fisnet_cuda import ops

N, K = 2, 3
SHAPES = {"dense": (5,), "image": (3, 2, 3), "one": (1,), "odd": (7, 5), "volume": (2, 2, 1, 3)}


def alive(shape, seed=0):
    """Activations of a ReLU where every unit is alive."""
    return rand(*shape, seed=seed, low=0.05, high=2.0)


def channels(v, scale):
    return scale.view(1, -1, *[1] * (v.dim() - 2))


def phi(g, a, eps, skip=None, scale=None, rest=None):
    """``scale . (a / (a + e)) (g + skip) + rest``, the activation repeated over K."""
    k = g.shape[0] // a.shape[0]
    a = a.repeat_interleave(k, 0)
    e = eps.repeat_interleave(k, 0) if isinstance(eps, torch.Tensor) else eps
    s = a / (a + e) * (g if skip is None else g + skip)
    s = s if scale is None else s * channels(s, scale)
    return s if rest is None else s + rest


def rms(a, eps):
    return (eps * a.detach().double().flatten(1).square().mean(1).sqrt()).view(-1, *[1] * (a.dim() - 1)).to(a.dtype)


def phi_case(shape, maps, eps, skip, scale, rest=False):
    """A `Case` of `phi_scale`; ``eps`` "relative" takes the sample's own scale."""
    size = SHAPES[shape]
    inputs = {"g": randn(N * maps, *size, seed=1), "a": alive((N, *size), seed=2)}
    if skip:
        inputs["skip"] = randn(N * maps, *size, seed=3)
    if scale:
        inputs["scale"] = randn(size[0], seed=4)
    if rest:
        inputs["rest"] = randn(N * maps, *size, seed=5)

    def call(fn, relative):
        def run(g, a, *rest):
            named = dict(zip(list(inputs)[2:], rest))
            return fn(g, a, relative(a) if eps == "relative" else eps, **named)

        return run

    # for gradcheck the relative epsilon must stay what it is: it is a constant of the backward
    fixed = ops.relative_epsilon(inputs["a"], 0.1)
    name = f"{shape}-K{maps}-{eps}{'-skip' * skip}{'-scale' * scale}{'-rest' * rest}"
    return Case(name, call(ops.phi_scale, lambda a: fixed.to(a)), call(phi, lambda a: fixed.to(a)), inputs)


PHI = [
    phi_case("dense", 1, 0.01, False, False),
    phi_case("image", 1, 0.01, True, True),
    phi_case("image", K, 0.01, False, True),
    phi_case("image", K, "relative", True, True),
    phi_case("image", 1, "relative", False, False),
    phi_case("odd", K, 0.3, True, False),
    phi_case("image", K, 0.01, False, True, rest=True),
    phi_case("dense", 1, "relative", True, True, rest=True),
    phi_case("one", 1, 0.01, True, True),
    phi_case("volume", K, 0.01, False, True),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", PHI, ids=str)
def test_phi_scale(case, check):
    check(case)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("maps", [1, K])
@pytest.mark.parametrize("eps", [0.01, "relative"])
def test_phi_scale_of_every_shape(shape, maps, eps):
    for skip, scale in ((False, False), (True, False), (False, True), (True, True)):
        equals_formula(phi_case(shape, maps, eps, skip, scale))


@pytest.mark.parametrize("eps", [0, 0.0], ids=["int", "float"])
@pytest.mark.parametrize("maps", [1, K])
def test_phi_scale_without_epsilon(eps, maps):
    """``eps = 0`` is the ReLU's own derivative: g where alive, 0 where dead, and no gradient for the activation."""
    a = torch.tensor([[0.0, 1e-300, 2.0], [5.0, 0.0, 1e-3]], dtype=torch.float64, requires_grad=True)
    g = randn(2 * maps, 3).requires_grad_()
    s = ops.phi_scale(g, a, eps)
    gate = (a > 0).double().repeat_interleave(maps, 0)
    close(s, g * gate)
    g_bar, a_bar = grads(s, [g, a])
    close(g_bar, randn(*s.shape) * gate)
    assert not a_bar.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eps", [0.01, 0.0, "relative"])
def test_dead_units(dtype, eps):
    """Where a = 0: s = 0, the gradient of g is 0 and that of a is 0 (the ReLU before would cut it); all of it finite."""
    a = torch.tensor([[0.0, 0.5, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    e = ops.relative_epsilon(a, 0.01) if eps == "relative" else eps
    g, scale = randn(4, 4).to(dtype).requires_grad_(), torch.zeros(4, dtype=dtype, requires_grad=True)
    for factor in (None, scale):
        s = ops.phi_scale(g, a, e, None, factor)
        found = grads(s, [g, a, *([factor] if factor is not None else [])])
        assert all(torch.isfinite(t).all() for t in (s, *found))
        dead = (a == 0).repeat_interleave(2, 0)
        assert not s[dead].any()
        assert not found[0][dead].any()
        assert not found[1][a == 0].any()


@pytest.mark.parametrize("value", [1e-30, 1e-20, 1e-8])
def test_small_activations_do_not_underflow(value):
    """``a_bar = e g / (a + e)^2`` is about ``g / e`` near 0, in float32 too."""
    a = torch.full((1, 1), value, requires_grad=True)
    ops.phi_scale(torch.ones(1, 1), a, 0.01).sum().backward()
    assert a.grad.item() == pytest.approx(100.0, rel=1e-4)


def test_maps_are_separate():
    a, scale = alive((N, 3, 4)), randn(3, seed=9)
    g, skip = randn(N * K, 3, 4, seed=1), randn(N * K, 3, 4, seed=2)
    for eps in (0.01, ops.relative_epsilon(a, 0.1)):
        both = torch.cat([g, skip], 1)
        apart = over_maps(lambda r, v, e=eps: ops.phi_scale(r[:, :3], v, e, r[:, 3:], scale), both, a)
        close(ops.phi_scale(g, a, eps, skip, scale), apart, 0.0)


@pytest.mark.parametrize("maps", [1, K])
def test_layout_is_that_of_g(maps):
    a = alive((N, 3, 4, 5)).contiguous(memory_format=torch.channels_last)
    g = randn(N * maps, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    for scale in (None, randn(3)):
        assert ops.phi_scale(g, a, 0.01, None, scale).is_contiguous(memory_format=torch.channels_last)
        assert ops.phi_scale(g.contiguous(), a.contiguous(), 0.01, None, scale).is_contiguous()


def test_empty_batch():
    a = torch.zeros(0, 3, 2, dtype=torch.float64, requires_grad=True)
    g = torch.zeros(0, 3, 2, dtype=torch.float64, requires_grad=True)
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for eps in (0.01, 0.0, ops.relative_epsilon(a, 0.1)):
        s = ops.phi_scale(g, a, eps, g, scale)
        assert s.shape == (0, 3, 2)
        assert not any(t.any() for t in grads(s, [g, a, scale]))


@pytest.mark.parametrize("name", ["phi_scale", "stabilised_ratio"])
def test_errors(name):
    with pytest.raises(ValueError, match=r"must be \[N\*K, 3, 4\] over the activation's N=2, got \(3, 3, 4\)"):
        getattr(ops, name)(torch.ones(3, 3, 4), torch.ones(2, 3, 4), 0.01)
    with pytest.raises(ValueError, match="got"):
        getattr(ops, name)(torch.ones(2, 3, 5), torch.ones(2, 3, 4), 0.01)
    with pytest.raises(ValueError, match="rest is added behind scale: pass scale too"):
        ops.phi_scale(torch.ones(2, 3), torch.ones(2, 3), 0.01, rest=torch.ones(2, 3))
    with pytest.raises(RuntimeError, match=r"backend='cuda' needs tensors on a GPU"):
        ops.phi_scale(torch.ones(2, 3), torch.ones(2, 3), 0.01, backend="cuda")


# ---- Dual --------------------------------------------------------------------------------------------------------------


def dual(g, g_plus, a, z_plus, eps, eps_plus):
    return a / (a + eps) * g, a * g_plus / (z_plus + eps_plus)


def dual_case(which, eps, size=(3, 2, 3)):
    inputs = {"g": randn(N, *size, seed=1), "g_plus": randn(N, *size, seed=2), "a": alive((N, *size), seed=3)}
    inputs["z_plus"] = inputs["a"] + rand(N, *size, seed=4)
    e = ops.relative_epsilon(inputs["a"], 0.1) if eps == "relative" else eps

    def call(fn):
        def run(*t):
            s, s_plus = fn(*t, e.to(t[0]) if eps == "relative" else e, 0.02)
            return torch.stack([s, s_plus]) if which == "both" else s if which == "s" else s_plus

        return run

    return Case(f"{which}-{eps}", call(ops.dual_phi), call(dual), inputs)


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", [dual_case("both", 0.01), dual_case("both", "relative")], ids=str)
def test_dual_phi(case, check):
    check(case)


@pytest.mark.parametrize("which", ["s", "s_plus"])
def test_dual_phi_when_one_result_is_used(which):
    equals_formula(dual_case(which, 0.01))


@pytest.mark.parametrize("eps", [0.01, 0.0])
def test_dual_phi_of_dead_units(eps):
    a = torch.tensor([[0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    z_plus = torch.tensor([[0.0, 3.0]], dtype=torch.float64, requires_grad=True)
    g, g_plus = randn(1, 2).requires_grad_(), randn(1, 2, seed=1).requires_grad_()
    s, s_plus = ops.dual_phi(g, g_plus, a, z_plus, eps, 0.01)
    found = grads((s, s_plus), [g, g_plus, a, z_plus])
    assert all(torch.isfinite(t).all() for t in (s, s_plus, *found))
    assert not any(t[0, 0] for t in (s, s_plus, *found))


def test_dual_phi_errors():
    one = torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"z_plus must have the shape of g, \(1, 2\), got \(1, 3\)"):
        ops.dual_phi(one, one, one, torch.ones(1, 3), 0.01, 0.01)


# ---- divisions, products, scales -----------------------------------------------------------------------------------------


def sign(z):
    return torch.where(z < 0, -1.0, 1.0).to(z.dtype)


def ratio(R, z, eps):
    k = R.shape[0] // z.shape[0]
    z = z.repeat_interleave(k, 0)
    e = eps.repeat_interleave(k, 0) if isinstance(eps, torch.Tensor) else eps
    return R / (z + e * sign(z))


def plain_cases():
    z = randn(N, 3, 4, 2, seed=1)
    z = z + 0.1 * z.sign()  # away from the step at 0
    R = randn(N * K, 3, 4, 2, seed=2)
    e = rand(N, 1, 1, 1, seed=3)

    def pair(name, R, z, e, *nonneg):
        def of(v):
            return e.to(v) if isinstance(e, torch.Tensor) else e

        return Case(name, lambda r, v: ops.stabilised_ratio(r, v, of(v), *nonneg), lambda r, v: ratio(r, v, of(v)),
                    {"R": R, "z": z})  # fmt: skip

    return [
        pair("ratio", R, z, 0.01),
        pair("ratio-relative", R, z, e),
        pair("ratio-K1", R[:N], z, 0.01),
        pair("ratio-nonneg", R, z.abs(), 0.01, True),
        pair("ratio-nonneg-relative", R, z.abs(), e, True),
        Case("times", ops.times, lambda v, g: v.repeat_interleave(K, 0) * g, {"v": z, "g": R}, False),
        Case("channel_scale", ops.channel_scale, lambda g, c: g * channels(g, c), {"g": R, "scale": randn(3)}, False),
        Case("channel_scale-by-sample", ops.channel_scale, lambda g, c: g * c.repeat_interleave(K, 0)[:, :, None, None],
             {"g": R, "scale": randn(N, 3)}, False),
    ]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", plain_cases(), ids=str)
def test_plain_ops(case, check):
    check(case)


@pytest.mark.parametrize("eps", [0, 0.0, 0.01], ids=["int", "zero", "some"])
@pytest.mark.parametrize("nonneg", [False, True])
def test_ratio_of_nothing(eps, nonneg):
    """Where ``R = z = 0`` the ratio is 0, and the gradients are finite, with and without epsilon."""
    z, R = torch.zeros(2, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    s = ops.stabilised_ratio(R, z, eps, nonneg)
    assert not s.any()
    assert all(torch.isfinite(t).all() for t in grads(s, [R, z]))
    relative = ops.relative_epsilon(z, 0.1)
    assert not ops.stabilised_ratio(R, z, relative, nonneg).any()


@pytest.mark.parametrize("eps", [0, 0.0, 0.01], ids=["int", "zero", "some"])
def test_ratio_where_the_value_is_zero(eps):
    """``0 / 0`` is 0, with and without epsilon; ``sign 0 = +1``, for -0 too."""
    z = torch.tensor([[0.0, -0.0, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    R = torch.tensor([[0.0, 0.0, 2.0, 2.0]], dtype=torch.float64, requires_grad=True)
    s = ops.stabilised_ratio(R, z, eps)
    close(s, torch.tensor([[0.0, 0.0, 2 / (1 + eps), -2 / (1 + eps)]], dtype=torch.float64))
    assert all(torch.isfinite(t).all() for t in grads(s, [R, z]))
    if eps:
        assert (ops.stabilised_ratio(torch.ones_like(R), z, eps)[0, :2] == 1 / eps).all()


def test_empty_ratio_and_times():
    z, R = torch.zeros(0, 3), torch.zeros(0, 3)
    assert ops.stabilised_ratio(R, z, 0.01).shape == ops.times(z, R).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_relative_epsilon(dtype):
    a = rand(3, 4, 5, 5, high=3.0).to(dtype).requires_grad_()
    e = ops.relative_epsilon(a, 0.1)
    assert e.shape == (3, 1, 1, 1)
    assert e.dtype == dtype
    assert not e.requires_grad
    want = rms(a.double(), 0.1)
    assert ((e.double() - want).abs() <= 2 * torch.finfo(dtype).eps * want).all()


def test_relative_epsilon_belongs_to_the_sample():
    a = rand(3, 4, 5)
    other = a.clone()
    other[1:] *= 100
    assert torch.equal(ops.relative_epsilon(a, 0.1)[0], ops.relative_epsilon(other, 0.1)[0])
    assert ops.relative_epsilon(torch.zeros(1, 4), 0.1).item() > 0
    assert ops.relative_epsilon(torch.zeros(0, 4), 0.1).shape == (0, 1)


@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_relative_epsilon_in_half_precision_neither_overflows_nor_vanishes(size):
    a = torch.full((1, 100), size, dtype=torch.float16)
    assert ops.relative_epsilon(a, 0.5).item() == pytest.approx(max(size / 2, torch.finfo(torch.float16).tiny), rel=1e-2)


def test_low_precision_with_dead_units():
    a = rand(4, 6, low=-1.0).clamp(min=0)
    inputs = {"g": randn(4, 6), "a": a}
    any_dtype(Case("dead", lambda g, v: ops.phi_scale(g, v.detach(), 0.01), lambda g, v: phi(g, v.detach(), 0.01), inputs))
