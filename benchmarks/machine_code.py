"""What does the machine code of the CUDA kernels say of their speed? No GPU is needed.

Disassembles the library with NVIDIA's own tools (cuobjdump, nvdisasm) and writes a line for every kernel: registers, shared
memory, how many blocks share a multiprocessor and what limits that, how wide its accesses are, how many bytes a thread and a
multiprocessor can have under way beside what Little's law asks for, and whether the main loop is short enough for memory, not
the issue of instructions, to be the limit. **All of it is read from machine code, nothing is measured.**

    python -m benchmarks.machine_code                       # all kernels for sm_90, into benchmarks/results/
    python -m benchmarks.machine_code --kernel 'phi_scale' --print
    cuobjdump -sass -arch sm_90 fisnet_cuda/_C.abi3.so      # the same code as text, kernel by kernel
"""

from __future__ import annotations

import argparse
import bisect
import functools
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # what finds the tools stands beside the gates

from package import tools

from benchmarks import common
from benchmarks.tile_table import ARCHS, DTYPES, RESERVED, from_sources, resident
from fisnet_cuda.files import make_folder, write_text

LIBRARY = common.ROOT / "fisnet_cuda" / "_C.abi3.so"
WITHOUT = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")  # as torch compiles kernels


# ---- what a multiprocessor has to do -------------------------------------------------------------------------------------


class Gpu(NamedTuple):
    """An H100 SXM. Data-sheet figures, except where it says otherwise."""

    processors: int = 132
    bandwidth: float = 3.35e12  # bytes a second, at most
    copied: float = 3.0e12  # bytes a second that a device copy reaches (read and written), what floors are counted with
    clock: float = 1.755e9  # boost; what it holds under load varies
    # From asking to having, when memory is busy. An idle H100 answers in some 480 clocks or 270 ns (Luo et al. 2024,
    # arXiv:2402.13499); near full bandwidth requests queue, and two to three times as much is assumed: not measured.
    latency: float = 700e-9
    issued: int = 4  # instructions of a warp a clock
    special: float = 0.5  # ... to the unit of MUFU and F2F (16 lanes of 32; CUDA C++ Programming Guide, arithmetic throughput)

    @property
    def wanted(self) -> float:
        """Bytes that a multiprocessor must have under way for full bandwidth, by Little's law.

        Example:
            >>> round(Gpu().wanted)
            17765
        """
        return self.bandwidth * self.latency / self.processors

    def clocks(self, size: float) -> float:
        """Clocks that memory gives a multiprocessor's warp for an access of ``size`` bytes a thread.

        Example:
            >>> round(Gpu().clocks(16), 1)
            39.5
        """
        return 32 * size * self.clock * self.processors / self.copied


H100 = Gpu()


# ---- instructions ----------------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    """One of nvdisasm's instructions; the next one lies 16 bytes further."""

    opcode: str
    operands: str = ""
    predicate: str = ""

    @property
    def name(self) -> str:
        """``LDG`` of ``LDG.E.128``."""
        return self.opcode.partition(".")[0]

    @property
    def size(self) -> int:
        """Bytes that it moves for a thread.

        Example:
            >>> [Instruction(code).size for code in ("LDG.E.128.CONSTANT", "STG.E.U16", "LDG.E", "LDGSTS.E.BYPASS.128.ZFILL")]
            [16, 2, 4, 16]
        """
        parts = self.opcode.split(".")[1:]
        return next((size for part, size in _SIZES.items() if part in parts), 4)

    @property
    def registers(self) -> list[int]:
        """The vector registers that it names."""
        return [int(number) for number in re.findall(r"\bR(\d+)\b", self.operands)]

    @property
    def target(self) -> int | None:
        """The instruction that a branch or a call goes to, by its number."""
        if self.name not in ("BRA", "CALL", "JMP"):
            return None
        found = re.findall(r"\b0x([0-9a-f]+)\b", self.operands)
        return int(found[-1], 16) // 16 if found else None


_SIZES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
LOADS, STORES, COPIES = ("LDG", "LD"), ("STG", "ST"), ("LDGSTS",)
MOVES = LOADS + STORES + COPIES
SPECIAL = ("MUFU", "F2F", "I2F", "F2I")  # one quarter-rate unit
LOCAL = ("LDL", "STL")
ATOMICS = ("ATOM", "ATOMG", "ATOMS", "RED")


