"""The z^B rule: where the relevance program ends for bounded inputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._backend import kernel
from ..reference import Geometry
from .linear_maps import _compute_dtype


class _ZB(torch.autograd.Function):
    @staticmethod
    def forward(ctx, R_out, x, z, W, shift, low, high, eps, geometry, carrier, backend):
        R, s, den = kernel("zb", backend, R_out)(R_out, x, z, W, shift, low, high, eps, Geometry(*geometry), carrier)
        again = s is None  # the ratios were not kept: what they are made of is
        kept_R = R_out if again or carrier is not None else None
        ctx.save_for_backward(kept_R, s, den, x, z if again else None, W, shift, low, high, carrier)
        ctx.eps, ctx.geometry, ctx.backend = eps, geometry, backend
        return R

    @staticmethod
    @once_differentiable
    def backward(ctx, R_bar):
        R_out, s, den, x, z, W, shift, low, high, carrier = ctx.saved_tensors
        need = ctx.needs_input_grad
        R_out_bar, W_bar, shift_bar, x_bar, carrier_bar = kernel("zb_backward", ctx.backend, R_bar)(
            R_bar, R_out, s, den, x, z, W, shift, low, high, ctx.eps, Geometry(*ctx.geometry), need[3] or need[4], need[1],
            carrier,
        )  # fmt: skip
        return R_out_bar, x_bar, None, W_bar, shift_bar, None, None, None, None, carrier_bar, None


def zb(
    R_out: Tensor,  # [N*K, C_out, ...]
    x: Tensor,  # [N, C_in, ...]
    z: Tensor,  # [N, C_out, ...]
    W: Tensor,  # [C_out, C_in/groups, *kernel]
    shift: Tensor | None,  # [C_out]
    low: Tensor,  # [C_in], [1] or [1, C_in, ...]
    high: Tensor,  # as low
    eps: float,
    geometry: Geometry,
    carrier: Tensor | None = None,  # [N, C_out, ...]
    *,
    backend: str = "auto",
) -> Tensor:  # [N*K, C_in, ...]
    """The z^B rule of a layer with inputs ``low <= x <= high``: the heatmap of the whole network.

    ``z' = W x + b - (W+ l + b+ min l) - (W- h + b- max h)``, ``s = R_out / (z' + e sign z')``,
    ``R = (x - l) W+^T s + (x - h) W-^T s`` (Montavon et al. 2017; semantics.md section 2). Zero padding applies to the
    constant images ``l`` and ``h`` as well. Deterministic where the library's convolutions are.

    Args:
        R_out: relevance of the layer's outputs ``[N*K, C_out, ...]``. Gets a gradient.
        x: the network's input ``[N, C_in, ...]``. Gets a gradient when it asks for one.
        z: the value of ``W x + b`` wherever ``R_out`` is not 0 (a ReLU's output will do). Its gradient is taken by the
            formula, that is through ``x``, ``W`` and ``shift``, not through this tensor.
        W: weight with BatchNorm folded in. Gets a gradient.
        shift: bias ``b`` with BatchNorm folded in ``[C_out]``, or None. Gets a gradient.
        low, high: the bounds, ``[C_in]`` or ``[1]``, constant; or an image of them, shaped as one sample of ``x``.
        eps: the stabiliser, in units of ``z``.
        geometry: `conv_geometry(...)` or `linear_geometry()`.
        carrier: the value (a ReLU's output) that ``R_out`` is relevance per unit of; None when it is relevance itself. Gets a
            gradient.
        backend: "auto", "reference" or "cuda".

    Returns:
        Relevance of the input, ``[N*K, C_in, ...]``.

    Raises:
        ValueError: a bound's length is neither 1 nor the number of channels of ``x``.

    Example:
        >>> import torch
        >>> from fisnet_cuda.ops import linear_geometry
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> W, x = torch.tensor([[2.0, 2.0]]), torch.tensor([[0.25, 0.75]])
        >>> zb(torch.ones(1, 1), x, x @ W.T, W, None, zero, one, 0.0, linear_geometry())
        tensor([[0.2500, 0.7500]])
    """
    channels = x.shape[1 if geometry.spatial else -1]
    vectors = [(name, bound) for name, bound in (("low", low), ("high", high)) if bound.dim() == 1]
    for name, bound in vectors:
        if bound.numel() not in (1, channels):
            raise ValueError(f"input_{name} has {bound.numel()} channels and the input has {channels}: give 1 or {channels}")
    if not geometry.spatial and x.dim() != 2 and any(bound.numel() > 1 for _, bound in vectors):
        raise ValueError("per-channel bounds need an input [N, C] for a dense first layer: give one number for both")
    dtype = _compute_dtype(R_out)
    cast = [t if t is None else t.detach().to(dtype) for t in (z, low, high)]
    R_out, x, W = R_out.to(dtype), x.to(dtype), W.to(dtype)
    shift = shift if shift is None else shift.to(dtype)
    carrier = carrier if carrier is None else carrier.to(dtype)
    if not torch.is_grad_enabled():
        return kernel("zb", backend, R_out)(R_out, x, cast[0], W, shift, cast[1], cast[2], float(eps), geometry, carrier)[0]
    return _ZB.apply(R_out, x, cast[0], W, shift, cast[1], cast[2], float(eps), tuple(geometry), carrier, backend)
