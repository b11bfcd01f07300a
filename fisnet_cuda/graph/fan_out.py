"""One output per consumer: where several instructions read a map, each reads an alias of its own.

The Function that made the map then receives the gradients of its consumers apart, and one kernel joins them while it applies
ReLU' and BN', or the adjoint of phi (no accumulation passes). The instructions ask for aliases on every backend; the
reference gives the same tensor each time, which is free and lets autograd add the gradients as ever.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .ir import Instr, Slot

# Kernels whose ops give aliases, ``copies=``, behind their other results -> how many gradients one kernel joins; further
# consumers share the value's own slot.
JOINS = {"bn_act": 4, "phi_scale": 2}
_LOOKS = ("size", "shape", "host", "relative_epsilon")  # read no more than a shape, or a constant: no gradient comes back


def fan_out(
    forward: tuple[Instr, ...], relevance: tuple[Instr, ...], protected: frozenset[int] | set[int], slots: int
) -> tuple[tuple[Instr, ...], tuple[Instr, ...], int]:
    """Give every reader of such an activation a slot of its own.

    The value's own slot goes to callers where they read it (``protected``), else to the last reader: it is the one that
    stays filled for as long as the value is needed.

    Args:
        forward, relevance: the fused instructions.
        protected: slots that callers read.
        slots: the first free slot.

    Returns:
        The two lists with aliases, and the first slot that is free now.
    """
    instrs = [*forward, *relevance]
    for position, instr in enumerate(instrs):
        if instr.kernel not in JOINS:
            continue
        value = instr.outs[0]
        reads = [at for at in range(position + 1, len(instrs)) for _ in range(_count(instrs[at], value))]
        aliases = min(len(reads) + (value in protected), JOINS[instr.kernel]) - 1
        if aliases < 1:
            continue
        own = list(range(slots, slots + aliases))
        slots += aliases
        options = (*instr.options, ("copies", aliases + 1))
        instrs[position] = replace(instr, outs=(*instr.outs, *own), options=options)
        for at, alias in zip(reads, own):  # those behind keep the value's own slot
            instrs[at] = _read_alias(instrs[at], value, alias)
    return tuple(instrs[: len(forward)]), tuple(instrs[len(forward) :]), slots


def _count(instr: Instr, slot: int) -> int:
    """How often the gradient of ``slot`` gets a share from ``instr``."""
    return 0 if instr.op in _LOOKS else _occurrences(instr.operands, slot)


def _occurrences(operand: Any, slot: int) -> int:
    if isinstance(operand, Slot):
        return operand.index == slot
    return sum(_occurrences(part, slot) for part in operand) if isinstance(operand, (tuple, list)) else 0


def _read_alias(instr: Instr, slot: int, alias: int) -> Instr:
    """``instr`` with the first mention of ``slot`` replaced."""
    left = 1

    def visit(operand: Any) -> Any:
        nonlocal left
        if isinstance(operand, Slot) and operand.index == slot and left:
            left = 0
            return Slot(alias)
        return tuple(visit(part) for part in operand) if type(operand) is tuple else operand

    return replace(instr, operands=tuple(visit(operand) for operand in instr.operands))
