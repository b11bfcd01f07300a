"""What all experiments stand on: jobs and their files, tables, measures, batches, the training loop."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks.experiments import fit as fitting
from benchmarks.experiments.command import in_one_line, parse, parser
from benchmarks.experiments.fit import fit
from benchmarks.experiments.jobs import read_rows, rows_of, run_jobs, unfinished, write_rows
from benchmarks.experiments.measure import accuracy, auroc, share
from benchmarks.experiments.systems import Setting, Stage, System, build
from benchmarks.experiments.tables import by, deviation, mean_spread, table, values, write_page
from benchmarks.experiments.tasks import Images, Task, batches, epoch_steps
from fisnet_cuda.errors import InputError

JOBS = [{"system": "a", "seed": seed, "lr": 0.1, "deep": False} for seed in range(3)]
CALLS = []


def run(job, given):
    """A job: module-level, so that processes of their own find it."""
    CALLS.append(job["seed"])
    if job["seed"] == given.get("fails"):
        raise given.get("error", OSError)("no luck")
    return {"accuracy": 90.0 + job["seed"] / 3, "diverged": False}


@pytest.fixture(autouse=True)
def calls():
    CALLS.clear()
    return CALLS


class TestJobs:
    def test_what_is_in_the_file_is_not_run_again(self, tmp_path, calls):
        path = tmp_path / "x.csv"
        assert [row["seed"] for row in run_jobs(path, JOBS[:2], run, processes=1)] == [0, 1]
        rows = run_jobs(path, JOBS[::-1], run, processes=1)
        assert calls == [0, 1, 2]
        assert [row["seed"] for row in rows] == [2, 1, 0], "in the jobs' order"
        assert [row["accuracy"] for row in rows] == pytest.approx([90 + 2 / 3, 90 + 1 / 3, 90], rel=1e-5)
        text = path.read_bytes()
        run_jobs(path, [{**JOBS[0], "lr": 0.2}], run, processes=1)
        assert path.read_bytes().startswith(text), "rows of other jobs stay"
        assert calls == [0, 1, 2, 0]

    @pytest.mark.parametrize("value", [0.1 + 0.2, 1 / 3, 1e-7, 3e20, 2.0, 5, "007", "text", "", True])
    def test_values_are_found_again_as_they_read_back(self, tmp_path, calls, value):
        job = [{"seed": 0, "value": value}]
        assert len(run_jobs(tmp_path / "x.csv", job, run, processes=1)) == 1
        assert len(run_jobs(tmp_path / "x.csv", job, run, processes=1)) == 1
        assert calls == [0]

    def test_a_failed_job_is_told_after_all_others_are_done(self, tmp_path, capsys):
        path = tmp_path / "x.csv"
        with pytest.raises(RuntimeError, match=r"1 of 3 jobs failed.*'seed': 1"):
            run_jobs(path, JOBS, run, {"fails": 1}, processes=1)
        assert [row["seed"] for row in read_rows(path)] == [0, 2]
        assert "failed: OSError: no luck" in capsys.readouterr().err
        assert [row["seed"] for row in run_jobs(path, JOBS, run, processes=1)] == [0, 1, 2]

    def test_the_users_own_error_stops_at_once(self, tmp_path, calls):
        with pytest.raises(InputError, match="no luck"):
            run_jobs(tmp_path / "x.csv", JOBS, run, {"fails": 0, "error": InputError}, processes=1)
        assert calls == [0]

    def test_columns_of_the_same_name_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="same names: lr"):
            run_jobs(tmp_path / "x.csv", JOBS, lambda job, given: {"lr": 1.0}, processes=1)
        assert not (tmp_path / "x.csv").exists()

    def test_a_job_has_as_many_threads_as_its_row_says(self, tmp_path):
        before, seen = torch.get_num_threads(), []
        run_jobs(tmp_path / "x.csv", JOBS[:1], lambda job, given: seen.append(torch.get_num_threads()) or {}, processes=1, threads=2)
        assert seen == [2]
        assert torch.get_num_threads() == before
        assert read_rows(tmp_path / "x.csv")[0]["threads"] == 2

    def test_a_folder_that_is_a_file_is_told_before_anything_runs(self, tmp_path, calls):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="is a file"):
            run_jobs(tmp_path / "file" / "x.csv", JOBS, run, processes=1)
        assert not calls

    def test_cells(self, tmp_path):
        row = {"a": 1, "b": 0.123456789, "c": None, "d": True, "e": "x, y", "f": math.nan, "commit": "12e4567", "torch": "2.13"}
        write_rows(tmp_path / "x.csv", [row, {"a": 2, "g": 5}])
        first, second = read_rows(tmp_path / "x.csv")
        assert math.isnan(first.pop("f"))
        expected = {"a": 1, "b": 0.123457, "c": None, "d": True, "e": "x, y", "commit": "12e4567", "torch": "2.13", "g": None}
        assert {key: value for key, value in first.items() if key != "c"} == {k: v for k, v in expected.items() if k != "c"}
        assert first.get("c") is None
        assert (second["a"], second["g"], second["b"]) == (2, 5, None)

    def test_rows_of_other_settings_are_left_out_and_missing_ones_counted(self, tmp_path):
        path = tmp_path / "x.csv"
        with pytest.raises(InputError, match=r"there is no such file; run the same command without --draw first"):
            rows_of(path, JOBS)
        write_rows(path, [{**JOBS[1], "lr": 0.3}, JOBS[1], JOBS[0]])
        rows = rows_of(path, JOBS)
        assert [(row["seed"], row["lr"]) for row in rows] == [(0, 0.1), (1, 0.1)]
        assert unfinished(rows, JOBS) == ["Not finished: 1 of 3 trainings are missing."]
        assert unfinished(rows, JOBS[:2]) == []
        with pytest.raises(InputError, match="none of its 3 rows"):
            rows_of(path, [{**JOBS[0], "lr": 9.0}])


class TestCommand:
    def test_the_command_on_a_page_has_what_results_hang_on(self, tmp_path):
        p = parser("", seeds=5)
        for arguments, expected in (
            ([], "m --data x"), (["--seeds", "5", "--out", str(tmp_path), "--processes", "2", "--draw"], "m --data x"),
            (["--full", "--seeds", "3", "--threads", "2"], "m --data x --full --seeds 3 --threads 2"),
        ):  # fmt: skip
            command = parse(p, arguments)[1].command("m", "--data x", "")
            assert command == f"python -m benchmarks.experiments.{expected}"

    def test_a_users_error_is_one_line(self, capsys):
        @in_one_line
        def main(arguments=None):
            raise InputError("a\n b")

        assert main([]) == 2
        assert capsys.readouterr().err == "test_frame: a b\n"


class TestTables:
    rows = ({"s": "x", "v": 1.0}, {"s": "y", "v": 5.0}, {"s": "x", "v": 3.0}, {"s": "x", "v": math.nan}, {"s": "x", "v": None})

    def test_groups_and_numbers(self):
        groups = by(self.rows, "s")
        assert list(groups) == [("x",), ("y",)]
        assert values(groups[("x",)], "v") == [1, 3]
        assert mean_spread(groups[("x",)], "v") == "2.0 (1.0-3.0)"
        assert mean_spread(groups[("y",)], "v", 2) == "5.00"
        assert mean_spread(groups[("y",)], "missing") == "-"
        assert deviation(groups[("x",)], "v") == pytest.approx(math.sqrt(2))
        assert values([{"v": True}], "v") == []

    def test_table(self):
        lines = table({"system": lambda g: g[0]["s"], "n": lambda g: str(len(g))}, list(by(self.rows, "s").values()))
        assert lines == ["| system | n |", "|--------|---|", "| x      | 4 |", "| y      | 1 |"]

    def test_page_tells_machine_seeds_and_what_diverged(self, tmp_path):
        facts = {"device": "CPU", "threads": 1, "torch": "2", "commit": "abc"}
        rows = [{"seed": 1, "diverged": True, **facts}, {"seed": 0, "diverged": False, **facts}]
        text = write_page(tmp_path / "x.md", "Why?", "python x", rows, ["body"], ["note"]).read_text()
        assert text.startswith("## Why?\n\n`python x`; CPU, 1 thread(s) a training; torch 2; commit abc; 2 rows in `x.csv`, ")
        assert text.endswith("- note\n- 1 of 2 rows are of trainings that diverged; their numbers are in the means.\n")


class TestMeasures:
    def test_accuracy_by_hand(self):
        assert accuracy(torch.tensor([[2.0, 1], [0, 1], [3, 4], [5, 4]]), torch.tensor([0, 1, 0, 1])) == 50

    def test_auroc_by_hand(self):
        # scores of 1: 3 and 1; of 0: 2, 1 and 0: of six pairs 3 wins thrice, 1 wins once and ties once
        logits = torch.tensor([[0.0, 3], [0, 1], [0, 2], [0, 1], [0, 0]])
        assert auroc(logits, torch.tensor([1, 1, 0, 0, 0])) == pytest.approx(100 * 4.5 / 6)
        assert auroc(logits - 7, torch.tensor([1, 1, 0, 0, 0])) == pytest.approx(100 * 4.5 / 6), "the difference of logits counts"
        assert math.isnan(auroc(logits, torch.ones(5, dtype=torch.int64)))

    def test_share_is_what_lies_outside_the_mask(self, task):
        system = build(Setting("standard", net="convnet"), task)
        everywhere, nowhere = (Images(task.val.images, task.val.labels, torch.full_like(task.val.masks, m)) for m in (1, 0))
        assert share(system, everywhere) == 0
        assert share(system, nowhere) == pytest.approx(100)
        left, right = task.val.masks.clone(), task.val.masks.clone()
        left[..., :12], left[..., 12:] = 1, 0
        right = 1 - left
        halves = [share(system, Images(task.val.images, task.val.labels, masks)) for masks in (left, right)]
        assert sum(halves) == pytest.approx(100)
        assert min(halves) > 1


@pytest.fixture(scope="module")
def task() -> Task:
    x = torch.rand(20, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    labels, masks = torch.arange(20) % 2, torch.zeros(20, 1, 24, 24)
    x[labels == 1, :, :12] += 0.5
    masks[..., 6:18, 6:18] = 1
    images = Images(x.clamp(max=1), labels, masks)
    return Task("halves", 2, images, images[slice(0, 8)], {"biased": images[slice(0, 8)]})


class TestTasks:
    def test_every_image_once_before_any_comes_again(self, task):
        numbered = Images(torch.arange(20.0).view(20, 1, 1, 1), torch.arange(20), torch.ones(20, 1, 1, 1))
        source = batches(Task("n", 20, numbered, numbered, {}), 8, seed=3)
        drawn = torch.cat([next(source).labels for _ in range(5)]).tolist()
        assert sorted(drawn[:20]) == sorted(drawn[20:]) == list(range(20))
        assert drawn[:20] != drawn[20:]
        again, other = (batches(Task("n", 20, numbered, numbered, {}), 8, seed) for seed in (3, 4))
        assert next(again).labels.tolist() == drawn[:8]
        assert next(other).labels.tolist() != drawn[:8]
        assert (epoch_steps(task, 8), epoch_steps(task, 50)) == (2, 1)

    def test_bytes_become_numbers_in_0_to_1(self):
        grey, white = (torch.full((2, 1, 2, 2), value, dtype=torch.uint8) for value in (51, 255))
        images = Images(grey, torch.zeros(2), white)
        found = images.floats()
        assert found.images.unique().tolist() == pytest.approx([0.2])
        assert found.masks.unique().tolist() == [1]
        with pytest.raises(ValueError, match="do not belong together"):
            Images(images.images, images.labels[:1], images.masks)


def weights(system: System) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in system.model.parameters()])


class TestFit:
    def test_a_seed_gives_the_same_net_and_another_one_another(self, task):
        first, again, other = (fit(Setting("stochastic", seed=s, steps=3, batch=8, P=0.5), task) for s in (1, 1, 2))
        assert torch.equal(weights(first.system), weights(again.system))
        assert not torch.equal(weights(first.system), weights(other.system))

    def test_all_systems_start_from_the_same_weights(self, task):
        standard, dual = (build(Setting(name, seed=4), task) for name in ("standard", "dual"))
        assert torch.equal(weights(standard), weights(dual))

    def test_measuring_on_the_way_changes_nothing_and_sees_every_epoch(self, task):
        seen = []

        def watch(system, rows):
            seen.append(rows)
            system.eval()
            torch.rand(3)
            return {"looked": 1.0}

        setting = Setting("standard", net="convnet_bn", steps=5, batch=8)
        watched, plain = fit(setting, task, watch), fit(setting, task)
        assert torch.equal(weights(watched.system), weights(plain.system))
        assert seen == [0, 1, 2]
        assert [row["step"] for row in watched.history] == [2, 4, 5]
        assert not watched.system.model.training

    def test_seconds_instead_of_steps(self, task, monkeypatch):
        time = [0.0]
        rates = []
        sgd = torch.optim.SGD

        class Spy(sgd):
            def step(self, *args, **kwargs):
                rates.append(self.param_groups[0]["lr"])
                time[0] += 1.0  # a step takes a second
                return super().step(*args, **kwargs)

        monkeypatch.setattr(fitting.torch.optim, "SGD", Spy)
        fitted = fit(Setting("standard", steps=0, seconds=4.0, batch=8, lr=0.1), task, clock=lambda: time[0])
        assert (fitted.steps, fitted.seconds) == (4, 4.0)
        assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * t / 4)) for t in range(4)])
        rates.clear()
        assert fit(Setting("standard", steps=4, batch=8, lr=0.1), task).steps == 4
        assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * t / 4)) for t in range(4)])

    def test_stages_follow_each_other_with_their_shares(self, task):
        fitted = fit(Setting("stochastic", steps=10, batch=8, tune=4), task)
        ends = {row["stage"]: row["step"] for row in fitted.history}
        assert ends == {"classifier alone": 4, "ISNet": 6}
        assert fitted.steps == 10
        assert (fitted.system.heatmap_loss.c1, fitted.system.heatmap_loss.c2) != (1, 25), "C1 and C2 were set on the way"

    def test_a_loss_that_is_not_finite_ends_the_training(self, task, monkeypatch):
        def loss(self, batch):
            total = sum(p.sum() for p in self.model.parameters()) * math.nan
            return total, {"classification": total.detach()}

        stages = [Stage("first", lambda: [], System.loss), Stage("never", lambda: [], System.loss)]
        monkeypatch.setattr(System, "loss", loss)
        monkeypatch.setattr(
            System, "stages", lambda self: [Stage(s.name, lambda: list(self.model.parameters()), self.loss) for s in stages]
        )
        fitted = fit(Setting("standard", steps=40, batch=8), task)
        assert fitted.diverged
        assert fitted.steps == 2, "seen at the end of the epoch, and no second stage"
        assert fitted.history == []

    def test_unknown_names(self, task):
        with pytest.raises(ValueError, match="system must be one of standard"):
            build(Setting("none"), task)
        with pytest.raises(ValueError, match="net must be one of convnet"):
            build(Setting("standard", net="none"), task)