class Function(NamedTuple):
    """The machine code of one kernel, and what its attributes say."""

    kernel: str
    registers: int
    shared: int  # bytes of static shared memory
    stack: int
    threads: int  # of a block, at most: __launch_bounds__
    code: Sequence[Instruction]


def read(library: Path, arch: str = "sm_90", files: str = "", code: bool = True) -> list[Function]:
    """The kernels of a library for one architecture, by name.

    Args:
        library: a built extension.
        arch: "sm_80" or "sm_90".
        files: a regular expression for the kernel files that count (``phi_scale``); disassembling them takes a second each.
        code: without it, instructions are left out, and that second too.

    Raises:
        RuntimeError: there is no machine code for the architecture, or a tool failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        _tool("cuobjdump", "-xelf", "all", "-arch", arch, library.resolve(), cwd=folder)
        cubins = sorted(path for path in Path(folder).glob(f"*.{arch}.cubin") if re.search(files, path.name))
        if not cubins:
            raise RuntimeError(f"{library} has no machine code for {arch}: build it with TORCH_CUDA_ARCH_LIST={arch[3]}.{arch[4:]}")
        with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
            found = [one for of_cubin in pool.map(functools.partial(_read_cubin, arch=arch, code=code), cubins) for one in of_cubin]
    names = tools.demangle([one.kernel for one in found])
    return sorted((one._replace(kernel=name) for one, name in zip(found, names)), key=lambda one: one.kernel)


def _read_cubin(cubin: Path, arch: str, code: bool) -> list[Function]:
    usage = parse_usage(_tool("cuobjdump", "-res-usage", cubin), arch)
    threads = parse_threads(_tool("cuobjdump", "-elf", cubin))
    instructions = parse_code(_tool("nvdisasm", "-json", cubin)) if usage and code else dict.fromkeys(usage, ())
    return [Function(name, *usage[name], threads[name], instructions[name]) for name in usage]


def _tool(name: str, *arguments: str | Path, **options: Any) -> str:
    path = os.pathsep.join([str(tools.wheel_tool("nvdisasm").parent), os.environ.get("PATH", "")])  # cuobjdump calls nvdisasm
    return tools.run(tools.wheel_tool(name), *arguments, env=os.environ | {"PATH": path}, **options)


def parse_usage(text: str, arch: str) -> dict[str, tuple[int, int, int]]:
    """``{kernel: (registers, bytes of static shared memory, of stack)}`` of ``cuobjdump -res-usage``.

    For sm_90 that counts the system's own kilobyte where a kernel has shared memory; here, as for ptxas, it does not count.
    """
    system = RESERVED if arch == "sm_90" else 0
    return {
        m[1]: (int(m[2]), max(0, int(m[4]) - system), int(m[3]))
        for m in re.finditer(r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    }


def parse_threads(text: str) -> dict[str, int]:
    """``{kernel: threads of a block at most}`` of ``cuobjdump -elf``: what __launch_bounds__ left in the binary, else 1024."""
    found: dict[str, int] = {}
    for block in re.split(r"^\.nv\.info\.", text, flags=re.MULTILINE)[1:]:
        most = re.search(r"EIATTR_MAX_THREADS\s+Format:\s*\w+\s+Value:\s*(0x[0-9a-f]+) (0x[0-9a-f]+) (0x[0-9a-f]+)", block)
        found[block.split(None, 1)[0]] = math.prod(int(most[i], 16) for i in (1, 2, 3)) if most else 1024
    return found


def parse_code(text: str) -> dict[str, list[Instruction]]:
    """``{kernel: instructions}`` of ``nvdisasm -json``."""
    return {
        function["function-name"]: [
            Instruction(one["opcode"], one.get("operands", ""), one.get("predicate", "")) for one in function["sass-instructions"]
        ]
        for function in json.loads(text)[1]
    }


# ---- control flow ------------------------------------------------------------------------------------------------------------


class Flow:
    """Basic blocks of a kernel and its loops. Indirect branches count as ends."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        self.code = code
        starts = {0}
        for at, one in enumerate(code):
            if one.target is not None:
                starts.add(one.target)
            if one.target is not None or one.name in _ENDS:
                starts.add(at + 1)
        self.starts = sorted(start for start in starts if start < len(code))
        self.follows = [self._after(block) for block in range(len(self.starts))]
        self.reached = self._reached()

    def range(self, block: int) -> range:
        """The numbers of a block's instructions."""
        return range(self.starts[block], self.starts[block + 1] if block + 1 < len(self.starts) else len(self.code))

    def _of(self, at: int) -> int:
        return bisect.bisect_right(self.starts, at) - 1

    def _after(self, block: int) -> list[int]:
        last = self.code[self.range(block)[-1]]
        found = []
        conditional = bool(last.predicate) or bool(re.match(r"!?U?P\d", last.operands))
        if last.name not in _ENDS or conditional or last.name == "WARPSYNC":
            found += [block + 1] if block + 1 < len(self.starts) else []
        if last.target is not None and last.target < len(self.code):
            found.append(self._of(last.target))
        return found

    def _reached(self) -> set[int]:
        reached, ahead = {0}, [0]
        while ahead:
            new = set(self.follows[ahead.pop()]) - reached
            reached |= new
            ahead += new
        return reached

    @functools.cached_property
    def loops(self) -> list[frozenset[int]]:
        """Blocks of every natural loop; loops with one head are one."""
        before: dict[int, set[int]] = {}
        for block in self.reached:
            for next_block in self.follows[block]:
                before.setdefault(next_block, set()).add(block)
        heads: dict[int, set[int]] = {}
        for block in self.reached:
            for head in self.follows[block]:
                if head > block:
                    continue
                body, ahead = {head, block}, [block] if block != head else []
                while ahead:
                    new = before.get(ahead.pop(), set()) - body
                    body |= new
                    ahead += new
                if head == 0 or 0 not in body:  # else the way back does not only lead through the head: code that lies apart
                    heads.setdefault(head, set()).update(body)
        return [frozenset(body) for body in heads.values()]

    def instructions(self, blocks: Iterable[int]) -> list[Instruction]:
        """Those of the blocks, in the order of the code."""
        return [self.code[at] for block in sorted(blocks) for at in self.range(block)]


