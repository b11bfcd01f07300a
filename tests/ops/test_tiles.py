"""The choice among the compiled tile shapes: what the model of a multiprocessor must hold for, and layers whose answer is known."""

import re
from pathlib import Path

import pytest
import torch
from helpers import randn
from hypothesis import given
from hypothesis import strategies as st

from fisnet_cuda import _backend
from fisnet_cuda.ops import tiles
from fisnet_cuda.ops.tiles import PAIR_TILES, SMALLEST, TILES, clocks, number, ranked
from fisnet_cuda.reference import conv_geometry, linear_geometry

CPU = torch.device("cpu")  # counted as an H100
PROCESSORS = 132
sizes = st.integers(1, 300_000), st.integers(1, 4096), st.integers(1, 300)
shapes = st.sampled_from([(name, False) for name in TILES] + [(name, True) for name in PAIR_TILES])


class TestClocks:
    @given(*sizes, shapes, st.integers(0, 5000), st.integers(0, 500), st.integers(0, 50))
    def test_more_to_do_never_takes_less(self, rows, columns, steps, shape, more_rows, more_columns, more_steps):
        name, pair = shape
        before = clocks(name, rows, columns, steps, CPU, pair)
        for more in ((more_rows, 0, 0), (0, more_columns, 0), (0, 0, more_steps)):
            assert clocks(name, rows + more[0], columns + more[1], steps + more[2], CPU, pair) >= before * (1 - 1e-12)

    @given(*sizes, shapes)
    def test_more_multiprocessors_never_take_longer(self, rows, columns, steps, shape):
        name, pair = shape
        with pytest.MonkeyPatch.context() as patch:
            taken = []
            for count in (20, 108, 132, 1000):
                patch.setattr(tiles, "processors", lambda device, count=count: count)
                taken.append(clocks(name, rows, columns, steps, CPU, pair))
        assert taken == sorted(taken, reverse=True)

    @given(*sizes)
    def test_two_products_take_longer_than_one(self, rows, columns, steps):
        for name in PAIR_TILES:
            assert clocks(name, rows, columns, steps, CPU, pair=True) > clocks(name, rows, columns, steps, CPU)

    @given(*sizes, shapes)
    def test_no_faster_than_tensor_cores_and_memory(self, rows, columns, steps, shape):
        name, pair = shape
        products = 2 if pair else 1
        floor = max(rows * columns * steps / tiles.MMA, rows * columns * tiles.RESULT_BYTES / tiles.DRAM) * products / PROCESSORS
        assert clocks(name, rows, columns, steps, CPU, pair) >= floor * (1 - 1e-12)

    def test_a_block_more_than_a_full_round_costs_a_round(self):
        """The tail: 132 multiprocessors with two blocks of 128x128 each, then one of them with a third."""
        full = clocks("128x128", 128 * PROCESSORS * 2, 128, 64, CPU)
        assert clocks("128x128", 128 * (PROCESSORS * 2 - 1) + 1, 128, 64, CPU) == full
        assert clocks("128x128", 128 * PROCESSORS * 2 + 1, 128, 64, CPU) > 1.4 * full

    def test_blocks_together_hide_each_others_waiting(self):
        """Shallow products: a second block on a multiprocessor costs less than the first."""
        one, two = (clocks("64x64", 64 * PROCESSORS * blocks, 64, 2, CPU) for blocks in (1, 2))
        assert two < 1.5 * one


