"""The order of samples: what processes share, what an epoch covers, and where a stopped epoch goes on."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fisnet_cuda.data.sampler import EpochBatches, EpochLoader
from fisnet_cuda.errors import InputError

sizes = st.integers(1, 60)
batch_sizes = st.integers(1, 9)
worlds = st.integers(1, 5)
seeds = st.integers(0, 2**40)
epochs = st.integers(0, 1000)
quick = settings(max_examples=60, deadline=None)


def batches(*args, epoch=0, **kwargs):
    made = EpochBatches(*args, **kwargs)
    made.set_epoch(epoch)
    return list(made)


@quick
@given(n=sizes, b=batch_sizes, world=worlds, seed=seeds, epoch=epochs, shuffle=st.booleans())
def test_processes_see_together_what_one_sees(n, b, world, seed, epoch, shuffle):
    assume(n >= b * world)
    kind = {"seed": seed, "epoch": epoch, "shuffle": shuffle, "drop_last": True}
    ranks = [batches(n, b, rank=r, world=world, **kind) for r in range(world)]
    one = batches(n, b * world, **kind)
    assert [len(r) for r in ranks] == [len(one)] * world == [n // (b * world)] * world
    for step, whole in enumerate(one):
        shares = [r[step] for r in ranks]
        assert [len(share) for share in shares] == [b] * world
        assert [x for group in zip(*shares) for x in group] == whole


@quick
@given(n=sizes, b=batch_sizes, world=worlds)
def test_evaluation_sees_every_sample_once(n, b, world):
    assume(n >= world)
    ranks = [batches(n, b, rank=r, world=world, shuffle=False, drop_last=False) for r in range(world)]
    assert sorted(x for rank in ranks for batch in rank for x in batch) == list(range(n))
    assert all(1 <= len(batch) <= b for rank in ranks for batch in rank)
    lengths = [len(rank) for rank in ranks]
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) >= 1
    assert lengths == [len(EpochBatches(n, b, rank=r, world=world)) for r in range(world)]


@quick
@given(n=sizes, b=batch_sizes, seed=seeds, epoch=epochs)
def test_order_is_a_function_of_seed_and_epoch(n, b, seed, epoch):
    used = EpochBatches(n, b, seed=seed, shuffle=True, drop_last=False)
    for e in (epoch + 1, epoch):  # whatever was drawn before, and whatever the global generators did
        used.set_epoch(e)
        torch.rand(3), np.random.rand(3)
        again = list(used)
    assert again == batches(n, b, seed=seed, shuffle=True, drop_last=False, epoch=epoch)
    assert sorted(x for batch in again for x in batch) == list(range(n))


def test_epochs_and_seeds_differ():
    orders = {tuple(EpochBatches(50, 4, seed=s, shuffle=True).order(e)) for s in range(4) for e in range(4)}
    assert len(orders) == 16


@quick
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), seed=seeds, epoch=epochs)
def test_balance_gives_classes_equal_shares(labels, seed, epoch):
    order = EpochBatches(labels, 1, seed=seed, shuffle=True, balance=True).order(epoch)
    assert len(order) == len(labels)
    drawn = np.asarray(labels)[order]
    counts = [int((drawn == c).sum()) for c in set(labels)]
    assert max(counts) - min(counts) <= 1
    for c in set(labels):  # none a third time before all were seen twice
        times = [int((order == i).sum()) for i, label in enumerate(labels) if label == c]
        assert max(times) - min(times) <= 1


@quick
@given(n=sizes, b=batch_sizes, seed=seeds, epoch=epochs, data=st.data(), shuffle=st.booleans())
def test_goes_on_where_it_stopped(n, b, seed, epoch, data, shuffle):
    kind = {"seed": seed, "shuffle": shuffle, "drop_last": False}
    whole = batches(n, b, epoch=epoch, **kind)
    done = data.draw(st.integers(0, len(whole)))
    first = EpochLoader(torch.arange(n), EpochBatches(n, b, **kind))
    first.set_epoch(epoch)
    for _, _ in zip(range(done), first):
        pass
    state = pickle.loads(pickle.dumps(first.state_dict()))
    assert state["position"] == done
    assert state["epoch"] == epoch

    second = EpochLoader(torch.arange(n), EpochBatches(n, b, **kind))
    iter(second)  # one that nobody asks for a batch of
    second.load_state_dict(state)
    early = iter(second)
    second.sampler.set_epoch(epoch)  # in Lightning's order: iter, then set_epoch, then the first batch
    assert len(second) == len(whole)
    assert [x.tolist() for x in early] == whole[done:]
    assert second.state_dict()["position"] == len(whole)
    second.set_epoch(epoch + 1)
    assert [x.tolist() for x in second] == batches(n, b, epoch=epoch + 1, **kind)


@quick
@given(b=st.integers(1, 3), world=worlds, then=worlds, seed=seeds, done=st.integers(0, 4))
def test_goes_on_with_another_number_of_processes(b, world, then, seed, done):
    whole = b * world * then
    made = EpochBatches(60 * whole, b * then, rank=world - 1, world=world, seed=seed, shuffle=True, drop_last=True)
    after = [EpochBatches(60 * whole, b * world, rank=r, world=then, seed=seed, shuffle=True, drop_last=True) for r in range(then)]
    expected = batches(60 * whole, whole, seed=seed, shuffle=True, drop_last=True)[done:]
    for r in after:
        r.load_state_dict(made.state_dict(done))
    assert [[x for group in zip(*shares) for x in group] for shares in zip(*after)] == expected


def test_a_state_of_another_epoch_starts_at_the_front():
    made = EpochBatches(10, 2, shuffle=True)
    made.load_state_dict(made.state_dict(3) | {"epoch": 4})
    made.set_epoch(5)
    assert made.start == 0
    assert len(list(made)) == 5


def test_workers_read_ahead_and_the_position_does_not():
    loader = EpochLoader(torch.arange(40), EpochBatches(40, 4), num_workers=1, prefetch_factor=4)
    passing = iter(loader)
    for _ in range(3):
        next(passing)
    assert loader.state_dict()["position"] == 3
    passing.close()
    again = EpochLoader(torch.arange(40), EpochBatches(40, 4), num_workers=1)
    again.load_state_dict(loader.state_dict())
    assert next(iter(again)).tolist() == [12, 13, 14, 15]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels_or_n": 0}, "no samples"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"batch_size": 11, "drop_last": True}, "lower batch_size"),
        ({"batch_size": 6, "drop_last": True, "world": 2}, "each of 2 processes"),
        ({"shuffle": True, "world": 2}, "drop_last=True"),
        ({"labels_or_n": 2, "world": 3}, "fewer processes"),
        ({"balance": True, "shuffle": True}, "needs the labels"),
        ({"labels_or_n": [0, -1], "balance": True, "shuffle": True}, "1 have none"),
        ({"seed": -1}, "seed"),
    ],
)
def test_refusals_are_one_line(change, words):
    with pytest.raises(InputError, match=words) as caught:
        EpochBatches(**({"labels_or_n": 10, "batch_size": 2} | change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"labels_or_n": 11}, {"batch_size": 3}, {"seed": 1}, {"shuffle": False}])
def test_a_state_of_other_data_is_refused(change):
    kind = {"labels_or_n": 10, "batch_size": 2, "seed": 0, "shuffle": True}
    with pytest.raises(InputError, match="in the middle of an epoch with"):
        EpochBatches(**(kind | change)).load_state_dict(EpochBatches(**kind).state_dict(1))
