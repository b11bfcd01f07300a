"""Dual's fused linear maps against the reference, against each other, and against single products."""

import itertools

import pytest
import torch
from common import DTYPES, opcheck, repeats, same, unaligned
from helpers import rand, randn
from linear_cases import LAYERS, Layer, laid_out, within_rounding
from torch.utils._python_dispatch import TorchDispatchMode

from fisnet_cuda import _backend
from fisnet_cuda.ops.tiles import PAIR_TILES, TILES

# what float32 kernels round to TF32
PRODUCT = {"dual_fprop": ("x", "W"), "dual_transposed_phi": ("s", "s_plus", "W"), "dual_fprop_adjoint": ("g_bar", "g_plus_bar", "W"),
           "dual_transposed_sum": ("z_bar", "P_bar", "W")}  # fmt: skip
PAIRS = tuple(PRODUCT)[:3]  # kernels of their own, operators of the same names
CONV, DENSE = Layer(2, 16, 24, (7, 6), 3, stride=2, padding=1), Layer(5, 24, 16, (), 0)
ODD = Layer(1, 5, 9, (6, 5), 3, padding=1)  # no 16-byte access
LARGE = Layer(1, 72, 80, (9, 15), 2, padding=1)  # several tiles each way, in both directions, with many steps of the depth


def operands(name, layer, dtype, device, eps=0.1, eps_plus=0.05, phi=True):
    """All operands; weights among which are 0 and -0, signs among which is 0, dead units, z+ = 0 beside some of them."""

    def on(t):
        return laid_out(t, dtype, device)

    def activation(like, seed):
        a = like(seed).relu()
        return on(a), on(torch.where(like(seed + 1) > 0, a + like(seed + 2).abs(), a))

    weight, channels = layer.weight(), torch.arange(layer.c_out)
    weight.view(-1)[::7], weight.view(-1)[3::7] = 0.0, -0.0
    sign, factor = (channels % 3 - 1).to(device, dtype), randn(layer.c_out, seed=3).to(device, dtype)
    given = {"W": on(weight), "geometry": layer.geometry}
    if eps == "relative":
        eps = (0.1 + torch.arange(layer.n).view(-1, *[1] * (1 + len(layer.size)))).to(device, dtype)
    rules = {"eps": eps, "eps_plus": eps_plus}
    if name in ("dual_transposed_phi", "dual_transposed_sum"):
        given["in_size"] = layer.size if layer.kernel else ()
    if name == "dual_fprop":
        given |= {"x": on(layer.map_in(4).relu()), "sign": sign}
        given |= {"shift": randn(layer.c_out, seed=5).to(device, dtype), "shift_plus": rand(layer.c_out, seed=6).to(device, dtype)}
    elif name == "dual_transposed_sum":
        given |= {"z_bar": on(layer.map_out(1)), "P_bar": on(layer.map_out(2)), "sign": sign}
    elif name == "dual_transposed_phi":
        given |= {"s": on(layer.map_out(1)), "s_plus": on(layer.map_out(2)), "factor": factor}
        if phi:
            a, z_plus = activation(layer.map_in, 4)
            given |= {"a": a, "z_plus": z_plus} | rules
    else:
        a, z_plus = activation(layer.map_out, 4)
        given |= {"g_bar": on(layer.map_in(1)), "g_plus_bar": on(layer.map_in(2)), "factor": factor, "a": a, "z_plus": z_plus}
        given |= {"s": on(a.double().cpu() * layer.map_out(7)), "s_plus": on(a.double().cpu() * layer.map_out(8))} | rules
    return given


def check(name, layer, dtype, device, tile=None, **options):
    return within_rounding(name, PRODUCT[name], tile, **operands(name, layer, dtype, device, **options))


def kernel(name, given):
    return _backend.kernel(name, "auto", given["W"])


def run(name, *args, **given):
    """The kernel ``name`` itself."""
    tensor = next(v for v in (*args, *given.values()) if isinstance(v, torch.Tensor))
    return _backend.kernel(name, "auto", tensor)(*args, **given)


# ----------------------------------------------------------------------------------------------------------------------
# Beside the reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("name", PRODUCT)
def test_layers(device, name, layer, dtype):
    check(name, layer, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PRODUCT)
def test_every_tile(device, name, dtype):
    given = operands(name, LARGE, dtype, device)
    shapes = TILES if name == "dual_transposed_sum" else PAIR_TILES
    assert set(kernel(name, given).tiles(**given)) == set(shapes)
    for tile in shapes:
        check(name, LARGE, dtype, device, tile)
    if shapes is PAIR_TILES:
        with pytest.raises(ValueError, match="got '128x128'"):
            kernel(name, given)(**given, tile="128x128")


