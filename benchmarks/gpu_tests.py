"""A plugin of pytest for ``make gpu``: the outcome of each test in a file as it comes, and tests that have passed left out.

``pytest -p benchmarks.gpu_tests --outcomes outcomes.jsonl --passed passed.json``. A run that is cut off leaves what it found. A
line is ``[test, "passed", "failed" or "skipped", message]``; the last line of a test counts.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

LONGEST = 500  # characters of a message


def pytest_addoption(parser: pytest.Parser) -> None:
    """The plugin's options."""
    group = parser.getgroup("make gpu")
    group.addoption("--outcomes", type=Path, help="append a line to this file for each test")
    group.addoption("--passed", type=Path, help="leave out the tests of this JSON list")


def pytest_configure(config: pytest.Config) -> None:
    """Only one process writes: under xdist the one that all others report to."""
    if config.getoption("outcomes") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(config.getoption("outcomes")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has passed."""
    if not config.getoption("passed"):
        return
    passed = set(json.loads(config.getoption("passed").read_text()))
    left_out = [item for item in items if item.nodeid in passed]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in passed]


class Outcomes:
    """Writes the file.

    Args:
        path: of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Setup, call and teardown of a test; one that fails decides."""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self._write(report.nodeid, "failed", crash.message if crash else str(report.longrepr))
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._write(report.nodeid, "skipped", reason.removeprefix("Skipped: "))
        elif report.when == "call":
            self._write(report.nodeid, "passed", "")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be read."""
        if report.failed:
            self._write(report.nodeid, "failed", str(report.longrepr)[-LONGEST:])

    def _write(self, name: str, outcome: str, message: str) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([name, outcome, message[:LONGEST]]) + "\n")
