"""The z^B rule and its adjoint (kernel 5): csrc/kernels/zb.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import reference
from ...reference import Geometry
from . import kernel_for
from .layout import acc_dtype, dense, fit, one_dtype, vector

MAX_CHANNELS, MAX_KERNEL, MAX_STRIDE = 4, 7, 2


def refused(geometry: Geometry, weight_shape: tuple[int, ...] | None) -> str:
    """Why the kernels cannot run a layer of this geometry and weight; empty when they can (or the weight is not known)."""
    if geometry.spatial != 2:
        return "not a 2-d convolution"
    (sy, sx), (py, px) = geometry.stride, geometry.padding
    if geometry.groups != 1:
        return "groups"
    if geometry.dilation != (1, 1):
        return "dilation"
    if sy != sx or py != px:
        return "stride or padding differ between the axes"
    if sy > MAX_STRIDE:
        return f"a stride of more than {MAX_STRIDE}"
    if weight_shape is None:
        return ""
    _, channels, kh, kw = weight_shape
    if kh != kw or kh > MAX_KERNEL:
        return f"a kernel that is not square, or larger than {MAX_KERNEL}x{MAX_KERNEL}"
    if py >= kh:
        return "padding as wide as the kernel"
    if channels > MAX_CHANNELS:
        return f"more than {MAX_CHANNELS} input channels"
    return ""


def serves(R_out, x, z, W, shift, low, high, eps, geometry, weight_shape=None, carrier=None) -> str:
    """Why the kernels cannot run an instruction of the relevance program with these operands; empty when they can."""
    if not all(isinstance(bound, (int, float, tuple)) for bound in (low, high)):
        return "images of bounds"
    return refused(geometry, weight_shape)


def _runs(geometry: Geometry, x: Tensor, W: Tensor, low: Tensor, high: Tensor) -> bool:
    """Whether the kernels run this call; images of bounds go to the reference."""
    vectors = all(bound.numel() in (1, x.shape[1]) for bound in (low, high))
    return vectors and not refused(geometry, tuple(W.shape))


def _operands(R_out, x, z, W, shift, low, high, geometry, carrier) -> tuple:
    """The operands in one dtype, outputs' side in one layout, bounds as vectors ``[C_in]``."""
    R_out, z, carrier, x, W = one_dtype(R_out, z, carrier, x, W)
    R_out, z, carrier = dense(R_out, z, carrier)
    (x,) = dense(x)
    low, high = (vector(b.reshape(-1).expand(x.shape[1]), x) for b in (low, high))
    return R_out, x, z, W.contiguous(), vector(shift, x), low, high, geometry.stride[0], geometry.padding[0], carrier


@kernel_for
def zb(
    R_out: Tensor, x: Tensor, z: Tensor, W: Tensor, shift: Tensor | None, low: Tensor, high: Tensor, eps: float,
    geometry: Geometry, carrier: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See `fisnet_cuda.reference.zb`; keeps no ratios: the adjoint makes them again from operands that live anyway."""
    if not _runs(geometry, x, W, low, high):
        return reference.zb(R_out, x, z, W, shift, low, high, eps, geometry, carrier)
    R_out, x, z, W, shift, low, high, stride, padding, carrier = _operands(
        R_out, x, z, W, shift, low, high, geometry, carrier
    )
    return torch.ops.fisnet.zb(R_out, x, z, W, shift, low, high, eps, stride, padding, carrier), None, None


@kernel_for
def zb_backward(
    R_bar: Tensor, R_out: Tensor, s: Tensor | None, den: Tensor | None, x: Tensor, z: Tensor, W: Tensor,
    shift: Tensor | None, low: Tensor, high: Tensor, eps: float, geometry: Geometry, need_W: bool = True,
    need_x: bool = False, carrier: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """See `fisnet_cuda.reference.zb_backward`; ``x_bar``, wanted by nobody who trains weights, is the reference's."""
    given = (R_out, s, den, x, z, W, shift, low, high, eps, geometry)
    if s is not None or not _runs(geometry, x, W, low, high):
        return reference.zb_backward(R_bar, *given, need_W, need_x, carrier)
    x_bar = reference.zb_backward(R_bar, *given, False, True, carrier)[3] if need_x else None
    dtype_W, dtype_shift = W.dtype, None if shift is None else shift.dtype
    R_out, x, z, W, shift, low, high, stride, padding, carrier = _operands(
        R_out, x, z, W, shift, low, high, geometry, carrier
    )
    R_bar = fit(R_bar.to(x.dtype), not x.is_contiguous())
    R_out_bar, W_bar, shift_bar, carrier_bar = torch.ops.fisnet.zb_backward(
        R_bar, R_out, x, z, W, shift, low, high, eps, stride, padding, need_W, carrier
    )
    return (
        R_out_bar,
        W_bar.to(dtype_W) if need_W else None,
        shift_bar.to(dtype_shift) if need_W and shift is not None else None,
        x_bar,
        None if carrier is None else carrier_bar,
    )


zb.serves = zb_backward.serves = serves


@torch.library.register_fake("fisnet::zb")
def _(R_out, x, z, W, shift, low, high, eps, stride, padding, carrier):
    n, (c, h, w) = R_out.shape[0], x.shape[1:]
    return x.new_empty(n, c, h, w) if x.is_contiguous() else x.new_empty(n, h, w, c).permute(0, 3, 1, 2)


@torch.library.register_fake("fisnet::zb_backward")
def _(R_bar, R_out, x, z, W, shift, low, high, eps, stride, padding, need_W, carrier):
    return (
        torch.empty_like(R_out),
        torch.empty_like(W) if need_W else z.new_empty(0),
        z.new_empty(z.shape[1], dtype=acc_dtype(z)) if need_W and shift is not None else z.new_empty(0),
        z.new_empty(0) if carrier is None else torch.empty_like(carrier),
    )