@pytest.mark.parametrize("eps", [0.1, 0.0, "relative"])
@pytest.mark.parametrize("eps_plus", [0.05, 0.0])
@pytest.mark.parametrize("name", ["dual_transposed_phi", "dual_fprop_adjoint"])
def test_epsilons(device, name, eps, eps_plus):
    """Where a = 0 every result is 0, also with z+ = e = 0."""
    for layer, dtype in itertools.product((CONV, DENSE, ODD), (torch.float32, torch.bfloat16, torch.float64)):
        given = operands(name, layer, dtype, device, eps, eps_plus)
        dead = given["a"] == 0
        assert given["z_plus"][dead].any()
        assert not given["z_plus"][dead].all()
        assert not any(r[dead].any() for r in check(name, layer, dtype, device, eps=eps, eps_plus=eps_plus))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_absent_operands(device, dtype):
    optional = {"dual_fprop": ("sign", "shift", "shift_plus"), "dual_transposed_phi": ("factor",), "dual_fprop_adjoint": ("factor",),
                "dual_transposed_sum": ("sign",)}  # fmt: skip
    for layer in (CONV, DENSE):
        for name, names in optional.items():
            given = operands(name, layer, dtype, device)
            for absent in {names, *((n,) for n in names)}:
                within_rounding(name, PRODUCT[name], **given | dict.fromkeys(absent))
        check("dual_transposed_phi", layer, dtype, device, phi=False)


