"""What the compiler and the machine code say of the kernels, without a GPU.

The gates: nvcc compiles every source for sm_80, sm_90 and PTX with warnings as errors, in under four minutes on two cores; ptxas
spills nothing; kernels move 16 bytes a thread at a time and never touch local memory; products of linear maps are made by tensor
cores out of shared memory that cp.async fills. Each gate is shown something that it must refuse.
"""

import re

import pytest
from package import tools

pytestmark = [
    pytest.mark.skipif(bool(tools.lacks("nvcc", "cmake", "ninja", "g++")), reason=tools.lacks("nvcc", "cmake", "ninja", "g++")),
    pytest.mark.slow,
]
needs_disassembler = pytest.mark.skipif(bool(tools.lacks("cuobjdump", "nvdisasm")), reason=tools.lacks("cuobjdump", "nvdisasm"))
ARCHS = ("sm_80", "sm_90")
MINUTES, CORES = 4, 2  # that a whole build may take


@pytest.fixture(scope="module")
def library():
    return tools.build()


@pytest.fixture(scope="module")
def code(library):
    return tools.machine_code(library)


def test_every_source_compiles_without_a_warning(library):
    """The build itself fails on a warning; every kernel file must have been part of it."""
    logs = tools.logs()
    assert set(logs) == {source.name for source in tools.sources()}
    assert not [line for text in logs.values() for line in text.splitlines() if "warning" in line.lower()]


def overdue(seconds):
    """What of a build takes too long: one file (nothing divides that), or all together."""
    limit = 60 * MINUTES
    found = [f"{name}: {taken:.0f} s, more than {limit} on its own: divide it" for name, taken in seconds.items() if taken > limit]
    if (total := sum(seconds.values())) > CORES * limit:
        longest = ", ".join(f"{name} {taken:.0f}" for name, taken in [*seconds.items()][:8])
        found.append(f"{total:.0f} s of one core in all, {CORES * limit} allowed; the longest are {longest}")
    return found


def test_the_build_takes_minutes(library):
    """Seconds of one core, which other work on the machine hardly changes."""
    seconds = tools.seconds()
    assert {f"kernels/{source.name}" for source in tools.sources()} < set(seconds), "bindings were compiled too"
    assert not overdue(seconds), "\n".join(overdue(seconds))


@needs_disassembler
def test_architectures(library):
    machine, ptx = tools.architectures(library)
    assert machine == set(ARCHS)
    assert ptx == {"sm_90"}, "PTX for what comes after it"


@pytest.mark.parametrize("source", [s.name for s in tools.sources()])
def test_no_spills(library, source):
    usage = tools.ptxas_report(tools.logs()[source])
    bad = [u for u in usage if not u.clean]
    assert not bad, f"spills or stack frames in {source}:\n{tools.table(bad)}\nall of it:\n{tools.table(usage)}"
    if "__global__" in (tools.CSRC / "kernels" / source).read_text():
        assert {u.arch for u in usage} == set(ARCHS)


@needs_disassembler
@pytest.mark.parametrize("arch", ARCHS)
def test_no_local_memory(code, arch):
    kernels = [c for c in code if c.arch == arch]
    assert kernels
    assert not {c.kernel: c.local for c in kernels if c.local}


def narrow(code, declared):
    """Kernels without 16-byte access that do not say why: ``kernel: what it lacks``."""
    families = {}
    for c in code:
        families.setdefault(tools.family(c.kernel), []).append(c)
    complaints = {}
    for name, members in families.items():
        base = re.match(r"\w+", name)[0]
        lacks = [] if any(c.loads_16 for c in members) or declared[base].may_lack("loads", name) else ["loads"]
        lacks += [] if any(c.stores_16 for c in members) or declared[base].may_lack("stores", name) else ["stores"]
        if lacks:
            complaints[name] = f"no 16-byte {' and '.join(lacks)} in any of {sorted(c.kernel for c in members)}"
    return complaints


@needs_disassembler
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_move_16_bytes(code, arch):
    """Of every kernel and dtype, the widest instantiation loads and stores 16 bytes a thread.

    A kernel whose nature forbids it says so above its declaration: ``// no 16-byte loads: the reason``, or ``stores``, or
    ``loads and stores``; with ``in double`` behind it, of the instantiations that serve gradcheck only.
    """
    complaints = narrow([c for c in code if c.arch == arch], tools.kernels_declared())
    assert not complaints, "\n".join(f"{k}: {v}" for k, v in complaints.items())


