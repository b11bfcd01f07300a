"""The z^B rule and its adjoint on the kernels: the shared cases, and what only a kernel can get wrong."""

import pytest
import torch
from common import DTYPES, against_reference, channels_last, on, opcheck, repeats, run, unaligned
from helpers import CHECKS, any_dtype, close, equals_formula, gradcheck, grads, over_maps, rand, randn
from test_first_layer import CASES, case
from torch import nn

import fisnet_cuda as fc
from fisnet_cuda import _backend, ops, reference

EPS = 0.01
SLOW = ("padded", "maps", "stem", "no-bias")
LOW, HIGH = torch.tensor([-0.5, -0.6, -2.0, 0.0]).double(), torch.tensor([1.0, 1.1, 0.5, 3.0]).double()


def layer(n, maps, c_in, c_out, size, kernel, stride, padding, dtype, device, layout=torch.Tensor.contiguous, bias=True):
    """``(R_bar, R_out, x, z, W, shift, low, high, geometry, carrier)``: a layer with a ReLU, dead units among its outputs."""
    geometry = ops.conv_geometry(2, stride, padding, 1, 1)
    low, high = LOW[:c_in], HIGH[:c_in]
    x = low.view(-1, 1, 1) + (high - low).view(-1, 1, 1) * rand(n, c_in, *size, seed=1)
    W = randn(c_out, c_in, kernel, kernel, seed=2) / kernel
    W = W + 0.05 * W.sign()
    shift = 0.3 * randn(c_out, seed=3) if bias else None
    z = reference.fprop(x, W, shift, geometry)
    R_out, R_bar = randn(n * maps, *z.shape[1:], seed=4), randn(n * maps, *x.shape[1:], seed=5)
    if dtype != torch.float64:  # then every sum is one of terms of one sign, and its error not a matter of luck
        R_out, R_bar = R_out.abs(), R_bar.abs()
    carrier = z.relu()
    # sum W+ (x - l) may come near 0 on a corner of a zero-padded image, where no dtype has a digit left: stay away from it
    z = z + 0.5
    made = [None if t is None else t.to(device, dtype) for t in (R_bar, R_out, x, z, W, shift, low, high, carrier)]
    made = [layout(t) if t is not None and t.dim() == 4 else t for t in made]
    return (*made[:8], geometry, made[8])


def both_ways(R_bar, R_out, x, z, W, shift, low, high, geometry, carrier):
    """Forward and adjoint, each against the reference; returns all results."""
    R = against("zb", R_out, x, z, W, shift, low, high, EPS, geometry, carrier)[0]
    return R, *against("zb_backward", R_bar, R_out, None, None, x, z, W, shift, low, high, EPS, geometry, True, False, carrier)


def against(name, *args):
    """float64: the reference's numbers; other dtypes: at most twice its error (`against_reference`)."""
    kept = getattr(reference, name)
    if args[0].dtype == torch.float64:
        got, want = run(name, *args), kept(*args)
        for i, (g, w) in enumerate(zip(got, want)):
            if g is not None:
                close(g, w, what=f"{name}, result {i}")
            else:
                assert w is None or name == "zb"
        return got
    with pytest.MonkeyPatch.context() as patch:  # the kernel keeps no ratios
        if name == "zb":
            patch.setattr(reference, name, lambda *a: (kept(*a)[0], None, None))
        return against_reference(name, *args)


# ---- the shared cases ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shared(device, case, check):
    if check is gradcheck and case.name in SLOW and device == "cpu":
        pytest.skip("thousands of emulated launches: equals_formula compares the same gradients with autograd's")
    check(on(case, device))


