"""The z^B rule: against the formula of semantics.md section 2, differentiated by plain autograd."""

import oracles
import pytest
import torch
from helpers import CHECKS, Case, close, grads, over_maps, rand, randn
from torch import nn

from fisnet_cuda import ops

N, E = 2, 0.01


def image(bound, x, geometry):
    if not geometry.spatial:
        return bound.expand(1, x.shape[-1])
    return bound.view(1, -1, *[1] * geometry.spatial).expand(1, *x.shape[1:])


def zb(R_out, x, W, b, low, high, eps, geometry):
    """``z`` by one convolution each of x and of the bounds; R by one transposed product each."""
    k = R_out.shape[0] // x.shape[0]
    floor, top = image(low, x, geometry), image(high, x, geometry)
    plus, minus = W.clamp(min=0), W.clamp(max=0)
    z = ops.fprop(x, W, None, geometry) - ops.fprop(floor, plus, None, geometry) - ops.fprop(top, minus, None, geometry)
    if b is not None:
        own = b - b.clamp(min=0) * low.min() - b.clamp(max=0) * high.max()
        z = z + own.view(-1, *[1] * geometry.spatial)
    z = z + eps * torch.where(z < 0, -1.0, 1.0).to(z.dtype)
    s = R_out / z.repeat_interleave(k, 0)

    def back(V):
        if not geometry.spatial:
            return s @ V
        conv = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[geometry.spatial]
        a = s.new_zeros(s.shape[0], *x.shape[1:]).requires_grad_()
        y = conv(a, V, None, *geometry[1:])
        return torch.autograd.grad(y, a, s, create_graph=True)[0]

    return x.repeat_interleave(k, 0) * back(W) - floor * back(plus) - top * back(minus)