@needs_disassembler
@pytest.mark.parametrize("arch", ARCHS)
def test_products_are_made_by_tensor_cores(code, arch):
    """mma of the dtype's shape, operands by ldmatrix out of shared memory that cp.async fills, results in vectors of 16 bytes.

    As many of each as the main loop has, unrolled; Dual's second product doubles the mma, not the loads.
    """
    found = {c.kernel: (c, kernel) for c in code if c.arch == arch and (kernel := tools.linear(c.kernel))}
    assert {kernel.dtype for _, kernel in found.values()} == {"float", "double", "__half", "__nv_bfloat16"}
    assert {kernel.wide for _, kernel in found.values()} == {False, True}
    complaints = {name: lacks for name, (c, kernel) in found.items() if (lacks := tools.lacking(c, kernel))}
    assert not complaints, "\n".join(f"{name}: {'; '.join(lacks)}" for name, lacks in complaints.items())


def test_exemptions_have_reasons():
    for kernel in tools.kernels_declared().values():
        for reason in (kernel.no_loads, kernel.no_stores):
            assert not reason or len(reason.split()) >= 3, f"{kernel.file}: {kernel.name}: {reason!r} is no reason"


@needs_disassembler
def test_every_kernel_of_the_library_was_looked_at(code):
    """The kernels that sources declare are those in the machine code: neither list misses one."""
    assert {re.match(r"\w+", c.kernel)[0] for c in code} == set(tools.kernels_declared())


def test_every_kernel_is_in_the_build_information():
    """FISNET_KERNEL(...) names at least one instantiation of every kernel of a kernel file, small helpers (exempt above) aside."""
    for path in tools.sources():
        text = path.read_text()
        listed = set(re.findall(r"^\s*FISNET_KERNEL\(\(?(\w+)", text, re.MULTILINE))
        wanted = {d.name for d in tools.declared(path) if not (d.no_loads and d.no_stores)}
        if "launch_tile<" in text:  # instantiates the product of device/product.cuh
            wanted.add("linear_kernel")
        assert wanted <= listed, f"{path.name}: FISNET_KERNEL is missing for {sorted(wanted - listed)}"


def test_build_information_can_be_read():
    """Names of kernels become keys of JSON: short, on one line, each once, template arguments by the names that sources give them."""
    lists = [re.findall(r"^\s*FISNET_KERNEL\((.*)\);$", path.read_text(), re.MULTILINE) for path in tools.sources()]
    names = [name for one in lists for name in one]
    assert len(set(names)) == len(names)
    assert not [name for name in names if len(name) > 100 or '"' in name or "Tile<" in name or "Product<" in name]


# ---- the gates can refuse ------------------------------------------------------------------------------------------------

