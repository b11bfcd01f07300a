"""`make gpu` that is killed, and taken up again: what is finished is kept and not done again, and nothing else is mixed in."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from emulator import needs
from test_gpu_benchmarks import ROOT, driver, stub, written

from benchmarks import dispatch, gpu, gpu_report, gpu_resume, gpu_step, gpu_worker, kernels
from benchmarks.common import Report, Spread, Times, interleave
from benchmarks.gpu_step import Contestant
from benchmarks.kernel_cases import all_cases

MACHINE = {"slug": "stub", "commit": "none", "device": "stub", "torch": "2", "cuda": "13", "cores": 1, "date": "2026-01-01"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(*arguments, workers, machine)``: a whole dry run in this process, with stubs in tmp_path as its workers."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "committed")
    calls, right = [], gpu.Run.start

    def make(*arguments: str, workers=(), machine=None, only=("steps",)) -> gpu.Run:
        described = json.dumps({**MACHINE, "kernels": True, **(machine or {})})

        def start(self, name, command, *args, **kwargs):
            command = [sys.executable, "-c", f"print({described!r})"] if name == "environment" else command
            return right(self, name, command, *args, **kwargs)

        monkeypatch.setattr(gpu.Run, "start", start)
        monkeypatch.setattr(gpu, "workers", lambda options: list(workers))
        monkeypatch.setattr(gpu.Run, "report", gpu.Run.save)
        options = gpu.parse(["--dry-run", "--minutes", "5", "--out", str(tmp_path / "out"), "--only", *only, *arguments])
        folder = tmp_path / f"run{len(calls)}"
        folder.mkdir()
        found = gpu.Run(options, folder)
        calls.append(gpu._run(found))
        found.code = calls[-1]
        return found

    return make


def content(tmp_path: Path) -> dict:
    """Of the result file."""
    return json.loads(written(tmp_path / "out").read_text())


def step_worker(folder: Path, name: str, body: str = "") -> gpu.Worker:
    """A worker of one row, after ``body``; each run leaves a line in ran.txt."""
    body = body or f'save([{{"case": "{name}", "model": "stub"}}])'
    lines = ['print("READY", flush=True)', "sys.stdin.readline()", f'open("{folder}/ran.txt", "a").write("{name}\\n")', body]
    return gpu.Worker(name, "steps", stub(folder, f"stub_{name}", "\n".join(lines)), 5)


def ran(folder: Path) -> list[str]:
    """Which workers have run, since the last time."""
    path = folder / "ran.txt"
    found = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


class TestResume:
    def test_what_is_done_is_not_done_again_and_what_failed_is(self, run, tmp_path):
        good, bad = step_worker(tmp_path, "good"), step_worker(tmp_path, "bad", "sys.exit('out of luck')")
        assert run(workers=[good, bad]).code == 1
        assert ran(tmp_path) == ["good", "bad"]
        first = content(tmp_path)
        assert [f[0] for f in first["failures"]] == ["bad"]
        mended = step_worker(tmp_path, "bad")
        assert run("--resume", workers=[good, mended]).code == 0
        assert ran(tmp_path) == ["bad"]
        found = content(tmp_path)
        assert [row["case"] for row in found["steps"]] == ["good", "bad"]
        assert found["failures"] == []
        assert found["finished"]
        assert {stage["name"]: stage["status"] for stage in found["stages"]}["bad"] == "ok"
        assert len(found["runs"]) == 2
        assert run("--resume", workers=[good, mended]).code == 0
        assert ran(tmp_path) == []
        assert [row["case"] for row in content(tmp_path)["steps"]] == ["good", "bad"]

    def test_results_travel_to_an_empty_folder(self, run, tmp_path):
        """As on a lent machine: the results folder is empty at every run, earlier results lie in the repository."""
        good = step_worker(tmp_path, "good")
        run(workers=[good])
        (tmp_path / "out").rename(tmp_path / "committed")
        (tmp_path / "committed" / "classes-amd.json").write_text("{}")  # of another benchmark
        found = run("--resume", workers=[good, step_worker(tmp_path, "other")])
        assert ran(tmp_path) == ["good", "other"]
        assert [row["case"] for row in content(tmp_path)["steps"]] == ["good", "other"]
        assert found.earlier.why_not == ()

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"machine": {"device": "another GPU"}}, "device: stub there, another GPU here"),
            ({"machine": {"torch": "3"}}, "torch: 2 there, 3 here"),
            ({"machine": {"gpu": {"driver_version": "600"}}}, "driver_version: None there, 600 here"),
            ({"sources": "changed"}, "sources: "),
            ({"arguments": ["--batch", "32"]}, "batch: 64 there, 32 here"),
        ],
    )
    def test_nothing_else_is_mixed_in(self, run, tmp_path, monkeypatch, change, told):
        good = step_worker(tmp_path, "good")
        run(workers=[good])
        if "sources" in change:
            monkeypatch.setattr(gpu_resume.gpu_wheels, "of_everything", lambda: change["sources"])
        found = run("--resume", *change.get("arguments", ()), workers=[good], machine=change.get("machine"))
        assert ran(tmp_path) == ["good", "good"], "it ran again"
        (line,) = found.earlier.why_not
        assert "is not used, it differs in" in line
        assert told in line
        assert line in content(tmp_path)["notes"]
        assert len(content(tmp_path)["runs"]) == 1

    def test_without_resume_an_earlier_file_of_a_gpu_is_kept(self, run, tmp_path):
        found = run(workers=[step_worker(tmp_path, "good")])
        path = found.path(".json")
        found.put_aside()
        assert path.exists(), "results of dry runs are worth nothing"
        found.options.dry_run = False
        path.rename(found.path(".json"))
        found.path(".md").write_text("table")
        found.put_aside()
        assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".md"]
        assert not found.path(".json").exists()

    def test_a_worker_without_all_of_its_cases_is_not_done(self, run, tmp_path):
        short = """