# ----------------------------------------------------------------------------------------------------------------------
# Beside single products: the depth is walked in the same order, so they agree bit by bit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed_products_are_two_single_ones(device, dtype):
    """Without a: ``transposed_phi`` with ``W~``, and with ``max(W~, 0)``."""
    for layer in (CONV, DENSE, ODD) if dtype == torch.float64 else (CONV, DENSE, ODD, LARGE):
        given = operands("dual_transposed_phi", layer, dtype, device, phi=False)
        tilde = (given["W"] * given["factor"].view(-1, *[1] * (given["W"].dim() - 1))).contiguous()
        for tile in kernel("dual_transposed_phi", given).tiles(**given):
            g, g_plus = run("dual_transposed_phi", **given, tile=tile)
            one, two = (
                run("transposed_phi", s, W, layer.geometry, given["in_size"], tile=tile)[0]
                for s, W in ((given["s"], tilde), (given["s_plus"], tilde.clamp(min=0)))
            )
            assert torch.equal(g, one), f"{layer}, {tile}"
            assert torch.equal(g_plus, two), f"{layer}, {tile}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_products_are_two_single_ones(device, dtype):
    """``P`` is the ``z`` of weights ``max(sign W, 0)``. Where a = z+ = 1 and e = 0, the adjoint gives ``s_bar`` and ``s+_bar``."""
    for layer in (CONV, DENSE, ODD) if dtype == torch.float64 else (CONV, DENSE, ODD, LARGE):
        given = operands("dual_fprop", layer, dtype, device)
        sign = given["sign"].view(-1, *[1] * (given["W"].dim() - 1))
        plus = given | {"W": (given["W"] * sign).clamp(min=0), "sign": None, "shift": given["shift_plus"]}
        adjoint = operands("dual_fprop_adjoint", layer, dtype, device) | {"factor": None, "eps": 0.0, "eps_plus": 0.0}
        adjoint["a"] = adjoint["z_plus"] = torch.ones_like(adjoint["a"])
        for tile in kernel("dual_fprop", given).tiles(**given):
            assert torch.equal(run("dual_fprop", **given, tile=tile)[1], run("dual_fprop", **plus, tile=tile)[0]), f"{layer}, {tile}"
            bars = run("dual_fprop_adjoint", **adjoint, tile=tile)
            for i, g_bar in enumerate((adjoint["g_bar"], adjoint["g_plus_bar"])):
                want = run("dual_fprop", g_bar, given["W"], layer.geometry, tile=tile)[i]
                assert torch.equal(bars[i], want), f"{layer}, {tile}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_signs(device, dtype):
    for layer in (CONV, ODD, DENSE):
        given = operands("dual_fprop", layer, dtype, device)
        x, W, one = given["x"], given["W"], torch.ones_like(given["sign"])
        plain = run("dual_fprop", x, W, layer.geometry)[1]
        assert torch.equal(run("dual_fprop", x, W, layer.geometry, one)[1], plain)
        turned = run("dual_fprop", x, -W, layer.geometry, -one)  # every 0 becomes -0, and -0 0
        assert torch.equal(turned[1], plain)
        assert not run("dual_fprop", x, W, layer.geometry, 0 * one)[1].any()
        assert not run("dual_fprop", x, -W.abs(), layer.geometry)[1].any()
        mixed = run("dual_fprop", x, W, layer.geometry, given["sign"])[1].movedim(1 if layer.kernel else -1, 0)
        parts = [run("dual_fprop", x, W, layer.geometry, v * one)[1].movedim(1 if layer.kernel else -1, 0) for v in (-1, 0, 1)]
        assert all(torch.equal(row, parts[i % 3][i]) for i, row in enumerate(mixed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_are_not_numbers_show(device, dtype):
    """NaN of either sign is no negative weight: it reaches its channel of ``P``, and no other."""
    for nan in (torch.tensor(torch.nan), -torch.tensor(torch.nan)):
        x, W = torch.ones(3, 16, dtype=dtype, device=device), torch.ones(8, 16, dtype=dtype, device=device)
        W[2, 5] = nan
        for sign in (None, torch.ones(8, device=device)):
            P = run("dual_fprop", x, W, DENSE.geometry, sign)[1]
            assert P[:, 2].isnan().all()
            assert P[:, [0, 1, *range(3, 8)]].eq(16).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rules_are_those_of_dual_phi(device, dtype):
    """In these dtypes no product is rounded between the kernels."""
    for layer, eps in itertools.product((CONV, ODD), (0.1, 0.0, "relative")):
        given = operands("dual_transposed_phi", layer, dtype, device, eps)
        rules = {k: given[k] for k in ("a", "z_plus", "eps", "eps_plus")}
        g = run("dual_transposed_phi", **{k: v for k, v in given.items() if k not in rules})
        for got, want in zip(run("dual_transposed_phi", **given), run("dual_phi", *g, **rules)):
            assert same(got, want)
        given = operands("dual_fprop_adjoint", layer, dtype, device, eps)
        rules = {k: given[k] for k in ("a", "s", "s_plus", "z_plus", "eps", "eps_plus")}
        ones = torch.ones_like(given["a"])
        unit = rules | {"a": ones, "z_plus": ones, "eps": 0.0, "eps_plus": 0.0}
        bars = run("dual_fprop_adjoint", **given | unit)[:2]
        for got, want in zip(run("dual_fprop_adjoint", **given), run("dual_phi_backward", *bars, **rules)):
            assert same(got, want)


# ----------------------------------------------------------------------------------------------------------------------
# Memory, schedules, operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PRODUCT)
def test_unaligned(device, name, dtype):
    """Operands one element behind a 16-byte boundary, all or one of them, give what aligned ones give."""
    given = operands(name, CONV, dtype, device)
    want = run(name, **given)
    tensors = [k for k, v in given.items() if isinstance(v, torch.Tensor)]
    for which in ([k] for k in tensors), [tensors]:
        for some in which:
            got = run(name, **given | {k: unaligned(given[k]) for k in some})
            assert all(same(x, y) for x, y in zip(got, want)), some


@pytest.mark.parametrize("name", PRODUCT)
def test_layouts(device, name):
    """Weights, and every map but the first, in any layout; the results' channels are innermost."""
    given = operands(name, CONV, torch.bfloat16, device)
    want = run(name, **given)
    other = {k: v.contiguous() for k, v in given.items() if isinstance(v, torch.Tensor) and k != PRODUCT[name][0]}
    got = run(name, **given | other)
    assert all(torch.equal(x, y) for x, y in zip(got, want))
    assert all(r.is_contiguous(memory_format=torch.channels_last) for r in (*got, *want))
    given = operands(name, DENSE, torch.bfloat16, device)
    sliced = {k: torch.stack([v, v], -1)[..., 1] for k, v in given.items() if isinstance(v, torch.Tensor)}
    assert all(torch.equal(x, y) for x, y in zip(run(name, **given | sliced), run(name, **given)))


@pytest.mark.parametrize("name", PAIRS)
def test_repeats(device, name):
    for layer, dtype in ((CONV, torch.bfloat16), (CONV, torch.float32), (ODD, torch.float16)):
        given = operands(name, layer, dtype, device, "relative")
        repeats(device, lambda given=given: run(name, **given, poison=True))


class Calls(TorchDispatchMode):
    """Arguments of the extension's operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fisnet":
            self.seen.append(args)
        return func(*args, **(kwargs or {}))


def operator_arguments(name, layer, dtype, device):
    with Calls() as calls:
        run(name, **operands(name, layer, dtype, device, "relative"))
    return calls.seen[0]


@pytest.mark.parametrize("name", PAIRS)
def test_operators(device, name):
    one, odd = Layer(1, 1, 1, (1, 1), 1), Layer(2, 5, 7, (4,), 0)
    for layer, dtype in ((CONV, torch.bfloat16), (DENSE, torch.float32), (one, torch.float32), (odd, torch.float64)):
        opcheck(name, *operator_arguments(name, layer, dtype, device))


def last(t):
    return t.contiguous(memory_format=torch.channels_last)


# (argument, what becomes of it, what the operator says)
REFUSALS = {
    "dual_fprop": (
        (0, lambda x: x[0], r"x must be \[N, C, H, W\], got 3 axes"),
        (0, torch.Tensor.contiguous, "x must be dense and channels_last"),
        (0, lambda x: last(torch.cat([x, x], 1)), r"x must be \[2, 16, 7, 6\], got \[2, 32, 7, 6\]"),
        (1, torch.Tensor.double, "W must be Float, got Double"),
        (1, torch.Tensor.contiguous, "W must be dense and channels_last"),
        (2, lambda stride: 0, "stride and dilation must be at least 1"),
        (8, torch.Tensor.double, "sign must be Float, got Double"),
        (9, lambda shift: shift[:-1], "shift must be a contiguous vector of 24 values"),
        (10, lambda shift: shift[:1], "shift_plus must be a contiguous vector of 24 values"),
        (11, lambda tile: 0, "there is no tile shape 0"),
    ),
    "dual_transposed_phi": (
        (0, lambda s: s[:1], r"s_plus must be \[1, 24, 4, 3\], got \[2, 24, 4, 3\]"),
        (1, torch.Tensor.contiguous, "s_plus must be dense and channels_last"),
        (9, lambda height: 12, r"s must be \[2, 24, 6, 3\], got \[2, 24, 4, 3\]"),
        (11, lambda a: None, "a and z_plus come together"),
        (11, lambda a: a[:1], r"a must be \[2, 16, 7, 6\], got \[1, 16, 7, 6\]"),
        (12, torch.Tensor.double, "z_plus must be Float, got Double"),
        (14, lambda eps_n: eps_n[:1], "eps must have one value a sample"),
        (16, lambda tile: 3, "there is no tile shape 3"),
    ),
    "dual_fprop_adjoint": (
        (1, torch.Tensor.double, "g_plus_bar must be Float, got Double"),
        (9, lambda a: a[:1], r"a must be \[2, 24, 4, 3\], got \[1, 24, 4, 3\]"),
        (10, torch.Tensor.contiguous, "s must be dense and channels_last"),
        (11, lambda s_plus: last(s_plus[..., :2]), r"s_plus must be \[2, 24, 4, 3\], got \[2, 24, 4, 2\]"),
        (12, lambda z_plus: z_plus.bfloat16(), "z_plus must be Float, got BFloat16"),
        (14, torch.Tensor.double, "eps must be Float, got Double"),
        (16, lambda tile: 0, "there is no tile shape 0"),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_operators_refuse(device, name):
    args = operator_arguments(name, CONV, torch.float32, device)
    for at, change, message in REFUSALS[name]:
        with pytest.raises(RuntimeError, match=f"{name}: {message}"):
            getattr(torch.ops.fisnet, name)(*args[:at], change(args[at]), *args[at + 1 :])


@pytest.mark.parametrize("name", PRODUCT)
def test_serves(device, name):
    given = operands(name, CONV, torch.float32, device)
    first, second = PRODUCT[name][0], PRODUCT[name][-2]
    serves = kernel(name, given).serves
    assert serves(**given) == ""
    assert serves(**given | {"geometry": CONV.geometry._replace(groups=2)}) == "groups"
    assert serves(**given | {"geometry": CONV.geometry._replace(spatial=1)}) == "a 1-d convolution"
    assert serves(**given | {"W": given["W"].double()}) == "operands of several dtypes"
    assert serves(**given | {second: given[second].double()}) == "operands of several dtypes"
    assert serves(**given | {first: given[first].contiguous()}) == "a map whose channels are not innermost"
    assert serves(**given | {first: given[first][:0]}) == "no elements"
