"""Reading the user's module: torch.fx first, torch.export for what fx cannot trace. Nothing in the module changes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import UnsupportedModelError
from .modules import is_leaf


@dataclass(frozen=True)
class Captured:
    """A traced model, the same for both front ends.

    Attributes:
        graph: an fx graph of calls.
        params: placeholder name -> parameter path (torch.export lifts parameters to inputs; fx has none).
        module_outputs: module path -> the fx node that is its output.
        owners: fx node -> path of the module whose forward made the call.
        pick_output: chooses the logits in the graph's output (a structure, for Hugging Face models).
    """

    graph: fx.Graph
    params: dict[str, str]
    module_outputs: dict[str, fx.Node]
    owners: dict[fx.Node, str]
    constants: dict[str, Tensor]


class _Tracer(fx.Tracer):
    """Stops at modules that have a normal form, and remembers what each module returned."""

    def __init__(self) -> None:
        super().__init__(autowrap_modules=(), param_shapes_constant=True)
        self.module_outputs: dict[str, fx.Node] = {}
        self.owners: dict[fx.Node, str] = {}
        self._stack = [""]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

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
        node = super().create_node(*args, **kwargs)
        self.owners[node] = self._stack[-1]
        return node


@contextlib.contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Every module of ``model`` in one mode for a while; each gets its own flag back."""
    before = [(m, m.training) for m in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, flag in before:
            module.training = flag


def capture(model: nn.Module, training: bool, example_input: Tensor | None = None) -> Captured:
    """Trace ``model`` in train or eval mode.

    Args:
        model: the user's module, left exactly as it was.
        training: the mode to trace (functional dropout, auxiliary heads and the like depend on it).
        example_input: needed by the torch.export front end only, which traces by example.

    Raises:
        UnsupportedModelError: neither front end can trace the model; says why and what to do.
    """
    with training_mode(model, training):
        try:
            return _capture_fx(model)
        except UnsupportedModelError:
            raise
        except Exception as error:  # fx raises whatever the model's Python raises on a Proxy
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if example_input is None:
            raise UnsupportedModelError(
                f"torch.fx cannot trace {type(model).__name__} ({reason}). Pass example_input= (one batch of the right "
                "shape) and torch.export traces it by example instead."
            )
        return _capture_export(model, example_input, reason)


def _capture_fx(model: nn.Module) -> Captured:
    if is_leaf(model):  # a bare layer is a network too; fx wants a module around it
        raise UnsupportedModelError(
            f"the model is a single {type(model).__name__} layer. Wrap it: torch.nn.Sequential(layer)."
        )
    signature = list(inspect.signature(model.forward).parameters.values())
    if not signature:
        raise UnsupportedModelError(f"{type(model).__name__}.forward takes no input")
    # optional arguments keep their defaults, or `if labels is not None` would see a Proxy
    concrete = {
        p.name: p.default for p in signature[1:] if p.default is not inspect.Parameter.empty and p.kind != p.VAR_KEYWORD
    }
    tracer = _Tracer()
    graph = tracer.trace(model, concrete_args=concrete)
    return Captured(graph, {}, tracer.module_outputs, tracer.owners, {})


def _capture_export(model: nn.Module, example_input: Tensor, fx_reason: str) -> Captured:
    batch = torch.export.Dim("batch", min=1)
    example = example_input if example_input.shape[0] > 1 else torch.cat([example_input] * 2)
    try:
        with torch.no_grad():
            program = torch.export.export(model, (example,), dynamic_shapes=_dynamic(model, batch), strict=False)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else ""
        raise UnsupportedModelError(
            f"{type(model).__name__} can be traced neither by torch.fx ({fx_reason}) nor by torch.export "
            f"({type(error).__name__}: {first}). Simplify its forward, or wrap the classifying part only."
        ) from error
    signature = program.graph_signature
    params = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {name: program.constants[target] for name, target in signature.inputs_to_lifted_tensor_constants.items()}
    _keep_user_output(program, signature)
    owners: dict[fx.Node, str] = {}
    outputs: dict[str, fx.Node] = {}
    for node in program.graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        paths = [_path(entry[0]) for entry in stack]
        owners[node] = paths[-1] if paths else ""
        for path in paths:
            if path and node.op == "call_function":
                outputs[path] = node  # the last call made inside a module is its output
    return Captured(program.graph, params, outputs, owners, constants)


def _path(entry: str) -> str:
    """A module path as torch.export writes it, without its call counter (`layer1@1`)."""
    return entry.split("@")[0]


def _dynamic(model: nn.Module, batch: Any) -> tuple:
    return ({0: batch},)


def _keep_user_output(program: torch.export.ExportedProgram, signature: Any) -> None:
    """Point the graph's output at the logits: drop lifted buffer updates, choose ``.logits`` of a structured output."""
    graph = program.graph
    output = next(n for n in graph.nodes if n.op == "output")
    by_name = {n.name: n for n in graph.nodes}
    users = [by_name[name] for name in signature.user_outputs if isinstance(name, str) and name in by_name]
    if not users:
        raise UnsupportedModelError("the model returns no tensor: its forward must return the logits [N, C]")
    spec = program.call_spec.out_spec
    position = 0
    if len(users) > 1:
        names = list(spec.context[0]) if isinstance(spec.context, tuple) and spec.context else spec.context
        names = list(names) if isinstance(names, (list, tuple)) else []
        if "logits" not in names:
            raise UnsupportedModelError(
                f"the model returns {len(users)} tensors: it must return the logits [N, C] alone, or name one 'logits'"
            )
        position = names.index("logits")
    output.args = (users[position],)
