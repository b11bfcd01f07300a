"""Every option of the scripts behind `make gpu` does what it says. An option that no test here knows fails.

Each option has a function named after it, which looks at its effect with stand-ins for what takes time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    choices,
    classes,
    common,
    dispatch,
    fake_gpu,
    gpu,
    gpu_fake,
    gpu_profile,
    gpu_report,
    gpu_step,
    gpu_turn,
    gpu_wheels,
    gpu_worker,
    heatmap,
    kernels,
)
from benchmarks.common import Report, Times
from benchmarks.kernel_cases import all_cases

STUB = dict.fromkeys(("device", "torch", "fisnet_cuda", "commit"), "stub")


def of_worker() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser()
    gpu_worker.options_of(p)
    return p


# script -> its parser, and the parsers whose options it shares, which are looked at once
SCRIPTS: dict[str, tuple[Callable[[], argparse.ArgumentParser], tuple[str, ...]]] = {
    "gpu": (gpu.arguments, ()),
    "gpu_wheels": (gpu_wheels.arguments, ()),
    "gpu_report": (gpu_report.arguments, ()),
    "gpu_fake": (gpu_fake.arguments, ()),
    "common": (lambda: common.parser(""), ()),
    "gpu_worker": (of_worker, ()),
    "gpu_step": (gpu_step.arguments, ("common", "gpu_worker")),
    "kernels": (kernels.arguments, ("common", "gpu_worker")),
    "gpu_profile": (gpu_profile.arguments, ("common", "gpu_worker")),
    "dispatch": (dispatch.arguments, ("common", "gpu_worker")),
    "classes": (classes.arguments, ("common",)),
    "heatmap": (heatmap.arguments, ("common",)),
}
EFFECTS: dict[tuple[str, str], Callable[..., None]] = {}


def options_of(script: str) -> list[str]:
    """A script's own options."""
    make, shared = SCRIPTS[script]
    theirs = [o for other in shared for o in options_of(other)]
    found = [action.option_strings[-1] for action in make()._actions if action.option_strings]
    return [o for o in found if o != "--help" and o not in theirs]


def effect(script: str, *options: str) -> Callable[[Callable], Callable]:
    """The function shows what these options do; it may ask for ``lab``'s fixtures by name."""

    def register(function: Callable) -> Callable:
        EFFECTS.update({(script, option): function for option in options})
        return function

    return register


@pytest.mark.parametrize(("script", "option"), [(script, option) for script in SCRIPTS for option in options_of(script)])
def test_an_option(script, option, monkeypatch, tmp_path, capsys):
    assert (script, option) in EFFECTS, f"{script}.py has an option {option} that no test knows: show here what it does"
    function = EFFECTS[script, option]
    fixtures = {"monkeypatch": monkeypatch, "tmp_path": tmp_path, "capsys": capsys, "option": option}
    function(**{name: fixtures[name] for name in function.__code__.co_varnames[: function.__code__.co_argcount]})


def test_no_effect_of_an_option_that_is_gone():
    assert set(EFFECTS) == {(script, option) for script in SCRIPTS for option in options_of(script)}


# ---- gpu.py --------------------------------------------------------------------------------------------------


def commands(*arguments: str) -> list[str]:
    """What the workers of a real run are told."""
    return [" ".join(worker.command) for worker in gpu.workers(gpu.parse(arguments))]


def run_of(tmp_path: Path, *arguments: str) -> gpu.Run:
    found = gpu.Run(gpu.parse(["--out", str(tmp_path / "out"), *arguments]), tmp_path)
    found.environment = {"slug": "stub", "commit": "none", "date": ""}
    return found


@effect("gpu", "--out")
def goes_to_the_folder(tmp_path):
    assert run_of(tmp_path).path(".json") == tmp_path / "out" / "stub-none.json"