PLANTED = """
// no 16-byte stores: one value a block is all there is
__global__ void __launch_bounds__(256, 4) scalar_kernel(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x]; }

// a comment without an exemption
template <int W>
__global__ void wide_kernel(const float4* in, float4* out) { out[threadIdx.x] = in[threadIdx.x]; }
template __global__ void wide_kernel<4>(const float4*, float4*);

__global__ void local_kernel(const int* at, float4* in, float4* out) {
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[i] = in[i].x;
  for (int i = 0; i < 64; ++i) kept[at[i]] += in[i].y;
  float4 r = in[0];
  for (int i = 0; i < 64; ++i) r.x += kept[at[i + 64]];
  out[threadIdx.x] = r;
}

__global__ void __launch_bounds__(1024, 2) spilling_kernel(const float* in, float* out) {
  float x[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) x[i] = in[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) out[(i * 37 % 96) * 1024 + threadIdx.x] = x[i] * x[95 - i];
}
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    path = tmp_path_factory.mktemp("planted") / "planted.cu"
    path.write_text(PLANTED)
    log = tools.run(
        tools.toolkit() / "bin" / "nvcc", "-c", "-O3", "-arch=sm_90", "-Xptxas=-v", path, "-o", path.with_suffix(".o"), cwd=path.parent
    )
    return path, log


def test_a_planted_spill_is_refused(planted):
    report = {u.kernel: u for u in tools.ptxas_report(planted[1])}
    assert set(report) == {"scalar_kernel", "wide_kernel<4>", "local_kernel", "spilling_kernel"}
    assert {name for name, u in report.items() if not u.clean} == {"local_kernel", "spilling_kernel"}
    assert report["spilling_kernel"].spill_stores > 0
    assert report["local_kernel"].stack >= 256


@needs_disassembler
def test_planted_local_memory_and_narrow_access_are_refused(planted):
    code = tools.machine_code(planted[0].with_suffix(".o"))
    declared = {d.name: d for d in tools.declared(planted[0])}
    assert set(declared) == {"scalar_kernel", "wide_kernel", "local_kernel", "spilling_kernel"}
    assert {c.kernel for c in code if c.local} == {"local_kernel", "spilling_kernel"}
    assert declared["scalar_kernel"].no_stores == "one value a block is all there is"
    assert not any(d.no_loads for d in declared.values())
    complaints = narrow(code, declared)
    assert set(complaints) == {"scalar_kernel", "spilling_kernel"}
    assert complaints["scalar_kernel"].startswith("no 16-byte loads in any of"), "its stores are exempt"
    assert complaints["spilling_kernel"].startswith("no 16-byte loads and stores in any of")


PRODUCT = """
#include "device/numeric.cuh"
using namespace fisnet;
template <int, int, int, int> struct Tile {};
template <bool, int, int, bool> struct Product {};
// What an instantiation does, in place of an epilogue.
template <typename T> struct Right {
  static constexpr bool kMma = true, kShort = false, kLdmatrix = true, kTurned = true, kCopies = true, kVectors = true;
};
template <typename T> struct Arithmetic : Right<T> { static constexpr bool kMma = false; };
template <typename T> struct ShortMma : Right<T> { static constexpr bool kShort = true; };
template <typename T> struct SharedByElement : Right<T> { static constexpr bool kLdmatrix = false; };
template <typename T> struct NotTurned : Right<T> { static constexpr bool kTurned = false; };
template <typename T> struct CopiedByElement : Right<T> { static constexpr bool kCopies = false; };
template <typename T> struct StoredByElement : Right<T> { static constexpr bool kVectors = false; };

// One step of a warp's 16 x 32 of results: nothing sensible, but instruction by instruction as a product.
template <typename T, typename Tile, int kWide, typename Product, typename Does>
__global__ void linear_kernel(const T* in, uint4* out, int steps) {
  __shared__ __align__(128) T smem[4096];
  const int lane = threadIdx.x;
  float d[4][4] = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    for (int i = 0; i < 6; ++i) {
      if constexpr (Does::kCopies) cp_async16(smem + (i * 32 + lane) * 8, in + (step * 256 + i * 32 + lane) * 8, true);
      else smem[i * 32 + lane] = in[step * 256 + i * 32 + lane];
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[4], b[2][4];
      const auto fragment = [&](uint32_t (&r)[4], const T* from, bool turn) {
        if constexpr (!Does::kLdmatrix) {
          for (int i = 0; i < 4; ++i) r[i] = lds32(from + i * 64 + lane);
        } else if (turn) {
          ldmatrix_x4_trans(r, from + lane * 8);
        } else {
          ldmatrix_x4(r, from + lane * 8);
        }
      };
      fragment(a, smem + half * 64, false);
      for (int j = 0; j < 2; ++j) fragment(b[j], smem + 512 + j * 256 + half * 64, Does::kTurned);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t weights[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        if constexpr (!Does::kMma) {
          for (int e = 0; e < 4; ++e) d[j][e] += __uint_as_float(a[e]) * __uint_as_float(weights[e & 1]);
        } else if constexpr (Does::kShort) {
          mma_tf32(d[j], a, weights);
        } else {
          MmaK16<T>::run(d[j], a, weights);
        }
      }
    }
    __syncthreads();
  }
  for (int j = 0; j < 4; ++j) {
    if constexpr (Does::kVectors) store16(out + j * 32 + lane, d[j]);
    else for (int e = 0; e < 4; ++e) reinterpret_cast<volatile float*>(out)[(j * 32 + lane) * 5 + e] = d[j][e];
  }
}
#define PLANT(PRODUCTS, DOES) \\
  template __global__ void linear_kernel< \\
      __nv_bfloat16, Tile<16, 32, 1, 2>, 1, Product<true, 1, PRODUCTS, false>, DOES<__nv_bfloat16>>(const __nv_bfloat16*, uint4*, int)
