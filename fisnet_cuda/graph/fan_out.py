"""Which Function of a program takes a gradient: one output per consumer, and phi's adjoint handed over.

Where several instructions read a map, each reads an alias of its own. The Function that made the map then receives the
gradients of its consumers apart, and one kernel joins them while it applies ReLU' and BN', or the adjoint of phi (no
accumulation passes). The instructions ask for aliases on every backend; the reference gives the same tensor each time, which
is free and lets autograd add the gradients as ever.

And where a linear map reads what a phi made, the map's Function takes that phi's adjoint too: in the backward it is the phi
behind the map's product (`fisnet_cuda.ops.transposed_phi`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .ir import Instr, Slot, slots_in

# Kernels whose ops give aliases, ``copies=``, behind their other results -> how many gradients one kernel joins; further
# consumers share the value's own slot.
JOINS = {"bn_act": 4, "phi_scale": 2, "transposed_phi": 2}
_LOOKS = ("size", "shape", "host", "relative_epsilon")  # read no more than a shape, or a constant: no gradient comes back

# Kernels that end with phi -> where their operands have the ReLU's output; epsilon, skip, scale and rest stand behind it.
_PHI = {"phi_scale": 1, "transposed_phi": 5}
_KNOWN = 9  # where a "bn_act" has the statistics that are known already
_NO_PHI = (None, 0.0, None, None, None)  # what stands there where there is no phi


def fan_out(
    forward: tuple[Instr, ...], relevance: tuple[Instr, ...], protected: frozenset[int] | set[int], slots: int
) -> tuple[tuple[Instr, ...], tuple[Instr, ...], int]:
    """Hand phi's adjoints over, then give every reader of an activation a slot of its own.

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
    slots = _hand_over(instrs, protected, slots)
    for position, instr in enumerate(instrs):
        if not _joins(instr):
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


def _hand_over(instrs: list[Instr], protected: frozenset[int] | set[int], slots: int) -> int:
    """Where the first to read what a phi made is a linear map, move the phi's adjoint there; returns the first free slot.

    Whoever else reads it then gets an alias from the map, which joins their gradients with its own.
    """
    for position, maker in enumerate(instrs):
        if not _has_phi(maker) or maker.outs[0] in protected:
            continue
        at, value = _PHI[maker.kernel], maker.outs[0]
        if any(operand is not None for operand in maker.operands[at + 3 : at + 5]):  # no s, but that through a BatchNorm
            continue
        readers = [p for p in range(position + 1, len(instrs)) if value in slots_in(instrs[p].operands)]
        reader = instrs[readers[0]] if readers else maker
        if reader.kernel != "transposed_phi" or slots_in(reader.operands).count(value) != 1 or reader.operands[0] != Slot(value):
            continue
        a, eps = maker.operands[at : at + 2]
        instrs[position] = replace(maker, options=(*maker.options, ("handed_over", True)))
        missing = _NO_PHI[len(reader.operands) - _PHI["transposed_phi"] :]
        reader = replace(reader, operands=(*reader.operands, *missing, (a, eps)))
        if len(readers) > 1:
            reader = replace(reader, outs=(*reader.outs, slots), options=(*reader.options, ("alias", True)))
            for other in readers[1:]:
                for _ in range(slots_in(instrs[other].operands).count(value)):
                    instrs[other] = _read_alias(instrs[other], value, slots)
            slots += 1
        instrs[readers[0]] = reader
    return slots


def _has_phi(instr: Instr) -> bool:
    at = _PHI.get(instr.kernel)
    return at is not None and len(instr.operands) > at and instr.operands[at] is not None


def _handed_over(instr: Instr) -> bool:
    return ("handed_over", True) in instr.options


def _joins(instr: Instr) -> bool:
    """Whether ``instr`` can join the gradients of several consumers."""
    return instr.kernel in JOINS and not _handed_over(instr) and (instr.kernel not in _PHI or _has_phi(instr))


def _gives(instr: Instr) -> tuple:
    """The operands of ``instr`` that may get a gradient: known statistics do not, nor, where phi's adjoint is handed over, the
    ReLU's output."""
    if instr.op in _LOOKS:
        return ()
    if instr.kernel == "bn_act":
        at = _KNOWN
    elif _handed_over(instr):
        at = _PHI[instr.kernel]
    else:
        return instr.operands
    return (*instr.operands[:at], None, *instr.operands[at + 1 :])


def _count(instr: Instr, slot: int) -> int:
    """How often the gradient of ``slot`` gets a share from ``instr``."""
    return slots_in(_gives(instr)).count(slot)


def _read_alias(instr: Instr, slot: int, alias: int) -> Instr:
    """``instr`` with the first mention of ``slot`` that may get a gradient replaced."""
    left = 1

    def visit(operand: Any) -> Any:
        nonlocal left
        if isinstance(operand, Slot) and operand.index == slot and left:
            left = 0
            return Slot(alias)
        return tuple(visit(part) for part in operand) if type(operand) is tuple else operand

    operands = tuple(visit(operand) if given is operand else operand for operand, given in zip(instr.operands, _gives(instr)))
    return replace(instr, operands=operands)
