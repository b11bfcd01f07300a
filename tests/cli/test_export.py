"""``fisnet-cuda export`` through the command line: what it says, its exit status, and what it leaves behind."""

import pytest
import saved_run

from fisnet_cuda import export as export_module
from fisnet_cuda.cli import main


@pytest.fixture
def trained(tmp_path):
    return saved_run.save(tmp_path / "run")[0]


def test_export_tells_differences_and_where_things_are(trained, tmp_path, capsys):
    assert main(["export", str(trained), "--out", str(tmp_path / "out"), "--no-onnx"]) == 0
    said = capsys.readouterr().out
    assert "0, equal bit by bit" in said
    assert "model.pt2" in said
    assert str(tmp_path / "out") in said
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.pt", "model.pt2", "model.json", "USAGE.md"}


def test_differing_logits_exit_with_1_and_one_line(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export_module, "_difference", lambda *_: 0.5)
    assert main(["export", str(trained), "--out", str(tmp_path / "out"), "--no-onnx"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fisnet-cuda export: error: model.pt gives other logits")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--out", "out"], "there is no run folder or checkpoint nowhere"),
        (["RUN", "--out", "RUN/best.ckpt"], "is a file"),
        (["RUN", "--out", "out", "--no-onnx", "--opset", "18"], "--opset is of ONNX"),
        (["RUN", "--out", "out", "--no-torch-export", "--opset", "3"], "could only be written with opset"),
        (["RUN"], "--out"),
    ],
)
def test_wrong_arguments_are_one_line(trained, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *(a.replace("RUN", str(trained)) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
