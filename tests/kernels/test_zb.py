"""The z^B rule and its adjoint on the kernels: the shared cases, and what only a kernel can get wrong."""

from typing import NamedTuple

import pytest
import torch
from common import DTYPES, against_reference, channels_last, on, opcheck, repeats, run, unaligned
from helpers import CHECKS, any_dtype, close, equals_formula, gradcheck, grads, over_maps, rand, randn
from test_first_layer import CASES, case
from torch import nn

import fisnet_cuda as fc
from fisnet_cuda import _backend, ops, reference

EPS = 0.01
SLOW = ("plain", "padded", "maps", "stem", "no-bias")
LOW, HIGH = torch.tensor([-0.5, -0.6, -2.0, 0.0]).double(), torch.tensor([1.0, 1.1, 0.5, 3.0]).double()


class Layer(NamedTuple):
    """The operands of forward and adjoint."""

    R_bar: torch.Tensor
    R_out: torch.Tensor
    x: torch.Tensor
    z: torch.Tensor
    W: torch.Tensor
    shift: torch.Tensor | None
    low: torch.Tensor
    high: torch.Tensor
    geometry: ops.Geometry
    carrier: torch.Tensor | None
    eps: float = EPS

    @property
    def forward(self) -> tuple:
        return self.R_out, *self.rest, self.carrier

    @property
    def backward(self) -> tuple:
        return self.R_bar, self.R_out, None, None, *self.rest, True, False, self.carrier

    @property
    def rest(self) -> tuple:
        return self.x, self.z, self.W, self.shift, self.low, self.high, self.eps, self.geometry

    def images(self, change) -> "Layer":
        """With ``change(field, tensor)`` for every tensor of four axes."""
        found = {k: v for k, v in self._asdict().items() if isinstance(v, torch.Tensor) and v.dim() == 4}
        return self._replace(**{k: change(k, v) for k, v in found.items()})


def layer(maps, c_in, c_out, size, kernel, stride, padding, dtype, device, layout=torch.Tensor.contiguous, bias=True, n=2):
    """A layer with a ReLU behind it, dead units among its outputs."""
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
    # z' may come near 0 on a corner of a zero-padded image, where few digits are left: stay away from it
    made = [None if t is None else t.to(device, dtype) for t in (R_bar, R_out, x, z + 0.5, W, shift, low, high, z.relu())]
    return Layer(*made[:8], geometry, made[8]).images(lambda _, t: layout(t))


