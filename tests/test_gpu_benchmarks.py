"""`make gpu` without a GPU: every stage runs its own code at tiny sizes, and what goes wrong is told. No time is judged."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest
import torch
from emulator import emulated, needs

from benchmarks import gpu, gpu_report, gpu_step, gpu_wheels, gpu_worker, kernels
from benchmarks.common import Report, cell
from benchmarks.gpu_step import COMPILED, EAGER, REPLAYED, Contestant
from benchmarks.kernel_cases import Sizes, all_cases
from fisnet_cuda import _backend

ROOT = Path(__file__).resolve().parents[1]
has_kernels = pytest.mark.skipif(bool(needs()), reason=needs() or "the kernels run emulated")


def driver(*arguments: str, out: Path) -> subprocess.CompletedProcess[str]:
    """``python -m benchmarks.gpu --dry-run``."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=400)


def written(out: Path, suffix: str = ".json") -> Path:
    """The one result file."""
    (path,) = out.glob(f"*{suffix}")
    return path


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A `gpu.Run` of the driver inside this process; "stub" modules in tmp_path can be its workers."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(*arguments: str, minutes: float = 1.0) -> gpu.Run:
        options = gpu.arguments().parse_args(["--dry-run", "--minutes", str(minutes), "--out", str(tmp_path / "out"), *arguments])
        found = gpu.Run(options, tmp_path)
        found.environment = {"slug": "stub", "commit": "none", "device": "stub", "torch": "", "cuda": "", "cores": 1, "date": ""}
        return found

    return make


def stub(folder: Path, name: str, body: str) -> list[str]:
    """A module that a worker can run; it finds its part file as ``part``."""
    head = "import json, sys, time\npart = sys.argv[sys.argv.index('--part') + 1]\n"
    head += "def save(rows, wrong=False):\n    json.dump(dict(rows=rows, bars=[], notes=[], wrong=wrong), open(part, 'w'))\n"
    (folder / f"{name}.py").write_text(head + textwrap.dedent(body))
    return [name]


# ---- the whole run -------------------------------------------------------------------------------------------


