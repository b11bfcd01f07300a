"""`transposed_phi` fused: LRP through a convolution or dense layer and the ReLU before it, against the reference and an explicit
matrix."""

import itertools
import math

import pytest
import torch
from common import DTYPES, opcheck, repeats, unaligned
from helpers import close, randn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_cases import (
    LAYERS,
    TILED,
    Layer,
    blocks_of,
    both,
    laid_out,
    layers,
    tiles_of,
    transposed_by_matrix,
    whole,
    within_rounding,
    without_bank_conflicts,
)
from torch import Tensor

from fisnet_cuda import _backend, reference
from fisnet_cuda.ops.tiles import TILES
from fisnet_cuda.reference import conv_geometry

HALF = (torch.bfloat16, torch.float16)
TENSOR_CORES = (torch.float32, *HALF)
POINTWISE = Layer(2, 72, 136, (6, 5), 1)
RAGGED = Layer(2, 5, 7, (6, 6), 3, padding=1)
STRIDED = Layer(2, 24, 16, (7, 9), 3, stride=2, padding=1)
DENSE = Layer(7, 40, 16, (), 0)
PROPERTY = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def operands(layer, dtype, device, maps=1, phi=True, skip=True, bn=False, relative=False, eps=0.1, factor=True):
    def on(t):
        return laid_out(t, dtype, device)

    given = {"s": on(layer.map_out(1, maps)), "W": on(layer.weight()), "geometry": layer.geometry}
    given["in_size"] = layer.size if layer.kernel else ()
    if factor:
        given["factor"] = randn(layer.c_out, seed=3).to(device, dtype)
    if phi:
        a = on(layer.map_in(4).relu())
        given |= {"a": a, "eps": eps if not relative else on(0.1 + torch.arange(layer.n).double().view(-1, *[1] * (a.dim() - 1)))}
    if skip:
        given["skip"] = on(layer.map_in(5, maps))
    if bn:
        given |= {"scale": randn(layer.c_in, seed=6).to(device, dtype), "rest": on(layer.map_in(7, maps))}
    return given


def check(tile=None, **operands):
    return within_rounding("transposed_phi", ("s", "W"), tile, **operands)


def kernel(given, **options) -> tuple[Tensor, Tensor]:
    run = _backend.kernel("transposed_phi", "auto", given["s"])
    assert run is not reference.transposed_phi
    return run(**given, poison=True, **options)