found = dict(rows=[{"case": "a"}], bars=[], notes=[], missing=["b: the time was over"], wrong=False)
json.dump(found, open(part, "w"))
"""
        run(workers=[step_worker(tmp_path, "short", short)])
        assert content(tmp_path)["missing"] == [["short", "b: the time was over"]]
        whole = """
earlier = json.load(open(sys.argv[sys.argv.index("--earlier") + 1]))
assert [row["case"] for row in earlier] == ["a"], earlier
save([{"case": "b"}])
"""
        worker = step_worker(tmp_path, "short", whole)
        run("--resume", workers=[worker])
        assert [row["case"] for row in content(tmp_path)["steps"]] == ["a", "b"]
        assert content(tmp_path)["missing"] == []

    def test_what_was_not_run_again_keeps_its_failure(self, run, tmp_path):
        bad, good = step_worker(tmp_path, "bad", "sys.exit(3)"), step_worker(tmp_path, "good")
        run(workers=[bad])
        assert run("--resume", workers=[good]).code == 1
        assert [f[0] for f in content(tmp_path)["failures"]] == ["bad"]

    def test_the_dispatchers_choices_come_along(self, run, tmp_path):
        worker = step_worker(tmp_path, "good")
        found = run(workers=[worker])
        (found.folder / gpu.CHOICES).write_text('{"a": 1}')
        found.save()
        again = run("--resume", workers=[worker])
        assert (again.folder / gpu.CHOICES).read_text() == '{"a": 1}'

    def test_tests_that_passed_are_left_out(self, run, tmp_path):
        tests = tmp_path / "test_some.py"
        head = "import pytest\npytestmark = pytest.mark.gpu\n"
        log = f"def log(name):\n    open('{tmp_path}/ran.txt', 'a').write(name + '\\n')\n"
        body = "def test_good(): log('good')\ndef test_bad():\n    log('bad')\n    assert {}\n"
        body += "@pytest.mark.skip('no')\ndef test_no(): pass\n"
        tests.write_text(head + log + body.format("1 == 2"))
        first = run("--tests", str(tests), only=["tests"])
        assert ran(tmp_path) == ["good", "bad"]
        assert (first.tests["passed"], first.tests["failed"], first.tests["skipped"]) == (1, 1, 1)
        assert first.tests["why_skipped"] == ["no"]
        tests.write_text(head + log + body.format("1 == 1"))
        assert run("--tests", str(tests), "--resume", only=["tests"]).code == 0
        assert ran(tmp_path) == ["bad"]
        found = content(tmp_path)
        assert (found["tests"]["passed"], found["tests"]["failed"], found["tests"]["skipped"]) == (2, 0, 1)
        assert found["failures"] == []
        run("--tests", str(tests), "--resume", only=["tests"])
        assert ran(tmp_path) == []

    def test_a_file_that_is_no_result_is_told(self, tmp_path):
        (tmp_path / "some.json").write_text("[")
        found = gpu_resume.find([tmp_path / "some.json"], {})
        assert "is no result of make gpu" in found.why_not[0]
        with pytest.raises(SystemExit):
            gpu.parse(["--resume", str(tmp_path / "nothing.json")])

    def test_the_report_of_two_runs(self, run, tmp_path):
        run(workers=[step_worker(tmp_path, "bad", "sys.exit(3)")])
        run("--resume", workers=[step_worker(tmp_path, "good")])
        found = content(tmp_path)
        found["steps"] = []
        found["missing"] = [["good", "dual: the time was over"]]
        text = gpu_report.markdown(found)
        assert "Of 2 runs, with the same sources, GPU, versions and settings" in text
        assert "- bad: " in text
        assert "- good: dual: the time was over" in text


class TestMerging:
    def test_a_row_that_was_cut_off_does_not_replace_a_good_one(self):
        good, cut = {"case": "a", "ms": 1}, {"case": "a", "ms": 2, "partial": True}
        assert gpu_resume.rows("steps", [good], [cut]) == [good]
        assert gpu_resume.rows("steps", [cut], [good]) == [good]
        assert gpu_resume.rows("steps", [good], [{"case": "a", "ms": 3}]) == [{"case": "a", "ms": 3}]

    def test_rows_that_are_made_together_are_replaced_together(self):
        old = [{"kernel": "a"}, {"kernel": "b"}]
        assert gpu_resume.rows("profile", old, [{"kernel": "c"}]) == [{"kernel": "c"}]
        assert gpu_resume.rows("profile", old, []) == old

    def test_a_choice_that_was_slower_is_measured_again(self):
        row = {"model": "resnet50", "case": "dual", "op": "linear_act"}
        assert gpu_resume.is_good(row)
        assert not gpu_resume.is_good({**row, "slower": True})
        assert not gpu_resume.is_good({**row, "blacklisted": {"fused/64x64": "wrong"}})

    def test_of_a_test_the_last_outcome_counts(self):
        first = gpu_resume.counted("timeout", {"a": ("passed", ""), "b": ("failed", "no")})
        second = gpu_resume.counted("ok", {"b": ("passed", ""), "c": ("skipped", "why")})
        found = gpu_resume.tests(first, second)
        assert (found["status"], found["passed"], found["failed"], found["skipped"]) == ("ok", 2, 0, 1)


# ---- what workers leave out ----------------------------------------------------------------------------------


def turn(tmp_path: Path, rows: list[dict]) -> gpu_worker.Turn:
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(rows))
    options = kernels.arguments().parse_args(["--earlier", str(path)])
    return gpu_worker.Turn(options, Report("test", "", {}, {"device": "stub"}, {}))


class TestKnown:
    def test_only_rows_that_are_all_good(self, tmp_path):
        rows = [{"case": "a"}, {"case": "b"}, {"case": "b", "wrong": "nan"}, {"case": "c", "partial": True}]
        found = turn(tmp_path, rows)
        assert [name for name in "abcd" if found.known(case=name)] == ["a"]

    def test_kernels(self, tmp_path, monkeypatch):
        """Pairs of case and dtype, at the same sizes; the largest sizes' rows are none of the tiny ones'."""
        seen = []
        monkeypatch.setattr(kernels, "_checked", lambda options, report, case, dtype: seen.append((case.name, dtype)))
        arguments = ["--tiny", "--cases", "ratio", "--dtypes", "fp32", "bf16", "--compiler", "none"]
        options = kernels.arguments().parse_args(arguments)
        pairs = [(case.name, dtype) for case, dtype in kernels.selected(options)]
        case = next(case for case in all_cases() if case.name == "ratio")
        row = {"case": "ratio", "sizes": json.loads(json.dumps(vars(kernels.shrink(case).sizes)))}
        big = {"case": "ratio adjoint", "dtype": "fp32", "sizes": vars(case.sizes)}
        kernels._prepared(options, Report("", "", {}, {}, {}), turn(tmp_path, [{**row, "dtype": "fp32"}, big]))
        assert seen == [pair for pair in pairs if pair != ("ratio", "fp32")]

    def test_steps_keep_what_others_are_compared_with(self, tmp_path):
        options = gpu_step.arguments().parse_args(["--compiled", "2", "--batch", "2"])
        setup = gpu_step.common.setup_of(options, model="small", classes=10)
        every = gpu_step.wanted(options)
        rows = [{**setup.as_row(), "case": c.key} for c in every if c.key != "dual"]
        left = [c.key for c in gpu_step._left(turn(tmp_path, rows), setup, every)]
        assert left == ["plain", "dual", "dual_library", "plain_compiled"]
        assert gpu_step._left(turn(tmp_path, [*rows, {**setup.as_row(), "case": "dual"}]), setup, every) == []
        other = [{**row, "batch": 3} for row in rows]
        assert gpu_step._left(turn(tmp_path, other), setup, every) == every

    def test_networks_of_the_dispatcher(self, tmp_path):
        options = dispatch.arguments().parse_args([])
        row = {"model": "resnet50", "case": "dual", "size": 224, "batch": 64, "precision": "bf16", "classes": 10}
        assert dispatch._known(turn(tmp_path, [row]), options, "resnet50", "dual")
        assert not dispatch._known(turn(tmp_path, [row]), options, "resnet50", "selective")
        assert not dispatch._known(turn(tmp_path, [row, {**row, "slower": True}]), options, "resnet50", "dual")


# ---- partial results -----------------------------------------------------------------------------------------


class TestRounds:
    def test_whole_rounds_are_told_as_they_come(self, monkeypatch):
        monkeypatch.setattr(gpu_step.common, "TELL", 0.0)
        seen = []
        steps = dict.fromkeys("ab", lambda: None)
        times = interleave(steps, 3, 1, "cpu", "test", seen=lambda t: seen.append({k: len(v) for k, v in t.ms.items()}))
        assert seen == [{"a": 1, "b": 1}, {"a": 2, "b": 2}, {"a": 3, "b": 3}]
        assert {k: len(v) for k, v in times.ms.items()} == seen[-1]

    def test_one_that_raises_does_not_take_the_others_along(self):
        calls, told = [], []

        def b():
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("no more")

        times = interleave({"a": lambda: None, "b": b}, 4, 1, "cpu", "test", failed=lambda name, error: told.append((name, str(error))))
        assert {k: len(v) for k, v in times.ms.items()} == {"a": 4}
        assert told == [("b", "no more")]
        calls.clear()
        with pytest.raises(RuntimeError, match="no more"):
            interleave({"b": b}, 4, 0, "cpu", "test")

    def test_rows_of_steps_are_partial_until_they_are_whole(self, tmp_path, monkeypatch):
        """After a first round there are rows, marked so; at the end there is one each. What raises is missing."""
        options = gpu_step.arguments().parse_args(["--part", str(tmp_path / "part.json"), "--warmup", "0"])
        report = Report("step", "", {}, dict.fromkeys(("device", "torch", "fisnet_cuda", "commit"), "stub"), {})
        worker = gpu_worker.Turn(options, report)
        saved = []

        def rounds(steps, rounds, warmup, device, label, seconds, calls, seen, failed):
            if "dual" in steps:
                failed("dual", RuntimeError("out of memory"))
            names = [name for name in steps if name != "dual"]
            seen(Times({name: [1.0] for name in names}))
            saved.append(json.loads((tmp_path / "part.json").read_text())["rows"])
            return Times({name: [1.0, 2.0] for name in names})

        monkeypatch.setattr(gpu_step.common, "interleave", rounds)
        made = {key: gpu_step.Made(Contestant(key), lambda: None, 0, 1.0) for key in ("plain", "dual", "selective", "original")}
        setup = gpu_step.common.setup_of(options, model="small", classes=10)
        gpu_step._measure(options, report, worker, setup, made)
        assert [(row["case"], row["partial"]) for row in saved[0]] == [("plain", True), ("selective", True)]
        assert "cut off after 1 rounds" in saved[0][1]["text"]
        assert [(row["case"], row["partial"]) for row in saved[1]] == [("plain", False), ("selective", False), ("original", True)]
        assert [(row["case"], row["partial"]) for row in report.rows] == [("plain", False), ("selective", False), ("original", False)]
        assert Spread(**report.rows[1]["over_plain"]).p50 == 1.0
        assert report.missing == ["small at 224, fp32, dual, kernels: RuntimeError: out of memory"]


def test_a_worker_ends_when_nobody_waits_for_it(tmp_path):
    """Who was killed cannot end its workers: they see it by their input."""
    code = """