@pytest.mark.slow
@has_kernels
def test_a_dry_run_writes_every_number(tmp_path):
    done = driver(
        "--only", "tests", "kernels", "steps", "--minutes", "4", "--tests", "tests/gpu/test_cuda.py", "--at-once", "2",
        "--kernel-args=--cases phi_scale/K3 --compiler eager", "--step-args=--cases selective --compiler none", out=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "s] timing begins" in done.stdout
    content = json.loads(written(tmp_path).read_text())
    assert content["finished"]
    assert not content["wrong"]
    assert content["failures"] == []
    assert [stage["name"] for stage in content["stages"]] == ["environment", "tests", "kernels", "small"]
    assert content["tests"]["skipped"] > 10
    assert content["tests"]["why_skipped"] == ["no GPU here"]
    for row in content["kernels"] + content["steps"]:
        assert {"device", "torch", "fisnet_cuda", "commit"} <= row.keys()
        assert row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
    (row,) = content["kernels"]
    assert {"gb_s", "share", "eager_over", "compiled_over", "over_copy", "traffic_bytes"} <= row.keys()
    wanted = {c.key for c in (*EAGER, *REPLAYED) if c.case in ("plain", "selective")}
    assert {row["case"] for row in content["steps"]} == wanted
    table = written(tmp_path, ".md").read_text()
    assert "A dry run on the CPU" in table
    assert "| phi_scale/K3" in table
    assert "selective, PyTorch reference" in table


@has_kernels
def test_a_killed_run_leaves_valid_results_and_no_process(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path), "--only", "steps"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "environment: ok" in line:
                break
        time.sleep(2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert children
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    content = json.loads(written(tmp_path).read_text())
    assert not content["finished"]
    assert content["environment"]["device"]
    assert "stopped before its end" in written(tmp_path, ".md").read_text()
    assert not any(Path(f"/proc/{child}").exists() for child in children)


# ---- stages that go wrong ------------------------------------------------------------------------------------


class TestWorkers:
    def time(self, run, *workers: gpu.Worker) -> dict:
        run.workers = list(workers)
        preparing = gpu.Preparing(run, 2)
        preparing.start()
        preparing.wait()
        gpu.measure(run)
        return {stage["name"]: stage for stage in run.stages}

    def test_each_is_timed_in_its_turn_and_a_broken_one_does_not_stop_the_others(self, run, tmp_path):
        good = """
            print("READY", flush=True)
            word, seconds = sys.stdin.readline().split()
            save([{"case": "plain", "began": time.time()}])
        """
        a, b = (gpu.Worker(name, "steps", stub(tmp_path, f"good_{name}", good), 5) for name in "ab")
        broken = gpu.Worker("broken", "steps", stub(tmp_path, "broken", "raise SystemExit('no such thing')"), 5)
        run = run()
        stages = self.time(run, broken, a, b)
        assert {name: stage["status"] for name, stage in stages.items()} == {"broken": "failed", "a": "ok", "b": "ok"}
        assert any("no such thing" in failure for failure in run.failures)
        rows = run.content()["steps"]
        assert rows[0]["began"] < rows[1]["began"]

    def test_out_of_time_is_told_and_rows_so_far_are_kept(self, run, tmp_path, monkeypatch):
        body = """
            save([{"case": "first"}])
            print("READY", flush=True)
            sys.stdin.readline()
            print("the second row takes long", flush=True)
            time.sleep(600)
        """
        worker = gpu.Worker("slow", "steps", stub(tmp_path, "slow", body), 0.1)
        monkeypatch.setattr(gpu, "GRACE", 0.2)
        run = run(minutes=0.3)
        stages = self.time(run, worker)
        assert stages["slow"]["status"] == "timeout"
        assert run.content()["steps"] == [{"case": "first"}]
        assert worker.job.process.poll() is not None

    def test_one_that_is_never_prepared_is_told(self, run, tmp_path, monkeypatch):
        worker = gpu.Worker("stuck", "steps", stub(tmp_path, "stuck", "time.sleep(600)"), 5)
        monkeypatch.setattr(gpu, "REPORTING", 0.0)
        run = run(minutes=0.1)
        stages = self.time(run, worker)
        assert stages["stuck"]["status"] == "timeout"
        assert "not prepared" in stages["stuck"]["detail"]

    def test_a_wrong_result_decides_the_exit_code(self, run, tmp_path):
        worker = gpu.Worker("liar", "kernels", stub(tmp_path, "liar", "save([], wrong=True)\nsys.exit(1)"), 5)
        run = run()
        self.time(run, worker)
        assert run.content()["wrong"]
        assert any("a result is wrong" in failure for failure in run.failures)


class TestTests:
    def test_failing_tests_are_named(self, run, tmp_path):
        (tmp_path / "test_some.py").write_text(
            "import pytest\npytestmark = pytest.mark.gpu\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
        )
        run = run("--tests", str(tmp_path / "test_some.py"))
        gpu.tests(run)
        assert (run.tests["passed"], run.tests["failed"]) == (1, 1)
        assert len(run.failures) == 1
        assert "test_bad" in run.failures[0]
        assert run.stages[-1]["status"] == "failed"

    def test_out_of_time_is_told(self, run, tmp_path):
        (tmp_path / "test_slow.py").write_text("import time, pytest\n@pytest.mark.gpu\ndef test_slow(): time.sleep(600)\n")
        run = run("--tests", str(tmp_path / "test_slow.py"), "--test-seconds", "4")
        gpu.tests(run)
        assert run.stages[-1]["status"] == "timeout"
        assert any("out of time" in failure for failure in run.failures)


def test_a_sanitizer_that_finds_something_is_told(run, tmp_path, monkeypatch):
    """A stand-in for compute-sanitizer: racecheck finds a hazard, initcheck something that is not ours."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"""#!{sys.executable}
import sys
tool = sys.argv[2]
kernel = {{"racecheck": "void fisnet::phi_scale_kernel<float>", "initcheck": "void cutlass::some_kernel"}}.get(tool)
print(f"=========     at {{kernel}}" if kernel else "")
print(f"========= ERROR SUMMARY: {{2 if kernel else 0}} errors")
sys.exit(99 if kernel else 0)
"""
    )
    tool.chmod(0o755)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: str(tool) if name == "compute-sanitizer" else None)
    monkeypatch.setattr(gpu, "_planted", lambda run: None)
    run = run()
    gpu.sanitizer(run)
    assert {entry["tool"]: entry["status"] for entry in run.sanitizer} == {
        "memcheck": "ok", "racecheck": "failed", "initcheck": "ok", "synccheck": "ok",
    }  # fmt: skip
    (failure,) = run.failures
    assert "racecheck" in failure
    assert "2 errors" in failure
    assert "none of it in a kernel of ours" in run.notes[0]


# ---- benchmarks by themselves --------------------------------------------------------------------------------


@has_kernels
class TestKernels:
    def options(self, tmp_path, *more: str):
        return kernels.arguments().parse_args(
            ["--tiny", "--rounds", "3", "--least-rounds", "3", "--compiler", "none", "--part", str(tmp_path / "part.json"), *more]
        )

    def test_a_wrong_kernel_is_reported_and_its_time_withheld(self, tmp_path, monkeypatch, capsys):
        right = _backend.kernel

        def wrong(name, backend, tensor):
            found = right(name, backend, tensor)
            if name != "phi_scale":
                return found
            return lambda *args, **kwargs: tuple(t * 1.001 for t in found(*args, **kwargs))

        monkeypatch.setattr(_backend, "kernel", wrong)
        report = kernels.run(self.options(tmp_path, "--cases", "phi_scale/K3", "adjoint", "--dtypes", "fp32"))
        assert report.wrong
        rows = {row["case"]: row for row in report.rows}
        assert "ms" not in rows["phi_scale/K3"]
        assert "has error" in rows["phi_scale/K3"]["wrong"]
        assert rows["adjoint pair"]["ms"]["p50"] > 0
        assert json.loads((tmp_path / "part.json").read_text())["wrong"]
        assert "its result is wrong" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda t: t + torch.rand(()), "differs between two runs"),
            (lambda t: t[:1], "has shape"),
            (lambda t: t * float("nan"), "has error"),
        ],
    )
    def test_what_is_noticed(self, spoil, message):
        with emulated(checks=False):
            case = next(kernels.shrink(case) for case in all_cases() if case.name == "phi_scale")
            contest = kernels.Contest(case, "fp32", "cpu", "eager")
            assert contest.problem() == ""
            right = contest.kernel
            contest.kernel = lambda *args, **kwargs: tuple(spoil(t) for t in right(*args, **kwargs))
            assert message in contest.problem()

    @pytest.mark.parametrize("dtype", ["bf16", "fp32"])
    @pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
    def test_every_case_is_right_at_odd_sizes(self, case, dtype):
        """The cases as the benchmark and the sanitizer use them: they shrink, and every kernel passes the benchmark's check."""
        with emulated(checks=False):
            contest = kernels.Contest(kernels.shrink(case), dtype, "cpu", "none")
            if not contest.is_kernel:
                pytest.skip(f"no kernel {case.kernel} in this build")
            assert contest.problem() == ""
            args, kwargs = contest.operands()
            with kernels.grad_where_asked(args):
                assert case.traffic(args, kwargs, contest.kernel(*args, **kwargs)) > 0

    def test_shares_make_the_whole(self, tmp_path):
        every = kernels.selected(self.options(tmp_path))
        shares = [kernels.selected(self.options(tmp_path, "--share", f"{i}/3")) for i in (1, 2, 3)]
        assert sorted((c.name, d) for share in shares for c, d in share) == sorted((c.name, d) for c, d in every)


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_sizes_shrink(case):
    sizes = kernels.shrink(case).sizes
    assert isinstance(sizes, Sizes)
    assert sizes.N <= 2
    assert sizes.C * sizes.H * sizes.W <= 1000


def test_contestants_have_names_of_their_own():
    keys = [c.key for c in (*EAGER, *COMPILED, *REPLAYED)]
    assert len(set(keys)) == len(keys)
    assert Contestant("selective", "reference", compiled=True).text == "selective, PyTorch reference, compiled"


class TestTurn:
    def turn(self, *arguments: str) -> gpu_worker.Turn:
        options = gpu_step.arguments().parse_args(list(arguments))
        return gpu_worker.Turn(options, Report("test", "A question", {}, {"device": "stub"}, {"case": cell("case")}))

    def test_a_failure_is_a_note(self, capsys):
        turn = self.turn()
        assert turn.attempt("double backward", lambda: torch.ones(2) @ torch.ones(3)) is None
        assert "double backward: left out, RuntimeError" in turn.report.notes[0]
        assert turn.attempt("plain", lambda: 3) == 3
        assert "plain: prepared" in capsys.readouterr().out

    def test_preparing_ends_in_time_even_where_exceptions_are_caught(self):
        turn = self.turn("--until", str(time.time() + 0.2))

        def compile_forever():
            begin = time.time()
            while time.time() - begin < 20:
                try:
                    time.sleep(0.5)
                except Exception:
                    raise RuntimeError("the compiler says no") from None

        begin = time.time()
        assert turn.attempt("slow", compile_forever) is None
        assert turn.attempt("late", lambda: time.sleep(20)) is None
        assert time.time() - begin < 10
        assert len(turn.report.notes) == 2

    def test_nobody_waits(self, monkeypatch):
        monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
        with pytest.raises(SystemExit):
            self.turn("--wait").wait()


# ---- wheels --------------------------------------------------------------------------------------------------


class TestWheels:
    @pytest.fixture
    def checkout(self, tmp_path, monkeypatch):
        """A checkout of two files and a folder of wheels made from it."""
        (tmp_path / "csrc").mkdir()
        (tmp_path / "fisnet_cuda").mkdir()
        (tmp_path / "csrc" / "a.cu").write_text("__global__ void a() {}")
        (tmp_path / "setup.py").write_text("")
        monkeypatch.setattr(gpu_wheels, "ROOT", tmp_path)
        monkeypatch.setattr(gpu_wheels, "SITE", tmp_path / "site")
        folder = tmp_path / "wheels"
        folder.mkdir()
        with zipfile.ZipFile(folder / "fisnet_cuda-0.1.0-cp310-abi3-linux_x86_64.whl", "w") as wheel:
            wheel.writestr("fisnet_cuda/_C.abi3.so", "the library")
        known = {"commit": "abc1234", "kernels": gpu_wheels.of_kernels(), "everything": gpu_wheels.of_everything()}
        (folder / gpu_wheels.RECORD).write_text(json.dumps(known))
        return tmp_path

    def test_the_library_comes_from_the_wheel_of_these_sources(self, checkout):
        said = []
        gpu_wheels.install(checkout / "wheels", said.append)
        assert (checkout / "fisnet_cuda" / "_C.abi3.so").read_text() == "the library"
        assert "from fisnet_cuda-0.1.0" in said[-1]
        assert gpu_wheels.commit(checkout / "wheels") == "abc1234"

    def test_changed_sources_are_compiled_anew(self, checkout, monkeypatch):
        (checkout / "csrc" / "a.cu").write_text("__global__ void b() {}")
        compiled = []
        monkeypatch.setattr(gpu_wheels, "_compile", lambda say, capability: compiled.append(capability))
        gpu_wheels.install(checkout / "wheels", print, "9.0")
        assert compiled == ["9.0"]
        assert gpu_wheels.commit(checkout / "wheels") == "abc1234-changed"

    def test_what_is_missing_is_named_with_a_remedy(self, checkout, monkeypatch):
        monkeypatch.setattr(gpu_wheels, "NEEDS", {"no_such_module": ["no-such-package"]})
        with pytest.raises(RuntimeError, match=r"missing here: no-such-package. Run 'make gpu-wheels'"):
            gpu_wheels.install(checkout / "wheels", print)

    def test_a_failed_compilation_is_told(self, checkout):
        (checkout / "setup.py").write_text("raise SystemExit('no compiler here')")
        with pytest.raises(RuntimeError, match="no compiler here"):
            gpu_wheels.install(checkout / "nothing", print)


def test_the_table_of_a_machine_without_a_gpu():
    described = gpu_report.describe("cpu")
    assert json.loads(json.dumps(described))["slug"]
    assert "gpu" not in described


def test_without_a_gpu_it_says_so(run, capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.setattr(gpu, "install", lambda run: True)
    run = run()
    run.options.dry_run, run.environment = False, {}
    assert gpu._run(run) == 2
    assert "no usable PyTorch or GPU here" in capsys.readouterr().out


@has_kernels
def test_the_sanitizer_runs_every_kernel_in_every_dtype():
    spec = importlib.util.spec_from_file_location("sanitize", ROOT / "tests" / "gpu" / "sanitize.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with emulated(checks=False):
        count, refused = script.run("cpu")
    assert not refused
    assert count >= len(kernels.DTYPES) * len({case.kernel for case in all_cases()})