def both_ways(known):
    """Forward and adjoint, each against the reference; returns all results."""
    return against("zb", *known.forward)[0], *against("zb_backward", *known.backward)


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
            both_ways(layer(1, 3, 2, size, kernel, stride, padding, torch.float64, device, n=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("c_in", [1, 2, 3, 4])
def test_channels(device, c_in, stride, dtype):
    """Ragged and whole chunks of output channels, K maps, both memory formats, with and without carrier and bias."""
    for c_out, maps, layout, carried in (
        (1, 3, torch.Tensor.contiguous, True), (3, 1, channels_last, False), (17, 1, torch.Tensor.contiguous, False),
        (16, 2, channels_last, True), (40, 1, channels_last, True),
    ):  # fmt: skip
        known = layer(maps, c_in, c_out, (7, 6), 3, stride, 1, dtype, device, layout, bias=carried)
        both_ways(known if carried else known._replace(carrier=None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 1)])
def test_several_tiles(device, kernel, stride, dtype):
    """Images of several tiles with ragged ends, several chunks of channels, the stems' kernels."""
    c_out = 64 if dtype != torch.float64 else 10
    both_ways(layer(1, 3, c_out, (37, 41), kernel, stride, kernel // 2, dtype, device, channels_last, n=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(device, dtype):
    """Operands of different layouts, slices, and pointers off a 16-byte boundary give what contiguous ones give."""
    known = layer(2, 3, 16, (6, 5), 3, 1, 1, dtype, device)
    for last in (("x", "R_out"), ("R_bar", "z", "W"), ("x", "carrier", "W")):
        both_ways(known.images(lambda name, t, last=last: channels_last(t) if name in last else t))
    both_ways(known.images(lambda _, t: unaligned(channels_last(t))))
    both_ways(known.images(lambda _, t: torch.stack([t, t], -1)[..., 0]))


def test_results_are_laid_out_like_operands(device):
    for layout in (torch.Tensor.contiguous, channels_last):
        known = layer(3, 3, 8, (6, 5), 3, 1, 1, torch.float32, device, layout)
        R, R_out_bar, *_, carrier_bar = both_ways(known)
        assert R.stride() == known.R_bar.stride()
        assert R_out_bar.stride() == known.R_out.stride()
        assert carrier_bar.stride() == known.carrier.stride()


def test_carrier_is_z(device):
    """A ReLU's output serves as both: it is read once, and nothing else changes."""
    known = layer(2, 3, 8, (6, 5), 3, 2, 1, torch.float32, device)
    once, twice = both_ways(known._replace(carrier=known.z)), both_ways(known._replace(carrier=known.z.clone()))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(once, twice))


def test_one_bound_for_all_channels(device):
    known = layer(1, 3, 4, (6, 5), 3, 1, 1, torch.float64, device)
    both_ways(known._replace(low=known.low[1:2], high=known.high[1:2]))


def test_maps_are_separate(device):
    known = layer(3, 3, 4, (6, 5), 3, 1, 1, torch.float64, device)
    one = over_maps(lambda r, x: run("zb", r, *known.rest, known.carrier)[0], known.R_out, known.x)
    close(run("zb", *known.forward)[0], one)


# ---- corners ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_zero(device, dtype):
    """A weight of exactly 0 is neither positive nor negative: its gradient is that of z alone."""
    known = layer(1, 3, 4, (6, 5), 3, 1, 1, dtype, device)
    known.W[:, 1] = 0
    known.W[1] = 0
    known.shift[2] = 0
    both_ways(known)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_denominators(device, dtype):
    """No weights, x at a bound, no epsilon: 0 / 0 reads 0, and gradients are finite."""
    known = layer(2, 3, 4, (6, 5), 3, 1, 1, dtype, device)
    zeros = {name: torch.zeros_like(getattr(known, name)) for name in ("x", "z", "W", "low")}
    known = known._replace(**zeros, shift=None, carrier=None, eps=0.0)
    assert not run("zb", *known.forward)[0].any()
    for got, want in zip(run("zb_backward", *known.backward), reference.zb_backward(*known.backward)):
        assert got is want is None or torch.equal(got, want)


def test_empty_batch(device):
    known = layer(1, 3, 4, (6, 5), 3, 1, 1, torch.float32, device).images(lambda name, t: t if name == "W" else t[:0])
    assert run("zb", *known.forward)[0].shape == known.x.shape
    R_out_bar, W_bar, shift_bar, *_ = run("zb_backward", *known.backward)
    assert R_out_bar.shape == known.z.shape
    assert not W_bar.any()
    assert not shift_bar.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats(device, dtype):
    """Bitwise the same in every schedule, with several slabs of tiles in the weight gradient."""
    known = layer(2, 3, 20, (10, 21), 3, 1, 1, dtype, device, n=1)
    repeats(device, lambda: run("zb", *known.forward)[:1])
    repeats(device, lambda: run("zb_backward", *known.backward))


def test_gradient_of_the_input(device):
    """Wanted by few: the reference computes it, from ratios made again."""
    known = layer(2, 3, 4, (6, 5), 3, 1, 1, torch.float64, device)
    against("zb_backward", known.R_bar, known.R_out, None, None, *known.rest, False, True, known.carrier)


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=["contiguous", "channels_last"])
def test_operators(device, layout):
    known = layer(2, 3, 8, (6, 5), 3, 2, 1, torch.float32, device, layout)
    for shift, carrier in ((known.shift, known.carrier), (None, None)):
        operands = known.x, known.z, known.W.contiguous(), shift, known.low, known.high, EPS, 2, 1
        opcheck("zb", known.R_out, *operands, carrier)
        for need_W in (True, False):
            opcheck("zb_backward", known.R_bar, known.R_out, *operands, need_W, carrier)


def test_autograd(device):
    """Forward and backward through the op, with a carrier."""
    known = layer(2, 3, 4, (6, 5), 3, 1, 1, torch.float64, device)
    inputs = [t.detach().clone().requires_grad_() for t in (known.R_out, known.W, known.shift, known.carrier)]

    def gradients(backend):
        R_out, W, shift, carrier = inputs
        R = ops.zb(R_out, known.x, known.z, W, shift, known.low, known.high, EPS, known.geometry, carrier, backend=backend)
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
    known = layer(1, 3, 4, (6, 5), 3, 1, 1, torch.float64, device)
    images = {name: getattr(known, name).view(1, 3, 1, 1).expand(1, 3, 6, 5) for name in ("low", "high")}
    got = run("zb", *known._replace(**images).forward)
    assert got[1] is not None, "the reference keeps its ratios"
    close(got[0], run("zb", *known.forward)[0])
