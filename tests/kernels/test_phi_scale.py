"""`phi_scale` and its adjoint on the kernels: the shared cases, and what only a kernel can get wrong."""

import itertools

import pytest
import torch
from common import DTYPES, against_reference, channels_last, on, opcheck, repeats, run, same, unaligned
from helpers import CHECKS, equals_formula, rand, randn
from test_phi import PHI, phi_case

from fisnet_cuda import ops

EPS = 0.01
# [N, C, ...]: vectors that end in a channel, cross from one to the next, or cover several; one block and several; ragged ends
SHAPES = {
    "odd": (2, 3, 5, 3),
    "crossing": (2, 8, 3, 3),
    "whole": (2, 16, 4, 4),
    "blocks": (2, 24, 20, 19),
    "one pixel": (3, 40, 1, 1),
    "one channel": (2, 1, 4, 6),
    "one sample": (1, 8, 4, 4),
    "volume": (2, 8, 2, 3, 2),
    "dense": (5, 40),
    "odd dense": (3, 7),
    "sequence": (2, 8, 5),
    "one": (1, 1),
}


def operands(shape, maps, dtype, device, layout=torch.Tensor.contiguous):
    """``g, a, skip, rest`` of one layout, dead units among them, and ``scale``."""
    n, *size = shape
    a = randn(*shape, seed=1).clamp(min=0)
    tensors = [randn(n * maps, *size, seed=2), a, randn(n * maps, *size, seed=3), randn(n * maps, *size, seed=4)]
    return [layout(t.to(device, dtype)) for t in tensors] + [randn(size[0], seed=5).to(device, dtype)]


def eps_of(kind, a):
    if kind != "relative":
        return kind
    return rand(a.shape[0], *[1] * (a.dim() - 1), seed=6, low=0.01).to(a)


def forward_and_backward(g, a, skip, rest, scale, eps, which):
    """Every combination that the program uses, each against the reference: none, skip, scale, or all four."""
    named = {"none": {}, "skip": {"skip": skip}, "scale": {"scale": scale}, "all": {"skip": skip, "scale": scale, "rest": rest}}[which]
    out, s = against_reference("phi_scale", g, a, eps, **named)
    assert out.stride() == s.stride()
    factor = named.get("scale")
    results = against_reference("phi_scale_backward", rest, s, a, eps, factor)
    assert results[0].shape == g.shape
    return out, s, *results


# ---- the shared cases ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", PHI, ids=str)
def test_shared(device, case, check):
    check(on(case, device))


@pytest.mark.parametrize("shape", ["dense", "image", "one", "odd", "volume"])
def test_formula_of_every_shape(device, shape):
    for maps, eps, skip, scale in itertools.product((1, 3), (EPS, "relative"), (False, True), (False, True)):
        equals_formula(on(phi_case(shape, maps, eps, skip, scale), device))


# ---- sizes, dtypes, layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes(device, shape, dtype):
    layouts = (torch.Tensor.contiguous, channels_last) if len(SHAPES[shape]) > 3 else (torch.Tensor.contiguous,)
    for layout, maps, which in itertools.product(layouts, (1, 3), ("none", "skip", "scale", "all")):
        g, a, skip, rest, scale = operands(SHAPES[shape], maps, dtype, device, layout)
        out, *_ = forward_and_backward(g, a, skip, rest, scale, EPS, which)
        assert out.stride() == g.stride()


