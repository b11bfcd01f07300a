"""`linear_act` (kernels 8, 10 and 12): csrc/kernels/linear_act.cu."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...reference import Geometry
from ..tiles import number
from . import kernel_for
from .layout import vector
from .linear import as_map, as_weight, from_map, new_map, out_size, positions, refused, settings, tile_choices


@kernel_for
def linear_act(
    x: Tensor, W: Tensor, geometry: Geometry, scale: Tensor | None = None, shift: Tensor | None = None,
    skip: Tensor | None = None, relu: bool = False, pre_scale: Tensor | None = None, pre_shift: Tensor | None = None,
    *, tile: str | None = None, poison: bool = False,
) -> tuple[Tensor]:  # fmt: skip
    """See `fisnet_cuda.reference.linear_act`; ``tile`` names the tile shape, ``poison`` fills the result with NaN first."""
    choice = number(tile, tiles(x, W, geometry, pre_scale=pre_scale))
    y = torch.ops.fisnet.linear_act(
        as_map(x, geometry), as_weight(W, geometry), *settings(geometry), vector(scale, x), vector(shift, x), as_map(skip, geometry),
        relu, vector(pre_scale, x), vector(pre_shift, x), choice, poison,
    )  # fmt: skip
    return (from_map(y, geometry, x),)


def serves(x, W, geometry, scale=None, shift=None, skip=None, relu=False, pre_scale=None, pre_shift=None) -> str:
    """Why the kernel cannot run these operands; empty when it can."""
    return refused(geometry, W, x, skip, size=out_size(W, geometry, x.shape[2:]))


def tiles(x, W, geometry, scale=None, shift=None, skip=None, relu=False, pre_scale=None, pre_shift=None) -> tuple[str, ...]:
    """Names of the tile shapes that can run these operands, best guess first."""
    rows = x.shape[0] * math.prod(out_size(W, geometry, x.shape[2:])) if geometry.spatial else positions(x, geometry)
    return tile_choices(rows, W.shape[0], x, W, geometry, prologue=pre_scale is not None)


linear_act.serves, linear_act.tiles = serves, tiles


@torch.library.register_fake("fisnet::linear_act")
def _(x, W, sy, sx, py, px, dy, dx, scale, shift, skip, relu, pre_scale, pre_shift, tile, poison=False):
    geometry = Geometry(2, (sy, sx), (py, px), (dy, dx), 1)
    return new_map(x, x.shape[0], W.shape[0], *out_size(W, geometry, x.shape[2:]))