@effect("gpu", "--dry-run")
def runs_on_the_cpu(tmp_path):
    dry = run_of(tmp_path, "--dry-run")
    assert dry.device == "cpu"
    assert gpu.FAKE in dry.options.only
    assert dry.path(".json").name == "dry-run-stub-none.json"
    assert all(command.endswith("--device cpu") for command in commands("--dry-run"))
    assert run_of(tmp_path).device == "cuda"
    assert all(command.endswith("--device cuda") for command in commands())


@effect("gpu", "--resume")
def takes_up_what_is_there(tmp_path, monkeypatch):
    asked = []

    class FoundError(Exception):
        """What is found is tests/test_gpu_resume.py's."""

    def find(places, mine):
        asked.append(places)
        raise FoundError

    monkeypatch.setattr(gpu.gpu_resume, "find", find)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "committed")
    environment = SimpleNamespace(finish=lambda seconds: gpu.OK, lines=['{"slug": "stub", "commit": "none"}'])
    monkeypatch.setattr(gpu.Run, "start", lambda *_, **__: environment)
    for arguments in (["--resume"], ["--resume", str(tmp_path)]):
        with pytest.raises(FoundError):
            gpu.environment(run_of(tmp_path, *arguments))
    assert asked == [[tmp_path / "out", tmp_path / "committed"], [tmp_path]]


@effect("gpu", "--minutes")
def is_the_whole_time(tmp_path):
    found = run_of(tmp_path, "--minutes", "2")
    assert found.total == 120
    assert found.limit("tests") == pytest.approx(120 * gpu.SHARES["tests"], abs=1)
    assert 119 < found.left() <= 120


@effect("gpu", "--seconds")
def is_the_time_of_a_part(tmp_path, capsys):
    found = run_of(tmp_path, "--seconds", "tests=33", "sanitizer=44", "kernels=100")
    assert (found.limit("tests"), found.limit("sanitizer")) == (33, 44)
    workers = gpu.workers(found.options)
    kernel = [worker for worker in workers if worker.kind == "kernels"]
    assert sum(worker.seconds for worker in kernel) == sum(worker.most for worker in kernel) == pytest.approx(100)
    assert next(worker for worker in workers if worker.kind == "steps").most is None
    for wrong in ("lunch=3", "tests", "tests=soon"):
        with pytest.raises(SystemExit):
            gpu.parse(["--seconds", wrong])
        assert "is no PART=SECONDS; the parts are install, launches, tests" in capsys.readouterr().err


@effect("gpu", "--only")
def runs_only_these(tmp_path, monkeypatch, capsys):
    assert {worker.kind for worker in gpu.workers(gpu.parse(["--only", "kernels", "classes"]))} == {"kernels", "classes"}
    assert gpu.start_launches(run_of(tmp_path, "--only", "kernels")) is None
    with pytest.raises(SystemExit):
        gpu.parse(["--only", gpu.FAKE])
    assert "--only fake needs --dry-run" in capsys.readouterr().err
    assert gpu.parse(["--dry-run", "--only", gpu.FAKE]).only == [gpu.FAKE]


@effect("gpu", "--profile", "--zennit")
def adds_a_worker(option):
    kind = {"--profile": "profile", "--zennit": "heatmap"}[option]
    arguments = [option, "folder"] if option == "--zennit" else [option]
    assert kind not in {worker.kind for worker in gpu.workers(gpu.parse([]))}
    (worker,) = (worker for worker in gpu.workers(gpu.parse(arguments)) if worker.kind == kind)
    assert "folder" in worker.command or option == "--profile"


@effect("gpu", "--authors")
def goes_to_steps_in_tf32():
    told = [command for command in commands("--authors", "folder") if "--authors folder" in command]
    assert told == [command for command in told if "--precision tf32" in command]
    assert len(told) == 5


@effect("gpu", "--batch")
def goes_to_all_but_kernels():
    assert {"--batch 7" in command for command in commands("--batch", "7", "--profile") if ".kernels " not in command} == {True}


