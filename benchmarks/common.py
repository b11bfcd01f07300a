"""What the benchmarks share: the record of the machine, side-by-side timing, bars, and the files they write."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import fisnet_cuda as fc
from benchmarks.cases import PRECISIONS, Setup
from fisnet_cuda.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LEAST_ROUNDS = 3  # however little time there is
TELL = 1.0  # seconds between two looks at the rounds so far
PARTIAL = "partial"  # of a row whose rounds go on
NOT_JUDGED = "----"  # the verdict on a bar whose target is for other settings


# ---- the machine ---------------------------------------------------------------------------------------------


def environment(device: str) -> dict[str, Any]:
    """What a number depends on beside the code: device, cores, threads, versions, commit, date, load.

    Args:
        device: "cpu" or "cuda".
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": device_name(device),
        "cpu": cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "fisnet_cuda": fc.__version__,
        "commit": commit(),
        "kernels": fc.info()["kernels"],
        "allocator": allocator(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_average_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def device_name(device: str) -> str:
    """The GPU's or the CPU's name."""
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def cpu_name() -> str:
    """The CPU's model name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def allocator() -> str:
    """What replaces or tunes the C library's allocator, whose fresh pages can be a good part of an op's time."""
    preloaded = [Path(name).name for name in re.split(r"[: ]+", os.environ.get("LD_PRELOAD", "")) if name]
    tuned = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(("MALLOC_", "GLIBC_TUN"))]
    return " ".join(preloaded + tuned) or "default"


def commit() -> str:
    """The short hash of the checkout, "-dirty" when files other than results differ.

    Outside git it is what FISNET_COMMIT says (`benchmarks.gpu` sets it on a machine that has only a copy), else "unknown".
    """

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FISNET_COMMIT", "unknown")


def slug(name: str) -> str:
    """A name as part of a file name.

    Example:
        >>> slug("Intel(R) Xeon(R) CPU @ 2.20GHz")
        'intel-xeon-2-20ghz'
    """
    name = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unknown"


# ---- timing --------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """The 20th, 50th and 80th percentile of repetitions."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Percentiles with linear interpolation.

        Example:
            >>> Spread.of([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
            Spread(p20=2.0, p50=3.5, p80=5.0)
        """
        return cls(*(float(v) for v in np.percentile(values, (20, 50, 80))))

    def text(self, digits: int = 2) -> str:
        """``p50 (p20-p80)``.

        Example:
            >>> Spread(1, 2, 3).text(1)
            '2.0 (1.0-3.0)'
        """
        return f"{self.p50:.{digits}f} ({self.p20:.{digits}f}-{self.p80:.{digits}f})"


@dataclass(frozen=True)
class Times:
    """Milliseconds of each competitor in each round; the competitors of one round ran one after the other."""

    ms: dict[str, list[float]]

    def spread(self, name: str) -> Spread:
        """Percentiles of one competitor's milliseconds."""
        return Spread.of(self.ms[name])

    def ratio(self, name: str, base: str) -> Spread:
        """Percentiles over rounds of one competitor's time over another's of the same round.

        Example:
            >>> Times({"a": [1.0, 2.0], "b": [2.0, 4.0]}).ratio("b", "a")
            Spread(p20=2.0, p50=2.0, p80=2.0)
        """
        return Spread.of([t / b for t, b in zip(self.ms[name], self.ms[base])])


def interleave(
    steps: Mapping[str, Callable[[], object]], rounds: int, warmup: int, device: str, label: str,
    seconds: float | None = None, calls: int = 1, seen: Callable[[Times], None] | None = None,
    failed: Callable[[str, Exception], None] | None = None,
) -> Times:  # fmt: skip
    """Time competitors in turn, A B C A B C ..., so that whatever else the machine does hits them alike.

    Args:
        steps: name -> what to time.
        rounds: how often each is timed.
        warmup: rounds before that, which are not counted.
        device: "cuda" waits for the device before and after each step.
        label: what the progress line says.
        seconds: begin no further round after so long (but always do `LEAST_ROUNDS`).
        calls: how often a step runs between two looks at the clock; its time is the mean.
        seen: given the whole rounds so far, about once a second: what is there when the process is killed.
        failed: told of a competitor that raises, which is then out, with all of its times; without it, the exception goes on.
    """

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in steps}
    progress, done = Progress(label, len(steps) * (rounds + warmup)), 0
    begin = told = time.perf_counter()
    for index in range(rounds + warmup):
        if seconds is not None and index >= warmup + LEAST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for name in list(times):
            try:
                wait()
                start = time.perf_counter()
                for _ in range(calls):
                    steps[name]()
                wait()
            except Exception as error:
                if failed is None:
                    raise
                del times[name]
                failed(name, error)
                continue
            if index >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start) / calls)
            done += 1
            progress.update(done, f"{name}, round {index + 1}")
        if seen is not None and index >= warmup and times and time.perf_counter() - told > TELL:
            seen(Times({name: list(ms) for name, ms in times.items()}))
            told = time.perf_counter()
    return Times(times)


