"""The rules beyond epsilon on one layer, against the explicit matrix of the oracle, with their gradients."""

import oracles
import pytest
import torch
from helpers import CHECKS, Case, any_dtype, close, equals_formula, gradcheck, over_maps, rand, randn
from torch import nn

from fisnet_cuda import ops
from fisnet_cuda.ops import rules

N, K, E = 2, 3, 0.01

LAYERS = {
    "dense": (nn.Linear(5, 4), (5,)),
    "rows": (nn.Linear(3, 2), (4, 3)),
    "conv": (nn.Conv2d(2, 3, 3, padding=1), (2, 4, 3)),
    "strided": (nn.Conv2d(2, 2, 3, stride=2, padding=1, dilation=(1, 2)), (2, 5, 6)),
    "grouped": (nn.Conv2d(4, 4, (3, 1), padding=(1, 0), groups=2), (4, 3, 2)),
    "1d": (nn.Conv1d(2, 3, 2), (2, 5)),
    "3d": (nn.Conv3d(1, 2, 2), (1, 2, 3, 2)),
}


class Layer:
    """A linear map with everything an op wants to know of it, and its matrix for any weight and bias."""

    def __init__(self, name):
        module, self.shape = LAYERS[name]
        self.module = module.double()
        if isinstance(module, nn.Linear):
            self.geometry, self.in_size = ops.linear_geometry(), ()
        else:
            settings = module.stride, module.padding, module.dilation, module.groups
            self.geometry, self.in_size = ops.conv_geometry(len(self.shape) - 1, *settings), self.shape[1:]
        self.W = randn(*module.weight.shape, seed=1)
        self.W = self.W + 0.05 * self.W.sign()
        self.b = torch.tensor([0.5, -0.4, 0.3, -0.2], dtype=torch.float64)[: len(module.bias)]
        self.out = self.module(torch.zeros(1, *self.shape, dtype=torch.float64)).shape[1:]

    def a(self, signed):
        return randn(N, *self.shape, seed=2) if signed else rand(N, *self.shape, seed=2, low=0.05)

    def R(self, maps):
        return randn(N * maps, *self.out, seed=3)

    def matrix(self, W, b=None):
        """``(W [out, in], b [out])``, differentiable in both."""
        with torch.enable_grad():
            parameters = {"weight": W, "bias": torch.zeros_like(self.b)}
            full = oracles.matrix(lambda v: torch.func.functional_call(self.module, parameters, (v,)), self.shape)
            zero = torch.zeros(1, *self.shape, dtype=torch.float64)
            bias = self.b * 0 if b is None else b
            offset = torch.func.functional_call(self.module, {"weight": W, "bias": bias}, (zero,)).flatten()
        return full, offset

    def oracle(self, rule, R, a, W, b=None, connected=False, **parameters):
        """``R_in [N*K, *shape]`` by a rule of oracles.py, each sample beside its K maps."""
        full, offset = self.matrix(W, b)
        full = (full != 0).double() if connected else full
        maps = R.reshape(len(a), -1, full.shape[0])
        return oracles.RULES[rule](full, offset, a.reshape(len(a), 1, -1), maps, **parameters).reshape(-1, *self.shape)


def case(rule, name, signed=False, maps=K, bias=True):
    """Relevance of the input by the package's op and by the oracle; gradients with respect to R, a, W and b."""
    layer = Layer(name)
    where = layer.geometry, layer.in_size, signed

    def times(a, g):
        return ops.times(a, g)

    def run_gamma(R, a, W, b=None):
        return times(a, rules.gamma(R, a, W, b, *where, 0.3, E))

    def run_alpha_beta(R, a, W, b=None):
        return times(a, rules.alpha_beta(R, a, W, b, *where, 2.0, 1.0, E))

    def run_alpha1(R, a, W, b=None):
        return times(a, rules.alpha_beta(R, a, W, b, *where, 1.0, 0.0, E))

    def run_zplus(R, a, W, b=None):
        P, _ = rules.plus_products(a, W, layer.geometry, signed)
        z = P if b is None else P + rules.channel_bias(b.clamp(min=0), layer.geometry)
        s = ops.stabilised_ratio(R, z, E)
        return times(a, rules.plus_transposed(s, None, a, W, layer.geometry, layer.in_size, signed))

    def run_w2(R, a, W, flat=False):
        out = rules.w_square(R, a, W, layer.geometry, layer.in_size, flat, E)
        return out + times(a, torch.zeros_like(out))  # a has no part in it, and a gradient of 0

    def run_flat(R, a, W):
        return run_w2(R, a, W, True)

    op, oracle, parameters = {
        "gamma": (run_gamma, "gamma", {"gamma": 0.3, "e": E}),
        "alpha_beta": (run_alpha_beta, "alpha_beta", {"alpha": 2.0, "beta": 1.0, "e": E}),
        "alpha1": (run_alpha1, "alpha_beta", {"alpha": 1.0, "beta": 0.0, "e": E}),
        "zplus": (run_zplus, "zplus", {"e": E}),
        "w2": (run_w2, "w2", {"e": E}),
        "flat": (run_flat, "flat", {"e": E, "connected": True}),
    }[rule]
    inputs = {"R": layer.R(maps), "a": layer.a(signed), "W": layer.W}
    if bias and rule not in ("w2", "flat"):
        inputs["b"] = layer.b
    name = f"{rule}-{name}-K{maps}{'-signed' * signed}{'-no-bias' * (not bias)}"
    return Case(name, op, lambda R, a, W, b=None: layer.oracle(oracle, R, a, W, b, **parameters), inputs, function=False)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("rule", ["gamma", "alpha_beta", "alpha1", "zplus", "w2", "flat"])