@pytest.mark.parametrize("shape", ["odd", "crossing", "whole", "dense", "volume"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_epsilon_a_sample(device, shape, dtype):
    for layout, maps, which in itertools.product((torch.Tensor.contiguous, channels_last), (1, 3), ("none", "all")):
        g, a, skip, rest, scale = operands(SHAPES[shape], maps, dtype, device, layout)
        forward_and_backward(g, a, skip, rest, scale, eps_of("relative", a), which)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned(device, dtype):
    """Operands one element behind a 16-byte boundary, all or one of them, give what aligned ones give."""
    aligned = operands(SHAPES["whole"], 3, dtype, device, channels_last)
    want = forward_and_backward(*aligned, EPS, "all")
    for i in (*range(len(aligned)), None):
        some = [unaligned(t) if i in (j, None) else t for j, t in enumerate(aligned)]
        got = forward_and_backward(*some, EPS, "all")
        for x, y in zip(got, want):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)  # sums over other orders


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_result_depends_on_its_own_operands_only(device, dtype):
    """Bit by bit: as vectors, as single elements, in either layout, alone or in a batch."""
    for which in ("none", "skip", "scale", "all"):
        together = operands(SHAPES["crossing"], 3, dtype, device)
        named = {"skip": {"skip": 2}, "scale": {"scale": 4}, "all": {"skip": 2, "rest": 3, "scale": 4}}.get(which, {})

        def call(tensors, names=named):
            return run("phi_scale", tensors[0], tensors[1], EPS, **{k: tensors[i] for k, i in names.items()})[0]

        want = call(together)
        assert same(call([unaligned(t) for t in together]), want)
        assert same(call([channels_last(t) for t in together]), want)
        assert same(call([t[:3] if i != 1 else t[:1] for i, t in enumerate(together[:4])] + together[4:]), want[:3])


@pytest.mark.parametrize("mixed", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float64)])
def test_mixed_dtypes(device, mixed):
    """The widest dtype wins, as in the reference; gradients come back in the dtype of their tensor."""
    g, a, skip, rest, scale = operands(SHAPES["crossing"], 3, torch.float64, device)
    g, skip, rest = (t.to(mixed[0]) for t in (g, skip, rest))
    a, scale = a.to(mixed[1]), scale.to(mixed[1])
    out, s, g_bar, a_bar, scale_bar = forward_and_backward(g, a, skip, rest, scale, EPS, "all")
    widest = torch.promote_types(*mixed)
    assert (out.dtype, s.dtype, g_bar.dtype, a_bar.dtype, scale_bar.dtype) == (widest, widest, widest, a.dtype, scale.dtype)
    g, a, scale = (t.clone().requires_grad_() for t in (g, a, scale))
    ops.phi_scale(g, a, EPS, None, scale).sum().backward()
    assert (g.grad.dtype, a.grad.dtype, scale.grad.dtype) == (g.dtype, a.dtype, scale.dtype)


def test_layouts_that_differ(device):
    """The layout is that of the first tensor; slices and expanded cotangents come along."""
    g, a, skip, rest, scale = operands(SHAPES["crossing"], 3, torch.float32, device)
    want = run("phi_scale", g, a, EPS, skip, scale, rest)[0]
    assert run("phi_scale", g, channels_last(a), EPS, skip, scale, channels_last(rest))[0].is_contiguous()
    last = run("phi_scale", channels_last(g), a, EPS, skip, scale, rest)[0]
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert same(last, want)
    wide = g.new_full((*g.shape[:-1], 2 * g.shape[-1]), torch.nan)
    wide[..., ::2] = g
    assert same(run("phi_scale", wide[..., ::2], a, EPS, skip, scale, rest)[0], want)
    one = torch.ones((), device=device).expand(g.shape)
    for x, y in zip(run("phi_scale_backward", one, want, a, EPS, scale), run("phi_scale_backward", one.clone(), want, a, EPS, scale)):
        assert same(x, y)


def test_absent_results(device):
    g, a, _, rest, scale = operands(SHAPES["crossing"], 3, torch.float32, device)
    out, s = run("phi_scale", g, a, EPS, None, scale)
    assert torch.equal(run("phi_scale", g, a, EPS, None, scale, None, keep_s=False)[0], out)
    full = run("phi_scale_backward", rest, s, a, EPS, scale)
    for need_a, need_scale in itertools.product((False, True), repeat=2):
        some = run("phi_scale_backward", rest, s, a, EPS, scale, need_a, need_scale)
        assert [t is None for t in some] == [False, not need_a, not need_scale]
        assert all(t is None or torch.equal(t, f) for t, f in zip(some, full))


