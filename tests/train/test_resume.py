"""A training that is killed and resumed is, bit for bit, the one that was not: weights, optimizer, averages, schedule, metrics.csv."""

from __future__ import annotations

import shutil
import time

import pytest

from tests.train.runs import Job, differences, metrics, start, state, train

FULL = {
    "module": {"variant": "stochastic", "tune_epochs": 1, "schedule": "cosine", "warmup_steps": 2},
    "callbacks": {"ema": 0.9, "checkpoint_every_steps": 2, "patience": 5},
}
SETTINGS = {
    "full": FULL,
    "accumulate": FULL | {"trainer": {"accumulate_grad_batches": 2}, "callbacks": {"ema": 0.9, "checkpoint_every_steps": 1}},
    "plateau": {
        "module": {"variant": "selective", "schedule": "plateau", "lr": 1e-7},
        "callbacks": {"checkpoint_every_steps": 2, "monitor": "val/accuracy"},
    },
    "workers": FULL | {"data": {"workers": 1}},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Trainings that were not killed, each made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = train(tmp_path_factory.mktemp(name) / "whole", **SETTINGS[name])
        return made[name]

    return get


def check(whole, killed):
    assert metrics(killed) == metrics(whole)
    for name in ("last.ckpt", "best.ckpt"):
        assert differences(state(whole, name), state(killed, name)) == []


@pytest.mark.parametrize(
    ("name", "kills"),
    [
        ("full", [("batch", 1, 3)]),
        ("full", [("validation", 1, 1)]),
        ("full", [("epoch", 1)]),
        ("full", [("batch", 0, 5), ("batch", 1, 2), ("validation", 2, 0)]),
        ("accumulate", [("batch", 1, 3)]),
        ("plateau", [("batch", 1, 3), ("epoch", 1)]),
        ("workers", [("batch", 1, 5)]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join("".join(map(str, k)) for k in value),
)
def test_killed_and_resumed_is_the_same(whole, tmp_path, name, kills):
    check(whole(name), train(tmp_path / "killed", kills=tuple(kills), **SETTINGS[name]))


def test_killed_from_outside_at_any_time(whole, tmp_path):
    run = tmp_path / "killed"
    for wait in (0.0, 0.07, 0.21):
        process = start(Job(run, **FULL))
        while process.is_alive() and not (run / "last.ckpt").exists():
            time.sleep(0.005)
        time.sleep(wait)
        process.kill()
        process.join()
        for name in ("last.ckpt", "best.ckpt"):  # whole or not there
            if (run / name).exists():
                assert state(run, name)["global_step"] > 0
    check(whole("full"), train(run, **FULL))
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_resumed_from_an_earlier_checkpoint_into_another_folder(whole, tmp_path):
    source = whole("full")
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(source / "best.ckpt", other / "last.ckpt")
    train(other, **FULL)
    assert metrics(other) == metrics(source)
    assert differences(state(source), state(other)) == []


def test_more_epochs_go_on_as_if_there_had_been_more(tmp_path):
    options = {"module": {"variant": "selective"}, "callbacks": {"ema": 0.9}}
    long = train(tmp_path / "long", trainer={"max_epochs": 3}, **options)
    short = train(tmp_path / "short", trainer={"max_epochs": 2}, **options)
    assert [row["epoch"] for row in metrics(short)] == ["0", "1"]
    train(short, trainer={"max_epochs": 3}, **options)
    check(long, short)
