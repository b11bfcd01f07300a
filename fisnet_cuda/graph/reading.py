"""Walking a captured graph: what each value is, which names mean the same tensor, what is a number rather than an activation.

`Reader` is the part of normalisation that knows no op; `fisnet_cuda.graph.normalise` adds one method per op.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ..errors import UnsupportedModelError
from .capture import Captured
from .ir import Graph, Node, Param, Ref
from .remedies import remedy

_OPERATORS = {
    operator.add: "add", operator.iadd: "add_", operator.sub: "sub", operator.isub: "sub_", operator.mul: "mul",
    operator.imul: "mul_", operator.truediv: "div", operator.itruediv: "div_", operator.matmul: "matmul",
    operator.floordiv: "floordiv", operator.getitem: "getitem", operator.neg: "neg", getattr: "getattr",
}  # fmt: skip
# read the shape, type or place of an activation, not its values
_ABOUT = frozenset((
    "size", "shape", "dim", "numel", "ndim", "ndimension", "nelement", "stride", "sym_size", "sym_numel", "sym_stride",
    "is_floating_point", "is_contiguous", "new_empty", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like",
    "empty_like", "full_like", "rand_like", "randn_like",
))  # fmt: skip
_ABOUT_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "layout", "is_cuda")
_CHECKS = ("_assert", "sym_constrain")
# kinds whose value may share memory with their input
_VIEWS = frozenset(("reshape", "permute", "slice", "mask", "cast"))


class Host(Ref):
    """A number, a shape or a weight computed while the model runs: a value that carries no relevance."""


@dataclass(frozen=True)
class Method:
    """A call of a tensor's method (comparable and picklable, unlike `operator.methodcaller`)."""

    name: str

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(x, self.name)(*args, **kwargs)


@dataclass(frozen=True)
class Parts:
    """What ``split`` by a size returns: so many parts that only the run knows."""

    x: Ref
    size: Any
    dim: int


class Unread:
    """The second result of an op whose first one is used (a pool's indices)."""


