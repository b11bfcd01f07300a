"""From a captured graph to LRP nodes: module, functional, method, operator and aten spellings of an op become one kind.

`_Normaliser` has one method per op, ``op_<name>``, found by the canonical name of a call (``F.relu``, ``x.relu_()``,
``torch.ops.aten.relu.default`` are all ``relu``), and one per module type, ``mod_<TypeName>``. What has no method is refused
by name, with the module's path.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import UnsupportedModelError
from ..reference import conv_geometry, linear_geometry
from .capture import Captured
from .ir import Graph, Mode, Node, Param, Ref
from .modules import leaf_type

_REMEDY = {
    "mul": "relevance through a product of two activations is not defined here (attention, squeeze-and-excitation gates)",
    "matmul": "relevance through a product of two activations is not defined here (attention)",
    "softmax": "return the logits themselves: the losses apply softmax",
    "log_softmax": "return the logits themselves: the losses apply softmax",
    "sigmoid": "return the logits themselves: the losses apply sigmoid",
    "MultiheadAttention": "attention has no LRP rule here",
    "LSTM": "recurrent layers have no LRP rule here",
    "ConvTranspose2d": "transposed convolutions have no LRP rule here",
}
_OPERATORS = {
    operator.add: "add", operator.iadd: "add_", operator.sub: "sub", operator.isub: "sub_", operator.mul: "mul",
    operator.imul: "mul_", operator.truediv: "div", operator.itruediv: "div_", operator.matmul: "matmul",
    operator.floordiv: "floordiv", operator.getitem: "getitem", operator.neg: "neg", getattr: "getattr",
}  # fmt: skip
_VIEWS = ("reshape", "permute", "slice")  # kinds whose value shares memory with their input


class _Host(Ref):
    """A number or a shape computed while the model runs, not a tensor that carries relevance."""


def normalise(model: nn.Module, captured: Captured) -> Graph:
    """Turn a captured graph into LRP nodes.

    Raises:
        UnsupportedModelError: names the module path, the op and what to do.
    """
    return _Normaliser(model, captured).run()


def _max_pool_op(spatial: int) -> Callable:
    def op(self, x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        if return_indices:
            raise self.unsupported(f"max_pool{spatial}d with return_indices=True", "set return_indices=False")
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
            raise self.unsupported(f"adaptive_max_pool{spatial}d with return_indices=True", "set return_indices=False")
        return self.pool(kind, x, spatial, True, (output_size,))

    return op


class _Normaliser:
    def __init__(self, model: nn.Module, captured: Captured) -> None:
        self.model, self.captured = model, captured
        self.nodes: list[Node] = []
        self.values: dict[fx.Node, Any] = {}
        self.stale: set[int] = set()  # values overwritten in place through a view of them
        self.names: dict[str, int] = {}
        self.at = ""  # path of the module being read, for names and errors
        self.call = ""

    # ---- driving -----------------------------------------------------------------------------------------------------

    def run(self) -> Graph:
        output = None
        for node in self.captured.graph.nodes:
            self.at = self.captured.owners.get(node, "")
            if node.op == "placeholder":
                self.values[node] = self.placeholder(node)
            elif node.op == "get_attr":
                self.values[node] = self.attribute(str(node.target))
            elif node.op == "output":
                output = self.logits(node.args[0])
            else:
                self.visit(node)
        if output is None:
            raise UnsupportedModelError("the model returns nothing: its forward must return the logits [N, C]")
        outputs = {
            path: value.index
            for path, node in self.captured.module_outputs.items()
            if isinstance(value := self.values.get(node), Ref) and not isinstance(value, _Host)
        }
        return Graph(tuple(self.nodes), output.index, outputs)

    def placeholder(self, node: fx.Node) -> Any:
        if node.name in self.captured.params:
            return Param(self.captured.params[node.name])
        if node.name in self.captured.constants:
            return self.captured.constants[node.name]
        if any(n.kind == "input" for n in self.nodes):
            if node.args:  # an optional argument: its default
                return node.args[0]
            raise UnsupportedModelError(
                f"forward takes a second input {str(node.target)!r}: wrap the model so that it takes the images alone"
            )
        return self.add("input", (), name="input")

    def attribute(self, path: str) -> Any:
        value: Any = self.model
        for part in path.split("."):
            value = getattr(value, part)
        return Param(path) if isinstance(value, Tensor) else value

    def logits(self, value: Any) -> Ref:
        if isinstance(value, dict):
            value = value.get("logits")
        if isinstance(value, (tuple, list)) and len(value) == 1:
            value = value[0]
        ref = self.values.get(value) if isinstance(value, fx.Node) else None
        if not isinstance(ref, Ref) or isinstance(ref, _Host):
            raise UnsupportedModelError(
                "forward must return one tensor, the logits [N, C] (or a mapping with 'logits'): wrap the model so that it does"
            )
        return ref

    def visit(self, node: fx.Node) -> None:
        if node.op == "call_module":
            path = str(node.target)
            self.at, self.call = path, path
            self.values[node] = self.module(path, *self.read(node.args), **self.read(node.kwargs))
            if getattr(self.model.get_submodule(path), "inplace", False):
                self.overwrite(node.args[0], self.values[node])
            return
        name, in_place = self.canonical(node)
        self.call = name
        args, kwargs = self.read(node.args), self.read(node.kwargs)
        if not self.carries_relevance((args, kwargs)):
            if name == "_assert" or name.startswith(("_assert", "sym_constrain")):
                return
            self.values[node] = self.host(node, args, kwargs)
            return
        if name in ("size", "getattr", "shape", "dim", "sym_size"):
            self.values[node] = self.host_of_tensor(name, args)
            return
        method = getattr(self, f"op_{name}", None)
        if method is None:
            raise self.unsupported(name)
        if in_place or kwargs.get("inplace") is True:
            self.values[node] = method(*args, **kwargs)
            self.overwrite(node.args[0], self.values[node])
        else:
            self.values[node] = method(*args, **kwargs)

    def canonical(self, node: fx.Node) -> tuple[str, bool]:
        """``(name, whether it writes to its first argument)``."""
        if node.op == "call_method":
            name = str(node.target)
        elif node.target in _OPERATORS:
            name = _OPERATORS[node.target]
        elif isinstance(node.target, torch._ops.OpOverload):
            name = node.target._schema.name.split("::")[1]
        else:
            name = getattr(node.target, "__name__", str(node.target))
        in_place = name.endswith("_") and not name.endswith("__")
        return (name[:-1] if in_place else name), in_place

    def read(self, args: Any) -> Any:
        """Arguments with fx nodes replaced by what they stand for."""
        read = fx.node.map_arg(args, lambda n: self.values[n])
        for index in _refs(read):
            if index in self.stale:
                raise UnsupportedModelError(
                    f"{self.where()}: a value is read after it was overwritten in place through a view of it. "
                    "Use the out-of-place form there."
                )
        return read

    def overwrite(self, target: fx.Node, new: Ref) -> None:
        """An in-place op: whoever reads the old value from here on sees the new one."""
        old = self.values[target]
        if not isinstance(old, Ref):
            return
        for node, value in self.values.items():
            if isinstance(value, Ref) and value == old:
                self.values[node] = new
        source = self.nodes[old.index]
        while source.kind in _VIEWS:
            self.stale.add(source.inputs[0])
            source = self.nodes[source.inputs[0]]

    @staticmethod
    def carries_relevance(args: Any) -> bool:
        return any(True for _ in _refs(args, hosts=False))

    # ---- building ----------------------------------------------------------------------------------------------------

    def add(self, kind: str, inputs: tuple[Ref, ...], name: str | None = None, **attrs: Any) -> Ref:
        if name is None:
            name = self.at if self.call == self.at else ".".join(p for p in (self.at, self.call) if p)
        count = self.names[name] = self.names.get(name, 0) + 1
        name = name if count == 1 else f"{name}:{count}"
        self.nodes.append(Node(kind, name, tuple(r.index for r in inputs), attrs))
        return Ref(len(self.nodes) - 1)

    def host(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        """A computation on numbers: done now when all are known, else while the model runs."""
        fn = node.target if node.op == "call_function" else _method(str(node.target))
        if not any(True for _ in _refs((args, kwargs))):
            if any(isinstance(a, (Param, Tensor)) for a in args):
                raise self.unsupported(self.call, "weights must be plain parameters, not computed in forward")
            return fn(*args, **kwargs)
        if kwargs:
            raise self.unsupported(self.call)
        index = self.add("host", (), fn=fn, args=args).index
        return _Host(index)

    def host_of_tensor(self, name: str, args: tuple) -> _Host:
        x, *rest = args
        if name == "getattr" and rest[0] in ("device", "dtype"):
            raise self.unsupported(f"{name}({rest[0]})")
        attribute = "shape" if name in ("size", "shape", "sym_size") or rest == ["shape"] else "ndim"
        if name == "getattr" and rest[0] not in ("shape", "ndim"):
            raise self.unsupported(f"attribute {rest[0]!r}")
        shape = self.add("host", (x,), fn=_shape if attribute == "shape" else _rank, args=(Ref(x.index),))
        if name in ("size", "sym_size") and rest:
            return _Host(self.add("host", (), fn=operator.getitem, args=(_Host(shape.index), rest[0])).index)
        return _Host(shape.index)

    def where(self) -> str:
        module = f"{self.at or 'model'}"
        return module if self.call == self.at else f"{module}: {self.call}"

    def unsupported(self, op: str, why: str | None = None) -> UnsupportedModelError:
        why = why or _REMEDY.get(op, "it has no LRP rule here")
        return UnsupportedModelError(
            f"{self.at or 'the model'}: {op} is not supported ({why}). Replace it by a supported op, or wrap the part of the "
            "model before it; `fisnet_cuda.supported()` lists what is supported."
        )

    def constant(self, value: Any) -> bool:
        return isinstance(value, (int, float, Param, Tensor)) and not isinstance(value, bool)

    def check_batch_axis(self, dims: tuple, what: str) -> None:
        if any(d == 0 for d in dims):
            raise self.unsupported(what, "it mixes the samples of the batch (axis 0)")

    # ---- modules -----------------------------------------------------------------------------------------------------

    def module(self, path: str, *args: Any, **kwargs: Any) -> Any:
        module = self.model.get_submodule(path)
        if hasattr(module, "lrp_expand"):
            return self.expand(path, module.lrp_expand(), *args, **kwargs)
        kind = leaf_type(module)
        name = (kind or type(module)).__name__
        method: Callable | None = getattr(self, f"mod_{name}", None) if kind else None
        if method is None:
            raise self.unsupported(type(module).__name__)
        if kwargs:
            raise self.unsupported(f"{name} with keyword arguments {sorted(kwargs)}", "pass the input by position")
        return method(module, path, *args)

    def expand(self, path: str, steps: tuple[str, ...], x: Ref, skip: Ref | None = None) -> Ref:
        """A fused layer of `fisnet_cuda.nn`: its children by name, "add" and "relu"."""
        for step in steps:
            if step == "add":
                if skip is not None:
                    x = self.add("add", (x, skip), name=f"{path}.add")
            elif step == "relu":
                x = self.add("relu", (x,), name=f"{path}.relu")
            else:
                child = f"{path}.{step}"
                self.at = self.call = child
                x = self.module(child, x)
        return x

    def _conv(self, m: nn.Module, path: str, x: Ref) -> Ref:
        weight = Param(f"{path}.weight")
        bias = Param(f"{path}.bias") if m.bias is not None else None
        if m.padding_mode != "zeros":
            pad = tuple(int(p) for p in m._reversed_padding_repeated_twice)
            x = self.add("linear_map", (x,), name=f"{path}.pad", op="pad", settings=(pad, m.padding_mode, 0.0))
            return self.convolution(x, weight, bias, m.stride, 0, m.dilation, m.groups, len(m.kernel_size), path)
        return self.convolution(
            x, weight, bias, m.stride, m.padding, m.dilation, m.groups, len(m.kernel_size), path, tuple(m.kernel_size)
        )

    mod_Conv1d = mod_Conv2d = mod_Conv3d = _conv

    def convolution(self, x, weight, bias, stride, padding, dilation, groups, spatial, name=None, kernel=None) -> Ref:
        if not isinstance(weight, Param) or not (bias is None or isinstance(bias, Param)):
            raise self.unsupported("conv", "weights must be plain parameters, not computed in forward")
        geometry = conv_geometry(spatial, stride, 0 if isinstance(padding, str) else padding, dilation, groups)
        if padding == "same":
            kernel = kernel or tuple(self.parameter(weight).shape[2:])
            totals = [d * (k - 1) for d, k in zip(geometry.dilation, kernel)]
            geometry = geometry._replace(padding=tuple(t // 2 for t in totals))
            if any(t % 2 for t in totals):  # as PyTorch: the odd one goes to the far end
                pad = tuple(v for t in reversed(totals) for v in (0, t % 2))
                x = self.add("linear_map", (x,), name=f"{name or self.at}.pad", op="pad", settings=(pad, "constant", 0.0))
        return self.add("conv", (x,), name=name, weight=weight, bias=bias, geometry=geometry)

    def parameter(self, param: Param) -> Tensor:
        value: Any = self.model
        for part in param.path.split("."):
            value = getattr(value, part)
        return value

    def mod_Linear(self, m: nn.Linear, path: str, x: Ref) -> Ref:
        bias = Param(f"{path}.bias") if m.bias is not None else None
        return self.add("linear", (x,), name=path, weight=Param(f"{path}.weight"), bias=bias, geometry=linear_geometry())

    def _batch_norm(self, m: nn.Module, path: str, x: Ref) -> Ref:
        def param(name: str) -> Param | None:
            return Param(f"{path}.{name}") if getattr(m, name) is not None else None

        return self.add(
            "batch_norm", (x,), name=path, weight=param("weight"), bias=param("bias"),
            running_mean=param("running_mean"), running_var=param("running_var"),
            counter=param("num_batches_tracked"), training=Mode(path), momentum=m.momentum, eps=m.eps,
        )  # fmt: skip

    mod_BatchNorm1d = mod_BatchNorm2d = mod_BatchNorm3d = _batch_norm

    def mod_SyncBatchNorm(self, m: nn.Module, path: str, x: Ref) -> Ref:
        raise self.unsupported("SyncBatchNorm", "statistics across processes are not supported yet: use BatchNorm")

    def mod_GroupNorm(self, m: nn.GroupNorm, path: str, x: Ref) -> Ref:
        weight = Param(f"{path}.weight") if m.affine else None
        bias = Param(f"{path}.bias") if m.affine and m.bias is not None else None
        return self.add("norm", (x,), name=path, norm="group", weight=weight, bias=bias, settings=(m.num_groups, m.eps))

    def mod_LayerNorm(self, m: nn.LayerNorm, path: str, x: Ref) -> Ref:
        weight = Param(f"{path}.weight") if m.elementwise_affine else None
        bias = Param(f"{path}.bias") if m.elementwise_affine and m.bias is not None else None
        settings = (tuple(m.normalized_shape), m.eps)
        return self.add("norm", (x,), name=path, norm="layer", weight=weight, bias=bias, settings=settings)

    def _instance_norm(self, m: nn.Module, path: str, x: Ref) -> Ref:
        if m.track_running_stats:
            raise self.unsupported("InstanceNorm with track_running_stats=True", "use track_running_stats=False")
        weight, bias = (Param(f"{path}.{n}") if m.affine else None for n in ("weight", "bias"))
        return self.add("norm", (x,), name=path, norm="group", weight=weight, bias=bias, settings=(m.num_features, m.eps))

    mod_InstanceNorm1d = mod_InstanceNorm2d = mod_InstanceNorm3d = _instance_norm

    def mod_ReLU(self, m: nn.ReLU, path: str, x: Ref) -> Ref:
        return self.add("relu", (x,), name=path)

    def activation(self, x: Ref, function: str, *settings: Any, name: str | None = None) -> Ref:
        return self.add("activation", (x,), name=name, function=function, settings=settings)

    def mod_ReLU6(self, m, path, x):
        return self.activation(x, "relu6", name=path)

    def mod_Hardtanh(self, m, path, x):
        return self.activation(x, "hardtanh", m.min_val, m.max_val, name=path)

    def mod_LeakyReLU(self, m, path, x):
        return self.activation(x, "leaky_relu", m.negative_slope, name=path)

    def mod_ELU(self, m, path, x):
        return self.activation(x, "elu", m.alpha, name=path)

    def mod_SiLU(self, m, path, x):
        return self.activation(x, "silu", name=path)

    def mod_GELU(self, m, path, x):
        return self.activation(x, "gelu", m.approximate, name=path)

    def mod_Hardswish(self, m, path, x):
        return self.activation(x, "hardswish", name=path)

    def mod_Tanh(self, m, path, x):
        return self.activation(x, "tanh", name=path)

    def mod_Softplus(self, m, path, x):
        return self.activation(x, "softplus", m.beta, m.threshold, name=path)

    def mod_Mish(self, m, path, x):
        return self.activation(x, "mish", name=path)

    def _max_pool(self, m: nn.Module, path: str, x: Ref) -> Ref:
        if m.return_indices:
            raise self.unsupported(f"{type(m).__name__} with return_indices=True", "set return_indices=False")
        settings = (m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode)
        return self.pool("pool_max", x, int(type(m).__name__[-2]), False, settings, path)

    mod_MaxPool1d = mod_MaxPool2d = mod_MaxPool3d = _max_pool

    def _avg_pool(self, m: nn.Module, path: str, x: Ref) -> Ref:
        spatial = int(type(m).__name__[-2])
        settings = (m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad)
        settings += () if spatial == 1 else (m.divisor_override,)
        return self.pool("pool_avg", x, spatial, False, settings, path)

    mod_AvgPool1d = mod_AvgPool2d = mod_AvgPool3d = _avg_pool

    def _adaptive_avg(self, m: nn.Module, path: str, x: Ref) -> Ref:
        return self.pool("pool_avg", x, int(type(m).__name__[-2]), True, (m.output_size,), path)

    mod_AdaptiveAvgPool1d = mod_AdaptiveAvgPool2d = mod_AdaptiveAvgPool3d = _adaptive_avg

    def _adaptive_max(self, m: nn.Module, path: str, x: Ref) -> Ref:
        if m.return_indices:
            raise self.unsupported(f"{type(m).__name__} with return_indices=True", "set return_indices=False")
        return self.pool("pool_max", x, int(type(m).__name__[-2]), True, (m.output_size,), path)

    mod_AdaptiveMaxPool1d = mod_AdaptiveMaxPool2d = mod_AdaptiveMaxPool3d = _adaptive_max

    def pool(self, kind: str, x: Ref, spatial: int, adaptive: bool, settings: tuple, name: str | None = None) -> Ref:
        settings = tuple(tuple(s) if isinstance(s, list) else s for s in settings)
        return self.add(kind, (x,), name=name, spatial=spatial, adaptive=adaptive, settings=settings)

    def _dropout(self, m: nn.Module, path: str, x: Ref) -> Ref:
        feature = {"Dropout": 0, "Dropout1d": 1, "Dropout2d": 2, "Dropout3d": 3}[leaf_type(m).__name__]
        return self.add("mask", (x,), name=path, p=m.p, feature=feature, training=Mode(path))

    mod_Dropout = mod_Dropout1d = mod_Dropout2d = mod_Dropout3d = _dropout

    def mod_Identity(self, m: nn.Identity, path: str, x: Ref) -> Ref:
        return x

    def mod_Flatten(self, m: nn.Flatten, path: str, x: Ref) -> Ref:
        return self.op_flatten(x, m.start_dim, m.end_dim)

    def mod_Unflatten(self, m: nn.Unflatten, path: str, x: Ref) -> Ref:
        return self.op_unflatten(x, m.dim, m.unflattened_size)

    def _pad(self, m: nn.Module, path: str, x: Ref) -> Ref:
        kind = type(m).__name__
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
        if not isinstance(weight, Param) or not (bias is None or isinstance(bias, Param)):
            raise self.unsupported("linear", "weights must be plain parameters, not computed in forward")
        return self.add("linear", (x,), weight=weight, bias=bias, geometry=linear_geometry())

    def op_batch_norm(self, x, *args, **kwargs):
        aten = len(args) > 0 and (args[0] is None or "running" not in getattr(args[0], "path", "running"))
        names = ("weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled") if aten else (
            "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")  # fmt: skip
        given = {**dict(zip(names, args)), **kwargs}
        mean = given.get("running_mean")
        owner = mean.path.rpartition(".")[0] if isinstance(mean, Param) else ""
        module = self.model.get_submodule(owner) if owner else None
        training: Any = given.get("training", False)
        counter = None
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # torch.export bakes the flag in: follow the module instead
            training = Mode(owner)
            counter = Param(f"{owner}.num_batches_tracked") if module.num_batches_tracked is not None else None
        momentum = module.momentum if counter is not None else given.get("momentum", 0.1)
        return self.add(
            "batch_norm", (x,), name=owner or None, weight=given.get("weight"), bias=given.get("bias"), running_mean=mean,
            running_var=given.get("running_var"), counter=counter, training=training, momentum=momentum,
            eps=given.get("eps", 1e-5),
        )  # fmt: skip

    def op_group_norm(self, x, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
        return self.add("norm", (x,), norm="group", weight=weight, bias=bias, settings=(num_groups, eps))

    def op_layer_norm(self, x, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
        return self.add("norm", (x,), norm="layer", weight=weight, bias=bias, settings=(tuple(normalized_shape), eps))

    def op_relu(self, x, inplace=False):
        return self.add("relu", (x,))

    def op_clamp(self, x, min=None, max=None):
        if min == 0 and max is None:
            return self.add("relu", (x,))
        raise self.unsupported("clamp", "only clamp(min=0), which is a ReLU, has a rule")

    op_clamp_min = op_clamp

    def op_relu6(self, x, inplace=False):
        return self.activation(x, "relu6")

    def op_hardtanh(self, x, min_val=-1.0, max_val=1.0, inplace=False):
        return self.activation(x, "hardtanh", min_val, max_val)

    def op_leaky_relu(self, x, negative_slope=0.01, inplace=False):
        return self.activation(x, "leaky_relu", negative_slope)

    def op_elu(self, x, alpha=1.0, inplace=False):
        return self.activation(x, "elu", alpha)

    def op_silu(self, x, inplace=False):
        return self.activation(x, "silu")

    def op_gelu(self, x, approximate="none"):
        return self.activation(x, "gelu", approximate)

    def op_hardswish(self, x, inplace=False):
        return self.activation(x, "hardswish")

    def op_tanh(self, x):
        return self.activation(x, "tanh")

    def op_softplus(self, x, beta=1.0, threshold=20.0):
        return self.activation(x, "softplus", beta, threshold)

    def op_mish(self, x, inplace=False):
        return self.activation(x, "mish")

    op_max_pool1d, op_max_pool2d, op_max_pool3d = map(_max_pool_op, (1, 2, 3))
    op_avg_pool1d, op_avg_pool2d, op_avg_pool3d = map(_avg_pool_op, (1, 2, 3))
    op_adaptive_avg_pool1d, op_adaptive_avg_pool2d, op_adaptive_avg_pool3d = map(partial(_adaptive_op, "pool_avg"), (1, 2, 3))
    op_adaptive_max_pool1d, op_adaptive_max_pool2d, op_adaptive_max_pool3d = map(partial(_adaptive_op, "pool_max"), (1, 2, 3))

    def op_add(self, x, other, alpha=1):
        if alpha != 1:
            raise self.unsupported(f"add with alpha={alpha}", "multiply first")
        tensors = [t for t in (x, other) if isinstance(t, Ref) and not isinstance(t, _Host)]
        if len(tensors) == 2:
            return self.add("add", (x, other))
        return self.affine_constant(tensors[0], operator.add, other if tensors[0] is x else x, False)

    def op_sub(self, x, other, alpha=1):
        if alpha != 1 or not isinstance(x, Ref) or isinstance(other, Ref) and not isinstance(other, _Host):
            raise self.unsupported("sub", "only activation - constant has a rule")
        return self.affine_constant(x, operator.sub, other, False)

    def op_mul(self, x, other):
        tensors = [t for t in (x, other) if isinstance(t, Ref) and not isinstance(t, _Host)]
        if len(tensors) == 2:
            raise self.unsupported("mul")
        return self.affine_constant(tensors[0], operator.mul, other if tensors[0] is x else x, True)

    def op_div(self, x, other, rounding_mode=None):
        if rounding_mode or not isinstance(x, Ref) or isinstance(other, Ref) and not isinstance(other, _Host):
            raise self.unsupported("div", "only activation / constant has a rule")
        return self.affine_constant(x, operator.truediv, other, True)

    def op_neg(self, x):
        return self.affine_constant(x, operator.mul, -1.0, True)

    def affine_constant(self, x: Ref, fn: Callable, constant: Any, scales: bool) -> Ref:
        """``x + c``, ``x - c`` (relevance unchanged), ``x * c``, ``x / c`` (scaled)."""
        if isinstance(constant, Tensor):
            raise self.unsupported(self.call, "register the constant as a buffer so that it moves with the model")
        return self.add("constant", (x,), fn=fn, constant=constant, scales=scales)

    def op_cat(self, tensors, dim=0):
        dim = int(dim)
        self.check_batch_axis((dim,), "cat along axis 0")
        if not all(isinstance(t, Ref) and not isinstance(t, _Host) for t in tensors):
            raise self.unsupported("cat", "every part must be an activation")
        return self.add("concat", tuple(tensors), dim=dim)

    op_concat = op_concatenate = op_cat

    def op_flatten(self, x, start_dim=0, end_dim=-1):
        self.check_batch_axis((start_dim,), "flatten from axis 0")
        return self.add("reshape", (x,), fn=torch.flatten, settings=(start_dim, end_dim))

    def op_unflatten(self, x, dim, sizes):
        self.check_batch_axis((dim,), "unflatten of axis 0")
        return self.add("reshape", (x,), fn=torch.unflatten, settings=(dim, tuple(sizes)))

    def op_reshape(self, x, *shape):
        shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else shape
        return self.add("reshape", (x,), fn=torch.reshape, settings=(shape[0] if len(shape) == 1 and isinstance(shape[0], _Host) else shape,))

    op_view = op_reshape

    def op_squeeze(self, x, dim=None):
        if dim is None:
            raise self.unsupported("squeeze without an axis", "it would drop a batch of one: name the axis")
        self.check_batch_axis((dim,) if isinstance(dim, int) else tuple(dim), "squeeze of axis 0")
        return self.add("reshape", (x,), fn=torch.squeeze, settings=(dim if isinstance(dim, int) else tuple(dim),))

    def op_unsqueeze(self, x, dim):
        self.check_batch_axis((dim,), "unsqueeze at axis 0")
        return self.add("reshape", (x,), fn=torch.unsqueeze, settings=(dim,))

    def op_contiguous(self, x, memory_format=None):
        return x

    def op_clone(self, x, memory_format=None):
        return x

    def op_float(self, x):
        return x

    op_alias = op_detach_ = op_contiguous

    def op_permute(self, x, *dims):
        dims = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else tuple(dims)
        if dims[0] != 0:
            raise self.unsupported("permute of axis 0", "it mixes the samples of the batch (axis 0)")
        return self.add("permute", (x,), dims=dims)

    def op_transpose(self, x, dim0, dim1):
        self.check_batch_axis((dim0, dim1), "transpose of axis 0")
        return self.add("permute", (x,), dims=(dim0, dim1), swap=True)

    def op_mean(self, x, dim=None, keepdim=False, dtype=None):
        return self.reduction("mean", x, dim, keepdim)

    def op_sum(self, x, dim=None, keepdim=False, dtype=None):
        return self.reduction("sum", x, dim, keepdim)

    def reduction(self, op: str, x: Ref, dim: Any, keepdim: bool) -> Ref:
        if dim is None:
            raise self.unsupported(f"{op} over everything", "it mixes the samples of the batch (axis 0): name the axes")
        dims = (dim,) if isinstance(dim, int) else tuple(dim)
        self.check_batch_axis(dims, f"{op} over axis 0")
        return self.add("linear_map", (x,), op=op, settings=(dims, bool(keepdim)))

    def op_pad(self, x, pad, mode="constant", value=None):
        pad = tuple(int(p) for p in (pad if isinstance(pad, (tuple, list)) else (pad,)))
        if mode == "constant" and value:
            raise self.unsupported(f"pad with value {value}", "only zero padding has a rule")
        if mode not in ("constant", "reflect", "replicate"):
            raise self.unsupported(f"pad with mode {mode!r}", "use constant, reflect or replicate")
        return self.add("linear_map", (x,), op="pad", settings=(pad, mode, 0.0))

    def op_constant_pad_nd(self, x, pad, value=0):
        return self.op_pad(x, pad, "constant", value)

    def op_interpolate(self, x, size=None, scale_factor=None, mode="nearest", align_corners=None,
                       recompute_scale_factor=None, antialias=False):  # fmt: skip
        if antialias:
            raise self.unsupported("interpolate with antialias=True", "use antialias=False")
        settings = (size, scale_factor, mode, align_corners, recompute_scale_factor)
        return self.add("linear_map", (x,), op="interpolate", settings=settings)

    op_upsample = op_interpolate

    def op_pixel_shuffle(self, x, factor):
        return self.add("linear_map", (x,), op="pixel_shuffle", settings=(factor,))

    def op_pixel_unshuffle(self, x, factor):
        return self.add("linear_map", (x,), op="pixel_unshuffle", settings=(factor,))

    def op_channel_shuffle(self, x, groups):
        return self.add("linear_map", (x,), op="channel_shuffle", settings=(groups,))

    op_native_channel_shuffle = op_channel_shuffle

    def op_narrow(self, x, dim, start, length):
        self.check_batch_axis((dim,), "narrow of axis 0")
        return self.add("slice", (x,), dim=dim, start=start, stop=_add(start, length))

    def op_slice(self, x, dim=0, start=None, end=None, step=1):
        if dim == 0 and start in (None, 0) and (end is None or end >= 2**62):
            return x
        self.check_batch_axis((dim,), "slice of axis 0")
        if step != 1:
            raise self.unsupported(f"slice with step {step}", "only steps of 1 have a rule")
        return self.add("slice", (x,), dim=dim, start=start or 0, stop=None if end is None or end >= 2**62 else end)

    def op_chunk(self, x, chunks, dim=0):
        self.check_batch_axis((dim,), "chunk of axis 0")
        return tuple(self.add("slice", (x,), dim=dim, chunk=(i, chunks)) for i in range(chunks))

    def op_split(self, x, split_size_or_sections, dim=0):
        self.check_batch_axis((dim,), "split of axis 0")
        if isinstance(split_size_or_sections, int):
            raise self.unsupported("split by a size", "use chunk, or give the list of sizes")
        stops = [sum(split_size_or_sections[: i + 1]) for i in range(len(split_size_or_sections))]
        starts = [0, *stops[:-1]]
        return tuple(self.add("slice", (x,), dim=dim, start=a, stop=b) for a, b in zip(starts, stops))

    op_split_with_sizes = op_split

    def op_getitem(self, x, index):
        if isinstance(x, tuple):
            return x[index]
        parts = index if isinstance(index, tuple) else (index,)
        if Ellipsis in parts or not all(isinstance(p, slice) for p in parts):
            raise self.unsupported("indexing", "only slices x[:, a:b] have a rule")
        if parts[0] != slice(None):
            raise self.unsupported("indexing of axis 0", "it picks samples of the batch (axis 0)")
        for dim, part in enumerate(parts):
            if part == slice(None):
                continue
            if part.step not in (None, 1):
                raise self.unsupported(f"indexing with step {part.step}", "only steps of 1 have a rule")
            x = self.add("slice", (x,), dim=dim, start=part.start or 0, stop=part.stop)
        return x

    def op_dropout(self, x, p=0.5, training=True, inplace=False, train=None):
        return self.functional_dropout(x, p, training if train is None else train, 0)

    def op_feature_dropout(self, x, p=0.5, train=True):
        return self.functional_dropout(x, p, train, 2)

    def op_dropout1d(self, x, p=0.5, training=True, inplace=False):
        return self.functional_dropout(x, p, training, 1)

    def op_dropout2d(self, x, p=0.5, training=True, inplace=False):
        return self.functional_dropout(x, p, training, 2)

    def op_dropout3d(self, x, p=0.5, training=True, inplace=False):
        return self.functional_dropout(x, p, training, 3)

    def functional_dropout(self, x: Ref, p: float, training: Any, feature: int) -> Ref:
        module = self.model.get_submodule(self.at) if self.at else self.model
        if isinstance(module, nn.modules.dropout._DropoutNd):  # torch.export bakes the flag in: follow the module instead
            training = Mode(self.at)
        return self.add("mask", (x,), p=p, feature=feature, training=training)

    def op_to(self, x, *args, **kwargs):
        raise self.unsupported("to", "convert the input before the model, or use autocast")


def functions() -> list[str]:
    """Names of the functions, methods and operators that have a normal form."""
    return sorted(name[3:] for name in vars(_Normaliser) if name.startswith("op_"))


def _add(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    raise UnsupportedModelError("narrow with a computed start is not supported: use constants")


def _refs(args: Any, hosts: bool = True):
    """Indices of the values that arguments mention, at any depth."""
    if isinstance(args, _Host):
        if hosts:
            yield args.index
    elif isinstance(args, Ref):
        yield args.index
    elif isinstance(args, dict):
        for value in args.values():
            yield from _refs(value, hosts)
    elif isinstance(args, (tuple, list)):
        for value in args:
            yield from _refs(value, hosts)
    elif isinstance(args, slice):
        yield from _refs((args.start, args.stop, args.step), hosts)


def _method(name: str) -> Callable:
    return operator.methodcaller(name)


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _rank(x: Tensor) -> int:
    return x.dim()