# ---- results -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A target and what was measured against it.

    Args:
        name: what is judged.
        value: measured; None when nothing was, because the result was wrong.
        limit: the value must not exceed it.
        unit: of both.
        judged: False where the settings are not those that the target is for.
        by: the percentile that decides. "p50" as a rule; "p20" where 0 is expected and a median of noise alone
            would fail every other time: then only what stands out of the noise fails.
    """

    name: str
    value: Spread | None
    limit: float
    unit: str = "x"
    judged: bool = True
    by: str = "p50"

    @property
    def verdict(self) -> str:
        """PASS, FAIL, or that the target is for other settings."""
        if self.value is None:
            return "FAIL"
        passed = getattr(self.value, self.by) <= self.limit
        return ("PASS" if passed else "FAIL") if self.judged else NOT_JUDGED

    def line(self) -> str:
        """One line of text.

        Example:
            >>> Bar("step", Spread(1.9, 2.0, 2.1), 2.3).line()
            'PASS  step: 2.00x (p20-p80 1.90-2.10), at most 2.30x'
        """
        if self.value is None:
            return f"{self.verdict}  {self.name}: wrong result, not timed"
        v, unit = self.value, self.unit
        return (
            f"{self.verdict}  {self.name}: {v.p50:.2f}{unit} (p20-p80 {v.p20:.2f}-{v.p80:.2f}), "
            f"at most {self.limit:.2f}{unit}" + ("" if self.by == "p50" else f", {self.by} decides")
        )

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file; ``line`` is the text."""
        value = None if self.value is None else self.value._asdict()
        return {**asdict(self), "value": value, "verdict": self.verdict, "line": self.line()}


# a column of the table: its head, and the cell of a row
Columns = Mapping[str, Callable[[Mapping[str, Any]], str]]