class TestRanked:
    @given(*sizes, st.booleans())
    def test_every_shape_once_cheapest_first(self, rows, columns, steps, pair):
        names = ranked(rows, columns, steps, CPU, pair=pair)
        assert sorted(names) == sorted(PAIR_TILES if pair else TILES)
        costs = [clocks(name, rows, columns, steps, CPU, pair) for name in names]
        assert costs == sorted(costs)

    def test_a_prologue_leaves_no_registers_for_the_largest(self):
        assert ranked(64 * 28 * 28, 512, 144, CPU, prologue=True) == ("128x64", "64x64")

    def test_narrow_channels_have_one_shape(self):
        assert ranked(1000, 1000, 10, CPU, wide=False) == ranked(1000, 1000, 10, CPU, wide=False, pair=True) == (SMALLEST,)

    @pytest.mark.parametrize(
        ("rows", "columns", "steps", "best", "why"),
        [
            (64 * 56 * 56, 256, 18, "128x128", "many results, deep: fewest reads"),
            (64 * 28 * 28, 512, 144, "128x128", "VGG's 3x3"),
            (64 * 7 * 7, 512, 144, "128x128", "one round of either: large tiles read half as much a result"),
            (64 * 56 * 56, 64, 18, "128x64", "no columns for the other half of 128"),
            (64 * 28 * 28, 32, 36, "128x64", "DenseNet's 3x3: 32 columns waste least in 64"),
            (64 * 7 * 7, 128, 16, "64x64", "25 blocks of 128x128 leave most of the GPU idle"),
            (64, 1000, 64, "64x64", "the head: few rows"),
            (1, 10, 16, "64x64", "next to nothing"),
        ],
    )
    def test_known_layers(self, rows, columns, steps, best, why):
        assert ranked(rows, columns, steps, CPU)[0] == best, why

    @given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 300))
    def test_what_fits_the_smallest_shape_gets_it(self, rows, columns, steps):
        assert ranked(rows, columns, steps, CPU)[0] == SMALLEST
        assert ranked(rows, columns, steps, CPU, pair=True)[0] == SMALLEST


class TestTileChoices:
    """Depths: bytes of all that one result is the sum of."""

    @pytest.fixture
    def linear(self):
        if reason := _backend._missing():
            pytest.skip(f"the kernels' Python side needs the extension: {reason}")
        from fisnet_cuda.ops.cuda import linear

        return linear

    @pytest.fixture
    def asked(self, linear, monkeypatch):
        """What `ranked` is asked, in place of an answer."""
        monkeypatch.setattr(linear, "ranked", lambda *arguments: arguments)
        return linear.tile_choices

    def test_forward_and_transposed(self, asked):
        W, geometry = randn(64, 32, 3, 3, seed=1).bfloat16(), conv_geometry(2, 2, 1, 1, 1)
        x = randn(2, 32, 8, 8, seed=2).bfloat16()
        s = randn(2, 64, 4, 4, seed=3).bfloat16()
        assert asked(2 * 4 * 4, 64, x, W, geometry) == (32, 64, 9, CPU, True, False, False)
        # 64 channels, a quarter of nine taps
        assert asked(2 * 8 * 8, 32, s, W, geometry, pair=True) == (128, 32, -(-9 * 64 * 2 // 4 // 64), CPU, True, True, False)

    def test_dense_and_narrow(self, asked):
        W, geometry = randn(10, 40, seed=1).float(), linear_geometry()
        assert asked(7, 10, randn(7, 40, seed=2).float(), W, geometry) == (7, 10, 3, CPU, False, False, False)

    def test_float64_has_one_shape(self, linear):
        assert linear.tile_choices(7, 8, randn(7, 8, seed=1), randn(8, 8, seed=2), linear_geometry()) == (SMALLEST,)


def test_number():
    assert number(None, ("128x64", "64x64")) == 1
    assert number("64x64", ("128x64", "64x64")) == 2
    with pytest.raises(ValueError, match="tile must be one of 128x64, 64x64 here, got '128x128'"):
        number("128x128", ("128x64", "64x64"))


def test_shapes_are_those_of_the_sources():
    """tiles.cuh has the same shapes, and dtype.h the same numbers."""
    csrc = Path(__file__).resolve().parents[2] / "csrc"
    compiled = {
        m[1]: m for m in re.finditer(r"using (\w*Tile\w+) = Tile<(\d+), (\d+), \d+, \d+>", (csrc / "device/tiles.cuh").read_text())
    }
    numbers = {m[1]: int(m[2]) for m in re.finditer(r"t(\d+x\d+) = (\d+)", (csrc / "device/dtype.h").read_text())}
    for table, prefix in ((TILES, "Tile"), (PAIR_TILES, "PairTile")):
        assert {prefix + name for name in table} == {name for name in compiled if name.startswith(prefix)}
        for name, (index, rows, columns, _) in table.items():
            assert (index, rows, columns) == (numbers[name], *map(int, compiled[prefix + name].groups()[1:])), name
