"""``validate``, ``test`` and ``predict``, from a run folder."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest

pytest.importorskip("lightning")
import torch
from PIL import Image

from fisnet_cuda.cli import main
from fisnet_cuda.data.split import read_manifest


def rows_of(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("command", ["validate", "test"])
def test_metrics_are_a_table(command, trained, capsys):
    assert main([command, str(trained)]) == 0
    captured = capsys.readouterr()
    for word in ("accuracy", "balanced accuracy", "macro F1", "AUROC", "background share"):
        assert word in captured.out
    assert captured.err == ""


def test_validation_is_that_of_training(trained, capsys):
    assert main(["validate", str(trained), "--which", "last"]) == 0
    shown = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    rows = rows_of(trained / "metrics.csv")
    shown = {key.strip(): float(value) for key, value in shown.items()}
    assert shown["accuracy"] == pytest.approx(float(rows[-1]["val/accuracy"]), abs=1e-4)
    assert shown["AUROC"] == pytest.approx(float(rows[-1]["val/auroc"]), abs=1e-4)


@pytest.mark.parametrize("command", ["validate", "test", "evaluate", "predict", "heatmap"])
def test_numbers_are_of_true_float32(command, trained, images, tmp_path, monkeypatch):
    """On a GPU torch's own default is TF32 in convolutions, and the numbers would not be those of the training."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []
    forward = torch.nn.Conv2d.forward

    def watched(self, x):
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    argv = {
        "evaluate": [str(trained), "--no-faithfulness", "--bootstrap", "100", "--out", str(tmp_path / "e")],
        "predict": [str(trained), "--out", str(tmp_path / "p.csv")],
        "heatmap": [str(images / "images/dark/000.png"), "--checkpoint", str(trained), "--out", str(tmp_path / "h")],
    }
    assert main([command, *argv.get(command, [str(trained)])]) == 0
    assert set(seen[-1:]) == {(False, False)}
    assert torch.backends.cudnn.allow_tf32


def test_predictions(trained, images, tmp_path, capsys):
    out = tmp_path / "p.csv"
    assert main(["predict", str(trained), "--out", str(out)]) == 0
    rows = rows_of(out)
    assert len(rows) == 40
    assert {row["label"] for row in rows} == {"dark", "light"}
    for row in rows:
        p = {name: float(row[f"p({name})"]) for name in ("dark", "light")}
        assert sum(p.values()) == pytest.approx(1, abs=1e-5)
        assert float(row["probability"]) == max(p.values())
        assert p[row["predicted"]] == max(p.values())


def test_unlabelled_images_are_predicted(trained, images, tmp_path):
    out = tmp_path / "p.csv"
    assert main(["predict", str(trained), "--path", str(images / "images" / "light"), "--out", str(out)]) == 0
    rows = rows_of(out)
    assert len(rows) == 20
    assert {row["label"] for row in rows} == {""}


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_errors_are_one_line(command, trained, tmp_path, capsys):
    for argv, words in (
        ([str(tmp_path / "nothing")], "nothing"),
        ([str(tmp_path)], "ckpt"),
        ([str(trained), "--path", str(tmp_path / "none")], "none"),
    ):
        assert main([command, *argv]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ---- the data after the training ---------------------------------------------------------------------------------------


@pytest.fixture
def grown(images, arguments, tmp_path, monkeypatch):
    """A run, and its data: a copy in the working folder, given by a relative path. What comes to them: by `grow`."""
    shutil.copytree(images, tmp_path / "here" / "data")
    monkeypatch.chdir(tmp_path / "here")
    run = tmp_path / "run"
    settings = ["--path", "data/images", "--masks", "data/masks", *arguments[4:]]
    assert main(["fit", *settings, "--epochs", "1", "--run", str(run)]) == 0
    return run


def grow(folder, count=7):
    generator = np.random.default_rng(9)
    for i in range(count):
        for kind in ("images", "masks"):
            pixels = generator.integers(0, 255, (20, 20)) if kind == "images" else np.pad(np.full((10, 10), 255), 5)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / kind / "dark" / f"0000{i}new.png")


def counted(capsys) -> int:
    return next(int(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line.startswith("images "))


def test_images_that_came_later_move_no_training_image_into_the_test(grown, tmp_path, capsys):
    rows = read_manifest(grown / "split.csv")
    test = {name for name, row in rows.items() if row.split == "test"}
    grow(tmp_path / "here" / "data")
    capsys.readouterr()
    assert main(["test", str(grown)]) == 0
    captured = capsys.readouterr()
    assert next(int(line.split()[1]) for line in captured.out.splitlines() if line.startswith("images ")) == len(test)
    assert captured.err.count("\n") == 1
    assert "7 new (such as dark/00000new.png)" in captured.err
    assert main(["evaluate", str(grown), "--no-faithfulness", "--bootstrap", "100"]) == 0
    assert "among the training images" not in capsys.readouterr().out


def test_a_run_does_not_go_on_with_other_splits(grown, tmp_path, capsys):
    before = (grown / "split.csv").read_bytes()
    grow(tmp_path / "here" / "data")
    capsys.readouterr()
    assert main(["fit", "--run", str(grown), "--epochs", "2"]) == 2
    error = capsys.readouterr().err
    assert "the images have changed" in error
    assert error.count("\n") == 1
    assert (grown / "split.csv").read_bytes() == before
    # a new run from that checkpoint is told
    elsewhere = ["--config", str(grown / "config.yaml"), "--resume", str(grown), "--run", str(tmp_path / "b")]
    assert main(["fit", *elsewhere, "--epochs", "2"]) == 0
    assert "images that differ" in capsys.readouterr().out


def test_a_run_goes_on_with_its_images_wherever_they_are_but_not_with_others(grown, tmp_path, capsys):
    shutil.move(tmp_path / "here" / "data", tmp_path / "there")
    settings = ["--path", str(tmp_path / "there/images"), "--masks", str(tmp_path / "there/masks"), "--run", str(grown)]
    assert main(["fit", *settings, "--epochs", "2"]) == 0
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "there/images/dark/000.png")
    capsys.readouterr()
    assert main(["fit", *settings, "--epochs", "3"]) == 2
    assert "1 with other pixels (such as dark/000.png)" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["validate", "test", "evaluate"])
def test_data_that_moved_are_found_by_path(command, grown, tmp_path, monkeypatch, capsys):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    assert main([command, str(grown)]) == 2
    error = capsys.readouterr().err
    assert "say where they are now with --path" in error
    assert error.count("\n") == 1
    here = tmp_path / "here" / "data"
    fast = ["--no-faithfulness", "--bootstrap", "100"] if command == "evaluate" else []
    assert main([command, str(grown), "--path", str(here / "images"), "--masks", str(here / "masks"), *fast]) == 0
    assert "warning" not in capsys.readouterr().err


def test_other_images_are_tested_all(trained, images, tmp_path, capsys):
    """Nobody has divided them: there is no reason to look at the 15 % of them that a split would call test."""
    for kind in ("images", "masks"):
        for name in ("dark", "light"):
            (tmp_path / kind / name).mkdir(parents=True)
            for i, file in enumerate(sorted((images / kind / name).iterdir())[:8]):
                shutil.copy(file, tmp_path / kind / name / f"other{i}.png")
    assert main(["test", str(trained), "--path", str(tmp_path / "images"), "--masks", str(tmp_path / "masks")]) == 0
    assert counted(capsys) == 16
