"""The heatmap loss against the authors' numbers and against section 5 of semantics.md, as numpy loops."""

import itertools
import math

import golden_nets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fisnet_cuda.ops.heatmap_loss import gwrp, gwrp_terms, heatmap_loss, resize_mask

DEFAULTS = {"d": 0.9, "E": 1.0, "c1": 1.0, "c2": 25.0, "foreground": "hybrid", "normalization": "absRoIMean"}
FOREGROUNDS = ("hybrid", "L2", "L1")
NORMALIZATIONS = ("absRoIMean", "RoIMean", "none")


# --- the oracle: loops, an explicit sort, nothing shared with the package -------------------------


def oracle_gwrp(values, d):
    total = weights = 0.0
    for i, value in enumerate(sorted(values, reverse=True)):
        total += d**i * value
        weights += d**i
    return total / weights


def oracle(R, mask, *, d, E, c1, c2, foreground, normalization):
    """Background and foreground loss [N] of R [N, K, C, *spatial], mask [N, 1 or C, *spatial], float64."""
    N, K, C = R.shape[:3]
    c1, c2 = np.broadcast_to(c1, K), np.broadcast_to(c2, K)
    mask = np.broadcast_to(mask, (N, C, *R.shape[3:]))
    background, foreground_loss = np.zeros(N), np.zeros(N)
    for n, k in itertools.product(range(N), range(K)):
        r, m = R[n, k], mask[n].astype(np.float64)
        area = m.sum() + 1e-10
        if normalization == "absRoIMean":
            A = np.abs(r) / ((np.abs(r) * m).sum() / area + 1e-10)
        elif normalization == "RoIMean":
            A = np.abs(r / ((r * m).sum() / area + 1e-10))
        else:
            A = np.abs(r) * r.size
        for c in range(C):
            G = oracle_gwrp((A[c] * (1 - m[c])).ravel(), d)
            u = min(G / (G + E), 1 - 1e-7)
            background[n] += -math.log(1 - u) / (K * C)
        F = (np.abs(r) * m).sum()
        left = (min(F / c1[k], 1) - 1) ** 2
        if foreground == "L1":
            right = max(F, c2[k]) - c2[k]
        elif foreground == "hybrid" and c1[k] + c2[k] < F:
            right = F - (c1[k] + c2[k]) + 1
        else:
            right = (max(F / c1[k], c2[k] / c1[k]) - c2[k] / c1[k]) ** 2
        foreground_loss[n] += (left + right) / K
    return background, foreground_loss


def sample(shape, seed=0, channels=1, dtype=torch.float64, scale=1.0):
    """Relevance of the given shape [N, K, C, *spatial] and a mask with some of both."""
    generator = torch.Generator().manual_seed(seed)
    R = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    mask = torch.rand(shape[0], channels, *shape[3:], generator=generator) > 0.5
    return R.to(dtype), mask


# --- goldens --------------------------------------------------------------------------------------

LOSS = golden_nets.arrays("loss")
CONFIGS = LOSS["meta"]["configs"]


@pytest.mark.parametrize("index", range(len(CONFIGS)))
def test_golden(index):
    config = CONFIGS[index]
    R = LOSS["heatmap"].clone().requires_grad_()
    name = {"m": "mask", "big": "mask_big", "zero0": "mask_zero0"}[config["mask"]]
    mask = resize_mask(LOSS[name], R.shape[3:])
    # 0-d, or [K] for Dual
    c1, c2 = (torch.tensor(config[key], dtype=torch.float64) for key in ("cut", "cut2"))
    background, foreground = heatmap_loss(
        R, mask, d=config["d"], E=config["E"], c1=c1, c2=c2,
        foreground=config["alternativeForeground"], normalization=config["norm"],
    )
    value = config["A"] * background + config["B"] * foreground
    value.mean().backward()
    torch.testing.assert_close(value.detach(), LOSS[f"{index}/value"], rtol=1e-10, atol=0)
    grad = LOSS[f"{index}/grad"]
    torch.testing.assert_close(R.grad, grad, rtol=0, atol=1e-10 * grad.abs().max().item())


