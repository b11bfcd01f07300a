"""`make gpu` without a GPU: every stage runs its own code at tiny sizes, and what goes wrong is told. No time is judged."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from emulator import emulated, needs

import fisnet_cuda as fc
from benchmarks import choices, dispatch, gpu, gpu_profile, gpu_report, gpu_step, gpu_wheels, gpu_worker, kernels
from benchmarks.cases import Setup
from benchmarks.common import Report, Spread, cell
from benchmarks.gpu_step import COMPILED, EAGER, REPLAYED, Contestant
from benchmarks.kernel_cases import Sizes, all_cases
from fisnet_cuda import _backend, reference
from fisnet_cuda.graph.ir import Instr
from fisnet_cuda.graph.program import _Call
from fisnet_cuda.reference import linear_geometry, linear_phi

ROOT = Path(__file__).resolve().parents[1]
has_kernels = pytest.mark.skipif(bool(needs()), reason=needs() or "the kernels run emulated")


def driver(*arguments: str, out: Path) -> subprocess.CompletedProcess[str]:
    """``python -m benchmarks.gpu --dry-run``."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=900)


def written(out: Path, suffix: str = ".json") -> Path:
    """The one result file."""
    (path,) = out.glob(f"*{suffix}")
    return path


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A `gpu.Run` of the driver inside this process; "stub" modules in tmp_path can be its workers."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(*arguments: str, minutes: float = 1.0) -> gpu.Run:
        options = gpu.parse(["--dry-run", "--minutes", str(minutes), "--out", str(tmp_path / "out"), *arguments])
        found = gpu.Run(options, tmp_path)
        found.environment = {"slug": "stub", "commit": "none", "device": "stub", "torch": "", "cuda": "", "cores": 1, "date": ""}
        return found

    return make


def stub(folder: Path, name: str, body: str) -> list[str]:
    """A module that a worker can run; it finds its part file as ``part``."""
    head = "import json, sys, time\npart = sys.argv[sys.argv.index('--part') + 1]\n"
    head += "def save(rows, wrong=False):\n"
    head += "    json.dump(dict(rows=rows, bars=[], notes=[], missing=[], wrong=wrong), open(part, 'w'))\n"
    (folder / f"{name}.py").write_text(head + textwrap.dedent(body))
    return [name]


# ---- the whole run -------------------------------------------------------------------------------------------


