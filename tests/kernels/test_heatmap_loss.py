"""The heatmap loss as kernels: the cases of tests/ops/test_heatmap_loss.py, and what only kernels can get wrong."""

import importlib
import itertools
import random

import pytest
import test_heatmap_loss as shared
import torch
from emulator import SCHEDULES, configure
from helpers import error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fisnet_cuda import reference
from fisnet_cuda.ops.heatmap_loss import gwrp_terms, heatmap_loss

DEFAULTS, FOREGROUNDS, NORMALIZATIONS = shared.DEFAULTS, shared.FOREGROUNDS, shared.NORMALIZATIONS


@pytest.fixture(autouse=True)
def on_device(device, monkeypatch):
    """The shared tests' `heatmap_loss`: moves CPU tensors to the device of the kernels and results back."""

    def run(R, mask, **options):
        return tuple(part.cpu() for part in heatmap_loss(R.to(device), mask.to(device), **options))

    monkeypatch.setattr(shared, "heatmap_loss", run)


# --- the shared cases -----------------------------------------------------------------------------

for _name in (
    "test_golden", "test_every_branch_of_the_foreground_loss", "test_hybrid_is_continuous_and_no_steeper_than_one_beyond_the_joint",
    "test_gradcheck", "test_gradcheck_soft_mask_and_values_for_each_map", "test_no_gradient_reaches_the_mask",
    "test_zero_heatmaps_have_finite_gradients", "test_all_foreground_has_no_background_loss",
    "test_empty_mask_saturates_without_a_gradient", "test_repeated_backward_gives_the_same", "test_samples_and_maps_are_independent",
    "test_half_precision_is_computed_in_float32", "test_autocast_changes_nothing", "test_float32_is_as_exact_as_its_roundings",
    "test_small_background_loss_keeps_its_digits_in_float32", "test_layouts", "test_empty_batch", "test_mask_dtypes_agree",
    "test_one_mask_for_all_channels_is_that_mask_in_each", "test_compiles_without_a_graph_break",
):  # fmt: skip
    globals()[_name] = getattr(shared, _name)


@pytest.mark.parametrize("seed", range(60))
def test_oracle(seed):
    """The shared hypothesis test, with draws of our own."""
    rng = random.Random(seed)
    shared.test_oracle.hypothesis.inner_test(
        N=rng.randint(1, 3), K=rng.randint(1, 3), C=rng.randint(1, 3), spatial=[rng.randint(1, 5) for _ in range(rng.randint(1, 3))],
        d=rng.choice([0.0, 0.3, 0.9, 0.996, 1.0, rng.random()]), E=rng.choice([0.1, 1.0, 10.0]), foreground=rng.choice(FOREGROUNDS),
        normalization=rng.choice(NORMALIZATIONS), scale=rng.choice([1e-3, 1.0, 30.0]),
        mask_kind=rng.choice(["binary", "channels", "soft", "empty", "full"]), per_map=rng.random() < 0.5, seed=seed,
    )  # fmt: skip


# --- against the reference in float64 --------------------------------------------------------------

DECAYS = (0.0, 0.5, 0.9, 0.99, 0.996, 0.9995, 1.0)
SIZES = ((1,), (5,), (9, 7), (1000,), (4097,), (112, 112))


def draw(shape, seed=0, channels=1, dtype=torch.float32):
    """Relevance [N, K, C, *spatial] with heavy tails, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    R = torch.randn(shape, generator=generator, dtype=torch.float64) * torch.randn(shape, generator=generator, dtype=torch.float64)
    return R.to(dtype), torch.rand(shape[0], channels, *shape[3:], generator=generator) > 0.4


def values_and_gradient(fn, R: Tensor, mask: Tensor, **options) -> list[Tensor]:
    R = R.detach().requires_grad_()
    losses = fn(R, mask, **options)
    bars = [torch.linspace(0.5, 1.5, len(part), dtype=part.dtype, device=part.device) for part in losses]
    (R_bar,) = torch.autograd.grad(losses, R, bars)
    return [*(part.detach().cpu() for part in losses), R_bar.cpu()]


@pytest.fixture
def first_of_ties(monkeypatch):
    """Makes the reference rank the first of equal values first, as the kernels do: else their gradients differ."""

    def gwrp(x: Tensor, d: float) -> Tensor:
        if d == 1:
            return x.mean(-1)
        x = x.sort(dim=-1, descending=True, stable=True).values[..., : gwrp_terms(d, torch.finfo(x.dtype).eps)]
        weights = torch.pow(d, torch.arange(x.shape[-1], dtype=torch.float64))
        return (x * (weights / weights.sum()).to(x.dtype)).sum(-1)

    monkeypatch.setattr(importlib.import_module("fisnet_cuda.reference.heatmap_loss"), "gwrp", gwrp)


def check(device, R: Tensor, mask: Tensor, **options) -> None:
    """The 2x rule: at most twice the reference's error in that dtype, plus what one rounding of R more makes."""
    options = {**DEFAULTS, "c1": 0.2 * R[0, 0].numel(), "c2": 0.3 * R[0, 0].numel(), **options}
    unit = torch.finfo(R.dtype).eps
    exact = values_and_gradient(reference.heatmap_loss, R.double(), mask, **options)
    usual = values_and_gradient(reference.heatmap_loss, R, mask, **options)
    got = values_and_gradient(heatmap_loss, R.to(device), mask.to(device), **options)
    for name, g, u, e in zip(("background", "foreground", "R_bar"), got, usual, exact):
        assert g.dtype == u.dtype
        found, allowed = error(g, e), 2 * error(u, e) + 4 * torch.finfo(g.dtype).eps + (unit if name == "R_bar" else 0)
        allowed = 1e-13 if R.dtype == torch.float64 else allowed  # no dtype is wider, so `exact` has errors of its own
        assert found <= allowed, f"{name}: error {found:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("d", DECAYS)
