"""The commands, their errors and their exit statuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fisnet_cuda.cli import COMMANDS, main
from fisnet_cuda.cli.errors import report
from fisnet_cuda.errors import InputError


def test_overview_names_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


def test_no_command_is_an_error(capsys):
    assert main([]) == 2
    assert "usage: fisnet-cuda" in capsys.readouterr().out


def test_unknown_command_suggests(capsys):
    assert main(["evalaute", "x"]) == 2
    error = capsys.readouterr().err
    assert "did you mean evaluate?" in error
    assert error.count("\n") == 1


def test_process_has_exit_status_and_one_line():
    done = subprocess.run([sys.executable, "-m", "fisnet_cuda", "info", "--jsn"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("fisnet-cuda info: error: there is no option --jsn (did you mean --json?)")
    assert done.stderr.count("\n") == 1


def test_debug_shows_the_traceback():
    with pytest.raises(InputError, match="no option"):
        main(["info", "--jsn", "--debug"])


def test_info_and_plan_need_no_lightning():
    code = (
        "import sys; sys.modules['lightning'] = sys.modules['jsonargparse'] = sys.modules['kornia'] = None\n"
        "from fisnet_cuda.cli import main\n"
        "assert main(['info']) == 0 and main(['plan', 'small']) == 0\n"
        "sys.exit(main(['fit', '--path', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ})
    assert "pip install 'fisnet_cuda[train]'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.returncode == 2
    assert "pooled_phi" in done.stdout


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"fisnet_cuda", "torch", "kernels", "lightning", "gpus"} <= set(found)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["plan", "resnet19"], "did you mean resnet1"),
        (["plan", "no.such.net"], "there is no module"),
        (["plan", "small", "--backbone-args", "{x"], "JSON mapping"),
        (["plan", "small", "--channels", "2"], "channels must be 1 or 3"),
        (["bench", "small", "--rounds", "0"], "whole number above 0"),
        (["bench", "small", "--precision", "16-mixed", "--device", "cpu"], "needs a GPU"),
        (["bench", "small", "--variants", "tripl"], "invalid choice"),
    ],
)
def test_plan_and_bench_refuse_in_one_line(argv, words, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_plan_as_json(capsys):
    assert main(["plan", "small", "--variant", "dual", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert any(row["rule"].startswith("zB") for row in rows)


def test_bench_measures_every_kind(tmp_path, capsys):
    out = tmp_path / "bench.json"
    options = ["--size", "16", "-b", "2", "--rounds", "2", "--variants", "selective", "original", "--device", "cpu"]
    assert main(["bench", "small", *options, "--json", str(out)]) == 0
    rows = {row["kind"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"plain step", "selective step", "original step", "forward", "heatmap"}
    assert rows["plain step"]["ratio"] == 1
    assert all(0 < row["p20"] <= row["p50"] <= row["p80"] for row in rows.values())
    shown = capsys.readouterr().out
    assert all(kind in shown for kind in rows)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (InputError("a\n  b"), 2, "error: a b"),
        (FileNotFoundError(2, "No such file or directory", "x.csv"), 2, "x.csv: No such file"),
        (ModuleNotFoundError("No module named 'onnx'", name="onnx"), 2, "fisnet_cuda[export]"),
        (ModuleNotFoundError("import of yaml halted", name="yaml"), 2, "fisnet_cuda[train]"),
        (RuntimeError("CUDA out of memory. Tried"), 1, "batch_size"),
        (KeyError("x"), 1, "unexpected KeyError"),
        (
            InputError("Caught InputError in DataLoader worker process 0.\nTraceback:\n  x\nfisnet_cuda.errors.InputError: bad.png"),
            2,
            "error: bad.png",
        ),
    ],
)
def test_report(error, status, words):
    code, line = report(error)
    assert code == status
    assert words in line
    assert "\n" not in line
    assert "Traceback" not in line


def test_own_exit_code_holds():
    class DivergedLikeError(InputError):
        exit_code = 1

    assert report(DivergedLikeError("diverged")) == (1, "error: diverged")


def test_the_help_of_fit_has_the_short_names_and_no_lists_of_classes(capsys):
    pytest.importorskip("lightning")
    assert main(["fit", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--augment" in out
    assert "--data.augment" in out
    assert "known subclasses" not in out
    assert "(type: Union[list[Callback], Callback," in out  # the rest of that line is still there
