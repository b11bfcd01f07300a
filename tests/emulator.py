"""The CUDA kernels on the CPU: builds the emulator, and runs kernels in it with every check on.

``with emulated():`` the ops of `fisnet_cuda` run the extension's kernels (their own source, compiled by g++) for CPU tensors, with
races, bounds, alignment and write conflicts checked, uninitialised shared memory as NaN and outputs filled with NaN.
`numpy_module` gives the launchers of the same kernels for numpy arrays.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fisnet_cuda import _backend

ROOT = Path(__file__).resolve().parents[1]
BUILD = Path(os.environ.get("FISNET_EMULATOR_BUILD", ROOT / "build" / "emulator"))
MARK = "[cuda_emu]"  # what every message of the emulator begins with
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


class KernelError(RuntimeError):
    """What a check of the emulator found, with the source lines."""


def cannot_build() -> str:
    """Why the emulator cannot be built here; empty when it can."""
    if toolkit_headers() is None:
        return "the emulator needs the headers of a CUDA toolkit: none found"
    if missing := [tool for tool in ("cmake", "ninja", "g++") if not shutil.which(tool)]:
        return f"the emulator needs {' and '.join(missing)}"
    return ""


def needs() -> str:
    """Why the emulator cannot run ops here; empty when it can."""
    if _backend._load()[0] is None:
        return cannot_build() or f"the extension is not built: {_backend._load()[1]}"
    return cannot_build()


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


def configure(order: str = "in order", seed: int = 1, async_random: bool = False, checks: bool = True, max_shared: int = -1) -> None:
    """Set the schedule of threads and blocks, whether accesses are checked, and the bytes of shared memory that a block may have."""
    torch.ops.fisnet_emulator.config(ORDERS[order], seed, async_random, checks, max_shared)


def stats() -> dict[str, int]:
    """What the emulated operators have run since `reset_stats`: blocks, barriers, tensor-core products, accesses to shared memory and
    their bank conflicts (``Stats`` of `emu/cuda_emu.h` says what each is)."""
    return json.loads(torch.ops.fisnet_emulator.stats())


def reset_stats() -> None:
    """Start counting anew."""
    torch.ops.fisnet_emulator.reset_stats()


def symbolize(message: str) -> str:
    """``message`` with source lines for the ``[library+0xoffset]`` in it: where the access is < where that was called from."""
    if not shutil.which("addr2line"):
        return message
    own = {f.name for f in (ROOT / "emu").iterdir()} | {"portable.cuh"}

    def lines(match: re.Match) -> str:
        command = ["addr2line", "--inlines", "--exe", match[1], match[2]]
        frames = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        frames = [re.sub(r" \(discriminator.*", "", frame.rsplit("/", 1)[-1]) for frame in frames]
        frames = [frame for frame in dict.fromkeys(frames) if frame.split(":")[0] not in own and "?" not in frame]
        return f"[{' < '.join(frames)}]" if frames else match[0]

    return re.sub(r"\[(/[^\]]+)\+(0x[0-9a-f]+)\]", lines, message)


@functools.cache
def numpy_module(name: str) -> ModuleType:
    """``fisnet_emu``, the project's launchers for numpy, or ``emulator_units``, those that test the emulator itself."""
    if cannot_build() or importlib.util.find_spec("pybind11") is None:
        pytest.skip(cannot_build() or "the emulator's numpy modules need pybind11")
    spec = importlib.util.spec_from_file_location(name, next((build(name) / "emu").glob(f"{name}.*.so")))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def emulated(order: str = "in order", seed: int = 1, async_random: bool = False, checks: bool = True) -> Iterator[None]:
    """Inside, ops of CPU tensors run the emulated kernels; skips the test where that is impossible.

    What a check finds arrives as a RuntimeError inside, and leaves as a `KernelError`, which names the source lines.
    """
    if needs():
        pytest.skip(needs())
    load()
    configure(order, seed, async_random, checks)
    before = _backend.KERNEL_DEVICES
    _backend.KERNEL_DEVICES = before | {"cpu"}
    try:
        yield
    except RuntimeError as error:
        if MARK not in str(error):
            raise
        raise KernelError(symbolize(str(error))) from error
    finally:
        _backend.KERNEL_DEVICES = before
