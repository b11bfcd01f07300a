"""Runs an experiment's trainings side by side and keeps every result: what is in the file already is not run again."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import commit, device_name
from fisnet_cuda.errors import InputError
from fisnet_cuda.files import check_folder, write_text

__all__ = ["read_rows", "rows_of", "run_jobs", "unfinished", "write_rows"]

Row = dict[str, Any]

TEXT = ("commit", "torch", "device")  # a short hash may look like a number: 1234567, 12e4567


def _value(text: str) -> Any:
    """A cell as Python: a number, true or false, nothing, or text."""
    if text in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def read_rows(path: Path) -> list[Row]:
    """The rows of a result file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{key: text if key in TEXT else _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as CSV, whole or not at all; floats with six significant digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items() if value is not None})
    write_text(path, text.getvalue())


def _key(row: Mapping[str, Any], names: Iterable[str]) -> str:
    """What a job is, as it reads back from a file."""

    def cell(value: Any) -> Any:
        if isinstance(value, float):
            return _value(f"{value:.6g}")
        return _value(value) if isinstance(value, str) else value

    return json.dumps([cell(row.get(name)) for name in names], default=str)


def _names(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for job in jobs for name in job))


def rows_of(path: Path, jobs: Sequence[Row]) -> list[Row]:
    """The rows of a result file that belong to jobs, in the jobs' order; rows of other settings in the file are left out.

    Raises:
        InputError: there is none.
    """
    names, rows = _names(jobs), read_rows(path)
    wanted = {_key(job, names): index for index, job in enumerate(jobs)}
    mine = [row for row in rows if _key(row, names) in wanted]
    if not mine:
        why = "there is no such file" if not path.exists() else f"none of its {len(rows)} rows belongs to these settings"
        raise InputError(f"{path}: {why}; run the same command without --draw first")
    return sorted(mine, key=lambda row: wanted[_key(row, names)])


def unfinished(rows: Sequence[Row], jobs: Sequence[Row]) -> list[str]:
    """A note for the page where rows of some jobs are not there (yet), else nothing."""
    names = _names(jobs)
    there = {_key(row, names) for row in rows}
    missing = sum(_key(job, names) not in there for job in jobs)
    return [f"Not finished: {missing} of {len(jobs)} trainings are missing."] if missing else []


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)


def run_jobs(
    path: Path,
    jobs: Sequence[Row],
    run: Callable[[Row, Row], Row | list[Row]],
    given: Row | None = None,
    *,
    processes: int | None = None,
    threads: int = 1,
    device: str = "cpu",
    label: str = "",
) -> list[Row]:
    """Runs jobs in processes of their own and writes the file after each of them.

    Args:
        path: the CSV file. Jobs whose columns it holds already are not run again; rows of other jobs stay.
        jobs: dicts of plain values: what is to be done. Their keys are the first columns.
        run: a module-level function: (job, given) -> the columns to add (or several rows of them).
        given: what ``run`` needs beside the job and no result hangs on: where the data lie, the device.
        processes: how many at once; by default as many as there are cores for ``threads`` each.
        threads: of PyTorch in each.
        device: "cuda" runs the jobs one after the other in this process.
        label: for the progress lines on standard error.

    Returns:
        The rows that belong to ``jobs``, in their order, older ones included.

    Raises:
        InputError: the folder cannot be written to, or a job raised it: the user's settings, and no job would do better.
        RuntimeError: jobs failed; all the others are done and in the file.
        ValueError: a result has a column of its job's.
    """
    check_folder(path.parent)
    names = _names(jobs)
    rows = read_rows(path)
    there = {_key(row, names) for row in rows}
    todo = [job for job in jobs if _key(job, names) not in there]
    facts = {"commit": commit(), "torch": torch.__version__, "device": device_name(device), "threads": threads}
    begin, failed = time.perf_counter(), list[tuple[Row, Exception]]()

    def keep(job: Row, results: Row | list[Row]) -> None:
        for result in results if isinstance(results, list) else [results]:
            if both := set(job) & set(result):
                raise ValueError(f"columns of the job and of its result have the same names: {', '.join(sorted(both))}")
            rows.append({**job, **result, **facts})
        write_rows(path, rows)

    def say(done: int, job: Row, text: str) -> None:
        told = " ".join(f"{key}={value}" for key, value in job.items() if len({_key(j, [key]) for j in jobs}) > 1)
        spent = time.perf_counter() - begin
        print(f"{label} {done}/{len(todo)} {spent:5.0f} s  {told}: {text}", file=sys.stderr, flush=True)

    def settle(done: int, job: Row, outcome: Callable[[], Row | list[Row]]) -> None:
        """Keeps what came out of a job. One that failed is told, again at the end, and the others go on."""
        try:
            results = outcome()
        except InputError:
            raise
        except Exception as error:
            failed.append((job, error))
            say(done, job, f"failed: {type(error).__name__}: {error}")
            return
        keep(job, results)
        say(done, job, _short(results))

    if todo and len(todo) < len(jobs):
        print(f"{label}: {len(jobs) - len(todo)} of {len(jobs)} are in {path} already", file=sys.stderr)
    if device != "cpu" or processes == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)  # as in processes of their own: what the column "threads" says is so
        try:
            for done, job in enumerate(todo, 1):
                settle(done, job, partial(run, job, given or {}))
        finally:
            torch.set_num_threads(before)
    elif todo:
        processes = processes or max(1, (os.cpu_count() or 1) // threads)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(todo)), context, _start, (threads,)) as pool:
            pending = {pool.submit(run, job, given or {}): job for job in todo}
            try:
                for done, future in enumerate(as_completed(pending), 1):
                    settle(done, pending[future], future.result)
            except BaseException:  # those that have not begun need not run for nothing
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(jobs)} jobs failed, the first one, {failed[0][0]}") from failed[0][1]
    return rows_of(path, jobs) if jobs else []


def _short(results: Row | list[Row]) -> str:
    row = results[-1] if isinstance(results, list) else results
    told = {key: value for key, value in row.items() if key.startswith(("accuracy", "auroc", "share", "swap", "train_seconds"))}
    return " ".join(f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in told.items())
