"""Which tile shapes products of linear maps have, what each costs a multiprocessor, and which one every layer gets.

Writes the tables of csrc/README.md, between its markers, from what ptxas said when the gates built the library (build/gates; it is
built where it is missing), from csrc/device/tiles.cuh and product.cuh, and from `fisnet_cuda.ops.tiles`. No GPU is needed.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # what reads the compiler's words stands beside the gates

from package import tools
from package.tools import Linear

from benchmarks.layers import NETS, Layer, layers_of
from fisnet_cuda.ops.tiles import PAIR_TILES, TILES, ranked

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "csrc" / "README.md"
BEGIN, END = "<!-- made by python benchmarks/tile_table.py -->", "<!-- end of what was made -->"
DTYPES = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32", "double": "fp64"}
PRODUCTS = {  # transposed, operands, products, prologue
    (False, 1, 1, False): "forward",
    (False, 1, 1, True): "forward, prologue",
    (False, 1, 2, False): "forward, W and W+",
    (False, 2, 2, False): "forward, pair",
    (True, 1, 1, False): "transposed",
    (True, 2, 2, False): "transposed, pair",
}
# What every shape is for.
REASONS = {
    "Tile128x128": "many results and at least 128 columns: reads least, so the product is bound by tensor cores and not by L2",
    "Tile128x64": "up to 64 columns (first stages, DenseNet's growth of 32), or too few blocks of 128x128 to fill the last round",
    "Tile64x64": "few results (7x7 maps, heads): four times as many blocks as 128x128; channels that are no multiple of 16 bytes; fp64",
    "PairTile128x64": "both of Dual's products with as many accumulators a thread: the weights are read once for both",
    "PairTile64x64": "as Tile64x64",
    "NarrowPairTile64x64": "both products, of channels that are no multiple of 16 bytes (addresses take registers) and in fp64",
}
BATCH, SIZE, ITEMSIZE = 64, 224, 2
PROCESSORS = 132  # of an H100, which ranked() counts without a GPU


# ---- what fits on a multiprocessor -----------------------------------------------------------------------------------------


class Processor(NamedTuple):
    """A multiprocessor of one architecture (CUDA C++ Programming Guide, table of technical specifications)."""

    shared: int  # bytes, of all its blocks
    a_block: int  # bytes of shared memory at most
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32


ARCHS = {"sm_80": Processor(164 * 1024, 163 * 1024), "sm_90": Processor(228 * 1024, 227 * 1024)}
RESERVED = 1024  # bytes of shared memory that the system takes of every block


def resident(arch: str, registers: int, threads: int, shared: int) -> tuple[int, str]:
    """Blocks that share a multiprocessor, and what limits them.

    Registers are handed out in 256 to a warp, warps in fours (one to each quarter of the multiprocessor), shared memory in 128
    bytes.

    Example:
        >>> resident("sm_80", 128, 256, 64 * 1024)
        (2, 'registers and shared memory')
    """
    p, warps = ARCHS[arch], -(-threads // 32)
    if shared > p.a_block:
        return 0, "shared memory"
    warps_by_registers = p.registers // (-(-registers * 32 // 256) * 256) // 4 * 4
    limits = {
        "registers": warps_by_registers // warps,
        "shared memory": p.shared // (-(-(shared + RESERVED) // 128) * 128),
        "threads": p.threads // (32 * warps),
        "blocks": p.blocks,
    }
    least = min(limits.values())
    return least, " and ".join(name for name, value in limits.items() if value == least)


# ---- what is compiled ------------------------------------------------------------------------------------------------------


class Compiled(NamedTuple):
    """One instantiation: ptxas's figures for every architecture, and what its templates say of it."""

    op: str
    kernel: Linear
    threads: int
    dynamic: int  # bytes of shared memory
    usage: dict[str, tools.Usage]

    def resident(self, arch: str) -> tuple[int, str]:
        """See `resident`."""
        return resident(arch, self.usage[arch].registers, self.threads, self.usage[arch].shared + self.dynamic)


def compiled() -> list[Compiled]:
    """The products in the library that the gates built."""
    reports: dict[tuple[str, str], dict[str, tools.Usage]] = {}
    for file, log in tools.logs().items():
        for usage in tools.ptxas_report(log):
            if tools.linear(usage.kernel):
                reports.setdefault((file.removesuffix(".cu"), usage.kernel), {})[usage.arch] = usage
    told = from_sources([kernel for _, kernel in reports])
    return [Compiled(op, tools.linear(kernel), *one, usage) for ((op, kernel), usage), one in zip(reports.items(), told)]


