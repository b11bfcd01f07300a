"""`benchmarks/machine_code.py`: what it reads off instructions, against hand counts; and what the built library must keep to."""

import argparse
import functools
import json
import re

import pytest
from package import tools

from benchmarks import machine_code as m
from benchmarks.machine_code import Flow, Function, Instruction

needs_disassembler = pytest.mark.skipif(bool(tools.lacks("cuobjdump", "nvdisasm")), reason=tools.lacks("cuobjdump", "nvdisasm"))
needs_library = pytest.mark.skipif(not m.LIBRARY.exists(), reason="the extension is not built")


def code(text):
    """Instructions, one a line: ``[@P0] OPCODE operands``; ``label:`` before one, ``=label`` for its address."""
    lines, labels = [], {}
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.endswith(":"):
            labels[line[:-1]] = len(lines)
        else:
            lines.append(line)
    found = []
    for line in lines:
        line = re.sub(r"=(\w+)", lambda name: hex(16 * labels[name[1]]), line)
        predicate, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
        opcode, _, operands = rest.partition(" ")
        found.append(Instruction(opcode, operands, predicate))
    return found


# Two vectors of 16 bytes are asked for before the first is used; the tail takes one element at a time.
COPY = code("""
    S2R R0,SR_TID.X
    @P0 BRA =tail
    LDG.E.128 R4,desc[UR4][R2.64]
    LDG.E.128 R8,desc[UR4][R2.64+0x1000]
    FADD R4,R4,1
    FADD R8,R8,1
    STG.E.128 desc[UR4][R12.64],R4
    STG.E.128 desc[UR4][R12.64+0x1000],R8
    EXIT
    tail:
    LDG.E.U16 R5,desc[UR4][R2.64]
    STG.E.U16 desc[UR4][R12.64],R5
    ISETP.GE.AND P0,PT,R0,R1,PT
    @!P0 BRA =tail
    EXIT
""")

# A loop over rows with a loop over maps in it, which asks for the next 16 bytes before it uses those of the round before.
NESTED = code("""
    MOV R0,0x1
    rows:
    LDG.E R1,desc[UR4][R2.64]
    LDG.E.128 R4,desc[UR4][R2.64]
    maps:
    FADD R12,R4,R1
    LDG.E.128 R4,desc[UR4][R2.64+0x10]
    @P1 BRA =rare
    back:
    STG.E.128 desc[UR4][R14.64],R12
    ISETP.NE.AND P0,PT,R0,RZ,PT
    @P0 BRA =maps
    @P2 BRA =rows
    EXIT
    rare:
    MUFU.RCP R12,R12
    CALL.REL.NOINC =slow
    BRA =back
    slow:
    FMUL R12,R12,R12
    RET.REL.NODEC R20
""")


class TestInstructions:
    @pytest.mark.parametrize(
        ("opcode", "size"),
        [
            ("LDG.E.128.CONSTANT", 16),
            ("LDG.E.64", 8),
            ("LDG.E", 4),
            ("LDG.E.U16", 2),
            ("STG.E.U8", 1),
            ("LDGSTS.E.BYPASS.128.ZFILL", 16),
        ],
    )
    def test_bytes(self, opcode, size):
        assert Instruction(opcode).size == size

    def test_targets(self):
        assert Instruction("BRA", "0x120").target == 18
        assert Instruction("BRA", "P2,0x40", "@P0").target == 4
        assert Instruction("CALL.REL.NOINC", "0x1000").target == 256
        assert Instruction("BSSY", "B0,0x40").target is None, "says where ways join, and goes nowhere"
        assert Instruction("FADD", "R1,R2,0x40").target is None

    def test_registers(self):
        assert Instruction("LDG.E", "R4,desc[UR6][R2.64+0x10]").registers == [4, 2], "uniform ones are others"

    def test_divisions(self):
        assert m.divisions(code("I2F.RP R1,R2\nI2F.U32.RP R1,R2\nI2F.U64.RP R1,R2\nI2F R1,R2\nI2FP.F32.S32 R1,R2\nMUFU.RCP R1,R1")) == 3


