"""What the gates read: the extension as CMake builds it, what ptxas said of its kernels, and their machine code.

Everything lies in build/gates and is built again only where a source has changed.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
BUILD = Path(os.environ.get("FISNET_GATES_BUILD", ROOT / "build" / "gates"))
KEEP_LOG = Path(__file__).with_name("keep_log.py")


# ---- what is there -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def toolkit() -> Path | None:
    """The CUDA toolkit that setup.py would take."""
    nvcc = shutil.which("nvcc")
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for place in [named] if named else [nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]:
        if place and (Path(place) / "bin" / "nvcc").exists() and (Path(place) / "include" / "cuda_runtime.h").exists():
            return Path(place)
    return None


@functools.lru_cache
def wheel_tool(name: str) -> Path | None:
    """A program of the CUDA toolkit: on PATH, in the toolkit, or from its wheel (nvidia-cuda-NAME)."""
    found = shutil.which(name)
    if found:
        return Path(found)
    if toolkit() and (toolkit() / "bin" / name).exists():
        return toolkit() / "bin" / name
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(f.locate()) for f in files if f.name == name), None)


def lacks(*what: str) -> str:
    """Why a test that needs ``what`` ("nvcc", "cmake", or a tool with a wheel) cannot run here; empty when it can."""
    for one in what:
        if one == "nvcc" and toolkit() is None:
            return "nvcc is missing: the kernels cannot be compiled here"
        if one in ("cmake", "ninja", "g++") and shutil.which(one) is None:
            return f"{one} is missing: the kernels cannot be compiled here"
        if one in ("cuobjdump", "nvdisasm") and wheel_tool(one) is None:
            return f"{one} is missing (pip install nvidia-cuda-{one}): machine code cannot be read here"
    return ""


def run(*command: str | Path, **options: object) -> str:
    """Run a command; its output, or RuntimeError with it."""
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed ({done.returncode}):\n{done.stdout[-6000:]}")
    return done.stdout


# ---- the build -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def build() -> Path:
    """The extension for sm_80, sm_90 and PTX, warnings as errors; built once for all test workers. Returns the library."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(
            "cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", "-DFISNET_WITH_EMULATOR=OFF", f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DCMAKE_CUDA_COMPILER={toolkit() / 'bin' / 'nvcc'}", f"-DCMAKE_CUDA_COMPILER_LAUNCHER={sys.executable};{KEEP_LOG}",
        )  # fmt: skip
        run("cmake", "--build", BUILD, "--target", "_C", "--parallel", str(min(2, os.cpu_count() or 1)))
    return BUILD / "fisnet_cuda" / "_C.abi3.so"


def sources() -> list[Path]:
    """The kernel files."""
    return sorted(CSRC.glob("kernels/*.cu"))


def logs() -> dict[str, str]:
    """What the compiler said: {file name of a kernel file: text}."""
    build()
    found = {source.name: next(BUILD.rglob(f"{source.name}.o.log"), None) for source in sources()}
    return {name: path.read_text() for name, path in found.items() if path}


# ---- ptxas ---------------------------------------------------------------------------------------------------------------


class Usage(NamedTuple):
    """What ptxas said of one kernel for one architecture; sizes in bytes."""

    kernel: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def clean(self) -> bool:
        return not (self.stack or self.spill_stores or self.spill_loads)


def ptxas_report(text: str) -> list[Usage]:
    """Every entry function in the output of ``nvcc -Xptxas=-v``; device functions that were not inlined count too."""
    found, kernel, arch, frame = [], "", "", (0, 0, 0)
    for line in text.splitlines():
        if m := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            kernel, arch = m[1], m[2]
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            # of the entry function or of a function it calls: the worst counts
            frame = tuple(max(a, int(b)) for a, b in zip(frame, m.groups()))
        elif m := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found.append(Usage(kernel, arch, int(m[1]), *frame, int(shared[1]) if shared else 0))
            frame = (0, 0, 0)
    names = demangle([u.kernel for u in found])
    return [u._replace(kernel=name) for u, name in zip(found, names)]


def table(rows: list[Usage]) -> str:
    """The rows as a text table."""
    lines = [f"{'kernel':70} {'arch':>6} {'regs':>5} {'stack':>6} {'spill st':>8} {'spill ld':>8} {'shared':>7}"]
    lines += [f"{u.kernel:70} {u.arch:>6} {u.registers:5} {u.stack:6} {u.spill_stores:8} {u.spill_loads:8} {u.shared:7}" for u in rows]
    return "\n".join(lines)


def demangle(names: list[str]) -> list[str]:
    """Kernels as the source writes them: without namespaces and parameters, ``phi_scale_kernel<float, 4>``."""
    if not names:
        return []
    text = subprocess.run(["c++filt"], input="\n".join(names) + "\n", capture_output=True, text=True, check=True).stdout
    return [_short(line) for line in text.splitlines()]


