"""What the user forces and forbids: ``FISNET_DISPATCH`` and `fisnet_cuda.dispatch.forced`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .key import OPS

LIBRARY, FUSED = "library", "fused"
VARIABLE = "FISNET_DISPATCH"


@dataclass(frozen=True)
class Rule:
    """``op=candidate`` or ``op=-candidate``; both sides may be patterns."""

    op: str
    candidate: str
    forbids: bool


@dataclass(frozen=True)
class Policy:
    """Rules in the order in which they were given: the last force that matches an op counts, and every prohibition does."""

    rules: tuple[Rule, ...] = ()

    @classmethod
    def parse(cls, text: str, source: str = VARIABLE) -> Policy:
        """Read ``"op=library, op=fused, op=fused/<tile>, op=-fused/<tile>"``; ValueError, naming ``source``, for anything else."""
        return cls(tuple(_rule(item.strip(), source) for item in text.split(",") if item.strip()))

    def then(self, other: Policy) -> Policy:
        """These rules, then ``other``'s."""
        return Policy(self.rules + other.rules)

    def forced(self, op: str) -> str:
        """The candidate, or pattern of candidates, that ``op`` must run; empty when it is free."""
        return next((r.candidate for r in reversed(self.rules) if not r.forbids and fnmatchcase(op, r.op)), "")

    def allows(self, op: str, candidate: str) -> bool:
        """Whether no rule forbids ``candidate`` for ``op``."""
        return not any(r.forbids and fnmatchcase(op, r.op) and matches(candidate, r.candidate) for r in self.rules)

    def allowed(self, op: str, candidates: Iterable[str]) -> list[str]:
        """Those of ``candidates`` that no rule forbids."""
        return [c for c in candidates if self.allows(op, c)]


def matches(candidate: str, pattern: str) -> bool:
    """Whether a candidate's name fits; "fused" is any fused one."""
    return fnmatchcase(candidate, "fused/*" if pattern == FUSED else pattern)


def _rule(item: str, source: str) -> Rule:
    op, equals, candidate = (part.strip() for part in item.partition("="))
    forbids, wanted = candidate.startswith("-"), candidate.removeprefix("-")
    help = (
        f"write op=candidate, comma-separated. Ops: {', '.join(OPS)}, or a pattern of these such as *. "
        "Candidates: library, fused, fused/<tile>; with a minus to forbid: -fused, -fused/<tile>"
    )
    if not equals or not op or not candidate:
        raise ValueError(f"{source}: {item!r} is not a rule; {help}")
    if not any(fnmatchcase(name, op) for name in OPS):
        raise ValueError(f"{source}: {op!r} in {item!r} names no op; {help}")
    fused = wanted == FUSED or (wanted.startswith("fused/") and len(wanted) > len("fused/"))
    if not fused and (forbids or wanted != LIBRARY):  # candidate 0 is what is left when all else is forbidden
        raise ValueError(f"{source}: {candidate!r} in {item!r} names no candidate; {help}")
    return Rule(op, wanted, forbids)
