"""The relevance program: capture, normalise, lower and fuse once; run as a static list of instructions.

    model --capture--> fx graph --normalise--> LRP nodes --lower, fuse--> instructions --run--> logits | relevance
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._backend import implementation
from .capture import capture
from .fan_out import fan_out
from .fuse import fuse
from .ir import Graph, Instr, Mode, Param, Slot, slots_in
from .lower import Lowered, StreamSpec, lower
from .normalise import follow_modes, normalise


def build_graphs(model: nn.Module, example_input: Tensor | None = None) -> dict[bool, Graph]:
    """The model as LRP nodes, traced in train mode (True) and in eval mode (False); one object where they agree.

    Functional dropout, auxiliary heads and the like depend on the mode.

    Raises:
        UnsupportedModelError: names the module path, the op and what to do.
    """
    train, evaluate = follow_modes(*(build_graph(model, mode, example_input) for mode in (True, False)))
    return {True: train, False: train if train == evaluate else evaluate}


def build_graph(model: nn.Module, training: bool, example_input: Tensor | None = None) -> Graph:
    """The model as LRP nodes, traced in train or eval mode; the model is left as it was.

    Raises:
        UnsupportedModelError: names the module path, the op and what to do.
    """
    return share_concatenations(normalise(model, capture(model, training, example_input)))


def share_concatenations(graph: Graph) -> Graph:
    """``cat([a, b, c])`` after ``cat([a, b])`` becomes ``cat([cat([a, b]), c])``: the same numbers, and relevance of a
    dense block in one pass a layer instead of one a pair of layers."""
    known: dict[tuple, int] = {}
    nodes = list(graph.nodes)
    for index, node in enumerate(nodes):
        if node.kind != "concat" or "fn" in node.attrs:
            continue
        whole = _flat(nodes, index)
        dim = node.attrs["dim"]
        for length in range(len(whole) - 1, 1, -1):
            prefix = known.get((whole[:length], dim))
            if prefix is not None:
                nodes[index] = replace(node, inputs=(prefix, *whole[length:]))
                break
        known[(whole, dim)] = index
    return replace(graph, nodes=tuple(nodes))


def _flat(nodes: list, index: int) -> tuple[int, ...]:
    """The parts of a concatenation of concatenations along the same axis."""
    parts: list[int] = []
    for source in nodes[index].inputs:
        same = nodes[source].kind == "concat" and nodes[source].attrs["dim"] == nodes[index].attrs["dim"]
        parts.extend(_flat(nodes, source) if same else (source,))
    return tuple(parts)


@dataclass(frozen=True)
class Row:
    """One line of a plan."""

    layer: str
    forward: str
    relevance: str
    rule: str
    kernel: str


@dataclass(frozen=True)
class Plan:
    """What runs for each layer: ops of the forward and of relevance, rule, kernel. Printable, comparable."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        head = Row("layer", "forward", "relevance", "rule", "kernel")
        table = [[getattr(r, f) for f in ("layer", "forward", "relevance", "rule", "kernel")] for r in (head, *self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(5)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in table]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join(lines)


class Program:
    """A lowered model. Holds no tensors and no modules: parameters are fetched from the model at every run.

    Args:
        graph: from `build_graph`.
        specs: the maps to compute, in the order of the K axis.
        supervise: names of inner maps; module paths, or layer names as `plan` prints them.
        backend: "auto", "reference" or "cuda".
        taps: keep each node's relevance, for the conservation check.

    Raises:
        ValueError: a name of ``supervise`` or of a rule map does not exist.
    """

    def __init__(
        self,
        graph: Graph,
        specs: tuple[StreamSpec, ...],
        supervise: Iterable[str] = (),
        backend: str = "auto",
        taps: bool = False,
    ) -> None:
        self.graph, self.specs, self.backend = graph, specs, backend
        names = [node.name for node in graph.nodes]
        self.hidden = {name: _resolve_layer(graph, name) for name in supervise}
        for spec in specs:
            unmatched = spec.rules.unmatched(names)
            if unmatched:
                raise ValueError(f"rules: no layer matches {unmatched[0]!r}. {_did_you_mean(unmatched[0], names)}")
        lowered = lower(graph, specs, self.hidden, backend, taps)
        outputs = {lowered.logits, *lowered.heatmaps.values()}
        outputs |= {slot for streams in lowered.hidden.values() for slot in streams.values()}
        outputs |= {slot for _, _, out, handed in lowered.taps for slot in (out, *handed)}
        forward, relevance = fuse(lowered.forward, lowered.relevance, frozenset(outputs), backend)
        forward, relevance, slots = fan_out(forward, relevance, outputs, lowered.slots)
        self.lowered = replace(lowered, forward=forward, relevance=relevance)  # slots behind lowered.slots: aliases, parameters
        self._owners, slot_of = _param_slots((*forward, *relevance), slots)
        self._slots = slots + len(slot_of)
        frees = _last_uses(forward, relevance, outputs)
        self._forward, self._relevance = (
            tuple(_Call.of(instr, dead, slot_of) for instr, dead in zip(instrs, free))
            for instrs, free in zip((forward, relevance), frees)
        )

    # ---- running -----------------------------------------------------------------------------------------------------

    def run_forward(self, model: nn.Module, x: Tensor, training: bool | None = None) -> list[Any]:
        """Run the forward: the environment, whose slot ``lowered.logits`` holds the logits.

        Args:
            model: the module that was captured (its current parameters are used).
            x: the input ``[N, ...]``.
            training: overrides every module's ``training`` flag.
        """
        env: list[Any] = [None] * self._slots
        env[0] = x
        # once for both directions: a parametrized weight is computed when it is read (spectral_norm iterates, too)
        _read_parameters(self._owners, env, model, training)
        _execute(self._forward, env)
        return env

    def run_relevance(self, env: list[Any], starts: Mapping[str, Tensor | None]) -> list[Any]:
        """Run relevance on a forward's environment; returns the environment with the results.

        The environment is used up: values leave it (and their memory is free again) as soon as nobody needs them. Pass a
        copy of the list to run relevance more than once.

        Args:
            env: from `run_forward`, with the parameters that it read.
            starts: stream name -> relevance per unit of the logits, ``[N*K, C]`` (none for streams ``from_all``).
        """
        for name, slot in self.lowered.starts.items():
            if slot is not None:
                env[slot] = starts[name]
        _execute(self._relevance, env)
        return env

    # ---- looking -----------------------------------------------------------------------------------------------------

    def plan(self, device: torch.device | None = None) -> Plan:
        """Layer -> forward ops, relevance ops, rule, kernel; in forward order."""
        order: dict[str, dict[str, list[str]]] = {}
        fields = ("forward", "relevance", "rule", "kernel")
        for phase, instrs in (("forward", self.lowered.forward), ("relevance", self.lowered.relevance)):
            for instr in instrs:
                if instr.op in ("size", "shape", "host", "bounds"):
                    continue
                row = order.setdefault(instr.layer, {f: [] for f in fields})
                row[phase].append(instr.op)
                if instr.rule and instr.rule not in row["rule"]:
                    row["rule"].append(instr.rule)
                if instr.kernel:
                    entry = f"{instr.kernel}:{implementation(instr.kernel, self.backend, device, instr.operands)}"
                    if entry not in row["kernel"]:
                        row["kernel"].append(entry)
        rows = tuple(
            Row(layer, " ".join(r["forward"]), " ".join(r["relevance"]), ", ".join(r["rule"]), ", ".join(r["kernel"]))
            for layer, r in order.items()
        )
        return Plan(rows)


class _Call(NamedTuple):
    """An instruction ready to run: parameters and modes are slots like all values."""

    fn: Callable
    operands: tuple
    outs: tuple[int, ...]
    options: dict[str, Any]
    dead: tuple[int, ...]  # slots that nobody reads after it

    @classmethod
    def of(cls, instr: Instr, dead: tuple[int, ...], slot_of: Mapping[Param | Mode, Slot]) -> _Call:
        return cls(instr.fn, tuple(_bind(o, slot_of) for o in instr.operands), instr.outs, dict(instr.options), dead)


def _bind(operand: Any, slot_of: Mapping[Param | Mode, Slot]) -> Any:
    if isinstance(operand, (Param, Mode)):
        return slot_of[operand]
    return tuple(_bind(part, slot_of) for part in operand) if type(operand) is tuple else operand


def _execute(calls: tuple[_Call, ...], env: list[Any]) -> None:
    for fn, operands, outs, options, dead in calls:
        result = fn(*[_read(operand, env) for operand in operands], **options)
        if len(outs) == 1:
            env[outs[0]] = result
        else:
            for slot, value in zip(outs, result):
                env[slot] = value
        for slot in dead:
            env[slot] = None


def _read(operand: Any, env: list[Any]) -> Any:
    kind = type(operand)
    if kind is Slot:
        return env[operand.index]
    return tuple([_read(part, env) for part in operand]) if kind is tuple else operand


def _read_parameters(owners: tuple, env: list[Any], model: nn.Module, training: bool | None) -> None:
    """The model's parameters, buffers, settings and modes as they are now, into their slots."""
    for path, wanted in owners:
        module: Any = model
        for part in path:
            module = getattr(module, part)
        for name, slot in wanted:
            env[slot] = training if name == "training" and training is not None else getattr(module, name)


def _param_slots(instrs: Iterable[Instr], first: int) -> tuple[tuple, dict[Param | Mode, Slot]]:
    """``(((module path, ((attribute, slot), ...)), ...), operand -> Slot)`` of every parameter and mode that is read."""
    owners: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    slot_of: dict[Param | Mode, Slot] = {}

    def visit(operand: Any) -> None:
        if isinstance(operand, (Param, Mode)) and operand not in slot_of:
            slot_of[operand] = Slot(first + len(slot_of))
            *path, name = operand.path.split(".") if isinstance(operand, Param) else [*operand.module.split("."), "training"]
            owners.setdefault(tuple(p for p in path if p), []).append((name, slot_of[operand].index))
        elif isinstance(operand, tuple):
            for part in operand:
                visit(part)

    for instr in instrs:
        visit(instr.operands)
    return tuple((path, tuple(wanted)) for path, wanted in owners.items()), slot_of


def _last_uses(forward: tuple[Instr, ...], relevance: tuple[Instr, ...], outputs: set[int]) -> tuple[tuple, tuple]:
    """For each instruction the slots that nobody reads after it."""
    instrs = [*forward, *relevance]
    last: dict[int, int] = {}
    for position, instr in enumerate(instrs):
        for slot in (*instr.outs, *slots_in(instr.operands)):
            last[slot] = position
    dead: list[list[int]] = [[] for _ in instrs]
    for slot, position in last.items():
        if slot not in outputs:
            dead[position].append(slot)
    frees = [tuple(d) for d in dead]
    return tuple(frees[: len(forward)]), tuple(frees[len(forward) :])


def _resolve_layer(graph: Graph, name: str) -> int:
    """The node that a name means: a module's output, or a node as `plan` prints it."""
    if not isinstance(name, str):
        raise TypeError(f"supervise must hold layer names (str), got {type(name).__name__}")
    if name in graph.module_outputs:
        return graph.module_outputs[name]
    for index, node in enumerate(graph.nodes):
        if node.name == name and node.kind not in ("input", "host"):
            return index
    known = [*graph.module_outputs, *(node.name for node in graph.nodes)]
    raise ValueError(f"supervise: there is no layer {name!r}. {_did_you_mean(name, known)}")


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{hint}`print(net.plan())` lists the layers."


__all__ = ["Graph", "Lowered", "Plan", "Program", "Row", "StreamSpec", "build_graph", "build_graphs"]
