"""The products of csrc/device/product.cuh by themselves, in every direction and tile: exact, without bank conflicts, and tested well
enough to notice: each of the planted bugs below, a change of the source, must be found under every schedule.

Operands are small whole numbers, so that every right result is exact, whatever the order of sums.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import multiprocessing
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from emulator import BUILD, ROOT, SCHEDULES, numpy_module
from helpers import randn
from linear_cases import Layer, both, forward_by_matrix, laid_out, transposed_by_matrix, whole

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}
ELEMENTS = {"bf16": "__nv_bfloat16", "f16": "__half", "f32": "float", "f64": "double"}
DTYPE = {torch.bfloat16: torch.int16}  # what numpy knows instead
CONFLICTS = ("ldmatrix_conflicts", "smem_load_conflicts", "smem_store_conflicts", "cp_async_conflicts")


# ---- building and running ---------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One instantiation of the kernel and a layer to run it on."""

    layer: Layer
    product: str = "Transposed"
    dtype: str = "bf16"
    tile: str = "Tile64x64"
    wide: bool = True
    maps: int = 1
    random: bool = False  # operands that are no whole numbers: only errors of the emulator are looked for

    @property
    def transposed(self) -> bool:
        return self.product.startswith("Transposed")

    def code(self, name: str) -> str:
        return f"CASE({name}, {ELEMENTS[self.dtype]}, {self.tile}, {int(self.wide)}, {self.product})"


@functools.cache
def compiler() -> list[str]:
    """The command that compiles kernels for the emulator, up to its files; -O1, to be quick."""
    numpy_module("emulator_units")  # builds what is linked below
    known = subprocess.run(["ninja", "-C", str(BUILD), "-t", "compdb"], capture_output=True, text=True, check=True).stdout
    words = shlex.split(next(entry["command"] for entry in json.loads(known) if entry["file"].endswith("tests/emu/kernels/bugs.cu")))
    at = words.index("-MD")
    return [word for word in words[:at] if not word.endswith("csrc/device") and word != "-Werror"] + ["-O1", "-w"]


def compiled(folder: Path, cases: dict[str, Case], change: Callable[[str], str] | None = None) -> Path:
    """A library with a launcher for each of the cases; over a changed copy of product.cuh if there is a ``change``."""
    device = ROOT / "csrc" / "device"
    if change is not None:
        device = shutil.copytree(device, folder / "device")
        header = device / "product.cuh"
        header.write_text(change(header.read_text()))
    made = folder / "product.o"
    definition = "-DCASES=" + " ".join(case.code(name) for name, case in cases.items())
    source = Path(__file__).with_name("product.cu")
    subprocess.run([*compiler(), f"-I{device}", definition, "-o", made, "-c", source], check=True)
    core = BUILD / "emu/CMakeFiles/emulator_core.dir"
    objects = [made for made in core.glob("*.o") if (ROOT / "emu" / made.stem).exists()]  # not those of files that are gone
    objects.append(BUILD / "emu/CMakeFiles/emulator_units.dir/bind_numpy.cpp.o")
    library = folder / "emulator_units.so"
    subprocess.run(["g++", "-shared", "-o", library, made, *objects], check=True)
    return library