_ENDS = ("BRA", "EXIT", "RET", "JMP", "BRX", "KILL")


# Kernels that go through their loops once where there is one map, and the samples follow each other as one: a thread has its
# elements, and is done. Of others the innermost loop that moves most is looked at.
ONE_PASS = re.compile(
    r"(phi_scale|phi_scale_backward|dual_phi|dual_phi_backward|ratio|ratio_backward|plus_affine|maps_adjoint|max_pool|max_pool_scatter|"
    r"max_pool_gather|pooled_phi|pooled_phi_a_bar|plus_start|bn_apply_flat)_kernel\b"
)


def hot_path(flow: Flow, one_pass: bool) -> tuple[list[Instruction], bool]:
    """The way through the code that moves most by the kernel's widest accesses, every block at most once; whether it is a loop's.

    Of ways that move as much it is the longest, so a branch for rare values counts. ``one_pass``: the way through the whole kernel;
    else through the innermost loop that moves most, once, where any does.
    """
    moving = [one for one in flow.instructions(flow.reached) if one.name in MOVES]
    widest = max((one.size for one in moving), default=0)
    moving_loops = [] if one_pass else [loop for loop in flow.loops if _moved(flow.instructions(loop), widest)]
    inner = [loop for loop in moving_loops if not any(other < loop for other in moving_loops)]
    ways = [_way(flow, loop, widest) for loop in inner] or [_way(flow, flow.reached, widest)]
    return max(ways, key=lambda way: (_moved(way, widest), len(way))), bool(inner)


def _way(flow: Flow, blocks: Iterable[int], size: int) -> list[Instruction]:
    """The heaviest way from the first of the blocks, without the edges that go back."""
    blocks, first = set(blocks), min(blocks)
    best: dict[int, tuple[int, int, int | None]] = {}  # bytes, instructions, next block
    ahead, open_blocks = [(first, False)], set()
    while ahead:  # depth first: a block is settled when all that follow are
        block, seen = ahead.pop()
        if seen:
            open_blocks.discard(block)
            code = [flow.code[at] for at in flow.range(block)]
            rest = max(((*best[after][:2], after) for after in flow.follows[block] if after in best), default=(0, 0, None))
            best[block] = (_moved(code, size) + rest[0], len(code) + rest[1], rest[2])
        elif block not in best and block not in open_blocks:
            open_blocks.add(block)
            ahead.append((block, True))
            ahead += [(after, False) for after in flow.follows[block] if after in blocks]
    found, block = [], first
    while block is not None:
        found += [flow.code[at] for at in flow.range(block)]
        block = best[block][2]
    return found


