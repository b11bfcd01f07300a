"""Fusing instructions: a table of patterns, tried in order, for the forward and for relevance.

A pattern looks at one instruction and the ones that feed it, and returns what replaces them. It never changes results: the
fused instruction runs the same primitives in one op (which a CUDA kernel may serve in one launch).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from . import fuse_linear
from .fuse_dual import dual_fprop, dual_transposed, dual_transposed_phi, hand_over, spare_weight
from .fuse_forward import linear_act, linear_bn, map_settings
from .ir import Instr, Slot, slots_in
from .kinds.add import check_shapes


@dataclass
class _Program:
    """Instructions with an index of who makes and who reads each slot."""

    instrs: list[Instr | None]
    protected: frozenset[int]  # read by the caller
    backend: str = "auto"

    def __post_init__(self) -> None:
        self.maker: dict[int, int] = {}
        self.readers: dict[int, list[int]] = {}
        for position, instr in enumerate(self.instrs):
            self._index(position, instr)

    def _index(self, position: int, instr: Instr) -> None:
        for slot in instr.outs:
            self.maker[slot] = position
        for slot in slots_in(instr.operands):
            self.readers.setdefault(slot, []).append(position)

    def only_reader(self, slot: int, position: int) -> bool:
        return slot not in self.protected and self.readers.get(slot, []) == [position]

    def made_by(self, operand: object, *ops: str) -> int | None:
        """Position of the instruction that makes ``operand`` as its first result, if it is one of ``ops``."""
        if not isinstance(operand, Slot):
            return None
        position = self.maker.get(operand.index)
        instr = None if position is None else self.instrs[position]
        return position if instr is not None and instr.op in ops and instr.outs[0] == operand.index else None

    def replace(self, position: int, instr: Instr, *absorbed: int) -> None:
        for old in (position, *absorbed):
            gone = self.instrs[old]
            for slot in slots_in(gone.operands):
                self.readers[slot].remove(old)
            self.instrs[old] = None
        self.instrs[position] = instr
        self._index(position, instr)


def fuse(
    forward: tuple[Instr, ...], relevance: tuple[Instr, ...], protected: frozenset[int], backend: str = "auto"
) -> tuple[tuple, tuple]:
    """Apply every pattern to a program.

    Args:
        forward, relevance: the instructions as lowered.
        protected: slots that callers read.
        backend: for instructions that have none of their own.

    Returns:
        The two lists, fused.
    """
    program = _Program([*forward, *relevance], protected, backend)
    for pattern in PATTERNS:
        for position in range(len(program.instrs)):
            if program.instrs[position] is not None:
                pattern(program, position)
    split = len(forward)
    return (
        tuple(i for i in program.instrs[:split] if i is not None),
        tuple(i for i in program.instrs[split:] if i is not None),
    )


def _bn_add_relu(p: _Program, position: int) -> None:
    """skip-add-ReLU behind a BatchNorm: ``relu(bn(x) + skip)``."""
    relu = p.instrs[position]
    if relu.op != "relu":
        return
    add_at = p.made_by(relu.operands[0], "add")
    if add_at is None or not p.only_reader(relu.operands[0].index, position):
        return
    for which, other in ((0, 1), (1, 0)):
        summand, skip = p.instrs[add_at].operands[which], p.instrs[add_at].operands[other]
        bn_at = p.made_by(summand, "bn")
        if bn_at is not None and p.only_reader(summand.index, add_at):
            bn = p.instrs[bn_at]
            operands = (*bn.operands, skip, True)
            fused = replace(bn, op="bn_add_relu", operands=operands, outs=(relu.outs[0], *bn.outs[1:]))
            p.replace(position, fused, add_at, bn_at)
            return


def _bn_relu(p: _Program, position: int) -> None:
    """``relu(bn(x))``."""
    relu = p.instrs[position]
    if relu.op != "relu":
        return
    bn_at = p.made_by(relu.operands[0], "bn")
    if bn_at is not None and p.only_reader(relu.operands[0].index, position):
        bn = p.instrs[bn_at]
        operands = (*bn.operands, None, True)
        p.replace(position, replace(bn, op="bn_relu", operands=operands, outs=(relu.outs[0], *bn.outs[1:])), bn_at)


def _linear_relu(p: _Program, position: int) -> None:
    """``relu(W a + b)`` and ``relu(x + y)``: the pre-activation is overwritten, not kept."""
    relu = p.instrs[position]
    if relu.op != "relu":
        return
    at = p.made_by(relu.operands[0], "conv", "linear", "add")
    if at is not None and p.only_reader(relu.operands[0].index, position):
        first = p.instrs[at]
        runs = {"fn": _add_relu} if first.op == "add" else map_settings(p)
        p.replace(position, replace(first, op=f"{first.op}_relu", outs=relu.outs, **runs), at)


def _phi_bn(p: _Program, position: int) -> None:
    """BN-ReLU-conv backwards: the ReLU's phi and the BatchNorm's scale in one pass."""
    scale = p.instrs[position]
    if scale.op != "scale":
        return
    phi_at = p.made_by(scale.operands[0], "phi_scale")
    if phi_at is not None and p.only_reader(scale.operands[0].index, position):
        phi = p.instrs[phi_at]
        fused = replace(phi, op="phi_scale_bn", operands=(*phi.operands, scale.operands[1]), outs=scale.outs)
        p.replace(position, fused, phi_at)


def _phi_bn_rest(p: _Program, position: int) -> None:
    """A dense block backwards: what the other consumers of the BatchNorm's input gave is added in the same pass."""
    add = p.instrs[position]
    if add.op != "add" or not all(isinstance(o, Slot) for o in add.operands):
        return
    for which in (0, 1):
        phi_at = p.made_by(add.operands[which], "phi_scale_bn")
        if phi_at is not None and p.only_reader(add.operands[which].index, position):
            phi = p.instrs[phi_at]
            p.replace(position, replace(phi, operands=(*phi.operands, add.operands[1 - which]), outs=add.outs), phi_at)
            return


