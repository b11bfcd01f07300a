"""The tables of csrc/README.md are those of the library that the gates build, and of the choice that is made."""

import re

import pytest
from package import tools

from benchmarks import tile_table
from benchmarks.layers import Layer, layers_of
from fisnet_cuda.ops.tiles import PAIR_TILES, TILES

needs_compiler = pytest.mark.skipif(
    bool(tools.lacks("nvcc", "cmake", "ninja", "g++")), reason=tools.lacks("nvcc", "cmake", "ninja", "g++")
)


@pytest.mark.slow
@needs_compiler
class TestCommitted:
    def test_tables_are_what_the_script_makes(self):
        """Made by another nvcc, ptxas's figures may differ: then only the rest is compared."""
        changes = tile_table.difference(tile_table.text(), tile_table.committed())
        assert not changes, f"run python benchmarks/tile_table.py:\n{changes}"

    def test_every_product_and_dtype_is_there(self):
        ops = {file.removesuffix(".cu") for file, log in tools.logs().items() if "linear_kernel" in log}
        assert ops
        assert ops == set(re.findall(r"^\| `(\w+)` \|", tile_table.committed(), re.MULTILINE))
        for dtype in tile_table.DTYPES.values():
            assert re.search(rf"^\| `\w+` .*\b{dtype}\b", tile_table.committed(), re.MULTILINE)

    def test_as_many_blocks_share_a_multiprocessor_as_the_choice_assumes(self):
        for one in tile_table.compiled():
            if not one.kernel.wide:  # nothing is chosen
                continue
            assumed = (PAIR_TILES if one.kernel.products == 2 else TILES)[one.kernel.tile][3]
            for arch in tile_table.ARCHS:
                blocks, limit = one.resident(arch)
                assert blocks >= assumed, f"{one.op}, {one.kernel}, {arch}: {blocks} blocks for {limit}, {assumed} assumed"


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "blocks", "limit"),
    [
        ("sm_80", 32, 1024, 0, 2, "registers and threads"),
        ("sm_80", 128, 256, 0, 2, "registers"),
        ("sm_80", 129, 256, 0, 1, "registers"),  # 136 of them are handed out, and warps in fours: 12 warps
        ("sm_90", 168, 128, 0, 3, "registers"),
        ("sm_80", 32, 128, 163 * 1024, 1, "shared memory"),
        ("sm_80", 32, 128, 163 * 1024 + 1, 0, "shared memory"),
        ("sm_90", 32, 128, 163 * 1024, 1, "shared memory"),
        ("sm_90", 32, 128, 75 * 1024, 3, "shared memory"),  # 228 / (75 + 1)
        ("sm_90", 32, 128, 75 * 1024 + 1, 2, "shared memory"),
        ("sm_90", 16, 32, 0, 32, "blocks"),
    ],
)
def test_what_fits_on_a_multiprocessor(arch, registers, threads, shared, blocks, limit):
    """As NVIDIA's occupancy calculator has it."""
    assert tile_table.resident(arch, registers, threads, shared) == (blocks, limit)


class TestDifference:
    MADE = """
| shape | for |
| --- | --- |
| a | b |

ptxas of nvcc 13.0.88 made

| op | threads | static, B | registers, sm_80 | registers, sm_90 | blocks (occupancy), sm_80 | x | limited by, sm_90 |
| --- | --- | --- | --- | --- | --- | --- | --- |
| p | 128 | 768 | 100 | 101 | 4 | 4 | registers |
"""

    def test_one_compiler_counts_in_full(self):
        assert not tile_table.difference(self.MADE, self.MADE)
        assert "-| p | 128 | 768 | 99" in tile_table.difference(self.MADE, self.MADE.replace("| 100", "| 99"))

    def test_another_compiler_may_take_other_registers(self):
        other = self.MADE.replace("13.0.88", "12.8.93").replace("| 100 | 101 | 4", "| 99 | 99 | 5")
        assert not tile_table.difference(self.MADE, other)
        assert tile_table.difference(self.MADE, other.replace("| p | 128", "| p | 256"))
        assert tile_table.difference(self.MADE, other.replace("| a | b", "| a | c"))


def test_layers_of_the_networks():
    counts = {net: sum(layers_of(net).values()) for net in tile_table.NETS}
    assert counts == {"resnet50": 54, "densenet121": 121, "vgg16_bn": 16, "resnet18": 21}
    assert layers_of("resnet50")[Layer(128, 128, 3, 2, 1, 56)] == 1
    assert Layer(128, 128, 3, 2, 1, 56).out_size == 28
    assert Layer(64, 64, 3, 1, 1, 56).product(2, False, 2) == (2 * 56 * 56, 64, 18)
    assert Layer(128, 256, 1, 2, 0, 28).product(1, True, 2) == (28 * 28, 128, 2)


def test_every_shape_has_a_reason():
    assert set(tile_table.shapes()) <= set(tile_table.REASONS)