def test_sizes_and_decays(device, first_of_ties, d, size):
    R, mask = draw((1, 1, 1 if len(size) == 1 else 2, *size))
    check(device, R, mask, d=d)


@pytest.mark.parametrize("size", [(5,), (9, 7), (40, 30), (4097,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [0.9, 0.9995, 1.0])
def test_dtypes(device, first_of_ties, d, dtype, size):
    R, mask = draw((2, 1, 2, *size), dtype=dtype)
    check(device, R, mask, d=d, normalization="none")


@pytest.mark.parametrize("size", [(150, 100), (131, 101)], ids=str)
@pytest.mark.parametrize("d", [0.0, 0.9, 0.996])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_that_do_not_fit_in_shared_memory(device, first_of_ties, dtype, d, size):
    R, mask = draw((1, 1, 1, *size), dtype=dtype)
    check(device, R, mask, d=d)


LARGE = ((0.9, (130, 130)), (0.9995, (129, 131)), (1.0, (131, 131)), (0.0, (512, 512)), (0.996, (300, 512)))


@pytest.mark.parametrize(("d", "size"), LARGE)
def test_large_maps(device, first_of_ties, d, size):
    """Several blocks a channel in the adjoint, several merges of sorted chunks."""
    R, mask = draw((1, 1, 1, *size))
    check(device, R, mask, d=d, normalization="RoIMean")


@pytest.mark.parametrize(("maps", "channels", "mask_channels"), [(1, 3, 1), (3, 1, 1), (3, 3, 3), (2, 9, 1), (2, 9, 9)])
@pytest.mark.parametrize("size", [(7, 6), (20, 24)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "unaligned", "reversed"])
def test_layouts_of_maps_and_masks(device, layout, size, maps, channels, mask_channels):
    R, mask = draw((2, maps, channels, *size), channels=mask_channels, dtype=torch.float64)
    expected = values_and_gradient(reference.heatmap_loss, R, mask, **DEFAULTS)
    if layout == "channels_last":
        R = R.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (2, maps))
        mask = mask.to(memory_format=torch.channels_last)
    elif layout == "unaligned":
        R = torch.empty(R.numel() + 1, dtype=R.dtype)[1:].view_as(R).copy_(R)
        mask = torch.empty(mask.numel() + 3, dtype=mask.dtype)[3:].view_as(mask).copy_(mask)
    elif layout == "reversed":
        R = R.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    got = values_and_gradient(heatmap_loss, R.to(device), mask.to(device), **DEFAULTS)
    for g, e in zip(got, expected):
        assert error(g, e) < 1e-14


@pytest.mark.parametrize(("normalization", "foreground"), list(itertools.product(NORMALIZATIONS, FOREGROUNDS)))
@pytest.mark.parametrize("c", ["numbers", "one", "each"])
def test_options(device, c, foreground, normalization):
    R, mask = draw((3, 2, 2, 33, 9), dtype=torch.float64)
    F = (R.abs() * mask.unsqueeze(1)).sum((2, 3, 4))
    low, high = F.quantile(0.4).item(), F.quantile(0.6).item()
    c1, c2 = low, high
    if c != "numbers":
        c1, c2 = (torch.tensor([v] if c == "one" else [v, 1.1 * v], device=device) for v in (low, high))
    options = {"d": 0.9, "E": 0.7, "c1": c1, "c2": c2, "foreground": foreground, "normalization": normalization}
    got = values_and_gradient(heatmap_loss, R.to(device), mask.to(device), **options)
    on_cpu = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in options.items()}
    for g, e in zip(got, values_and_gradient(reference.heatmap_loss, R, mask, **on_cpu)):
        assert error(g, e) < 1e-13