def test_rule(rule, signed, name):
    for maps in (1, K):
        equals_formula(case(rule, name, signed, maps))
    equals_formula(case(rule, name, signed, bias=False))


# checks that need no second implementation; low precision has a test of its own, as the oracle's matrices are float64
@pytest.mark.parametrize("check", CHECKS[1:-1], ids=lambda f: f.__name__)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("rule", ["gamma", "alpha_beta", "zplus", "w2"])
def test_in_every_way(rule, signed, check):
    check(case(rule, "dense", signed))
    if check is not gradcheck:
        check(case(rule, "conv", signed))


@pytest.mark.parametrize("rule", ["gamma", "alpha_beta", "zplus", "w2"])
def test_low_precision(rule):
    made = case(rule, "dense", signed=True, maps=1)
    parameters = {"gamma": {"gamma": 0.3}, "alpha_beta": {"alpha": 2.0, "beta": 1.0}}.get(rule, {}) | {"e": E}

    def formula(R, a, W, b=None):
        out = oracles.RULES[rule](W, W.new_zeros(len(W)) if b is None else b, a, R, **parameters)
        return out + 0 * a

    any_dtype(made._replace(formula=formula))


@pytest.mark.parametrize("rule", ["gamma", "alpha_beta", "zplus", "w2", "flat"])
def test_maps_are_separate(rule):
    made = case(rule, "conv", signed=True)
    R, a, *rest = made.inputs.values()
    close(made.op(R, a, *rest), over_maps(lambda r, v: made.op(r, v, *rest), R, a))


@pytest.mark.parametrize("rule", ["gamma", "alpha_beta", "zplus", "w2", "flat"])
def test_empty_batch(rule):
    made = case(rule, "conv", signed=True)
    R, a, *rest = made.inputs.values()
    assert made.op(R[:0], a[:0], *rest).shape == a[:0].shape


@pytest.mark.parametrize("rule", ["gamma", "alpha_beta", "zplus", "w2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_share(rule, dtype):
    """Weights and inputs of 0: the denominators are epsilon, the relevance is 0, gradients are finite."""
    made = case(rule, "conv", signed=True, bias=False)
    R, a, W = (torch.zeros_like(t, dtype=dtype).requires_grad_() for t in made.inputs.values())
    out = made.op(R + 1, a, W)
    assert not out.any()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), (R, a, W), allow_unused=True) if g is not None)


# ---- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_conservation(name):
    """What arrives is what was sent, times the share of the denominator that is no bias and no epsilon."""
    layer = Layer(name)
    a, R = layer.a(True), layer.R(1)
    full, b = layer.matrix(layer.W, layer.b)
    v = a.flatten(1)
    up, down = v.clamp(min=0), v.clamp(max=0)
    P = up @ full.clamp(min=0).T + down @ full.clamp(max=0).T
    M = -(up @ full.clamp(max=0).T + down @ full.clamp(min=0).T)
    sent = R.flatten(1)
    arrives = {
        "zplus": sent * P / (P + b.clamp(min=0) + E),
        "alpha_beta": 2 * sent * P / (P + b.clamp(min=0) + E) - sent * M / (M + (-b).clamp(min=0) + E),
    }
    for rule, want in arrives.items():
        made = case(rule, name, signed=True, maps=1)
        close(made.op(*made.inputs.values()).flatten(1).sum(1), want.sum(1))


def test_gamma_between_epsilon_and_zplus():
    """gamma = 0 is epsilon, a very large one z+ (where all outputs are positive)."""
    layer = Layer("dense")
    a, R = layer.a(False), layer.R(1)
    where = layer.geometry, layer.in_size, False
    got = a * rules.gamma(R, a, layer.W, layer.b, *where, 0.0, E)
    close(got, layer.oracle("epsilon", R, a, layer.W, layer.b, e=E))
    W = layer.W.abs()
    got = a * rules.gamma(R, a, W, None, *where, 1e14, 0.0)
    assert (got - layer.oracle("zplus", R, a, W, e=0.0)).abs().max() <= 1e-10


