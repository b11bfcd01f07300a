"""A training that is killed and resumed is, bit for bit, the one that was not: weights, optimizer, averages, schedule, metrics.csv."""

from __future__ import annotations

import pytest

from tests.train.runs import differences, metrics, state, train

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
