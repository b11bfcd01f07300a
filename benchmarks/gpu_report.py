"""The machine behind `benchmarks.gpu`'s numbers, and its Markdown table."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import fisnet_cuda as fc
from benchmarks import common, gpu
from benchmarks.common import cell, markdown_table

QUERY = ("driver_version", "compute_cap", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit")
# key of the results -> title, and the module that has the columns (imported when needed: two of them need matplotlib)
TABLES = {
    "dispatch": ("Choices of the dispatcher", "dispatch"),
    "kernels": ("Single kernels", "kernels"),
    "steps": ("Training steps", "gpu_step"),
    "classes": ("Training step against the number of classes", "classes"),
    "heatmap": ("Heatmap alone", "heatmap"),
    "profile": ("Where the time of a step goes", "gpu_profile"),
}
STAGES = {
    "stage": cell("name"),
    "result": cell("status"),
    "seconds": cell("seconds", 0),
    "what": lambda row: row.get("detail", "").split("\n")[0],
}


def describe(device: str) -> dict[str, Any]:
    """`benchmarks.common.environment`, the library's build information, and what can be read of the GPU."""
    found = common.environment(device)
    found["slug"] = common.slug(found["device"])
    found["reason_without_kernels"] = fc.info()["reason"]
    if found["kernels"]:
        found["build"] = json.loads(torch.ops.fisnet.build_info())
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "multiprocessors": p.multi_processor_count,
            "memory_gib": round(p.total_memory / 2**30, 1),
            "l2_mib": round(p.L2_cache_size / 2**20, 1),
            "cudnn": torch.backends.cudnn.version(),
            **dict(zip(QUERY, (value.strip() for value in gpu.read_smi(",".join(QUERY)).split(",")))),
        }
    return found


def markdown(content: dict[str, Any]) -> str:
    """The tables of a run, from what its JSON file holds."""
    e = content["environment"]
    gpu = e.get("gpu", {})
    driver = f", driver {gpu['driver_version']}" if gpu.get("driver_version") else ""
    lines = [f"# fisnet_cuda at {e['commit']} on {e['device']}", ""]
    lines += [f"torch {e['torch']}, CUDA {e['cuda']}{driver}, {e['cores']} cores, {e['date']}. Numbers: p50 (p20-p80).", ""]
    if len(content["runs"]) > 1:
        told = [f"{run['date']} ({run['seconds']:.0f} s, at {run['commit']})" for run in content["runs"]]
        lines += [f"Of {len(told)} runs, with the same sources, GPU, versions and settings: {', '.join(told)}.", ""]
    if content["dry_run"]:
        lines += ["**A dry run on the CPU, with the kernels emulated: no number here says anything about a GPU.**", ""]
    if not content["finished"]:
        lines += ["**The run was stopped before its end: results so far.**", ""]
    lines += markdown_table(STAGES, content["stages"])
    told = {name: [f"{stage}: {what}" for stage, what in content[name]] for name in ("failures", "missing")}
    for title, items in (
        ("Failures", told["failures"]), ("Left out: a run with --resume does it", told["missing"]),
        ("Bars", [bar["line"] for bar in content["bars"]]),
    ):  # fmt: skip
        if items:
            lines += ["", f"## {title}", "", *(f"- {item}" for item in items)]
    for key, (title, module) in TABLES.items():
        rows = [row for row in content[key] if "wrong" not in row]
        if rows:
            columns = importlib.import_module(f"benchmarks.{module}").COLUMNS
            lines += ["", f"## {title}", "", *markdown_table(columns, rows)]
            if cut_off := sum(bool(row.get("partial")) for row in rows):
                lines += ["", f"{cut_off} of these rows were cut off: they are of fewer rounds than they should be."]
    if content["notes"]:
        lines += ["", "## Notes", "", *(f"- {note}" for note in content["notes"])]
    return "\n".join(lines) + "\n"


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Print the description as JSON; returns the exit code."""
    print(json.dumps(describe(arguments().parse_args(argv).device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
