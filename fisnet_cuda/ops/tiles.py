"""The compiled tile shapes of products (csrc/device/tiles.cuh), and which of them suits a problem best.

A tile is rows x columns of the result that one block of threads makes. Large tiles read each operand fewer times, small ones fill
a GPU with fewer results. csrc/README.md has their figures and the choice for every layer of four networks.
"""

from __future__ import annotations

import functools

import torch

# name -> (number in csrc/device/dtype.h, rows, columns, blocks that share a multiprocessor)
TILES = {"128x128": (0, 128, 128, 2), "128x64": (1, 128, 64, 3), "64x64": (2, 64, 64, 4)}
PAIR_TILES = {"128x64": (1, 128, 64, 2), "64x64": (2, 64, 64, 4)}
PROLOGUE_TILES = {"128x64": TILES["128x64"], "64x64": TILES["64x64"]}  # rows wait in registers: none are left for 128x128
SMALLEST = "64x64"  # alone compiled for channels that are no multiple of 16 bytes, and for float64


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of an H100 where there is none (emulated kernels, traced programs)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


# What a multiprocessor does in a clock: round figures between those of an A100 and of an H100. Not measured.
MMA = 32  # results taken one step (64 bytes of depth) further by mma.sync, of any dtype: 1024 fused multiply-adds of 2-byte elements
L2 = 32  # bytes from L2, where every block reads operands of its own, past L1
DRAM = 13  # bytes from and to memory
OVERLAP = 0.75  # of what one of the three does while another, busier one works
WAITING = 1500  # clocks that a block waits: for its first operands, and for what its epilogue reads
LATENCY = 800  # clocks from asking for a step of operands to its arrival; three steps are on their way
RESULT_BYTES = 6  # read and written beside each result: activation, relevance and result, 2 bytes each


def clocks(tile: str, rows: int, columns: int, steps: int, device: torch.device, pair: bool = False) -> float:
    """A guess of the clocks that a product of ``rows`` x ``columns`` results takes with this tile, by a model of one multiprocessor.

    Blocks that share a multiprocessor hide each other's waiting: ``k`` of them take ``k`` times what tensor cores, L2 and memory
    have to do for one, but no less than one takes that is alone. The multiprocessor with most blocks decides.

    Args:
        tile: a name among `TILES` (`PAIR_TILES` for a pair).
        rows, columns: of the result, all samples and positions.
        steps: of the depth, 64 bytes each.
        device: whose multiprocessors are counted.
        pair: two products of two operands.
    """
    _, m, n, together = (PAIR_TILES if pair else TILES)[tile]
    products = 2 if pair else 1
    multiply, read = m * n * products / MMA, 64 * (m * products + n) / L2  # a step
    results = min(m, rows) * min(n, columns) * products * RESULT_BYTES / DRAM
    parts = (steps * multiply, steps * read, results)
    work = max(parts) + (1 - OVERLAP) * (sum(parts) - max(parts))
    alone = steps * max(multiply, read, LATENCY / 3) + results + WAITING
    blocks = -(-rows // m) * -(-columns // n)
    rounds, last = divmod(-(-blocks // processors(device)), together)
    return rounds * max(together * work, alone) + (max(last * work, alone) if last else 0)


def ranked(
    rows: int, columns: int, steps: int, device: torch.device, wide: bool = True, pair: bool = False, prologue: bool = False
) -> tuple[str, ...]:
    """The tile shapes that can run a result of ``rows`` x ``columns``, best guess first (see `clocks`).

    Example:
        >>> import torch
        >>> cpu = torch.device("cpu")
        >>> ranked(64 * 28 * 28, 128, 9 * 128 // 32, cpu)[0], ranked(64, 1000, 2048 // 32, cpu)[0]
        ('128x128', '64x64')
    """
    if not wide:
        return (SMALLEST,)
    shapes = PAIR_TILES if pair else PROLOGUE_TILES if prologue else TILES
    return tuple(sorted(shapes, key=lambda name: (clocks(name, rows, columns, steps, device, pair), shapes[name][0])))


def number(tile: str | None, choices: tuple[str, ...]) -> int:
    """What the operators call a tile: the one that is asked for, or the best guess.

    Raises:
        ValueError: the tile is not among ``choices``.
    """
    tile = choices[0] if tile is None else tile
    if tile not in choices:
        raise ValueError(f"tile must be one of {', '.join(choices)} here, got {tile!r}")
    return TILES[tile][0]
