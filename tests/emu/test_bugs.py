"""Planted bugs: under every schedule the emulator must find each of them, and must raise nothing for the kernel beside it that
lacks the bug."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
from emulator import MARK, SCHEDULES, numpy_module, symbolize

SOURCE = Path(__file__).parent / "kernels" / "bugs.cu"
RACE = "shared-memory race: "
CONFLICT = "global-memory conflict: "
PAST = "bytes past the end of"


class Bug(NamedTuple):
    says: str  # a regular expression
    threads: int = 64
    x: int = 64  # how many random float32
    y: int = 64  # how many of `dtype`
    dtype: type = np.float32
    settings: Mapping[str, Any] = MappingProxyType({})


BUGS = {
    "missing_barrier": Bug(f"{RACE}(read .* after a write|write .* after a read)"),
    "write_after_read": Bug(f"{RACE}(write .* after a read|read .* after a write)"),
    "write_after_write": Bug(f"{RACE}write .* after a write"),
    "warp_race": Bug(f"{RACE}(read .* after a write|write .* after a read)"),
    "shuffle_is_no_barrier": Bug(RACE),
    "half_syncwarp": Bug(RACE),
    "hidden_reader": Bug(f"{RACE}(write .* after a read|read .* after a write)"),
    "atomic_against_plain": Bug(f"{RACE}(read .* after an atomic|atomic .* after a read)", dtype=np.int32),
    "tree_without_barrier": Bug(RACE, y=1),
    "weak_wait": Bug(f"{RACE}read .* after a cp.async in flight", x=256, settings={"shared": 2048}),
    "wait_without_barrier": Bug(f"{RACE}(read|write) .* after a (write|read|cp.async in flight)", x=256, settings={"shared": 1024}),
    "early_fetch": Bug(RACE, x=256, settings={"shared": 1024}),
    "word_race": Bug(f"{RACE}(read .* after a write|write .* after a read)"),
    "vector_race": Bug(f"{RACE}(read .* after a write|write .* after a read)", settings={"shared": 1024}),
    "vectors_to_one_place": Bug(f"{RACE}write .* after a write", settings={"shared": 1024}),
    "word_of_a_copy": Bug(f"{RACE}read .* after a cp.async in flight", x=256, settings={"shared": 1024}),
    "word_without_a_lane": Bug("lds32 needs all 32 lanes: lane 5 of warp 1 was not there"),
    "vector_without_a_lane": Bug("lds128 needs all 32 lanes: lane 5 of warp 1 was not there", settings={"shared": 1024}),
    "store_without_a_lane": Bug("sts128 needs all 32 lanes: lane 5 of warp 1 was not there", settings={"shared": 1024}),
    "word_beside_a_vector": Bug("divergent warp: (lds32 against lds128|lds128 against lds32) of lane", settings={"shared": 1024}),
    "word_of_global_memory": Bug("lds32 at an address that is not in shared memory"),
    "word_misaligned": Bug("misaligned read of 4 bytes at an address that is a multiple of 2"),
    "word_past_the_end": Bug("out-of-bounds shared-memory read of 4 bytes"),
    "read_past_the_end": Bug(rf"out-of-bounds read of 4 bytes .*, 4 {PAST} 'x' \(256 bytes\)"),
    "write_past_the_end": Bug(rf"out-of-bounds write of 4 bytes .* {PAST} 'y' \(160 bytes\)", x=40, y=40, settings={"n": 40}),
    "vector_past_the_end": Bug(f"out-of-bounds read of 16 bytes .*, 4 {PAST} 'x'", 32, 127, 127, settings={"n": 127}),
    "clear_past_the_end": Bug(f"out-of-bounds write of 4 bytes .*, 4 {PAST} 'y'", 1, settings={"n": 64}),
    # the nearer of two buffers is named, wherever numpy put them
    "struct_past_the_end": Bug(rf"out-of-bounds read of 256 bytes .*, (256 {PAST} 'x'|\d+ bytes before 'y')", 1),
    "copy_past_the_end": Bug(f"out-of-bounds read of 256 bytes .*, 4 {PAST} 'x'", 1, settings={"n": 256}),
    "shared_past_the_end": Bug("out-of-bounds shared-memory write of 4 bytes", settings={"shared": 256}),
    "array_past_the_end": Bug("out-of-bounds shared-memory write of 4 bytes"),
    "global_store_to_shared": Bug("store to global memory at an address in shared memory"),
    "shared_store_to_global": Bug("store to shared memory at an address elsewhere", y=256),
    "write_to_input": Bug(r"write of byte \d+ of 'x' .*, which is read-only"),
    "misaligned_vector": Bug("misaligned read of 16 bytes at an address that is a multiple of 4", 8, 33, 32, settings={"n": 1}),
    "local_of_another_thread": Bug("read of another thread's local variable", 32, y=32),
    "overlapping_blocks": Bug(f"{CONFLICT}write .* after a write by block", y=128, settings={"grid": 2}),
    "overlapping_bytes": Bug(f"{CONFLICT}write of byte 6 of 'y' .* after a write by block", 7, 1, 14, np.uint8, {"grid": 2}),
    "overlapping_words": Bug(f"{CONFLICT}write of byte (4|8) of 'y' .* after a write by block", 64, 192, 6, np.uint32, {"grid": 3}),
    "read_of_another_block": Bug(f"{CONFLICT}(read|write) .* after a (write|read) by block", y=128, settings={"grid": 2}),
    "global_without_barrier": Bug(f"{CONFLICT}(read .* after a write|write .* after a read) by thread", y=128),
    "count_read_too_early": Bug(f"{CONFLICT}(read .* an atomic|atomic .* a read) by block", 64, 1, 2, np.uint32, {"grid": 3}),
    "read_of_unwritten": Bug("read of byte .* of 'y' .*, which nothing has written"),
    "divergent_barrier": Bug(r"divergent __syncthreads at .*bugs.cu:\d+, while others wait at .*bugs.cu:\d+"),
    "deadlock": Bug(r"deadlock: \d+ threads never got past:\n  thread \(\d+,0,0\)( and \d+ more)?: __sync"),
    "shuffle_from_inactive": Bug("shuffle: lane .* reads lane 20, which takes no part"),
    "shuffle_from_exited": Bug("shuffle: lane .* reads lane 20, which takes no part"),
    "lane_outside_of_mask": Bug("vote: the calling lane is not in its mask"),
    "divergent_warp": Bug("divergent warp collective: (vote against shuffle|shuffle against vote)"),
    "unrounded_tf32": Bug("not rounded to tf32", 32, y=32),
    "matrix_row_misaligned": Bug("misaligned read of 16 bytes", 32, y=32, dtype=np.uint32, settings={"shared": 1024}),
}
SILENT = {  # no error: NaN where a number should be
    "uninitialised_shared": Bug("", settings={"shared": 256}),
    "unwritten_output": Bug(""),
}
FROM_ZERO = {"count_read_too_early", "read_of_another_block", "global_without_barrier"}  # not from NaN


def arrays(name, bug):
    x = np.random.default_rng(0).standard_normal(bug.x).astype(np.float32)
    return {"x": x, "y": np.zeros(bug.y, bug.dtype), "threads": bug.threads, "keep": name in FROM_ZERO, **bug.settings}


def culprits(name):
    """The lines of `bugs.cu` that are marked as what the emulator must name."""
    return {i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if line.endswith(f"// culprit: {name}")}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", BUGS)
def test_bug_is_found_and_named(unit, name, schedule):
    with pytest.raises(RuntimeError) as found:
        unit(f"{name}/bug", schedule=schedule, **arrays(name, BUGS[name]))
    message = str(found.value)
    assert message.startswith(f"{MARK} block (")
    assert re.search(BUGS[name].says, message), message
    if marked := culprits(name):
        assert {int(line) for line in re.findall(r"bugs\.cu:(\d+)", symbolize(message))} == marked, symbolize(message)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", [*BUGS, *SILENT])
def test_right_kernel_raises_nothing(unit, name, schedule):
    bug = {**BUGS, **SILENT}[name]
    y = unit(f"{name}/right", schedule=schedule, **arrays(name, bug))
    if bug.dtype == np.float32 and name not in ("write_past_the_end",):
        assert np.isfinite(y).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", SILENT)
def test_bug_leaves_nan(unit, name, schedule):
    assert np.isnan(unit(f"{name}/bug", schedule=schedule, **arrays(name, SILENT[name]))).sum() > 0


def test_every_planted_bug_is_tested():
    planted = {name.removesuffix("/bug") for name in numpy_module("emulator_units").launchers() if name.endswith("/bug")}
    assert planted == {*BUGS, *SILENT}


def test_without_checks_bugs_pass_unseen(unit):
    """What finds a race is the check, not luck with the schedule."""
    name = "half_syncwarp"
    unit(f"{name}/bug", races=False, bounds=False, **arrays(name, BUGS[name]))


def test_emulator_goes_on_after_an_error(unit):
    for _ in range(3):
        with pytest.raises(RuntimeError, match="deadlock"):
            unit("deadlock/bug", **arrays("deadlock", BUGS["deadlock"]))
        assert (unit("deadlock/right", **arrays("deadlock", BUGS["deadlock"])) == 1).all()
