"""From rows of single trainings to tables: mean and spread over seeds, as Markdown with the machine and the command."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fisnet_cuda.files import write_text

__all__ = ["by", "mean_spread", "table", "values", "write_page"]

Row = Mapping[str, Any]


def by(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows in groups of equal ``keys``, in the order of their first rows."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return groups


def values(rows: Sequence[Row], column: str) -> list[float]:
    """The finite numbers of a column."""
    found = (row.get(column) for row in rows)
    return [float(v) for v in found if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)]


def mean_spread(rows: Sequence[Row], column: str, digits: int = 1) -> str:
    """``mean (lowest-highest)`` over the rows; one row: its value; none: a dash.

    Example:
        >>> mean_spread([{"a": 1.0}, {"a": 2.0}, {"a": 6.0}], "a")
        '3.0 (1.0-6.0)'
    """
    numbers = values(rows, column)
    if not numbers:
        return "-"
    text = f"{fmean(numbers):.{digits}f}"
    return text if len(numbers) == 1 else f"{text} ({min(numbers):.{digits}f}-{max(numbers):.{digits}f})"


def deviation(rows: Sequence[Row], column: str) -> float:
    """Standard deviation over the rows (n - 1); 0 for one row."""
    numbers = values(rows, column)
    return stdev(numbers) if len(numbers) > 1 else 0.0


def table(columns: Mapping[str, Callable[[Sequence[Row]], str]], groups: Sequence[Sequence[Row]]) -> list[str]:
    """A Markdown table: a line a group."""
    cells = [list(columns), *([show(group) for show in columns.values()] for group in groups)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(line, widths)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def write_page(
    path: Path, title: str, command: str, rows: Sequence[Row], body: Sequence[str], notes: Sequence[str] = (),
    numbers: str = "mean (lowest-highest) over seeds",
) -> Path:  # fmt: skip
    """A result page: what was asked, by which command, where, and what came out.

    Args:
        path: the Markdown file; the CSV file of the same name holds the rows.
        title: the question.
        command: that makes it.
        rows: all trainings, for machine, versions and seeds.
        body: lines.
        notes: what a reader must know. That trainings diverged is said in any case.
        numbers: what the table's cells are.
    """

    def all_of(key: str) -> str:
        return ", ".join(sorted({str(row[key]) for row in rows if row.get(key) is not None}))

    seeds = sorted({row["seed"] for row in rows if row.get("seed") is not None})
    facts = (
        f"`{command}`; {all_of('device')}, {all_of('threads')} thread(s) a training; torch {all_of('torch')}; "
        f"commit {all_of('commit')}; {len(rows)} rows in `{path.with_suffix('.csv').name}`, seeds "
        f"{', '.join(map(str, seeds)) or '-'}. Numbers: {numbers}."
    )
    lines = [f"## {title}", "", facts, "", *body]
    if diverged := sum(row.get("diverged") is True for row in rows):
        notes = [*notes, f"{diverged} of {len(rows)} rows are of trainings that diverged; their numbers are in the means."]
    if notes:
        lines += ["", "Notes:", "", *(f"- {note}" for note in notes)]
    return write_text(path, "\n".join(lines) + "\n")