# ---- layers, operands, tiles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layers(device, layer, dtype):
    check(**operands(layer, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [POINTWISE, RAGGED, STRIDED, DENSE], ids=str)
def test_operands(device, layer, dtype):
    """Every epilogue: maps, phi or none, skip, BatchNorm behind it, absolute and relative epsilon."""
    for maps, phi, skip, bn, relative in itertools.product((1, 3), *[(False, True)] * 4):
        if phi or not (bn or relative):
            check(**operands(layer, dtype, device, maps, phi, skip, bn, relative))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_absent_results_and_operands(device, dtype):
    """Without `keep_s`, with a scale but no rest, without a factor, where no scale makes `out` and `s'` one."""
    given = operands(STRIDED, dtype, device, 3, bn=True)
    out, s = kernel(given)
    again, nothing = kernel(given, keep_s=False)
    assert torch.equal(again, out)
    assert nothing.numel() == 0
    del given["rest"]
    check(**given)
    del given["scale"]
    out, s = check(**given)
    assert out is s
    check(**operands(STRIDED, dtype, device, factor=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [POINTWISE, RAGGED, DENSE], ids=str)
def test_epsilon_of_zero(device, layer, dtype):
    """phi is then the ReLU's derivative, exactly: what is dead gets 0, what is alive all."""
    given = operands(layer, dtype, device, maps=3, eps=0.0)
    _, s = check(**given)
    alone = kernel({k: v for k, v in given.items() if k not in ("a", "eps")})[0]
    alive = (given["a"] > 0).repeat_interleave(3, 0)
    assert torch.equal(s, torch.where(alive, alone, torch.zeros_like(alone)))


@pytest.mark.parametrize("dtype", TENSOR_CORES, ids=str)
@pytest.mark.parametrize("layer", TILED, ids=str)
def test_every_tile(device, layer, dtype):
    """Every shape runs, in so many blocks; what it gives is within rounding, and exact where numbers are whole."""
    given = operands(layer, dtype, device, bn=True)
    assert sorted(tiles_of("transposed_phi", given)) == sorted(TILES)
    plain = {"s": whole(given["s"]), "W": whole(given["W"]), "geometry": given["geometry"], "in_size": given["in_size"]}
    want = transposed_by_matrix(layer, plain["s"], plain["W"]).to(dtype)
    for tile, (_, m, n, _) in TILES.items():
        check(tile, **given)
        assert torch.equal(kernel(plain, tile=tile)[0].cpu(), want), tile
        if device == "cpu":
            strides = both(layer.stride) if layer.kernel else (1, 1)
            rows = layer.n * math.prod(-(-size // stride) for size, stride in zip(layer.size, strides))
            blocks = math.prod(strides) * -(-rows // m) * -(-layer.c_in // n)
            assert blocks_of(lambda tile=tile: kernel(plain, tile=tile)) == blocks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_whole_vectors(device, dtype):
    """One tile shape is compiled for channels that are no multiple of 16 bytes, and for float64."""
    given = operands(RAGGED, dtype, device)
    assert tiles_of("transposed_phi", given) == ("64x64",)
    with pytest.raises(ValueError, match="tile must be one of 64x64 here, got '128x128'"):
        kernel(given, tile="128x128")
    # as wide in one direction only
    for layer in (Layer(3, 7, 16, (5, 4), 3, padding=1), Layer(3, 16, 7, (5, 4), 3, padding=1)):
        check(**operands(layer, dtype, device))


# ---- random geometry -------------------------------------------------------------------------------------------------------


@PROPERTY
@given(layer=layers(), maps=st.sampled_from([1, 3]), skip=st.booleans(), bn=st.booleans(), relative=st.booleans())
def test_any_geometry_in_float64(device, layer, maps, skip, bn, relative):
    check(**operands(layer, torch.float64, device, maps, True, skip, bn, relative))


@PROPERTY
@given(layer=layers(), dtype=st.sampled_from(TENSOR_CORES), maps=st.sampled_from([1, 3]), bn=st.booleans())
def test_any_geometry(device, layer, dtype, maps, bn):
    check(**operands(layer, dtype, device, maps, bn=bn))


@PROPERTY
@given(layer=st.one_of(layers(), layers(wide=True)), dtype=st.sampled_from(DTYPES), tile=st.sampled_from(list(TILES)))
def test_whole_numbers_are_exact(device, layer, dtype, tile):
    """Every element, bit by bit, beside the explicit matrix, which knows nothing of convolutions."""
    s, W = (laid_out(whole(t), dtype, device) for t in (layer.map_out(1), layer.weight()))
    given = {"s": s, "W": W, "geometry": layer.geometry, "in_size": layer.size if layer.kernel else ()}
    tile = tile if tile in tiles_of("transposed_phi", given) else None
    assert torch.equal(kernel(given, tile=tile)[0].cpu(), transposed_by_matrix(layer, s, W).to(dtype))


@pytest.mark.parametrize("layer", [*LAYERS, *TILED], ids=str)
def test_explicit_matrix(device, layer):
    """In float64, and LRP-epsilon as it is defined: each unit's relevance is its share of what its outputs hand on."""
    given = operands(layer, torch.float64, device, skip=False, factor=False)
    _, s = kernel(given)
    want = transposed_by_matrix(layer, given["s"], given["W"]).to(device)
    close(s, given["a"] * want / (given["a"] + 0.1))
    close(kernel({k: v for k, v in given.items() if k not in ("a", "eps")})[0], want)


# ---- schedules and bank conflicts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [RAGGED, STRIDED, Layer(1, 72, 40, (9, 9), 3, padding=1), DENSE], ids=str)
def test_schedules(device, layer, dtype):
    """Bit by bit the same in every order of threads and blocks, wherever copies land."""
    given = operands(layer, dtype, device, maps=3, bn=True)
    for tile in tiles_of("transposed_phi", given):
        repeats(device, lambda tile=tile: kernel(given, tile=tile))


@pytest.mark.parametrize("dtype", TENSOR_CORES, ids=str)
@pytest.mark.parametrize("layer", [*TILED, STRIDED], ids=str)
def test_no_bank_conflicts(device, layer, dtype):
    given = operands(layer, dtype, device)
    for tile in tiles_of("transposed_phi", given):
        with without_bank_conflicts(device) as seen:
            kernel(given, tile=tile)
        assert device != "cpu" or (seen["smem_loads"] > 0) == (dtype == torch.float32)  # weights that ldmatrix cannot transpose


# ---- layouts -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(device, dtype):
    """Contiguous operands, slices of larger maps and of channels, transposed axes: as channels_last ones, bit by bit."""
    given = operands(STRIDED, dtype, device, maps=3, bn=True)
    out, s = kernel(given)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.stride() == s.stride()
    names = ("s", "W", "a", "skip", "rest")

    def in_larger(t: Tensor, axis: int) -> Tensor:
        shape = [2 * size if d == axis else size for d, size in enumerate(t.shape)]
        larger = laid_out(torch.full(shape, math.nan), t.dtype, device)
        part = larger.narrow(axis, t.shape[axis] // 2, t.shape[axis])
        return part.copy_(t)

    layouts = [torch.Tensor.contiguous, *(lambda t, axis=axis: in_larger(t, axis) for axis in range(4))]
    layouts += [lambda t: laid_out(t.mT.contiguous(), dtype, device).mT]
    for change in layouts:
        for changed in (*[(name,) for name in names], names):
            again = kernel(given | {name: change(given[name]) for name in changed})
            assert torch.equal(torch.stack(again), torch.stack((out, s))), changed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [STRIDED, DENSE], ids=str)
def test_unaligned(device, layer, dtype):
    """One element behind a 16-byte boundary, any or all of them; with whatever tile the aligned ones would have."""
    given = operands(layer, dtype, device, maps=3, bn=True)
    names = ("s", "W", "a", "skip", "rest", "scale")
    for changed in (*[(name,) for name in names], names):
        some = given | {name: unaligned(given[name]) for name in changed}
        for tile in tiles_of("transposed_phi", some):
            check(tile, **some)


@pytest.mark.parametrize("shape", [(2,), (2, 3), ()], ids=str)
def test_dense_axes(device, shape):
    """Axes between samples and channels are positions, in whatever order they lie in memory."""
    layer = Layer(3, 16, 24, shape, 0)
    for maps in (1, 3):
        out, _ = check(**operands(layer, torch.bfloat16, device, maps, relative=True))
        assert out.shape == (3 * maps, *shape, 16)
        assert out.is_contiguous()
    # a BatchNorm has its channels right behind the samples
    given = operands(layer, torch.bfloat16, device, bn=True)
    serves = _backend.kernel("transposed_phi", "auto", given["s"]).serves
    assert serves(**given) == ("a scale of another axis" if shape else "")
    given = operands(layer, torch.bfloat16, device)
    want = kernel(given)[0]
    turned = given | {name: given[name].transpose(0, -1).contiguous().transpose(0, -1) for name in ("s", "a", "skip", "W")}
    assert torch.equal(kernel(turned)[0], want)


@pytest.mark.parametrize("change", ["channels_last", "contiguous"])
def test_one_channel_or_pixel(device, change):
    """Layouts that are both at once."""
    one_channel, one_pixel = Layer(2, 1, 1, (4, 3), 3, padding=1), Layer(2, 8, 8, (1, 1), 1)
    for layer in (one_channel, one_pixel, Layer(1, 1, 8, (1, 5), (1, 3)), Layer(2, 8, 1, (5, 1), (3, 1))):
        given = operands(layer, torch.float32, device, maps=3)
        if change == "contiguous":
            given |= {name: given[name].contiguous() for name in ("W", "a", "skip")}
        check(**given)


# ---- unusual numbers ------------------------------------------------------------------------------------------------------


def plain_operands(layer, dtype, device) -> dict:
    """Whole numbers, no weight of which is 0."""
    W = whole(layer.weight())
    s, W = (laid_out(t, dtype, device) for t in (whole(layer.map_out(1)), torch.where(W == 0, torch.ones_like(W), W)))
    return {"s": s, "W": W, "geometry": layer.geometry, "in_size": layer.size if layer.kernel else ()}


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [RAGGED, STRIDED, Layer(1, 72, 24, (9, 8), 3, padding=1), DENSE], ids=str)
def test_not_finite(device, layer, dtype, odd):
    """NaN or infinity in s is in all outputs that its unit sees, and in no others, which are the same bit by bit."""
    given = plain_operands(layer, dtype, device)
    for place in (0, given["s"].numel() // 2, -1):
        s = given["s"].clone()
        flat = s.permute(0, 2, 3, 1).flatten() if layer.kernel else s.flatten()
        flat[place] = odd
        s = flat.view(s.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2) if layer.kernel else flat.view(s.shape)
        seen = transposed_by_matrix(layer, (s != given["s"]).double(), torch.ones_like(given["W"])).to(device) > 0
        out, want = kernel(given | {"s": s})[0], kernel(given)[0]
        assert not out[seen].isfinite().any()
        assert math.isnan(odd) or not out[seen].isnan().any()
        assert seen.any()
        assert torch.equal(out[~seen], want[~seen])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_in_other_operands(device, dtype):
    """skip, rest and a spoil their own elements only."""
    given = operands(STRIDED, dtype, device, bn=True)
    want, _ = kernel(given)
    for name in ("skip", "rest", "a"):
        changed = given[name].clone()
        changed[1, 3, 2, 5] = math.nan
        out, _ = kernel(given | {name: changed})
        spoilt = torch.zeros_like(out, dtype=torch.bool)
        spoilt[1, 3, 2, 5] = True
        assert torch.equal(out.isnan(), spoilt), name
        assert torch.equal(out[~spoilt], want[~spoilt]), name
    scale = given["scale"].clone()
    scale[3] = math.inf
    out, s = kernel(given | {"scale": scale})
    assert not out[:, 3].isfinite().any()
    assert s.isfinite().all()
    keep = [c for c in range(STRIDED.c_in) if c != 3]
    assert torch.equal(out[:, keep], want[:, keep])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [RAGGED, STRIDED, DENSE], ids=str)
def test_zeros(device, layer, dtype):
    """Of both signs: 0, never NaN; without epsilon too."""
    for eps, name, zero in itertools.product((0.1, 0.0), ("s", "W", "a"), (0.0, -0.0)):
        given = operands(layer, dtype, device, skip=False, eps=eps)
        out, _ = kernel(given | {name: torch.full_like(given[name], zero)})
        assert (out == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_and_small(device, dtype):
    """Sums that are too large for the dtype are infinite, as in the reference; the smallest numbers are not lost."""
    given = plain_operands(Layer(2, 16, 24, (5, 4), 3, padding=1), dtype, device)
    exact = transposed_by_matrix(Layer(2, 16, 24, (5, 4), 3, padding=1), given["s"], given["W"]).to(device)
    # accumulation has float32's range: half precision alone can overflow in the result
    factor = 2.0**14 if dtype == torch.float16 else 1.0
    out, _ = kernel(given | {"W": given["W"] * factor})
    want = (exact * factor).to(dtype)
    assert torch.equal(out, want)
    assert want.isinf().any() == (dtype == torch.float16)
    small = {torch.float64: 2.0**-1060, torch.float16: 2.0**-24}.get(dtype, 2.0**-130)
    out, _ = kernel(given | {"s": given["s"] * small})
    assert torch.equal(out, (exact * small).to(dtype))
    assert (out != 0).any()


@pytest.mark.parametrize("dtype", TENSOR_CORES, ids=str)
def test_sums_are_float32(device, dtype):
    """4096 products of which each is below the spacing of 16-bit numbers around their sum."""
    s, W = torch.ones(1, 4096), torch.full((4096, 8), 2.0**-8)
    given = {"s": s.to(device, dtype), "W": W.to(device, dtype), "geometry": DENSE.geometry, "in_size": ()}
    assert (kernel(given)[0] == 16).all()


# ---- the operator ----------------------------------------------------------------------------------------------------------


def arguments(layer, dtype, device, **options) -> dict:
    """What the operator takes."""
    given = operands(layer, dtype, device, **options)
    sides = [v for name in ("stride", "padding", "dilation") for v in both(getattr(layer, name))]
    named = dict(zip(("stride_y", "stride_x", "pad_y", "pad_x", "dilation_y", "dilation_x"), sides))
    scale = given["scale"].to(torch.float64 if dtype == torch.float64 else torch.float32) if "scale" in given else None
    size = dict(zip(("height", "width"), layer.size))
    return {
        "s": given["s"], "W": given["W"], **named, **size, "a": given.get("a"), "eps": 0.1, "eps_n": None, "skip": given.get("skip"),
        "scale": scale, "rest": given.get("rest"), "keep_s": True, "tile": 2,
    }  # fmt: skip


@pytest.mark.parametrize("layer", [RAGGED, STRIDED, Layer(2, 1, 8, (1, 1), 1)], ids=str)
def test_operator(device, layer):
    """Fake shapes and strides included."""
    for dtype, phi, bn, keep_s in itertools.product(DTYPES[:2], (False, True), (False, True), (False, True)):
        if phi or not bn:
            named = arguments(layer, dtype, device, maps=3, phi=phi, bn=bn) | {"keep_s": keep_s}
            opcheck("transposed_phi", *named.values())


WRONG = {
    "a must be [2, 24, 7, 9], got [2, 24, 7, 8]": lambda t: {"a": channels_last(2, 24, 7, 8)},
    "s must be [6, 16, 4, 5], got [6, 16, 5, 5]": lambda t: {"s": channels_last(6, 16, 5, 5)},
    "s must be dense and channels_last": lambda t: {"s": t["s"].contiguous()},
    "W must be dense and channels_last": lambda t: {"W": t["W"].contiguous()},
    "W must be [N, C, H, W], got 2 axes": lambda t: {"W": t["W"][:, :, 0, 0]},
    "s must be [N, C, H, W], got 3 axes": lambda t: {"s": t["s"][0]},
    "W must be Float, got Double": lambda t: {"W": t["W"].double()},
    "skip must be [6, 24, 7, 9], got [5, 24, 7, 9]": lambda t: {"skip": t["skip"][:5]},
    "rest must be [6, 24, 7, 9], got [6, 24, 7, 8]": lambda t: {"rest": channels_last(6, 24, 7, 8)},
    "relevance must be [N*K, ...] over the activation's [N, ...]": lambda t: {"s": t["s"][:5]},
    "scale must be a contiguous vector of 24 values": lambda t: {"scale": t["scale"][:5]},
    "scale must be Float, got Double": lambda t: {"scale": t["scale"].double()},
    "rest needs scale": lambda t: {"scale": None},
    "scale and eps need a": lambda t: {"a": None},
    "eps must have one value a sample": lambda t: {"eps_n": torch.ones(3)},
    "stride and dilation must be at least 1, padding at least 0": lambda t: {"stride_x": 0},
    "6 samples of 32768 x 16384 are too many positions, or fewer than none": lambda t: {"height": 2**15, "width": 2**14},
    "6 samples of -1 x 9 are too many positions, or fewer than none": lambda t: {"height": -1},
    "there is no tile shape 3": lambda t: {"tile": 3},
}


def channels_last(*shape):
    return torch.zeros(*shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("message", WRONG)
def test_operator_says_what_is_wrong(device, message):
    named = arguments(STRIDED, torch.float32, device, maps=3, bn=True)
    named |= {k: v.to(device) if isinstance(v, Tensor) else v for k, v in WRONG[message](named).items()}
    with pytest.raises(RuntimeError) as found:
        torch.ops.fisnet.transposed_phi(*named.values())
    assert f"transposed_phi: {message}" in str(found.value).replace('"', ""), str(found.value)


def test_what_it_serves(device):
    given = operands(STRIDED, torch.bfloat16, device, maps=3)
    serves = _backend.kernel("transposed_phi", "auto", given["s"]).serves
    assert serves(**given) == ""
    assert serves(**operands(DENSE, torch.float64, device)) == ""
    assert serves(**given | {"geometry": conv_geometry(2, 2, 1, 1, 2)}) == "groups"
    assert serves(**given | {"geometry": conv_geometry(1, 2, 1, 1, 1)}) == "a 1-d convolution"
    assert serves(**given | {"W": given["W"].float()}) == "operands of several dtypes"
    assert serves(**given | {"a": given["a"].float()}) == "operands of several dtypes"
    assert serves(**given | {"s": given["s"][:0]}) == "no elements"
    assert serves(**given | {"s": given["s"].contiguous()}) == "a map whose channels are not innermost"
    most = (2**31 - 128) // 6  # of one of s's samples; the result may have many more than s
    assert serves(**given | {"in_size": (1, most)}) == ""
    assert serves(**given | {"in_size": (1, most + 1)}) == "a map of more than 2^31 - 128 positions"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("first", "channels"), [(0, 40), (8, 40), (3, 29)], ids=str)
def test_rest_of_a_larger_map(device, first, channels, dtype):
    """`rest` may be neighbouring channels of a map, as a dense block has them: read in place, wide where they are aligned."""
    layer = next(layer for layer in LAYERS if layer.kernel == 3 and layer.c_in == 16)
    given = operands(layer, dtype, device, maps=2, bn=True)
    size = layer.map_in(0).shape[2:]
    whole_map = laid_out(randn(2 * layer.n, channels, *size, seed=9), dtype, device)
    part = whole_map[:, first : first + layer.c_in]
    from fisnet_cuda.ops.cuda.linear import as_slice  # needs the extension

    assert as_slice(part, layer.geometry) is part
    want = check(None, **given | {"rest": part.contiguous(memory_format=torch.channels_last)})
    got = check(None, **given | {"rest": part})
    assert all(torch.equal(g, w) for g, w in zip(got, want))


def test_rest_that_is_no_slice(device):
    """Every other channel, or rows with a gap: copied."""
    from fisnet_cuda.ops.cuda.linear import as_slice

    layer = next(layer for layer in LAYERS if layer.kernel == 3 and layer.c_in == 16)
    whole_map = laid_out(randn(2, 32, 9, 9, seed=9), torch.float32, device)
    for part in (whole_map[:, ::2], whole_map[:, :16, 1:], whole_map[:, :16, :, ::2], whole_map[:1, :16].expand(2, -1, -1, -1)):
        assert as_slice(part, layer.geometry).is_contiguous(memory_format=torch.channels_last)
