"""Reading the user's module: torch.fx first, torch.export for what fx cannot trace. Nothing in the module changes."""

from __future__ import annotations

import contextlib
import inspect
import operator
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..errors import FisnetWarning, UnsupportedModelError
from .modules import is_leaf


@dataclass(frozen=True)
class Captured:
    """A traced model, the same for both front ends: calls of layers by module path, everything else by function.

    Attributes:
        graph: an fx graph of calls.
        params: placeholder name -> path of a parameter or buffer (torch.export lifts them to inputs; fx has none).
        constants: placeholder or attribute name -> a tensor made in forward.
        module_outputs: module path -> the fx node that is its output.
        owners: fx node -> path of the module whose forward made the call.
    """

    graph: fx.Graph
    params: dict[str, str]
    constants: dict[str, Tensor]
    module_outputs: dict[str, fx.Node]
    owners: dict[fx.Node, str]


def capture(model: nn.Module, training: bool, example_input: Tensor | None = None) -> Captured:
    """Trace ``model`` in train or eval mode.

    Args:
        model: the user's module, left exactly as it was.
        training: the mode to trace (functional dropout, auxiliary heads and the like depend on it).
        example_input: needed by the torch.export front end only, which traces by example.

    Raises:
        UnsupportedModelError: neither front end can trace the model; says why and what to do.
    """
    _check_wrappers(model)
    _check_forward(model)
    _check_hooks(model)
    with borrowed(model, training):
        try:
            return _capture_fx(model)
        except UnsupportedModelError:
            raise
        except Exception as error:  # fx raises whatever the model's Python raises on a Proxy
            reason = _first_sentence(error)
        if example_input is None:
            raise UnsupportedModelError(
                f"torch.fx cannot trace {type(model).__name__} ({reason}). Pass example_input= (one batch of the right "
                "shape) and torch.export traces the model by example instead."
            )
        return _capture_export(model, example_input, reason)


def _check_wrappers(model: nn.Module) -> None:
    """Refuse what is around a network rather than a network."""
    kind = type(model).__name__
    if is_leaf(model) and not isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UnsupportedModelError(f"the model is a single {kind}: wrap it, torch.nn.Sequential(layer)")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(
            f"the model is wrapped in {kind}. Pass the network itself (.module, ._orig_mod), and put {kind} around the ISNet."
        )
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(f"{path or 'the model'}: it is compiled by torch.jit. Pass the Python module.")
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise UnsupportedModelError(f"{path}: {type(module).__name__} has no weights yet. Run the model on a batch first.")


def _check_forward(model: nn.Module) -> None:
    """One input, others with defaults."""
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [
        p.name for p in inspect.signature(model.forward).parameters.values()
        if p.default is inspect.Parameter.empty and p.kind not in fixed
    ]  # fmt: skip
    if len(names) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}.forward takes {len(names)} inputs, {', '.join(names)}. Wrap the model in a module whose "
            "forward takes the batch alone (or give the others defaults)."
        )


def _check_hooks(model: nn.Module) -> None:
    """Refuse hooks that make weights (they would not run again), warn of the others."""
    hooked = []
    for path, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            kind = type(hook)
            if kind.__module__.startswith("torch.nn.utils"):  # weight_norm, spectral_norm, prune
                raise UnsupportedModelError(
                    f"{path}: {kind.__name__} computes the weight in a hook. Use torch.nn.utils.parametrizations instead "
                    "(weight_norm, spectral_norm), or make it permanent (torch.nn.utils.remove_weight_norm, "
                    "torch.nn.utils.prune.remove)."
                )
            hooked.append(path or "the model")
    if hooked:
        warnings.warn(
            f"forward hooks of {', '.join(dict.fromkeys(hooked))} do not run in net(x, relevance=True)",
            FisnetWarning,
            stacklevel=7,  # the line that wraps the model
        )