class TestFlow:
    def test_blocks_and_loops_of_a_copy(self):
        flow = Flow(COPY)
        assert flow.starts == [0, 2, 9, 13]
        assert flow.follows == [[1, 2], [], [3, 2], []]
        assert flow.loops == [frozenset({2})]

    def test_code_that_lies_apart_is_no_loop(self):
        """The rare way jumps back to an earlier address, but not to a head that leads to it."""
        flow = Flow(NESTED)
        heads = {min(loop) for loop in flow.loops}
        assert {flow.starts[head] for head in heads} == {1, 3}
        rows, maps = sorted(flow.loops, key=len, reverse=True)
        assert maps < rows
        assert any(one.name == "CALL" for one in flow.instructions(maps))

    def test_what_is_never_reached_does_not_count(self):
        flow = Flow(code("EXIT\nself:\nBRA =self\nNOP"))
        assert flow.loops == []
        assert [one.name for one in flow.instructions(flow.reached)] == ["EXIT"]


class TestUnderWay:
    def test_independent_loads_add_up(self):
        assert m.under_way(Flow(COPY)) == (32, 2)

    def test_a_use_ends_it(self):
        one_by_one = code("LDG.E.128 R4,[R2.64]\nFADD R0,R7,1\nLDG.E.128 R8,[R2.64]\nFADD R0,R8,1\nEXIT")
        assert m.under_way(Flow(one_by_one)) == (16, 1), "R7 is the last of the first load's four registers"

    def test_an_overwritten_register_ends_it(self):
        assert m.under_way(Flow(code("LDG.E.128 R4,[R2.64]\nLDG.E.64 R6,[R2.64]\nEXIT"))) == (16, 1)

    def test_a_load_of_the_round_before_counts(self):
        """The scalar, and the vector for the next round: the vector before was used."""
        assert m.under_way(Flow(NESTED)) == (20, 2)


class TestPath:
    def test_through_the_kernel(self):
        path, is_loop = m.hot_path(Flow(COPY), one_pass=True)
        assert not is_loop
        assert path == list(COPY[:9])

    def test_through_the_innermost_loop_that_moves_most(self):
        path, is_loop = m.hot_path(Flow(NESTED), one_pass=False)
        assert is_loop
        assert [one.name for one in path] == ["FADD", "LDG", "BRA", "MUFU", "CALL", "BRA", "STG", "ISETP", "BRA"], (
            "the longer way counts"
        )

    def test_a_loop_of_narrow_access_is_not_the_main_one(self):
        path, is_loop = m.hot_path(Flow(COPY), one_pass=False)
        assert not is_loop, "the only loop moves 2 bytes a time, the kernel 16"
        assert path == list(COPY[:9])


class TestGpu:
    def test_littles_law(self):
        """3.35 TB/s x 700 ns = 2.345 MB under way on the whole GPU."""
        assert m.H100.wanted == pytest.approx(2.345e6 / 132)

    def test_clocks_of_an_access(self):
        """A warp's 512 bytes at 3.0 TB/s / 132 = 22.7 GB/s: 22.5 ns, 39.5 clocks at 1.755 GHz."""
        assert m.H100.clocks(16) == pytest.approx(39.5, abs=0.1)
        assert m.H100.clocks(32) == pytest.approx(2 * m.H100.clocks(16))


class TestRow:
    def test_by_hand(self):
        """72 registers: 2,304 a warp, 28 warps of 65,536, so 3 blocks of 8 warps: 24 of 64. 32 bytes of 768 threads: 24.6 KB."""
        row = m.describe(Function("phi_scale_kernel<float, 4, 2, false, false>", 72, 0, 0, 256, COPY), dynamic=0)
        assert (row["blocks"], row["warps"], row["occupancy"], row["limited_by"]) == (3, 24, 0.375, "registers")
        assert row["loads"] == {16: 2, 2: 1}
        assert row["stores"] == {16: 2, 2: 1}
        assert row["under_way_a_multiprocessor"] == 3 * 256 * 32
        assert row["of_littles_law"] == pytest.approx(24576 / 17765, rel=1e-3)
        assert (row["path_instructions"], row["path_bytes"], row["instructions_per_16_bytes"]) == (9, 64, 2.25)
        assert row["issue_share"] == pytest.approx(9 / 4 / (4 * 39.53), rel=1e-3)
        assert row["dtype"] == "fp32"

    @pytest.mark.parametrize(
        ("registers", "threads", "shared", "blocks", "limit"),
        [
            (64, 256, 0, 4, "registers"),  # 2,048 a warp, 32 warps
            (65, 256, 0, 3, "registers"),  # 2,304 a warp: the next 256
            (32, 256, 0, 8, "registers and threads"),
            (32, 64, 0, 32, "registers and threads and blocks"),
            (32, 256, 56 * 1024, 4, "shared memory"),  # 228 / (56 + 1)
            (255, 256, 0, 1, "registers"),
        ],
    )
    def test_occupancy(self, registers, threads, shared, blocks, limit):
        row = m.describe(Function("k", registers, 0, 0, threads, COPY), dynamic=shared)
        assert (row["blocks"], row["limited_by"]) == (blocks, limit)

    def test_copies_of_products(self):
        """Three steps of four under way: 64 bytes for each of 128 + 64 rows, 128 threads."""
        kernel = "linear_kernel<float, Tile<128, 64, 4, 4>, 1, Product<false, 1, 1, false>, ActEpilogue<float>>"
        row = m.describe(Function(kernel, 128, 0, 0, 128, COPY), dynamic=49152)
        assert row["copied_under_way"] == 3 * 64 * 192 / 128