import argparse, time
from benchmarks import gpu_worker
from benchmarks.common import Report
p = argparse.ArgumentParser()
gpu_worker.options_of(p)
gpu_worker.Turn(p.parse_args(["--wait"]), Report("test", "", {}, {}, {})).wait()
print("measuring", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "READY\n"
        process.stdin.write("go 5\n")
        process.stdin.flush()
        assert process.stdout.readline() == "measuring\n"
        process.stdin.close()
        assert process.wait(60) == 1


@pytest.mark.slow
@pytest.mark.skipif(bool(needs()), reason=needs() or "the kernels run emulated")
def test_a_run_that_is_killed_has_what_is_finished_and_is_taken_up(tmp_path):
    """SIGKILL in the middle of a dry run: no handler can help. What was told is in the file, and is not done again."""
    often = "--rounds 20000 --least-rounds 20000"  # seconds a case: the file is written once a second
    arguments = ["--minutes", "30", "--only", "kernels", f"--kernel-args=--cases pair ratio --compiler none {often}"]
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path), *arguments]
    done: dict[str, list] = {}
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True) as process:
        told = next(line for line in process.stdout if " ms, " in line).split("kernels: ")[1].split(", fp32")[0]
        begin = time.monotonic()
        while told not in done and time.monotonic() - begin < 60:  # written about once a second
            first = json.loads(written(tmp_path).read_text())
            done = {row["case"]: row["all_ms"] for row in first["kernels"]}
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    first = json.loads(written(tmp_path).read_text())
    done = {row["case"]: row["all_ms"] for row in first["kernels"]}
    assert not first["finished"]
    assert told in done
    again = driver(*arguments, "--resume", out=tmp_path)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    found = json.loads(written(tmp_path).read_text())
    assert found["finished"]
    every = {case.name for case in all_cases() if "pair" in case.name or "ratio" in case.name}
    assert len(done) < len(every)
    assert {row["case"] for row in found["kernels"]} == every
    assert {row["case"]: row["all_ms"] for row in found["kernels"] if row["case"] in done} == done
    for name in done:
        assert f"kernels: {name}, fp32: done before" in again.stdout
    assert len(found["runs"]) == 2


def test_half_a_line_of_a_test_is_not_read(tmp_path):
    path = tmp_path / gpu.OUTCOMES
    path.write_text('["a", "passed", ""]\n["b", "pas')
    assert gpu._outcomes(path, "running")["passed"] == 1
    assert gpu._outcomes(tmp_path / "nothing", "running") == {}


def test_merging_does_not_change_what_it_merges(run, tmp_path):
    run(workers=[step_worker(tmp_path, "good")])
    first = content(tmp_path)
    before = copy.deepcopy(first)
    gpu_resume.merged(first, before)
    assert first == before
    assert gpu_resume.identity(MACHINE, SimpleNamespace(**dict.fromkeys((*gpu_resume.SETTINGS, "authors", "zennit"))))