@effect("gpu", "--kernel-args", "--dispatch-args", "--step-args")
def goes_to_the_benchmark(option):
    module = {"--kernel-args": ".kernels ", "--dispatch-args": ".dispatch ", "--step-args": ".gpu_step "}[option]
    for dry in ([], ["--dry-run"]):
        assert {module in command for command in commands(f"{option}=--rounds 7", *dry) if "--rounds 7" in command} == {True}


@effect("gpu", "--wheels")
def knows_the_commit(tmp_path):
    (tmp_path / gpu_wheels.RECORD).write_text(json.dumps({"commit": "abc1234", "everything": gpu_wheels.of_everything()}))
    assert run_of(tmp_path, "--wheels", str(tmp_path)).variables()["FISNET_COMMIT"] == "abc1234"


@effect("gpu", "--tests", "--test-args")
def goes_to_pytest(tmp_path, monkeypatch):
    started = []

    def start(run, name, command, **_):
        started.append(command)
        return SimpleNamespace(finish=lambda seconds: gpu.OK, seconds=1.0)

    monkeypatch.setattr(gpu.Run, "start", start)
    gpu.tests(run_of(tmp_path, "--tests", "tests/some.py", "--test-args=-x -k loss"))
    (command,) = started
    assert "tests/some.py" in command
    assert [*command[command.index("-x") :]][:3] == ["-x", "-k", "loss"]


@effect("gpu", "--at-once", "--logs")
def reaches_the_run(tmp_path, monkeypatch):
    seen = {}

    class Preparing(gpu.Preparing):
        def __init__(self, run, at_once):
            seen.update(at_once=at_once, folder=run.folder)
            raise SystemExit

    monkeypatch.setattr(gpu, "environment", lambda run: True)
    monkeypatch.setattr(gpu, "Preparing", Preparing)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--only", "steps", "--at-once", "3", "--logs", str(tmp_path / "logs")])
    assert seen == {"at_once": 3, "folder": tmp_path / "logs"}
    assert (tmp_path / "logs").is_dir()


# ---- wheels, the report, the fake run ------------------------------------------------------------------------


@effect("gpu_wheels", "--out", "--python", "--own-only")
def makes_wheels(tmp_path, monkeypatch):
    ran = []

    def run(command, **_):
        ran.append(command)
        if "wheel" in command:
            import zipfile

            with zipfile.ZipFile(tmp_path / "wheels" / "fisnet_cuda-0.whl", "w") as wheel:
                wheel.writestr("a.so", "")

    monkeypatch.setattr(gpu_wheels.subprocess, "run", run)
    monkeypatch.setattr(gpu_wheels, "_git_commit", lambda: "abc1234")
    arguments = ["--out", str(tmp_path / "wheels"), "--python", "3.13"]
    assert gpu_wheels.main([*arguments, "--own-only"]) == 0
    assert len(ran) == 1
    gpu_wheels.main(arguments)
    assert "--python-version=3.13" in ran[-1]
    assert gpu_wheels.record(tmp_path / "wheels")["commit"] == "abc1234"


@effect("gpu_report", "--device")
def describes_the_device(monkeypatch, capsys):
    monkeypatch.setattr(gpu_report, "describe", lambda device: {"device": device})
    gpu_report.main(["--device", "cpu"])
    gpu_report.main([])
    assert capsys.readouterr().out.splitlines() == ['{"device": "cpu"}', '{"device": "cuda"}']


@effect("gpu_fake", "--only", "--batch", "--trace")
def fakes_what_is_asked(monkeypatch, capsys):
    def parse(*arguments):
        return gpu_fake.arguments().parse_args(arguments)

    every = list(gpu_fake.plan(parse()))
    assert {"machine", "launches", "dispatch", "resnet50 at 224, bf16", "kernels 4/4", "classes", "profile", "heatmap"} <= set(every)
    assert list(gpu_fake.plan(parse("--only", "kernels 1", "at 28, bf16"))) == ["resnet18 at 28, bf16", "kernels 1/4"]
    told = []
    monkeypatch.setattr(gpu_fake, "_worker", lambda command: told.append(command) or Report("", "", {}, STUB, {}, [{}]))
    gpu_fake.plan(parse("--batch", "7"))["profile"]()
    assert "--batch 7" in " ".join(told[0])

    def broken():
        raise ValueError("no such shape")

    monkeypatch.setattr(gpu_fake, "plan", lambda options: {"some case": broken})
    assert gpu_fake.run(parse()) == 1
    assert "FAILED  some case: ValueError: no such shape" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no such shape"):
        gpu_fake.run(parse("--trace"))