class TestParsers:
    def test_usage(self):
        text = " Function _Z1aPf:\n  REG:32 STACK:16 SHARED:3072 LOCAL:0\n Function _Z1b:\n  REG:8 STACK:0 SHARED:0 LOCAL:0\n"
        assert m.parse_usage(text, "sm_80") == {"_Z1aPf": (32, 3072, 16), "_Z1b": (8, 0, 0)}
        assert m.parse_usage(text, "sm_90") == {"_Z1aPf": (32, 2048, 16), "_Z1b": (8, 0, 0)}, (
            "the system's kilobyte is not the kernel's"
        )

    def test_threads(self):
        text = (
            ".nv.info\n\tAttribute:\tEIATTR_REGCOUNT\n"
            ".nv.info._Z1a\n\tAttribute:\tEIATTR_MAX_THREADS\n\tFormat:\tEIFMT_SVAL\n\tValue:\t0x20 0x8 0x1 \n"
            ".nv.info._Z1b\n\tAttribute:\tEIATTR_CBANK_PARAM_SIZE\n"
        )
        assert m.parse_threads(text) == {"_Z1a": 256, "_Z1b": 1024}

    def test_code(self):
        instructions = [{"opcode": "EXIT", "predicate": "@P0"}, {"opcode": "LDG.E", "operands": "R1,[R2.64]"}]
        text = json.dumps([{"SM": {}}, [{"function-name": "_Z1a", "sass-instructions": instructions}]])
        assert m.parse_code(text) == {"_Z1a": [Instruction("EXIT", "", "@P0"), Instruction("LDG.E", "R1,[R2.64]")]}


def test_the_table_says_what_was_read():
    row = m.describe(Function("phi_scale_kernel<__nv_bfloat16, 8, 2, false, false>", 72, 0, 0, 256, COPY), dynamic=0)
    text = m.markdown([row], "head")
    assert "| `phi_scale_kernel<bf16, 8, 2, false, false>` | 72 " in text
    assert "## bf16" in text
    assert "16:2 2:1" in text


def test_the_files_hold_the_rows(tmp_path):
    rows = [m.describe(Function("phi_scale_kernel<float, 4, 2, false, false>", 72, 0, 0, 256, COPY), dynamic=0)]
    paths = m.write(rows, "text", argparse.Namespace(out=tmp_path / "new", arch="sm_90", kernel=""))
    assert [path.name for path in paths] == ["machine_code-sm-90.json", "machine_code-sm-90.md"]
    content = json.loads(paths[0].read_text())
    assert content["measured"] is False
    (row,) = content["rows"]
    assert dict(zip(content["columns"], row))["of_littles_law"] == pytest.approx(1.383)
    assert paths[1].read_text() == "text"


@needs_disassembler
def test_errors_say_what_to_do(tmp_path, capsys):
    assert m.main(["--library", str(tmp_path / "none.so"), "--print"]) == 2
    assert "there is no such file; make build" in capsys.readouterr().err


# ---- the library ---------------------------------------------------------------------------------------------------------------------

