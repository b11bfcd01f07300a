"""From LRP nodes to instructions: one forward list, one relevance list, over numbered slots.

Lowering walks the nodes forwards to emit the forward, then backwards to emit relevance. What flows backwards over a value
is a set of contributions, each in one of three forms:

* ``"g"``: relevance per unit of the value, ``R = v . g`` (the gradient form; epsilon runs in it);
* ``"R"``: relevance itself;
* ``"S"``: a pair, relevance per unit of the positive and of the negative sum that make up the value (z+ through a
  BatchNorm that reads several maps; see `fisnet_cuda.ops.rules.plus_affine`).

A kind asks for the form it can work with (`Stream.take_g`, `Stream.take_R`) and conversions are emitted only where forms meet.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import UnsupportedModelError
from ..ops import rules as rule_ops
from ..ops.layout import memory_format
from ..rules import Epsilon, Rule, RuleMap, ZPlus
from .ir import Graph, Instr, Node, Ref, Slot

LINEAR = ("conv", "linear")


@dataclass(frozen=True)
class StreamSpec:
    """One map of the program: its rules, and whether it starts from the z+ sums of the last layer (Dual's map 0)."""

    name: str
    rules: RuleMap
    from_all: bool = False


@dataclass(frozen=True)
class Lowered:
    """What lowering produces: instructions, and the slots where callers find results.

    Attributes:
        forward, relevance: the two instruction lists.
        slots: size of the environment.
        logits: slot of the logits.
        starts: stream name -> slot that the start relevance ``g [N*K, C]`` must be put into (None for ``from_all``).
        heatmaps: stream name -> slot of the input's relevance.
        hidden: layer name -> stream name -> slot.
        taps: (layer, stream, inputs' slots, output's slot) of every node, when asked for.
    """

    forward: tuple[Instr, ...]
    relevance: tuple[Instr, ...]
    slots: int
    logits: int
    starts: dict[str, int | None]
    heatmaps: dict[str, int]
    hidden: dict[str, dict[str, int]]
    taps: tuple = ()


class Builder:
    """State of one lowering: the graph, the instructions so far, and values shared by forward and relevance."""

    def __init__(self, graph: Graph, specs: tuple[StreamSpec, ...], keep: frozenset[int], backend: str) -> None:
        from . import kinds

        self.graph, self.backend, self.keep = graph, backend, keep
        self.kinds = {node.kind: kinds.of(node) for node in graph.nodes}
        # who reads a value, not who asks for its shape
        self.users = [[user for user in users if graph.nodes[user].kind != "host"] for users in graph.users()]
        self.near_input = _near_input(graph)
        self.slots = len(graph.nodes)
        self.forward: list[Instr] = []
        self.relevance: list[Instr] = []
        self.shared: dict[Any, Any] = {}
        self.nonneg: list[bool] = []
        self.merged = self._merge_batch_norms()
        self.merged_into = {bn: conv for conv, bn in self.merged.items()}
        self.streams = tuple(Stream(self, spec) for spec in specs)

    def _merge_batch_norms(self) -> dict[int, int]:
        """conv -> the BatchNorm that alone reads it: the two are one linear map for relevance."""
        merged = {}
        for index, node in enumerate(self.graph.nodes):
            users = self.users[index]
            alone = len(users) == 1 and index not in self.keep and index != self.graph.output
            norm = self.graph.nodes[users[0]] if alone else None
            if node.kind not in LINEAR or not alone or norm.kind != "batch_norm":
                continue
            # behind a dense layer BatchNorm has the same channels only where there is no other axis
            if node.kind == "conv" or node.attrs.get("features", 0) == norm.attrs.get("features", 1):
                merged[index] = users[0]
        return merged

    def slot(self) -> int:
        self.slots += 1
        return self.slots - 1

    def emit_forward(
        self, index: int, op: str, fn: Callable, operands: tuple, extra: int = 0, kernel: str = "", **options: Any
    ) -> tuple[int, ...]:
        """Append a forward instruction whose first result is the value of node ``index``; returns the extra slots."""
        outs = (index, *(self.slot() for _ in range(extra)))
        node = self.graph.nodes[index]
        operands = tuple(_resolve(o) for o in operands)
        self.forward.append(Instr(op, fn, operands, outs, node.name, "", kernel, tuple(options.items())))
        return outs[1:]

    def emit(
        self, layer: str, rule: Rule | None, op: str, fn: Callable, operands: tuple, outs: int = 1, kernel: str = "",
        **options: Any,
    ) -> Any:  # fmt: skip
        """Append a relevance instruction; returns its `Slot`, or a tuple of them."""
        slots = tuple(self.slot() for _ in range(outs))
        name = rule_name(rule)
        operands = tuple(_resolve(o) for o in operands)
        self.relevance.append(Instr(op, fn, operands, slots, layer, name, kernel, tuple(options.items())))
        return Slot(slots[0]) if outs == 1 else tuple(Slot(s) for s in slots)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """A slot that several instructions share, emitted the first time it is asked for."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def size(self, index: int) -> Slot:
        """Slot of the value's spatial size (a tuple), recorded by the forward so that the value itself may go."""
        return self.once(("size", index), lambda: self._shape(index, _spatial_size, "size"))

    def shape(self, index: int) -> Slot:
        """Slot of the value's shape without the batch axis."""
        return self.once(("shape", index), lambda: self._shape(index, _sample_shape, "shape"))

    def layout(self, index: int) -> Slot:
        """Slot of the value's memory format."""
        return self.once(("layout", index), lambda: self._shape(index, memory_format, "shape"))

    def _shape(self, index: int, fn: Callable, op: str) -> Slot:
        slot = self.slot()
        self.forward.append(Instr(op, fn, (Slot(index),), (slot,), self.graph.nodes[index].name))
        return Slot(slot)

    def statistics(self, index: int) -> tuple[Slot, Slot]:
        """Slots of (mean, rstd) that the forward of BatchNorm ``index`` used."""
        return self.shared[("statistics", index)]

    def bounds(self, index: int, low: Any, high: Any) -> tuple[Any, Any]:
        """The bounds of a value in `near_input` as operands: those of the input (numbers), or images made from them."""
        if index == 0:
            return low, high
        return self.once(("bounds", index, low, high), lambda: self._bounds(index, low, high))

    def _bounds(self, index: int, low: Any, high: Any) -> tuple[Any, Any]:
        if index == 0:
            return self.emit("input", None, "bounds", _bound_images, (Slot(0), low, high), outs=2)
        node = self.graph.nodes[index]
        images = [self.once(("bounds", i, low, high), lambda i=i: self._bounds(i, low, high)) for i in node.inputs]
        lows, highs = (tuple(pair[which] for pair in images) for which in (0, 1))
        one = len(images) == 1
        return self.kinds[node.kind].bound(self, index, node, lows[0] if one else lows, highs[0] if one else highs)

    def output_of(self, index: int) -> int:
        """The node at which a linear map's relevance arrives: the BatchNorm folded into it, or itself."""
        return self.merged.get(index, index)


class Stream:
    """One map on its way back: the contributions that every value has collected."""

    def __init__(self, builder: Builder, spec: StreamSpec) -> None:
        self.b, self.spec, self.name = builder, spec, spec.name
        self.contributions: dict[int, list[tuple[str, Any]]] = {}

    def give(self, value: int, form: str, slot: Any) -> None:
        self.contributions.setdefault(value, []).append((form, slot))

    def alone(self, value: int, contributions: list[tuple[str, Any]]) -> Stream:
        """A stream of the same rules that has only these contributions, at ``value``."""
        stream = Stream(self.b, self.spec)
        stream.contributions[value] = list(contributions)
        return stream

    def settle(self, value: int, layer: str) -> None:
        """Turn "S" pairs at ``value`` into ``g``: the value counts as one contribution to what reads it."""
        parts = self.contributions[value]
        self.contributions[value] = [
            ("g", self._g_of_pair(value, slot, layer)) if form == "S" else (form, slot) for form, slot in parts
        ]

    def has(self, value: int) -> bool:
        return bool(self.contributions.get(value))

    def of_form(self, value: int, form: str) -> list[Any]:
        return [slot for f, slot in self.contributions.get(value, []) if f == form]

    def rule(self, index: int) -> Rule:
        """The rule of a node: by name, else the first layer's, else its kind's."""
        node = self.b.graph.nodes[index]
        rules = self.spec.rules
        named = rules.named(node.name)
        if named is None and index in self.b.merged:
            named = rules.named(self.b.graph.nodes[self.b.merged[index]].name)
        if named is not None:
            return named
        if rules.first is not None and node.kind in LINEAR and node.inputs[0] in self.b.near_input:
            return rules.first
        return rules.linear if node.kind == "linear" else rules.conv

    def epsilon_at(self, index: int) -> Epsilon:
        """The epsilon of a ReLU (or of a conversion at a value): its own by name, else that of the map before it."""
        named = self.spec.rules.named(self.b.graph.nodes[index].name)
        if isinstance(named, Epsilon):
            return named
        seen = index
        while self.b.graph.nodes[seen].inputs:
            seen = self.b.graph.nodes[seen].inputs[0]
            if self.b.graph.nodes[seen].kind in LINEAR:
                rule = self.rule(seen)
                if isinstance(rule, Epsilon):
                    return rule
                break
        for rule in (self.spec.rules.conv, self.spec.rules.linear):
            if isinstance(rule, Epsilon):
                return rule
        return Epsilon(getattr(self.rule(index), "eps", 1e-2))

    def eps_operand(self, value: int, rule: Epsilon) -> float | Slot:
        """``eps`` as an operand: the number, or the slot of the sample's own scale."""
        if not rule.relative:
            return float(rule.eps)
        name = self.b.graph.nodes[value].name
        return self.b.once(
            ("eps", value, rule),
            lambda: self.b.emit(name, rule, "relative_epsilon", ops.relative_epsilon, (Slot(value), float(rule.eps))),
        )

    def sum(self, slots: list[Slot], layer: str) -> Slot:
        total = slots[0]
        for slot in slots[1:]:
            total = self.b.emit(layer, None, "add", operator.add, (total, slot))
        return total

    def take_g(self, value: int, layer: str) -> Slot:
        """All contributions at ``value`` as one ``g``."""
        parts = self.of_form(value, "g") + [self._g_of_pair(value, pair, layer) for pair in self.of_form(value, "S")]
        R = self.of_form(value, "R")
        if R:
            rule = self.epsilon_at(value)
            total = self.sum(R, layer)
            eps = self.eps_operand(value, rule)
            parts.append(self.b.emit(layer, rule, "ratio", ops.stabilised_ratio, (total, Slot(value), eps)))
        return self.sum(parts, layer)

    def take_R(self, value: int, layer: str) -> Slot:
        """All contributions at ``value`` as one ``R``."""
        parts = self.of_form(value, "R")
        g = self.of_form(value, "g") + [self._g_of_pair(value, pair, layer) for pair in self.of_form(value, "S")]
        if g:
            parts = [*parts, self.b.emit(layer, None, "times", ops.times, (Slot(value), self.sum(g, layer)))]
        return self.sum(parts, layer)

    def _g_of_pair(self, value: int, pair: tuple[Slot, Slot | None], layer: str) -> Slot:
        """An "S" pair at a value that is no sum of two parts: the positive share where it is >= 0, else the negative."""
        plus, minus = pair
        if minus is None:
            return plus
        return self.b.emit(layer, ZPlus(), "by_sign", rule_ops.by_sign, (Slot(value), plus, minus))

    # ---- the two sums of z+ ------------------------------------------------------------------------------------------

    def sums(self, value: int) -> tuple[Slot, bool, Any]:
        """``(P, two_sided, bias)`` of a value for z+ through a BatchNorm after it: the sum of its positive contributions,
        whether there are negative ones too (``M = P - value + bias``), and the bias. Linear maps, sums, average pools and
        concatenations have both; anything else counts as one contribution."""
        return self.b.once(("sums", value), lambda: self._sums(value))

    def _sums(self, value: int) -> tuple[Slot, bool, Any]:
        node, b = self.b.graph.nodes[value], self.b
        if node.kind in (*LINEAR, "pool_avg", "add", "linear_map") and not isinstance(self.rule(value), ZPlus):
            return self.part(value)  # a rule of its own, z^B say: what reads it does not fold into it
        if hasattr(b.kinds[node.kind], "sums"):
            return b.kinds[node.kind].sums(self, value, node)
        if node.kind in LINEAR:
            source = node.inputs[0]
            operands = (Slot(source), node.attrs["weight"], node.attrs["geometry"], not b.nonneg[source])
            return b.emit(node.name, ZPlus(), f"{node.kind}+", rule_ops.plus_product, operands), True, node.attrs["bias"]
        if node.kind == "concat":
            parts = [self.sums(source) for source in node.inputs]
            P = b.emit(node.name, None, "concat", torch.cat, (tuple(p for p, _, _ in parts), node.attrs["dim"]))
            bias = None
            if any(c is not None for _, _, c in parts):
                vectors = tuple((p, c) for p, _, c in parts)
                bias = b.emit(node.name, None, "concat", _cat_biases, (vectors, node.attrs["dim"]))
            return P, any(two for _, two, _ in parts), bias
        if b.nonneg[value]:
            return self.part(value)
        if node.kind == "pool_avg":
            return b.emit(node.name, ZPlus(), "avg_pool+", _pool_of_part, (Slot(node.inputs[0]), *_pool(node))), True, None
        if node.kind == "add":
            operands = tuple(Slot(source) for source in node.inputs)
            return b.emit(node.name, ZPlus(), "add+", _sum_of_parts, operands), True, None
        return self.part(value)

    def part(self, value: int) -> tuple[Slot, bool, None]:
        """`sums` of a value that counts as one contribution."""
        if self.b.nonneg[value]:
            return Slot(value), False, None
        return self.b.emit(self.b.graph.nodes[value].name, ZPlus(), "part", _part, (Slot(value),)), True, None


def _near_input(graph: Graph) -> frozenset[int]:
    """The input, and values that only move, copy or rescale it: what reads them is a first layer."""
    from . import kinds

    near = {0}
    for index, node in enumerate(graph.nodes):
        if node.inputs and near.issuperset(node.inputs) and kinds.moves(node):
            near.add(index)
    return frozenset(near)


def _check_first_layers(b: Builder, spec: StreamSpec) -> None:
    """A rule for first layers needs first layers: what else reads the input would silently go without."""
    if spec.rules.first is None:
        return
    needed = {b.graph.output}
    for index in reversed(range(len(b.graph.nodes))):
        node = b.graph.nodes[index]
        if index not in needed or node.kind == "host":
            continue
        needed.update(node.inputs)
        if index not in b.near_input and node.kind not in LINEAR and b.near_input.intersection(node.inputs):
            raise UnsupportedModelError(
                f"{node.name}: {node.kind} reads the input, and the rule of the first layer, {rule_name(spec.rules.first)}, is "
                "for convolutions and dense layers (behind constants, padding and reshapes). Pass first_layer='epsilon', or "
                "a rule map without 'first'."
            )


def lower(
    graph: Graph, specs: tuple[StreamSpec, ...], hidden: dict[str, int], backend: str, taps: bool = False
) -> Lowered:
    """Emit the program of ``graph`` for the maps ``specs``.

    Args:
        graph: the model.
        specs: the maps, in the order of the K axis.
        hidden: names of inner values whose maps are wanted.
        backend: "auto", "reference" or "cuda".
        taps: also keep each node's incoming and outgoing relevance (for the conservation check).
    """
    b = Builder(graph, specs, frozenset(hidden.values()), backend)
    for spec in specs:
        _check_first_layers(b, spec)
    for index, node in enumerate(graph.nodes):
        kind = b.kinds[node.kind]
        b.nonneg.append(kind.nonneg(b, node))
        kind.forward(b, index, node)

    starts: dict[str, int | None] = {}
    for stream in b.streams:
        if stream.spec.from_all:
            starts[stream.name] = None
            _start_from_all(b, stream)
        else:
            starts[stream.name] = b.slot()
            stream.give(graph.output, "g", Slot(starts[stream.name]))

    hidden_slots: dict[str, dict[str, int]] = {name: {} for name in hidden}
    tapped = []
    for index in reversed(range(1, len(graph.nodes))):
        node = graph.nodes[index]
        for stream in b.streams:
            if not stream.has(index):
                continue
            for name, value in hidden.items():
                if value == index:
                    hidden_slots[name][stream.name] = stream.take_R(index, node.name).index
            if node.kind == "host":
                continue
            before = {source: len(stream.contributions.get(source, [])) for source in node.inputs}
            b.kinds[node.kind].relevance(b, index, node, stream)
            if taps:
                given = {v: slice(n, len(stream.contributions.get(v, []))) for v, n in before.items()}
                tapped.append((index, stream, given))
    heatmaps = {}
    for stream in b.streams:
        if not stream.has(0):
            raise UnsupportedModelError("no relevance reaches the input: do the logits depend on it?")
        heatmaps[stream.name] = stream.take_R(0, "input").index
    for name, streams in hidden_slots.items():
        if not streams:
            raise UnsupportedModelError(f"supervise: no relevance reaches {name!r}: the logits do not depend on it")
    tap_slots = tuple(_tap(b, *tap) for tap in tapped)
    return Lowered(
        tuple(b.forward), tuple(b.relevance), b.slots, graph.output, starts, heatmaps, hidden_slots, tap_slots
    )


def _tap(b: Builder, index: int, stream: Stream, given: dict[int, slice]) -> tuple[str, str, int, tuple[int, ...]]:
    """Slots of a node's relevance, coming in at its output and handed on to its inputs by it alone."""
    node = b.graph.nodes[index]
    out = stream.take_R(index, node.name).index
    handed = []
    for source, own in given.items():
        alone = Stream(b, stream.spec)
        for form, slot in stream.contributions.get(source, [])[own]:
            alone.give(source, form, slot)
        if alone.has(source):
            handed.append(alone.take_R(source, node.name).index)
    return node.name, stream.name, out, tuple(handed)


def _start_from_all(b: Builder, stream: Stream) -> None:
    """Dual's map 0 starts from all logits at once: ``R+ = W+ a + b+`` of the last layer, its own z+ sum."""
    index = b.graph.output
    while b.graph.nodes[index].kind in ("reshape", "permute"):
        index = b.graph.nodes[index].inputs[0]
    if b.graph.nodes[index].kind in LINEAR:
        stream.give(index, "all", None)
    else:  # a global pool, say
        stream.give(index, "R", stream.sums(index)[0])


def _resolve(operand: Any) -> Any:
    """References become slots (a node's slot is its index), at any depth."""
    if isinstance(operand, Ref):
        return Slot(operand.index)
    if isinstance(operand, tuple) and not hasattr(operand, "_fields"):
        return tuple(_resolve(part) for part in operand)
    if isinstance(operand, list):
        return tuple(_resolve(part) for part in operand)
    return operand


def rule_name(rule: Rule | None) -> str:
    """A rule as `plan()` prints it: ``epsilon(0.01)``, ``z+(0.01)``, ``zB[0, 1]``."""
    if rule is None:
        return ""
    kind = type(rule).__name__
    if kind == "Epsilon":
        return f"epsilon({rule.eps:g}{' rms' if rule.relative else ''})"
    if kind == "ZPlus":
        return f"z+({rule.eps:g})"
    if kind == "ZB":
        return f"zB[{_bound(rule.low)}, {_bound(rule.high)}]"
    if kind == "Gamma":
        return f"gamma({rule.gamma:g})"
    if kind == "AlphaBeta":
        return f"alpha{rule.alpha:g}beta{rule.beta:g}"
    return {"WSquare": "w^2", "Flat": "flat"}[kind]


def _bound(bound: Any) -> str:
    return f"{bound:g}" if isinstance(bound, (int, float)) else "(" + ", ".join(f"{v:g}" for v in bound) + ")"


def _pool(node: Node) -> tuple:
    return node.attrs["spatial"], node.attrs["adaptive"], node.attrs["settings"]


def _bound_images(x: Tensor, low: Any, high: Any) -> tuple[Tensor, Tensor]:
    """Bounds, one number or one a channel, as images ``[1, C, ...]``."""

    def image(bound: Any) -> Tensor:
        values = bound if isinstance(bound, tuple) else (bound,)
        columns = torch.cat([x.new_full((1,), float(v)) for v in values])
        return columns.view(1, -1, *[1] * (x.dim() - 2)).expand(x[:1].shape)

    return image(low), image(high)


def _part(v: Tensor) -> Tensor:
    return torch.relu(v)


def _sum_of_parts(*summands: Tensor) -> Tensor:
    return sum(_part(v) for v in summands[1:]) + _part(summands[0])


def _pool_of_part(v: Tensor, spatial: int, adaptive: bool, settings: tuple) -> Tensor:
    return ops.avg_pool(_part(v), spatial, adaptive, settings)


def _cat_biases(vectors: tuple, dim: int) -> Tensor:
    return torch.cat([p.new_zeros(p.shape[dim]) if c is None else c for p, c in vectors])


def _spatial_size(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape[2:])


def _sample_shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape[1:])
