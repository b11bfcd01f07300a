"""`fprop_adjoint` fused: the adjoint of a transposed product and of the phi before it, against the reference."""

import itertools

import pytest
import torch
from common import DTYPES, opcheck, repeats, run, same, unaligned
from helpers import randn
from linear_cases import LAYERS, Layer, laid_out, within_rounding

from fisnet_cuda import _backend
from fisnet_cuda.ops.tiles import TILES

NAME, PRODUCT = "fprop_adjoint", ("g_bar", "W")
# channels that fill vectors of every dtype, and do not; several tiles of rows and of columns
WIDE, ODD, DENSE = Layer(2, 72, 136, (9, 5), 1), Layer(2, 5, 7, (6, 6), 3, padding=1), Layer(70, 16, 72, (), 0)
STRIDED = Layer(2, 24, 16, (7, 9), 3, stride=2, padding=1)


def operands(layer, dtype, device, maps=1, eps=0.1, factor=True, join=True):
    """Operands of one call; a sample, a channel and half of all units are dead. ``s`` is phi(a) times something."""

    def on(t):
        return laid_out(t, dtype, device)

    a = layer.map_out(4).relu()
    channels = a.movedim(1 if layer.kernel else -1, -1)
    if layer.n > 1:
        a[0] = 0
    if layer.c_out > 2:
        channels[..., 2] = 0
    if eps == "relative":
        eps = (0.1 + torch.arange(layer.n).double()).view(-1, *[1] * (a.dim() - 1))
    s = (a / (a + eps)).nan_to_num().repeat_interleave(maps, 0) * layer.map_out(5, maps)
    given = {"g_bar": on(layer.map_in(1, maps)), "W": on(layer.weight()), "geometry": layer.geometry, "factor": None}
    if factor:
        given["factor"] = randn(layer.c_out, seed=3).to(device, dtype)  # of either sign
        given["factor"][1:2] = 0
    given |= {"a": on(a), "s": on(s), "eps": on(eps) if isinstance(eps, torch.Tensor) else eps}
    return given | {"join": on(layer.map_out(6, maps)) if join else None}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layers(device, layer, dtype):
    within_rounding(NAME, PRODUCT, **operands(layer, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [ODD, STRIDED, DENSE, Layer(2, 16, 8, (5,), 0)], ids=str)
def test_maps_and_epsilons(device, layer, dtype):
    for maps, eps in itertools.product((1, 3), (0.1, 0.0, "relative")):
        got = within_rounding(NAME, PRODUCT, **operands(layer, dtype, device, maps, eps))
        assert (got[1] is None) == (eps == 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_absent_operands(device, dtype):
    for layer, maps, factor, join in itertools.product((ODD, STRIDED), (1, 3), (False, True), (False, True)):
        got = within_rounding(NAME, PRODUCT, **operands(layer, dtype, device, maps, "relative", factor, join))
        assert (got[2] is None) == (not factor)


def test_every_tile(device):
    for dtype, layer, maps in itertools.product(DTYPES[:3], (WIDE, DENSE), (1, 3)):
        given = operands(layer, dtype, device, maps)
        tiles = _backend.kernel(NAME, "auto", given["g_bar"]).tiles(**given)
        assert set(tiles) == set(TILES)
        for tile in tiles:
            within_rounding(NAME, PRODUCT, tile, **given)


def test_what_is_not_needed_is_not_made(device):
    """... and changes nothing else, bit by bit. Without either, s is not read."""
    for layer, maps in itertools.product((STRIDED, ODD), (1, 3)):
        given = operands(layer, torch.bfloat16, device, maps)
        want = run(NAME, **given)
        for need_a, need_factor in itertools.product((False, True), repeat=2):
            more = {"s": torch.full_like(given["s"], torch.nan)} if not (need_a or need_factor) else {}
            got = run(NAME, **given | more, need_a=need_a, need_factor=need_factor, poison=True)
            assert [t is not None for t in got] == [True, need_a, need_factor]
            assert all(t is None or torch.equal(t, w) for t, w in zip(got, want))


def test_dead_units_get_nothing(device):
    for maps, eps in itertools.product((1, 3), (0.1, "relative")):
        given = operands(STRIDED, torch.float32, device, maps, eps)
        g_bar, a_bar, _ = run(NAME, **given, poison=True)
        dead = given["a"] == 0
        assert dead[0].all()
        assert dead[:, 2].all()
        assert not a_bar[dead].any()
        assert not g_bar[dead.repeat_interleave(maps, 0)].any()


def test_one_epsilon_a_sample_may_be_zero(device):
    """phi is then the ReLU's derivative in that sample, and its a_bar 0."""
    for maps in (1, 3):
        given = operands(STRIDED, torch.float64, device, maps, "relative")
        given["eps"][1] = 0
        g_bar, a_bar, factor_bar = run(NAME, **given, poison=True)
        want = run(NAME, **given | {"eps": 0.0})
        assert torch.equal(g_bar[maps:], want[0][maps:])
        assert not a_bar[1].any()
        assert torch.equal(factor_bar, want[2])


def test_tiny_activations(device):
    """Ratios are formed first: neither s g_bar nor a squared underflows on the way."""
    for maps in (1, 3):
        given = operands(STRIDED, torch.float32, device, maps, 1e-30)
        for name in ("a", "s"):
            given[name] = given[name] * 1e-30
        _, a_bar, _ = within_rounding(NAME, PRODUCT, **given)
        assert a_bar.abs().max() > 1e-3


def test_schedules(device):
    for layer, maps in ((WIDE, 1), (STRIDED, 3), (ODD, 3)):
        given = operands(layer, torch.bfloat16, device, maps)
        repeats(device, lambda given=given: run(NAME, **given, poison=True))


@pytest.mark.parametrize("maps", [1, 3])
def test_unaligned(device, maps):
    """One operand behind a 16-byte boundary: the smallest shape runs, whatever is asked for, and its column sums count its rows."""
    given = operands(WIDE, torch.bfloat16, device, maps)
    want = run(NAME, **given)
    for name in ("W", "a", "s", "join", "factor"):
        got = within_rounding(
            NAME, PRODUCT, "128x128", **given | {name: unaligned(given[name].float() if name == "factor" else given[name])}
        )
        assert all(same(g, w) for g, w in zip(got[:2], want[:2]))
    g_bar = unaligned(given["g_bar"])
    within_rounding(NAME, PRODUCT, **given | {"g_bar": g_bar})


def test_other_layouts(device):
    """Operands beside g_bar may lie in any order of axes."""
    given = operands(STRIDED, torch.bfloat16, device, 3)
    want = run(NAME, **given)
    other = {name: given[name].contiguous() for name in ("W", "a", "s", "join")}
    assert not other["W"].is_contiguous(memory_format=torch.channels_last)
    got = run(NAME, **given | other)
    assert all(torch.equal(g, w) for g, w in zip(got, want))
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert got[1].is_contiguous(memory_format=torch.channels_last)


def test_serves(device):
    kernel = _backend.kernel(NAME, "auto", torch.empty(0, device=device))
    given = operands(STRIDED, torch.float32, device)
    assert kernel.serves(**given) == ""
    assert "innermost" in kernel.serves(**given | {"g_bar": given["g_bar"].contiguous()})
    assert "dtypes" in kernel.serves(**given | {"join": given["join"].double()})
    assert "groups" in kernel.serves(**given | {"geometry": given["geometry"]._replace(groups=2)})
    assert "no elements" in kernel.serves(**given | {"g_bar": given["g_bar"][:0]})
    with pytest.raises(ValueError, match="tile must be one of"):
        kernel(**given, tile="256x256")


def args(device, dtype=torch.bfloat16, **changes):
    """Operands of the operator itself."""
    given = operands(STRIDED, dtype, device, maps=3)
    named = {
        "g_bar": given["g_bar"], "W": given["W"], "geometry": (2, 2, 1, 1, 1, 1), "factor": given["factor"].float(), "a": given["a"],
        "s": given["s"], "eps": 0.1, "eps_n": None, "join": given["join"], "need_a": True, "need_factor": True, "tile": 2,
    }  # fmt: skip
    named |= changes
    return [v for k, value in named.items() for v in (value if k == "geometry" else (value,))]


@pytest.mark.parametrize("need_a", [False, True])
@pytest.mark.parametrize("need_factor", [False, True])
def test_operator(device, need_a, need_factor):
    opcheck(NAME, *args(device, need_a=need_a, need_factor=need_factor))


def test_operator_without_rows(device):
    g_bar, *_ = args(device)
    a = args(device)[9]
    none = args(device, g_bar=g_bar[:0], a=a[:0], s=a[:0], join=None)
    g_bar_in, a_bar, factor_bar = torch.ops.fisnet.fprop_adjoint(*none, True)
    assert g_bar_in.shape == a_bar.shape == a[:0].shape
    assert factor_bar.shape == (16,)


def test_messages(device):
    good = args(device)
    g_bar, W, a, s = good[0], good[1], good[9], good[10]
    for message, changes in {
        "g_bar must be dense and channels_last": {"g_bar": g_bar.contiguous()},
        "g_bar must be .N, C, H, W.": {"g_bar": g_bar[0]},
        "W must be BFloat16": {"W": W.float()},
        "g_bar must be .6, 23": {"W": W[:, :23].contiguous(memory_format=torch.channels_last)},
        "stride and dilation must be at least 1": {"geometry": (0, 1, 1, 1, 1, 1)},
        "a must be .N, C, H, W.": {"a": a[0]},
        "relevance must be .N.K": {"a": torch.cat([a, a])},
        "a must be .2, 16, 4, 5.": {"a": a[:, :, :-1].contiguous(memory_format=torch.channels_last)},
        "s must be .6, 16": {"s": s[:-1]},
        "join must be": {"join": s[:-1]},
        "factor must be Float": {"factor": torch.ones(16, device=device, dtype=torch.bfloat16)},
        "factor must be a contiguous vector of 16": {"factor": torch.ones(8, device=device)},
        "eps must have one value a sample": {"eps_n": a.new_ones(3)},
        "need_factor needs factor": {"factor": None},
        "there is no tile shape 3": {"tile": 3},
    }.items():
        with pytest.raises(RuntimeError, match=f"fprop_adjoint: {message}"):
            torch.ops.fisnet.fprop_adjoint(*args(device, **changes))