def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A layer that sees no activation."""
    return module(*args, **kwargs)


class Reader:
    """Reads a `Captured` graph node by node; subclasses have ``op_<name>`` and ``mod_<TypeName>`` methods."""

    def __init__(self, model: nn.Module, captured: Captured) -> None:
        self.model, self.captured = model, captured
        self.nodes: list[Node] = []
        self.roots: list[int] = []  # of each node: the one whose memory it may be a view of
        self.values: dict[fx.Node, Any] = {}
        self.stale: set[int] = set()  # values that were overwritten in place
        self.fixed: set[int] = set()  # hosts made of buffers and numbers alone
        self.names: dict[str, int] = {}
        self.at = ""  # path of the module being read, for names and errors
        self.call = ""
        self.aten = False  # whether the call being read is an aten op

    # ---- driving -----------------------------------------------------------------------------------------------------

    def run(self) -> Graph:
        """The whole graph.

        Raises:
            UnsupportedModelError: names the module path, the op and what to do.
        """
        output = None
        returned: dict[fx.Node, Any] = {}  # values as modules returned them, before anything overwrote them
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
            returned[node] = self.values.get(node)
        outputs = {path: returned[node] for path, node in self.captured.module_outputs.items()}
        named = {path: value.index for path, value in outputs.items() if is_activation(value)}
        return Graph(tuple(self.nodes), output.index, named)

    def placeholder(self, node: fx.Node) -> Any:
        if node.name in self.captured.params:
            return Param(self.captured.params[node.name])
        if node.name in self.captured.constants:
            return self.captured.constants[node.name]
        return None if self.nodes else self.add("input", (), name="input")  # optional arguments that torch.export lists

    def attribute(self, path: str) -> Any:
        if path in self.captured.constants:
            return self.captured.constants[path]
        try:
            value = self.look_up(path)
        except AttributeError:  # a subgraph of torch.export's own: the call that runs it is refused by name
            return None
        return Param(path) if isinstance(value, Tensor) else value

    def look_up(self, path: str) -> Any:
        value: Any = self.model
        for part in path.split("."):
            value = getattr(value, part)
        return value

    def logits(self, result: Any) -> Ref:
        value = fx.node.map_arg(result, lambda n: self.values.get(n))
        if isinstance(value, dict):
            value = value.get("logits")
        elif hasattr(value, "logits"):
            value = value.logits
        elif isinstance(value, (tuple, list)) and len(value) == 1:
            value = value[0]
        if is_activation(value):
            return value
        count = len(result) if isinstance(result, (tuple, list, dict)) else 0
        what = f"{count} values" if count > 1 else "no tensor that depends on its input"
        raise UnsupportedModelError(
            f"forward returns {what}. It must return the logits [N, C] alone, or a mapping or named tuple with 'logits': wrap "
            "the model in a module that does."
        )

    def visit(self, node: fx.Node) -> None:
        name, in_place = self.canonical(node)
        self.aten = isinstance(node.target, torch._ops.OpOverload)
        self.call = name
        if name.startswith(_CHECKS):
            return
        about = name in _ABOUT or (name == "getattr" and node.args[1] in _ABOUT_ATTRIBUTES)
        args, kwargs = self.read(node.args, about), self.read(node.kwargs, about)
        if any(isinstance(a, Unread) for a in args):
            self.values[node] = Unread()
        elif isinstance(node.target, type) and hasattr(node.target, "_fields"):  # a named tuple
            self.values[node] = node.target(*args, **kwargs)
        elif name == "getitem" and isinstance(args[0], (tuple, list, Parts)):
            self.values[node] = self.pick(*args)
        elif about or not any(True for _ in _refs((args, kwargs), hosts=False)):
            self.values[node] = self.host(node, args, kwargs)
        elif node.op == "call_module":
            self.values[node] = self.module(name, *args, **kwargs)
        else:
            method = getattr(self, f"op_{name}", None)
            if method is None:
                raise self.unsupported(f".{args[1]}" if name == "getattr" else name)
            in_place = in_place or kwargs.get("inplace") is True
            self.values[node] = method(*args, **kwargs)
        if in_place and is_activation(self.values[node]):
            self.overwrite((*args, *kwargs.values())[0], self.values[node])

    def canonical(self, node: fx.Node) -> tuple[str, bool]:
        """``(name, whether it writes to its first argument)``."""
        if node.op == "call_module":
            path = str(node.target)
            self.at = path
            return path, getattr(self.model.get_submodule(path), "inplace", False) is True
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

    def read(self, args: Any, about: bool = False) -> Any:
        """Arguments with fx nodes replaced by what they stand for; ``about``: only their shapes and types matter."""
        read = fx.node.map_arg(args, lambda n: self.values[n])
        if not about and any(index in self.stale for index in _refs(read)):
            raise UnsupportedModelError(
                f"{self.where()}: it reads a tensor that was overwritten in place through a view or a part of it. Use the "
                "out-of-place form there (x = x + y instead of x += y, inplace=False)."
            )
        return read

    def overwrite(self, target: Any, new: Ref) -> None:
        """An in-place op: whoever reads the old value from here on sees the new one."""
        if not is_activation(target):
            return
        self.values = {node: _replaced(value, target, new) for node, value in self.values.items()}
        family = self.roots[target.index]
        self.stale.update(i for i, root in enumerate(self.roots) if root == family and i != new.index)

    # ---- building ----------------------------------------------------------------------------------------------------

    def add(self, kind: str, inputs: tuple[Ref, ...], name: str | None = None, **attrs: Any) -> Ref:
        """Append a node; its name is the module's path, or its owner's path and the op."""
        if name is None:
            name = self.at if self.call == self.at else ".".join(p for p in (self.at, self.call) if p)
        count = self.names[name] = self.names.get(name, 0) + 1
        name = name if count == 1 else f"{name}:{count}"
        self.nodes.append(Node(kind, name, tuple(r.index for r in inputs), attrs))
        index = len(self.nodes) - 1
        self.roots.append(self.roots[inputs[0].index] if kind in _VIEWS else index)
        return Ref(index)

    def host(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        """A computation on numbers, shapes or weights: done now when all are known, else while the model runs."""
        if node.op == "call_module":
            fn, args = call_module, (Param(self.call), *args)
        else:
            fn = node.target if node.op == "call_function" else Method(str(node.target))
        random = self.aten and torch.Tag.nondeterministic_seeded in node.target.tags
        refs = list(_refs((args, kwargs)))
        params = any(isinstance(a, Param) for a in _leaves((args, kwargs)))
        if not refs and not params and not random:
            return fn(*args, **kwargs)
        self.check_constants(args)
        return self.later(fn, args, kwargs, inputs=tuple(Ref(r) for r in refs))

    def later(self, fn: Callable, args: tuple, kwargs: dict, inputs: tuple[Ref, ...] = (), name: str | None = None) -> Host:
        """A call that runs with the model."""
        if any(isinstance(a, slice) and any(True for _ in _refs(a)) for a in _leaves(args)):
            raise self.unsupported(self.call, "a slice with computed bounds", "Use narrow, or constants.")
        host = Host(self.add("host", inputs, name, fn=fn, args=args, kwargs=tuple(kwargs.items())).index)
        if all(self.is_fixed(value) for value in _leaves((args, kwargs))):
            self.fixed.add(host.index)
        return host

    def is_fixed(self, value: Any) -> bool:
        """Whether a value is neither learned nor the batch's."""
        if isinstance(value, Param):
            path, _, name = value.path.rpartition(".")
            owner = self.model.get_submodule(path)
            return name not in owner._parameters and not parametrize.is_parametrized(owner, name)
        return value.index in self.fixed if isinstance(value, Ref) else True

    def check_constants(self, args: Any) -> None:
        if any(isinstance(a, Tensor) and a.dim() for a in _leaves(args)):
            raise self.unsupported(
                self.call, "it uses a tensor made in forward", "Register it as a buffer, so that it moves with the model."
            )

    def weight(self, path: str, name: str) -> Param | Host | None:
        """A parameter or buffer of a layer, or None; where it is parametrized, computed once a call of the layer."""
        module = self.model.get_submodule(path)
        where = f"{path}.{name}"
        if parametrize.is_parametrized(module, name):
            return self.later(getattr, (Param(path), name), {}, name=where)
        return Param(where) if getattr(module, name, None) is not None else None

    def where(self) -> str:
        module = self.at or "the model"
        return module if self.call == self.at else f"{module}: {self.call}"

    def unsupported(self, op: str, why: str | None = None, do: str | None = None) -> UnsupportedModelError:
        default = remedy(op)
        return UnsupportedModelError(
            f"{self.at or 'the model'}: {op} is not supported ({why or default.why}). {do or default.do}"
        )

    def check_batch_axis(self, dims: tuple, what: str) -> None:
        if any(d == 0 for d in dims):
            raise self.unsupported(what, "it mixes the samples of the batch, axis 0", "Leave axis 0 alone.")

    # ---- for subclasses ----------------------------------------------------------------------------------------------

    def module(self, path: str, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def pick(self, parts: Any, index: Any) -> Any:
        raise NotImplementedError


def is_activation(value: Any) -> bool:
    """A value that carries relevance, not a number, shape or weight."""
    return isinstance(value, Ref) and not isinstance(value, Host)


def _replaced(value: Any, old: Ref, new: Ref) -> Any:
    if type(value) is tuple:
        return tuple(_replaced(part, old, new) for part in value)
    return new if is_activation(value) and value == old else value


def _leaves(args: Any) -> Iterator[Any]:
    if isinstance(args, dict):
        args = tuple(args.values())
    if isinstance(args, (tuple, list)):
        for value in args:
            yield from _leaves(value)
    else:
        yield args


def _refs(args: Any, hosts: bool = True) -> Iterator[int]:
    """Indices of the values that arguments mention, at any depth."""
    for value in _leaves(args):
        if isinstance(value, slice):
            yield from _refs((value.start, value.stop, value.step), hosts)
        elif isinstance(value, Parts):
            yield value.x.index
        elif isinstance(value, Ref) and (hosts or not isinstance(value, Host)):
            yield value.index