@contextlib.contextmanager
def borrowed(model: nn.Module, training: bool) -> Iterator[None]:
    """Every module of ``model`` in one mode for a while; afterwards all their attributes and PyTorch's and Python's random
    states are what they were, whatever the forward did to them."""
    state, python_state = torch.get_rng_state(), random.getstate()
    before = []
    for module in model.modules():
        attributes = dict(vars(module))
        containers = {k: v.copy() for k, v in attributes.items() if isinstance(v, (dict, list, set))}
        before.append((module, attributes, containers))
    try:
        for module, _, _ in before:
            module.training = training
        yield
    finally:
        for module, attributes, containers in before:
            for name, content in containers.items():
                _restore(attributes[name], content)
            vars(module).clear()
            vars(module).update(attributes)
        torch.set_rng_state(state)
        random.setstate(python_state)


def _restore(container: Any, content: Any) -> None:
    if len(container) == len(content) and all(a is b for a, b in zip(_items(container), _items(content))):
        return
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(content)


def _items(container: Any) -> Iterator[Any]:
    if isinstance(container, dict):
        yield from container.keys()
        yield from container.values()
    else:
        yield from container


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].split('. ')[0]}" if lines else type(error).__name__


# ---- torch.fx --------------------------------------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """A proxy that knows ``x += y`` from ``x = x + y``: other names of the same tensor see the first."""

    def __iadd__(self, other):
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other):
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other):
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other):
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Tracer(fx.Tracer):
    """Stops at modules that have a normal form, and remembers what each module returned."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(autowrap_modules=(), param_shapes_constant=True)
        self.module_outputs: dict[str, fx.Node] = {}
        self.owners: dict[fx.Node, str] = {}
        self.constants: dict[str, Tensor] = {}
        self._buffers = {id(b): name for name, b in model.named_buffers()}
        self._stack = [""]
        self._modes = _modes()

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        # the batch alone: optional arguments keep their defaults, or `if labels is not None` would see a proxy
        return lambda root, x: root.forward(x), [self.root, self.create_proxy("placeholder", "x", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def getattr(self, attr: str, value: Any, cache: dict[str, Any]) -> Any:
        # a buffer is read while the program runs, as parameters are: what forward computes from it is not baked in
        name = self._buffers.get(id(value)) if isinstance(value, Tensor) else None
        if name is None:
            return super().getattr(attr, value, cache)
        if name not in cache:
            cache[name] = self.create_proxy("get_attr", name, (), {})
        return cache[name]

    def create_arg(self, a: Any) -> Any:
        known = isinstance(a, nn.Parameter) or not isinstance(a, Tensor) or id(a) in self._buffers or a in self.tensor_attrs
        if known:
            return super().create_arg(a)
        name = f"_constant{len(self.constants)}"  # fx would store it on the user's module
        self.constants[name] = a
        return self.create_node("get_attr", name, (), {})

    def call_module(self, m, forward, args, kwargs):
        path = self.path_of_module(m)
        self._stack.append(path)
        try:
            out = super().call_module(m, forward, args, kwargs)
        finally:
            self._stack.pop()
        if isinstance(out, fx.Proxy):
            self.module_outputs[path] = out.node
        return out

    def create_node(self, *args, **kwargs):
        if self._modes != _modes():
            raise UnsupportedModelError(
                f"{self._stack[-1] or 'the model'}: forward switches gradients or autocast on or off, which a program of the "
                "whole network cannot follow. Freeze layers with requires_grad_(False), and put autocast around the call."
            )
        node = super().create_node(*args, **kwargs)
        self.owners[node] = self._stack[-1]
        return node


def _modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def _capture_fx(model: nn.Module) -> Captured:
    state, python_state = torch.get_rng_state(), random.getstate()
    tracer = _Tracer(model)
    graph = tracer.trace(model)
    if not torch.equal(state, torch.get_rng_state()) or python_state != random.getstate():
        raise RuntimeError("forward draws random numbers, which this trace would fix for ever")
    return Captured(graph, {}, tracer.constants, tracer.module_outputs, tracer.owners)


# ---- torch.export ----------------------------------------------------------------------------------------------------


def _capture_export(model: nn.Module, example_input: Tensor, fx_reason: str) -> Captured:
    example = example_input if example_input.shape[0] > 1 else torch.cat([example_input] * 2)  # 1 would be a constant
    for module in model.modules():  # a cumulative average is a number that only the run knows: the module keeps it
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
            module.momentum = 0.0
    try:
        with torch.enable_grad():  # so that a no_grad inside shows, and is refused
            dynamic = ({0: torch.export.Dim("batch", min=1)},)
            program = torch.export.export(model, (example,), dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} can be traced neither by torch.fx ({fx_reason}) nor by torch.export "
            f"({_first_sentence(error)}). Let its forward not depend on the values or the size of the batch, or wrap only the "
            "part of the model that classifies."
        ) from error
    signature = program.graph_signature
    params = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {name: program.constants[target] for name, target in signature.inputs_to_lifted_tensor_constants.items()}
    _keep_logits(program)
    modules = {path for path, _ in model.named_modules()}
    stacks = {node: [entry for entry in _stack(node) if entry[1] in modules] for node in program.graph.nodes}
    _call_leaves(model, program.graph, stacks, {*params, *constants})
    owners, outputs = {}, {}
    for node in program.graph.nodes:
        paths = [path for _, path in stacks[node]]
        owners[node] = paths[-1] if paths else ""
        name = str(node.target)
        if node.op in ("call_function", "call_module") and not any(word in name for word in ("_assert", "sym_")):
            outputs.update(dict.fromkeys(filter(None, paths), node))  # the last call inside a module is its output
    return Captured(program.graph, params, constants, outputs, owners)


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    """The modules that a node was called in, outermost first, each as (one name a call, path)."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(key, entry[0].split("@")[0]) for key, entry in stack.items()]


