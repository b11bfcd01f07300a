"""What every experiment's command line has, and where its results go."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import RESULTS

__all__ = ["OUT", "Run", "parse", "parser"]

OUT = RESULTS / "experiments"
SCALES = ("quick", "small", "full")


@dataclass(frozen=True)
class Run:
    """How an experiment is run.

    Attributes:
        scale: "quick" (seconds: only shows that everything works), "small" (two CPU cores) or "full" (a GPU).
        seeds: 0 to seeds - 1.
        out: folder of the result files.
        device: to train on.
        processes: trainings at once; None: as many as there are cores.
        threads: of PyTorch in each.
        draw: only make tables and figures of the results that are there.
    """

    scale: str
    seeds: int
    out: Path
    device: str
    processes: int | None
    threads: int
    draw: bool

    def pick(self, quick: object, small: object, full: object) -> object:
        """The value for this scale."""
        return {"quick": quick, "small": small, "full": full}[self.scale]

    def path(self, name: str, suffix: str) -> Path:
        """``<out>/<name>.csv`` of the small scale; other scales say so in the file's name."""
        return self.out / (name + ("" if self.scale == "small" else f"-{self.scale}") + suffix)


def parser(description: str | None, seeds: int = 3) -> argparse.ArgumentParser:
    """The options that every experiment has."""
    p = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    scale = p.add_mutually_exclusive_group()
    scale.add_argument("--quick", action="store_true", help="seconds: only shows that everything works")
    scale.add_argument("--full", action="store_true", help="the sizes for a GPU, instead of those for two CPU cores")
    p.add_argument("--seeds", type=int, default=seeds, metavar="N", help=f"seeds 0 to N-1 ({seeds})")
    p.add_argument("--out", type=Path, default=OUT, help="folder of the results (benchmarks/results/experiments)")
    p.add_argument("--device", default="cpu", help="cpu, or cuda: one training after the other")
    p.add_argument("--processes", type=int, help="trainings at once; by default as many as there are cores")
    p.add_argument("--threads", type=int, default=1, help="of PyTorch in each training (1)")
    p.add_argument("--draw", action="store_true", help="train nothing: tables and figures of the results that are there")
    return p


def parse(p: argparse.ArgumentParser, arguments: list[str] | None = None) -> tuple[argparse.Namespace, Run]:
    """The options, and what of them is common to all experiments."""
    options = p.parse_args(arguments)
    if options.seeds < 1:
        p.error(f"argument --seeds: at least 1, got {options.seeds}")
    if options.device != "cpu" and not torch.cuda.is_available():
        p.error(f"argument --device: {options.device}, but this PyTorch sees no GPU")
    scale = "quick" if options.quick else "full" if options.full else "small"
    run = Run(scale, options.seeds, options.out, options.device, options.processes, options.threads, options.draw)
    return options, run
