"""The transposed product with the ReLU's phi behind it, alone and with phi's adjoint handed over to the next one."""

from typing import NamedTuple

import pytest
import torch
from helpers import CHECKS, Case, close, equals_formula, error, grads, rand, randn

from fisnet_cuda import ops

N, K = 2, 3
F = torch.nn.functional
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Map(NamedTuple):
    """A linear map by its shapes."""

    W: torch.Tensor
    geometry: ops.Geometry
    inside: tuple[int, ...]  # a sample at its input
    outside: tuple[int, ...]  # and at its output

    @property
    def size(self):
        return self.inside[1:] if self.geometry.spatial else ()


def conv(c_out, c_in, size, kernel, stride=1, padding=0, dilation=1, groups=1, seed=1):
    geometry = ops.conv_geometry(len(size), stride, padding, dilation, groups)
    W = randn(c_out, c_in // groups, *kernel, seed=seed)
    out = CONV[len(size)](W.new_zeros(1, c_in, *size), W, None, stride, padding, dilation, groups).shape[1:]
    return Map(W, geometry, (c_in, *size), tuple(out))


def dense(c_out, c_in, *rows, seed=1):
    return Map(randn(c_out, c_in, seed=seed), ops.linear_geometry(), (*rows, c_in), (*rows, c_out))


MAPS = {
    "3x3": conv(4, 3, (5, 4), (3, 3), padding=1),
    "strided": conv(2, 9, (6, 5), (3, 3), stride=2, padding=1),
    "dilated": conv(2, 2, (6, 7), (2, 3), stride=(1, 3), padding=(1, 0), dilation=(2, 1)),
    "grouped": conv(4, 6, (3, 3), (3, 3), padding=1, groups=2),
    "late": conv(16, 3, (2, 1), (3, 3), padding=1),
    "1d": conv(3, 2, (5,), (3,), stride=2, padding=1),
    "3d": conv(2, 2, (2, 3, 2), (2, 2, 1)),
    "dense": dense(3, 4),
    "dense-rank-3": dense(3, 4, 2),
}


# ---- the formula, in plain PyTorch ---------------------------------------------------------------------------------------


def product(s, W, m, factor=None):
    """``W^T (factor . s)`` by PyTorch's own derivative of the map (whose derivative PyTorch knows, too)."""
    if factor is not None:
        s = s * factor.view(-1, *[1] * m.geometry.spatial)
    if not m.geometry.spatial:
        return s @ W
    _, stride, padding, dilation, groups = m.geometry
    like = s.new_zeros(s.shape[0], *m.inside)
    conv = (dilation, False, [0] * m.geometry.spatial, groups, [True, False, False])
    return torch.ops.aten.convolution_backward(s, like, W, None, stride, padding, *conv)[0]


def phi(g, a, eps, skip=None, scale=None, rest=None):
    k = g.shape[0] // a.shape[0]
    a = a.repeat_interleave(k, 0)
    e = eps.repeat_interleave(k, 0) if isinstance(eps, torch.Tensor) else eps
    s = a / (a + e) * (g if skip is None else g + skip)
    s = s if scale is None else s * scale.view(1, -1, *[1] * (s.dim() - 2))
    return s if rest is None else s + rest


def alive(n, sample, seed):
    return rand(n, *sample, seed=seed, low=0.05, high=2.0)


def epsilon(kind, a):
    """A number, or the sample's own scale; a constant of the backward, so gradcheck must not see it move."""
    return ops.relative_epsilon(a, 0.1) if kind == "relative" else kind


# ---- alone ---------------------------------------------------------------------------------------------------------------


def alone(name, maps, eps, *parts):
    m = MAPS[name]
    a = alive(N, m.inside, 2)
    e = epsilon(eps, a)
    inputs = {"s": randn(N * maps, *m.outside, seed=1), "W": m.W, "a": a}
    made = {
        "factor": randn(m.W.shape[0], seed=3),
        "skip": randn(N * maps, *m.inside, seed=4),
        "scale": randn(m.inside[0], seed=5),
        "rest": randn(N * maps, *m.inside, seed=6),
    }
    inputs |= {part: made[part] for part in parts}

    def at(t):
        return e.to(t) if isinstance(e, torch.Tensor) else e

    def op(s, W, a, *given):
        return ops.transposed_phi(s, W, m.geometry, m.size, a=a, eps=at(a), **dict(zip(parts, given)))

    def formula(s, W, a, *given):
        named = dict(zip(parts, given))
        return phi(product(s, W, m, named.pop("factor", None)), a, at(a), **named)

    return Case("-".join((name, f"K{maps}", str(eps), *parts)), op, formula, inputs)


ALONE = [
    alone("3x3", 1, 0.01),
    alone("3x3", K, "relative", "factor", "skip"),
    alone("strided", 1, 0.01, "factor", "skip", "scale", "rest"),
    alone("dilated", K, 0.3, "factor", "scale"),
    alone("grouped", 1, "relative", "skip"),
    alone("late", K, 0.01, "factor", "skip"),
    alone("1d", 1, 0.01, "factor"),
    alone("dense", K, 0.01, "factor", "skip"),
    alone("dense-rank-3", 1, "relative", "factor", "skip"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", ALONE, ids=str)
def test_transposed_phi(case, check):
    check(case)


@pytest.mark.parametrize("maps", [1, K])
@pytest.mark.parametrize("name", MAPS)
def test_transposed_phi_of_every_map(name, maps):
    for eps in (0.01, "relative"):
        for parts in ((), ("factor",), ("skip",), ("factor", "skip"), ("factor", "skip", "scale"), ("scale", "rest")):
            if "rank" not in name or "scale" not in parts:
                equals_formula(alone(name, maps, eps, *parts))


def test_without_a_relu_it_is_the_product():
    m = MAPS["3x3"]
    s, W, skip = randn(N, *m.outside).requires_grad_(), m.W.clone().requires_grad_(), randn(N, *m.inside, seed=3).requires_grad_()
    got = ops.transposed_phi(s, W, m.geometry, m.size, skip=skip)
    want = ops.transposed(s, W, m.geometry, m.size) + skip
    assert torch.equal(got, want)
    for g, w in zip(grads(got, [s, W, skip]), grads(want, [s, W, skip])):
        assert torch.equal(g, w)


# ---- handed over ---------------------------------------------------------------------------------------------------------


def pair(name, maps, eps, *parts):
    """A phi and the map that reads it; with "product" a product before that phi, with "alias" a second reader of its ``s``,
    with "behind" the next ReLU's phi."""
    m = MAPS[name]
    before = conv(3, m.outside[0], m.outside[1:], (1,) * m.geometry.spatial, seed=7) if m.geometry.spatial else None
    before = before or dense(2, m.outside[-1], *m.outside[:-1], seed=7)
    a, a2 = alive(N, m.outside, 2), alive(N, m.inside, 8)
    e, e2 = epsilon(eps, a), epsilon(eps, a2)
    inputs = {"g": randn(N * maps, *m.outside, seed=1), "a": a, "W": m.W}
    if "product" in parts:
        inputs |= {"g": randn(N * maps, *before.outside, seed=1), "W0": before.W}
    made = {
        "skip0": randn(N * maps, *m.outside, seed=9),
        "factor": randn(m.W.shape[0], seed=3),
        "behind": a2,
        "skip": randn(N * maps, *m.inside, seed=4),
        "scale": randn(m.inside[0], seed=5),
    }
    inputs |= {part: made[part] for part in parts if part in made}
    other = randn(N * maps, *m.outside, seed=10)

    def at(e, t):
        return e.to(t) if isinstance(e, torch.Tensor) else e

    def readers(g, s):
        return torch.cat([g.flatten(1), (s * other.to(s)).flatten(1)], 1) if "alias" in parts else g

    def op(*tensors):
        t = dict(zip(inputs, tensors))
        a, e_in, alias = t["a"], at(e, t["a"]), "alias" in parts
        if "product" in parts:
            s = ops.transposed_phi(
                t["g"], t["W0"], before.geometry, before.size, None, a, e_in, t.get("skip0"), handed_over=True
            )  # fmt: skip
        else:
            s = ops.phi_scale(t["g"], a, e_in, t.get("skip0"), handed_over=True)
        phi2 = (t.get("behind"), at(e2, a), t.get("skip"), t.get("scale"))
        made = ops.transposed_phi(s, t["W"], m.geometry, m.size, t.get("factor"), *phi2, None, (a, e_in), alias=alias)
        return readers(*made) if alias else made

    def formula(*tensors):
        t = dict(zip(inputs, tensors))
        g = product(t["g"], t["W0"], before) if "product" in parts else t["g"]
        s = phi(g, t["a"], at(e, t["a"]), t.get("skip0"))
        g = product(s, t["W"], m, t.get("factor"))
        if "behind" in parts:
            g = phi(g, t["behind"], at(e2, t["a"]), t.get("skip"), t.get("scale"))
        return readers(g, s)

    return Case("-".join((name, f"K{maps}", str(eps), *parts)), op, formula, inputs)


PAIRS = [
    pair("3x3", 1, 0.01),
    pair("3x3", 1, 0.01, "alias"),
    pair("3x3", K, "relative", "product", "skip0", "factor", "behind", "skip", "alias"),
    pair("strided", 1, 0.01, "product", "factor", "alias"),
    pair("dilated", K, 0.3, "skip0", "factor", "behind", "scale"),
    pair("grouped", 1, "relative", "product", "behind", "alias"),
    pair("late", K, 0.01, "product", "factor", "behind", "alias"),
    pair("1d", 1, 0.01, "factor", "alias"),
    pair("dense", K, 0.01, "product", "factor", "behind", "skip", "alias"),
    pair("dense-rank-3", 1, "relative", "product", "skip0", "factor", "behind", "alias"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_handed_over(case, check):
    check(case)


@pytest.mark.parametrize("maps", [1, K])
@pytest.mark.parametrize("name", MAPS)
def test_handed_over_of_every_map(name, maps):
    for eps in (0.01, "relative"):
        for parts in ((), ("factor",), ("behind",), ("product", "factor", "behind", "skip")):
            for alias in ((), ("alias",)):
                equals_formula(pair(name, maps, eps, *parts, *alias))


def chain(maps=1, eps=0.01, handed_over=True, dtype=torch.float64, backend="auto", dead=True, autocast=False):
    """A product, phi, and a second product whose ReLU takes the first ``s`` too; ``(results, leaves)``."""
    m = conv(3, 3, (4, 4), (3, 3), padding=1)
    a, a2 = (rand(N, *m.inside, seed=seed, low=-0.5 if dead else 0.1).relu() for seed in (1, 2))
    leaves = [randn(N * maps, *m.inside, seed=3), m.W, randn(3, 3, 3, 3, seed=4), a, a2, randn(3, seed=5)]
    s0, W0, W, a, a2, factor = leaves = [t.to(dtype).requires_grad_() for t in leaves]
    e, e2 = epsilon(eps, a), epsilon(eps, a2)
    common = {"backend": backend}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if handed_over:
            s = ops.transposed_phi(s0, W0, m.geometry, m.size, None, a, e, handed_over=True, **common)
            source = {"source": (a, e), "alias": True}
            g, alias = ops.transposed_phi(s, W, m.geometry, m.size, factor, a2, e2, **source, **common)
        else:
            s = alias = ops.phi_scale(ops.transposed(s0, W0, m.geometry, m.size, **common), a, e, **common)
            g = ops.phi_scale(ops.transposed(s, W, m.geometry, m.size, factor, **common), a2, e2, **common)
    return (g, alias), leaves


@pytest.mark.parametrize("maps", [1, K])
@pytest.mark.parametrize("eps", [0.0, 0, 0.01, "relative"], ids=str)
def test_dead_units_and_no_epsilon(eps, maps):
    """Bit for bit what the separate ops give, 0 and finite where the unit is dead, and for ``eps = 0`` no gradient of a."""
    (got, leaves), (want, others) = chain(maps, eps), chain(maps, eps, handed_over=False)
    for g, w in zip((*got, *grads(got, leaves)), (*want, *grads(want, others))):
        close(g, w, 1e-14)
    a_bar = grads(got, leaves)[3]
    assert not a_bar[leaves[3] == 0].any()
    assert bool(a_bar.any()) == bool(eps)


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_the_readers_has_no_gradient(which):
    (got, leaves), (want, others) = chain(), chain(handed_over=False)
    for g, w in zip(grads(got[which], leaves), grads(want[which], others)):
        close(g, w, 1e-14)


def test_a_reader_that_shares_memory():
    """The alias is ``s``: no copy."""
    m = conv(3, 3, (4, 4), (3, 3), padding=1)
    a = rand(N, *m.inside)
    for track in (True, False):
        with torch.set_grad_enabled(track):
            s = ops.phi_scale(randn(N, *m.inside).requires_grad_(), a, 0.1, handed_over=True)
            g, alias = ops.transposed_phi(s, m.W, m.geometry, m.size, source=(a, 0.1), alias=True)
        assert alias.data_ptr() == s.data_ptr()
        assert alias is not s or not track
        assert g.requires_grad == alias.requires_grad == track


def test_without_autograd():
    with torch.no_grad():
        got, _ = chain()
        want, _ = chain(handed_over=False)
    for g, w in zip(got, want):
        close(g, w, 1e-14)
    assert not any(t.requires_grad for t in got)


def test_copies():
    """Every consumer gets the result; with an alias it stands between them."""
    m = conv(3, 3, (4, 4), (3, 3), padding=1)
    a, s = rand(N, *m.inside), randn(N, *m.outside)
    source = {"source": (rand(N, *m.outside), 0.1)}
    for track in (True, False):
        with torch.set_grad_enabled(track):
            s = s.detach().requires_grad_(track)
            want = ops.transposed_phi(s, m.W, m.geometry, m.size, None, a, 0.1)
            two = ops.transposed_phi(s, m.W, m.geometry, m.size, None, a, 0.1, copies=2)
            three = ops.transposed_phi(s, m.W, m.geometry, m.size, None, a, 0.1, **source, copies=2, alias=True)
        assert all(torch.equal(t, want) for t in (*two, three[0], three[2]))
        assert torch.equal(three[1], s)
        assert (len(two), len(three)) == (2, 3)


def test_autocast_runs_in_its_dtype():
    """As with separate ops: products in bfloat16, gradients in the dtype of the leaves, and no worse."""
    exact, leaves = chain(dead=False)
    usual = chain(handed_over=False, dtype=torch.float32, dead=False, autocast=True)
    got = chain(dtype=torch.float32, dead=False, autocast=True)
    assert [t.dtype for t in got[0]] == [t.dtype for t in usual[0]]
    want = [*exact, *grads(exact, leaves)]
    found, others = ([*results, *grads(results, leaves)] for results, leaves in (got, usual))
    assert all(t.dtype == torch.float32 for t in found[2:])
    for g, u, w in zip(found, others, want):
        assert error(g, w) <= 2 * error(u, w) + torch.finfo(torch.bfloat16).eps


def test_empty_batch():
    m = conv(3, 3, (4, 4), (3, 3), padding=1)
    a, s = torch.rand(0, *m.inside), torch.rand(0, *m.outside, requires_grad=True)
    W = m.W.float().requires_grad_()
    g, alias = ops.transposed_phi(s, W, m.geometry, m.size, None, a, 0.1, source=(a, 0.1), alias=True)
    (g.sum() + alias.sum()).backward()
    assert s.grad.shape == s.shape
    assert not W.grad.any()


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("s has 3 channels and W has 5 outputs", {"W": torch.ones(5, 3, 3, 3)}),
        (r"a must be \[N, 3, 4, 4\]", {"a": torch.ones(2, 3, 4, 5)}),
        (r"a must be \[N, 3, 4, 4\]", {"a": torch.ones(3, 3, 4, 4)}),
        (r"s must be \[N\*K, 3, 4, 5\]", {"source": (torch.ones(2, 3, 4, 5), 0.1)}),
        ("rest is added behind scale", {"rest": torch.ones(2, 3, 4, 4)}),
        ("pass a, its output", {"a": None, "scale": torch.ones(3)}),
        ("pass a, its output", {"a": None, "handed_over": True}),
        ("one reader and without scale", {"scale": torch.ones(3), "handed_over": True}),
        ("one reader and without scale", {"copies": 2, "handed_over": True}),
        ("copies must be at least 1", {"copies": 0}),
        (r"pass source=\(a, eps\)", {"alias": True}),
    ],
)
def test_errors(says, change):
    options = {"s": torch.ones(2, 3, 4, 4), "W": torch.ones(3, 3, 3, 3), "a": torch.ones(2, 3, 4, 4), "eps": 0.1} | change
    with pytest.raises(ValueError, match=says):
        ops.transposed_phi(geometry=ops.conv_geometry(2, 1, 1, 1, 1), in_size=(4, 4), **options)


def test_phi_scale_refuses_what_cannot_be_handed_over():
    one = torch.ones(1, 1)
    for option in ({"scale": torch.ones(1)}, {"copies": 2}):
        with pytest.raises(ValueError, match="one reader and without scale"):
            ops.phi_scale(one, one, 0.1, handed_over=True, **option)


def test_cuda_backend_is_refused_without_one():
    s, W = torch.ones(1, 3), torch.ones(3, 2)
    with pytest.raises(RuntimeError, match="backend='cuda' needs tensors on a GPU"):
        ops.transposed_phi(s, W, ops.linear_geometry(), (), a=torch.ones(1, 2), backend="cuda")
