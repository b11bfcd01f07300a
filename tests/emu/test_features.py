"""What the emulator offers to kernels, against plain formulas; every schedule with every check on."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from emulator import ROOT, SCHEDULES, numpy_module, symbolize

LANES = np.arange(32)
RNG = np.random.default_rng(0)
FLOATS = np.array([1e-3, 0.3, 1.0, 1.7, 2.5, 7.0, 31.4, 60.0])


@pytest.fixture(params=SCHEDULES, ids=str)
def schedule(request):
    return request.param


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)


def integers(n, low, high, dtype=np.int32):
    return np.random.default_rng(2).integers(low, high, n).astype(dtype)


@pytest.mark.parametrize(("name", "dtype"), [("float", "f4"), ("double", "f8"), ("int64", "i8"), ("uint32", "u4"), ("half", "f2")])
def test_shuffles(unit, schedule, name, dtype):
    x = (1000 * normal(32)).astype(np.float64 if dtype[0] == "f" else np.int64).astype(dtype)
    y = unit(f"shuffles_{name}", x, np.empty((6, 32), dtype), schedule=schedule)
    down, up, down8 = LANES + 7, LANES - 7, LANES + 2
    sources = [
        np.full(32, 5), LANES ^ 3, np.where(down < 32, down, LANES), np.where(up >= 0, up, LANES),
        LANES // 8 * 8 + 3, np.where(down8 // 8 == LANES // 8, down8, LANES),
    ]  # fmt: skip
    assert np.array_equal(y, x[np.array(sources)])


def test_votes(unit, schedule):
    x = np.where(LANES % 5 == 1, 1, -1).astype(np.int32)
    x[16:] = 1
    bits = (x > 0).astype(np.uint64) << LANES.astype(np.uint64)
    y = unit("votes", x, np.empty((5, 32), np.uint32), schedule=schedule)
    low, high = bits[:16].sum(), bits[16:].sum()
    assert (y[0] == low + high).all()
    assert (y[1] == 1).all()
    assert (y[2] == 0).all()
    assert (y[3] == np.where(LANES < 16, low, high)).all()
    assert (y[4] == (LANES >= 16)).all()


@pytest.mark.parametrize("n", [70, 96])
def test_counting_barriers(unit, schedule, n):
    x = integers(96, 0, 7)
    y = unit("counting_barriers", x, np.empty((96, 3), np.int32), threads=96, n=n, schedule=schedule)[:n]
    assert (y == [(x[:n] != 0).sum(), (x[:n] > 5).any(), (x[:n] < 5).all()]).all()


@pytest.mark.parametrize(("name", "dtype"), [("int", np.int32), ("uint", np.uint32), ("uint64", np.uint64)])
def test_atomics_in_global_memory(unit, schedule, name, dtype):
    x = integers(192, 1, 1000, dtype)
    start = np.array([0, 0, 500, 0, 1023, 0, 0], dtype)
    y = unit(f"global_atomics_{name}", x, start.copy(), threads=64, grid=3, keep=True, schedule=schedule)
    want = [192, x.max(), min(500, x.min()), np.bitwise_or.reduce(x), np.bitwise_and.reduce(x) & dtype(1023), 7, 9]
    assert np.array_equal(y, np.array(want, dtype))


def test_atomics_in_shared_memory(unit, schedule):
    x = integers(1000, 0, 16)
    y = unit("histogram", x, np.empty(16, np.int32), threads=128, n=1000, schedule=schedule)
    assert np.array_equal(y, np.bincount(x, minlength=16))


def test_bits(unit):
    x = np.array([0, 1, 2, 3, 0x80000000, 0x7F800000, 0xFFFFFFFF, 0x00F0, *integers(24, 0, 2**32, np.uint32)], np.uint32)
    y = unit("bit_tricks", x, np.empty((32, 10), np.int64))
    for row, value in zip(y, x):
        wide = int(value) << 20
        low, low_wide = [(v & -v).bit_length() for v in (int(value), wide)]
        want = [value.item().bit_count(), low, 32 - int(value).bit_length(), int(f"{value:032b}"[::-1], 2), wide.bit_count(), low_wide]
        want += [64 - wide.bit_length(), np.uint64(int(f"{wide:064b}"[::-1], 2)).astype(np.int64), value.astype(np.int32), wide]
        assert row.tolist() == [int(w) for w in want]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_functions(unit, dtype):
    x = FLOATS.astype(dtype)
    y = unit(f"functions_{'float' if dtype == np.float32 else 'double'}", x, np.empty((8, 8), dtype), threads=8)
    v = x.astype(np.float64)
    want = [v**-0.5, 2**v, np.log1p(v), v**1.5, np.clip(v, 0.5, 1), np.log2(v), v * v + 1, -np.sqrt(v)]
    assert np.allclose(y.T, want, rtol=4 * np.finfo(dtype).eps, atol=0)
    if dtype == np.float32:
        y = unit("float_functions", x, np.empty((8, 7), dtype), threads=8)
        assert np.allclose(y.T, [*want[:5], want[6], v * v], rtol=4 * np.finfo(dtype).eps, atol=0)


def test_min_and_max_are_those_of_cuda(unit):
    y = unit("min_and_max", np.array([np.nan], np.float32), np.empty(8), threads=1)
    assert y[:7].tolist() == [2, 2, 1.5, 1, 1, -4, 7]
    assert np.isnan(y[7])


def test_conversions_round_to_nearest(unit):
    x = np.concatenate([normal(29), np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11], np.float32)])  # ties in bf16, bf16 and fp16
    y = unit("conversions", x, np.empty((32, 4), np.float32))
    bits = x.view(np.uint32).astype(np.uint64)
    bf16 = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    tf32 = ((bits + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32)
    assert np.array_equal(y.T, [bf16, x.astype(np.float16).astype(np.float32), bf16, tf32])

    odd = np.array([0x7F800001, 0xFF801FFF, 0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF], np.uint32)  # NaN, infinities, the largest
    rounded = unit("conversions", odd.view(np.float32), np.empty((6, 4), np.float32), threads=6)[:, 3]
    assert np.array_equal(rounded, np.array([np.nan] * 3 + [np.inf, -np.inf, np.inf], np.float32), equal_nan=True)
    assert not (rounded.view(np.uint32) & 0x1FFF).any()


@pytest.mark.parametrize(
    ("grid", "block"), [((3, 2, 2), (8, 4, 2)), ((1, 1, 1), (1024, 1, 1)), ((2, 3, 1), (4, 16, 16)), ((1, 2, 5), (5, 1, 3))]
)
def test_indices_in_three_dimensions(unit, schedule, grid, block):
    count = np.prod(grid) * np.prod(block)
    y = unit("indices", None, np.empty(count, np.int32), threads=block, grid=grid, schedule=schedule)
    assert np.array_equal(y, np.arange(count))


def test_more_than_48_kb_of_dynamic_shared_memory(unit, schedule):
    n = 25 << 10
    x = normal(n)
    y = unit("reverse_in_shared", x, np.empty(n, np.float32), threads=1024, n=n, shared=4 * n, schedule=schedule)
    assert np.array_equal(y, x[::-1])


def test_shared_arrays_of_device_functions(unit, schedule):
    x = normal(64)
    y = unit("shared_in_functions", x, np.empty(64), threads=64, schedule=schedule)
    assert np.allclose(y, 3 * (x.astype(np.float64).sum() + 64), rtol=1e-12)
    assert np.ptp(y) == 0


def test_static_shared_memory_is_counted_by_kernel(unit):
    for name, value in (("large_static_1", 1), ("large_static_2", 2), ("large_static_1", 1)):
        assert (unit(name, None, np.empty(64, np.float32), threads=64) == value).all()
    with pytest.raises(RuntimeError, match="more than 48 KB"):
        unit("too_much_static", None, np.empty(64, np.float32), threads=64)


@pytest.mark.parametrize(
    ("error", "settings"),
    [
        (9, {"grid": 0}), (9, {"grid": (1, 65536, 1)}), (9, {"grid": (1, 1, 65536)}),
        (9, {"threads": 0}), (9, {"threads": 1025}), (9, {"threads": (32, 33)}), (9, {"threads": (1, 1, 65)}),
        (1, {"shared": (163 << 10) + 1}),
    ],
)  # fmt: skip
def test_launches_that_a_gpu_refuses(unit, error, settings):
    """cudaErrorInvalidConfiguration, and cudaErrorInvalidValue of the attribute for shared memory."""
    with pytest.raises(RuntimeError, match=f"did not launch, CUDA error {error}"):
        unit("indices", None, np.empty(1, np.int32), **settings)


def test_many_rounds_of_barriers(unit, schedule):
    module = numpy_module("emulator_units")
    module.stats()
    assert unit("many_rounds", None, np.empty(1, np.int32), threads=256, schedule=schedule)[0] == sum(range(20))
    assert module.stats()["barriers"] == 21


def test_schedules_differ_and_repeat(unit):
    """The same schedule gives the same order of threads; the orders are what they are called."""
    orders = {}
    for schedule in (*SCHEDULES, *SCHEDULES):
        y = unit("order_of_threads", None, np.zeros(193, np.uint32), threads=64, grid=3, keep=True, schedule=schedule)[1:]
        assert sorted(y) == list(range(192))
        orders.setdefault(schedule, []).append(y.tolist())
    assert all(first == second for first, second in orders.values())
    assert len({tuple(first) for first, _ in orders.values()}) == len(SCHEDULES)
    assert orders["in order", 1, False][0] == list(range(192))
    assert orders["reversed", 1, False][0] == list(range(191, -1, -1))


def bf16(x):
    return (x.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("name", ["bf16", "f16", "tf32"])
def test_tensor_core_products(unit, schedule, name):
    """Small integers, so that every product and sum is exact; half types go through cp.async and ldmatrix."""
    depth = 8 if name == "tf32" else 16
    a, b = RNG.integers(-8, 9, (16, depth)).astype(np.float32), RNG.integers(-8, 9, (depth, 8)).astype(np.float32)
    x = np.concatenate([a.ravel(), b.ravel()])
    x = {"bf16": bf16, "f16": lambda v: v.astype(np.float16), "tf32": lambda v: v}[name](x)
    y = unit(f"product_{name}", x, np.empty((16, 8), np.float32), n=8, shared=4096, schedule=schedule)
    assert np.array_equal(y, a @ b)


@pytest.mark.parametrize("name", ["bf16", "f16", "tf32"])
def test_several_products_at_once(unit, counts, schedule, name):
    """A main loop in small: ldmatrix, loads of 4 bytes and 2 x 3 products. Rows of 48 bytes: no conflicts."""
    depth = 8 if name == "tf32" else 16
    a, b = RNG.integers(-8, 9, (32, depth)).astype(np.float32), RNG.integers(-8, 9, (depth, 24)).astype(np.float32)
    x = np.concatenate([a.ravel(), b.T.ravel()])
    x = {"bf16": bf16, "f16": lambda v: v.astype(np.float16), "tf32": lambda v: v}[name](x)
    y = unit(f"tiles_{name}", x, np.empty((32, 24), np.float32), shared=8192, schedule=schedule)
    assert np.array_equal(y, a @ b)
    seen = counts()
    assert (seen["mma"], seen["ldmatrix"], seen["smem_loads"]) == (6, 2, 6)
    assert (seen["ldmatrix_conflicts"], seen["smem_load_conflicts"]) == (0, 0)


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_special_values_of_half_types(unit, name):
    """Subnormal numbers, infinity and NaN go into products as what they are."""
    x = np.zeros(384, np.uint16)
    one, infinity, nan = {"bf16": (0x3F80, 0x7F80, 0x7FC1), "f16": (0x3C00, 0x7C00, 0x7E01)}[name]
    x[[0, 16, 32, 48]] = 1, infinity, infinity | 0x8000, nan
    x[256] = one  # b[0, 0]
    y = unit(f"product_{name}", x, np.empty((16, 8), np.float32), n=8, shared=4096)[:4, 0]
    assert y[0] == {"bf16": np.float32(2.0**-133), "f16": np.float32(2.0**-24)}[name]
    assert y[1] == np.inf
    assert y[2] == -np.inf
    assert np.isnan(y[3])


@pytest.mark.parametrize(("padding", "conflicts"), [(0, 4), (8, 0)])
def test_bank_conflicts_are_counted(unit, padding, conflicts):
    """Rows of 16 halves: the 8 rows of a matrix start at every second 16-byte column, so two rows share each; 4 matrices."""
    module = numpy_module("emulator_units")
    module.stats()
    unit("product_f16", np.zeros(384, np.float16), np.empty((16, 8), np.float32), n=padding, shared=4096)
    stats = module.stats()
    assert stats["ldmatrix"] == 2
    assert stats["mma"] == 1
    assert stats["cp_async"] == 48
    assert stats["ldmatrix_conflicts"] == conflicts


QUARTER = LANES % 8
ROWS = LANES // 8
# Where a warp's lanes are, in words of 4 bytes, and how often the warp waits.
WORDS = {
    "one after another": (LANES, 0), "reversed": (31 - LANES, 0), "one word": (0 * LANES, 0),
    "two words of a bank": (LANES % 2 * 32, 1), "stride 2": (2 * LANES, 1), "stride 4": (4 * LANES, 3),
    "stride 8": (8 * LANES, 7), "stride 32": (32 * LANES, 31),
    "stride 33": (33 * LANES, 0), "stride 3": (3 * LANES, 0),
    # the second operand of a product: 8 columns, in each 4 pairs of 2-byte elements
    "columns 16 words apart": (LANES // 4 * 16 + LANES % 4, 3), "columns 20 words apart": (LANES // 4 * 20 + LANES % 4, 0),
    "columns 16 words apart, swizzled": (LANES // 4 * 16 + (LANES % 4 + 4 * (LANES // 8 % 4)) % 16, 0),
}  # fmt: skip
# The same in vectors of 16 bytes, of which the warp's four quarters are served one after another.
VECTORS = {
    "one after another": (LANES, 0), "one vector": (0 * LANES, 0), "rows of 8, one quarter each": (8 * QUARTER + ROWS, 4 * 7),
    "stride 2": (2 * LANES, 4), "stride 4": (4 * LANES, 4 * 3), "stride 5": (5 * LANES, 0),
    "swizzled": (8 * QUARTER + (ROWS ^ QUARTER), 0), "one quarter clashes": (np.where(ROWS == 2, 8 * QUARTER, LANES), 7),
    "two lanes clash": (np.where(LANES == 9, 16, LANES), 1), "quarters alike": (QUARTER, 0),
}  # fmt: skip


@pytest.fixture
def counts():
    """What has been counted since the test began."""
    module = numpy_module("emulator_units")
    module.stats()
    return module.stats


@pytest.mark.parametrize("pattern", WORDS)
def test_loads_of_4_bytes(unit, counts, schedule, pattern):
    words, conflicts = WORDS[pattern]
    y = unit("words_4", words.astype(np.int32), np.empty(32, np.uint32), n=1024, shared=4096 + 128, schedule=schedule)
    assert np.array_equal(y, words)
    assert {k: v for k, v in counts().items() if "smem" in k} == loads(1, conflicts)


@pytest.mark.parametrize("pattern", VECTORS)
def test_loads_of_16_bytes(unit, counts, schedule, pattern):
    vectors, conflicts = VECTORS[pattern]
    y = unit("words_16", vectors.astype(np.int32), np.empty((32, 4), np.uint32), n=256, shared=4096, schedule=schedule)
    assert np.array_equal(y, 4 * vectors[:, None] + np.arange(4))
    assert {k: v for k, v in counts().items() if "smem" in k} == loads(1, conflicts)


def loads(number, conflicts):
    return {"smem_loads": number, "smem_load_conflicts": conflicts, "smem_stores": 0, "smem_store_conflicts": 0}


@pytest.mark.parametrize("pattern", [name for name, (vectors, _) in VECTORS.items() if len(set(vectors)) == 32])
def test_stores_of_16_bytes(unit, counts, schedule, pattern):
    vectors, conflicts = VECTORS[pattern]
    y = unit("stores_16", vectors.astype(np.int32), np.empty((32, 4), np.uint32), shared=4096, schedule=schedule)
    assert np.array_equal(y, np.arange(128).reshape(32, 4))
    seen = counts()
    assert (seen["smem_stores"], seen["smem_store_conflicts"], seen["smem_loads"]) == (1, conflicts, 0)


def copied(counts):
    seen = counts()
    return tuple(seen[name] for name in ("cp_async", "cp_async_conflicts", "cp_async_uncounted"))


@pytest.mark.parametrize("pattern", [name for name, (vectors, _) in VECTORS.items() if len(set(vectors)) == 32])
def test_conflicts_of_asynchronous_copies(unit, counts, schedule, pattern):
    """The n-th copies of a warp's lanes are one access, whatever order the threads ran in; copies of zeros write too."""
    vectors, conflicts = VECTORS[pattern]
    warps = np.concatenate([vectors, vectors + 256, 512 + LANES])
    x = np.concatenate([warps, warps + 768, warps + 1536]).astype(np.int32)
    unit("copies", x, np.empty(96, np.int32), threads=96, n=3, shared=16 * 2304, schedule=schedule)
    assert copied(counts) == (288, 6 * conflicts, 0)