# ---- what all benchmarks share -------------------------------------------------------------------------------


@effect("common", "--quick")
def is_tiny(monkeypatch):
    seen = []
    for module in (gpu_step, kernels, gpu_profile, dispatch):
        monkeypatch.setattr(module, "run", lambda options, *_: seen.append(options) or Report("", "", {"made_up": True}, STUB, {}))
    monkeypatch.setattr(gpu_worker, "finish", lambda *_: 0)
    for module in (gpu_step, kernels, gpu_profile, dispatch):
        module.main(["--quick"])
    monkeypatch.setattr(common, "finish", lambda *_: 0)
    for module in (classes, heatmap):
        monkeypatch.setattr(module, "run", lambda options, *_: seen.append(options))
        module.main(["--quick"])
    step, kernel, profiled, chosen, grown, heat = seen
    assert (step.model, step.batch, step.compiler, profiled.model, chosen.models) == ("small", 2, "aot_eager", "small", ["small"])
    assert kernel.tiny
    assert (grown.models, grown.classes, heat.models) == (["small"], [2, 10], ["small"])


@effect("common", "--out")
def is_the_folder(tmp_path, capsys):
    options = common.parser("").parse_args(["--out", str(tmp_path)])
    options.part = None
    gpu_worker.finish(Report("test", "", {}, {**STUB, "cores": 1, "threads": 1, "date": ""}, {"a": str}), options)
    assert (tmp_path / "test-stub.json").exists()


@effect("common", "--device", "--precision", "--layout", "--threads")
def is_the_setting(monkeypatch):
    p = common.parser("")
    options = p.parse_args(["--device", "cuda", "--precision", "bf16", "--layout", "contiguous", "--threads", "1"])
    options.batch, options.size = 2, 32
    setup = common.setup_of(options, model="small")
    assert (setup.device, setup.precision, setup.layout) == ("cuda", "bf16", "contiguous")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="this PyTorch sees no GPU"):
        common.prepare(options)
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    common.prepare(p.parse_args(["--threads", "3"]))
    assert threads == [3]


def turn_of(*arguments: str) -> gpu_worker.Turn:
    return gpu_worker.Turn(of_worker().parse_args(arguments), Report("test", "", {}, STUB, {}))


@effect("gpu_worker", "--part", "--earlier")
def reads_and_writes_rows(tmp_path):
    (tmp_path / "earlier.json").write_text('[{"case": "a"}]')
    turn = turn_of("--part", str(tmp_path / "part.json"), "--earlier", str(tmp_path / "earlier.json"))
    assert turn.known(case="a")
    turn.save()
    assert json.loads((tmp_path / "part.json").read_text())["rows"] == []


@effect("gpu_worker", "--wait", "--seconds")
def waits_for_its_turn(monkeypatch, capsys):
    turn_of("--seconds", "3").wait()
    assert "READY" not in capsys.readouterr().out
    turn = turn_of("--wait", "--seconds", "3")
    assert turn.left < 3
    monkeypatch.setattr(gpu_worker.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(readline=lambda: "go 70\n"))
    turn.wait()
    assert "READY" in capsys.readouterr().out
    assert turn.seconds == 70


@effect("gpu_worker", "--until")
def ends_preparing():
    turn = turn_of("--until", str(time.time() - 1))
    assert turn.attempt("late", lambda: time.sleep(20)) is None
    assert turn.report.missing == ["late: preparing it took longer than there was time"]


