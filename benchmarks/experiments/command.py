"""What every experiment's command line has, and where its results go."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import RESULTS
from fisnet_cuda.errors import InputError, one_line

from .jobs import Row, rows_of, run_jobs

__all__ = ["OUT", "Run", "in_one_line", "parse", "parser"]

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
        told: the options among them that results hang on, as the command line has them.
    """

    scale: str
    seeds: int
    out: Path
    device: str
    processes: int | None
    threads: int
    draw: bool
    told: str = ""

    def pick(self, quick: object, small: object, full: object) -> object:
        """The value for this scale."""
        return {"quick": quick, "small": small, "full": full}[self.scale]

    def path(self, name: str, suffix: str) -> Path:
        """``<out>/<name>.csv`` of the small scale; other scales say so in the file's name."""
        return self.out / (name + ("" if self.scale == "small" else f"-{self.scale}") + suffix)

    def command(self, name: str, *more: str) -> str:
        """The command that makes a page: of experiment ``name``, with options of its own.

        Example:
            >>> parse(parser("", seeds=3), ["--quick", "--seeds", "5", "--out", "elsewhere"])[1].command("scenes", "--data x")
            'python -m benchmarks.experiments.scenes --data x --quick --seeds 5'
        """
        return " ".join(part for part in (f"python -m benchmarks.experiments.{name}", *more, self.told) if part)

    def rows(
        self, path: Path, jobs: Sequence[Row], one: Callable[[Row, Row], Row | list[Row]], given: Row, label: str,
        todo: Sequence[Row] | None = None,
    ) -> list[Row]:  # fmt: skip
        """The rows of an experiment, after its jobs were run where they have to be (not with ``--draw``).

        Args:
            path: the CSV file.
            jobs: all of the experiment: what the page is about.
            one, given, label: as `run_jobs` takes them.
            todo: the jobs to run, where the user asked for some of them; None: all.

        Raises:
            InputError: there are no rows.
        """
        if not self.draw:
            run_jobs(
                path, jobs if todo is None else todo, one, given,
                processes=self.processes, threads=self.threads, device=self.device, label=label,
            )  # fmt: skip
        return rows_of(path, jobs)


def parser(description: str | None, seeds: int = 3) -> argparse.ArgumentParser:
    """The options that every experiment has."""
    p = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    scale = p.add_mutually_exclusive_group()
    scale.add_argument("--quick", action="store_true", help="seconds: only shows that everything works")
    scale.add_argument("--full", action="store_true", help="the sizes for a GPU, instead of those for two CPU cores")
    p.add_argument("--seeds", type=int, default=seeds, metavar="N", help=f"seeds 0 to N-1 ({seeds})")
    p.add_argument("--out", type=Path, default=OUT, help="folder of the results (benchmarks/results/experiments)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu, or cuda: one training after the other")
    p.add_argument("--processes", type=int, help="trainings at once; by default as many as there are cores")
    p.add_argument("--threads", type=int, default=1, help="of PyTorch in each training (1)")
    p.add_argument("--draw", action="store_true", help="train nothing: tables and figures of the results that are there")
    return p


def parse(p: argparse.ArgumentParser, arguments: list[str] | None = None) -> tuple[argparse.Namespace, Run]:
    """The options, and what of them is common to all experiments."""
    options = p.parse_args(arguments)
    for name in ("seeds", "processes", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            p.error(f"argument --{name}: at least 1, got {value}")
    if options.device != "cpu" and not torch.cuda.is_available():
        p.error(f"argument --device: {options.device}, but this PyTorch sees no GPU")
    scale = "quick" if options.quick else "full" if options.full else "small"
    told = [] if scale == "small" else [f"--{scale}"]
    chosen = {name: getattr(options, name) for name in ("seeds", "device", "threads")}
    told += [f"--{name} {value}" for name, value in chosen.items() if value != p.get_default(name)]
    run = Run(scale, options.seeds, options.out, options.device, options.processes, options.threads, options.draw, " ".join(told))
    return options, run


def in_one_line(main: Callable[[list[str] | None], int]) -> Callable[..., int]:
    """A command whose user errors (`InputError`) are one line on standard error and exit code 2, in place of a traceback."""

    @functools.wraps(main)
    def command(arguments: list[str] | None = None) -> int:
        try:
            return main(arguments)
        except InputError as error:
            print(f"{Path(main.__code__.co_filename).stem}: {one_line(error)}", file=sys.stderr)
            return 2

    return command
