"""`dual_transposed_phi` (kernel 9): csrc/kernels/dual_transposed_phi.cu."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import reference
from ...reference import Geometry
from ..tiles import number
from . import kernel_for
from .layout import split_eps
from .linear import as_map, as_weight, from_map, new_map, positions, refused, settings, tile_choices


@kernel_for
def dual_transposed_phi(
    s: Tensor, s_plus: Tensor, W: Tensor, geometry: Geometry, in_size: tuple[int, ...], factor: Tensor | None = None,
    a: Tensor | None = None, z_plus: Tensor | None = None, eps: float | Tensor = 0.0, eps_plus: float = 0.0,
    *, tile: str | None = None, poison: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `fisnet_cuda.reference.dual_transposed_phi`; ``tile`` names the tile shape, ``poison`` fills the results with NaN first."""
    choice = number(tile, tiles(s, s_plus, W, geometry, in_size))
    eps, eps_n = split_eps(eps, s)
    if a is None:
        z_plus = eps_n = None
    maps = as_map(s, geometry)
    height, width = in_size if geometry.spatial else maps.shape[2:]
    results = torch.ops.fisnet.dual_transposed_phi(
        maps, as_map(s_plus, geometry), as_weight(reference.folded(W, factor), geometry), *settings(geometry), height, width,
        as_map(a, geometry), as_map(z_plus, geometry), eps, eps_n, eps_plus, choice, poison,
    )  # fmt: skip
    out, out_plus = (from_map(t, geometry, s) for t in results)
    return out, out_plus


def serves(s, s_plus, W, geometry, in_size, factor=None, a=None, z_plus=None, eps=0.0, eps_plus=0.0) -> str:
    """Why the kernel cannot run these operands; empty when it can."""
    return refused(geometry, W, s, s_plus, a, z_plus, size=in_size)


def tiles(s, s_plus, W, geometry, in_size, *_, **__) -> tuple[str, ...]:
    """Names of the tile shapes that can run these operands, best guess first."""
    rows = s.shape[0] * math.prod(in_size) if geometry.spatial else positions(s, geometry)
    return tile_choices(rows, W.shape[1], s, W, geometry, pair=True)


dual_transposed_phi.serves, dual_transposed_phi.tiles = serves, tiles


@torch.library.register_fake("fisnet::dual_transposed_phi")
def _(s, s_plus, W, sy, sx, py, px, dy, dx, height, width, a, z_plus, eps, eps_n, eps_plus, tile, poison=False):
    return tuple(new_map(s, s.shape[0], W.shape[1], height, width) for _ in range(2))