# ---- steps ---------------------------------------------------------------------------------------------------


def step_options(*arguments: str) -> argparse.Namespace:
    return gpu_step.arguments().parse_args(arguments)


@effect("gpu_step", "--model", "--classes", "--batch", "--size")
def is_the_network(monkeypatch):
    seen = []
    monkeypatch.setattr(gpu_step, "_prepared", lambda options, report, turn, setup: seen.append(setup) or {})
    monkeypatch.setattr(gpu_worker, "emulating", lambda device: contextlib.nullcontext(""))
    gpu_step.run(step_options("--model", "vgg16_bn", "--classes", "7", "--batch", "5", "--size", "48"))
    (setup,) = seen
    assert (setup.model, setup.classes, setup.batch, setup.size) == ("vgg16_bn", 7, 5, 48)


@effect("gpu_step", "--cases", "--compiler", "--compiled", "--graphs", "--authors")
def takes_part():
    def keys(*arguments):
        return [c.key for c in gpu_step.wanted(step_options(*arguments))]

    assert keys("--cases", "dual", "--compiler", "none") == ["plain", "dual", "dual_library"]
    assert keys("--cases", "dual", "--compiled", "1")[-1] == "plain_compiled"
    assert sum(key.endswith("_compiled") for key in keys("--compiled", "4")) == 4
    assert [key for key in keys("--graphs", "--compiler", "none") if key.endswith("_graph")] == [
        "plain_graph", "selective_graph", "selective_library_graph",
    ]  # fmt: skip
    assert keys("--authors", "folder")[-1] == "authors"
    assert keys()[:3] == ["plain", "selective", "stochastic"], "the most valuable first"


@effect("gpu_step", "--rounds", "--warmup")
def is_timed_so_often(monkeypatch):
    seen = []

    def interleave(steps, rounds, warmup, *_, **__):
        seen.append((list(steps), rounds, warmup))
        return Times({name: [1.0] for name in steps})

    monkeypatch.setattr(common, "interleave", interleave)
    options = step_options("--rounds", "12", "--warmup", "5")
    made = {key: gpu_step.Made(gpu_step.Contestant(key), lambda: None, 0, 1.0) for key in ("plain", "original")}
    turn = gpu_worker.Turn(options, Report("step", "", {}, STUB, {}))
    gpu_step._measure(options, turn.report, turn, common.setup_of(options, model="small"), made)
    assert seen == [(["plain"], 12, 5), (["plain", "original"], 3, 5)]


# ---- kernels -------------------------------------------------------------------------------------------------


def kernel_options(*arguments: str) -> argparse.Namespace:
    return kernels.arguments().parse_args(arguments)


@effect("kernels", "--cases", "--dtypes", "--share")
def chooses_cases():
    chosen = kernels.selected(kernel_options("--cases", "ratio", "--dtypes", "fp64", "fp16"))
    assert {(case.kernel.removesuffix("_backward"), dtype) for case, dtype in chosen} == {("ratio", "fp64"), ("ratio", "fp16")}
    shares = [kernels.selected(kernel_options("--cases", "ratio", "--share", f"{i}/2")) for i in (1, 2)]
    assert [len(share) for share in shares] == [3, 3]
    for i in range(1, 5):  # each share begins with what is most valuable, and ends with what is least
        values = [case.rank + ("bf16", "fp32").index(dtype) for case, dtype in kernels.selected(kernel_options("--share", f"{i}/4"))]
        assert values == sorted(values)
        assert (values[0], values[-1]) == (0, 3)


@effect("kernels", "--tiny", "--compiler")
def makes_a_contest(monkeypatch):
    made = []

    def contest(case, dtype, device, compiler):
        made.append((case.sizes.N, compiler))
        return SimpleNamespace(is_kernel=True, problem=lambda: "")

    monkeypatch.setattr(kernels, "Contest", contest)
    case = all_cases()[0]
    for arguments in (["--compiler", "none"], ["--tiny", "--compiler", "eager"]):
        kernels._checked(kernel_options(*arguments), Report("", "", {}, STUB, {}), case, "fp32")
    assert made == [(case.sizes.N, "none"), (2, "eager")]


