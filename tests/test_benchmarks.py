"""The benchmarks run and write what they promise; no test looks at how long anything took."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("pytest_benchmark")

from benchmarks import cases, common, models, run_all, verify
from benchmarks.cases import CASES, DOUBLE_BACKWARD, Setup, TrainingStep
from benchmarks.common import Bar, Report, Spread, Times, cell

ROOT = Path(__file__).resolve().parents[1]
PERCENTILES = {"p20", "p50", "p80"}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """``run_all.py --quick``, which runs every benchmark's own quick mode, each in a process of its own."""
    out = tmp_path_factory.mktemp("benchmarks")
    return out, command("benchmarks/run_all.py", "--quick", "--out", str(out))


@pytest.mark.slow
class TestQuickRun:
    def test_ends_well_with_tables_paths_and_targets(self, quick):
        out, run = quick
        assert run.returncode == 0, run.stderr
        assert "Targets:" in run.stdout
        assert "| " in run.stdout
        for path in out.iterdir():
            assert str(path) in run.stdout
        assert "100%" in run.stderr

    @pytest.mark.parametrize("name", run_all.NAMES)
    def test_writes_table_figure_and_rows(self, quick, name):
        out, _ = quick
        paths = [common.result_path(name, common.cpu_name(), out, suffix) for suffix in run_all.SUFFIXES]
        assert paths[1].read_text().startswith("## ")
        assert paths[2].read_bytes().startswith(b"\x89PNG")
        content = json.loads(paths[0].read_text())
        assert content["rows"]
        assert not content["wrong"]
        for row in content["rows"]:
            assert {"device", "torch", "fisnet_cuda", "commit"} <= row.keys()
            measured = row.get("ms") or row["peak_mib"]
            assert measured.keys() == PERCENTILES
            assert 0 < measured["p20"] <= measured["p50"] <= measured["p80"] < math.inf

    def test_nothing_is_judged_by_quick_settings(self, quick):
        out, _ = quick
        verdicts = [bar["verdict"] for path in out.glob("*.json") for bar in json.loads(path.read_text())["bars"]]
        assert verdicts
        assert set(verdicts) == {common.NOT_JUDGED}

    def test_step_shows_the_peaks_of_memory(self, quick):
        out, _ = quick
        content = json.loads(common.result_path("step", common.cpu_name(), out, ".json").read_text())
        assert {row["case"] for row in content["rows"] if "peak_mib" in row} == {"plain", "selective"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*run_all.NAMES, "dispatch", "gpu_step", "gpu_profile", "kernels"])
