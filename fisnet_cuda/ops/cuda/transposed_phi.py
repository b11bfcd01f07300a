"""`transposed_phi` (kernels 8 and 10): csrc/kernels/transposed_phi.cu."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import reference
from ...reference import Geometry
from ..tiles import number
from . import kernel_for
from .layout import split_eps, vector
from .linear import as_map, as_slice, as_weight, from_map, new_map, refused, settings, tile_choices


@kernel_for
def transposed_phi(
    s: Tensor, W: Tensor, geometry: Geometry, in_size: tuple[int, ...], factor: Tensor | None = None,
    a: Tensor | None = None, eps: float | Tensor = 0.0, skip: Tensor | None = None, scale: Tensor | None = None,
    rest: Tensor | None = None, keep_s: bool = True, *, tile: str | None = None, poison: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `fisnet_cuda.reference.transposed_phi`; ``tile`` names the tile shape, ``poison`` fills the results with NaN first."""
    choice = number(tile, tiles(s, W, geometry, in_size))
    eps, eps_n = split_eps(eps, s)
    maps = as_map(s, geometry)
    height, width = in_size if geometry.spatial else maps.shape[2:]
    out, s_out = torch.ops.fisnet.transposed_phi(
        maps, as_weight(reference.folded(W, factor), geometry), *settings(geometry), height, width, as_map(a, geometry), eps,
        None if a is None else eps_n, as_map(skip, geometry), vector(scale, s), as_slice(rest, geometry), keep_s, choice, poison,
    )  # fmt: skip
    out = from_map(out, geometry, s)
    return out, out if scale is None else from_map(s_out, geometry, s) if keep_s else s_out


def serves(s, W, geometry, in_size, factor=None, a=None, eps=0.0, skip=None, scale=None, rest=None, keep_s=True) -> str:
    """Why the kernel cannot run these operands; empty when it can."""
    if scale is not None and not geometry.spatial and s.dim() > 2:
        return "a scale of another axis"  # that right behind the samples: a BatchNorm's channels
    return refused(geometry, W, s, a, skip, rest, size=in_size)


def tiles(s, W, geometry, in_size, *_, **__) -> tuple[str, ...]:
    """Names of the tile shapes that can run these operands, best guess first."""
    rows = s.shape[0] * math.prod(in_size) if geometry.spatial else s.numel() // s.shape[-1]
    return tile_choices(rows, W.shape[1], s, W, geometry)


transposed_phi.serves, transposed_phi.tiles = serves, tiles


@torch.library.register_fake("fisnet::transposed_phi")
def _(s, W, sy, sx, py, px, dy, dx, height, width, a, eps, eps_n, skip, scale, rest, keep_s, tile, poison=False):
    out = new_map(s, s.shape[0], W.shape[1], height, width)
    return out, torch.empty_like(out) if scale is not None and keep_s else s.new_empty(0)
