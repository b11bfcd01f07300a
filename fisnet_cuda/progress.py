"""One line of progress, on a terminal or in a log file."""

from __future__ import annotations

import sys
import time
from typing import TextIO

QUIET = 2.0  # seconds between two lines of a log file


class Progress:
    """Shows how far a loop has come: a line that renews itself on a terminal; elsewhere a line per tenth, at most
    one in two seconds, and one at the end.

    Args:
        label: what is being done.
        total: number of steps.
        stream: where to write; standard error unless told, so that results on standard output stay clean.
    """

    def __init__(self, label: str, total: int, stream: TextIO | None = None) -> None:
        self.label, self.total, self.stream = label, total, stream or sys.stderr
        self.renews = self.stream.isatty()
        self.start = time.perf_counter()
        self.shown = 0.0 if self.renews else self.start
        self.tenth = 0

    def update(self, done: int, note: str = "") -> None:
        """Reports that ``done`` of the steps are done; cheap enough to be called at every step."""
        now = time.perf_counter()
        last = done >= self.total
        if self.renews:
            if now - self.shown < 0.2 and not last:
                return
            self.shown = now
            filled = round(24 * done / self.total)
            bar = "#" * filled + "-" * (24 - filled)
            text = f"{self.label:<22} [{bar}] {done / self.total:4.0%} {now - self.start:4.0f} s  {note}"
            self.stream.write("\r" + text[:118].ljust(118) + ("\n" if last else ""))
        else:
            tenth = 10 * done // self.total
            if tenth == self.tenth or (now - self.shown < QUIET and not last):
                return
            self.tenth, self.shown = tenth, now
            self.stream.write(f"{self.label:<22} {done / self.total:4.0%} {now - self.start:4.0f} s  {note}\n")
        self.stream.flush()
