"""Composed scenes: what tells the class stands where it should, and nowhere else; the experiment runs from end to end."""

from __future__ import annotations

import time

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks.experiments import scenes
from benchmarks.experiments.fit import fit, training_clock
from benchmarks.experiments.jobs import read_rows
from benchmarks.experiments.scene_images import BIASES, MOST, backgrounds, codes, compose, objects, properties, shown_codes
from benchmarks.experiments.systems import Setting
from benchmarks.experiments.tasks import Task
from fisnet_cuda.data import list_samples

ALL = torch.arange(MOST)


@pytest.mark.parametrize("kinds", [properties, codes])
def test_200_classes_are_200_combinations(kinds):
    assert len(set(zip(*(part.tolist() for part in kinds(ALL))))) == MOST
    assert [len(set(part.tolist())) for part in kinds(ALL)] == [len(set(part.tolist())) for part in kinds(ALL[:40])]


def test_biases_differ_behind_the_object_only():
    labels = ALL[::5]
    found = {bias: compose(labels, MOST, bias, seed=3) for bias in BIASES}
    inside = objects(labels, torch.Generator().manual_seed(3)).alpha == 1
    for bias in BIASES:
        assert torch.equal(found[bias].masks, found["biased"].masks)
        change = (found[bias].images != found["biased"].images).any(1, keepdim=True)
        assert not (change & inside).any()
        # most background pixels change, wherever another code is shown
        if bias != "biased":
            assert change[found["biased"].masks == 0].float().mean() > 0.8


def test_masks_hold_the_whole_object_and_leave_background():
    labels = ALL
    alpha = objects(labels, torch.Generator().manual_seed(0)).alpha
    masks = compose(labels, MOST, "unbiased", seed=0, part=MOST).masks
    assert (masks[alpha > 0] == 255).all()
    shares = (masks > 0).float().mean((1, 2, 3))
    assert shares.min() > 0.08
    assert shares.max() < 0.65


def test_an_unbiased_background_does_not_know_its_class_and_a_code_shows():
    none = torch.full((64,), -1)

    def draw(shown):
        return backgrounds(shown, torch.Generator().manual_seed(1))

    assert torch.equal(draw(none), draw(none))
    red, other = (draw(torch.full((64,), c)).mean((0, 2, 3)) for c in (0, 4))
    assert (red - other).abs().max() > 0.02  # tints differ in the mean over images


def test_confounded_backgrounds_never_tell_the_truth():
    labels = torch.arange(500) % 3
    generator = torch.Generator().manual_seed(0)
    assert (shown_codes(labels, 3, "confounded", generator) != labels).all()
    assert set(shown_codes(labels, 3, "confounded", generator).tolist()) == {0, 1, 2}
    assert (shown_codes(labels, 3, "unbiased", generator) == -1).all()
    with pytest.raises(ValueError, match="bias must be one of"):
        shown_codes(labels, 3, "none", generator)
    with pytest.raises(ValueError, match="2 to 200"):
        compose(labels, 201, "biased", 0)


def test_training_time_by_the_clock_of_a_core():
    """Time in which the thread sleeps is not training time by this clock."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        clock = training_clock("cpu")
        assert clock is time.thread_time
        images = compose(torch.arange(16) % 2, 2, "biased", 0)
        task = Task("scenes", 2, images, images, {"biased": images})
        wall = time.perf_counter()

        def slow(steps, stage):
            time.sleep(0.02)

        fitted = fit(Setting("standard", net="poolnet", steps=5, batch=8), task, tell=slow, clock=lambda: clock())
        assert fitted.steps == 5
        assert fitted.seconds < time.perf_counter() - wall - 0.09
    finally:
        torch.set_num_threads(threads)


def test_quick_run_makes_table_and_figure_and_is_not_done_again(tmp_path, capsys):
    arguments = ["--quick", "--seeds", "1", "--processes", "1", "--out", str(tmp_path)]
    assert scenes.main(arguments) == 0
    rows = read_rows(tmp_path / "scenes-quick.csv")
    assert [(row["classes"], row["system"]) for row in rows] == [(c, s) for c in (2, 3) for s in scenes.SYSTEMS]
    assert all(row["steps"] == 0 and row["steps_done"] >= 1 and row["ms_step"] > 0 for row in rows)
    page = (tmp_path / "scenes-quick.md").read_text()
    assert "| 3       | Original ISNet" in page
    assert "CPU seconds" in page
    assert (tmp_path / "scenes-quick.png").stat().st_size > 10_000
    capsys.readouterr()
    assert scenes.main([*arguments, "--draw"]) == 0
    assert read_rows(tmp_path / "scenes-quick.csv") == rows


def test_a_folder_of_scenes_reads_as_the_command_line_reads_it(tmp_path, capsys):
    assert scenes.main(["--write", str(tmp_path / "data"), "--classes", "3", "--images", "2"]) == 0
    listing = list_samples(tmp_path / "data")
    assert listing.classes == ("000", "001", "002")
    assert len(listing.samples) == 6
    assert not listing.images_without_mask
    assert scenes.main(["--write", str(tmp_path / "data"), "--classes", "1"]) == 2
    assert "--classes must be 2 to 200, got 1" in capsys.readouterr().err