def _times_zb(p: _Program, position: int) -> None:
    """The first ReLU's ``R = a . g`` inside the z^B rule."""
    zb = p.instrs[position]
    if zb.op != "zb":
        return
    times_at = p.made_by(zb.operands[0], "times")
    if times_at is not None and p.only_reader(zb.operands[0].index, position):
        carrier, g = p.instrs[times_at].operands
        p.replace(position, replace(zb, operands=(g, *zb.operands[1:], carrier)), times_at)


def _dual_phi(p: _Program, position: int) -> None:
    """Both rules of Dual at one ReLU: ``phi_scale`` of one map and ``a g+ / (z+ + e)`` of the other."""
    ratio = p.instrs[position]
    if ratio.op != "ratio" or not ratio.rule.startswith("z+"):
        return
    times_at = p.made_by(ratio.operands[0], "times")
    if times_at is None or not p.only_reader(ratio.operands[0].index, position):
        return
    a, g_plus = p.instrs[times_at].operands
    for phi_at in p.readers.get(a.index, []):
        phi = p.instrs[phi_at]
        if phi.op != "phi_scale" or phi.operands[1] != a or phi.operands[3] is not None or phi_at > position:
            continue
        if any(reader < position for reader in p.readers.get(phi.outs[0], [])):
            continue  # its result is needed before z+ is known
        operands = (phi.operands[0], g_plus, a, ratio.operands[1], phi.operands[2], ratio.operands[2])
        fused = Instr(
            "dual_phi", ops.dual_phi, operands, (phi.outs[0], ratio.outs[0]), phi.layer, f"{ratio.rule} | {phi.rule}",
            "dual_phi", phi.options,
        )  # fmt: skip
        p.replace(position, fused, times_at, phi_at)
        return


def _pool_phi(p: _Program, position: int) -> None:
    """ReLU, then a max pool, backwards: the pool's transpose inside the ReLU's phi (with a skip, if the ReLU has one)."""
    phi = p.instrs[position]
    if phi.op != "phi_scale":
        return
    for which, other in ((0, 3), (3, 0)):
        pool_at = p.made_by(phi.operands[which], "max_pool^T")
        if pool_at is not None and p.only_reader(phi.operands[which].index, position):
            pool = p.instrs[pool_at]
            operands = (*pool.operands, phi.operands[1], phi.operands[2], phi.operands[other])
            fused = replace(phi, op="max_pool^T_phi", fn=ops.max_pool_transposed_phi, operands=operands)
            fused = replace(fused, kernel="max_pool_scatter_phi", options=pool.options)
            p.replace(position, fused, pool_at)
            return


def _global_pool(p: _Program, operand: object, position: int) -> int | None:
    """Where ``operand`` is made, if it is a global average pool's transpose that only ``position`` reads."""
    pool_at = p.made_by(operand, "avg_pool^T")
    if pool_at is None or not p.only_reader(operand.index, position):
        return None
    _, _, adaptive, settings, _ = p.instrs[pool_at].operands
    sizes = settings[0] if adaptive and type(settings[0]) is tuple else settings[:1]
    return pool_at if adaptive and all(size == 1 for size in sizes) else None


def _pooled_phi(p: _Program, position: int) -> None:
    """ReLU, then a global average pool, backwards: one value a channel inside the ReLU's phi."""
    phi = p.instrs[position]
    if phi.op != "phi_scale" or phi.operands[3] is not None:
        return
    pool_at = _global_pool(p, phi.operands[0], position)
    if pool_at is not None:
        operands = (p.instrs[pool_at].operands[0], *phi.operands[1:3])
        fused = replace(phi, op="avg_pool^T_phi", fn=ops.pooled_phi, operands=operands, kernel="pooled_phi")
        p.replace(position, fused, pool_at)


def _pooled_dual_phi(p: _Program, position: int) -> None:
    """The same for both rules of Dual."""
    dual = p.instrs[position]
    if dual.op != "dual_phi":
        return
    pools = [_global_pool(p, operand, position) for operand in dual.operands[:2]]
    if None not in pools:
        operands = (*(p.instrs[at].operands[0] for at in pools), *dual.operands[2:])
        fused = replace(dual, op="avg_pool^T_dual_phi", fn=ops.pooled_dual_phi, operands=operands, kernel="pooled_dual_phi")
        p.replace(position, fused, *pools)


PATTERNS: tuple[Callable[[_Program, int], None], ...] = (
    _bn_add_relu,
    _bn_relu,
    _linear_relu,
    _phi_bn,
    _phi_bn_rest,
    _times_zb,
    _dual_phi,
    # behind _dual_phi, which looks for phi_scale: where both rules meet, one pass for both is worth more
    _pool_phi,
    _pooled_phi,
    _pooled_dual_phi,
    # behind all that look for a transposed product's phi, a ReLU or a BatchNorm
    dual_fprop,
    dual_transposed_phi,
    dual_transposed,
    hand_over,
    spare_weight,
    fuse_linear.transposed_phi,
    fuse_linear.transposed_add,
    linear_act,
    linear_bn,
)


def _add_relu(x: Tensor, y: Tensor) -> Tensor:
    check_shapes(x, y)
    return torch.relu_(x + y)