@pytest.mark.parametrize("check", [equals_formula, any_dtype], ids=lambda f: f.__name__)
@pytest.mark.parametrize("maps", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_formula_of_every_geometry(device, kernel, stride, maps, check):
    named = {"stride": stride, "padding": kernel // 2, "maps": maps, "low": [-1.0, 0.0], "high": [1.0, 0.5]}
    # the sum that is the shift's gradient may come near 0, and its relative error anywhere
    check(on(case("", 2, 2, 3, (8, 7), (kernel, kernel), bias=check is equals_formula, **named), device))


# ---- sizes, dtypes, layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", range(1, 8))
def test_every_padding(device, kernel, stride):
    """The constant images end at the border as the input does, also where the kernel is larger than the image."""
    for padding in range(kernel):
        for size in ((9, 8), (kernel, max(1, kernel - 2 * padding))):
            both_ways(*layer(1, 1, 3, 2, size, kernel, stride, padding, torch.float64, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("c_in", [1, 2, 3, 4])
def test_channels(device, c_in, stride, dtype):
    """Ragged and whole chunks of output channels, K maps, both memory formats, with and without carrier and bias."""
    for c_out, maps, layout, carried in (
        (1, 3, torch.Tensor.contiguous, True), (3, 1, channels_last, False), (17, 1, torch.Tensor.contiguous, False),
        (16, 2, channels_last, True), (40, 1, channels_last, True),
    ):  # fmt: skip
        *known, carrier = layer(2, maps, c_in, c_out, (7, 6), 3, stride, 1, dtype, device, layout, bias=carried)
        both_ways(*known, carrier if carried else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 1)])
def test_several_tiles(device, kernel, stride, dtype):
    """Images of several tiles with ragged ends, several chunks of channels, the stems' kernels."""
    both_ways(*layer(1, 1, 3, 64 if dtype != torch.float64 else 10, (37, 41), kernel, stride, kernel // 2, dtype, device, channels_last))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(device, dtype):
    """Operands of different layouts, slices, and pointers off a 16-byte boundary give what contiguous ones give."""
    known = layer(2, 2, 3, 16, (6, 5), 3, 1, 1, dtype, device)
    changes = [
        lambda i, t: channels_last(t) if i % 2 else t,
        lambda i, t: t if i % 2 else channels_last(t),
        lambda i, t: unaligned(channels_last(t)),
        lambda i, t: torch.cat([t, t])[::2][: t.shape[0]] if i < 2 else torch.stack([t, t], -1)[..., 0],
    ]
    for change in changes:
        changed = [change(i, t) if isinstance(t, torch.Tensor) and t.dim() == 4 else t for i, t in enumerate(known)]
        if change is changes[3]:
            changed[0], changed[1] = known[0], known[1]
        both_ways(*changed)


def test_results_are_laid_out_like_operands(device):
    for layout in (torch.Tensor.contiguous, channels_last):
        known = layer(2, 3, 3, 8, (6, 5), 3, 1, 1, torch.float32, device, layout)
        R, R_out_bar, W_bar, *_ , carrier_bar = both_ways(*known)
        assert R.stride() == known[0].stride() and R_out_bar.stride() == known[1].stride()
        assert carrier_bar.stride() == known[3].stride() and W_bar.shape == known[4].shape


def test_carrier_is_z(device):
    """A ReLU's output serves as both: it is read once, and nothing else changes."""
    R_bar, R_out, x, z, W, shift, low, high, geometry, _ = layer(2, 2, 3, 8, (6, 5), 3, 2, 1, torch.float32, device)
    once = both_ways(R_bar, R_out, x, z, W, shift, low, high, geometry, z)
    twice = both_ways(R_bar, R_out, x, z, W, shift, low, high, geometry, z.clone())
    assert all(torch.equal(a, b) for a, b in zip(once, twice) if a is not None)


def test_one_bound_for_all_channels(device):
    R_bar, R_out, x, z, W, shift, low, high, geometry, carrier = layer(1, 1, 3, 4, (6, 5), 3, 1, 1, torch.float64, device)
    both_ways(R_bar, R_out, x, z, W, shift, low[2:3], high[3:4], geometry, carrier)


def test_maps_are_separate(device):
    R_bar, R_out, x, z, W, shift, low, high, geometry, carrier = layer(2, 3, 3, 4, (6, 5), 3, 1, 1, torch.float64, device)
    one = over_maps(lambda r, x: run("zb", r, x, z, W, shift, low, high, EPS, geometry, carrier)[0], R_out, x)
    close(run("zb", R_out, x, z, W, shift, low, high, EPS, geometry, carrier)[0], one)


# ---- corners ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_zero(device, dtype):
    """A weight of exactly 0 is neither positive nor negative: its gradient is that of z alone."""
    known = list(layer(2, 1, 3, 4, (6, 5), 3, 1, 1, dtype, device))
    known[4][:, 1] = 0
    known[4][1] = 0
    known[5][2] = 0
    both_ways(*known)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_denominators(device, dtype):
    """No weights, x at a bound, no epsilon: 0 / 0 reads 0, and gradients are finite."""
    R_bar, R_out, x, z, W, shift, low, high, geometry, carrier = layer(2, 2, 3, 4, (6, 5), 3, 1, 1, dtype, device)
    x, z, W, low = (torch.zeros_like(t) for t in (x, z, W, low))
    R, *_ = run("zb", R_out, x, z, W, None, low, high, 0.0, geometry)
    assert not R.any()
    args = (R_bar, R_out, None, None, x, z, W, None, low, high, 0.0, geometry, True, False)
    for got, want in zip(run("zb_backward", *args), reference.zb_backward(*args)):
        assert got is want is None or torch.equal(got, want)


def test_empty_batch(device):
    known = [t[:0] if isinstance(t, torch.Tensor) and t.dim() == 4 and i != 4 else t
             for i, t in enumerate(layer(2, 1, 3, 4, (6, 5), 3, 1, 1, torch.float32, device))]  # fmt: skip
    R_bar, R_out, x, z, W, shift, low, high, geometry, carrier = known
    assert run("zb", R_out, x, z, W, shift, low, high, EPS, geometry, carrier)[0].shape == x.shape
    results = run("zb_backward", R_bar, R_out, None, None, x, z, W, shift, low, high, EPS, geometry, True, False, carrier)
    assert results[0].shape == z.shape and not results[1].any() and not results[2].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats(device, dtype):
    """Bitwise the same in every schedule, with several slabs of tiles in the weight gradient."""
    R_bar, R_out, x, z, W, shift, low, high, geometry, carrier = layer(2, 2, 3, 20, (20, 21), 5, 1, 2, dtype, device)
    args = (x, z, W, shift, low, high, EPS, geometry)
    repeats(device, lambda: run("zb", R_out, *args, carrier)[:1])
    repeats(device, lambda: run("zb_backward", R_bar, R_out, None, None, *args, True, False, carrier))


def test_gradient_of_the_input(device):
    """Wanted by few: the reference computes it, from ratios made again."""
    R_bar, R_out, x, z, W, shift, low, high, geometry, carrier = layer(2, 2, 3, 4, (6, 5), 3, 1, 1, torch.float64, device)
    against("zb_backward", R_bar, R_out, None, None, x, z, W, shift, low, high, EPS, geometry, False, True, carrier)


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=["contiguous", "channels_last"])
def test_operators(device, layout):
    R_bar, R_out, x, z, W, shift, low, high, geometry, carrier = layer(2, 2, 3, 8, (6, 5), 3, 2, 1, torch.float32, device, layout)
    W = W.contiguous()
    for b, c in ((shift, carrier), (None, None)):
        opcheck("zb", R_out, x, z, W, b, low, high, EPS, 2, 1, c)
        for need_W in (True, False):
            opcheck("zb_backward", R_bar, R_out, x, z, W, b, low, high, EPS, 2, 1, need_W, c)


def test_autograd(device):
    """Forward and backward through the op: what is saved, mixed dtypes, only some gradients asked for."""
    R_bar, R_out, x, z, W, shift, low, high, geometry, carrier = layer(2, 2, 3, 4, (6, 5), 3, 1, 1, torch.float64, device)
    inputs = [t.detach().clone().requires_grad_() for t in (R_out, W, shift, carrier)]

    def gradients(backend):
        R = ops.zb(inputs[0], x, z, inputs[1], inputs[2], low, high, EPS, geometry, inputs[3], backend=backend)
        return [R.detach(), *grads(R, inputs)]

    for got, want in zip(gradients("auto"), gradients("reference")):
        close(got, want)


# ---- what the kernels do not serve -------------------------------------------------------------------------------------------

UNSERVED = {
    "kernel": nn.Conv2d(3, 4, 11, 4, 2), "rectangular": nn.Conv2d(3, 4, (3, 5)), "stride": nn.Conv2d(3, 4, 3, 3),
    "strides": nn.Conv2d(3, 4, 3, (1, 2)), "dilation": nn.Conv2d(3, 4, 3, dilation=2), "groups": nn.Conv2d(3, 6, 3, groups=3),
    "channels": nn.Conv2d(5, 4, 3), "padding": nn.Conv2d(3, 4, 1, padding=1), "1d": nn.Conv1d(3, 4, 3),
}  # fmt: skip


def network(first):
    pool = nn.AdaptiveAvgPool1d(1) if isinstance(first, nn.Conv1d) else nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(first, nn.ReLU(), pool, nn.Flatten(), nn.Linear(first.out_channels, 3))


def zb_of(plan):
    return next(k for row in plan.rows for k in row.kernel.split(", ") if k.startswith("zb:"))


@pytest.mark.parametrize("first", UNSERVED.values(), ids=UNSERVED)
def test_plan_says_what_is_not_served(device, first):
    net = fc.ISNet(network(first).to(device))
    assert zb_of(net.plan(torch.device(device))) == "zb:reference"
    x = torch.rand(2, first.in_channels, *[13] * (first.weight.dim() - 2)).to(device)
    serves = _backend.kernel("zb", "auto", x).serves
    z = first(x).detach()
    known = (x, z, first.weight.detach(), first.bias.detach(), x.new_zeros(1), x.new_ones(1), EPS)
    geometry = ops.conv_geometry(z.dim() - 2, first.stride, first.padding, first.dilation, first.groups)
    assert serves(z, *known[:4], 0.0, 1.0, EPS, geometry, tuple(first.weight.shape))
    assert torch.equal(ops.zb(z, *known, geometry), ops.zb(z, *known, geometry, backend="reference"))


def test_plan_says_what_is_served(device):
    for first in (nn.Conv2d(3, 4, 7, 2, 3), nn.Conv2d(1, 4, 3, 1, 1)):
        assert zb_of(fc.ISNet(network(first).to(device)).plan(torch.device(device))) == "zb:cuda"


def test_images_of_bounds_run_the_reference(device):
    R_bar, R_out, x, z, W, shift, low, high, geometry, carrier = layer(2, 1, 3, 4, (6, 5), 3, 1, 1, torch.float64, device)
    images = [b.view(1, 3, 1, 1).expand(1, 3, 6, 5).contiguous() for b in (low, high)]
    got = ops.zb(R_out, x, z, W, shift, *images, EPS, geometry)
    close(got, ops.zb(R_out, x, z, W, shift, low, high, EPS, geometry))
