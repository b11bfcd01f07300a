"""`dual_fprop_adjoint` (kernel 9): csrc/kernels/dual_fprop_adjoint.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import reference
from ...reference import Geometry
from ..tiles import number
from . import kernel_for
from .layout import split_eps
from .linear import as_map, as_weight, from_map, new_map, positions, refused, settings, tile_choices


@kernel_for
def dual_fprop_adjoint(
    g_bar: Tensor, g_plus_bar: Tensor, W: Tensor, geometry: Geometry, factor: Tensor | None, a: Tensor, s: Tensor,
    s_plus: Tensor, z_plus: Tensor, eps: float | Tensor, eps_plus: float, *, tile: str | None = None, poison: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `fisnet_cuda.reference.dual_fprop_adjoint`; ``tile`` names the tile shape, ``poison`` fills the results with NaN first."""
    choice = number(tile, tiles(g_bar, g_plus_bar, W, geometry, factor, a))
    results = torch.ops.fisnet.dual_fprop_adjoint(
        as_map(g_bar, geometry), as_map(g_plus_bar, geometry), as_weight(reference.folded(W, factor), geometry), *settings(geometry),
        *(as_map(t, geometry) for t in (a, s, s_plus, z_plus)), *split_eps(eps, a), eps_plus, choice, poison,
    )  # fmt: skip
    out, out_plus, a_bar, z_plus_bar = (from_map(t, geometry, a) for t in results)
    return out, out_plus, a_bar, z_plus_bar


def serves(g_bar, g_plus_bar, W, geometry, factor, a, s, s_plus, z_plus, eps, eps_plus) -> str:
    """Why the kernel cannot run these operands; empty when it can."""
    return refused(geometry, W, g_bar, g_plus_bar, a, s, s_plus, z_plus, size=a.shape[2:])


def tiles(g_bar, g_plus_bar, W, geometry, factor, a, *_, **__) -> tuple[str, ...]:
    """Names of the tile shapes that can run these operands, best guess first."""
    return tile_choices(positions(a, geometry), W.shape[0], g_bar, W, geometry, pair=True)


dual_fprop_adjoint.serves, dual_fprop_adjoint.tiles = serves, tiles


@torch.library.register_fake("fisnet::dual_fprop_adjoint")
def _(g_bar, g_plus_bar, W, sy, sx, py, px, dy, dx, a, s, s_plus, z_plus, eps, eps_n, eps_plus, tile, poison=False):
    return tuple(new_map(g_bar, *a.shape) for _ in range(4))