def _short(name: str) -> str:
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"_GLOBAL__N__\w+::", "", name).replace("fisnet::", "")
    depth = 0
    for i, c in enumerate(name):  # the parameter list begins at the first parenthesis outside the template arguments
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name


# ---- machine code --------------------------------------------------------------------------------------------------------

LOADS_16 = re.compile(r"\bLDG(STS)?(\.\w+)*\.128\b")
STORES_16 = re.compile(r"\bSTG(\.\w+)*\.128\b")
LOCAL = re.compile(r"\b(LDL|STL)(\.\w+)*\b")


class Code(NamedTuple):
    """The machine code of one kernel for one architecture."""

    kernel: str
    arch: str
    text: str

    @property
    def loads_16(self) -> bool:
        return bool(LOADS_16.search(self.text))

    @property
    def stores_16(self) -> bool:
        return bool(STORES_16.search(self.text))

    @property
    def local(self) -> list[str]:
        return sorted({m[0] for m in LOCAL.finditer(self.text)})


def _cuobjdump(*arguments: str | Path) -> str:
    path = os.pathsep.join([str(wheel_tool("nvdisasm").parent), os.environ.get("PATH", "")])  # cuobjdump calls nvdisasm
    return run(wheel_tool("cuobjdump"), *arguments, env=os.environ | {"PATH": path})


def machine_code(binary: Path) -> list[Code]:
    """Every kernel in an object or a library."""
    found, arch = [], ""
    for block in re.split(r"^(?=arch = |\t\tFunction : )", _cuobjdump("-sass", binary), flags=re.MULTILINE):
        if m := re.match(r"arch = (\w+)", block):
            arch = m[1]
        elif m := re.match(r"\t\tFunction : (\S+)", block):
            found.append(Code(m[1], arch, block))
    names = demangle([c.kernel for c in found])
    return [c._replace(kernel=name) for c, name in zip(found, names)]


def architectures(binary: Path) -> tuple[set[str], set[str]]:
    """``({"sm_80", ...}, {"sm_90", ...})``: the architectures for which there is machine code, and PTX."""
    return tuple(
        {m[1] for m in re.finditer(rf"\.(sm_\w+)\.{kind}", _cuobjdump(f"--list-{what}", binary))}
        for what, kind in (("elf", "cubin"), ("ptx", "ptx"))
    )


# ---- what the sources say of themselves --------------------------------------------------------------------------------------

EXEMPTION = re.compile(r"^//\s*no 16-byte (loads and stores|loads|stores)( in double)?:\s*(.*)$")


class Declared(NamedTuple):
    """A kernel as its source declares it; exemptions are its comment's ``// no 16-byte loads: why`` lines.

    ``// no 16-byte loads in double: why`` exempts the instantiations that serve gradcheck only.
    """

    name: str
    file: str
    no_loads: str
    no_stores: str
    in_double: frozenset[str] = frozenset()  # of "loads", "stores"

    def may_lack(self, what: str, kernel_family: str) -> bool:
        """Whether instantiations of this family need no 16-byte ``what``."""
        if what in self.in_double and "double" in kernel_family:
            return True
        return bool(self.no_loads if what == "loads" else self.no_stores)


def declared(path: Path) -> list[Declared]:
    """The ``__global__`` functions of a source file."""
    found, text = [], path.read_text()
    for m in re.finditer(r"^[^/\n]*__global__\b", text, re.MULTILINE):
        head = re.sub(r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)", "", text[m.end() : m.end() + 400])
        name = re.match(r"\s*void\s+(\w+)\s*\(", head)
        if name is None:  # an explicit instantiation
            continue
        above = text[: m.start()].splitlines()
        while above and above[-1].lstrip().startswith("template"):
            above.pop()
        exempt, in_double = {}, {}
        while above and above[-1].lstrip().startswith("//"):
            if says := EXEMPTION.match(above.pop().lstrip()):
                (in_double if says[2] else exempt).update(dict.fromkeys(says[1].split(" and "), says[3].strip()))
        found.append(Declared(name[1], path.name, exempt.get("loads", ""), exempt.get("stores", ""), frozenset(in_double)))
    return found


def kernels_declared() -> dict[str, Declared]:
    """All kernels of csrc/, by name."""
    return {d.name: d for path in sorted([*CSRC.rglob("*.cu"), *CSRC.rglob("*.cuh")]) for d in declared(path)}


def family(kernel: str) -> str:
    """An instantiation without its numbers: those of different widths are one family, those of different dtypes are not.

    >>> family("phi_scale_kernel<float, 4>")
    'phi_scale_kernel<float, #>'
    """
    return re.sub(r"(?<=[<, ])(\([\w:]+\))?\d+(?=[,>])", "#", kernel)
