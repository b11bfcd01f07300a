"""The two languages of the relevance program: LRP nodes (what the model computes) and instructions (what runs).

A `Graph` is a list of `Node`: one node, one value, in execution order. Lowering turns it into `Instr` lists: a forward
list and a relevance list over numbered slots, which `run` executes and `plan` prints. Both are data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Param:
    """A parameter or buffer of the user's model, or a setting of a layer (a momentum, a rate), fetched by its path at run
    time (so EMA, DDP, resharding and schedules are seen)."""

    path: str


@dataclass(frozen=True)
class Mode:
    """The ``training`` flag of a module of the user's model at run time."""

    module: str


@dataclass(frozen=True)
class Ref:
    """The value of node ``index``; before lowering."""

    index: int


@dataclass(frozen=True)
class Slot:
    """A place of the environment that instructions read and write; after lowering."""

    index: int


@dataclass(frozen=True)
class Node:
    """One operation of the model.

    Attributes:
        kind: one of the kinds in `fisnet_cuda.graph.kinds`.
        name: unique; the module's path, or its owner's path and the op for functional spellings.
        inputs: the nodes whose values it reads.
        attrs: static settings and `Param` / `Mode` references, by name.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    attrs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """A model as LRP nodes; node 0 is the input.

    Attributes:
        nodes: in execution order.
        output: the node whose value is the logits.
        module_outputs: module path -> node, for naming inner maps.
    """

    nodes: tuple[Node, ...]
    output: int
    module_outputs: dict[str, int]

    def users(self) -> list[list[int]]:
        """For every node, the nodes that read its value (once per use)."""
        users: list[list[int]] = [[] for _ in self.nodes]
        for index, node in enumerate(self.nodes):
            for source in node.inputs:
                users[source].append(index)
        return users


@dataclass(frozen=True)
class Instr:
    """One step of the program: ``outs = fn(*operands, **options)``.

    Attributes:
        op: name as `plan()` prints it.
        fn: a function of tensors.
        operands: `Slot`, `Param`, `Mode`, constants, or tuples of them.
        outs: slots that receive the result(s); -1 drops one.
        layer: the node it serves.
        rule: the LRP rule it is part of, "" in the forward.
        kernel: name of the op in the kernel table, "" for plain PyTorch.
        options: keyword arguments, constants.
    """

    op: str
    fn: Callable
    operands: tuple
    outs: tuple[int, ...]
    layer: str
    rule: str = ""
    kernel: str = ""
    options: tuple[tuple[str, Any], ...] = ()


def slots_in(operand: Any) -> list[int]:
    """The slots that an operand mentions, at any depth."""
    if isinstance(operand, Slot):
        return [operand.index]
    if isinstance(operand, (tuple, list)):
        return [index for part in operand for index in slots_in(part)]
    return []
