"""Decisions for people to read."""

from __future__ import annotations

from collections.abc import Iterable


def paragraphs(entries: Iterable[dict]) -> str:
    """One paragraph a key: op, operands, mode, GPU; then each candidate with its medians, margin and error, or why it is out."""
    blocks = [_block(entry) for entry in entries]
    return "\n\n".join(blocks) if blocks else "no op has been measured"


def _block(entry: dict) -> str:
    named = "  ".join(f"{n} {v}" for n, v in entry["operands"].items())
    lines = [f"{entry['op']}: {entry['choice']}", f"  {named}", f"  {entry['mode'] or 'default mode'}, {entry['gpu']}"]
    names = [*entry["medians"], *(n for n in entry["blacklisted"] if n not in entry["medians"])]
    width = max(map(len, names), default=0)
    for name in names:
        mark = "*" if name == entry["choice"] else " "
        if name in entry["blacklisted"]:
            lines.append(f"  {mark} {name:{width}}  out: {entry['blacklisted'][name]}")
            continue
        times = " ".join(f"{t * 1e3:9.1f}" for t in entry["medians"][name])
        gained = f"{entry['margins'][name]:+7.1%}" if name in entry["margins"] else " " * 7
        error = max(entry["errors"].get(name) or [0.0])
        lines.append(f"  {mark} {name:{width}} {times} us {gained}  error {error:.1e}")
    return "\n".join(lines)