@pytest.mark.slow
@has_kernels
def test_a_dry_run_writes_every_number(tmp_path):
    done = driver(
        "--only", "tests", "dispatch", "kernels", "steps", "--minutes", "4", "--tests", "tests/gpu/test_cuda.py", "--at-once", "2",
        "--kernel-args=--cases phi_scale/K3 --compiler eager", "--step-args=--cases selective --compiler none", out=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "s] timing begins" in done.stdout
    content = json.loads(written(tmp_path).read_text())
    assert content["finished"]
    assert not content["wrong"]
    assert content["failures"] == []
    assert [stage["name"] for stage in content["stages"]] == ["environment", "tests", "dispatch", "small", "kernels"]
    assert content["tests"]["skipped"] > 10
    assert content["tests"]["why_skipped"] == ["no GPU here"]
    for row in content["kernels"] + content["steps"]:
        assert {"device", "torch", "fisnet_cuda", "commit"} <= row.keys()
        assert row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
    for row in content["dispatch"]:
        assert row["made_up"]
        assert (row["medians"], row["again"], row["margin"]) == ({}, {}, None)
    assert any("made-up times" in note for note in content["notes"])
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
        assert any("no such thing" in failure.what for failure in run.failures)
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

    def test_the_others_start_when_the_first_has_the_gpu_and_tests_when_it_is_prepared(self, run, tmp_path):
        first = """
            time.sleep(0.5)
            before = time.time()
            print("ALONE", flush=True)
            time.sleep(0.5)
            ready = time.time()
            print("READY", flush=True)
            sys.stdin.readline()
            save([{"alone": before, "ready": ready}])
        """
        other = """
            began = time.time()
            print("READY", flush=True)
            sys.stdin.readline()
            save([{"began": began}])
        """
        run = run()
        run.workers = [
            gpu.Worker("first", "dispatch", stub(tmp_path, "first", first), 5, first=True),
            gpu.Worker("other", "steps", stub(tmp_path, "other", other), 5),
        ]
        preparing = gpu.Preparing(run, 2)
        preparing.start()
        preparing.wait_for_first()
        tests_begin = time.time()
        preparing.wait()
        gpu.measure(run)
        (first,), (other,) = run.content()["dispatch"], run.content()["steps"]
        assert other["began"] > first["alone"]
        assert tests_begin >= first["ready"]

    def test_a_first_one_that_ends_at_once_keeps_nobody(self, run, tmp_path):
        run = run()
        run.workers = [gpu.Worker("broken", "dispatch", stub(tmp_path, "broken_first", "sys.exit(3)"), 5, first=True)]
        preparing = gpu.Preparing(run, 2)
        preparing.start()
        preparing.wait_for_first()
        assert run.workers[0].job.ready.is_set()
        preparing.wait()

    def test_a_wrong_result_decides_the_exit_code(self, run, tmp_path):
        worker = gpu.Worker("liar", "kernels", stub(tmp_path, "liar", "save([], wrong=True)\nsys.exit(1)"), 5)
        run = run()
        self.time(run, worker)
        assert run.content()["wrong"]
        assert any("a result is wrong" in failure.what for failure in run.failures)


class TestTests:
    def test_failing_tests_are_named(self, run, tmp_path):
        (tmp_path / "test_some.py").write_text(
            "import pytest\npytestmark = pytest.mark.gpu\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
        )
        run = run("--tests", str(tmp_path / "test_some.py"))
        gpu.tests(run)
        assert (run.tests["passed"], run.tests["failed"]) == (1, 1)
        assert len(run.failures) == 1
        assert "test_bad" in run.failures[0].what
        assert run.stages[-1]["status"] == "failed"

    def test_out_of_time_is_told(self, run, tmp_path):
        (tmp_path / "test_slow.py").write_text("import time, pytest\n@pytest.mark.gpu\ndef test_slow(): time.sleep(600)\n")
        run = run("--tests", str(tmp_path / "test_slow.py"), "--seconds", "tests=4")
        gpu.tests(run)
        assert run.stages[-1]["status"] == "timeout"
        assert any("out of time" in failure.what for failure in run.failures)


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
    assert "racecheck" in failure.what
    assert "2 errors" in failure.what
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

    @pytest.mark.parametrize("dtype", ["bf16", "fp32"])
    @pytest.mark.parametrize("case", [case for case in all_cases() if case.flops], ids=lambda case: case.name)
    def test_every_tile_of_a_product_is_right(self, case, dtype):
        """Channels in vectors of 16 bytes, which every compiled tile shape can run."""
        with emulated(checks=False):
            contest = kernels.Contest(kernels.shrink(case, odd=False), dtype, "cpu", "none")
            if not contest.is_kernel:
                pytest.skip(f"no kernel {case.kernel} in this build")
            assert contest.problem() == ""
            assert len(contest.shapes(*contest.operands())) > 1

    def test_a_wrong_tile_is_noticed(self):
        with emulated(checks=False):
            case = next(kernels.shrink(case, odd=False) for case in all_cases() if case.kernel == "transposed_phi")
            contest = kernels.Contest(case, "bf16", "cpu", "none")
            right, worst = contest.kernel, [*contest.shapes(*contest.operands())][-1]

            def wrong(*args, tile=None, **kwargs):
                return tuple(t * (1.1 if tile == worst else 1) for t in right(*args, tile=tile, **kwargs))

            contest.kernel = wrong
            assert contest.problem().startswith(f"{worst}: result 0 has error")

    def test_products_stand_against_the_library_and_every_tile_is_timed(self, tmp_path):
        report = kernels.run(self.options(tmp_path, "--cases", "transposed_phi/vgg", "--dtypes", "bf16"))
        (row,) = report.rows
        assert row["ms"] == next(iter(row["tiles"].values()))
        assert row["eager_over"]["p50"] > 0
        assert row["tflop_s"]["p50"] > 0
        assert not report.bars
        assert kernels.COLUMNS["tiles, ms"](row).startswith("64x64 ")

    def test_shares_make_the_whole(self, tmp_path):
        every = kernels.selected(self.options(tmp_path))
        shares = [kernels.selected(self.options(tmp_path, "--share", f"{i}/3")) for i in (1, 2, 3)]
        assert sorted((c.name, d) for share in shares for c, d in share) == sorted((c.name, d) for c, d in every)


def test_every_product_has_cases():
    """All of `fisnet_cuda.reference.linear_phi`, at layers with strides, of several taps, and wide ones."""
    ops = {name for name, value in vars(linear_phi).items() if inspect.isfunction(value) and value.__module__ == linear_phi.__name__}
    cases = [case for case in all_cases() if case.flops]
    weights = {"folded", "folded_plus"} # what the products multiply by
    assert {case.kernel for case in cases} == {name for name in ops if name[0] != "_"} - weights
    assert len({case.name for case in cases}) == len(cases)
    deep = next(case for case in cases if case.name == "transposed_phi/resnet 3x3 128-128 at 28")
    assert deep.flops(deep.sizes) == 2 * 64 * 28 * 28 * 128 * 128 * 9
    strided = next(case for case in cases if case.name == "linear_act/resnet 3x3/2 256-256 at 28")
    assert strided.flops(strided.sizes) == 2 * 64 * 14 * 14 * 256 * 256 * 9


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


    library = Contestant("selective", products="library")
    assert (library.key, library.text) == ("selective_library", "selective, library products")
    assert [c.key for c in EAGER if c.chooses] == ["selective", "stochastic", "dual", "original"]


# ---- the dispatcher's choices --------------------------------------------------------------------------------


class FakeTimer:
    """Times for candidate 0 and the fused kernel, in both rounds of the choice and in those after it."""

    def __init__(self, deciding: float, again: list[float]) -> None:
        self.times = iter([deciding, deciding, *again, *([again[-1]] * 50)])
        self.rounds = 0

    def cannot(self, values) -> str:
        return ""

    def round(self, candidates) -> list[float]:
        self.rounds += 1
        return [1.0, next(self.times)][: len(candidates)]


class FakeStep:
    """A training step whose only call of the dispatcher is one dense layer."""

    def __init__(self, *_: object) -> None:
        self.explainer = type("Explainer", (), {"_programs": {}})
        self.operands = (torch.ones(2, 3), torch.ones(4, 3), linear_geometry())
        self.operands = tuple(t.bfloat16() if isinstance(t, torch.Tensor) else t for t in self.operands)

    def __call__(self) -> None:
        fc.dispatch.run("linear_act", "auto", *self.operands)


class TestDispatch:
    @pytest.fixture
    def finds(self, monkeypatch, tmp_path):
        """``finds(timer, spoil)``: exit code and report of the benchmark of a `FakeStep`, whose kernel's results are spoilt."""

        def kernel(*operands, tile=None, poison=False, **options):
            return tuple(kernel.spoil(t) for t in reference.linear_act(*operands, **options))

        kernel.serves, kernel.tiles = lambda *_, **__: "", lambda *_, **__: ("64x64",)
        monkeypatch.setattr(_backend, "KERNEL_DEVICES", frozenset({"cpu"}))
        monkeypatch.setattr(_backend, "fused", lambda name: kernel)
        monkeypatch.setattr(dispatch, "TrainingStep", FakeStep)
        monkeypatch.setattr(gpu_worker, "emulating", lambda device: contextlib.nullcontext(""))

        def find(timer, spoil=lambda t: t):
            kernel.spoil = spoil
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", fc.FisnetWarning)
                code = dispatch.main(["--quick", "--cases", "selective", "--part", str(tmp_path / "part.json")], timer)
            return code, json.loads((tmp_path / "part.json").read_text())

        return find

    def test_a_good_choice(self, finds):
        code, found = finds(FakeTimer(0.5, [0.6]))
        assert code == 0
        (row,) = found["rows"]
        assert row["choice"] == "fused/64x64"
        assert row["medians"] == {"library": [1.0, 1.0], "fused/64x64": [0.5, 0.5]}
        assert row["margin"] == 0.5
        assert row["again"] == {"library": [1.0] * 3, "fused/64x64": [0.6] * 3}, "measured again, by other numbers"
        assert any("the choices save 0.40 ms" in note for note in found["notes"])
        assert [bar["verdict"] for bar in found["bars"]] == ["PASS"]

    def test_a_chosen_kernel_that_is_slower_after_all(self, finds, capsys):
        code, found = finds(FakeTimer(0.5, [1.2]))
        assert code == 1
        assert found["rows"][0]["slower"]
        assert not found["wrong"]
        assert "is SLOWER than candidate 0, 1.200 times" in capsys.readouterr().err
        assert [bar["verdict"] for bar in found["bars"]] == ["FAIL"]

    def test_noise_does_not_make_it_slower(self, finds):
        timer = FakeTimer(0.5, [1.01, 1.01, 0.9, 0.9])
        assert finds(timer)[0] == 0
        assert timer.rounds == 2 + dispatch.DOUBTFUL

    def test_candidate_0_where_nothing_is_faster(self, finds):
        code, found = finds(FakeTimer(0.99, [9.0]))
        assert code == 0
        assert found["rows"][0]["choice"] == "library"
        assert found["rows"][0]["again"] == {}

    def test_a_wrong_kernel(self, finds, capsys):
        code, found = finds(FakeTimer(0.5, [0.5]), lambda t: 1.1 * t)
        assert code == 1
        assert found["wrong"]
        assert "relative error" in found["rows"][0]["blacklisted"]["fused/64x64"]
        assert "fused/64x64 is WRONG" in capsys.readouterr().err

    def test_made_up_times_are_no_measurement(self, finds):
        code, found = finds(None)
        assert code == 0
        (row,) = found["rows"]
        assert row["choice"] == "fused/64x64"
        assert (row["medians"], row["margins"], row["again"], row["margin"], row["over_library"]) == ({}, {}, {}, None, None)
        assert found["bars"] == []
        assert any("made-up" in note for note in found["notes"])
        assert " us" not in dispatch.COLUMNS["choice"](row)
        assert "made up" in dispatch.COLUMNS["choice"](row)

    def test_layers_are_named_in_both_directions(self, monkeypatch):
        """Two instructions, each with an op in its forward and one in its backward."""

        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return fc.dispatch.run("linear_act", "auto", x, torch.eye(3), linear_geometry())[0]

            @staticmethod
            def backward(ctx, g):
                return fc.dispatch.run("linear_act", "auto", g.repeat(2, 1), torch.eye(3), linear_geometry())[0][: len(g)]

        instrs = tuple(Instr("op", lambda x: Double.apply(x.exp()), (), (0,), layer) for layer in ("one", "two"))
        lowered = type("Lowered", (), {"forward": instrs, "relevance": ()})
        program = type("Program", (), {"lowered": lowered, "_relevance": ()})()
        program._forward = tuple(_Call.of(instr, (), {}) for instr in instrs)

        def step():
            x = torch.ones(2, 3, requires_grad=True)
            for call in program._forward:
                x = call.fn(x)
            x.sum().backward()

        step.explainer = type("Explainer", (), {"_programs": {True: (program, program)}})
        monkeypatch.setattr(_backend, "KERNEL_DEVICES", frozenset({"cpu"}))
        monkeypatch.setattr(_backend, "fused", lambda name: None)
        before, run = program._forward, fc.dispatch.run
        seen = []
        watch = dispatch.Watch(step, lambda use, *_: None)
        monkeypatch.setattr(watch, "_see", lambda name, operands, options: seen.append((watch._layer, len(operands[0]))))
        watch()
        assert seen == [("one", 2), ("two", 2), ("two", 4), ("one", 4)]
        assert program._forward is before
        assert fc.dispatch.run is run

    @pytest.mark.parametrize(
        ("layers", "text"),
        [
            (["a.1.b"], ["a.1.b"]),
            (["a.1.b", "a.3.b", "a.2.b", "a.2.c"], ["a.[1-3].b", "a.2.c"]),
            (["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"], ["layer1.0.conv[1-2]", "layer1.1.conv1"]),
            (["a.0", "a.1", "a.5"], ["a.[0-1,5]"]),
        ],
    )
    def test_names_in_groups(self, layers, text):
        assert dispatch.grouped(layers) == text

    def test_the_figure(self, tmp_path):
        pytest.importorskip("matplotlib")
        report = Report("dispatch", "", {}, {**gpu_report.describe("cpu")}, dispatch.COLUMNS)
        for index, (choice, ratio) in enumerate([("fused/64x64", 0.8), ("library", 1.3), ("library", 9.0)]):
            row = {
                "model": "resnet50", "size": 224, "precision": "bf16", "case": "selective", "layers": [f"layer{index}"], "calls": 1,
                "op": "linear_act", "operands": {"x": "bfloat16[2,3]", "W": "bfloat16[4,3]", "geometry": "(0,(),(),(),1)"},
                "medians": {"library": [1.0, 1.0], "fused/64x64": [ratio, ratio]}, "margins": {"fused/64x64": 1 - ratio},
                "choice": choice, "over_library": Spread(ratio, ratio, ratio) if choice != "library" else None,
            }  # fmt: skip
            report.add(**row)
        dispatch.draw(report, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("arguments", "ops"),
        [
            (["--quick", "--cases", "selective"], {"transposed_phi"}),
            pytest.param(
                ["--models", "resnet18", "--size", "32", "--batch", "2", "--cases", "selective"],
                {"transposed_phi", "fprop_adjoint"}, marks=pytest.mark.slow,
            ),
        ],
        ids=["small", "resnet18"],
    )  # fmt: skip
    @has_kernels
    def test_a_real_net_emulated(self, tmp_path, arguments, ops):
        """With the true programs: every choice has a layer, and each kernel that could be chosen computes what it should."""
        part = tmp_path / "part.json"
        assert dispatch.main([*arguments, "--part", str(part)]) == 0
        rows = json.loads(part.read_text())["rows"]
        assert all(layer for row in rows for layer in row["layers"])
        assert {row["op"] for row in rows if row["choice"] != "library"} >= ops


class TestChoices:
    @pytest.fixture
    def call(self, monkeypatch, tmp_path):
        """A call of the dispatcher whose kernel is faster; what it ran."""
        ran = []

        def kernel(*operands, tile=None, poison=False, **options):
            ran.append(tile)
            return reference.linear_act(*operands, **options)

        kernel.serves, kernel.tiles = lambda *_, **__: "", lambda *_, **__: ("64x64",)
        monkeypatch.setattr(_backend, "KERNEL_DEVICES", frozenset({"cpu"}))
        monkeypatch.setattr(_backend, "fused", lambda name: kernel)
        step = FakeStep()

        def run():
            ran.clear()
            step()
            return ["fused" for tile in ran] or ["library"]

        with choices.kept_in(tmp_path / "choices.json", FakeTimer(0.5, [0.5])):
            yield run

    def test_nothing_is_measured_while_it_is_postponed(self, call):
        with choices.postponed() as waiting:
            assert call() == ["library"]
            assert waiting.refused == 1
        assert choices.decide([call], 60.0).fresh == 1
        with choices.postponed() as waiting:
            assert call() == ["fused"]
            assert waiting.refused == 0

    def test_deciding_ends_with_its_time(self, call):
        found = choices.decide([call], 0.0)
        assert (found.fresh, found.refused) == (0, 1)

    def test_choices_of_other_processes_are_found(self, call):
        with choices.postponed():
            assert call() == ["library"]
            path = choices.dispatcher().cache.path
        choices.decide([call], 60.0)
        kept = path.read_text()
        fc.dispatch.clear()
        with choices.postponed():
            assert call() == ["library"]
            path.write_text(kept)
            assert call() == ["library"], "the file was read before"
        with choices.postponed():
            assert call() == ["fused"]

    def test_the_users_own_choices_are_left_alone(self, monkeypatch, tmp_path):
        monkeypatch.setenv("FISNET_CACHE", str(tmp_path / "mine.json"))
        with choices.kept_in(tmp_path / "other.json"):
            assert choices.dispatcher().cache.path == tmp_path / "other.json"
        assert os.environ["FISNET_CACHE"] == str(tmp_path / "mine.json")
        assert choices.dispatcher().cache.path == tmp_path / "mine.json"
        fc.dispatch.reset()


class TestSteps:
    @pytest.mark.parametrize(("device", "judged"), [("NVIDIA H100 80GB HBM3", True), ("NVIDIA A100", False)])
    def test_the_bars(self, device, judged):
        report = Report("step", "", {}, {**gpu_report.describe("cpu"), "device": device}, gpu_step.COLUMNS)
        for case in ("plain", "selective", "selective_library", "dual", "selective_compiled"):
            report.add(case=case, over_plain=Spread(1.0, 1.2, 1.3), over_compiled_plain=Spread(1.5, 1.8, 2.0))
        gpu_step._bars(report, Setup("resnet50", size=224, precision="bf16"), "label")
        limits = [(bar.limit, bar.verdict) for bar in report.bars]
        wanted = [(1.2, "PASS"), (1.7, "FAIL"), (1.9, "PASS"), (2.7, "PASS")]
        assert limits == [(limit, verdict if judged else "----") for limit, verdict in wanted]
        report.bars.clear()
        gpu_step._bars(report, Setup("resnet50", size=224, precision="tf32"), "label")
        assert not report.bars

    def test_library_products_are_forced(self, monkeypatch, tmp_path):
        def kernel(*operands, tile=None, poison=False, **options):
            return tuple(2 * t for t in reference.linear_act(*operands, **options))

        kernel.serves, kernel.tiles = lambda *_, **__: "", lambda *_, **__: ("64x64",)
        monkeypatch.setattr(_backend, "KERNEL_DEVICES", frozenset({"cpu"}))
        monkeypatch.setattr(_backend, "fused", lambda name: kernel)
        x, W = torch.ones(1, 2).bfloat16(), torch.ones(1, 2).bfloat16()

        def step():
            return fc.dispatch.run("linear_act", "auto", x, W, linear_geometry())[0].item()

        found = []
        with fc.dispatch.forced("*=fused"):
            found.append(step())
            gpu_step.Forced(lambda: found.append(step()), "*=library")()
        assert found == [4.0, 2.0]

    @has_kernels
    def test_deciding_is_no_part_of_a_timed_step(self, monkeypatch, tmp_path):
        timer, timed = Counting(), []

        def interleave(steps, *arguments, **options):
            before = timer.rounds
            times = right(steps, *arguments, **options)
            timed.append((before, timer.rounds))
            return times

        right = gpu_step.common.interleave
        monkeypatch.setattr(gpu_step.common, "interleave", interleave)
        argv = ["--quick", "--precision", "bf16", "--cases", "selective", "--compiler", "none", "--graphs"]
        argv += ["--part", str(tmp_path / "part.json")]
        with choices.kept_in(tmp_path / "choices.json", timer):
            assert gpu_step.main(argv) == 0
        ((before, after),) = timed
        assert 0 < before == after
        found = json.loads((tmp_path / "part.json").read_text())
        assert any("new choices of the dispatcher took" in note for note in found["notes"])
        rows = {row["case"]: row for row in found["rows"]}
        assert {"selective", "selective_library", "selective_graph", "selective_library_graph"} <= rows.keys()
        assert rows["selective"]["over_library_products"].keys() == {"p20", "p50", "p80"}
        assert "over_library_products" not in rows["selective_library"]


class Counting(choices.MadeUp):
    """Made-up times, counted."""

    rounds = 0

    def round(self, candidates) -> list[float]:
        self.rounds += 1
        return super().round(candidates)


class TestProfile:
    @pytest.mark.parametrize(
        ("name", "short", "serves"),
        [
            ("void fisnet::linear_kernel<__nv_bfloat16, fisnet::Tile<128, 128, 8, 4>, 1, fisnet::Product<false, 1, 1, false>, "
             "fisnet::(anonymous namespace)::AdjointEpilogue<__nv_bfloat16> >(fisnet::ProductPlan, void*)",
             "fprop_adjoint bf16 128x128", "fprop_adjoint"),
            ("void fisnet::linear_kernel<float, fisnet::Tile<64, 64, 4, 4>, 0, fisnet::Product<true, 2, 2, false>, "
             "fisnet::(anonymous namespace)::DualPhiEpilogue<float> >(fisnet::ProductPlan, void*)",
             "dual_transposed_phi fp32 64x64, by element", "dual_transposed_phi"),
            ("void fisnet::(anonymous namespace)::phi_scale_kernel<__half, 8>(fisnet::PhiScaleParams)",
             "phi_scale_kernel<fp16, 8>", "phi_scale"),
            ("sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", "sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32",
             "library: convolution"),
            ("sm90_xmma_wgrad_implicit_gemm", "sm90_xmma_wgrad_implicit_gemm", "library: weight gradient"),
            ("void at::native::vectorized_elementwise_kernel<4>", "void at::native::vectorized_elementwise_kernel<4>",
             "PyTorch: pointwise and reductions"),
        ],
    )  # fmt: skip
    def test_kernels_have_short_names_and_a_place(self, name, short, serves):
        assert (gpu_profile.short(name), gpu_profile.serves(name)) == (short, serves)


class TestTurn:
    def turn(self, *arguments: str) -> gpu_worker.Turn:
        options = gpu_step.arguments().parse_args(list(arguments))
        return gpu_worker.Turn(options, Report("test", "A question", {}, {"device": "stub"}, {"case": cell("case")}))

    def test_a_failure_is_missing(self, capsys):
        turn = self.turn()
        assert turn.attempt("double backward", lambda: torch.ones(2) @ torch.ones(3)) is None
        assert "double backward: RuntimeError" in turn.report.missing[0]
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
        assert len(turn.report.missing) == 2

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