@effect("kernels", "--rounds", "--least-rounds", "--warmup")
def is_measured_so_often():
    case = next(kernels.shrink(case) for case in all_cases() if case.name == "ratio")
    contest = kernels.Contest(case, "fp32", "cpu", "none")

    def rounds(seconds, *arguments):
        clock = kernels.Clock("cpu")
        calls, right = [], clock.round
        clock.round = lambda steps: calls.append(1) or right(steps)
        report = Report("", "", {}, STUB, {})
        kernels._row(kernel_options(*arguments), report, clock, contest, seconds)
        return len(calls), report.rows[0]["rounds"]

    assert rounds(60, "--rounds", "9", "--warmup", "4") == (13, 9)
    assert rounds(0, "--rounds", "9", "--least-rounds", "5", "--warmup", "1") == (6, 5)


# ---- profile -------------------------------------------------------------------------------------------------


@effect("gpu_profile", "--model", "--case", "--batch", "--size", "--steps", "--top")
def is_profiled(monkeypatch):
    setups, steps = [], []

    class Step:
        def __init__(self, case, setup):
            setups.append((case, setup.model, setup.batch, setup.size))

        def __call__(self):
            steps.append(1)

    class Profile(gpu_fake.Profile):
        def __enter__(self):
            steps.clear()
            return self

        def key_averages(self):
            return [SimpleNamespace(key=str(i), count=14, self_cpu_time_total=1e3 * i) for i in range(9)]

    monkeypatch.setattr(gpu_profile, "TrainingStep", Step)
    monkeypatch.setattr(gpu_profile, "profile", Profile)
    monkeypatch.setattr(gpu_worker, "emulating", lambda device: contextlib.nullcontext(""))
    monkeypatch.setattr(choices, "decide", lambda *_: None)
    arguments = ["--model", "vgg16_bn", "--case", "dual", "--batch", "3", "--size", "48", "--steps", "7", "--top", "4"]
    report = gpu_profile.run(gpu_profile.arguments().parse_args(arguments))
    assert setups == [("dual", "vgg16_bn", 3, 48)]
    assert len(steps) == 7
    assert [row["kernel"] for row in report.rows] == ["8", "7", "6", "5"]
    assert report.rows[0]["launches"] == 2


# ---- dispatch ------------------------------------------------------------------------------------------------


@effect("dispatch", "--models", "--cases", "--classes", "--batch", "--size", "--cache", "--first")
def decides(monkeypatch, tmp_path, capsys):
    seen = []

    class Net:
        def __init__(self, options, report, turn, timer, model, case):
            self.label, self.report = f"{model}, {case}", report
            self.sizes = (options.classes, options.batch, options.size)

        def decided(self, seconds):
            seen.append(("decided", self.label, 0 < seconds <= 5))

        def measure(self):
            seen.append((self.label, self.sizes, choices.dispatcher().cache.path))

    monkeypatch.setattr(dispatch, "Net", Net)
    monkeypatch.setattr(gpu_worker, "emulating", lambda device: contextlib.nullcontext(""))
    arguments = ["--models", "small", "vgg16_bn", "--cases", "dual", "--classes", "7", "--batch", "3", "--size", "48"]
    arguments += ["--cache", str(tmp_path / "choices.json"), "--first", "5"]
    dispatch.run(dispatch.arguments().parse_args(arguments))
    cached = (7, 3, 48), tmp_path / "choices.json"
    assert seen == [
        ("decided", "small, dual", True), ("decided", "vgg16_bn, dual", True), ("small, dual", *cached), ("vgg16_bn, dual", *cached),
    ]  # fmt: skip
    assert gpu_worker.ALONE in capsys.readouterr().out