def case(name, spatial, c_in, c_out, size, kernel=(), low=0.0, high=1.0, bias=True, maps=1, **geometry):
    if spatial:
        defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | geometry
        geometry = ops.conv_geometry(spatial, **defaults)
    else:
        geometry = ops.linear_geometry()
    low, high = (torch.as_tensor(v, dtype=torch.float64).reshape(-1) for v in (low, high))
    x = rand(N, c_in, *size, seed=1)
    x = image(low, x, geometry) + (image(high, x, geometry) - image(low, x, geometry)) * x
    W = randn(c_out, c_in // geometry.groups, *kernel, seed=2)
    W = W + 0.05 * W.sign()
    shape = ops.fprop(x, W, None, geometry).shape[1:]
    inputs = {"R_out": randn(N * maps, *shape, seed=3), "x": x, "W": W}
    if bias:
        inputs["b"] = torch.tensor([0.4, -0.3, 0.2, -0.1], dtype=torch.float64)[:c_out]

    def op(R_out, x, W, b=None):
        with torch.no_grad():
            z = ops.fprop(x, W, b, geometry)
        return ops.zb(R_out, x, z, W, b, low.to(x), high.to(x), E, geometry)

    def formula(R_out, x, W, b=None):
        with torch.enable_grad():
            return zb(R_out, x, W, b, low.to(x), high.to(x), E, geometry)

    return Case(name, op, formula, inputs)


MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])
NORMALISED = {"low": -MEAN / STD, "high": (1 - MEAN) / STD}
CASES = [
    case("plain", 2, 3, 4, (5, 4), (3, 3)),
    case("padded", 2, 3, 4, (5, 4), (3, 3), padding=1, **NORMALISED),
    case("maps", 2, 3, 2, (3, 4), (3, 3), padding=1, maps=3, **NORMALISED),
    case("stem", 2, 3, 2, (5, 5), (5, 5), padding=2, stride=2, maps=2, low=-1.0),
    case("no-bias", 2, 3, 4, (5, 5), (3, 3), padding=1, bias=False, **NORMALISED),
    case("grouped", 2, 4, 4, (3, 3), (3, 2), padding=1, groups=2, low=[-1.0, 0.0, -2.0, -0.5], high=2.0, maps=2),
    case("depthwise", 2, 3, 3, (4, 4), (3, 3), padding=1, stride=2, groups=3, **NORMALISED),
    case("one-bound-each", 2, 3, 2, (4, 4), (2, 2), low=-0.5, high=[1.0, 2.0, 3.0]),
    case("1d", 1, 2, 3, (7,), (3,), padding=1, dilation=2, maps=2),
    case("3d", 3, 1, 2, (3, 3, 3), (2, 2, 2)),
    case("dense", 0, 5, 4, (), maps=2),
    case("dense-bounds", 0, 3, 4, (), **NORMALISED),
    case("one-pixel", 2, 1, 1, (1, 1), (1, 1)),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_zb(case, check):
    check(case)


@pytest.mark.parametrize("groups", [1, 3])
def test_explicit_matrix(groups):
    """The oracle's rule on the layer's matrix: padding is inside the matrix, so the constant images end at the border."""
    conv = nn.Conv2d(3, 3, 3, 2, 1, groups=groups).double()
    x, low, high = rand(N, 3, 5, 5), torch.tensor([-1.0, 0.0, -2.0]).double(), torch.tensor([1.0, 3.0, 2.0]).double()
    y = conv(x)
    R_out = randn(N, *y.shape[1:])
    W, b = oracles.layer_matrix(conv, x.shape[1:])
    bounds = [oracles.image(v, x.shape[1:]) for v in (low, high)]
    want = oracles.zb(W, b, x.flatten(1), R_out.flatten(1), *bounds, E).view_as(x)
    geometry = ops.conv_geometry(2, 2, 1, 1, groups)
    close(ops.zb(R_out, x, y, conv.weight, conv.bias, low, high, E, geometry), want)


def arguments(**changes):
    x, W = rand(N, 3, 4, 4), randn(2, 3, 3, 3, seed=1)
    geometry = ops.conv_geometry(2, 1, 1, 1, 1)
    known = {"R_out": randn(N, 2, 4, 4), "x": x, "z": ops.fprop(x, W, None, geometry), "W": W, "shift": None}
    known |= {"low": torch.zeros(1).double(), "high": torch.ones(1).double(), "eps": E, "geometry": geometry}
    return known | changes


def test_conservation():
    """Without bias ``sum R_in = sum R_out z' / (z' + e sign z')``; without epsilon relevance is conserved."""
    known = arguments()
    R = ops.zb(**known | {"eps": 0.0})
    close(R.sum((1, 2, 3)), known["R_out"].sum((1, 2, 3)))
    plus, minus = known["W"].clamp(min=0), known["W"].clamp(max=0)
    z = known["z"] - ops.fprop(torch.ones_like(known["x"]), minus, None, known["geometry"])
    assert (z >= 0).all()
    R = ops.zb(**known)
    close(R.sum((1, 2, 3)), (known["R_out"] * z / (z + E)).sum((1, 2, 3)))
    assert (ops.zb(**known | {"R_out": known["R_out"].abs()}) >= 0).all(), "bounded inputs and R_out >= 0 give R >= 0"
    assert plus.any()


def test_maps_are_separate():
    known = arguments(R_out=randn(N * 3, 2, 4, 4))
    rest = {k: v for k, v in known.items() if k != "R_out"}
    close(ops.zb(**known), over_maps(lambda r, x: ops.zb(r, **rest), known["R_out"], known["x"]))


def test_relu_output_will_do_for_z():
    """z matters only where relevance is not 0, so the ReLU's output is as good as the pre-activation."""
    known = arguments()
    known["R_out"] = known["R_out"] * (known["z"] > 0)
    close(ops.zb(**known | {"z": known["z"].relu()}), ops.zb(**known))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_denominators(dtype):
    """A unit with no weights, x at a bound, no epsilon: 0 / 0 is 0, value and gradients finite."""
    known = arguments(eps=0.0)
    known["W"] = torch.zeros_like(known["W"])
    known["x"], known["z"] = torch.zeros_like(known["x"]), torch.zeros_like(known["z"])
    known = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in known.items()}
    for name in ("R_out", "x", "W"):
        known[name].requires_grad_()
    R = ops.zb(**known)
    assert not R.any()
    assert all(torch.isfinite(g).all() for g in grads(R, [known[n] for n in ("R_out", "x", "W")]))


def test_empty_batch():
    known = arguments(R_out=torch.zeros(0, 2, 4, 4).double(), x=torch.zeros(0, 3, 4, 4).double(), z=torch.zeros(0, 2, 4, 4))
    for name in ("R_out", "x", "W"):
        known[name].requires_grad_()
    R = ops.zb(**known)
    assert R.shape == (0, 3, 4, 4)
    assert not any(g.any() for g in grads(R, [known[n] for n in ("R_out", "x", "W")]))


def test_autocast():
    known = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in arguments().items()}
    known["W"].requires_grad_()
    want = ops.zb(**known)
    with torch.autocast("cpu", torch.bfloat16):
        R = ops.zb(**known)
    assert R.dtype == torch.bfloat16
    assert (R - want).abs().max() <= 0.05 * want.abs().max()
    R.float().sum().backward()
    assert known["W"].grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"low": torch.zeros(2)}, "input_low has 2 channels and the input has 3: give 1 or 3"),
        ({"high": torch.ones(4)}, "input_high has 4 channels"),
        (
            {"x": rand(2, 3, 4), "geometry": ops.linear_geometry(), "low": torch.zeros(4)},
            "per-channel bounds need an input",
        ),
    ],
)
def test_errors(changes, text):
    with pytest.raises(ValueError, match=text):
        ops.zb(**arguments(**changes))
