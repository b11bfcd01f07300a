"""Splits: whole, stratified, reproducible, true to what the data declare; and the manifest."""

import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from data import make
from hypothesis import given
from hypothesis import strategies as st
from real_data import cxr_tb

from fisnet_cuda.data.samples import SPLITS, Listing, Sample
from fisnet_cuda.data.sources import list_samples
from fisnet_cuda.data.split import read_manifest, split, split_notes, write_manifest
from fisnet_cuda.errors import InputError

FRACTIONS = (0.7, 0.15, 0.15)


def listing(labels, groups=None, splits=None):
    groups, splits = groups or [None] * len(labels), splits or [None] * len(labels)
    rows = enumerate(zip(labels, splits, groups))
    samples = tuple(Sample(f"{i:04}.png", Path(f"{i:04}.png"), None, label, part, group) for i, (label, part, group) in rows)
    return Listing(samples, ("a", "b", "c"), Path(), "list")


LABELS = st.lists(st.integers(0, 2), min_size=1, max_size=60)


@given(labels=LABELS, seed=st.integers(0, 5))
def test_every_sample_is_in_one_split_and_classes_keep_their_shares(labels, seed):
    splits = split(listing(labels), seed=seed)
    assert len(splits) == len(labels)
    assert set(splits) <= set(SPLITS)
    for label in set(labels):
        counts = Counter(part for part, own in zip(splits, labels) if own == label)
        for name, share in zip(SPLITS, FRACTIONS):
            assert abs(counts[name] - share * labels.count(label)) <= 2
    if len(labels) >= 3:
        assert set(splits) == set(SPLITS)


@given(labels=LABELS, seed=st.integers(0, 5), keep=st.booleans(), groups=st.integers(1, 9))
def test_the_order_of_the_samples_does_not_matter(labels, seed, keep, groups):
    ordered = listing(labels, [f"g{i % groups}" for i in range(len(labels))])
    mixed = list(ordered.samples)
    random.Random(seed).shuffle(mixed)
    first = dict(zip((s.name for s in ordered.samples), split(ordered, seed=seed, keep_groups=keep)))
    second = dict(zip((s.name for s in mixed), split(replace(ordered, samples=tuple(mixed)), seed=seed, keep_groups=keep)))
    assert first == second


def test_the_seed_matters_and_shares_are_met():
    data = listing([i % 3 for i in range(600)])
    assert split(data, seed=1) == split(data, seed=1) != split(data, seed=2)
    assert Counter(split(data)) == {"train": 420, "val": 90, "test": 90}
    assert Counter(split(data, (0.5, 0, 0.5))) == {"train": 300, "test": 300}
    assert Counter(split(data, (0, 0, 1))) == {"test": 600}


def test_groups_have_their_shares_in_every_class():
    data = listing([i % 2 for i in range(400)], ["x" if i % 8 < 2 else "y" for i in range(400)])
    counts = Counter((s.label, s.group, part) for s, part in zip(data.samples, split(data)))
    for (label, group, part), n in counts.items():
        share = dict(zip(SPLITS, FRACTIONS))[part] * (50 if group == "x" else 150)
        assert abs(n - share) <= 1.5, (label, group, part)


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=30), seed=st.integers(0, 3))
def test_kept_groups_are_never_torn_apart(sizes, seed):
    groups = [f"p{i}" for i, size in enumerate(sizes) for _ in range(size)]
    labels = [i % 2 for i, size in enumerate(sizes) for _ in range(size)]
    splits = split(listing(labels, groups), seed=seed, keep_groups=True)
    for group in set(groups):
        assert len({part for part, own in zip(splits, groups) if own == group}) == 1
    if len(sizes) >= 3:
        assert set(splits) == set(SPLITS)


def test_kept_groups_meet_the_shares_as_nearly_as_they_can():
    sizes = [random.Random(0).randint(1, 6) for _ in range(200)]
    groups = [f"p{i}" for i, size in enumerate(sizes) for _ in range(size)]
    labels = [i % 3 for i, size in enumerate(sizes) for _ in range(size)]
    counts = Counter(zip(labels, split(listing(labels, groups), keep_groups=True)))
    for label in range(3):
        for name, share in zip(SPLITS, FRACTIONS):
            assert abs(counts[label, name] - share * labels.count(label)) <= 3


def test_declared_splits_are_kept():
    declared = ["train"] * 60 + ["val"] * 20 + ["test"] * 20
    data = listing([i % 2 for i in range(100)], splits=declared)
    assert split(data) == declared
    assert split_notes(data, split(data)) == []


def test_what_is_not_declared_is_carved_out_of_training():
    data = listing([i % 2 for i in range(100)], splits=["train"] * 80 + ["test"] * 20)
    splits = split(data)
    assert splits[80:] == ["test"] * 20
    assert Counter(splits[:80]) == {"train": 66, "val": 14}  # 0.7 : 0.15 of 80
    assert split_notes(data, splits) == ["the data declare train and test only: 14 of 80 training images were taken for val"]
    assert split(data, (0.8, 0, 0.2)) == ["train"] * 80 + ["test"] * 20  # nobody asked for val
    both = split(listing([0, 1] * 50, splits=["train"] * 100))
    assert Counter(both) == {"train": 70, "val": 15, "test": 15}