def from_sources(kernels: list[str]) -> list[tuple[int, int]]:
    """``(threads, bytes of dynamic shared memory)`` of kernels, from csrc/device/product.cuh, which g++ compiles for this."""
    lines = []
    for kernel in kernels:
        dtype, tile, _, product, _ = tools.arguments(kernel)
        lines.append(f'  std::printf("[%d, %zu],\\n", {tile}::kThreads, product_shared<{dtype}, {tile}, {product}>());')
    source = '#include <cstdio>\n#include "device/tiles.cuh"\nusing namespace fisnet;\nint main() {\n' + "\n".join(lines) + "\n}\n"
    with tempfile.TemporaryDirectory() as folder:
        file, program = Path(folder) / "shapes.cpp", Path(folder) / "shapes"
        file.write_text(source)
        halves = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
        tools.run(
            "g++", "-std=c++17", "-DFISNET_EMU", *(f"-D__CUDA_NO_{one}__" for one in halves), f"-I{tools.CSRC}", f"-I{ROOT / 'emu'}",
            f"-I{tools.toolkit() / 'include'}", file, "-o", program,
        )  # fmt: skip
        return [tuple(one) for one in json.loads(f"[{tools.run(program).rstrip().rstrip(',')}]")]


def shapes() -> dict[str, tuple[int, int, int, int]]:
    """``{name: (rows, columns, warps, stages)}`` of csrc/device/tiles.cuh."""
    text = (tools.CSRC / "device" / "tiles.cuh").read_text()
    found = re.findall(r"using (\w*Tile\d+x\d+) = Tile<(\d+), (\d+), (\d+), (\d+)>;", text)
    return {name: tuple(map(int, numbers)) for name, *numbers in found}


