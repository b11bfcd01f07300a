"""The demo's data, a run of it at reduced size, and what a user sees when something is missing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from fisnet_cuda import progress
from fisnet_cuda.demo import __main__ as demo
from fisnet_cuda.demo import classes, digits, nets, report

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def originals():
    return digits.load_originals(seed=0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestDigits:
    def test_split_shares_no_scan_and_loses_none(self, originals):
        train, test = originals
        together = torch.cat([train.index, test.index])
        assert len(together) == 1797
        assert len(together.unique()) == 1797

    def test_split_shares_no_picture(self, originals):
        train, test = originals
        distance = torch.cdist(train.pixels.flatten(1), test.pixels.flatten(1))
        assert distance.min() > 0

    def test_every_class_is_split_alike(self, originals):
        train, test = originals
        share = test.labels.bincount() / (train.labels.bincount() + test.labels.bincount())
        assert torch.allclose(share, torch.full((10,), 1 / 3), atol=0.01)

    @pytest.mark.parametrize("marks", digits.MARKS)
    @pytest.mark.parametrize("seed", [0, 1])
    def test_square_and_mask_never_touch(self, originals, marks, seed):
        train, _ = originals
        canvas = digits.Canvas()
        batch = digits.render(train, torch.arange(len(train)), marks, generator(seed))
        bare = digits.render(train, torch.arange(len(train)), "unbiased", generator(seed))
        square = batch.images - bare.images
        assert not (square.abs() * batch.masks).any()
        assert not batch.masks[..., : canvas.strip].any()
        assert torch.equal(batch.masks, bare.masks)
        assert (square.sum((1, 2, 3)) == (0 if marks == "unbiased" else canvas.side**2)).all()

    def test_mask_covers_the_digit_and_two_pixels_more(self, originals):
        batch = digits.render(originals[0], torch.arange(100), "unbiased", generator())
        assert not batch.images[batch.masks == 0].gt(0.1).any()
        inner = -torch.nn.functional.max_pool2d(-batch.masks, 5, stride=1, padding=2)
        assert batch.images[inner == 1].mean() > batch.images[batch.masks == 1].mean()
        assert 0.1 < batch.masks.mean() < 0.6

    def test_images_are_bounded(self, originals):
        images = digits.render(originals[0], torch.arange(500), "biased", generator()).images
        assert images.min() >= 0
        assert images.max() <= 1
        assert images.isfinite().all()

    def test_square_is_the_class_where_biased_and_never_where_confounded(self, originals):
        tests = digits.evaluation_sets(originals[1], variants=1, seed=0)
        assert torch.equal(tests["biased"].marks, tests["biased"].labels)
        assert (tests["unbiased"].marks == -1).all()
        assert (tests["confounded"].marks != tests["confounded"].labels).all()
        assert set(tests["confounded"].marks.tolist()) == set(range(10))

    def test_squares_of_two_classes_never_overlap(self, originals):
        index = torch.tensor([int(torch.nonzero(originals[0].labels == c)[0]) for c in range(10)])
        strip = digits.render(originals[0], index, "biased", generator()).images[..., :5]
        assert (strip.sum(0) <= 1).all()

    def test_the_three_sets_show_the_same_digits(self, originals):
        tests = digits.evaluation_sets(originals[1], variants=1, seed=0)
        strip = digits.Canvas().strip
        for marks in digits.MARKS:
            assert torch.equal(tests[marks].images[..., strip:], tests["unbiased"].images[..., strip:])

    def test_same_seed_same_data(self, originals):
        for a, b in zip(
            digits.training_batches(originals[0], 16, 3, seed=5),
            digits.training_batches(originals[0], 16, 3, seed=5),
        ):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)
        again, other = digits.load_originals(seed=0)[0], digits.load_originals(seed=1)[0]
        assert torch.equal(again.index, originals[0].index)
        assert not torch.equal(other.index, originals[0].index)

    def test_every_epoch_shows_every_scan_once_and_anew(self, originals):
        few = digits.Originals(*(field[:12] for field in vars(originals[0]).values()))
        first, second = (b for b in digits.training_batches(few, 12, 2, seed=0))
        assert first.labels.sort().values.equal(few.labels.sort().values)
        assert second.labels.sort().values.equal(few.labels.sort().values)
        assert not torch.equal(first.images, second.images)

    def test_a_batch_may_be_larger_than_the_set(self, originals):
        few = digits.Originals(*(field[:5] for field in vars(originals[0]).values()))
        assert len(next(digits.training_batches(few, 12, 1, seed=0))) == 12

    def test_unknown_marks(self, originals):
        with pytest.raises(ValueError, match="biased, unbiased, confounded; got 'upside down'"):
            digits.render(originals[0], torch.arange(1), "upside down", generator())


class TestNets:
    def test_every_position_or_their_average(self):
        x = torch.rand(2, 1, 32, 32)
        assert nets.small_net(7)(x).shape == (2, 7)
        assert nets.small_net(7, size=None)(x).shape == (2, 7)
        assert nets.small_net(7, size=None).classifier.in_features == 64


class TestProgress:
    class Terminal:
        def __init__(self, is_terminal: bool) -> None:
            self.is_terminal, self.text = is_terminal, ""

        def isatty(self) -> bool:
            return self.is_terminal

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None:
            pass

    @pytest.mark.parametrize("total", [1, 3, 10, 1500])
    def test_a_log_gets_at_most_ten_lines_and_the_last(self, total):
        log = self.Terminal(False)
        bar = progress.Progress("work", total, log)
        for done in range(1, total + 1):
            bar.update(done, "fine")
        lines = log.text.splitlines()
        assert len(lines) <= 10
        assert "100%" in lines[-1]
        assert "\r" not in log.text

    def test_a_log_is_not_flooded_by_what_is_quick(self):
        log = self.Terminal(False)
        bar = progress.Progress("work", 100, log)
        for done in range(1, 101):
            bar.update(done)
        assert len(log.text.splitlines()) == 1
        bar = progress.Progress("slow work", 100, log)
        for done in range(1, 101):
            bar.shown -= progress.QUIET  # as if two seconds had passed
            bar.update(done)
        assert len(log.text.splitlines()) == 1 + 10

    def test_a_terminal_gets_one_line(self):
        terminal = self.Terminal(True)
        bar = progress.Progress("work", 50, terminal)
        for done in range(1, 51):
            bar.update(done)
        assert terminal.text.count("\n") == 1
        assert terminal.text.endswith("\n")
        assert "[" + "#" * 24 + "] 100%" in terminal.text


def test_classes_table_says_what_was_not_measured():
    times = [
        classes.StepTime(kind, count, 9.0, factor * 10.0, 11.0)
        for count in (2, 1000)
        for factor, kind in enumerate(("plain", *classes.VARIANTS), start=1)
        if (kind, count) != ("original", 1000)
    ]
    table = report.classes_table(times)
    assert "not measured" in table
    assert "20.0 (2.0x)" in table
    assert max(map(len, table.splitlines())) <= 110


def test_quick_run_writes_and_prints_everything(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert demo.main(["--quick", "--out", str(tmp_path / "new" / "folder")]) == 0
    assert torch.get_num_threads() == threads

    out = capsys.readouterr().out
    for expected in ("biased", "unbiased", "confounded", "Standard", "Stochastic", "Selective", "dual"):
        assert expected in out
    for name in ("heatmaps.png", "classes.png"):
        path = tmp_path / "new" / "folder" / name
        assert str(path) in out
        assert path.read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "new" / "folder" / "results.json").read_text())
    assert len(results["nets"]) == 3
    for net in results["nets"]:
        assert set(net["accuracy"]) == set(digits.MARKS)
        assert 0 <= net["background_share"] <= 100
    assert {row["kind"] for row in results["step_times_ms"]} == {"plain", *classes.VARIANTS}
    assert out.rstrip().endswith("classes.png")


def test_missing_extra_is_one_clear_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("sklearn", "matplotlib") else object()
    )
    assert demo.main(["--out", str(tmp_path / "never")]) == 1
    err = capsys.readouterr().err
    assert err == "The demo needs scikit-learn and matplotlib: pip install fisnet_cuda[demo]\n"
    assert not (tmp_path / "never").exists()


def test_help_needs_no_extra():
    command = [sys.executable, "-m", "fisnet_cuda.demo", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--quick" in done.stdout