def _moved(code: Iterable[Instruction], size: int) -> int:
    """Bytes, by accesses of this size."""
    return sum(one.size for one in code if one.name in MOVES and one.size == size)


def under_way(flow: Flow) -> tuple[int, int]:
    """The most bytes, and loads, that a thread has asked for and not used yet, at any point of the code.

    A load is under way until one of its registers is named again. Where ways join, what is under way on either counts: absent
    operands are taken to be there. Copies to shared memory (cp.async) are no loads here.
    """
    loads = [at for block in flow.reached for at in flow.range(block) if flow.code[at].name in LOADS]
    bit = {at: 1 << number for number, at in enumerate(loads)}
    of_register: dict[int, int] = {}
    for at in loads:
        first = flow.code[at].registers[:1]
        for register in range(first[0], first[0] + max(1, flow.code[at].size // 4)) if first else ():
            of_register[register] = of_register.get(register, 0) | bit[at]

    @functools.cache
    def bytes_of(state: int) -> int:
        return sum(flow.code[at].size for at in loads if state & bit[at])

    most = (0, 0)

    def through(block: int, state: int, look: bool) -> int:
        nonlocal most
        for at in flow.range(block):
            one = flow.code[at]
            if state:
                for register in one.registers:
                    state &= ~of_register.get(register, 0)
            if at in bit:
                first = one.registers[0]
                for register in range(first, first + max(1, one.size // 4)):
                    state &= ~of_register.get(register, 0)  # which what it replaces was, too
                state |= bit[at]
                if look:
                    most = max(most, (bytes_of(state), state.bit_count()))
        return state

    entering = dict.fromkeys(flow.reached, 0)
    ahead = sorted(flow.reached)
    while ahead:
        block = ahead.pop(0)
        leaving = through(block, entering[block], look=False)
        for after in flow.follows[block]:
            if leaving & ~entering[after]:
                entering[after] |= leaving
                ahead.append(after)
    for block in flow.reached:
        through(block, entering[block], look=True)
    return most


# ---- shared memory that a launch asks for ----------------------------------------------------------------------------------------

# Kernels whose shared memory depends on the layer: launches of each on memory that is not there. First layers of ResNet and VGG and
# others that take other instantiations, at 224 pixels; heatmaps of 14 to 225 pixels, ranked by d = 0.9 (152 values) and 0.9995.
RECORDED = {
    "zb": """
  struct { int c_in, kernel, stride; } const layers[] = {{3, 7, 2}, {3, 3, 1}, {2, 7, 2}, {4, 7, 2}, {3, 4, 2}, {3, 5, 1}};
  for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
    for (const auto& like : layers) {
      for (bool last : {false, true}) {
        const int pad = like.kernel / 2, out = (224 + 2 * pad - like.kernel) / like.stride + 1;
        ZbLayer l{64, 1, like.c_in, 64, 224, 224, out, out, like.kernel, like.stride, pad, 1, like.c_in, last};
        ZbParams p{}; p.dtype = dtype; p.layer = l; launch_zb(p, nullptr);
        ZbBackwardParams b{}; b.dtype = dtype; b.layer = l; b.W_bar = &b;
        b.slabs = zb_slabs(l, dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2); launch_zb_backward(b, nullptr);
      }
    }
  }""",
    "heatmap_loss": """
  for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
    for (int size : {14, 15, 224, 225}) {
      for (int k : {152, 31879}) {
        HeatmapLossParams p{}; p.dtype = dtype; p.shape = {64, 1, 3, 1, size * size, false, true};
        p.ranking.k = k < size * size ? k : 152; launch_heatmap_loss(p, nullptr);
        HeatmapLossBackwardParams b{}; b.dtype = dtype; b.shape = p.shape; b.ranking = p.ranking;
        launch_heatmap_loss_backward(b, nullptr);
      }
    }
  }""",
}
RECORDER = """
#include <cstdio>
#include "cuda_emu.h"
namespace emu {
cudaError_t run_grid(dim3 grid, dim3 block, size_t shared, void (*)(const void*), const void* call, size_t) {
  std::printf("%p %u %u\\n", *static_cast<void* const*>(call), block.x * block.y * block.z, static_cast<unsigned>(shared));
  return cudaSuccess;
}
}  // namespace emu
#include "kernels/OP.cu"
using namespace fisnet;
int main() {LAUNCHES
}
"""


def recorded_shared(op: str) -> dict[str, int]:
    """``{kernel: bytes of dynamic shared memory}``, the most of the launches above: g++ compiles launchers that launch nothing."""
    with tempfile.TemporaryDirectory() as folder:
        file, program = Path(folder) / "record.cpp", Path(folder) / "record"
        file.write_text(RECORDER.replace("OP", op).replace("LAUNCHES", RECORDED[op]))
        tools.run(
            "g++", "-std=c++17", "-O0", "-w", "-DFISNET_EMU", *(f"-D__CUDA_NO_{one}__" for one in WITHOUT),
            "-no-pie", "-Wl,--unresolved-symbols=ignore-all", f"-I{tools.CSRC}", f"-I{common.ROOT / 'emu'}",
            f"-I{tools.toolkit() / 'include'}", file, "-o", program,
        )  # fmt: skip
        symbols = [line.split() for line in tools.run("nm", program).splitlines()]
        mangled = {int(symbol[0], 16): symbol[2] for symbol in symbols if len(symbol) == 3}
        lines = [line.split() for line in tools.run(program).splitlines()]
    names = tools.demangle([mangled[int(address, 16)] for address, _, _ in lines])
    found: dict[str, int] = {}
    for name, (_, _, shared) in zip(names, lines):
        found[name] = max(found.get(name, 0), int(shared))
    return found


def dynamic_shared(kernels: Sequence[str]) -> dict[str, int]:
    """Bytes of dynamic shared memory of those kernels for which sources tell; none where they cannot be compiled."""
    if tools.lacks("nvcc", "g++") or shutil.which("nm") is None:
        return {}
    products = [kernel for kernel in kernels if tools.linear(kernel)]
    found = {kernel: shared for kernel, (_, shared) in zip(products, from_sources(products))} if products else {}
    for op in RECORDED:
        if any(kernel.startswith(f"{op.partition('_')[0]}_") for kernel in kernels):
            found |= recorded_shared(op)
    return found


# ---- a line of the table ---------------------------------------------------------------------------------------------------------


def widths(code: Iterable[Instruction], names: Sequence[str]) -> dict[int, int]:
    """``{bytes: instructions}`` of the named loads or stores, the widest first."""
    return dict(sorted(Counter(one.size for one in code if one.name in names).items(), reverse=True))


def divisions(code: Iterable[Instruction]) -> int:
    """Integer divisions: each makes a reciprocal of a rounded-up integer (I2F.RP, I2F.U32.RP, I2F.U64.RP)."""
    return sum(one.name == "I2F" and one.opcode.endswith(".RP") for one in code)


def describe(function: Function, arch: str = "sm_90", dynamic: int | None = None, gpu: Gpu = H100) -> dict[str, Any]:
    """The row of one kernel. ``dynamic``: bytes of dynamic shared memory, None where they are not known (0 is counted)."""
    flow = Flow(function.code)
    code = flow.instructions(flow.reached)
    path, is_loop = hot_path(flow, bool(ONE_PASS.match(function.kernel)))
    blocks, limit = resident(arch, function.registers, function.threads, function.shared + (dynamic or 0))
    warps = blocks * -(-function.threads // 32)
    loaded, loads = under_way(flow)
    product = tools.linear(function.kernel)
    copied = 0.0  # a thread's bytes of cp.async under way
    if product and product.wide:
        a_stage = 64 * ((0 if product.prologue else product.operands * product.rows) + product.columns)
        copied = (product.stages - 1) * a_stage / function.threads
    in_flight = blocks * function.threads * max(loaded, copied)
    moved = sum(one.size for one in path if one.name in MOVES)
    special = sum(one.name in SPECIAL for one in path)
    clocks = gpu.clocks(moved) if moved else 0.0
    return {
        "kernel": function.kernel,
        "dtype": next((DTYPES[t] for t in DTYPES if re.search(rf"<{t}\b", function.kernel)), "-"),
        "registers": function.registers,
        "threads": function.threads,
        "static_shared": function.shared,
        "dynamic_shared": dynamic,
        "stack": function.stack,
        "local": sum(one.name in LOCAL for one in function.code),
        "blocks": blocks,
        "warps": warps,
        "occupancy": warps * 32 / ARCHS[arch].threads,
        "limited_by": limit,
        "loads": widths(code, LOADS),
        "stores": widths(code, STORES),
        "copies": widths(code, COPIES),
        "bytes_under_way": loaded,
        "loads_under_way": loads,
        "copied_under_way": copied,
        "under_way_a_multiprocessor": in_flight,
        "of_littles_law": in_flight / gpu.wanted,
        "instructions": len(code),
        "is_loop": is_loop,
        "path_instructions": len(path),
        "path_bytes": moved,
        "path_bytes_by_16": _moved(path, 16),
        "instructions_per_16_bytes": 16 * len(path) / moved if moved else None,
        "issue_share": len(path) / gpu.issued / clocks if clocks else None,
        "special_share": special / gpu.special / clocks if clocks else None,
        "path_special": special,
        "path_divisions": divisions(path),
        "path_calls": sum(one.name == "CALL" for one in path),
        "path_barriers": sum(one.name == "BAR" for one in path),
        "path_atomics": sum(one.name in ATOMICS for one in path),
        "divisions": divisions(code),
        "calls": sum(one.name == "CALL" for one in function.code),
        "barriers": sum(one.name == "BAR" for one in code),
        "atomics": sum(one.name in ATOMICS for one in code),
        "generic": sum(one.name in ("LD", "ST", "ATOM") for one in code),
        "hmma": sum(one.name == "HMMA" for one in code),
        "ldsm": sum(one.name == "LDSM" for one in code),
    }


def table(library: Path, arch: str = "sm_90", kernel: str = "") -> list[dict[str, Any]]:
    """A row for every kernel whose name the regular expression finds."""
    functions = [one for one in read(library, arch) if re.search(kernel, one.kernel)]
    dynamic = dynamic_shared([one.kernel for one in functions])
    rows = []
    for one in functions:
        known = dynamic.get(one.kernel, None if one.kernel.startswith(("linear_", "zb_", "heatmap_")) else 0)
        rows.append(describe(one, arch, known))
    return rows


# ---- the files -------------------------------------------------------------------------------------------------------------------


def _counts(found: dict[int, int]) -> str:
    return " ".join(f"{size}:{count}" for size, count in found.items()) or "-"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _slow(row: dict[str, Any]) -> str:
    named = {"path_divisions": "div", "path_calls": "call", "path_barriers": "bar", "path_atomics": "atom"}
    found = [f"{row[key]} {name}" for key, name in named.items() if row[key]]
    return ", ".join(found) or "-"


def _name(row: dict[str, Any]) -> str:
    """Without what its column tells."""
    return re.sub(r"Tile<(\d+), (\d+), \d+, \d+>", r"\1x\2", row["kernel"]).replace("__nv_bfloat16", "bf16").replace("__half", "half")


COLUMNS: common.Columns = {
    "kernel": lambda row: f"`{_name(row)}`",
    "registers": lambda row: str(row["registers"]),
    "threads": lambda row: str(row["threads"]),
    "shared, B": lambda row: f"{row['static_shared']} + {'?' if row['dynamic_shared'] is None else row['dynamic_shared']}",
    "blocks": lambda row: str(row["blocks"]),
    "occupancy": lambda row: _share(row["occupancy"]),
    "limited by": lambda row: row["limited_by"],
    "loads": lambda row: _counts(row["loads"]),
    "cp.async": lambda row: _counts(row["copies"]),
    "stores": lambda row: _counts(row["stores"]),
    "under way, B a thread": lambda row: f"{max(row['bytes_under_way'], row['copied_under_way']):.0f}",
    "of Little's law": lambda row: _share(row["of_littles_law"]),
    "path": lambda row: f"{row['path_instructions']}{', loop' if row['is_loop'] else ''}",
    "per 16 B": lambda row: "-" if row["instructions_per_16_bytes"] is None else f"{row['instructions_per_16_bytes']:.0f}",
    "issue": lambda row: _share(row["issue_share"]),
    "special": lambda row: _share(row["special_share"]),
    "HMMA": lambda row: str(row["hmma"] or "-"),
    "on the path": _slow,
}

LEGEND = f"""
How to read it. `loads`, `stores`, `cp.async`: instructions by the bytes that each moves for a thread (`16:4 2:8`: four of 16 bytes,
eight of 2). `blocks`: that share a multiprocessor, with registers handed out in 256 to a warp and 1 KB of shared memory lost to
each block. `shared`: static + dynamic, the most that first layers and heatmaps of 224 pixels ask for. `under way`: what a thread
has asked for before it uses any of it, at most; times resident threads, over the {H100.wanted / 1e3:.1f} KB a multiprocessor
that Little's law asks for ({H100.bandwidth / 1e12} TB/s x {H100.latency * 1e9:.0f} ns / {H100.processors}; the latency is an
assumption).
`path`: instructions on the way through the kernel, or once through its main loop, that moves most; `per 16 B`: of them for 16 bytes
moved; `issue`: the share of memory's time ({H100.copied / 1e12:.1f} TB/s) that issuing them takes; `special`: the same for
reciprocals and conversions, 16 lanes a clock. Above 100 % instructions are the limit, not memory. Loops on the path count once:
kernels that work in shared memory (sorting, z^B, products) are not judged by it. `on the path`: integer divisions, calls (slow ways
of rare values), barriers, atomics.
"""


def markdown(rows: Sequence[dict[str, Any]], head: str) -> str:
    """The tables, a dtype each."""
    lines = ["# Machine code of the kernels", "", head, LEGEND]
    order = ["bf16", "fp32", "fp16", "fp64", "-"]
    for dtype in sorted({row["dtype"] for row in rows}, key=order.index):
        lines += [f"## {dtype if dtype != '-' else 'of no dtype'}", ""]
        lines += common.markdown_table(COLUMNS, [row for row in rows if row["dtype"] == dtype])
        lines.append("")
    return "\n".join(lines)


def write(rows: Sequence[dict[str, Any]], text: str, options: argparse.Namespace) -> list[Path]:
    """Both files. In the JSON file a kernel is a line, in the order of ``columns``; numbers have four digits."""
    content = {
        "name": "machine_code",
        "measured": False,
        "commit": common.commit(),
        "settings": {"arch": options.arch, "kernel": options.kernel, "assumed": H100._asdict() | {"wanted": H100.wanted}},
        "columns": list(rows[0]) if rows else [],
    }
    short = [[float(f"{value:.4g}") if isinstance(value, float) else value for value in row.values()] for row in rows]
    lines = ",\n  ".join(json.dumps(row) for row in short)
    make_folder(options.out)
    return [
        write_text(
            common.result_path("machine_code", options.arch, options.out, ".json"),
            f'{json.dumps(content, indent=1)[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n',
        ),
        write_text(common.result_path("machine_code", options.arch, options.out, ".md"), text),
    ]


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--library", type=Path, default=LIBRARY, help="a built extension")
    p.add_argument("--arch", choices=ARCHS, default="sm_90")
    p.add_argument("--kernel", default="", help="a regular expression that kernels' names must match")
    p.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the result files (benchmarks/results)")
    p.add_argument("--print", action="store_true", help="write the table to the terminal, and no files")
    options = p.parse_args(argv)
    if missing := tools.lacks("cuobjdump", "nvdisasm"):
        print(missing, file=sys.stderr)
        return 2
    if not options.library.exists():
        print(f"--library {options.library}: there is no such file; make build makes {LIBRARY.name}", file=sys.stderr)
        return 2
    rows = table(options.library, options.arch, options.kernel)
    head = (
        f"Read from machine code for {options.arch} at commit {common.commit()}, not measured: no GPU was used. {len(rows)} kernels; "
        "made by `python -m benchmarks.machine_code`."
    )
    text = markdown(rows, head)
    if options.print:
        print(text)
        return 0
    for path in write(rows, text, options):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
