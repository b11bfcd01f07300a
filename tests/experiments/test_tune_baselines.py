"""The tuning of the baselines: equal trials for every method, validation digits only."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from benchmarks.experiments import tune_baselines
from benchmarks.experiments.jobs import read_rows, run_jobs


def digits(path):
    """Small squares as digits, in MNIST's file format."""
    generator = np.random.default_rng(0)
    x = np.zeros((2_700, 28, 28), np.uint8)
    x[:, 8:20, 8:20] = generator.integers(1, 256, (2_700, 12, 12))
    y = np.arange(2_700) % 10
    np.savez(path, x_train=x[:2_600], y_train=y[:2_600], x_test=x[2_600:], y_test=y[2_600:])
    return path


def test_quick_run_writes_all_trials_and_prints_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune_baselines, "VALUES", {"rrr": (1, 10), "gradcam": (0.5,), "stochastic": (0.9,)})
    arguments = ["--quick", "--data", str(digits(tmp_path / "mnist.npz")), "--out", str(tmp_path), "--processes", "1"]
    assert tune_baselines.main(arguments) == 0
    rows = read_rows(tmp_path / "tune_baselines-quick.csv")
    assert [(row["system"], row["strength"], row["P"]) for row in rows] == [
        ("rrr", 1, 0.7), ("rrr", 10, 0.7), ("gradcam", 0.5, 0.7), ("stochastic", 1, 0.9),
    ]  # fmt: skip
    assert all({"accuracy_val_biased", "accuracy_val_confounded", "share", "train_seconds"} <= row.keys() for row in rows)
    assert not any(key.startswith(("accuracy_biased", "accuracy_unbiased")) for key in rows[0]), "no test digit is looked at"
    printed = capsys.readouterr().out
    assert "rrr, strength = 10 " in printed
    assert "stochastic, P = 0.9 " in printed
    assert tune_baselines.main(arguments) == 0
    assert read_rows(tmp_path / "tune_baselines-quick.csv") == rows, "what is there is not run again"


def test_every_method_gets_equally_many_values():
    assert {len(values) for values in tune_baselines.VALUES.values()} == {4}
    assert tune_baselines.VALUES.keys() == tune_baselines.NAMES.keys()


def test_a_result_that_would_overwrite_the_job_is_refused(tmp_path):
    jobs = [{"seed": 0, "seconds": 0.0}]
    with pytest.raises(ValueError, match="same names: seconds"):
        run_jobs(tmp_path / "x.csv", jobs, lambda job, given: {"seconds": 1.0}, processes=1)
    same = run_jobs(tmp_path / "x.csv", jobs, lambda job, given: {"loss": 1.0}, processes=1)
    assert len(same) == 1
    assert same[0]["loss"] == 1