@dataclass
class Report:
    """What one benchmark found.

    Args:
        name: of the files.
        question: which it answers.
        settings: everything it was told.
        environment: from `environment`.
        columns: of the Markdown table.
        rows: results; `add` gives each the device and the versions.
        bars: targets and verdicts.
        notes: what a reader of the numbers must know.
        missing: what was left out, and why: another run may have time for it, or find it mended.
        wrong: a case computed something else than it should.
        failed: something else that the exit code must tell.
    """

    name: str
    question: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    columns: Columns
    rows: list[dict[str, Any]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    wrong: bool = False
    failed: bool = False

    def add(self, **row: Any) -> None:
        """Append a row; percentiles may be given as a `Spread`."""
        row = {key: value._asdict() if isinstance(value, Spread) else value for key, value in row.items()}
        known = self.environment
        self.rows.append({**row, **{key: known[key] for key in ("device", "torch", "fisnet_cuda", "commit")}})

    def forget_partial(self) -> None:
        """Remove the rows whose rounds went on: they come anew."""
        self.rows = [row for row in self.rows if not row.get(PARTIAL)]

    def note(self, text: str) -> None:
        """Say at once, and in the files, what a reader of the numbers must know."""
        print(f"note: {text}", file=sys.stderr)
        self.notes.append(text)

    def lack(self, what: str, reason: str) -> None:
        """Say at once, and in the files, that something was left out that another run may do."""
        print(f"left out: {what}: {reason}", file=sys.stderr)
        self.missing.append(f"{what}: {reason}")

    def drop(self, what: str, reason: str) -> None:
        """Say that a case is not timed because its result is wrong."""
        self.wrong = True
        self.note(f"{what} is not timed, its result is wrong: {reason}")

    def path(self, out: Path, suffix: str) -> Path:
        """Where a file of this report goes."""
        return result_path(self.name, self.environment["device"], out, suffix)

    def markdown(self) -> str:
        """Question, machine, table, verdicts and notes."""
        e = self.environment
        machine = f"{e['device']}, cores: {e['cores']}, threads: {e['threads']}"
        versions = f"torch {e['torch']}, fisnet_cuda {e['fisnet_cuda']} at {e['commit']}, {e['date']}"
        lines = [f"## {self.question}", "", f"{machine}; {versions}. Numbers: p50 (p20-p80).", ""]
        lines += markdown_table(self.columns, self.rows)
        for title, items in (
            ("Bars", [bar.line() for bar in self.bars]), ("Left out", self.missing), ("Notes", self.notes),
        ):  # fmt: skip
            if items:
                lines += ["", f"{title}:", "", *(f"- {item}" for item in items)]
        if any(bar.verdict == NOT_JUDGED for bar in self.bars):
            lines += ["", f"{NOT_JUDGED}: measured, not judged; the target is for other settings."]
        return "\n".join(lines) + "\n"

    def content(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {
            "name": self.name,
            "question": self.question,
            "settings": self.settings,
            "environment": self.environment,
            "bars": [bar.as_dict() for bar in self.bars],
            "notes": self.notes,
            "missing": self.missing,
            "wrong": self.wrong,
            "rows": self.rows,
        }

    def write(self, out: Path, draw: Callable[[Report, Path], None]) -> list[Path]:
        """Write the JSON file, the Markdown table and the figure; returns their paths.

        Args:
            out: the folder, made if it does not exist.
            draw: makes the figure at the path it is given.
        """
        paths = [self.path(out, suffix) for suffix in (".json", ".md", ".png")]
        save_json(self.content(), paths[0])
        paths[1].write_text(self.markdown())
        draw(self, paths[2])
        return paths


def save_json(content: Any, path: Path) -> None:
    """Write a JSON file so that, whenever the process is stopped, the file is a whole one: the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(path)


def result_path(name: str, device: str, out: Path, suffix: str) -> Path:
    """``<out>/<name>-<device><suffix>``.

    Example:
        >>> result_path("step", "AMD EPYC", Path("results"), ".json").name
        'step-amd-epyc.json'
    """
    return out / f"{name}-{slug(device)}{suffix}"


def markdown_table(columns: Columns, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A Markdown table as lines, padded so that it reads well as text."""
    table = [list(columns), *([show(row) for show in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(line, widths)) + " |" for line in table]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def cell(key: str, digits: int = 2) -> Callable[[Mapping[str, Any]], str]:
    """A cell that shows ``row[key]``: a percentile dict as ``p50 (p20-p80)``, other values as they are."""

    def show(row: Mapping[str, Any]) -> str:
        value = row.get(key)
        if value is None:
            return "-"
        if isinstance(value, dict):
            return Spread(**value).text(digits)
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    return show


# ---- the command line ----------------------------------------------------------------------------------------


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    p = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    p.add_argument("--quick", action="store_true", help="a tiny run that only shows that everything works")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files (benchmarks/results)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--precision", choices=PRECISIONS, default="fp32", help="tf32, bf16 and fp16 are for CUDA")
    p.add_argument("--layout", choices=("channels_last", "contiguous"), default="channels_last")
    p.add_argument("--threads", type=int, help="torch.set_num_threads; PyTorch's own choice by default")
    return p


def prepare(options: argparse.Namespace) -> None:
    """Apply threads, device and precision."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this PyTorch sees no GPU; see fisnet_cuda.info()")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.precision == "tf32":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    elif options.device == "cuda":
        torch.backends.cudnn.allow_tf32 = False


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options, for the result file; where files lie is no setting."""
    elsewhere = ("out", "path", "peaks", "part", "wait", "until", "authors", "cache", "earlier")
    return {key: value for key, value in vars(options).items() if key not in elsewhere}


def setup_of(options: argparse.Namespace, **fields: Any) -> Setup:
    """The `Setup` of the options, with further fields."""
    given = {key: getattr(options, key) for key in ("batch", "size", "layout", "device", "precision")}
    return Setup(**{**given, **fields})


def is_protocol(setup: Setup) -> bool:
    """Whether these are the settings that the targets are for: `Setup`'s defaults, on two CPU threads."""
    return setup == Setup(setup.model) and torch.get_num_threads() == 2


def finish(report: Report, options: argparse.Namespace, draw: Callable[[Report, Path], None]) -> int:
    """Write the files, print the table and where the files are; returns the exit code, 1 for a wrong result or another failure."""
    paths = report.write(options.out, draw)
    print(report.markdown())
    for path in paths:
        print(path)
    return int(report.wrong or report.failed)
