"""The CUDA kernels on the CPU: builds the emulator, and runs kernels in it with every check on.

``with emulated():`` the ops of `fisnet_cuda` run the extension's kernels (their own source, compiled by g++) for CPU tensors, with
races, bounds and write conflicts checked, uninitialised shared memory as NaN and outputs filled with NaN.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fisnet_cuda import _backend

ROOT = Path(__file__).resolve().parents[1]
BUILD = Path(os.environ.get("FISNET_EMULATOR_BUILD", ROOT / "build" / "emulator"))
ORDERS = {"in order": 0, "reversed": 1, "random": 2}
# (order, seed, cp.async lands at random): what every kernel is run through
SCHEDULES = (("in order", 1, False), ("reversed", 1, False), ("random", 1, True), ("random", 2, True))


@functools.lru_cache(maxsize=1)
def toolkit_headers() -> Path | None:
    """The CUDA toolkit's include folder: all that the emulator needs of it."""
    nvcc = shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    for root in filter(None, roots):
        if (Path(root) / "include" / "cuda_runtime_api.h").exists():
            return Path(root) / "include"
    return None


def needs() -> str:
    """Why the emulator cannot run here; empty when it can."""
    if toolkit_headers() is None:
        return "the emulator needs the headers of a CUDA toolkit: none found"
    if not shutil.which("cmake") or not shutil.which("g++"):
        return "the emulator needs cmake and g++"
    if _backend._load()[0] is None:
        return f"the extension is not built: {_backend._load()[1]}"
    return ""


def build(target: str) -> Path:
    """Build one CMake target of the emulator, once for all test workers; returns the build folder."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-DFISNET_WITH_CUDA=OFF",
            f"-DPython3_EXECUTABLE={sys.executable}", f"-DFISNET_CUDA_INCLUDE={toolkit_headers()}",
        ]  # fmt: skip
        for command in (configure, ["cmake", "--build", str(BUILD), "--target", target]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"building the emulator failed:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}")
    return BUILD


@functools.lru_cache(maxsize=1)
def load() -> None:
    """Register the emulated kernels for CPU tensors."""
    torch.ops.load_library(build("emulator") / "emu" / "emulator.so")


def configure(order: str = "in order", seed: int = 1, async_random: bool = False, checks: bool = True) -> None:
    """Set the schedule of threads and blocks, and whether accesses are checked."""
    torch.ops.fisnet_emulator.config(ORDERS[order], seed, async_random, checks)


@contextlib.contextmanager
def emulated(order: str = "in order", seed: int = 1, async_random: bool = False, checks: bool = True) -> Iterator[None]:
    """Inside, ops of CPU tensors run the emulated kernels; skips the test where that is impossible."""
    if needs():
        pytest.skip(needs())
    load()
    configure(order, seed, async_random, checks)
    before = _backend.KERNEL_DEVICES
    _backend.KERNEL_DEVICES = before | {"cpu"}
    try:
        yield
    finally:
        _backend.KERNEL_DEVICES = before
