"""``fit`` through its command line: settings, errors, the run folder, resuming, several processes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("lightning")
import numpy as np
import torch
import yaml

from fisnet_cuda.cli import main


def one_error(capsys, argv) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("fisnet-cuda")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def test_run_folder_holds_what_a_reader_needs(trained):
    names = {p.name for p in trained.iterdir()}
    assert {"config.yaml", "metrics.csv", "split.csv", "data_report.json", "best.ckpt", "last.ckpt", "summary.json"} <= names
    assert not [name for name in names if name.startswith(".")]
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    assert settings["trainer"]["max_epochs"] == 2
    assert settings["model"]["backbone"] == "fisnet_cuda.nets.small"
    assert "run" not in settings


def test_output_is_the_reports_and_a_line_an_epoch(arguments, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["fit", *arguments, "--epochs", "2", "--run", str(run), "--variant", "dual", "--seed", "3"]) == 0
    captured = capsys.readouterr()
    assert "40 images" in captured.out
    assert "ISNet dual" in captured.out
    assert [line.split()[0] for line in captured.out.splitlines() if "/2 " in line] == ["1/2", "2/2"]
    assert f"fisnet-cuda evaluate {run}" in captured.out
    export = next(line.split()[1:] for line in captured.out.splitlines() if "fisnet-cuda export" in line)
    assert main([*export, "--no-onnx", "--no-torch-export"]) == 0  # what it says is there to be typed
    assert (run / "export" / "model.pt").is_file()
    talk = (captured.out + captured.err).lower()
    assert not any(word in talk for word in ("tip:", "litlogger", "num_workers", "tpu available", "sanity", "lightning"))
    assert captured.err == ""


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--model.varaint", "dual"], "did you mean --model.variant?"),
        (["--epoch", "3"], "did you mean --epochs?"),
        (["--model.lr", "x"], "model.lr takes a number; it got x"),
        (["--trainer.max_epochs", "x"], "trainer.max_epochs takes a whole number or null; it got x"),
        (["--model.P", "[1]"], "model.P takes a number or a mapping"),
        (["--seed", "-1"], "seed must be from 0"),
        (["--patience", "2", "--data.fractions", "[0.8, 0, 0.2]"], "there is no validation split"),
        (["--model.P", "{0:0.3,3:0.6}"], "with a space behind each colon"),
        (["--data.size", "[1,x]"], "data.size takes a whole number or a list [a whole number, ...]; it got [1, 'x']"),
        (["--precision", "64"], "precision takes one of 32, tf32, bf16-mixed, 16-mixed; it got 64"),
        (["--variant", "duel"], "variant must be one of"),
        (["--lr"], "--model.lr needs a value"),
        (["stray"], "'stray' is not expected"),
        (["--path", "nowhere"], "nowhere"),
        (["--masks", "nowhere"], "nowhere"),
        (["--config", "nofile.yaml"], "nofile.yaml"),
        (["--backbone", "no.net"], "there is no module"),
        (["--resume", "nothing.ckpt"], "nothing.ckpt does not exist"),
        (["--trainer.strategy", "foo"], "trainer: "),
        (["--patience", "0"], "patience must be at least 1"),
        (["--ema", "2"], "ema must be"),
        (["--data.swap_background", "50"], "swap_background must be a probability from 0 (never) to 1, got 50"),
        (["--data.swap_background", "0.5", "-b1"], "a batch of one image has no other background to give"),
    ],
)
def test_wrong_settings_are_one_line_and_leave_nothing(arguments, extra, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert words in one_error(capsys, ["fit", *arguments, "--epochs", "1", "--run", "runs/a", *extra])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="16-mixed is right on a GPU")
def test_16_mixed_is_refused_on_a_cpu(arguments, tmp_path, capsys):
    assert "needs a GPU" in one_error(capsys, ["fit", *arguments, "--precision", "16-mixed", "--run", str(tmp_path / "a")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model:\n  varaint: dual\n", "there is no setting model.varaint (did you mean model.variant?) in bad.yaml"),
        ("modle:\n  lr: 1\n", "there is no setting modle.lr (did you mean model.lr?) in bad.yaml"),
        ("model:\n  - [\n", "not a YAML of settings in bad.yaml"),
        ("just a text\n", "not a YAML of settings in bad.yaml"),
        ("trainer:\n  max_epochs: x\n", "trainer.max_epochs takes a whole number or null; it got x in bad.yaml"),
    ],
)
def test_wrong_configs_are_one_line(text, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(text)
    assert words in one_error(capsys, ["fit", "--path", "x", "--config", "bad.yaml"])
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]


def test_data_path_is_asked_for(capsys):
    assert "--data.path must be given" in one_error(capsys, ["fit"])


def test_bad_image_leaves_nothing(images, arguments, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "data")
    (tmp_path / "data/images/dark/003.png").write_bytes(b"not an image")
    argv = ["fit", *arguments, "--path", str(tmp_path / "data/images"), "--masks", str(tmp_path / "data/masks")]
    assert "003.png" in one_error(capsys, [*argv, "--run", str(tmp_path / "runs/deep/a")])
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_wrong_monitor_leaves_nothing(arguments, tmp_path, capsys):
    argv = ["fit", *arguments, "--epochs", "1", "--monitor", "val/los", "--run", str(tmp_path / "runs/a")]
    assert "val/loss" in one_error(capsys, argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "below a file", "other folder"])
def test_run_folders_that_cannot_be(kind, arguments, tmp_path, capsys):
    run = tmp_path / "x"
    if kind == "other folder":
        run.mkdir()
        (run / "thesis.tex").write_text("mine")
    else:
        run.write_text("mine")
        run = run / "deep" if kind == "below a file" else run
    error = one_error(capsys, ["fit", *arguments, "--run", str(run)])
    assert "name another --run" in error


def test_checkpoints_of_something_else(arguments, tmp_path, capsys):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "text.ckpt").write_text("x")
    for name in ("other.ckpt", "text.ckpt"):
        error = one_error(capsys, ["fit", *arguments, "--run", str(tmp_path / "a"), "--resume", str(tmp_path / name)])
        assert f"{name} is not a checkpoint" in error
    assert not (tmp_path / "a").exists()


def test_another_network_s_checkpoint(trained, arguments, tmp_path, capsys):
    argv = ["fit", *arguments, "--epochs", "3", "--resume", str(trained), "--run", str(tmp_path / "a")]
    assert "another network" in one_error(capsys, [*argv, "--backbone", "resnet18"])
    assert "another optimizer (model.optimizer sgd -> adamw): start from" in one_error(capsys, [*argv, "--model.optimizer", "adamw"])
    assert not (tmp_path / "a").exists()


def test_print_config_is_read_back(arguments, tmp_path, capsys):
    assert main(["fit", *arguments, "--lr", "0.25", "--print_config"]) == 0
    text = capsys.readouterr().out
    first = yaml.safe_load(text)
    assert first["model"]["lr"] == 0.25
    assert first["trainer"]["gradient_clip_val"] == 1.0
    assert text.count("\n  # ") > 30  # the words of the help
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("model:\n  lr: 0.5\n")
    assert main(["fit", "-c", str(tmp_path / "a.yaml"), "-c", str(tmp_path / "b.yaml"), "--model.d", "0.95", "--print_config"]) == 0
    second = yaml.safe_load(capsys.readouterr().out)
    assert second == {**first, "model": {**first["model"], "lr": 0.5, "d": 0.95}}


def test_goes_on_by_itself_and_says_what_differs(trained, arguments, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert main(["fit", "--run", str(run)]) == 0
    assert "nothing was left to train" in capsys.readouterr().out
    assert "model.lr 0.01 -> 0.5" in one_error(capsys, ["fit", *arguments, "--epochs", "2", "--run", str(run), "--lr", "0.5"])
    assert "--resume never" in one_error(capsys, ["fit", *arguments, "--run", str(run), "--resume", "never"])
    assert main(["fit", "--run", str(run), "--epochs", "3"]) == 0
    out = capsys.readouterr().out
    assert "trainer.max_epochs 2 -> 3" in out
    assert "3/3" in out
    assert "1/3" not in out
    assert len((run / "metrics.csv").read_text().splitlines()) == 4
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 3


def test_torch_is_left_as_it_was(arguments, tmp_path):
    states = random.getstate(), np.random.get_state(legacy=False)["state"], dict(os.environ)
    before = torch.backends.cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled(), torch.get_rng_state()
    handler = signal.getsignal(signal.SIGINT)
    assert main(["fit", *arguments, "--epochs", "1", "--run", str(tmp_path / "a"), "--amp", "--ema", "0.9"]) == 0
    assert (torch.backends.cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert signal.getsignal(signal.SIGINT) is handler
    after = random.getstate(), np.random.get_state(legacy=False)["state"], dict(os.environ)
    assert after[0] == states[0]
    assert after[1]["pos"] == states[1]["pos"]
    assert (after[1]["key"] == states[1]["key"]).all()
    assert after[2] == states[2]


@pytest.mark.parametrize(("precision", "tf32"), [("32", False), ("tf32", True)])
def test_precision_sets_tf32(precision, tf32, arguments, tmp_path, monkeypatch, capsys):
    from fisnet_cuda.train.module import ISNetModule

    seen = []
    monkeypatch.setattr(
        ISNetModule,
        "on_fit_start",
        lambda self: seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)),
        raising=False,
    )
    main(["fit", *arguments, "--epochs", "1", "--run", str(tmp_path / "a"), "--precision", precision])
    assert seen == [(tf32, tf32)]
    assert ("has no effect on a CPU" in capsys.readouterr().out) == (tf32 and not torch.cuda.is_available())


def test_interrupt_says_how_to_go_on(arguments, tmp_path):
    run = tmp_path / "run"
    argv = [sys.executable, "-m", "fisnet_cuda", "fit", *arguments, "--epochs", "9999", "--run", str(run)]
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        end = time.monotonic() + 100
        while not (run / "best.ckpt").exists() and time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.count("\n") == 1, errors
    assert errors.startswith("fisnet-cuda fit: interrupted in epoch")
    assert f"fisnet-cuda fit --run {run}" in errors
    assert (run / "last.ckpt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_two_processes(launcher, arguments, tmp_path):
    launch, own = ["-m", "fisnet_cuda"], ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    if launcher == "torchrun":
        launch, own = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fisnet_cuda"], []
    argv = [sys.executable, *launch, "fit", *arguments, *own, "--epochs", "1", "-b", "4", "--trainer.accelerator", "cpu"]
    done = subprocess.run(
        argv, cwd=tmp_path, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("run folder: ") == 2  # at the start and at the end, of one process
    assert done.stdout.count("1/1 ") == 1
    (run,) = (tmp_path / "runs").iterdir()  # both agree on its name
    assert (run / "last.ckpt").exists()
