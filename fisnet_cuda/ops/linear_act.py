"""The forward of a linear map with what stands behind it: bias, a BatchNorm that is constant, skip, ReLU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dispatch
from ..reference import Geometry
from .linear_maps import _autocasting, _compute_dtype


class _LinearAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, shift, skip, geometry, relu, backend):
        (y,) = dispatch.run("linear_act", backend, x, W, Geometry(*geometry), None, shift, skip, relu)
        ctx.save_for_backward(x, W, y if relu else None)
        ctx.geometry, ctx.biases = geometry, None if shift is None else shift.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, y_bar):
        x, W, y = ctx.saved_tensors
        need = ctx.needs_input_grad
        if y is not None:
            y_bar = torch.ops.aten.threshold_backward(y_bar, y, 0)
        spatial, stride, padding, dilation, groups = ctx.geometry
        if spatial:
            x_bar, W_bar, shift_bar = torch.ops.aten.convolution_backward(
                y_bar, x, W, ctx.biases, stride, padding, dilation, False, [0] * spatial, groups, list(need[:3])
            )
        else:
            flat = y_bar.flatten(0, -2)
            x_bar = torch.matmul(y_bar, W) if need[0] else None
            W_bar = flat.transpose(0, 1) @ x.flatten(0, -2) if need[1] else None
            shift_bar = flat.sum(0) if need[2] else None
        return x_bar, W_bar, shift_bar, y_bar if need[3] else None, None, None, None


def linear_act(
    x: Tensor,  # [N, C_in, ...]
    W: Tensor,  # [C_out, C_in/groups, *kernel]
    geometry: Geometry,
    scale: Tensor | None = None,  # [C_out]
    shift: Tensor | None = None,  # [C_out]
    skip: Tensor | None = None,  # [N, C_out, ...]
    relu: bool = False,
    pre_scale: Tensor | None = None,  # [C_in]
    pre_shift: Tensor | None = None,  # [C_in]
    *,
    backend: str = "auto",
) -> Tensor:  # [N, C_out, ...]
    """``y = [relu](scale . (W x') + shift + skip)``, ``x' = relu(pre_scale . x + pre_shift)`` where those are given, else x.

    ``scale`` and ``pre_scale`` are BatchNorms with running statistics, for inference: they have no backward here. Deterministic
    where the library's convolutions are. Under autocast it runs in the autocast dtype.

    Args:
        x: ``[N, C_in, ...]`` (dense: channels last). Gets a gradient.
        W: weight ``[C_out, C_in/groups, *kernel]``. Gets a gradient.
        geometry: `conv_geometry(...)` or `linear_geometry()`.
        scale: factor ``[C_out]`` of a BatchNorm.
        shift: ``[C_out]``: the bias, or BatchNorm's own shift with the bias in it. Gets a gradient.
        skip: added before the ReLU, shaped as the result. Gets a gradient.
        relu: whether a ReLU follows.
        pre_scale, pre_shift: ``[C_in]``, a BatchNorm with a ReLU in front of the map.
        backend: "auto", "reference" or "cuda".

    Returns:
        ``[N, C_out, ...]``.

    Raises:
        RuntimeError: a gradient is asked for through ``scale`` or ``pre_scale``.
        ValueError: a skip of another shape than the result.

    Example:
        >>> import torch
        >>> from fisnet_cuda.ops import linear_geometry
        >>> x, W, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]]), torch.tensor([-2.0])
        >>> linear_act(x, W, linear_geometry(), shift=b, relu=True)
        tensor([[0.]])
    """
    if _autocasting(x):
        dtype = _compute_dtype(x)
        x, W = x.to(dtype), W.to(dtype)
        skip = None if skip is None else skip.to(dtype)
        shift = shift.to(dtype) if shift is not None and scale is None else shift
    operands = (scale, shift, skip, bool(relu), pre_scale, pre_shift)
    if torch.is_grad_enabled() and scale is None and pre_scale is None:
        alias = x.view_as(x) if skip is x else skip  # torch.compile follows no Function that gets one tensor twice
        y = _LinearAct.apply(x, W, shift, alias, tuple(geometry), bool(relu), backend)
    elif torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, W, *operands)):
        raise RuntimeError("linear_act has no backward through scale or pre_scale: call it under torch.no_grad()")
    else:
        (y,) = dispatch.run("linear_act", backend, x, W, geometry, *operands)
    if skip is not None and skip.shape != y.shape:
        raise ValueError(f"skip must have the shape of the result, {tuple(y.shape)}, got {tuple(skip.shape)}")
    return y


def constant_batch_norm(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, linear_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # ([C], [C], [C])
    """``(scale, shift, rstd)`` of a BatchNorm with running statistics behind a map with ``linear_bias``.

    Example:
        >>> import torch
        >>> one = torch.ones(1)
        >>> constant_batch_norm(2 * one, one, 3 * one, one, 0.0)
        (tensor([2.]), tensor([-5.]), tensor([1.]))
    """
    rstd = torch.rsqrt(var + eps)
    scale = rstd if weight is None else weight * rstd
    centre = -mean if linear_bias is None else linear_bias - mean
    return scale, centre * scale if bias is None else torch.addcmul(bias, centre, scale), rstd
