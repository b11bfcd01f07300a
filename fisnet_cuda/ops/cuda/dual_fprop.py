"""`dual_fprop` (kernel 9): csrc/kernels/dual_fprop.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference import Geometry, conv_geometry
from ..tiles import number
from . import kernel_for
from .layout import vector
from .linear import as_map, as_weight, from_map, new_map, out_size, positions, refused, settings, tile_choices


@kernel_for
def dual_fprop(
    x: Tensor, W: Tensor, geometry: Geometry, sign: Tensor | None = None, shift: Tensor | None = None,
    shift_plus: Tensor | None = None, *, tile: str | None = None, poison: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `fisnet_cuda.reference.dual_fprop`; ``tile`` names the tile shape, ``poison`` fills the results with NaN first."""
    choice = number(tile, tiles(x, W, geometry))
    results = torch.ops.fisnet.dual_fprop(
        as_map(x, geometry), as_weight(W, geometry), *settings(geometry), vector(sign, x), vector(shift, x), vector(shift_plus, x),
        choice, poison,
    )  # fmt: skip
    z, P = (from_map(t, geometry, x) for t in results)
    return z, P


def serves(x, W, geometry, sign=None, shift=None, shift_plus=None) -> str:
    """Why the kernel cannot run these operands; empty when it can."""
    return refused(geometry, W, x, size=out_size(W, geometry, x.shape[2:]))


def tiles(x, W, geometry, *_, **__) -> tuple[str, ...]:
    """Names of the tile shapes that can run these operands, best guess first."""
    rows = positions(x, geometry)
    if geometry.spatial:
        height, width = out_size(W, geometry, x.shape[2:])
        rows = x.shape[0] * height * width
    return tile_choices(rows, W.shape[0], x, W, geometry, pair=True)


dual_fprop.serves, dual_fprop.tiles = serves, tiles


@torch.library.register_fake("fisnet::dual_fprop")
def _(x, W, sy, sx, py, px, dy, dx, sign, shift, shift_plus, tile, poison=False):
    height, width = out_size(W, conv_geometry(2, (sy, sx), (py, px), (dy, dx), 1), x.shape[2:])
    return tuple(new_map(x, x.shape[0], W.shape[0], height, width) for _ in range(2))
