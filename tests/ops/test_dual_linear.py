"""Dual's two maps through one linear layer: `dual_fprop`, `dual_transposed_phi`, and adjoints that change hands."""

import pytest
import torch
from helpers import CHECKS, Case, close, equals_formula, grads, rand, randn
from ops.test_linear_maps import CONV, input_gradient
from ops.test_phi import dual

from fisnet_cuda import ops
from fisnet_cuda.ops import dual_linear

N = 2
EPS, EPS_PLUS = 0.03, 0.02
LAYERS = {  # c_in, c_out, size, kernel, stride, padding, dilation, groups
    "1x1": (3, 4, (3, 2), (1, 1), 1, 0, 1, 1),
    "3x3": (2, 3, (4, 3), (3, 3), 1, 1, 1, 1),
    "strided": (3, 2, (6, 5), (3, 2), 2, 1, 1, 1),
    "dilated": (2, 2, (5, 5), (2, 3), (1, 2), (1, 0), 2, 1),
    "grouped": (4, 6, (3, 3), (3, 3), 1, 1, 1, 2),
    "1d": (2, 3, (5,), (3,), 2, 1, 1, 1),
    "dense": (4, 3, (), (), 1, 0, 1, 1),
    "dense-axes": (4, 3, (2,), None, 1, 0, 1, 1),  # dense: axes before the channels
}
SIGN = [1.0, -1.0, 0.0, 1.0, -1.0, -1.0]


