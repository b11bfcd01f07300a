"""From a captured graph to LRP nodes: module, functional, method, operator and aten spellings of an op become one kind.

`_Normaliser` has one method per op, ``op_<name>``, found by the canonical name of a call (``F.relu``, ``x.relu_()``,
``torch.ops.aten.relu.default`` are all ``relu``), and one per module type, ``mod_<TypeName>``. What has no method is refused
by name, with the module's path.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..reference import conv_geometry, linear_geometry
from .capture import Captured
from .ir import Graph, Mode, Node, Param, Ref
from .modules import leaf_type
from .reading import Host, Method, Parts, Reader, Unread, is_activation

_PAD_MODES = ("constant", "reflect", "replicate")
_INTERPOLATE_MODES = ("nearest", "linear", "bilinear", "bicubic", "trilinear")


def normalise(model: nn.Module, captured: Captured) -> Graph:
    """Turn a captured graph into LRP nodes.

    Raises:
        UnsupportedModelError: names the module path, the op and what to do.
    """
    return _Normaliser(model, captured).run()


def follow_modes(train: Graph, evaluate: Graph) -> tuple[Graph, Graph]:
    """Two traces of a model, with the flags that copy a module's mode replaced by that mode.

    ``F.dropout(x, training=self.training)`` is traced as True in train and as False in eval mode: it then follows the module
    that makes the call, whose mode may differ from the model's (a frozen part).
    """
    flags, off = ({n.name: n.attrs.get("training") for n in g.nodes} for g in (train, evaluate))
    following = {name for name, flag in flags.items() if flag is True and off.get(name) is False}

    def follow(node: Node) -> Node:
        if node.name not in following:
            return node
        return replace(node, attrs={**node.attrs, "training": Mode(node.attrs["owner"])})

    return tuple(replace(g, nodes=tuple(follow(n) for n in g.nodes)) for g in (train, evaluate))


def _max_pool_op(spatial: int) -> Callable:
    def op(self, x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        if return_indices:
            raise self.with_indices(f"max_pool{spatial}d")
        settings = (kernel_size, _stride(stride), padding, dilation, ceil_mode)
        return self.pool("pool_max", x, spatial, False, settings)

    return op


def _avg_pool_op(spatial: int) -> Callable:
    def op(self, x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None):
        settings = (kernel_size, _stride(stride), padding, ceil_mode, count_include_pad)
        return self.pool("pool_avg", x, spatial, False, settings + (() if spatial == 1 else (divisor_override,)))

    return op


def _stride(stride: Any) -> Any:
    return None if stride == [] else stride  # aten writes "as the kernel" as an empty list


def _adaptive_op(kind: str, spatial: int) -> Callable:
    def op(self, x, output_size, return_indices=False):
        if return_indices:
            raise self.with_indices(f"adaptive_max_pool{spatial}d")
        pooled = self.pool(kind, x, spatial, True, (output_size,))
        return (pooled, Unread()) if self.aten and kind == "pool_max" else pooled

    return op


def _activation_op(function: str, *names: str) -> Callable:
    """A function with the settings ``names``, whose defaults are PyTorch's."""

    def op(self, x, *args, **kwargs):
        kwargs.pop("inplace", None)
        given = {**dict(zip(names, args)), **kwargs}
        return self.activation(x, function, *(given.get(name, _DEFAULTS[name]) for name in names))

    return op


_DEFAULTS = {
    "negative_slope": 0.01, "alpha": 1.0, "min_val": -1.0, "max_val": 1.0, "approximate": "none", "beta": 1.0,
    "threshold": 20.0,
}  # fmt: skip


def _activation_module(function: str, *names: str) -> Callable:
    def mod(self, m, path, x):
        return self.activation(x, function, *(getattr(m, name) for name in names))

    return mod


def _dropout_op(feature: int) -> Callable:
    def op(self, x, p=0.5, training=True, inplace=False, train=None):
        return self.add("mask", (x,), p=p, feature=feature, training=training if train is None else train, owner=self.at)

    return op


def _cast_op(dtype: torch.dtype) -> Callable:
    def op(self, x):
        return self.add("cast", (x,), dtype=dtype)

    return op