@pytest.mark.parametrize("d", [0.9, 0.996, 0.9995])
@pytest.mark.parametrize("kind", ["soft", "uint8", "int64"])
def test_masks(device, first_of_ties, kind, d):
    R, mask = draw((2, 1, 3, 70, 80), channels=3)
    mask = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) if kind == "soft" else mask.to(getattr(torch, kind))
    check(device, R, mask, d=d)


# --- ties, NaN, ends of ranges -----------------------------------------------------------------------


def ranks(device, R: Tensor, mask: Tensor, d: float) -> Tensor:
    """The pixels by rank that the kernel keeps, [rows, k]."""
    k = min(gwrp_terms(d, torch.finfo(R.dtype).eps), R[0, 0, 0].numel())
    args = R.flatten(0, 1).to(device), mask.to(device), d, k, 1.0, 1.0, 25.0, None, None, 0, 0, True
    return torch.ops.fisnet.heatmap_loss(*args)[4].cpu()


@pytest.mark.parametrize("d", [0.0, 0.9, 0.996, 0.9995])
@pytest.mark.parametrize("pixels", [9, 200, 1000, 4097, 13000])
@pytest.mark.parametrize("levels", [1, 2, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_values_the_first_ranks_first(device, dtype, levels, pixels, d):
    if pixels > 4097 and dtype == torch.float64 and levels == 40:
        pytest.skip("nothing new, and slow emulated")
    generator = torch.Generator().manual_seed(levels)
    R = torch.randint(1, levels + 1, (1, 1, 1, pixels), generator=generator).to(dtype) * torch.tensor(0.3, dtype=dtype)
    mask = torch.zeros(1, 1, pixels, dtype=torch.bool)
    mask[..., : pixels // 3] = levels > 1
    got = ranks(device, R, mask, d)
    value = R.flatten() * ~mask.flatten()
    expected = torch.sort(value, descending=True, stable=True).indices[: got.shape[1]]
    assert torch.equal(got[0].long(), expected)


@pytest.mark.parametrize("d", [0.5, 0.9, 0.996, 0.9995])
@pytest.mark.parametrize("pixels", [77, 3000, 12000])
def test_ranks_are_those_of_a_sort(device, d, pixels):
    R, mask = draw((1, 1, 2, pixels))
    values = R.abs().flatten(0, 2) * ~mask[0]
    got = ranks(device, R, mask, d)
    assert torch.equal(got.long(), torch.sort(values, descending=True, stable=True, dim=-1).indices[:, : got.shape[1]])


@pytest.mark.parametrize("pixels", [30, 5000, 12000])
@pytest.mark.parametrize("d", [0.0, 0.9, 0.9995, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("inside", [False, True])
def test_nan_and_inf_are_not_dropped(device, inside, value, d, pixels):
    R, mask = draw((3, 1, 1, pixels))
    mask[:, :, 5] = inside
    options = {**DEFAULTS, "d": d}
    before = heatmap_loss(R.to(device), mask.to(device), **options)
    R[1, 0, 0, 5] = value
    got = heatmap_loss(R.to(device), mask.to(device), **options)
    for g, b, e in zip(got, before, reference.heatmap_loss(R, mask, **options)):
        torch.testing.assert_close(g[1].cpu(), e[1], equal_nan=True)  # NaN; inf for an infinite foreground
        assert not g[1].isfinite()
        assert torch.equal(g[[0, 2]], b[[0, 2]])  # other samples do not see it


@pytest.mark.parametrize("d", [0.0, 0.9, 0.9995, 1.0])
@pytest.mark.parametrize("fill", [0, 1])
@pytest.mark.parametrize("pixels", [300, 13000])
def test_masks_of_one_kind_and_zero_maps(device, pixels, fill, d):
    R, _ = draw((2, 1, 2, pixels))
    R[1] = 0
    mask = torch.full((2, 1, pixels), bool(fill))
    options = {**DEFAULTS, "d": d}
    got = values_and_gradient(heatmap_loss, R.to(device), mask.to(device), **options)
    for g, e in zip(got, values_and_gradient(reference.heatmap_loss, R, mask, **options)):
        assert g.isfinite().all()
        torch.testing.assert_close(g, e, rtol=1e-5, atol=0)


# --- what a launch must keep -------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "pixels"), [(0.9, 50), (0.9, 600), (0.99, 12000), (0.9995, 4200), (1.0, 600)])
def test_schedules_and_repeats_agree_bit_by_bit(device, d, pixels):
    """Atomic counters hand out places in any order; the results must not show it."""
    R, mask = draw((1, 2, 2, pixels), dtype=torch.bfloat16)
    R[..., ::3] = R[..., :1]  # ties
    results = []
    for order, seed, async_random in SCHEDULES:
        if device == "cpu":
            configure(order, seed, async_random)
        results.append(values_and_gradient(heatmap_loss, R.to(device), mask.to(device), **{**DEFAULTS, "d": d}))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


def test_one_loss_may_be_used_alone(device):
    R, mask = draw((3, 1, 2, 12, 12), dtype=torch.float64)
    for which in (0, 1):
        got, expected = (r.clone().to(where).requires_grad_() for r, where in ((R, device), (R, "cpu")))
        heatmap_loss(got, mask.to(device), **DEFAULTS)[which].mean().backward()
        reference.heatmap_loss(expected, mask, **DEFAULTS)[which].mean().backward()
        assert error(got.grad.cpu(), expected.grad) < 1e-14


def test_a_second_derivative_raises(device):
    R, mask = draw((2, 1, 1, 6, 6), dtype=torch.float64)
    R = R.to(device).requires_grad_()
    (R_bar,) = torch.autograd.grad(heatmap_loss(R, mask.to(device), **DEFAULTS)[0].square().sum(), R, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        R_bar.sum().backward()


@pytest.mark.parametrize("d", [0.9, 1.0])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_operators(device, dtype, K, channels_last, d):
    """Schemas and fake kernels: shapes, dtypes and strides of what the C++ returns."""
    R, mask = draw((2, K, 3, 20, 20), dtype=dtype)
    R = R.flatten(0, 1).to(device)
    R = R.contiguous(memory_format=torch.channels_last) if channels_last else R
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    c1 = torch.full((K,), 2.0, dtype=acc, device=device)
    k = 0 if d == 1 else min(gwrp_terms(d, torch.finfo(acc).eps), 400)
    args = R, mask.to(device), d, k, 1.0, 0.0, 3.0, c1, None, 0, 1
    tests = ("test_schema", "test_faketensor")
    for keep in (True, False):
        torch.library.opcheck(torch.ops.fisnet.heatmap_loss, (*args, keep), test_utils=tests)
    _, _, slope_G, slope_F, index = torch.ops.fisnet.heatmap_loss(*args, True)
    bars = torch.ones(2, dtype=acc, device=device), torch.ones(1, dtype=acc, device=device).expand(2)
    backward = (*bars, R, mask.to(device), slope_G, slope_F, index, d, k, 1)
    torch.library.opcheck(torch.ops.fisnet.heatmap_loss_backward, backward, test_utils=tests)
    assert torch.ops.fisnet.heatmap_loss_backward(*backward).stride() == R.stride()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("d", [0.0, 0.9, 1.0])
def test_compiles_for_sizes_that_change(device, d, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(heatmap_loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (16, 20):
        R, mask = (t.to(device) for t in draw((2, 2, 3, size, size)))
        options = {**DEFAULTS, "d": d, "c1": torch.tensor([1.0, 2.0], device=device)}
        got, expected = (values_and_gradient(run, R, mask, **options) for run in (compiled, heatmap_loss))
        assert all(torch.equal(g, e) for g, e in zip(got, expected))


@pytest.mark.parametrize("d", [0.9, 1.0])
def test_fake_cuda_tensors(device, d):
    """What torch.compile sees of a CUDA tensor, also on a machine without a GPU."""
    with FakeTensorMode():
        R, mask = torch.empty(2, 2, 3, 40, 40, device="cuda"), torch.empty(2, 1, 40, 40, device="cuda", dtype=torch.uint8)
        c = torch.empty(2, device="cuda")
        for part in heatmap_loss(R, mask, **{**DEFAULTS, "d": d, "c1": c, "c2": c}):
            assert part.shape == (2,)
            assert part.device.type == "cuda"


def test_bindings_refuse_what_does_not_fit(device):
    R, mask = (t.to(device) for t in draw((2, 1, 3, 4, 4)))
    args = (0.9, 16, 1.0, 1.0, 25.0, None, None, 0, 0, False)
    op, maps = torch.ops.fisnet.heatmap_loss, R.flatten(0, 1)
    for bad, text in (
        ((maps, mask.double(), *args), "mask must be bool, uint8 or"),
        ((maps, mask[:, :, :3], *args), "contiguous"),
        ((maps, mask[..., :3].contiguous(), *args), r"mask must be \[N, 1 or C"),
        ((maps[..., ::2], mask[..., ::2].contiguous(), *args), "must be dense"),
        ((maps, mask, 0.9, 17, *args[2:]), "k must be in 0 ... 16, got 17"),
        ((maps, mask, *args[:5], torch.ones(3, device=device), *args[6:]), "c1 must be a contiguous vector of 1 values"),
    ):
        with pytest.raises(RuntimeError, match=text):
            op(*bad)