# ---- classes and heatmap, by themselves and in turn ----------------------------------------------------------


@effect("classes", "--models", "--classes", "--batch", "--size", "--rounds", "--warmup", "--original-rounds", "--original-seconds")
def grows(monkeypatch):
    made, timed = [], []

    class Step:
        def __init__(self, case, setup):
            made.append((case, setup.model, setup.classes, setup.batch, setup.size))

        def __call__(self):
            time.sleep(0.01)

    def interleave(steps, rounds, warmup, *_, **__):
        timed.append((len(steps), rounds, warmup))
        return Times({name: [1.0] for name in steps})

    monkeypatch.setattr(classes, "TrainingStep", Step)
    monkeypatch.setattr(classes.verify, "training_cases", lambda *_: {})
    monkeypatch.setattr(common, "interleave", interleave)
    arguments = ["--models", "small", "--classes", "3", "5", "1000", "--batch", "2", "--size", "48", "--rounds", "9", "--warmup", "3"]
    options = classes.arguments().parse_args([*arguments, "--original-rounds", "4", "--original-seconds", "1"])
    report = classes.run(options)
    assert {(model, batch, size) for _, model, _, batch, size in made} == {("small", 2, 48)}
    assert {count for _, _, count, _, _ in made} == {3, 5, 1000}
    assert timed == [(15, 9, 3), (4, 4, 3)], "Original at 1000 classes is left out"
    assert any("Original is not measured at 1000 classes" in note for note in report.notes)


@effect("heatmap", "--models", "--classes", "--batch", "--size", "--rounds", "--warmup", "--path")
def explains(monkeypatch, tmp_path):
    setups, timed = [], []

    def competitors(report, setup, stack):
        setups.append((setup.model, setup.classes, setup.batch, setup.size))
        return dict.fromkeys((heatmap.FORWARD, *heatmap.OURS), lambda: None)

    def interleave(steps, rounds, warmup, *_, **__):
        timed.append((rounds, warmup, str(tmp_path) in sys.path))
        return Times({name: [1.0] for name in steps})

    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(heatmap, "_competitors", competitors)
    monkeypatch.setattr(heatmap.verify, "heatmaps", lambda setup: "")
    monkeypatch.setattr(common, "interleave", interleave)
    monkeypatch.setattr(common, "finish", lambda report, *_: len(report.rows))
    arguments = ["--models", "small", "vgg16_bn", "--classes", "7", "--batch", "3", "--size", "48", "--rounds", "9", "--warmup", "2"]
    assert heatmap.main([*arguments, "--path", str(tmp_path)]) == 6
    assert setups == [("small", 7, 3, 48), ("vgg16_bn", 7, 3, 48)]
    assert timed == [(9, 2, True)] * 2


def test_a_benchmark_that_takes_turns_has_a_workers_options(monkeypatch, tmp_path):
    """`benchmarks.gpu_turn`: rows are written as they come, and the turn's seconds reach the benchmark."""
    seen = []

    def run(options, told, seconds):
        report = Report("classes", "", {}, STUB, {})
        report.add(case="plain", model="small", classes=3, ms={"p50": 1.0})
        told(report)
        seen.append((len(json.loads((tmp_path / "part.json").read_text())["rows"]), seconds, options.classes))
        return report

    monkeypatch.setattr(classes, "run", run)
    monkeypatch.setattr(gpu_worker, "emulating", lambda device: contextlib.nullcontext(""))
    assert gpu_turn.main(["classes", "--classes", "3", "--part", str(tmp_path / "part.json"), "--seconds", "7"]) == 0
    assert seen == [(1, 7.0, [3])]
    with pytest.raises(SystemExit, match="which benchmark"):
        gpu_turn.main([])


def test_why_there_is_no_fake_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "this torch has CUDA" in fake_gpu.needs()
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(fake_gpu.shutil, "which", lambda name: None)
    assert "g++ is missing" in fake_gpu.needs()