def _keep_logits(program: torch.export.ExportedProgram) -> None:
    """Point the graph's output at what the model returned, without the buffer updates that torch.export adds; at
    ``logits`` where several tensors have names."""
    output = next(n for n in program.graph.nodes if n.op == "output")
    by_name = {n.name: n for n in program.graph.nodes}
    results = [by_name.get(name) for name in program.graph_signature.user_outputs]
    names = program.call_spec.out_spec.context
    names = names[0] if isinstance(names, tuple) and names else names  # a dataclass lists its fields first
    names = getattr(names, "_fields", names)
    names = list(names) if isinstance(names, (list, tuple)) else []
    if len(results) > 1 and len(names) == len(results):
        output.args = (dict(zip(names, results)),)
    else:
        output.args = (results[0] if len(results) == 1 else tuple(results),)


def _call_leaves(model: nn.Module, graph: fx.Graph, stacks: dict[fx.Node, list], params: set[str]) -> None:
    """Put the aten ops of a layer back together as a call of its module, as fx sees it."""
    groups: dict[str, tuple[int, list[fx.Node]]] = {}
    activations: set[fx.Node] = set()  # what depends on the model's input
    for node in graph.nodes:
        given = node.op == "placeholder" and node.name not in params
        if given or ("sym_" not in str(node.target) and not activations.isdisjoint(node.all_input_nodes)):
            activations.add(node)
        for depth, (key, path) in enumerate(stacks[node]):
            if path and is_leaf(model.get_submodule(path)):
                groups.setdefault(key, (depth, []))[1].append(node)
                break
    for depth, nodes in groups.values():
        inside = set(nodes)
        inputs = [n for node in nodes for n in node.all_input_nodes if n not in inside and n in activations]
        results = [n for n in nodes if n in activations and any(user not in inside for user in n.users)]
        if not results:
            continue
        path = stacks[nodes[0]][depth][1]
        with graph.inserting_after(results[-1]):
            call = graph.create_node("call_module", path, tuple(dict.fromkeys(inputs)))
        stacks[call] = stacks[nodes[0]][: depth + 1]
        activations.add(call)
        results[-1].replace_all_uses_with(call)
    for node in reversed([node for _, nodes in groups.values() for node in nodes]):
        if not node.users:
            graph.erase_node(node)