def test_copies_of_some_lanes(unit, counts, schedule):
    """Lanes that copy nothing between two commits take no part. Where lanes disagree, copies are not counted, and that is told."""

    def run(*copies):
        x = np.array(copies, np.int32)
        unit("copies", x, np.empty(32, np.int32), n=len(copies), shared=16 * 1024, schedule=schedule)
        return copied(counts)

    far = 8 * LANES
    assert run(np.where(LANES % 2, far, -1)) == (16, 4 * 3, 0)
    assert run(far, np.where(LANES < 8, far + 256, -1)) == (40, 5 * 7, 0)
    assert run(far, np.where(LANES < 3, far + 256, -1)) == (35, 3 * 7, 11)  # the first quarter is not counted
    assert run(far, far + 256, np.where(LANES < 3, far + 512, -1)) == (67, 8 * 7 + 2, 0)  # a group of their own


def test_symbolize_leaves_other_text_alone():
    assert symbolize("nothing to see [here+1] and [/no/such/file+0x12]") == "nothing to see [here+1] and [/no/such/file+0x12]"


@pytest.mark.parametrize("source", sorted(p.name for p in (Path(__file__).parent / "kernels").glob("*.cu")))
def test_nvcc_takes_these_kernels(source, tmp_path):
    """So they are CUDA, and what they prove holds for kernels that run on a GPU."""
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    command = ["nvcc", "-arch=sm_80", "-std=c++17", "--expt-relaxed-constexpr", "-Werror=all-warnings", f"-I{ROOT / 'csrc' / 'device'}"]
    command += ["-c", str(Path(__file__).parent / "kernels" / source), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
