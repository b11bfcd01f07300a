"""What does each op cost by itself? Runs test_ops.py under pytest-benchmark and keeps the result.

Ops are timed one after the other, so compare cases of a kind, not small differences between distant ones; the
convolutions have PyTorch's own op beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common, figures
from benchmarks.common import Report, Spread, cell

TESTS = "benchmarks/test_ops.py"
QUICK = ["--benchmark-max-time=0.005", "--benchmark-min-rounds=1", "-k", "phi_scale or heatmap_loss"]
COLOURS = {"forward": figures.BLUE, "backward": figures.GREEN, "aten": figures.GREY}

COLUMNS = {
    "op": cell("op"),
    "direction": cell("direction"),
    "case": cell("case"),
    "implementation": cell("implementation"),
    "layout": cell("layout"),
    "ms": cell("ms", 3),
    "rounds": cell("rounds"),
    "aten's median over this": cell("aten_over_this"),
}


def run(options: argparse.Namespace) -> Report:
    """Run the tests and read what pytest-benchmark wrote."""
    report = Report("ops", "Time of single ops", common.settings_of(options), common.environment(options.device), COLUMNS)
    # a worker of pytest-xdist leaves marks that would make the pytest below believe it is one too, and refuse to time
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    variables = {**inherited, "FISNET_BENCH_DEVICE": options.device}
    if options.threads:
        variables["OMP_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "benchmark.json"
        command = [
            sys.executable, "-m", "pytest", TESTS, "--benchmark-only", "-q", "-p", "no:cacheprovider",
            "--benchmark-quiet", f"--benchmark-json={written}", *(QUICK if options.quick else []),
        ]  # fmt: skip
        subprocess.run(command, cwd=common.ROOT, env=variables, stdout=sys.stderr, check=True)
        content = json.loads(written.read_text())
    for found in content["benchmarks"]:
        report.add(**_row(found))
    for row in report.rows:
        same = {key: row[key] for key in ("op", "direction", "case", "layout")} | {"implementation": "aten"}
        for other in report.rows:
            if same.items() <= other.items():
                row["aten_over_this"] = other["ms"]["p50"] / row["ms"]["p50"]
    return report


def _row(found: dict[str, Any]) -> dict[str, Any]:
    """A row of results from one of pytest-benchmark's."""
    params = found["params"]
    parts = [params.get("mode"), params.get("case"), f"d={params['d']}" if "d" in params else None]
    return {
        "op": found["name"].partition("[")[0].removeprefix("test_"),
        "direction": params["direction"],
        "case": " ".join(part for part in parts if part) or None,
        "implementation": params.get("implementation", "fisnet"),
        "layout": params.get("layout"),
        "ms": Spread.of([1e3 * seconds for seconds in found["stats"]["data"]]),
        "rounds": found["stats"]["rounds"],
        "threads": found["extra_info"]["threads"],
    }


def draw(report: Report, path: Path) -> None:
    """One panel a layout, one bar a test."""
    panels = []
    for layout in dict.fromkeys(row["layout"] for row in report.rows if row["layout"]):
        items = []
        for row in report.rows:
            if row["layout"] not in (None, layout):
                continue
            aten = row["implementation"] == "aten"
            words = (row["op"], row["case"], row["direction"], "aten" if aten else None)
            colour = COLOURS["aten" if aten else row["direction"]]
            ms = Spread(**row["ms"])
            items.append(figures.Item(" ".join(filter(None, words)), ms, colour, text=f"{ms.p50:.2g} ms"))
        panels.append(figures.Panel(layout, items))
    figures.bars(
        path, "What single ops cost",
        f"{figures.machine(report.environment)}\nBlue: forward, green: backward, grey: PyTorch's own op",
        panels, "milliseconds, logarithmic", log=True,
    )  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    return common.parser(__doc__)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = arguments().parse_args(argv)
    common.prepare(options)
    return common.finish(run(options), options, draw)


if __name__ == "__main__":
    sys.exit(main())
