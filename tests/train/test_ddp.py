"""Two processes with batch B are one process with batch 2 B: weights, metrics.csv, and a kill in between."""

from __future__ import annotations

import csv
import io

import pytest
import torch

from tests.train.runs import differences, metrics, state, train

# No draws that depend on the process (augmentation, dropout, Stochastic's class), and no BatchNorm, whose statistics are of the own
# batch. Every sample has a mask: the loss is a mean over the masks of a batch, and Lightning and DDP average these means.
SAME = {
    "module": {"variant": "selective", "backbone_args": {"norm": False, "dropout": 0.0}, "weight_decay": 1e-3},
    "callbacks": {"checkpoint_every_steps": 2, "ema": 0.8},
    "double": True,
}


def options(batch_size):
    return SAME | {"data": {"batch_size": batch_size, "noise": 0.0, "n": 27, "n_val": 9, "all_masks": True}}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return train(tmp_path_factory.mktemp("ddp") / "one", **options(4))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return train(tmp_path_factory.mktemp("ddp") / "two", world=2, **options(2))


def test_two_processes_train_as_one(one, two):
    a, b = state(one), state(two)
    for key in ("state_dict", "current_model_state"):
        assert a[key].keys() == b[key].keys()
        for name, value in a[key].items():
            torch.testing.assert_close(b[key][name], value, rtol=1e-10, atol=1e-12)
    assert a["global_step"] == b["global_step"] == 18
    assert a["callbacks"]["fisnet_cuda.Checkpoints"]["best"]["epoch"] == b["callbacks"]["fisnet_cuda.Checkpoints"]["best"]["epoch"]


def test_two_processes_measure_as_one(one, two):
    rows = [list(csv.DictReader(io.StringIO((run / "metrics.csv").read_text()))) for run in (one, two)]
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        assert {"train/loss", "train/heatmap", "val/loss", "val/auroc", "val/heatmap", "val/swap_other", "train/mean"} <= a.keys()
        for name in a.keys() - {"seconds", "train/max"}:  # the largest loss of a batch is of another batch
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-6), name


def test_killed_processes_resume_to_the_same(two, tmp_path):
    killed = train(tmp_path / "killed", kills=(("batch", 1, 3),), world=2, **options(2))
    assert metrics(killed) == metrics(two)
    assert differences(state(two), state(killed)) == []
