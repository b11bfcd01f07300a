"""`linear_act` fused: a convolution or dense layer with the BatchNorm, skip and ReLU around it, against the reference."""

import itertools

import pytest
import torch
from common import DTYPES, opcheck, repeats, run, same, unaligned
from helpers import rand, randn
from linear_cases import LAYERS, Layer, laid_out, within_rounding

from fisnet_cuda import _backend
from fisnet_cuda.ops.tiles import PROLOGUE_TILES, TILES

NAME, PRODUCT = "linear_act", ("x", "W")
# channels that fill vectors of every dtype, and do not; several tiles of rows and of columns, more steps than stages
WIDE, ODD, DENSE = Layer(3, 168, 136, (9, 5), 1), Layer(2, 5, 7, (6, 6), 3, padding=1), Layer(70, 16, 72, (), 0)
STRIDED = Layer(2, 24, 16, (7, 9), 3, stride=2, padding=1)
ALL = ("scale", "shift", "skip", "relu")


def operands(layer, dtype, device, which=ALL, pre=False):
    def on(t):
        return laid_out(t, dtype, device)

    given = {"x": on(layer.map_in(1)), "W": on(layer.weight()), "geometry": layer.geometry}
    optional = {
        "scale": randn(layer.c_out, seed=3).to(device, dtype), "shift": randn(layer.c_out, seed=4).to(device, dtype),
        "skip": on(layer.map_out(5)), "relu": True,
    }  # fmt: skip
    given |= {name: optional[name] for name in which}
    if pre:  # a shift above 0 shows where padding is not 0 behind the ReLU
        given |= {
            "pre_scale": randn(layer.c_in, seed=6).to(device, dtype),
            "pre_shift": rand(layer.c_in, seed=7, low=0.5).to(device, dtype),
        }
    return given


