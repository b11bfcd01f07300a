"""Run every benchmark, then show all tables, where the files are, and PASS or FAIL for each target.

The exit code is 0 whatever the times are (``--strict``: 1 after a FAIL), and 1 when a benchmark breaks or a result is
wrong. Each benchmark runs in a process of its own; all options but ``--only`` and ``--strict`` are handed on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import common

# memory before step, which shows the peaks that memory measured
NAMES = ("memory", "step", "heatmap", "classes", "loader", "ops")
SUFFIXES = (".json", ".md", ".png")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    p = common.parser(__doc__)
    p.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="which benchmarks; all of them")
    p.add_argument("--strict", action="store_true", help="exit with 1 when a target is missed")
    options = p.parse_args(argv)
    common.prepare(options)
    device = common.device_name(options.device)
    handed_on = ["--out", str(options.out.resolve())]
    for key in ("device", "precision", "layout", "threads"):
        if getattr(options, key):
            handed_on += [f"--{key}", str(getattr(options, key))]
    if options.quick:
        handed_on.append("--quick")

    broken: list[str] = []
    done: list[str] = []
    names = [name for name in NAMES if name in options.only]
    for number, name in enumerate(names, start=1):
        print(f"[{number}/{len(names)}] {name}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        command = [sys.executable, "-m", f"benchmarks.{name}", *handed_on]
        if name == "step" and "memory" in done:
            peaks = common.result_path("memory", device, options.out.resolve(), ".json")
            command += ["--peaks", str(peaks)]
        code = subprocess.run(command, cwd=common.ROOT, stdout=subprocess.DEVNULL).returncode
        print(f"[{number}/{len(names)}] {name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        (done if code == 0 else broken).append(name)

    files = {name: [common.result_path(name, device, options.out, suffix) for suffix in SUFFIXES] for name in done}
    lines = []
    for paths in files.values():
        print(paths[1].read_text())
        lines += [bar["line"] for bar in json.loads(paths[0].read_text())["bars"]]
    print("Files:\n")
    for paths in files.values():
        print("\n".join(str(path) for path in paths))
    print("\nTargets:\n")
    print("\n".join(lines) or "none measured")
    for name in broken:
        print(f"BROKEN  {name}: it did not finish, or a result is wrong; see its messages above")
    missed = any(line.startswith("FAIL") for line in lines)
    return int(bool(broken) or (options.strict and missed))


if __name__ == "__main__":
    sys.exit(main())