# ---- values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("maps", [1, 3])
def test_without_epsilon(device, dtype, maps):
    """``eps = 0`` is the ReLU's own derivative, exactly: g where alive, 0 where dead, no gradient for the activation."""
    g, a, *_ = operands(SHAPES["crossing"], maps, dtype, device)
    a.view(-1)[:3] = torch.tensor([torch.finfo(dtype).tiny, torch.finfo(dtype).tiny / 4, torch.finfo(dtype).max], dtype=dtype)
    alive = (a > 0).repeat_interleave(maps, 0)
    s = run("phi_scale", g, a, 0.0)[0]
    assert torch.equal(s, g * alive)
    g_bar, a_bar, _ = run("phi_scale_backward", g, s, a, 0.0)
    assert torch.equal(g_bar, g * alive)
    assert not a_bar.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [EPS, 0.0, "relative"])
def test_dead_units(device, dtype, eps):
    """Where a = 0 everything is 0, whatever g is, and nothing is NaN."""
    g, a, skip, rest, scale = operands(SHAPES["whole"], 3, dtype, device)
    a[0] = 0
    dead = (a == 0).repeat_interleave(3, 0)
    e = eps_of(eps, a)
    out, s = run("phi_scale", g, a, e, skip, scale)
    assert not s[dead].any()
    g_bar, a_bar, scale_bar = run("phi_scale_backward", rest, s, a, e, scale)
    assert not g_bar[dead].any()
    assert not a_bar[a == 0].any()
    assert all(torch.isfinite(t).all() for t in (out, s, g_bar, a_bar, scale_bar))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_that_is_dead(device, dtype):
    """Its relative epsilon is the smallest normal number: large relevance divided by it must not come near the results."""
    g, a, _, rest, scale = operands(SHAPES["whole"], 3, dtype, device)
    a[0] = 0
    e = ops.relative_epsilon(a, 0.1)
    results = run("phi_scale", 20 * g, a, e, None, scale)
    results += run("phi_scale_backward", 20 * rest, results[1], a, e, scale)
    assert all(torch.isfinite(t).all() for t in results)
    assert not any(t[: len(t) // 2].any() for t in results[:4])


@pytest.mark.parametrize("value", [1e-38, 1e-30, 1e-20, 1e-8, 1.0, 1e8, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_of_any_size(device, dtype, value):
    """No underflow and no overflow on the way: ``a_bar = e g / (a + e)^2`` is about ``g / e`` near 0."""
    for count, scale in ((1, None), (40, torch.ones(40, dtype=dtype, device=device))):  # single elements, vectors
        a = torch.full((1, count), value, dtype=dtype, device=device)
        g = torch.ones_like(a)
        s = run("phi_scale", g, a, EPS, None, scale)[0]
        g_bar, a_bar, _ = run("phi_scale_backward", g, s, a, EPS, scale)
        v = a.double()
        bound = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).smallest_normal}
        for got, want in ((s, v / (v + EPS)), (g_bar, v / (v + EPS)), (a_bar, EPS / (v + EPS) ** 2)):
            torch.testing.assert_close(got.double(), want, **bound)


def test_subnormal_activations(device):
    """``a = 1e-40``: phi keeps what digits it has, and the gradient is that of a unit that is barely alive."""
    a = torch.full((1, 8), 1e-40, device=device)
    g = torch.full_like(a, 100.0)
    s = run("phi_scale", g, a, EPS)[0]
    torch.testing.assert_close(s.double(), a.double() / EPS * 100, rtol=1e-4, atol=0)
    g_bar, a_bar, _ = run("phi_scale_backward", g, s, a, EPS)
    torch.testing.assert_close(a_bar, torch.full_like(a, 1e6), rtol=1e-4, atol=0)
    torch.testing.assert_close(g_bar.double(), a.double() / EPS * 100, rtol=1e-4, atol=0)


def test_what_is_not_finite_stays_so(device):
    """As in the reference: infinite and NaN relevance arrives, an infinite activation gives NaN."""
    a = torch.tensor([[1.0, 1.0, 1.0, torch.inf, torch.nan, 2.0, 0.0, 3.0]], device=device)
    g = torch.tensor([[torch.inf, -torch.inf, torch.nan, 1.0, 1.0, 1.0, 1.0, 1.0]], device=device)
    s = run("phi_scale", g, a, EPS)[0]
    want = a / (a + EPS) * g
    torch.testing.assert_close(s, want, equal_nan=True)
    g_bar, *_ = run("phi_scale_backward", g, s, a, EPS)
    torch.testing.assert_close(g_bar[0, [0, 1, 2, 4, 5, 6, 7]], want[0, [0, 1, 2, 4, 5, 6, 7]], equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(device, dtype):
    """No samples, or no pixels: results have their shapes, and the sum over nothing is 0."""
    for shape in ((0, 3, 2, 2), (2, 3, 0, 2), (0, 5)):
        for maps in (1, 3):
            g, a, skip, rest, scale = operands(shape, maps, dtype, device)
            for eps in (EPS, 0.0, eps_of("relative", a)):
                out, s = run("phi_scale", g, a, eps, skip, scale, rest)
                g_bar, a_bar, scale_bar = run("phi_scale_backward", rest, s, a, eps, scale)
                assert out.shape == s.shape == g_bar.shape == g.shape
                assert a_bar.shape == a.shape
                assert scale_bar.shape == scale.shape
                assert not scale_bar.any()


# ---- order, operators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["odd", "whole", "blocks", "dense"])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=lambda f: f.__name__)
def test_repeats(device, shape, layout):
    for dtype in (torch.float32, torch.bfloat16):
        g, a, skip, rest, scale = operands(SHAPES[shape], 2, dtype, device, layout)
        s = run("phi_scale", g, a, EPS, skip, scale, rest)[1]
        repeats(device, lambda t=(g, a, EPS, skip, scale, rest): run("phi_scale", *t))
        repeats(device, lambda t=(rest, s, a, EPS, scale): run("phi_scale_backward", *t))
        repeats(device, lambda t=(rest, s, a, EPS): run("phi_scale_backward", *t))


@pytest.mark.parametrize("shape", ["crossing", "one pixel", "one channel", "volume", "odd dense"])
def test_operators(device, shape):
    for layout, maps in itertools.product((torch.Tensor.contiguous, channels_last), (1, 3)):
        g, a, skip, rest, scale = operands(SHAPES[shape], maps, torch.bfloat16, device, layout)
        eps_n, wide = torch.full((len(a),), 0.1, dtype=a.dtype, device=device), scale.float()
        opcheck("phi_scale", g, a, EPS, None, None, None, None, True)
        opcheck("phi_scale", g, a, 0.0, eps_n, skip, wide, rest, True)
        opcheck("phi_scale", g, a, EPS, None, skip, wide, None, False)
        opcheck("phi_scale_backward", rest, g, a, EPS, None, None, True, True)
        opcheck("phi_scale_backward", rest, g, a, 0.0, eps_n, wide, False, True)


def test_operators_refuse(device):
    """What the Python side never sends."""
    g, a, skip, rest, scale = operands(SHAPES["whole"], 1, torch.float32, device)
    call = torch.ops.fisnet.phi_scale
    for bad in (
        (g[:1], channels_last(a), EPS, None, None, None, None, True),
        (g.bfloat16(), a, EPS, None, None, None, None, True),
        (g, a, EPS, None, channels_last(skip), None, None, True),
        (g, a, EPS, None, None, scale[:3], None, True),
        (g, a, EPS, None, None, scale.double(), None, True),
        (g, a, EPS, None, None, None, rest, True),
        (g, a, EPS, torch.ones(3, device=device), None, None, None, True),
        (g[..., ::2], a[..., ::2], EPS, None, None, None, None, True),
    ):
        with pytest.raises(RuntimeError, match="phi_scale: "):
            call(*bad)