def test_declared_tests_do_not_grow():
    data = listing([i % 2 for i in range(100)], splits=[None] * 60 + ["val"] * 20 + ["test"] * 20)
    splits = split(data)
    assert splits == ["train"] * 60 + ["val"] * 20 + ["test"] * 20
    assert split_notes(data, splits) == ["60 images have no declared split: 60 to train"]
    only_test = listing([0, 1] * 20, splits=[None] * 30 + ["test"] * 10)
    assert Counter(split(only_test)[:30]).keys() == {"train", "val"}
    assert split(only_test)[30:] == ["test"] * 10
    assert split(listing([0, 1], splits=["test", "test"])) == ["test", "test"]


def test_declarations_bind_whole_groups_where_groups_are_kept():
    groups = [f"p{i // 4}" for i in range(40)]
    data = listing([i // 4 % 2 for i in range(40)], groups, ["test" if i in (0, 5) else None for i in range(40)])
    splits = split(data, keep_groups=True)
    assert splits[:8] == ["test"] * 8
    assert "test" not in splits[8:]
    carved = listing([i // 4 % 2 for i in range(40)], groups, ["train"] * 40)
    by_group = defaultdict(set)
    for group, part in zip(groups, split(carved, keep_groups=True)):
        by_group[group].add(part)
    assert all(len(parts) == 1 for parts in by_group.values())
    torn = listing([0, 1, 0, 1], ["p", "p", "q", "q"], ["train", "test", "train", "train"])
    assert split(torn, (0.5, 0, 0.5), keep_groups=True)[:2] == ["train", "test"]


def test_unlabelled_samples_are_in_no_split():
    splits = split(listing([None, 0, 1, 0, None], splits=[None, None, None, None, "test"]))
    assert splits[0] == splits[4] == ""
    assert set(splits[1:4]) == set(SPLITS)
    assert split(listing([None] * 3)) == [""] * 3
    assert split(listing([])) == []


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.7, 0.2, 0.2), (-0.1, 0.6, 0.5), (float("nan"), 0.5, 0.5), (1.1, 0, -0.1)])
def test_bad_fractions_are_refused(fractions):
    with pytest.raises(InputError, match="fractions"):
        split(listing([0]), fractions)


def test_chest_xrays_keep_classes_and_sites():
    data = list_samples(cxr_tb(), columns={"image": "file", "group": "site"})
    splits = split(data)
    for key, size in Counter((s.label, s.group) for s in data.samples).items():
        counts = Counter(part for s, part in zip(data.samples, splits) if (s.label, s.group) == key)
        assert all(abs(counts[name] - share * size) <= 1 for name, share in zip(SPLITS, FRACTIONS))


# ---- manifest ------------------------------------------------------------------------------------------------


def test_the_manifest_comes_back(tmp_path):
    data = list_samples(make.table(tmp_path, 8, groups=2))
    odd = replace(data.samples[0], name='a "b", c\nd;\u00e9\u4e2d.png', label=None, mask=None, group=None)
    data = replace(data, samples=(odd, *data.samples[1:]))
    splits = ["", *split(data)[1:]]
    path = write_manifest(tmp_path / "run" / "split.csv", data, splits, [f"{i:064x}" for i in range(8)])
    rows = read_manifest(path)
    assert list(rows) == [s.name for s in data.samples]
    assert rows[odd.name] == (None, None, None, False, f"{0:064x}")
    for i, sample in list(enumerate(data.samples))[1:]:
        assert rows[sample.name] == (data.classes[sample.label], splits[i], sample.group, True, f"{i:064x}")
    assert read_manifest(write_manifest(path, data, splits))[odd.name].sha256 is None
    with pytest.raises(InputError, match="splits must have an entry for each of the 8"):
        write_manifest(path, data, splits[1:])
    surrogate = replace(data, samples=(replace(odd, name="\udcff.png"),))
    assert list(read_manifest(write_manifest(path, surrogate, [""]))) == ["\\udcff.png"]


def test_bad_manifests_are_refused(tmp_path):
    path = tmp_path / "split.csv"
    for text, said in (
        ("name,label,splits,group,has_mask\n", "no column 'split'; did you mean 'splits'"),
        ("name,label,split,group,has_mask\na,b\n", "line 2: 2 fields"),
        ("name,label,split,group,has_mask\na,b,train,,1\na,b,train,,1\n", "line 3: a is there twice"),
        ("name,label,split,group,has_mask\na,b,train,,yes\n", "line 2: has_mask must be 0 or 1"),
    ):
        path.write_text(text)
        with pytest.raises(InputError) as error:
            read_manifest(path)
        assert said in str(error.value)
    for wrong, said in ((tmp_path / "splt.csv", "did you mean 'split.csv'"), (tmp_path, "folder")):
        with pytest.raises(InputError) as error:
            read_manifest(wrong)
        assert said in str(error.value)
    path.write_bytes(b"name,label,split,group,has_mask\n\xff\n")
    with pytest.raises(InputError, match="cannot read the manifest"):
        read_manifest(path)