class Layer:
    """A linear map, its weight, and shapes of what goes through it."""

    def __init__(self, name):
        c_in, c_out, size, kernel, *settings = LAYERS[name]
        groups, spatial = settings[-1], len(kernel or ())
        self.spatial, self.c_out = spatial, c_out
        self.geometry = ops.conv_geometry(spatial, *settings) if spatial else ops.linear_geometry()
        self.W = randn(c_out, c_in // groups, *(kernel or ()), seed=1)
        self.x = (N, c_in, *size) if spatial else (N, *size, c_in)
        self.size = size if spatial else ()
        self.y = tuple(self.fprop(torch.zeros(self.x, dtype=torch.float64), self.W).shape)
        self.factor = randn(c_out, seed=2)

    def fprop(self, x, W):
        return CONV[self.spatial](x, W, None, *self.geometry[1:]) if self.spatial else x @ W.T

    def dgrad(self, s, W):
        return input_gradient(s, W, self.geometry, self.size)

    def rows(self, v):
        return v.view(-1, *[1] * (self.W.dim() - 1))

    def columns(self, v):
        return v.view(-1, *[1] * self.spatial)


def stacked(pair, which):
    return torch.stack(pair) if which == "both" else pair[which]


# ---- forward -------------------------------------------------------------------------------------------------------------


def forward_case(name, which="both", signed=True, bias=True):
    layer = Layer(name)
    sign = torch.tensor(SIGN[: layer.c_out]) if signed else None
    plus = rand(layer.c_out, seed=5) if bias else None
    inputs = {"x": rand(*layer.x, seed=3), "W": layer.W}
    if bias:
        inputs["shift"] = randn(layer.c_out, seed=4)

    def op(x, W, shift=None):
        given = (None if v is None else v.to(x.dtype) for v in (sign, plus))
        at, shift_plus = given
        return stacked(ops.dual_fprop(x, W, layer.geometry, at, shift, shift_plus), which)

    def formula(x, W, shift=None):
        V = W if sign is None else W * layer.rows(sign).to(W)
        z, P = layer.fprop(x, W), layer.fprop(x, torch.relu(V))
        if bias:
            z, P = z + layer.columns(shift), P + layer.columns(plus).to(P)
        return stacked((z, P), which)

    return Case(f"{name}-{which}{'-signed' * signed}{'-bias' * bias}", op, formula, inputs)


FORWARD = [forward_case("3x3"), forward_case("strided", bias=False), forward_case("grouped"), forward_case("dense-axes", signed=False)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_dual_fprop(case, check):
    check(case)


@pytest.mark.parametrize("which", ["both", 0, 1])
@pytest.mark.parametrize("name", LAYERS)
def test_dual_fprop_of_every_layer(name, which):
    for signed in (False, True):
        for bias in (False, True):
            equals_formula(forward_case(name, which, signed, bias))


def test_a_sign_of_zero_gives_no_weight():
    x, W = rand(2, 3), randn(2, 3).requires_grad_()
    z, P = ops.dual_fprop(x, W, ops.linear_geometry(), torch.zeros(2, dtype=torch.float64))
    assert not P.any()
    assert not torch.autograd.grad(P.sum(), W)[0].any()
    assert z.all()


# ---- relevance -----------------------------------------------------------------------------------------------------------


def relevance_case(name, phi=False, before=False, factor=True, which="both", eps=EPS):
    """Back through a layer; ``phi``: and the ReLU before it; ``before``: from the ReLU behind it, whose adjoint changes hands."""
    layer = Layer(name)
    s = "g" if before else "s"
    inputs = {s: randn(*layer.y, seed=3), f"{s}_plus": randn(*layer.y, seed=4), "W": layer.W}
    if factor:
        inputs["factor"] = layer.factor
    for at, shape in (("in", layer.x), ("out", layer.y)):
        if phi if at == "in" else before:
            inputs[f"a_{at}"] = rand(*shape, seed=5, low=0.1, high=2.0)
            inputs[f"z_{at}"] = inputs[f"a_{at}"] + rand(*shape, seed=6)
    relative = {k: ops.relative_epsilon(v, 0.1) for k, v in inputs.items() if k[0] == "a"} if eps == "relative" else {}

    def epsilon(at, like):
        return relative[f"a_{at}"].to(like) if relative else eps

    def op(*tensors):
        t = dict(zip(inputs, tensors))
        s, s_plus, ahead = t.get("s"), t.get("s_plus"), None
        if before:
            ahead = t["a_out"], t["z_out"], epsilon("out", t["g"]), EPS_PLUS
            s, s_plus = ops.dual_phi_handed_over(t["g"], t["g_plus"], *ahead)
        here = (t["a_in"], t["z_in"], epsilon("in", s), EPS_PLUS) if phi else ()
        found = ops.dual_transposed_phi(s, s_plus, t["W"], layer.geometry, layer.size, t.get("factor"), *here, before=ahead)
        return stacked(found, which)

    def formula(*tensors):
        t = dict(zip(inputs, tensors))
        s, s_plus = t.get("s"), t.get("s_plus")
        if before:
            s, s_plus = dual(t["g"], t["g_plus"], t["a_out"], t["z_out"], epsilon("out", t["g"]), EPS_PLUS)
        V = t["W"] * layer.rows(t["factor"]) if factor else t["W"]
        found = layer.dgrad(s, V), layer.dgrad(s_plus, torch.relu(V))
        if phi:
            found = dual(*found, t["a_in"], t["z_in"], epsilon("in", s), EPS_PLUS)
        return stacked(found, which)

    name = f"{name}{'-phi' * phi}{'-before' * before}{'-factor' * factor}-{which}-{eps}"
    return Case(name, op, formula, inputs)


RELEVANCE = [
    relevance_case("3x3"),
    relevance_case("dense", phi=True, factor=False),
    relevance_case("strided", phi=True),
    relevance_case("grouped", before=True),
    relevance_case("3x3", phi=True, before=True, eps="relative"),
    relevance_case("1x1", phi=True, before=True, factor=False),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", RELEVANCE, ids=str)
def test_dual_transposed_phi(case, check):
    check(case)


@pytest.mark.parametrize("phi", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_dual_transposed_phi_of_every_layer(name, phi, before):
    for factor in (False, True):
        for which in ("both", 0, 1):
            equals_formula(relevance_case(name, phi, before, factor, which))
    equals_formula(relevance_case(name, phi, before, eps=0.0))


def test_a_chain_of_three_layers():
    """ReLU, layer, ReLU, layer, ReLU: every adjoint of `dual_phi` but the last one's changes hands."""
    layers = [Layer("3x3"), Layer("grouped")]
    layers[0].y, sizes = layers[0].x, (N, 2, 4, 3)
    V = [randn(2, 2, 3, 3, seed=1), randn(2, 2, 3, 3, seed=2)]
    k = [randn(2, seed=3), randn(2, seed=4)]
    a = [rand(*sizes, seed=5 + i, low=0.1) for i in range(3)]
    z = [v + rand(*sizes, seed=8 + i) for i, v in enumerate(a)]
    g = [randn(*sizes, seed=11), randn(*sizes, seed=12)]
    leaves = [*g, *V, *k, *a, *z]
    geometry = ops.conv_geometry(2, 1, 1, 1, 1)

    def run(fused):
        t = [v.clone().requires_grad_() for v in leaves]
        (g, g_plus), V, k, a, z = t[:2], t[2:4], t[4:6], t[6:9], t[9:]
        if fused:
            at = [(a[i], z[i], EPS, EPS_PLUS) for i in range(3)]
            s, s_plus = ops.dual_phi_handed_over(g, g_plus, *at[0])
            s, s_plus = ops.dual_transposed_phi(s, s_plus, V[0], geometry, sizes[2:], k[0], *at[1], before=at[0], handed_over=True)
            out = ops.dual_transposed_phi(s, s_plus, V[1], geometry, sizes[2:], k[1], *at[2], before=at[1])
        else:
            out = dual(g, g_plus, a[0], z[0], EPS, EPS_PLUS)
            for i in (0, 1):
                W = V[i] * k[i].view(-1, 1, 1, 1)
                g, g_plus = (input_gradient(s, w, geometry, sizes[2:]) for s, w in zip(out, (W, torch.relu(W))))
                out = dual(g, g_plus, a[i + 1], z[i + 1], EPS, EPS_PLUS)
        return torch.stack(out), grads(out, t)

    (got, got_grads), (want, want_grads) = run(True), run(False)
    close(got, want)
    for found, wanted in zip(got_grads, want_grads):
        close(found, wanted)


@pytest.mark.parametrize("name", ["3x3", "dense"])
def test_the_two_map_ops_are_what_runs(monkeypatch, name):
    """Each is called once a pass; nothing makes the two products apart."""
    case, seen = relevance_case(name, phi=True, before=True), []
    real = dual_linear.dispatch.run
    monkeypatch.setattr(dual_linear.dispatch, "run", lambda op, *rest: seen.append(op) or real(op, *rest))
    inputs = [t.clone().requires_grad_() for t in case.inputs.values()]
    grads(case.op(*inputs), inputs)
    assert seen == ["dual_transposed_phi", "dual_fprop_adjoint"]
    seen.clear()
    case = forward_case(name)
    inputs = [t.clone().requires_grad_() for t in case.inputs.values()]
    grads(case.op(*inputs), inputs)
    assert seen == ["dual_fprop", "dual_transposed_sum"]


@pytest.mark.parametrize("case", [relevance_case("3x3", True, True), forward_case("3x3")], ids=str)
def test_without_gradients(case):
    want = case.op(*case.inputs.values())
    with torch.no_grad():
        found = case.op(*case.inputs.values())
    assert torch.equal(found, want)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast(grad):
    """In the autocast dtype; gradients in the dtype of what asked."""
    case = relevance_case("3x3", phi=True, before=True)
    inputs = [t.float().requires_grad_() for t in case.inputs.values()]
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        layer = Layer("3x3")
        x, W = rand(*layer.x).float(), layer.W.float().requires_grad_()
        z, P = ops.dual_fprop(x, W, layer.geometry, torch.tensor([1.0, -1, 1]), torch.ones(3))
        assert z.dtype == P.dtype == torch.bfloat16
        y = case.op(*inputs)
    if grad:
        for t, g in zip(inputs, torch.autograd.grad(y.float().sum(), inputs)):
            assert g.dtype == t.dtype
            assert torch.isfinite(g).all()
        assert torch.autograd.grad((z + P).sum(), W)[0].dtype == torch.float32


def test_empty_batch():
    case = relevance_case("3x3", phi=True, before=True)
    inputs = [(v if n in ("W", "factor") else v[:0]).clone().requires_grad_() for n, v in case.inputs.items()]
    y = case.op(*inputs)
    assert y.shape[1] == 0
    assert not any(g.any() for g in grads(y, inputs))


def test_errors():
    one, W, dense = torch.ones(1, 2), torch.ones(2, 3), ops.linear_geometry()
    with pytest.raises(ValueError, match=r"s_plus must have the shape of s, \(1, 2\), got \(2, 2\)"):
        ops.dual_transposed_phi(one, torch.ones(2, 2), W, dense, ())
    with pytest.raises(ValueError, match="s has 3 channels and W has 2 outputs"):
        ops.dual_transposed_phi(torch.ones(1, 3), torch.ones(1, 3), W, dense, ())
    with pytest.raises(ValueError, match="a and z_plus go together"):
        ops.dual_transposed_phi(one, one, W, dense, (), a=torch.ones(1, 3))
    with pytest.raises(RuntimeError, match="backend='cuda' needs tensors on a GPU"):
        ops.dual_fprop(torch.ones(1, 3), W, dense, backend="cuda")