def test_there_are_27_goldens():
    assert len(CONFIGS) == 27


# --- the oracle -----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    N=st.integers(1, 3),
    K=st.integers(1, 3),
    C=st.integers(1, 3),
    spatial=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    d=st.sampled_from([0.0, 0.3, 0.9, 0.996, 1.0]) | st.floats(0, 1),
    E=st.sampled_from([0.1, 1.0, 10.0]),
    foreground=st.sampled_from(FOREGROUNDS),
    normalization=st.sampled_from(NORMALIZATIONS),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    mask_kind=st.sampled_from(["binary", "channels", "soft", "empty", "full"]),
    per_map=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_oracle(N, K, C, spatial, d, E, foreground, normalization, scale, mask_kind, per_map, seed):
    R, mask = sample((N, K, C, *spatial), seed, C if mask_kind == "channels" else 1, scale=scale)
    generator = torch.Generator().manual_seed(seed + 1)
    if mask_kind == "soft":
        mask = torch.rand(mask.shape, generator=generator, dtype=torch.float64)
    elif mask_kind in ("empty", "full"):
        mask = torch.full_like(mask, mask_kind == "full")
    c1 = 0.5 + torch.rand(K if per_map else 1, generator=generator, dtype=torch.float64)
    c2 = c1 + 5 * torch.rand(c1.shape, generator=generator, dtype=torch.float64)
    options = {"d": d, "E": E, "foreground": foreground, "normalization": normalization}
    got = heatmap_loss(R, mask, c1=c1, c2=c2, **options)
    expected = oracle(R.numpy(), mask.numpy(), c1=c1.numpy(), c2=c2.numpy(), **options)
    for g, e in zip(got, expected, strict=True):
        # 1e-9: the oracle's 1 - u, near the clamp at 1e-7, is exact to 1e-16 / 1e-7 only
        np.testing.assert_allclose(g.numpy(), e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("foreground", FOREGROUNDS)
@pytest.mark.parametrize("F", [0.0, 0.5, 1.0, 2.0, 3.0, 3.5, 4.0, 4.5, 40.0])
def test_every_branch_of_the_foreground_loss(F, foreground):
    """c1 = 1, c2 = 3: below, inside, above the range, at hybrid's joint 4 and beyond, by hand."""
    R = torch.tensor([[[[F, -7.0]]]], dtype=torch.float64)
    mask = torch.tensor([[[1, 0]]])
    _, got = heatmap_loss(R, mask, **{**DEFAULTS, "c1": 1.0, "c2": 3.0, "foreground": foreground})
    left = (F - 1) ** 2 if F < 1 else 0
    excess = max(F - 3, 0)
    right = {"L1": excess, "L2": excess**2, "hybrid": excess**2 if F <= 4 else excess}[foreground]
    assert got.item() == pytest.approx(left + right, abs=1e-14)


def test_hybrid_is_continuous_and_no_steeper_than_one_beyond_the_joint():
    F = torch.linspace(3.9, 4.1, 201, dtype=torch.float64).requires_grad_()
    R = F.view(-1, 1, 1, 1)
    _, value = heatmap_loss(R, torch.ones(201, 1, 1), **{**DEFAULTS, "c1": 1.0, "c2": 3.0})
    value.sum().backward()
    assert value.detach().diff().abs().max() < 2.1e-3
    torch.testing.assert_close(F.grad[F.detach() > 4.0005], torch.ones(100, dtype=torch.float64))


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("foreground", FOREGROUNDS)
@pytest.mark.parametrize("d", [0.0, 0.9, 1.0])
def test_gradcheck(d, foreground, normalization):
    R, mask = sample((2, 2, 2, 3, 4), seed=3)
    options = {**DEFAULTS, "d": d, "foreground": foreground, "normalization": normalization}
    options |= {"c1": 6.0, "c2": 7.0}  # so that maps lie on all sides
    assert torch.autograd.gradcheck(lambda r: heatmap_loss(r, mask, **options), R.requires_grad_())


def test_gradcheck_soft_mask_and_values_for_each_map():
    R, _ = sample((2, 2, 2, 5), seed=4)
    mask = torch.rand(2, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {**DEFAULTS, "c1": torch.tensor([2.0, 9.0]), "c2": torch.tensor([3.0, 12.0])}
    assert torch.autograd.gradcheck(lambda r: heatmap_loss(r, mask, **options), R.requires_grad_())


def test_no_gradient_reaches_the_mask():
    R, _ = sample((1, 1, 1, 4))
    mask = torch.rand(1, 1, 4, requires_grad=True)
    background, foreground = heatmap_loss(R.requires_grad_(), mask, **DEFAULTS)
    (background + foreground).sum().backward()
    assert mask.grad is None
    assert R.grad.abs().sum() > 0


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("fill", [0, 1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_heatmaps_have_finite_gradients(normalization, fill, dtype):
    R = torch.zeros(2, 2, 3, 4, 4, dtype=dtype, requires_grad=True)
    mask = torch.full((2, 1, 4, 4), fill) if fill is not None else sample((2, 2, 3, 4, 4))[1]
    background, foreground = heatmap_loss(R, mask, **{**DEFAULTS, "normalization": normalization})
    (background + foreground).sum().backward()
    assert R.grad.isfinite().all()
    torch.testing.assert_close(background, torch.zeros(2, dtype=dtype))
    torch.testing.assert_close(foreground, torch.ones(2, dtype=dtype))


def test_all_foreground_has_no_background_loss():
    R, _ = sample((2, 1, 3, 4, 4))
    R.requires_grad_()
    background, _ = heatmap_loss(R, torch.ones(2, 1, 4, 4), **DEFAULTS)
    background.sum().backward()
    assert background.tolist() == [0, 0]
    assert R.grad.abs().max() == 0


def test_empty_mask_saturates_without_a_gradient():
    R, _ = sample((2, 1, 3, 4, 4), dtype=torch.float32)
    R.requires_grad_()
    background, foreground = heatmap_loss(R, torch.zeros(2, 1, 4, 4), **DEFAULTS)
    (background + foreground).sum().backward()
    torch.testing.assert_close(background, torch.full((2,), -math.log(1e-7)))
    assert foreground.tolist() == [1, 1]
    assert R.grad.abs().max() == 0


def test_repeated_backward_gives_the_same():
    R, mask = sample((2, 2, 3, 5, 5), dtype=torch.float32)
    R.requires_grad_()
    total = sum(part.sum() for part in heatmap_loss(R, mask, **DEFAULTS))
    first, second = (torch.autograd.grad(total, R, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# --- shapes, dtypes, layouts ----------------------------------------------------------------------


def test_samples_and_maps_are_independent():
    R, mask = sample((4, 3, 2, 5, 6), seed=8)
    background, foreground = heatmap_loss(R, mask, **DEFAULTS)
    for n in range(4):
        alone = heatmap_loss(R[n : n + 1], mask[n : n + 1], **DEFAULTS)
        assert torch.equal(alone[0], background[n : n + 1])
        assert torch.equal(alone[1], foreground[n : n + 1])
    maps = torch.stack([torch.stack(heatmap_loss(R[:, k : k + 1], mask, **DEFAULTS)) for k in range(3)])
    torch.testing.assert_close(maps.mean(0), torch.stack([background, foreground]), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    R, mask = sample((2, 2, 3, 6, 6), dtype=dtype)
    wide = R.float().requires_grad_()
    R.requires_grad_()
    got, expected = heatmap_loss(R, mask, **DEFAULTS), heatmap_loss(wide, mask, **DEFAULTS)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == torch.float32
        assert torch.equal(g, e)
    sum(part.sum() for part in got).backward()
    sum(part.sum() for part in expected).backward()
    assert R.grad.dtype == dtype
    assert torch.equal(R.grad, wide.grad.to(dtype))


def test_autocast_changes_nothing():
    R, mask = sample((2, 2, 3, 6, 6), dtype=torch.float32)
    expected = heatmap_loss(R, mask, **DEFAULTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = heatmap_loss(R, mask, **DEFAULTS)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == torch.float32
        assert torch.equal(g, e)


@pytest.mark.parametrize("d", [0.0, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_float32_is_as_exact_as_its_roundings(d, scale):
    """4096 pixels, so GWRP is truncated; 30 roundings is what sums over that many values take, pairwise."""
    R, mask = sample((2, 2, 3, 64, 64), dtype=torch.float32, scale=scale)
    options = {**DEFAULTS, "d": d, "c1": 1e4 * scale, "c2": 1e5 * scale}
    got = heatmap_loss(R, mask, **options)
    exact = oracle(R.double().numpy(), mask.numpy(), **options)
    for g, e in zip(got, exact, strict=True):
        np.testing.assert_allclose(g.double().numpy(), e, rtol=30 * torch.finfo(torch.float32).eps)


def test_small_background_loss_keeps_its_digits_in_float32():
    """1 - u rounds to 1 for u < 6e-8: -log(1 - u) as written would be 0 here."""
    R = torch.tensor([[[[1.0, 1e-9]]]])
    background, _ = heatmap_loss(R, torch.tensor([[[1, 0]]]), **{**DEFAULTS, "d": 0.0})
    assert background.item() == pytest.approx(1e-9, rel=1e-6)


@pytest.mark.parametrize("layout", ["channels_last", "slice", "expanded"])
def test_layouts(layout):
    R, mask = sample((2, 2, 3, 5, 6), seed=2)
    expected = heatmap_loss(R, mask, **DEFAULTS)
    if layout == "channels_last":
        R = R.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (2, 2))
    elif layout == "slice":
        R = torch.nn.functional.pad(R, (1, 2, 3, 4))[..., 3:-4, 1:-2]
    else:
        R, mask = R[:1].expand(2, -1, -1, -1, -1), mask[:1].expand(2, -1, -1, -1)
        expected = tuple(part[:1].expand(2) for part in expected)
    for g, e in zip(heatmap_loss(R, mask, **DEFAULTS), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-14, atol=0)


def test_empty_batch():
    R = torch.zeros(0, 2, 3, 4, 4, requires_grad=True)
    background, foreground = heatmap_loss(R, torch.zeros(0, 1, 4, 4), **DEFAULTS)
    assert background.shape == foreground.shape == (0,)
    (background.sum() + foreground.sum()).backward()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64])
def test_mask_dtypes_agree(dtype):
    R, mask = sample((2, 2, 3, 5, 6), dtype=torch.float32)
    expected, got = heatmap_loss(R, mask, **DEFAULTS), heatmap_loss(R, mask.to(dtype), **DEFAULTS)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_one_mask_for_all_channels_is_that_mask_in_each():
    R, mask = sample((2, 2, 3, 5, 6))
    expected, got = heatmap_loss(R, mask, **DEFAULTS), heatmap_loss(R, mask.expand(-1, 3, -1, -1), **DEFAULTS)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-14, atol=0)


# --- no host sync ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("d", [0.0, 0.9, 1.0])
def test_fake_tensors(device, d):
    """Autograd of fake CUDA tensors aborts the process when torch has no CUDA: forward only there."""
    train = device == "cpu" or torch.cuda.is_available()
    with FakeTensorMode():
        R = torch.empty(2, 3, 3, 40, 40, device=device, requires_grad=train)
        mask = torch.empty(2, 1, 90, 90, device=device, dtype=torch.uint8)
        c = torch.empty(3, device=device)
        for normalization, foreground in itertools.product(NORMALIZATIONS, FOREGROUNDS):
            options = {"d": d, "E": 1.0, "c1": c, "c2": c}
            options |= {"normalization": normalization, "foreground": foreground}
            resized = resize_mask(mask, (40, 40))
            background, fore = heatmap_loss(R, resized, backend="reference", **options)
            assert background.shape == fore.shape == (2,)
            assert background.device.type == device
            if train:
                (background + fore).sum().backward()
        assert not train or R.grad.shape == R.shape


@pytest.mark.parametrize("foreground", FOREGROUNDS)
@pytest.mark.parametrize("d", [0.0, 0.9, 1.0])
def test_compiles_without_a_graph_break(d, foreground):
    torch._dynamo.reset()
    R, mask = sample((2, 2, 3, 16, 16), dtype=torch.float32)
    options = {**DEFAULTS, "d": d, "foreground": foreground}
    compiled = torch.compile(heatmap_loss, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (heatmap_loss, compiled):
        r = R.clone().requires_grad_()
        background, fore = run(r, mask, **options)
        (background + fore).sum().backward()
        grads.append((background.detach(), fore.detach(), r.grad))
    for g, e in zip(*grads, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-7)


def test_compiles_for_shapes_and_numbers_that_change():
    """torch.compile makes them symbols: on request, or when it sees a second value."""
    torch._dynamo.reset()
    compiled = torch.compile(heatmap_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for size, d, c1 in ((9, 0.9, 1.0), (20, 0.9, 1.0), (20, 0.8, 2.0), (20, 0.7, 3.0)):
        R, mask = sample((2, 2, 3, size, size + 1), dtype=torch.float32)
        options = {**DEFAULTS, "d": d, "c1": c1, "E": 2 - d}
        for g, e in zip(compiled(R, mask, **options), heatmap_loss(R, mask, **options), strict=True):
            torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-7)


# --- GWRP -----------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(0, 1e3), min_size=1, max_size=600),
    d=st.sampled_from([0.0, 0.5, 0.9, 0.996, 1.0]) | st.floats(0, 1),
)
def test_gwrp(values, d):
    got = gwrp(torch.tensor(values, dtype=torch.float64), d)
    assert got.item() == pytest.approx(oracle_gwrp(values, d), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize(("d", "terms"), [(0.0, 1), (0.9, 132), (0.99, 1375), (0.996, 3447)])
def test_gwrp_terms_of_semantics(d, terms):
    assert gwrp_terms(d, 1e-6) == terms


@pytest.mark.parametrize("d", [0.2, 0.9, 0.99])
def test_gwrp_terms_is_the_smallest_that_keeps_the_bound(d):
    k = gwrp_terms(d, 1e-6)
    assert d**k / (1 - d**k) <= 1e-6
    assert d ** (k - 1) / (1 - d ** (k - 1)) > 1e-6


def test_truncation_keeps_the_bound_where_the_tail_is_heaviest():
    """Constant values, and one peak before a plateau: what is cut off is as large as it can be."""
    n = 50_000
    for x in (torch.ones(n), torch.cat([torch.full((1,), 1e3), torch.ones(n - 1)])):
        exact = oracle_gwrp(x.tolist(), 0.99)
        assert gwrp(x, 0.99).item() == pytest.approx(exact, rel=4 * torch.finfo(torch.float32).eps)
        assert gwrp(x.double(), 0.99).item() == pytest.approx(exact, rel=1e-14)


def test_gwrp_looks_at_no_more_values_than_it_needs(monkeypatch):
    seen = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, k, dim: seen.append(k) or topk(x, k, dim=dim))
    gwrp(torch.rand(1000), 0.9)
    gwrp(torch.rand(1000, dtype=torch.float64), 0.9)
    gwrp(torch.rand(100), 0.9)  # fewer values than terms: a sort
    assert seen == [gwrp_terms(0.9, 2**-23), gwrp_terms(0.9, 2**-52)] == [152, 343]


# --- masks ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_resize_mask_is_any_over_the_windows(sizes, seed):
    source, target = zip(*sizes, strict=True)
    mask = torch.rand(2, 2, *source, generator=torch.Generator().manual_seed(seed)) > 0.8
    expected = torch.zeros(2, 2, *target, dtype=torch.bool)
    for position in itertools.product(*map(range, target)):
        window = [
            slice(i * s // t, -(-(i + 1) * s // t)) for i, s, t in zip(position, source, target, strict=True)
        ]
        expected[(..., *position)] = mask[(..., *window)].flatten(2).any(2)
    for dtype in (torch.bool, torch.uint8, torch.float32):
        got = resize_mask(mask.to(dtype), target)
        assert got.dtype == dtype
        assert torch.equal(got, expected.to(dtype))


def test_resize_mask_keeps_what_fits():
    soft = torch.rand(1, 1, 3, 4)
    assert resize_mask(soft, (3, 4)) is soft
    assert resize_mask(torch.full((1, 1, 4, 4), 1e-6), (2, 2)).tolist() == [[[[1, 1], [1, 1]]]]


# --- errors ---------------------------------------------------------------------------------------

R0, M0 = torch.ones(2, 1, 3, 4, 4), torch.ones(2, 1, 4, 4)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"R": torch.ones(2, 1, 3, 4, 4).long()}, TypeError, "R must be a float tensor, got torch.int64"),
        ({"R": [1.0]}, TypeError, "R must be a float tensor, got list"),
        ({"R": torch.ones(2, 1, 3)}, ValueError, r"R must be \[N, K, C, \*spatial\].*got shape \[2, 1, 3\]"),
        ({"R": torch.ones(2, 1, 3, 0)}, ValueError, "no empty axis"),
        ({"mask": None}, TypeError, "mask must be a bool, integer or float tensor, got NoneType"),
        ({"mask": M0 * 1j}, TypeError, "mask must be.*got torch.complex64"),
        ({"mask": torch.ones(2, 1, 8, 8)}, ValueError, r"got \[2, 1, 8, 8\]; resize_mask\(mask, \(4, 4\)\)"),
        ({"mask": torch.ones(2, 2, 4, 4)}, ValueError, r"mask must be \[2, 1, 4, 4\] or \[2, 3, 4, 4\]"),
        ({"mask": torch.ones(3, 1, 4, 4)}, ValueError, r"mask must be \[2, 1, 4, 4\]"),
        ({"mask": M0.to("meta")}, ValueError, "mask is on meta, R on cpu"),
        ({"d": 1.1}, ValueError, r"d must be in \[0, 1\], got 1.1"),
        ({"d": math.nan}, ValueError, "d must be"),
        ({"E": 0}, ValueError, "E must be > 0, got 0"),
        ({"c1": 0.0}, ValueError, "c1 must be finite and > 0, got 0.0"),
        ({"c2": math.inf}, ValueError, "c2 must be finite and > 0, got inf"),
        ({"c1": "1"}, TypeError, "c1 must be a number or a tensor, got str"),
        ({"c2": torch.ones(3)}, ValueError, r"c2 must have one value, or one for each of.*\[3\]"),
        ({"foreground": "L3"}, ValueError, "foreground must be one of 'hybrid', 'L2', 'L1', got 'L3'"),
        ({"normalization": None}, ValueError, "normalization must be one of 'absRoIMean'.*got None"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ({"backend": "cuda"}, RuntimeError, "backend='cuda'"),
    ],
)
def test_errors(change, error, text):
    arguments = {"R": R0, "mask": M0, **DEFAULTS, **change}
    with pytest.raises(error, match=text):
        heatmap_loss(arguments.pop("R"), arguments.pop("mask"), **arguments)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: gwrp([1.0], 0.5), TypeError, "x must be a float32 or float64 tensor, got list"),
        (lambda: gwrp(torch.ones(2).half(), 0.5), TypeError, r"got torch.float16; use x.float\(\)"),
        (lambda: gwrp(torch.tensor(1.0), 0.5), ValueError, "at least one value"),
        (lambda: gwrp(torch.ones(2, 0), 0.5), ValueError, r"at least one value.*\[2, 0\]"),
        (lambda: gwrp(torch.ones(2), -0.1), ValueError, r"d must be in \[0, 1\], got -0.1"),
        (lambda: gwrp_terms(1.0, 1e-6), ValueError, r"d must be in \[0, 1\), got 1.0"),
        (lambda: gwrp_terms(0.5, 0.0), ValueError, "tolerance must be > 0, got 0.0"),
        (lambda: resize_mask(None, (2, 2)), TypeError, "mask must be.*got NoneType"),
        (lambda: resize_mask(M0, (2,)), ValueError, r"got shape \[2, 1, 4, 4\] and size \[2\]"),
        (lambda: resize_mask(M0, (2, 0)), ValueError, "must not be empty"),
        (lambda: resize_mask(torch.ones(1, 1, 0), (2,)), ValueError, "must not be empty"),
    ],
)
def test_errors_of_the_helpers(call, error, text):
    with pytest.raises(error, match=text):
        call()