# ---- tables ------------------------------------------------------------------------------------------------------------------


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """In Markdown."""
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shape_table() -> str:
    """Why these shapes: FLOP for a byte that is read, for 2-byte elements (half of that for 4)."""
    rows = []
    for name, (m, n, warps, stages) in shapes().items():
        pair = "Pair" in name
        part = m * (n // 32) // warps
        ratios = []
        for operands, products in ((1, 2), (2, 2)) if pair else ((1, 1),):
            in_block = products * m * n / (operands * m + n)
            in_warp = products * part * 32 / (operands * part + 32)
            ratios.append((f"{in_warp:.0f}", f"{in_block:.0f}"))
        shared, l2 = (" / ".join(one) for one in zip(*ratios))
        rows.append((name, 32 * warps, f"{part}x32", stages, shared, l2, REASONS[name]))
    return table(("shape", "threads", "a warp's part", "stages", "FLOP / byte of shared memory", "FLOP / byte of L2", "for"), rows)


def in_order(values: Iterable[object]) -> str:
    """One value where all are the same."""
    texts = [str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)


def figure_table(found: list[Compiled]) -> str:
    """What every instantiation takes: a line for an op, product and shape, its dtypes in one order."""
    groups: dict[tuple, list[Compiled]] = {}
    for one in found:
        k = one.kernel
        product = PRODUCTS[k.transposed, k.operands, k.products, k.prologue]
        groups.setdefault((one.op, product, k.epilogue, -k.rows, -k.columns, not k.wide), []).append(one)
    rows = []
    for (op, product, _, m, n, narrow), members in sorted(groups.items()):
        members.sort(key=lambda one: list(DTYPES).index(one.kernel.dtype))
        k = members[0].kernel
        rows.append(
            (
                f"`{op}`", product, f"{-m}x{-n}{', narrow' if narrow else ''}", " ".join(DTYPES[one.kernel.dtype] for one in members),
                in_order(c.threads for c in members), in_order(f"{c.kernel.warp_rows}x32" for c in members),
                k.stages, in_order(c.dynamic for c in members),
                in_order(c.usage["sm_90"].shared for c in members),
                *(in_order(c.usage[arch].registers for c in members) for arch in ARCHS),
                *(in_order(share(c, arch) for c in members) for arch in ARCHS),
                in_order(c.resident("sm_90")[1] for c in members),
            )
        )  # fmt: skip
    head = (
        "op", "product", "tile", "dtypes", "threads", "a warp's part", "stages", "dynamic shared, B", *FROM_PTXAS,
    )  # fmt: skip
    return table(head, rows)


def share(one: Compiled, arch: str) -> str:
    """``2 (25 %)``: blocks, and their threads of those that a multiprocessor can hold."""
    blocks = one.resident(arch)[0]
    return f"{blocks} ({100 * blocks * one.threads / ARCHS[arch].threads:.0f} %)"


FROM_PTXAS = (  # columns that another compiler may change
    "static, B", *(f"registers, {arch}" for arch in ARCHS), *(f"blocks (occupancy), {arch}" for arch in ARCHS), "limited by, sm_90",
)  # fmt: skip


def layer_table(net: str) -> str:
    """The choice for every layer: tile, blocks, rounds of them on an H100. Neighbours that differ in channels alone share a line."""
    kinds = [(transposed, pair) for pair in (False, True) for transposed in (False, True)]
    groups: dict[tuple, list[tuple[Layer, int, list[tuple[str, int, float]]]]] = {}
    for layer, times in layers_of(net, SIZE).items():
        choices = [
            choice(layer, transposed, pair, prologue=net == "densenet121" and layer.kernel == 1 and not transposed)
            for transposed, pair in kinds
        ]
        # DenseNet's many 1x1 convolutions differ in channels alone
        key = (layer._replace(c_in=0) if layer.kernel == layer.stride == 1 else layer, tuple(tile for tile, _, _ in choices))
        groups.setdefault(key, []).append((layer, times, choices))
    rows = []
    for members in groups.values():
        layer = members[0][0]
        channels = ", ".join(str(one.c_in) for one, _, _ in members)
        name = str(layer).replace(f" {layer.c_in}-", f" {channels} - " if len(members) > 1 else f" {channels}-", 1)
        cells = [
            f"{of[0][0]}: {extent([blocks for _, blocks, _ in of])}, {extent([f'{rounds:.1f}' for _, _, rounds in of])}"
            for of in zip(*(choices for _, _, choices in members))
        ]
        rows.append((name, sum(times for _, times, _ in members), *cells))
    return table(("layer", "times", "forward", "transposed", "Dual forward", "Dual transposed"), rows)


def extent(values: list[object]) -> str:
    """``3``, or ``3..5``."""
    return str(values[0]) if values[0] == values[-1] else f"{values[0]}..{values[-1]}"


def choice(layer: Layer, transposed: bool, pair: bool, prologue: bool = False) -> tuple[str, int, float]:
    """``(tile, blocks, rounds)`` that a layer gets on an H100."""
    rows, columns, steps = layer.product(BATCH, transposed, ITEMSIZE)
    wide = not (layer.c_in * ITEMSIZE % 16 or layer.c_out * ITEMSIZE % 16)
    tile = ranked(rows, columns, steps, torch.device("cpu"), wide, pair, prologue)[0]
    _, m, n, together = (PAIR_TILES if pair else TILES)[tile]
    blocks = -(-rows // m) * -(-columns // n)
    return tile, blocks, blocks / (PROCESSORS * together)


def nvcc_version() -> str:
    """``13.0.88``."""
    return re.search(r"V([\d.]+)", tools.run(tools.toolkit() / "bin" / "nvcc", "--version"))[1]


def text() -> str:
    """All that stands between the markers."""
    layers = "\n\n".join(f"{net}\n\n{layer_table(net)}" for net in NETS)
    return f"""
The shapes (csrc/device/tiles.cuh), and 2-byte FLOP for a byte that is read (half of it for 4-byte elements; for pairs with one
operand / with two). An A100's tensor cores need 16 for a byte of shared memory and about 43 for one of L2 to be busy:

{shape_table()}

What ptxas of nvcc {nvcc_version()} made of them; blocks are those that share a multiprocessor. Lists are in the order of the dtypes:

{figure_table(compiled())}

The choice at batch {BATCH}, {SIZE}x{SIZE}, bf16, on an H100 ({PROCESSORS} multiprocessors): tile: blocks, rounds of them.
DenseNet's 1x1 convolutions have BatchNorm and ReLU as their prologue.

{layers}
"""


# ---- the file --------------------------------------------------------------------------------------------------------------


def committed() -> str:
    """What stands between the markers of csrc/README.md."""
    _, begin, rest = README.read_text().partition(BEGIN)
    inside, end, _ = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README} has no lines {BEGIN!r} and {END!r}")
    return inside


def write(made: str) -> None:
    """Put it there."""
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{before}{BEGIN}{made}{END}{rest.partition(END)[2]}")


def version(made: str) -> str:
    """The compiler that a text names."""
    found = re.search(r"ptxas of nvcc ([\d.]+)", made)
    return found[1] if found else ""


def structure(made: str) -> str:
    """The text without what ptxas said: all that another compiler must leave as it is."""
    columns, kept = 0, []
    for line in made.replace(f"nvcc {version(made)}", "nvcc").splitlines():
        cells = line.split("|")
        if line.startswith("|"):
            if cells[-2].strip() == FROM_PTXAS[-1]:
                columns = len(FROM_PTXAS)
            line = "|".join(cells[: len(cells) - 1 - columns])
        else:
            columns = 0
        kept.append(line)
    return "\n".join(kept)


def difference(made: str, there: str) -> str:
    """What the committed text must change, empty when nothing: only its structure counts where another nvcc made it."""
    if version(made) != version(there):
        made, there = structure(made), structure(there)
    return "\n".join(
        difflib.unified_diff(there.splitlines(), made.splitlines(), "csrc/README.md", "as it would be made", lineterm="", n=0)
    )


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--check", action="store_true", help="change nothing; 1 where the README's tables are not these")
    p.add_argument("--print", action="store_true", help="change nothing; write the tables to the terminal")
    options = p.parse_args(argv)
    if missing := tools.lacks("nvcc", "cmake", "ninja", "g++"):
        print(missing)
        return 2
    made = text()
    if options.print:
        print(made)
    elif not options.check:
        write(made)
    elif changes := difference(made, committed()):
        print(changes)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
