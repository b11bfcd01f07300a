"""What the compiler and the machine code say of the kernels, without a GPU.

The gates: nvcc compiles every source for sm_80, sm_90 and PTX with warnings as errors; ptxas spills nothing; kernels move 16
bytes a thread at a time and never touch local memory. Each gate is shown something that it must refuse.
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
        assert wanted <= listed, f"{path.name}: FISNET_KERNEL is missing for {sorted(wanted - listed)}"


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
    ],
)
def test_family(kernel, family):
    assert tools.family(kernel) == family