def loaded(library: Path) -> ModuleType:
    # a name of its own: pybind11 keeps modules by name; what follows the dot names the library's entry
    spec = importlib.util.spec_from_file_location(f"{library.parent.name}.emulator_units", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def operands(case: Case) -> dict[str, torch.Tensor]:
    layer, dtype = case.layer, DTYPES[case.dtype]
    number = torch.Tensor.clone if case.random else whole

    def a_map(seed: int, of_result: bool, maps: int = 1) -> torch.Tensor:
        made = layer.map_in(seed, maps) if of_result == case.transposed else layer.map_out(seed, maps)
        return laid_out(number(made), dtype, "cpu")

    channels = layer.c_in if case.transposed else layer.c_out
    return {
        "A": a_map(1, False, case.maps),
        "A_plus": a_map(2, False, case.maps),
        "W": laid_out(number(layer.weight()), dtype, "cpu"),
        "sign": torch.arange(channels).remainder(3) - 1,
        "pre_scale": number(randn(layer.c_in, seed=4)),
        "pre_shift": number(randn(layer.c_in, seed=5)),
        "beside": a_map(3, True),
        "per_sample": torch.arange(layer.n).to(dtype),
    }


def expected(case: Case, t: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Both products with what is added to them, and the sums of the last: by the explicit matrix, in float64."""
    layer, dtype = case.layer, DTYPES[case.dtype]
    apply = transposed_by_matrix if case.transposed else forward_by_matrix
    W = t["W"].double()
    columns = (-1, *[1] * (t["A"].dim() - 2)) if layer.kernel else (-1,)
    A = t["A"].double()
    if case.product == "ForwardPrologue":
        A = (A * t["pre_scale"].view(columns) + t["pre_shift"].view(columns)).relu()
    first = last = apply(layer, A, W)
    if case.product == "ForwardDual":
        last = apply(layer, A, (W * t["sign"].view(-1, *[1] * (W.dim() - 1))).clamp(min=0))
    elif case.product.endswith("Pair"):
        last = apply(layer, t["A_plus"], W.clamp(min=0))
    axis = 1 if layer.kernel else -1
    first_there = first + t["beside"].double().repeat_interleave(case.maps, 0)
    last_there = last + t["per_sample"].double().repeat_interleave(case.maps).view(-1, *[1] * (last.dim() - 1))
    return first_there.to(dtype), last_there.to(dtype), last.movedim(axis, -1).flatten(0, -2).sum(0)


def as_numpy(t: torch.Tensor) -> np.ndarray:
    t = t.permute(0, 2, 3, 1) if t.dim() == 4 else t
    return t.contiguous().view(DTYPE.get(t.dtype, t.dtype)).numpy()


def run(module: ModuleType, name: str, case: Case, t: dict[str, torch.Tensor], schedule: tuple) -> tuple[torch.Tensor, ...]:
    """Results filled with NaN first: ``first, last, sums`` (None for a transposed product)."""
    layer, dtype = case.layer, DTYPES[case.dtype]
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    n = layer.n * case.maps
    result, channels = (layer.size, layer.c_in) if case.transposed else (layer.out_size, layer.c_out)
    size, out_size = (layer.size, layer.out_size) if layer.kernel else ((1, 1), (1, 1))
    kernel = both(layer.kernel) if layer.kernel else (1, 1)
    tile_rows = int(re.search(r"(\d+)x", case.tile)[1])
    first, last = (torch.full((n, *result, channels), torch.nan, dtype=dtype) for _ in range(2))
    sums = torch.full((-(-n * int(np.prod(result)) // tile_rows), channels), torch.nan, dtype=accumulated)
    order, seed, async_random = schedule
    module.config(order=order, seed=seed, async_random=async_random, races=True, bounds=True)
    fields = dict(zip(("stride", "pad", "dilation"), map(both, (layer.stride, layer.padding, layer.dilation))))
    values = {f"{k}_{axis}": v for k, pair in fields.items() for axis, v in zip("yx", pair)}
    results = {"first": as_flat(first), "last": as_flat(last), "sums": None if case.transposed else as_flat(sums)}
    t = t | {k: t[k].to(accumulated) for k in ("sign", "pre_scale", "pre_shift")}
    inputs = {k: None if k == "sign" and case.product != "ForwardDual" else as_numpy(v) for k, v in t.items()}
    sizes = {"height": size[0], "width": size[1], "out_height": out_size[0], "out_width": out_size[1]}
    sizes |= {"samples": n, "maps": case.maps, "c_in": layer.c_in, "c_out": layer.c_out, "kernel_y": kernel[0], "kernel_x": kernel[1]}
    module.launch(name, **sizes, **values, **inputs, **results)
    if layer.kernel:
        first, last = first.permute(0, 3, 1, 2), last.permute(0, 3, 1, 2)
    return first, last, None if case.transposed else sums.double().sum(0)


def as_flat(t: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous tensor."""
    return t.view(DTYPE.get(t.dtype, t.dtype)).numpy()


def verdict(module: ModuleType, name: str, case: Case, schedule: tuple) -> str:
    """What is wrong with a run; empty when nothing is."""
    t = operands(case)
    try:
        got = run(module, name, case, t, schedule)
    except RuntimeError as error:
        return str(error)
    if case.random:
        return ""
    wrong = [
        what
        for what, g, w in zip(("first product", "last product", "column sums"), got, expected(case, t))
        if g is not None and not torch.equal(g.double(), w.double())
    ]
    return f"wrong {' and '.join(wrong)}" if wrong else ""


# ---- right --------------------------------------------------------------------------------------------------------------------

CONV = Layer(1, 72, 24, (9, 9), 3, padding=1)  # two tiles of rows and of columns, steps for every stage
SMALL = Layer(2, 8, 8, (7, 6), 3, padding=1)  # several taps a step
EVEN = Layer(2, 72, 8, (10, 9), 3, stride=2, padding=1)
THIRD = Layer(1, 8, 40, (11, 10), (4, 5), stride=3, padding=(1, 2))
RAGGED = Layer(2, 5, 7, (9, 7), 3, padding=1)
CASES = {
    "conv": Case(CONV, maps=1),
    "maps": Case(Layer(2, 24, 40, (5, 6), 3, padding=1), maps=3),
    "small": Case(SMALL),
    "even": Case(EVEN),
    "third": Case(THIRD),
    "deep": Case(Layer(1, 8, 72, (5, 4), 3, padding=1)),
    "ragged": Case(RAGGED, wide=False),
    "tf32": Case(CONV, dtype="f32"),
    "tf32_random": Case(SMALL, dtype="f32", random=True),
    "tf32_ragged": Case(RAGGED, dtype="f32", wide=False),
    "f64": Case(RAGGED, dtype="f64", wide=False),
    "forward": Case(CONV, "Forward"),
    "forward_even": Case(Layer(2, 16, 72, (10, 9), 3, stride=2, padding=1), "Forward"),
    "forward_ragged": Case(Layer(2, 7, 5, (9, 7), 3, stride=(2, 1), padding=(0, 2)), "Forward", wide=False),
    "forward_tf32": Case(CONV, "Forward", "f32"),
    "forward_f64": Case(RAGGED, "Forward", "f64", wide=False),
    "large": Case(Layer(1, 136, 24, (13, 11), 1), tile="Tile128x128"),
    "prologue": Case(CONV, "ForwardPrologue"),
    "dual": Case(CONV, "ForwardDual", tile="PairTile64x64"),
    "dual_tf32": Case(CONV, "ForwardDual", "f32", "PairTile64x64"),
    "forward_pair": Case(CONV, "ForwardPair", tile="PairTile64x64"),
    "pair": Case(CONV, "TransposedPair", tile="PairTile64x64"),
    "pair_f64": Case(RAGGED, "TransposedPair", "f64", "PairTile64x64", wide=False),
}


@pytest.fixture(scope="module")
def right(tmp_path_factory) -> ModuleType:
    return loaded(compiled(tmp_path_factory.mktemp("right"), CASES))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_right(right, name, schedule):
    assert verdict(right, name, CASES[name], schedule) == ""


# ---- bank conflicts ------------------------------------------------------------------------------------------------------------

# 16-byte access: all directions and tiles, for elements of 2 and of 4 bytes (float16's kernel is bfloat16's but for the product)
WIDE = {
    f"{product}_{tile}_{dtype}": Case(CONV, product, dtype, tile)
    for products, tiles in (
        (("Transposed", "Forward"), ("Tile128x128", "Tile128x64", "Tile64x64")),
        (("TransposedPair", "ForwardPair"), ("PairTile128x64", "PairTile64x64")),
    )
    for product in products
    for tile in tiles
    for dtype in ("bf16", "f32")
} | {"Forward_f16": Case(CONV, "Forward", "f16"), "Transposed_f16": Case(CONV, "Transposed", "f16")}


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> ModuleType:
    return loaded(compiled(tmp_path_factory.mktemp("wide"), WIDE))


@pytest.mark.parametrize("name", WIDE)
def test_no_bank_conflicts(wide, name):
    """Everything is counted, and nothing conflicts."""
    wide.stats()
    assert verdict(wide, name, WIDE[name], SCHEDULES[0]) == ""
    seen = wide.stats()
    assert seen["ldmatrix"] > 0
    assert seen["cp_async"] > 0
    assert seen["cp_async_uncounted"] == 0
    assert (seen["smem_loads"] > 0) == (WIDE[name].transposed and WIDE[name].dtype == "f32")
    assert {what: seen[what] for what in CONFLICTS} == dict.fromkeys(CONFLICTS, 0)


# ---- planted bugs -------------------------------------------------------------------------------------------------------------


class Bug(NamedTuple):
    old: str  # stands once in product.cuh
    new: str
    case: str
    says: str  # a regular expression: what is found; a counter


RACE = "shared-memory race"
CONFLICT = "global-memory conflict"
OUTSIDE = f"out-of-bounds (read|write)|{RACE}"  # where a wild address lies may be the memory that stands for shared memory
NOT_SHARED = "out-of-bounds shared-memory|not in shared memory|not shared"
UNROUNDED = "not rounded to tf32"
WRONG = "^wrong "

BUGS = {
    # order
    "no barrier in the main loop": Bug(
        "cp_async_wait<Tile::kStages - 2>();\n      __syncthreads();", "cp_async_wait<Tile::kStages - 2>();\n      ", "conv", RACE
    ),
    "waits for a step too few": Bug("cp_async_wait<Tile::kStages - 2>", "cp_async_wait<Tile::kStages - 1>", "conv", RACE),
    "does not wait": Bug("cp_async_wait<Tile::kStages - 2>();", "", "conv", RACE),
    "no commit in the main loop": Bug("load_stage(writes, 0);\n      cp_async_commit();", "load_stage(writes, 0);", "conv", RACE),
    "writes the stage that is read": Bug("writes = kAheadStages;", "writes = 0;", "conv", RACE),
    "writes the stage that is read next": Bug("writes = kAheadStages;", "writes = 1;", "conv", RACE),
    "reads a stage ahead": Bug("int reads = 0,", "int reads = 1,", "conv", f"{RACE}|{WRONG}"),
    "stages overlap": Bug("kStage = Product::kOperands * kTileA + kTileB;", "kStage = kTileA;", "conv", RACE),
    "results before the last products": Bug("__syncthreads();  // the stages are free", "  // the stages are free", "even", RACE),
    "no syncwarp before results are read": Bug(
        "__syncwarp();\n    for (int first = 0; first < kVectors", "\n    for (int first = 0; first < kVectors", "conv", RACE
    ),
    "no syncwarp before the slab's next rows": Bug(
        "__syncwarp();\n  }\n\n  if constexpr (Epilogue::kSums)", "\n  }\n\n  if constexpr (Epilogue::kSums)", "conv", RACE
    ),
    "column sums over slabs in use": Bug("__syncthreads();  // the slabs are free", "", "forward", RACE),
    "column sums read too early": Bug(
        "__syncthreads();\n    for (int c = tid; c < Tile::kN", "\n    for (int c = tid; c < Tile::kN", "forward", RACE
    ),
    # edges
    "rows past the end are written": Bug("row >= 0 && column < plan.columns", "column < plan.columns", "conv", OUTSIDE),
    "columns past the end are written": Bug("row >= 0 && column < plan.columns", "row >= 0", "conv", f"{OUTSIDE}|{CONFLICT}|{WRONG}"),
    "rows past the end are read": Bug(
        "m < walk.rows ? row * walk.y.step + walk.y.first : kNowhere", "row * walk.y.step + walk.y.first", "conv", OUTSIDE
    ),
    "no padding above": Bug("y >= 0 && y < walk.y.size", "y < walk.y.size", "small", WRONG),
    "no padding below": Bug("y >= 0 && y < walk.y.size", "y >= 0", "conv", OUTSIDE),
    "no padding on the left": Bug("x >= 0 && x < walk.x.size", "x < walk.x.size", "conv", f"{OUTSIDE}|{WRONG}"),
    "no padding on the right": Bug("x >= 0 && x < walk.x.size", "x >= 0", "conv", f"{OUTSIDE}|{WRONG}"),
    "weights past the last tap": Bug("d.j < walk.y.taps ? l.c_out : 0", "l.c_out", "small", OUTSIDE),
    "weights past the last channel": Bug("depth_[i].c < end_[i] ? left_", "end_[i] > 0 ? left_", "ragged", OUTSIDE),
    "weights past the last column": Bug("depth_[i].c < end_[i] ? left_", "depth_[i].c < end_[i] ? kVec<T>", "ragged", OUTSIDE),
    "rows past the last channel": Bug("at_[i] >= 0 ? channels - d.c : 0", "at_[i] >= 0 ? kVec<T> : 0", "ragged", f"{OUTSIDE}|{WRONG}"),
    "forward weights past the last column": Bug("n < l.c_out ? n * l.kernel_y", "true ? n * l.kernel_y", "forward", OUTSIDE),
    "forward weights past the last tap": Bug("at_[i] >= 0 && d.j < walk.y.taps", "at_[i] >= 0", "forward", OUTSIDE),
    "too little shared memory": Bug("stages > epilogue ? stages : epilogue", "epilogue", "conv", NOT_SHARED),
    "room for one product only": Bug("stages > epilogue ? stages : epilogue", "stages / 2", "pair", NOT_SHARED),
    # places
    "the copy's swizzle is not ldmatrix's": Bug(
        "a_[half] = depth_chunk(wm + (lane & 15), 2 * half + (lane >> 4)) *",
        "a_[half] = ((wm + (lane & 15)) * kStepChunks + 2 * half + (lane >> 4)) *",
        "conv",
        f"{RACE}|{WRONG}",
    ),
    "taps are not flipped": Bug("-(every * dilation / stride)", "every * dilation / stride", "conv", WRONG),
    "remainders lie in one place": Bug("axis.out_first = remainder", "axis.out_first = 0", "even", f"{CONFLICT}|{WRONG}"),
    "remainders read the same outputs": Bug(
        "axis.first = axis.taps ? (remainder + pad", "axis.first = axis.taps ? (pad", "even", WRONG
    ),
    "remainders have the same taps": Bug("axis.tap_first = r;", "axis.tap_first = 0;", "even", WRONG),
    "a tap too many": Bug("(kernel - r + every - 1) / every", "(kernel - r) / every + 1", "third", f"{OUTSIDE}|{WRONG}"),
    "taps next to each other": Bug("walk.x.tap_first + d.i * walk.x.tap_every", "walk.x.tap_first + d.i", "even", WRONG),
    "one sub-problem for all": Bug("plan.walks[blockIdx.z]", "plan.walks[0]", "even", f"{CONFLICT}|{WRONG}"),
    "the first four sub-problems only": Bug("Walk(l, kTransposed, first + i,", "Walk(l, kTransposed, i,", "third", WRONG),
    "a step ends at most one tap": Bug("while (c >= channels)", "if (c >= channels)", "small", f"{OUTSIDE}|{WRONG}"),
    "taps of a row never end": Bug("if (++i == taps_x)", "if (++i > taps_x)", "conv", f"{OUTSIDE}|{WRONG}"),
    "rows stay at their tap": Bug(
        "if (depth.settle(channels, walk.x.taps)) rows.seek(walk, depth", "depth.settle(channels, walk.x.taps", "conv", WRONG
    ),
    "weights stay at their tap": Bug("weights.advance(p.map, walk, channels);", "", "conv", WRONG),
    "weights stay at their channels": Bug("at_[i] += kStep * l.kernel_y * l.kernel_x * l.c_in;", "", "deep", WRONG),
    "weights go past the end of a tap": Bug(
        "if (depth_[i].settle(channels, walk.x.taps)) seek(i, l, walk);",
        "depth_[i].settle(channels, walk.x.taps);",
        "deep",
        f"{OUTSIDE}|{WRONG}",
    ),
    "columns of the results unknown": Bug("if (tid == 0) *kept = n0;", "", "conv", f"{OUTSIDE}|{WRONG}|misaligned"),
    "the last step is left out": Bug(
        "steps = ceil_div(y.taps * x.taps * ceil_div(transposed ? l.c_out : l.c_in, chunk), kStepChunks)",
        "steps = y.taps * x.taps * ceil_div(transposed ? l.c_out : l.c_in, chunk) / kStepChunks",
        "conv",
        WRONG,
    ),
    "one half of a step twice": Bug("B + b_[j / 2] + 16 * half * kAcross * kVec<T>", "B + b_[j / 2]", "conv", WRONG),
    "wrong rows of transposed weights": Bug("(8 * half + 4 * i) * kAcross", "(8 * half + i) * kAcross", "tf32", WRONG),
    "stride forgotten in the forward": Bug("return {out, 1, 0, stride, -pad", "return {out, 1, 0, 1, -pad", "forward_even", WRONG),
    "dilation and stride in one": Bug(
        "transposed_axis(l.out_width, l.width, l.kernel_x, l.stride_x, l.pad_x",
        "transposed_axis(l.out_width, l.width, l.kernel_x, l.stride_x, l.pad_y",
        "third",
        f"{OUTSIDE}|{WRONG}",
    ),
    "maps do not share an activation": Bug(
        "sample / p.maps * plan.result_pixels", "sample * plan.result_pixels", "maps", f"{OUTSIDE}|{WRONG}"
    ),
    "maps do not share a sample": Bug(
        "rows_at[2 * Tile::kM + r] = sample / p.maps", "rows_at[2 * Tile::kM + r] = sample", "maps", f"{OUTSIDE}|{WRONG}"
    ),
    "column sums of half of the lanes": Bug("by < 32; by *= 2", "by < 16; by *= 2", "forward", WRONG),
    "column sums of the last row of warps": Bug("total += sums[w * Tile::kN + c]", "total = sums[w * Tile::kN + c]", "forward", WRONG),
    "column sums in one place": Bug("static_cast<int64_t>(tile_m) * plan.columns + ", "", "forward", f"{CONFLICT}|{WRONG}"),
    # numbers
    "operands not rounded to TF32": Bug("round_operands<T>(a[i]);", "", "tf32_random", UNROUNDED),
    "weights not rounded to TF32": Bug("round_operands<T>(b[j]);", ";", "tf32_random", UNROUNDED),
    "both operands are one": Bug(
        "rows.copy(to + kTileA, static_cast<const T*>(p.A_plus)", "rows.copy(to, static_cast<const T*>(p.A_plus)", "pair", RACE
    ),
    "A+ is A": Bug("static_cast<const T*>(p.A_plus), plan", "static_cast<const T*>(p.A), plan", "pair", WRONG),
    "W+ is W": Bug("positive<T>(b[j][i], signs.flip[j], signs.keep[j])", "b[j][i]", "dual", WRONG),
    "W+ is W in TF32": Bug("positive<T>(b[j][i], signs.flip[j], signs.keep[j])", "b[j][i]", "dual_tf32", WRONG),
    "W+ of the first register": Bug("positive<T>(b[j][i], signs", "positive<T>(b[j][0], signs", "dual", WRONG),
    "W+ without its sign": Bug("positive<T>(b[j][i], signs.flip[j],", "positive<T>(b[j][i], 0u,", "dual", WRONG),
    "W+ of channels without a sign": Bug(
        "positive<T>(b[j][i], signs.flip[j], signs.keep[j])", "positive<T>(b[j][i], signs.flip[j], ~0u)", "dual", WRONG
    ),
    "signs in one half of a register": Bug("(sizeof(T) == 2 ? 0x80008000u :", "(sizeof(T) == 2 ? 0x00008000u :", "dual", WRONG),
    "signs of other columns": Bug(
        "n + 8 * j + (lane >> 2);\n      const Acc<T> value", "n + 8 * j + (lane & 3); const Acc<T> value", "dual", WRONG
    ),
    "prologue of the first channels": Bug("c_ = d.c;", "c_ = 0;", "prologue", WRONG),
    "prologue put into a stage that is read": Bug(
        "if (more) settle_stage(writes, 0);", "if (more) settle_stage(reads, 0);", "prologue", RACE
    ),
    "prologue puts nothing": Bug("if (more) settle_stage(writes, 0);", "", "prologue", WRONG),
    "prologue of the first steps in one place": Bug("load_stage(stage, stage);", "load_stage(stage, 0);", "prologue", WRONG),
    "prologue leaves the first steps out": Bug("if (stage < steps) settle_stage(stage, stage);", ";", "prologue", WRONG),
}
# right numbers, slowly: what must be counted
SLOW = {
    "rows without a swizzle": Bug(
        "row * kStepChunks + (chunk ^ (row >> 1 & 3))", "row * kStepChunks + chunk", "conv", "ldmatrix_conflicts"
    ),
    "weights without a swizzle": Bug(
        "row * chunks_a_row + (sizeof(T) == 4 ? chunk ^ ((row & 3) << 1) : chunk ^ (row & 7))",
        "row * chunks_a_row + chunk",
        "conv",
        "ldmatrix_conflicts",
    ),
    "4-byte weights without a swizzle": Bug(
        "row * chunks_a_row + (sizeof(T) == 4 ? chunk ^ ((row & 3) << 1) : chunk ^ (row & 7))",
        "row * chunks_a_row + chunk",
        "tf32",
        "smem_load_conflicts",
    ),
}


def planted(folder: Path, bug: Bug) -> list[tuple[str, dict[str, int]]]:
    """What is wrong with the changed kernel, and what the emulator counted, schedule by schedule."""

    def change(text: str) -> str:
        assert text.count(bug.old) == 1, f"{text.count(bug.old)} places for this bug in product.cuh: {bug.old}"
        return text.replace(bug.old, bug.new)

    library = compiled(folder, {bug.case: CASES[bug.case]}, change)
    # in a process of its own: an emulator keeps the stacks of its threads for good, and there are many bugs
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(verdicts, (library, bug.case))


def verdicts(library: Path, case: str) -> list[tuple[str, dict[str, int]]]:
    module = loaded(library)
    return [(verdict(module, case, CASES[case], schedule), module.stats()) for schedule in SCHEDULES]


@pytest.mark.parametrize("name", BUGS)
def test_bug_is_found(tmp_path, name):
    """Under every schedule."""
    bug = BUGS[name]
    for schedule, (found, _) in zip(SCHEDULES, planted(tmp_path, bug)):
        assert re.search(bug.says, found), f"{schedule}: {found or 'nothing found'}"


@pytest.mark.parametrize("name", SLOW)
def test_bank_conflict_is_counted(tmp_path, name):
    for found, seen in planted(tmp_path, SLOW[name]):
        assert found == ""
        assert seen[SLOW[name].says] > 0