def _upsample_op(mode: str) -> Callable:
    """aten's spelling of ``F.interpolate``."""

    def op(self, x, output_size=None, *settings):
        align_corners, factors = (None, *settings) if mode == "nearest" else settings
        return self.op_interpolate(x, output_size, factors, mode, align_corners)

    return op


class _Normaliser(Reader):
    # ---- modules -----------------------------------------------------------------------------------------------------

    def module(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """A call of a layer."""
        module = self.model.get_submodule(path)
        if hasattr(module, "lrp_expand"):
            return self.expand(path, module.lrp_expand(), *args, **kwargs)
        kind = leaf_type(module)
        name = (kind or type(module)).__name__
        method: Callable | None = getattr(self, f"mod_{name}", None) if kind else None
        if method is None:
            raise self.unsupported(type(module).__name__)
        x, *rest = (*args, *kwargs.values())
        if rest or not is_activation(x):
            raise self.unsupported(f"{name} with {len(args) + len(kwargs)} arguments", "it takes the activation alone")
        return method(module, path, x)

    def expand(self, path: str, steps: tuple[str, ...], x: Ref, skip: Ref | None = None, y: Ref | None = None) -> Ref:
        """A fused layer of `fisnet_cuda.nn`: its children by name, "add" and "relu"."""
        skip = y if skip is None else skip
        for step in steps:
            if step == "add":
                x = x if skip is None else self.add("add", (x, skip), name=f"{path}.add")
            elif step == "relu":
                x = self.add("relu", (x,), name=f"{path}.relu")
            else:
                self.at = self.call = f"{path}.{step}"
                x = self.module(self.at, x)
        return x

    def _conv(self, m: nn.Module, path: str, x: Ref) -> Ref:
        weight, bias = self.weight(path, "weight"), self.weight(path, "bias")
        padding: Any = m.padding
        if m.padding_mode != "zeros":
            if m.padding_mode not in _PAD_MODES:
                raise self.unsupported(f"padding_mode={m.padding_mode!r}", "it has no transpose here", "Use zeros or reflect.")
            pad = tuple(int(p) for p in m._reversed_padding_repeated_twice)
            x, padding = self.padded(x, path, pad, m.padding_mode), 0
        size = tuple(m.kernel_size)
        return self.convolution(x, weight, bias, m.stride, padding, m.dilation, m.groups, len(size), path, size)

    mod_Conv1d = mod_Conv2d = mod_Conv3d = _conv

    def padded(self, x: Ref, path: str, pad: tuple, mode: str) -> Ref:
        """Explicit padding before a convolution."""
        return self.add("linear_map", (x,), name=f"{path}.pad", op="pad", settings=(pad, mode, 0.0))

    def convolution(self, x, weight, bias, stride, padding, dilation, groups, spatial, name=None, kernel=None) -> Ref:
        self.check_weights("conv", weight, bias)
        geometry = conv_geometry(spatial, stride, 0 if isinstance(padding, str) else padding, dilation, groups)
        if padding == "same":
            if kernel is None and not isinstance(weight, Param):
                raise self.unsupported("padding='same' with a computed weight", "its size is not known", "Give the padding.")
            kernel = kernel or tuple(self.look_up(weight.path).shape[2:])
            totals = [d * (k - 1) for d, k in zip(geometry.dilation, kernel)]
            geometry = geometry._replace(padding=tuple(t // 2 for t in totals))
            if any(t % 2 for t in totals):  # as PyTorch: the odd one goes to the far end
                x = self.padded(x, name or self.at, tuple(v for t in reversed(totals) for v in (0, t % 2)), "constant")
        shape = tuple(self.look_up(weight.path).shape) if isinstance(weight, Param) else None
        return self.add("conv", (x,), name=name, weight=weight, bias=bias, geometry=geometry, shape=shape)

    def check_weights(self, op: str, *weights: Any) -> None:
        """Weights are parameters, or computed from parameters alone."""
        self.check_constants(weights)
        if any(is_activation(w) for w in weights):
            raise self.unsupported(op, "its weight is an activation: dynamic convolutions", "Use a layer with its own weight.")

    def mod_Linear(self, m: nn.Linear, path: str, x: Ref) -> Ref:
        weight, bias = self.weight(path, "weight"), self.weight(path, "bias")
        return self.add(
            "linear", (x,), name=path, weight=weight, bias=bias, geometry=linear_geometry(), features=m.out_features
        )

    def _batch_norm(self, m: nn.Module, path: str, x: Ref) -> Ref:
        names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        weight, bias, mean, var, counter = (self.weight(path, name) for name in names)
        return self.add(
            "batch_norm", (x,), name=path, weight=weight, bias=bias, running_mean=mean, running_var=var, counter=counter,
            training=Mode(path), momentum=Param(f"{path}.momentum"), eps=m.eps, features=m.num_features,
            tracks=bool(m.track_running_stats),
        )  # fmt: skip

    mod_BatchNorm1d = mod_BatchNorm2d = mod_BatchNorm3d = _batch_norm

    def norm(self, x: Ref, norm: str, weight: Any, bias: Any, settings: tuple) -> Ref:
        self.check_weights(f"{norm}_norm", weight, bias)
        return self.add("norm", (x,), norm=norm, weight=weight, bias=bias, settings=settings)

    def mod_GroupNorm(self, m: nn.GroupNorm, path: str, x: Ref) -> Ref:
        return self.norm(x, "group", self.weight(path, "weight"), self.weight(path, "bias"), (m.num_groups, m.eps))

    def mod_LayerNorm(self, m: nn.LayerNorm, path: str, x: Ref) -> Ref:
        settings = (tuple(m.normalized_shape), m.eps)
        return self.norm(x, "layer", self.weight(path, "weight"), self.weight(path, "bias"), settings)

    def _instance_norm(self, m: nn.Module, path: str, x: Ref) -> Ref:
        if m.track_running_stats:
            raise self.unsupported("InstanceNorm with track_running_stats=True", do="Use track_running_stats=False.")
        return self.norm(x, "instance", self.weight(path, "weight"), self.weight(path, "bias"), (m.eps,))

    mod_InstanceNorm1d = mod_InstanceNorm2d = mod_InstanceNorm3d = _instance_norm

    def mod_ReLU(self, m: nn.ReLU, path: str, x: Ref) -> Ref:
        return self.add("relu", (x,))

    def activation(self, x: Ref, function: str, *settings: Any) -> Ref:
        return self.add("activation", (x,), function=function, settings=settings)

    mod_ReLU6 = _activation_module("relu6")
    mod_Hardtanh = _activation_module("hardtanh", "min_val", "max_val")
    mod_LeakyReLU = _activation_module("leaky_relu", "negative_slope")
    mod_ELU = _activation_module("elu", "alpha")
    mod_SiLU = _activation_module("silu")
    mod_GELU = _activation_module("gelu", "approximate")
    mod_Hardswish = _activation_module("hardswish")
    mod_Tanh = _activation_module("tanh")
    mod_Softplus = _activation_module("softplus", "beta", "threshold")
    mod_Mish = _activation_module("mish")

    def with_indices(self, name: str):
        return self.unsupported(f"{name} with return_indices=True", "indices carry no relevance", "Leave it out.")

    def _max_pool(self, m: nn.Module, path: str, x: Ref) -> Ref:
        if m.return_indices:
            raise self.with_indices(type(m).__name__)
        return self.pool("pool_max", x, _spatial(m), False, (m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode))

    mod_MaxPool1d = mod_MaxPool2d = mod_MaxPool3d = _max_pool

    def _avg_pool(self, m: nn.Module, path: str, x: Ref) -> Ref:
        settings = (m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad)
        divisor = () if _spatial(m) == 1 else (m.divisor_override,)
        return self.pool("pool_avg", x, _spatial(m), False, settings + divisor)

    mod_AvgPool1d = mod_AvgPool2d = mod_AvgPool3d = _avg_pool

    def _adaptive_avg(self, m: nn.Module, path: str, x: Ref) -> Ref:
        return self.pool("pool_avg", x, _spatial(m), True, (m.output_size,))

    mod_AdaptiveAvgPool1d = mod_AdaptiveAvgPool2d = mod_AdaptiveAvgPool3d = _adaptive_avg

    def _adaptive_max(self, m: nn.Module, path: str, x: Ref) -> Ref:
        if m.return_indices:
            raise self.with_indices(type(m).__name__)
        return self.pool("pool_max", x, _spatial(m), True, (m.output_size,))

    mod_AdaptiveMaxPool1d = mod_AdaptiveMaxPool2d = mod_AdaptiveMaxPool3d = _adaptive_max

    def pool(self, kind: str, x: Ref, spatial: int, adaptive: bool, settings: tuple) -> Ref:
        settings = tuple(tuple(s) if isinstance(s, list) else s for s in settings)
        return self.add(kind, (x,), spatial=spatial, adaptive=adaptive, settings=settings)

    def _dropout(self, m: nn.Module, path: str, x: Ref) -> Ref:
        feature = 0 if leaf_type(m) is nn.Dropout else _spatial(m)
        return self.add("mask", (x,), p=Param(f"{path}.p"), feature=feature, training=Mode(path))

    mod_Dropout = mod_Dropout1d = mod_Dropout2d = mod_Dropout3d = _dropout

    def mod_Identity(self, m: nn.Identity, path: str, x: Ref) -> Ref:
        return x

    def mod_Flatten(self, m: nn.Flatten, path: str, x: Ref) -> Ref:
        return self.op_flatten(x, m.start_dim, m.end_dim)

    def mod_Unflatten(self, m: nn.Unflatten, path: str, x: Ref) -> Ref:
        return self.op_unflatten(x, m.dim, m.unflattened_size)

    def _pad(self, m: nn.Module, path: str, x: Ref) -> Ref:
        kind = leaf_type(m).__name__
        mode = "reflect" if "Reflection" in kind else "replicate" if "Replication" in kind else "constant"
        return self.op_pad(x, m.padding, mode, getattr(m, "value", 0.0))

    mod_ZeroPad1d = mod_ZeroPad2d = mod_ZeroPad3d = mod_ConstantPad1d = mod_ConstantPad2d = mod_ConstantPad3d = _pad
    mod_ReflectionPad1d = mod_ReflectionPad2d = mod_ReflectionPad3d = _pad
    mod_ReplicationPad1d = mod_ReplicationPad2d = mod_ReplicationPad3d = _pad

    def mod_Upsample(self, m: nn.Upsample, path: str, x: Ref) -> Ref:
        return self.op_interpolate(x, m.size, m.scale_factor, m.mode, m.align_corners, m.recompute_scale_factor)

    def mod_PixelShuffle(self, m, path, x):
        return self.op_pixel_shuffle(x, m.upscale_factor)

    def mod_PixelUnshuffle(self, m, path, x):
        return self.op_pixel_unshuffle(x, m.downscale_factor)

    def mod_ChannelShuffle(self, m, path, x):
        return self.op_channel_shuffle(x, m.groups)

    # ---- functions, methods, operators, aten ---------------------------------------------------------------------------

    def op_conv1d(self, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        return self.convolution(x, weight, bias, stride, padding, dilation, groups, 1)

    def op_conv2d(self, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        return self.convolution(x, weight, bias, stride, padding, dilation, groups, 2)

    def op_conv3d(self, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        return self.convolution(x, weight, bias, stride, padding, dilation, groups, 3)

    def op_linear(self, x, weight, bias=None):
        self.check_weights("linear", weight, bias)
        return self.add("linear", (x,), weight=weight, bias=bias, geometry=linear_geometry())

    def op_matmul(self, x, other):
        if not is_activation(x) or is_activation(other):
            raise self.unsupported("matmul")
        self.check_constants(other)
        return self.op_linear(x, self.later(torch.t, (other,), {}))

    op_mm = op_matmul

    def op_batch_norm(self, x, *args, **kwargs):
        names = ("weight", "bias", "running_mean", "running_var") if self.aten else (
            "running_mean", "running_var", "weight", "bias")  # fmt: skip
        given = {**dict(zip((*names, "training", "momentum", "eps"), args)), **kwargs}
        tensors = {name: given.get(name) for name in names}
        self.check_weights("batch_norm", *tensors.values())
        return self.add(
            "batch_norm", (x,), **tensors, counter=None, training=given.get("training", False), owner=self.at,
            momentum=given.get("momentum", 0.1), eps=given.get("eps", 1e-5), tracks=True,
        )  # fmt: skip

    def op_instance_norm(self, x, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True,
                         momentum=0.1, eps=1e-5, cudnn_enabled=True):  # fmt: skip
        if self.aten:
            running_mean, running_var, weight, bias = weight, bias, running_mean, running_var
        if running_mean is not None:
            raise self.unsupported("instance_norm with running statistics", do="Use the input's own statistics.")
        return self.norm(x, "instance", weight, bias, (eps,))

    def op_group_norm(self, x, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
        return self.norm(x, "group", weight, bias, (num_groups, eps))

    def op_layer_norm(self, x, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
        return self.norm(x, "layer", weight, bias, (_sequence((normalized_shape,)), eps))

    def op_relu(self, x, inplace=False):
        return self.add("relu", (x,))

    def op_clamp(self, x, min=None, max=None):
        if isinstance(min, (int, float)) and min == 0 and max is None:
            return self.add("relu", (x,))
        raise self.unsupported("clamp", "only clamp(min=0), a ReLU, has a rule", "Use relu, relu6 or hardtanh.")

    op_clamp_min = op_clamp
    op_relu6 = _activation_op("relu6")
    op_hardtanh = _activation_op("hardtanh", "min_val", "max_val")
    op_leaky_relu = _activation_op("leaky_relu", "negative_slope")
    op_elu = _activation_op("elu", "alpha")
    op_silu = _activation_op("silu")
    op_gelu = _activation_op("gelu", "approximate")
    op_hardswish = _activation_op("hardswish")
    op_tanh = _activation_op("tanh")
    op_softplus = _activation_op("softplus", "beta", "threshold")
    op_mish = _activation_op("mish")

    op_max_pool1d, op_max_pool2d, op_max_pool3d = map(_max_pool_op, (1, 2, 3))
    op_avg_pool1d, op_avg_pool2d, op_avg_pool3d = map(_avg_pool_op, (1, 2, 3))
    op_adaptive_avg_pool1d, op_adaptive_avg_pool2d, op_adaptive_avg_pool3d = map(partial(_adaptive_op, "pool_avg"), (1, 2, 3))
    op_adaptive_max_pool1d, op_adaptive_max_pool2d, op_adaptive_max_pool3d = map(partial(_adaptive_op, "pool_max"), (1, 2, 3))
    op_dropout, op_dropout1d, op_dropout2d, op_dropout3d = map(_dropout_op, (0, 1, 2, 3))
    op_feature_dropout = _dropout_op(2)

    def op_add(self, x, other, alpha=1):
        if alpha != 1:
            raise self.unsupported(f"add with alpha={alpha}", do="Multiply first: x + alpha * y.")
        if is_activation(x) and is_activation(other):
            return self.add("add", (x, other))
        x, other = (x, other) if is_activation(x) else (other, x)
        return self.constant(x, operator.add, other, False)

    def op_sub(self, x, other, alpha=1):
        if alpha != 1:
            raise self.unsupported(f"sub with alpha={alpha}", do="Multiply first: x - alpha * y.")
        if is_activation(other):  # x - y = -y + x
            return self.op_add(self.op_neg(other), x)
        return self.constant(x, operator.sub, other, False)

    def op_rsub(self, x, other, alpha=1):
        return self.op_sub(other, x, alpha)

    def op_mul(self, x, other):
        if is_activation(x) and is_activation(other):
            raise self.unsupported("mul")
        x, other = (x, other) if is_activation(x) else (other, x)
        return self.constant(x, operator.mul, other, True)

    def op_div(self, x, other, rounding_mode=None):
        if rounding_mode or is_activation(other):
            raise self.unsupported("div", "only activation / constant has a rule", "Divide by a constant.")
        return self.constant(x, operator.truediv, other, True)

    op_true_divide = op_divide = op_div

    def op_neg(self, x):
        return self.constant(x, operator.mul, -1.0, True)

    def constant(self, x: Ref, fn: Callable, constant: Any, scales: bool) -> Ref:
        """``x + c``, ``x - c`` (a bias), ``x * c``, ``x / c`` (a scale)."""
        self.check_constants(constant)
        return self.add("constant", (x,), fn=fn, constant=constant, scales=scales, fixed=self.is_fixed(constant))

    def op_cat(self, tensors, dim=0):
        dim = int(dim)
        self.check_batch_axis((dim,), "cat along axis 0")
        if not all(is_activation(t) for t in tensors):
            raise self.unsupported("cat", "a part of it is no activation", "Concatenate activations alone.")
        return self.add("concat", tuple(tensors), dim=dim) if len(tensors) > 1 else self.add("copy", (tensors[0],))

    op_concat = op_concatenate = op_cat

    def op_repeat(self, x, *repeats):
        return self.copies(x, _sequence(repeats), "repeat", 1)

    def op_expand(self, x, *sizes, implicit=False):
        return self.copies(x, _sequence(sizes), "expand", -1)

    def copies(self, x: Ref, counts: tuple, name: str, keep: int) -> Ref:
        """A grey image repeated over the channels, and the like: a concatenation of one value with itself."""
        if not all(isinstance(n, int) for n in counts) or counts[0] != keep:
            why = f"sizes must be numbers, {keep} for the batch"
            raise self.unsupported(f"{name}{counts}", why, "Use torch.cat([x, x], 1).")
        for dim, count in enumerate(counts):
            if count not in (keep, 1):
                one = [count if d == dim else keep for d in range(len(counts))]
                x = self.add("concat", (x,) * count, dim=dim - len(counts), fn=Method(name), settings=tuple(one))
        return x

    def op_flatten(self, x, start_dim=0, end_dim=-1):
        self.check_batch_axis((start_dim,), "flatten from axis 0")
        return self.add("reshape", (x,), fn=torch.flatten, settings=(start_dim, end_dim))

    def op_unflatten(self, x, dim, sizes):
        self.check_batch_axis((dim,), "unflatten of axis 0")
        return self.add("reshape", (x,), fn=torch.unflatten, settings=(dim, tuple(sizes)))

    def op_reshape(self, x, *shape):
        return self.add("reshape", (x,), fn=torch.reshape, settings=(_sequence(shape),))

    op_view = op_reshape

    def op_squeeze(self, x, dim=None):
        if dim is None:
            raise self.unsupported("squeeze", "without an axis it would drop a batch of one", "Name the axes.")
        dims = (dim,) if isinstance(dim, int) else tuple(dim)
        self.check_batch_axis(dims, "squeeze of axis 0")
        return self.add("reshape", (x,), fn=torch.squeeze, settings=(dims,))

    def op_unsqueeze(self, x, dim):
        self.check_batch_axis((dim,), "unsqueeze at axis 0")
        return self.add("reshape", (x,), fn=torch.unsqueeze, settings=(dim,))

    def op_contiguous(self, x, memory_format=None):
        return x

    def op_clone(self, x, memory_format=None):
        return self.add("copy", (x,))

    op_float = _cast_op(torch.float32)
    op_double = _cast_op(torch.float64)
    op_half = _cast_op(torch.float16)
    op_bfloat16 = _cast_op(torch.bfloat16)

    def op_to(self, x, *args, **kwargs):
        given = [*args, *kwargs.values()]
        dtypes = [v for v in given if isinstance(v, torch.dtype)]
        if len(dtypes) != 1 or any(not isinstance(v, (torch.dtype, bool, type(None), torch.memory_format)) for v in given):
            raise self.unsupported("to", "only .to(dtype) has a rule", "Move and convert the input before the model.")
        return self.add("cast", (x,), dtype=dtypes[0])

    def op_permute(self, x, *dims):
        dims = _sequence(dims)
        if dims[0] != 0:
            raise self.unsupported("permute of axis 0", "it mixes the samples of the batch", "Leave axis 0 alone.")
        return self.add("permute", (x,), dims=dims)

    def op_transpose(self, x, dim0, dim1):
        self.check_batch_axis((dim0, dim1), "transpose of axis 0")
        return self.add("permute", (x,), dims=(dim0, dim1), swap=True)

    op_swapaxes = op_swapdims = op_transpose

    def op_mean(self, x, dim=None, keepdim=False, dtype=None):
        return self.reduction("mean", x, dim, keepdim, dtype)

    def op_sum(self, x, dim=None, keepdim=False, dtype=None):
        return self.reduction("sum", x, dim, keepdim, dtype)

    def reduction(self, op: str, x: Ref, dim: Any, keepdim: bool, dtype: torch.dtype | None) -> Ref:
        if dim is None or dim == []:
            raise self.unsupported(f"{op} over everything", "it mixes the samples of the batch", "Name the axes.")
        dims = (dim,) if isinstance(dim, int) else tuple(dim)
        self.check_batch_axis(dims, f"{op} over axis 0")
        if dtype is not None:
            x = self.add("cast", (x,), dtype=dtype)
        return self.add("linear_map", (x,), op=op, settings=(dims, bool(keepdim)))

    def op_pad(self, x, pad, mode="constant", value=None):
        pad = tuple(pad) if isinstance(pad, (tuple, list)) else (pad,)
        if mode == "constant" and value:
            raise self.unsupported(f"pad with the value {value}", "only zeros have a rule", "Pad with 0.")
        if mode not in _PAD_MODES:
            raise self.unsupported(f"pad with mode {mode!r}", do=f"Use {', '.join(_PAD_MODES)}.")
        return self.add("linear_map", (x,), op="pad", settings=(pad, mode, 0.0))

    def op_constant_pad_nd(self, x, pad, value=0):
        return self.op_pad(x, pad, "constant", value)

    def op_interpolate(self, x, size=None, scale_factor=None, mode="nearest", align_corners=None,
                       recompute_scale_factor=None, antialias=False):  # fmt: skip
        if antialias or mode not in _INTERPOLATE_MODES:
            what = "antialias=True" if antialias else f"mode {mode!r}"
            raise self.unsupported(f"interpolate with {what}", do=f"Use {', '.join(_INTERPOLATE_MODES)}, without antialias.")
        settings = (_tuple(size), _tuple(scale_factor), mode, align_corners, recompute_scale_factor)
        return self.add("linear_map", (x,), op="interpolate", settings=settings)

    op_upsample = op_interpolate
    op_upsample_nearest1d = op_upsample_nearest2d = op_upsample_nearest3d = _upsample_op("nearest")
    op_upsample_linear1d = _upsample_op("linear")
    op_upsample_bilinear2d = _upsample_op("bilinear")
    op_upsample_bicubic2d = _upsample_op("bicubic")
    op_upsample_trilinear3d = _upsample_op("trilinear")

    def op_pixel_shuffle(self, x, factor):
        return self.add("linear_map", (x,), op="pixel_shuffle", settings=(factor,))

    def op_pixel_unshuffle(self, x, factor):
        return self.add("linear_map", (x,), op="pixel_unshuffle", settings=(factor,))

    def op_channel_shuffle(self, x, groups):
        return self.add("linear_map", (x,), op="channel_shuffle", settings=(groups,))

    op_native_channel_shuffle = op_channel_shuffle

    def slice(self, x: Ref, dim: int, start: Any = 0, stop: Any = None) -> Ref:
        return self.add("slice", (x,), dim=dim, start=start, stop=stop)

    def op_narrow(self, x, dim, start, length):
        self.check_batch_axis((dim,), "narrow of axis 0")
        if not isinstance(start, int) or not isinstance(length, int):
            raise self.unsupported("narrow", "its bounds are computed", "Use constants.")
        return self.slice(x, dim, start, start + length)

    def op_slice(self, x, dim=0, start=None, end=None, step=1):
        end = None if end is None or (isinstance(end, int) and end >= 2**62) else end
        if dim == 0 and start in (None, 0) and end is None:
            return x
        self.check_batch_axis((dim,), "slice of axis 0")
        self.check_step(step)
        return self.slice(x, dim, start or 0, end)

    def check_step(self, step: Any) -> None:
        if step not in (None, 1):
            raise self.unsupported(f"slice with step {step}", "only steps of 1 have a rule", "Use a pool or a strided layer.")

    def op_select(self, x, dim, index):
        self.check_batch_axis((dim,), "select of axis 0")
        if not isinstance(index, int):
            raise self.unsupported("indexing", "its index is computed", "Use constants.")
        part = self.slice(x, dim, index, None if index == -1 else index + 1)
        return self.add("reshape", (part,), fn=torch.squeeze, settings=((dim,),))

    def op_chunk(self, x, chunks, dim=0):
        self.check_batch_axis((dim,), "chunk of axis 0")
        return tuple(self.add("slice", (x,), dim=dim, chunk=(i, chunks)) for i in range(chunks))

    def op_split(self, x, split_size_or_sections=None, dim=0, split_size=None):
        sizes = split_size if split_size_or_sections is None else split_size_or_sections
        self.check_batch_axis((dim,), "split of axis 0")
        if not isinstance(sizes, (tuple, list)):
            return Parts(x, sizes, dim)
        stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return tuple(self.slice(x, dim, a, b) for a, b in zip([0, *stops[:-1]], stops))

    op_split_with_sizes = op_split

    def pick(self, parts: Any, index: Any) -> Any:
        """An element of several results."""
        if not isinstance(parts, Parts):
            return parts[index]
        if not isinstance(index, int) or index < 0:
            raise self.unsupported("split", "how many parts there are is not known", "Use chunk, or a list of sizes.")
        return self.slice(parts.x, parts.dim, index * parts.size, (index + 1) * parts.size)

    def op_getitem(self, x, index):
        parts = list(index) if isinstance(index, (tuple, list)) else [index]
        if not all(p is None or p is Ellipsis or (isinstance(p, (slice, int)) and not isinstance(p, bool)) for p in parts):
            raise self.unsupported("indexing", "only slices x[:, a:b], numbers x[:, i] and None have a rule", "Use those.")
        if parts[0] is not Ellipsis and parts[0] != slice(None):
            raise self.unsupported("indexing of axis 0", "it picks samples of the batch", "Leave axis 0 alone.")
        # axes count from the front before an ellipsis and from the back after it, so the outer ones go last and first
        behind = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
        axes = [p for p in parts[:behind] if p is not None]
        for dim in reversed(range(len(axes))):
            x = self.index(x, dim, axes[dim])
        axes = [p for p in parts[behind + 1 :] if p is not None]
        for dim in range(-len(axes), 0):
            x = self.index(x, dim, axes[dim])
        for position, part in enumerate(parts):
            if part is None:
                front, back = parts[:position], parts[position + 1 :]
                kept = [p for p in (front if position < behind else back) if not isinstance(p, int)]
                x = self.op_unsqueeze(x, len(kept) if position < behind else -1 - len([p for p in kept if p is not None]))
        return x

    def index(self, x: Ref, dim: int, part: Any) -> Ref:
        """``x[..., part, ...]`` along one axis."""
        if isinstance(part, int):
            return self.op_select(x, dim, part)
        if part == slice(None):
            return x
        self.check_step(part.step)
        return self.slice(x, dim, part.start or 0, part.stop)


def functions() -> list[str]:
    """Names of the functions, methods and operators that have a normal form."""
    return sorted(name[3:] for name in vars(_Normaliser) if name.startswith("op_"))


def _spatial(module: nn.Module) -> int:
    """3 for a Conv3d, and so on."""
    return int(leaf_type(module).__name__[-2])


def _sequence(values: tuple) -> Any:
    """``f(x, 1, 2)`` and ``f(x, (1, 2))`` alike; one number or computed shape stands for itself."""
    if len(values) != 1:
        return tuple(values)
    (value,) = values
    return value if isinstance(value, Host) else tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