# ---- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "conv", "grouped"])
@pytest.mark.parametrize("signed", [False, True])
def test_plus_products(name, signed):
    """``P`` and ``M`` are the sums of the positive and of the negative contributions, both >= 0, ``P - M = W a``."""
    layer = Layer(name)
    a = layer.a(signed)
    P, M = rules.plus_products(a, layer.W, layer.geometry, signed)
    full, _ = layer.matrix(layer.W)
    contributions = a.flatten(1)[:, None, :] * full
    close(P.flatten(1), contributions.clamp(min=0).sum(-1))
    close(M.flatten(1), (-contributions).clamp(min=0).sum(-1))
    close(P - M, ops.fprop(a, layer.W, None, layer.geometry))


@pytest.mark.parametrize("maps", [1, K])
@pytest.mark.parametrize("minus", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_plus_transposed(maps, minus, signed):
    """``R = sum over positive contributions . s_plus + over negative ones . s_minus``, by contributions."""
    layer = Layer("conv")
    inputs = {"s_plus": layer.R(maps), "a": layer.a(signed), "W": layer.W}
    if minus:
        inputs["s_minus"] = randn(N * maps, *layer.out, seed=8)

    def op(s_plus, a, W, s_minus=None):
        g = rules.plus_transposed(s_plus, s_minus, a, W, layer.geometry, layer.in_size, signed)
        return ops.times(a, g)

    def formula(s_plus, a, W, s_minus=None):
        full, _ = layer.matrix(W)
        c = a.flatten(1)[:, None, :] * full  # [N, out, in]
        R = (s_plus.reshape(N, maps, -1, 1) * c.clamp(min=0)[:, None]).sum(2)
        if s_minus is not None:
            R = R + (s_minus.reshape(N, maps, -1, 1) * (-c).clamp(min=0)[:, None]).sum(2)
        return R.reshape(-1, *layer.shape)

    equals_formula(Case("", op, formula, inputs))


def test_by_sign():
    a = torch.tensor([[1.0, -1.0, 0.0]])
    up, down = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.full((2, 3), 9.0)
    assert rules.by_sign(a, up, down).tolist() == [[1, -9, 3], [4, -9, 6]]
    assert rules.by_sign(a, up[:1], down[:1]).tolist() == [[1, -9, 3]]


@pytest.mark.parametrize(("with_scale", "with_shift"), [(True, True), (False, True), (False, False)])  # BatchNorm shifts
def test_plus_denominator(with_scale, with_shift):
    """BatchNorm is folded before the positive part is taken: ``|scale| P + max(b~, 0)``."""
    P, scale, shift = rand(2, 3, 4), randn(3), randn(3, seed=1)
    got = rules.plus_denominator(P, scale.abs() if with_scale else None, shift if with_shift else None)
    want = P * (scale.abs()[:, None] if with_scale else 1) + (shift.clamp(min=0)[:, None] if with_shift else 0)
    close(got, want)


def test_plus_linear_denominator_takes_the_bias_as_a_constant():
    P, b = rand(2, 3).requires_grad_(), randn(3).requires_grad_()
    z = rules.plus_linear_denominator(P, b)
    close(z, P + b.clamp(min=0))
    assert torch.autograd.grad(z.sum(), [P, b], allow_unused=True)[1] is None
    assert rules.plus_linear_denominator(P, None) is P


@pytest.mark.parametrize("maps", [1, K])
@pytest.mark.parametrize("with_M", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_plus_affine(maps, with_M, with_bias, affine):
    """``z+ = k+ P + |k-| M + max(b~, 0)``: gamma has a gradient, bias, beta and statistics have none."""
    mean, rstd, bias = randn(3, seed=1), rand(3, seed=2, low=0.5), randn(3, seed=3) if with_bias else None
    beta = randn(3, seed=5) if affine else None
    inputs = {"R": randn(N * maps, 3, 4, seed=6), "P": rand(N, 3, 4, seed=7)}
    if with_M:
        inputs["M"] = rand(N, 3, 4, seed=8)
    if affine:
        inputs["gamma"] = torch.tensor([1.5, -0.7, 0.3], dtype=torch.float64)

    def unpack(rest):
        rest = list(rest)
        return rest.pop(0) if with_M else None, rest.pop(0) if affine else None

    def op(R, P, *rest):
        M, gamma = unpack(rest)
        u = None if M is None else P - M + (0 if bias is None else bias[:, None])  # the map's own value
        plus, minus = rules.plus_affine(R, P, u, bias, gamma, beta, mean, rstd, E)
        assert (minus is None) == (M is None)
        return plus if M is None else torch.stack([plus, minus])

    def formula(R, P, *rest):
        M, gamma = unpack(rest)
        k = (rstd if gamma is None else gamma * rstd)[:, None]
        shift = ((0 if bias is None else bias) - mean)[:, None] * k + (0 if beta is None else beta[:, None])
        z = k.clamp(min=0) * P + shift.clamp(min=0) + E + (0 if M is None else (-k).clamp(min=0) * M)
        s = R.unflatten(0, (N, maps)) / z[:, None]
        plus, minus = ((s * c).flatten(0, 1) for c in (k.clamp(min=0), (-k).clamp(min=0)))
        return plus if M is None else torch.stack([plus, minus])

    equals_formula(Case("", op, formula, inputs))
