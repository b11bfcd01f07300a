"""``validate``, ``test`` and ``predict``, from a run folder."""

from __future__ import annotations

import csv

import pytest

pytest.importorskip("lightning")

from fisnet_cuda.cli import main


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
