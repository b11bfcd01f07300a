"""Layers for the fused kernels of linear maps, their operands, and how results are compared: by the error rule, exactly (small
whole numbers), and with an explicit matrix."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from emulator import reset_stats, stats
from helpers import EXACT, error, randn
from hypothesis import strategies as st
from torch import Tensor

from fisnet_cuda import _backend, reference
from fisnet_cuda.ops.tiles import PAIR_TILES, TILES
from fisnet_cuda.reference import Geometry, conv_geometry, linear_geometry

Both = int | tuple[int, int]  # of both axes, or of each


def both(v: Both) -> tuple[int, int]:
    return v if isinstance(v, tuple) else (v, v)


class Layer(NamedTuple):
    """A convolution, ``kernel`` taps along each axis; ``kernel`` 0 is a dense layer (``size`` then counts rows beside the batch)."""

    n: int
    c_in: int
    c_out: int
    size: tuple[int, ...]
    kernel: Both
    stride: Both = 1
    padding: Both = 0
    dilation: Both = 1

    def __str__(self) -> str:
        def text(v: Both) -> str:
            return str(v) if isinstance(v, int) else ",".join(map(str, v))

        taps = "x".join(map(str, both(self.kernel)))
        kind = f"{taps}s{text(self.stride)}p{text(self.padding)}d{text(self.dilation)}" if self.kernel else "dense"
        return f"{self.n}x{self.c_in}-{self.c_out}x{'x'.join(map(str, self.size))}-{kind}"

    @property
    def taps(self) -> int:
        """How many taps there are; 1 in a dense layer."""
        return both(self.kernel)[0] * both(self.kernel)[1] or 1

    @property
    def geometry(self) -> Geometry:
        return conv_geometry(2, self.stride, self.padding, self.dilation, 1) if self.kernel else linear_geometry()

    @property
    def out_size(self) -> tuple[int, ...]:
        if not self.kernel:
            return self.size
        axes = zip(self.size, both(self.kernel), both(self.stride), both(self.padding), both(self.dilation))
        return tuple((s + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for s, kernel, stride, pad, dilation in axes)

    def weight(self, seed: int = 1) -> Tensor:
        shape = (self.c_out, self.c_in, *both(self.kernel)) if self.kernel else (self.c_out, self.c_in)
        return randn(*shape, seed=seed) / (self.c_in * self.taps) ** 0.5

    def map_in(self, seed: int, maps: int = 1) -> Tensor:
        """``[N*K, C_in, *size]`` (dense: ``[N*K, *size, C_in]``)."""
        return self._map(self.c_in, self.size, seed, maps)

    def map_out(self, seed: int, maps: int = 1) -> Tensor:
        return self._map(self.c_out, self.out_size, seed, maps)

    def _map(self, channels: int, size: tuple[int, ...], seed: int, maps: int) -> Tensor:
        shape = (channels, *size) if self.kernel else (*size, channels)
        return randn(self.n * maps, *shape, seed=seed)


# {1x1, 3x3, 5x5, 7x7, dense} x strides x padding x dilation, with channels that fill no tile and no vector of any dtype, one sample,
# one channel, one pixel, maps wider than a tile
LAYERS = (
    Layer(1, 8, 8, (5, 5), 1),
    Layer(2, 72, 136, (6, 5), 1),
    Layer(1, 16, 24, (9, 7), 1, stride=2),
    Layer(2, 5, 7, (6, 6), 3, padding=1),
    Layer(1, 16, 40, (9, 9), 3, padding=1),
    Layer(2, 24, 16, (7, 9), 3, stride=2, padding=1),
    Layer(1, 8, 8, (8, 8), 3, stride=2, padding=1),
    Layer(1, 8, 16, (11, 9), 3, padding=2, dilation=2),
    Layer(1, 8, 8, (10, 9), 3, stride=2, padding=2, dilation=2),
    Layer(1, 8, 8, (10, 11), 5, stride=2, padding=2),
    Layer(1, 3, 8, (14, 12), 7, stride=2, padding=3),
    Layer(1, 16, 8, (9, 9), 7, padding=3),
    Layer(1, 4, 8, (12, 12), 3, stride=3),
    Layer(1, 1, 1, (1, 1), 1),
    Layer(3, 1, 9, (3, 2), 3, padding=1),
    Layer(7, 40, 10, (), 0),
    Layer(70, 16, 72, (), 0),
    Layer(3, 9, 5, (), 0),
    Layer(2, 16, 8, (5,), 0),
    # axes that differ; taps that meet no remainder (dilation a multiple of the stride), strides longer than the kernel, maps
    # smaller than the kernel, padding that reaches past it
    Layer(2, 8, 16, (7, 10), (3, 5), stride=(1, 2), padding=(1, 2)),
    Layer(1, 24, 8, (9, 8), (1, 7), stride=(2, 1), padding=(0, 3)),
    Layer(1, 8, 24, (11, 12), 3, stride=(2, 3), padding=(2, 0), dilation=(2, 3)),
    Layer(1, 16, 8, (13, 9), (2, 3), stride=(3, 2), padding=(1, 4), dilation=(4, 2)),
    Layer(2, 8, 8, (2, 3), 5, padding=2),
    Layer(1, 6, 10, (3, 3), 7, stride=2, padding=3),
    Layer(1, 8, 8, (7, 9), 2, stride=(4, 3)),
    Layer(1, 8, 8, (3, 4), 1, padding=2),
)
# more than a tile of rows, of columns and of the depth, and none of them whole
TILED = (
    Layer(2, 136, 72, (9, 8), 1),
    Layer(1, 144, 24, (13, 11), 3, padding=1),
    Layer(1, 80, 40, (25, 11), 3, stride=2, padding=1),
    Layer(150, 136, 72, (), 0),
)


@st.composite
def layers(draw: st.DrawFn, wide: bool | None = None) -> Layer:
    """Random small layers: axes that differ in everything; channels in whole vectors (``wide``), or any number of them."""
    channels = st.sampled_from([8, 16, 24, 72]) if wide else st.integers(1, 20)
    c_in, c_out = draw(channels), draw(channels)
    if draw(st.integers(0, 9)) == 0:
        return Layer(draw(st.integers(1, 70)), c_in, c_out, draw(st.sampled_from([(), (3,), (2, 3)])), 0)
    kernel, stride, dilation, padding, size = [], [], [], [], []
    for _ in range(2):
        k, d, p = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(0, 4))
        span = d * (k - 1) + 1
        kernel.append(k), dilation.append(d), padding.append(p), stride.append(draw(st.integers(1, 4)))
        size.append(max(1, span - 2 * p) + draw(st.integers(0, 6)))
    return Layer(draw(st.integers(1, 3)), c_in, c_out, *map(tuple, (size, kernel, stride, padding, dilation)))


def matrix(layer: Layer, W: Tensor) -> Tensor:
    """The map as a matrix ``[positions of the output * C_out, positions of the input * C_in]`` in float64, tap by tap from the
    definition; channels are innermost. (A dense layer's is that of one row.)"""
    if not layer.kernel:
        return W.double().cpu()
    (height, width), (rows, columns) = layer.size, layer.out_size
    M = torch.zeros(rows, columns, layer.c_out, height, width, layer.c_in, dtype=torch.float64)
    (sy, sx), (py, px), (dy, dx) = both(layer.stride), both(layer.padding), both(layer.dilation)
    for p, q, r, s in itertools.product(*map(range, (rows, columns, *both(layer.kernel)))):
        h, w = p * sy - py + r * dy, q * sx - px + s * dx
        if 0 <= h < height and 0 <= w < width:
            M[p, q, :, h, w] += W[:, :, r, s].double().cpu()
    return M.view(rows * columns * layer.c_out, height * width * layer.c_in)


def rows_of(t: Tensor, layer: Layer) -> Tensor:
    """A map as rows for `matrix`, float64."""
    t = t.double().cpu()
    return t.permute(0, 2, 3, 1).flatten(1) if layer.kernel else t.flatten(0, -2)


def transposed_by_matrix(layer: Layer, s: Tensor, W: Tensor) -> Tensor:
    """``W^T s`` by the explicit matrix."""
    g = rows_of(s, layer) @ matrix(layer, W)
    if layer.kernel:
        return g.view(s.shape[0], *layer.size, layer.c_in).permute(0, 3, 1, 2)
    return g.view(*s.shape[:-1], layer.c_in)


def forward_by_matrix(layer: Layer, x: Tensor, W: Tensor) -> Tensor:
    """``W x`` by the explicit matrix."""
    y = rows_of(x, layer) @ matrix(layer, W).mT
    if layer.kernel:
        return y.view(x.shape[0], *layer.out_size, layer.c_out).permute(0, 3, 1, 2)
    return y.view(*x.shape[:-1], layer.c_out)


def whole(t: Tensor) -> Tensor:
    """Small whole numbers, whose products and sums are exact in every dtype's accumulation: results are those of float64, rounded."""
    return (1.5 * t / t.square().mean().sqrt()).round().clamp(-3, 3)


def laid_out(t: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """In the layout of the kernels: channels innermost."""
    t = t.to(device, dtype)
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.contiguous()


def to_tf32(t: Tensor) -> Tensor:
    """Rounded to TF32: 10 bits behind the point, to nearest, ties away from zero."""
    bits = t.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def within_rounding(name: str, product: tuple[str, ...], tile: str | None = None, **operands) -> tuple[Tensor | None, ...]:
    """Run the kernel ``name``, its results filled with NaN first; its error against the reference in float64 is at most twice
    that of the reference in the kernel's own dtype, plus one rounding of the operands and of the result.

    ``product`` names the operands of the matrix product: float32 kernels round those to TF32, and so does what they are compared
    with. Returns what the kernel returned.
    """
    main = operands[product[0]]
    run = _backend.kernel(name, "auto", main)
    assert run is not getattr(reference, name), f"{name} runs the reference"
    assert not run.serves(**operands), run.serves(**operands)
    got = run(**operands, tile=tile, poison=True)

    def of(change) -> tuple[Tensor | None, ...]:
        changed = {k: change(k, v) if isinstance(v, Tensor) else v for k, v in operands.items()}
        return getattr(reference, name)(**changed)

    def usual(k: str, v: Tensor) -> Tensor:
        return to_tf32(v) if k in product and v.dtype == torch.float32 else v.clone()

    def perturbed(k: str, v: Tensor) -> Tensor:
        unit = 2.0**-11 if k in product and v.dtype == torch.float32 else torch.finfo(v.dtype).eps
        return v.double() * (1 + unit * randn(*v.shape, seed=v.numel()).sign().to(v.device))

    exact = of(lambda _, v: v.double())
    assert len(got) == len(exact)
    for i, (g, u, f, x) in enumerate(zip(got, of(usual), of(perturbed), exact)):
        assert (g is None) == (x is None), f"{name}, result {i}: None in one of them"
        if x is None:
            continue
        assert g.shape == x.shape, f"{name}, result {i}: {tuple(g.shape)}, expected {tuple(x.shape)}"
        allowed = EXACT if main.dtype == torch.float64 else 2 * error(u, x) + error(f, x) + torch.finfo(g.dtype).eps
        seen = error(g, x)
        assert seen <= allowed, f"{name}, result {i}, {g.dtype}: error {seen:.3g}, allowed {allowed:.3g}"
    return got


@contextlib.contextmanager
def without_bank_conflicts(device: str) -> Iterator[dict[str, int]]:
    """What runs inside copies to shared memory, and reads matrices from it, without bank conflicts. Yields what is counted: filled
    in at the end; empty on a GPU."""
    seen: dict[str, int] = {}
    if device == "cpu":
        reset_stats()
    yield seen
    if device == "cpu":
        seen |= stats()
        for what in ("ldmatrix_conflicts", "smem_load_conflicts", "smem_store_conflicts", "cp_async_conflicts", "cp_async_uncounted"):
            assert seen[what] == 0, f"{what}: {seen}"
        assert seen["cp_async"] > 0, f"no wide kernel has run: {seen}"
        assert seen["ldmatrix"] > 0, f"no wide kernel has run: {seen}"


def tiles_of(name: str, operands: dict, pair: bool = False) -> tuple[str, ...]:
    """The tile shapes that the kernel can run these operands in; more than one of them where 16-byte access is possible."""
    names = _backend.kernel(name, "auto", next(v for v in operands.values() if isinstance(v, Tensor))).tiles(**operands)
    assert set(names) <= set(PAIR_TILES if pair else TILES)
    return names


def blocks_of(run: Callable[[], object]) -> int:
    """How many blocks the emulator runs."""
    reset_stats()
    run()
    return stats()["blocks"]