# Kernels that memory bounds, by the file that holds them, and the warps that a multiprocessor has room for at least. In float64,
# which verifies, there may be fewer.
BANDWIDTH = {
    r"phi_scale_kernel|phi_scale_backward_kernel|dual_phi_|ratio_|plus_affine_kernel|max_pool_kernel|max_pool_scatter": 24,
    r"phi_scale_bn_backward_kernel|plus_affine_backward|max_pool_gather|bn_backward_|bn_moments|bn_apply_kernel": 16,
}
FILES = "phi_scale|dual_phi|ratio|plus_affine|max_pool|bn_act"


def spilled(functions):
    """Kernels with a stack frame: spills, or arrays that are indexed at run time."""
    return {one.kernel: one.stack for one in functions if one.stack}


def breaches(rows):
    """What is wrong with the wide instantiations of kernels that memory bounds: ``kernel: what``."""
    found = {}
    for row in rows:
        least = next((warps for pattern, warps in BANDWIDTH.items() if re.match(pattern, row["kernel"])), None)
        is_wide = re.search(r"<(float, 4|__nv_bfloat16, 8|__half, 8)\b|bn_apply_kernel<(float|__nv_bfloat16|__half)>", row["kernel"])
        if least is None or not is_wide or "finish" in row["kernel"]:
            continue
        says = []
        if row["warps"] < least:
            says.append(f"{row['warps']} warps fit, {least} at least")
        if row["path_bytes_by_16"] < 0.75 * row["path_bytes"]:  # the rest: masks, winners, per-channel values, epsilon
            says.append(f"{row['path_bytes_by_16']} of {row['path_bytes']} bytes are moved by 16")
        if row["of_littles_law"] < 1:
            says.append(f"{row['of_littles_law']:.0%} of what Little's law asks for is under way")
        if row["local"]:
            says.append("local memory")
        if says:
            found[row["kernel"]] = ", ".join(says)
    return found


def test_breaches_are_found():
    good = m.describe(Function("ratio_kernel<float, 4>", 64, 0, 0, 256, COPY), dynamic=0)
    assert not breaches([good])
    assert "12 warps" not in str(breaches([good]))
    assert (
        "16 warps fit"
        in breaches([m.describe(Function("ratio_kernel<float, 4>", 128, 0, 0, 256, COPY), dynamic=0)])["ratio_kernel<float, 4>"]
    )
    narrow = code(
        "LDG.E R4,[R2.64]\nLDG.E.128 R8,[R2.64]\nLDG.E R5,[R2.64]\nLDG.E R6,[R2.64]\nSTG.E [R2.64],R4\nSTG.E.128 [R2.64],R8\nEXIT"
    )
    assert (
        "32 of 48 bytes"
        in breaches([m.describe(Function("ratio_kernel<float, 4>", 64, 0, 0, 256, narrow), dynamic=0)])["ratio_kernel<float, 4>"]
    )
    waiting = code("LDG.E.128 R8,[R2.64]\nSTG.E.128 [R2.64],R8\nSTL [R1],R8\nEXIT")
    says = breaches([m.describe(Function("ratio_kernel<float, 4>", 80, 0, 0, 256, waiting), dynamic=0)])["ratio_kernel<float, 4>"]
    assert "69% of what" in says, "16 bytes of 768 threads"
    assert "local memory" in says
    assert spilled([Function("k", 8, 0, 16, 32, ())]) == {"k": 16}


@functools.cache
def built(files="", with_code=True):
    return m.read(m.LIBRARY, "sm_90", files, with_code)


@needs_disassembler
@needs_library
@pytest.mark.slow
class TestLibrary:
    def test_no_kernel_spills(self):
        functions = built(with_code=False)
        assert len(functions) > 300
        assert not spilled(functions)

    def test_every_kernel_says_how_many_threads_it_has(self):
        """Without __launch_bounds__ a kernel of more registers than 64 cannot be launched with 1,024 threads."""
        assert not {one.kernel for one in built(with_code=False) if one.threads == 1024}

    def test_kernels_that_memory_bounds(self):
        rows = [m.describe(one, dynamic=0) for one in built(FILES)]
        judged = [row["kernel"] for row in rows for pattern in BANDWIDTH if re.match(pattern, row["kernel"])]
        for pattern in BANDWIDTH:
            for name in pattern.split("|"):
                assert any(re.match(name, kernel) for kernel in judged), f"there is no {name}"
        complaints = breaches(rows)
        assert not complaints, "\n".join(f"{kernel}: {says}" for kernel, says in complaints.items())
