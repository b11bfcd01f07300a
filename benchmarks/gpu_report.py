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
    if content["dry_run"]:
        lines += ["**A dry run on the CPU, with the kernels emulated: no number here says anything about a GPU.**", ""]
    if not content["finished"]:
        lines += ["**The run was stopped before its end: results so far.**", ""]
    lines += markdown_table(STAGES, content["stages"])
    for title, items in (("Failures", content["failures"]), ("Bars", [bar["line"] for bar in content["bars"]])):
        if items:
            lines += ["", f"## {title}", "", *(f"- {item}" for item in items)]
    for key, (title, module) in TABLES.items():
        rows = [row for row in content[key] if "wrong" not in row]
        if rows:
            columns = importlib.import_module(f"benchmarks.{module}").COLUMNS
            lines += ["", f"## {title}", "", *markdown_table(columns, rows)]
    if content["notes"]:
        lines += ["", "## Notes", "", *(f"- {note}" for note in content["notes"])]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the description as JSON; returns the exit code."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    print(json.dumps(describe(p.parse_args(argv).device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