@pytest.mark.parametrize("pre", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layers(device, layer, dtype, pre):
    within_rounding(NAME, PRODUCT, **operands(layer, dtype, device, pre=pre))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_absent_operands(device, dtype):
    for layer, flags in itertools.product((ODD, STRIDED, Layer(2, 16, 8, (5,), 0)), itertools.product((False, True), repeat=4)):
        within_rounding(NAME, PRODUCT, **operands(layer, dtype, device, [name for name, on in zip(ALL, flags) if on]))


@pytest.mark.parametrize("pre", [False, True], ids=["plain", "prologue"])
def test_every_tile(device, pre):
    for dtype, layer in itertools.product(DTYPES[:3], (WIDE, DENSE)):
        given = operands(layer, dtype, device, pre=pre)
        tiles = _backend.kernel(NAME, "auto", given["x"]).tiles(**given)
        assert set(tiles) == set(PROLOGUE_TILES if pre else TILES)
        for tile in tiles:
            within_rounding(NAME, PRODUCT, tile, **given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [STRIDED, ODD], ids=str)
def test_prologue_is_the_product_of_what_it_makes(device, layer, dtype):
    """Bit by bit what a separate pass before the product gives: x' rounded to its dtype, zeros outside of the map."""
    given = operands(layer, dtype, device, pre=True)
    scale, shift = (given.pop(name).to(torch.promote_types(dtype, torch.float32)).view(-1, 1, 1) for name in ("pre_scale", "pre_shift"))
    fused = run(NAME, **operands(layer, dtype, device, pre=True), poison=True)[0]
    apart = run(NAME, **given | {"x": laid_out((given["x"] * scale + shift).relu(), dtype, device)})[0]
    if device == "cpu" and dtype.itemsize < 4:
        assert torch.equal(fused, apart)
    else:  # a product and a sum may be one instruction
        torch.testing.assert_close(fused, apart, rtol=2e-3, atol=2e-3)


def test_nan_stays_nan(device):
    """A loss scaler looks for it: neither ReLU hides it."""
    for pre, which in itertools.product((False, True), (ALL, ())):
        given = operands(STRIDED, torch.float16, device, which, pre)
        given["x"][1, 3, 2, 2] = torch.nan
        y = run(NAME, **given)[0]
        assert y[1].isnan().any()
        assert not y[0].isnan().any()


def test_schedules(device):
    for layer, pre in itertools.product((WIDE, ODD), (False, True)):
        given = operands(layer, torch.bfloat16, device, pre=pre)
        repeats(device, lambda given=given: run(NAME, **given, poison=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pre", [False, True], ids=["plain", "prologue"])
def test_unaligned(device, pre, dtype):
    """An operand behind a 16-byte boundary, or one of odd channels, gives what aligned ones give."""
    given = operands(WIDE, dtype, device, pre=pre)
    want = run(NAME, **given)[0]
    names = [name for name, t in given.items() if isinstance(t, torch.Tensor)]
    for name in names:
        changed = given | {name: unaligned(given[name].float() if given[name].dim() == 1 else given[name])}
        assert same(within_rounding(NAME, PRODUCT, **changed)[0], want)


def test_other_layouts(device):
    """Operands beside x may lie in any order of axes."""
    given = operands(STRIDED, torch.bfloat16, device)
    other = {name: given[name].contiguous() for name in ("W", "skip")}
    assert not other["W"].is_contiguous(memory_format=torch.channels_last)
    y = run(NAME, **given | other)[0]
    assert torch.equal(y, run(NAME, **given)[0])
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_serves(device):
    kernel = _backend.kernel(NAME, "auto", torch.empty(0, device=device))
    given = operands(STRIDED, torch.float32, device, pre=True)
    assert kernel.serves(**given) == ""
    assert "innermost" in kernel.serves(**given | {"x": given["x"].contiguous()})
    assert "dtypes" in kernel.serves(**given | {"skip": given["skip"].double()})
    assert "groups" in kernel.serves(**given | {"geometry": given["geometry"]._replace(groups=2)})
    assert "no elements" in kernel.serves(**given | {"x": given["x"][:0]})
    assert "positions" in kernel.serves(**given | {"geometry": given["geometry"]._replace(padding=(2**15, 2**15))})
    with pytest.raises(ValueError, match="tile must be one of"):
        kernel(**given, tile="128x128")


def args(device, dtype=torch.bfloat16, **changes):
    """Operands of the operator itself."""
    given = operands(STRIDED, dtype, device, pre=True)
    given |= {name: given[name].float() for name in ("scale", "shift", "pre_scale", "pre_shift")}
    named = {
        "x": given["x"], "W": given["W"], "geometry": (2, 2, 1, 1, 1, 1), "scale": given["scale"], "shift": given["shift"],
        "skip": given["skip"], "relu": True, "pre_scale": given["pre_scale"], "pre_shift": given["pre_shift"], "tile": 2,
    }  # fmt: skip
    named |= changes
    return [v for k, value in named.items() for v in (value if k == "geometry" else (value,))]


def test_operator(device):
    opcheck(NAME, *args(device))
    opcheck(NAME, *args(device, scale=None, skip=None, pre_scale=None, pre_shift=None))


def test_messages(device):
    x, W, *_ = args(device)
    skip = args(device)[10]
    ones = torch.ones(16, device=device)
    for message, changes in {
        "x must be dense and channels_last": {"x": x.contiguous()},
        "x must be .N, C, H, W.": {"x": x[0]},
        "W must be BFloat16": {"W": W.float()},
        "x must be .2, 23": {"W": W[:, :23].contiguous(memory_format=torch.channels_last)},
        "stride and dilation must be at least 1": {"geometry": (1, 1, 1, -1, 1, 1)},
        "2 samples of 32771 x 32772 are too many positions": {"geometry": (2, 2, 2**15, 2**15, 1, 1)},
        "skip must be .2, 16, 4, 5.": {"skip": skip[:1]},
        "scale must be Float": {"scale": ones.bfloat16()},
        "shift must be a contiguous vector of 16": {"shift": ones[:8]},
        "pre_scale must be a contiguous vector of 24": {"pre_scale": ones},
        "pre_shift must be a contiguous vector of 24": {"pre_shift": ones},
        "pre_scale and pre_shift come together": {"pre_shift": None},
        "the largest tile shape has no pre_scale": {"tile": 0},
        "there is no tile shape -1": {"tile": -1},
    }.items():
        with pytest.raises(RuntimeError, match=f"linear_act: {message}"):
            torch.ops.fisnet.linear_act(*args(device, **changes))