def test_runs_as_a_file_too(name):
    run = command(f"benchmarks/{name}.py", "--help")
    assert run.returncode == 0, run.stderr
    assert "--quick" in run.stdout


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet18", 11_689_512), ("resnet50", 25_557_032), ("densenet121", 7_978_856), ("vgg16_bn", 138_365_992)],
)
def test_networks_have_as_many_parameters_as_torchvisions(name, parameters):
    with torch.device("meta"):
        model = models.build(name, 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters


class TestCases:
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("update", [True, False])
    def test_a_step_reaches_every_parameter(self, case, update):
        step = TrainingStep(case, Setup("small", classes=3, batch=2, size=32), update=update)
        before = [p.detach().clone() for p in step.parameters]
        step()
        assert all(p.grad.abs().sum() > 0 for p in step.parameters)
        same = [torch.equal(p, b) for p, b in zip(step.parameters, before)]
        assert all(same) is not update

    @pytest.mark.parametrize("precision", cases.AUTOCAST)
    def test_a_step_under_autocast(self, precision):
        step = TrainingStep("selective", Setup("small", classes=3, batch=2, size=32, precision=precision))
        with step.setup.autocast():
            assert step.net(step.images).dtype == cases.AUTOCAST[precision]
        step()
        assert all(p.grad.isfinite().all() for p in step.parameters)

    def test_every_variant_agrees_with_the_baseline(self):
        setup = Setup("small", classes=3)
        assert verify.training_cases(setup, CASES) == {}
        assert verify.heatmaps(setup) == ""

    def test_a_wrong_result_is_noticed(self, monkeypatch):
        right = verify.explainer

        def other_epsilon(case, model, **options):
            return right(case, model, **options, eps=1e-2 if case == DOUBLE_BACKWARD else 2e-2)

        monkeypatch.setattr(verify, "explainer", other_epsilon)
        wrong = verify.training_cases(Setup("small", classes=3), ["plain", "selective", "dual"])
        assert wrong.keys() == {"selective", "dual"}
        assert "heatmaps" in wrong["selective"]
        assert "logits" not in wrong["selective"]
        assert verify.heatmaps(Setup("small", classes=3))

    @pytest.mark.parametrize(("field", "value"), [("layout", "nchw"), ("precision", "fp8"), ("model", "resnet19")])
    def test_wrong_settings_are_named(self, field, value):
        with pytest.raises(ValueError, match=value):
            Setup(**{"model": "small", field: value}).network()


class TestTiming:
    def test_competitors_take_turns_and_warm_up_is_not_counted(self):
        order = []
        steps = {name: lambda name=name: order.append(name) for name in "abc"}
        times = common.interleave(steps, rounds=3, warmup=2, device="cpu", label="turns")
        assert "".join(order) == "abc" * 5
        assert [len(times.ms[name]) for name in "abc"] == [3, 3, 3]

    def test_milliseconds(self):
        times = common.interleave({"sleep": lambda: time.sleep(0.02)}, 1, 0, "cpu", "sleep")
        assert times.spread("sleep").p50 >= 20

    def test_ratio_is_taken_within_rounds(self):
        drifting = Times({"plain": [1.0, 2.0, 4.0], "ours": [2.0, 4.0, 8.0]})
        assert drifting.ratio("ours", "plain") == (2.0, 2.0, 2.0)


class TestReport:
    @pytest.mark.parametrize(
        ("value", "options", "verdict"),
        [
            (Spread(2.0, 2.3, 2.9), {}, "PASS"),
            (Spread(2.0, 2.4, 2.9), {}, "FAIL"),
            (Spread(2.0, 2.4, 2.9), {"by": "p20"}, "PASS"),
            (Spread(2.0, 2.4, 2.9), {"judged": False}, common.NOT_JUDGED),
            (None, {}, "FAIL"),
        ],
    )
    def test_verdict(self, value, options, verdict):
        bar = Bar("step", value, 2.3, **options)
        assert bar.verdict == verdict
        assert bar.line().startswith(verdict)
        assert json.loads(json.dumps(bar.as_dict()))["line"] == bar.line()

    def test_only_the_protocol_of_the_targets_is_judged(self, monkeypatch):
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        assert common.is_protocol(Setup("resnet18"))
        assert not common.is_protocol(Setup("resnet18", size=224))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        assert not common.is_protocol(Setup("resnet18"))

    def test_a_dropped_case_is_reported_and_ends_with_1(self, tmp_path, capsys):
        options = common.parser("").parse_args(["--out", str(tmp_path)])
        report = Report("test", "A question", {}, common.environment("cpu"), {"case": cell("case")})
        report.add(case="plain", ms=Spread(1, 2, 3))
        report.drop("selective", "heatmaps differ")
        assert common.finish(report, options, lambda report, path: path.write_bytes(b"")) == 1
        assert "heatmaps differ" in capsys.readouterr().out

    def test_results_name_no_folders(self):
        options = common.parser("").parse_args(["--out", "elsewhere"])
        assert "elsewhere" not in json.dumps(common.settings_of(options))
        assert str(ROOT) not in json.dumps(common.environment("cpu"))


class TestRunAll:
    @pytest.fixture
    def run(self, tmp_path, monkeypatch):
        """`run_all.main` with benchmarks that only write a file with one bar, or end with an exit code."""

        def start(verdict: str, code: int, *arguments: str) -> int:
            def fake(command, **_):
                name = command[2].removeprefix("benchmarks.")
                for suffix in run_all.SUFFIXES:
                    path = common.result_path(name, common.cpu_name(), tmp_path, suffix)
                    path.write_text(json.dumps({"bars": [{"line": f"{verdict}  {name}"}]}))
                return subprocess.CompletedProcess(command, code)

            monkeypatch.setattr(run_all.common, "environment", lambda device: {})
            monkeypatch.setattr(run_all.subprocess, "run", fake)
            return run_all.main(["--only", "step", "--out", str(tmp_path), *arguments])

        return start

    def test_missed_targets_decide_only_when_strict(self, run, capsys):
        assert run("FAIL", 0) == 0
        assert "FAIL  step" in capsys.readouterr().out
        assert run("FAIL", 0, "--strict") == 1
        assert run("PASS", 0, "--strict") == 0

    def test_a_broken_benchmark_always_decides(self, run, capsys):
        assert run("PASS", 1) == 1
        assert "BROKEN  step" in capsys.readouterr().out
