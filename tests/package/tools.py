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
            f"-DCMAKE_CUDA_COMPILER={toolkit() / 'bin' / 'nvcc'}",
            *(f"-DCMAKE_{language}_COMPILER_LAUNCHER={sys.executable};{KEEP_LOG}" for language in ("CUDA", "CXX")),
        )  # fmt: skip
        for made in (BUILD / "CMakeFiles" / "_C.dir").rglob("*.o"):
            if not made.with_name(made.name + ".seconds").exists():  # by a launcher that did not keep all of this yet
                made.unlink()
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


def seconds() -> dict[str, float]:
    """What every file of csrc/ took to compile: {path below csrc: seconds of one core}, the longest first."""
    build()
    taken = {}
    for path in BUILD.rglob("*.o.seconds"):
        name = str(path).rpartition("/csrc/")[2].removesuffix(".o.seconds")
        if (CSRC / name).exists():  # not what a file left behind that is gone
            taken[name] = float(path.read_text())
    return dict(sorted(taken.items(), key=lambda item: -item[1]))


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
    name = re.sub(r"_GLOBAL__N__\w+::", "", name).replace("fisnet::", "").replace("> >", ">>").replace("> >", ">>")
    depth = 0
    for i, c in enumerate(name):  # the parameter list begins at the first parenthesis outside the template arguments
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name


# ---- machine code --------------------------------------------------------------------------------------------------------

LOADS_16 = re.compile(r"\bLDG(STS)?(\.\w+)*\.128\b")
STORES_16 = re.compile(r"\bSTG(\.\w+)*\.128\b")
COPIES_16 = re.compile(r"\bLDGSTS(\.\w+)*\.128\b")
PRODUCTS = re.compile(r"\bHMMA(?:\.\w+)*")
FRAGMENTS = re.compile(r"\bLDSM(?:\.\w+)*")
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


# ---- products on tensor cores ----------------------------------------------------------------------------------------------


class Linear(NamedTuple):
    """An instantiation of csrc/device/product.cuh's kernel, by its template arguments."""

    dtype: str
    rows: int  # of the tile
    columns: int
    warps: int
    stages: int
    wide: bool  # 16-byte access
    transposed: bool
    operands: int
    products: int
    prologue: bool
    epilogue: str  # without its dtype

    @property
    def tile(self) -> str:
        return f"{self.rows}x{self.columns}"

    @property
    def warp_rows(self) -> int:
        """A warp's part of the tile is this times 32 columns."""
        return self.rows * (self.columns // 32) // self.warps


def arguments(kernel: str) -> list[str]:
    """The template arguments of a kernel.

    >>> arguments("k<float, Tile<64, 64>, (bool)1>")
    ['float', 'Tile<64, 64>', '(bool)1']
    """
    found, depth = [""], 0
    for c in kernel.partition("<")[2].rpartition(">")[0]:
        depth += (c == "<") - (c == ">")
        if c == "," and not depth:
            found.append("")
        else:
            found[-1] += c
    return [one.strip() for one in found if one]


def linear(kernel: str) -> Linear | None:
    """What a kernel's name says of it; None for kernels that are no products of linear maps."""
    if not kernel.startswith("linear_kernel<"):
        return None
    dtype, tile, wide, product, epilogue = arguments(kernel)
    rows, columns, warps, stages = map(int, arguments(tile))
    transposed, operands, products, prologue = (_number(one) for one in arguments(product))
    settings = ", ".join(one for one in arguments(epilogue) if one != dtype)
    return Linear(
        dtype, rows, columns, warps, stages, bool(_number(wide)), bool(transposed), operands, products, bool(prologue),
        epilogue.partition("<")[0] + (f"<{settings}>" if settings else ""),
    )  # fmt: skip


def _number(text: str) -> int:
    text = re.sub(r"^\([\w:]+\)", "", text)
    return int(text) if text.isdigit() else int(text == "true")


def lacking(code: Code, kernel: Linear) -> list[str]:
    """What a product's machine code lacks of the instructions that it is made for; the counts are those of its main loop, unrolled.

    Kernels of 16-byte access copy operands by cp.async; those of others, element by element, may do without. float64, which
    verifies, has no tensor cores.
    """
    if kernel.dtype == "double":
        return []
    two_bytes = kernel.dtype != "float"
    tiles_m, tiles_n, halves = kernel.warp_rows // 16, 32 // 8, 2  # mma tiles of a warp's part; a step is two mma deep
    shape = {"float": "HMMA.1688.F32.TF32", "__half": "HMMA.16816.F32", "__nv_bfloat16": "HMMA.16816.F32.BF16"}[kernel.dtype]
    mma, ldmatrix = PRODUCTS.findall(code.text), FRAGMENTS.findall(code.text)
    turned = [one for one in ldmatrix if ".MT88" in one]
    # the weights of a transposed product lie as columns: ldmatrix turns them, and for 4 bytes it cannot
    rows = halves * tiles_m * kernel.operands + (0 if kernel.transposed else halves * tiles_n // 2)
    want_turned = halves * tiles_n // 2 if kernel.transposed and two_bytes else 0
    # chunks of 16 bytes, four to a row, that a thread copies in a step: the prologue's rows of A come through registers
    copies = ((0 if kernel.prologue else kernel.operands * kernel.rows) + kernel.columns) * 4 // (32 * kernel.warps)
    wanted = [
        (shape, halves * tiles_m * tiles_n * kernel.products, mma.count(shape)),
        ("LDSM", rows, len(ldmatrix) - len(turned)),
        ("LDSM transposed", want_turned, len(turned)),
    ]
    if kernel.wide:
        wanted += [("LDGSTS of 128 bits", copies, len(COPIES_16.findall(code.text))), ("STG of 128 bits", 1, int(code.stores_16))]
    complaints = [f"{what}: {has}, at least {least} expected" for what, least, has in wanted if has < least]
    return complaints + [f"{one} in place of {shape}" for one in sorted(set(mma) - {shape})]


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

    The numbers of a product of linear maps say what is multiplied, not how wide, and stay.

    >>> family("phi_scale_kernel<float, 4>")
    'phi_scale_kernel<float, #>'
    >>> family("linear_kernel<float, Tile<64, 64, 4, 4>, 1, Product<true, 1, 1, false>, PhiEpilogue<float>>")
    'linear_kernel<float, Tile<#, #, #, #>, #, Product<true, 1, 1, false>, PhiEpilogue<float>>'
    """
    parts = re.split(r"(Product<[^<>]*>)", kernel)
    return "".join(part if part.startswith("Product<") else _numberless(part) for part in parts)


def _numberless(part: str) -> str:
    return re.sub(r"(?<=[<, ])(\([\w:]+\))?\d+(?=[,>])", "#", part)