PLANT(1, Right); PLANT(1, Arithmetic); PLANT(1, ShortMma); PLANT(1, SharedByElement); PLANT(1, NotTurned);
PLANT(1, CopiedByElement); PLANT(1, StoredByElement);
PLANT(2, Right);  // half of Dual is missing: as many mma as one product has
"""


@needs_disassembler
def test_planted_products_are_refused(tmp_path):
    path = tmp_path / "product.cu"
    path.write_text(PRODUCT)
    object_file = path.with_suffix(".o")
    nvcc = tools.toolkit() / "bin" / "nvcc"
    tools.run(nvcc, "-c", "-O3", "-std=c++17", "-arch=sm_90", "--expt-relaxed-constexpr", f"-I{tools.CSRC}", path, "-o", object_file)
    found = {}
    for c in tools.machine_code(object_file):
        kernel = tools.linear(c.kernel)
        found[kernel.epilogue, kernel.products] = " and ".join(tools.lacking(c, kernel))
    expected = {
        "Right": "",
        "Arithmetic": "HMMA.16816.F32.BF16: 0, at least 8 expected",
        "ShortMma": "HMMA.16816.F32.BF16: 0, at least 8 expected and HMMA.1688.F32.TF32 in place of HMMA.16816.F32.BF16",
        "SharedByElement": "LDSM: 0, at least 2 expected and LDSM transposed: 0, at least 4 expected",
        "NotTurned": "LDSM transposed: 0, at least 4 expected",
        "CopiedByElement": "LDGSTS of 128 bits: 0, at least 6 expected",
        "StoredByElement": "STG of 128 bits: 0, at least 1 expected",
    }
    assert found == {(name, 1): says for name, says in expected.items()} | {
        ("Right", 2): "HMMA.16816.F32.BF16: 8, at least 16 expected"
    }


def test_a_build_that_takes_too_long_is_refused():
    assert not overdue({"kernels/a.cu": 239.0, "kernels/b.cu": 240.0})
    (one,) = overdue({"kernels/a.cu": 241.0, "bind/a.cpp": 9.0})
    assert one.startswith("kernels/a.cu: 241 s")
    (total,) = overdue({f"kernels/{i}.cu": 81.0 for i in range(6)})
    assert total.startswith("486 s of one core in all, 480 allowed")


def test_a_planted_warning_is_refused(tmp_path):
    """With the options of CMakeLists.txt."""
    options = re.search(r'COMPILE_LANGUAGE:CUDA>:(-lineinfo[^>"]*)>', (tools.ROOT / "CMakeLists.txt").read_text())[1].split(";")
    path = tmp_path / "planted.cu"
    for body, refused in (("", False), ("int unused;", True)):
        path.write_text(f"__global__ void planted_kernel() {{ {body} }}\n")
        command = [tools.toolkit() / "bin" / "nvcc", "-c", *options, "-arch=sm_90", path, "-o", path.with_suffix(".o")]
        if refused:
            with pytest.raises(RuntimeError, match="never referenced"):
                tools.run(*command)
        else:
            tools.run(*command)


@pytest.mark.parametrize(
    ("kernel", "family"),
    [
        ("phi_scale_kernel<float, 4>", "phi_scale_kernel<float, #>"),
        ("k<__nv_bfloat16, 8, true>", "k<__nv_bfloat16, #, true>"),
        ("k<__half, 3, 2, false, (Kind)1>", "k<__half, #, #, false, #>"),
        ("plain_kernel", "plain_kernel"),
        (
            "linear_kernel<__half, Tile<128, 64, 4, 4>, 1, Product<false, 1, 2, false>, E<__half, 2>>",
            "linear_kernel<__half, Tile<#, #, #, #>, #, Product<false, 1, 2, false>, E<__half, #>>",
        ),
    ],
)
def test_family(kernel, family):
    assert tools.family(kernel) == family


def test_names_of_products():
    name = "linear_kernel<__half, Tile<128, 64, 4, 3>, 0, Product<false, 1, 2, true>, Act<__half, true>>"
    assert tools.linear(name) == ("__half", 128, 64, 4, 3, False, False, 1, 2, True, "Act<true>")
    assert (tools.linear(name).tile, tools.linear(name).warp_rows) == ("128x64", 64)
    assert tools.linear("phi_scale_kernel<float, 4>") is None
    (short,) = tools.demangle(
        ["_ZN6fisnet13linear_kernelI6__halfNS_4TileILi64ELi64ELi4ELi4EEELi1ENS_7ProductILb1ELi1ELi1ELb0EEENS_1EIS1_EEEEvi"]
    )
    assert short == "linear_kernel<__half, Tile<64, 64, 4, 4>, 1, Product<true, 1, 1, false>, E<__half>>"
