"""Figures of heatmaps in the course of training: of which images, when, and of which weights."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import fisnet_cuda.plot
from fisnet_cuda.data.module import MaskedImageData
from fisnet_cuda.errors import FisnetWarning, InputError
from fisnet_cuda.train.averaging import EMA
from fisnet_cuda.train.heatmaps import HeatmapFigures, pick
from fisnet_cuda.train.module import ISNetModule
from tests.data import make


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=30), st.integers(1, 12))
def test_pick(samples, count):
    labels, has_mask = torch.tensor([a for a, _ in samples]), torch.tensor([b for _, b in samples])
    found = pick(labels, has_mask, count)
    assert len(found) == len(set(found)) == min(count, len(samples))
    taken = [int((labels[found] == c).sum()) for c in labels.unique()]
    spare = [int((labels == c).sum()) for c in labels.unique()]
    assert all(t == s or t >= max(taken) - 1 for t, s in zip(taken, spare))  # in turns, as long as there are some
    for c in labels.unique():
        masks = [bool(has_mask[i]) for i in found if labels[i] == c]
        assert masks == sorted(masks, reverse=True)


class Catch:
    """Stands for `heatmap_grid`."""

    def __init__(self):
        self.calls = []

    def __call__(self, path, rows, title=None, **_):
        self.calls.append((path, rows, title))


@pytest.fixture
def drawn(monkeypatch):
    catch = Catch()
    monkeypatch.setattr(fisnet_cuda.plot, "heatmap_grid", catch)
    return catch


def train(tmp_path, *callbacks, epochs=2, **options):
    data = MaskedImageData(
        str(make.folder(tmp_path / "data", n=24, size=16)), size=16, channels=1, batch_size=8, augment="none", **options
    )
    module = ISNetModule(data.spec, backbone="fisnet_cuda.nets.small", variant="stochastic", lr=0.05)
    made = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=1,
    )  # fmt: skip
    made.fit(module, data)
    return module, data


def test_same_images_every_time_and_what_is_said_of_them(tmp_path, drawn):
    module, data = train(tmp_path, HeatmapFigures(tmp_path, every=2, images=3), epochs=4)
    assert [path.name for path, _, _ in drawn.calls] == ["epoch-0000.png", "epoch-0001.png", "epoch-0003.png"]
    first, *_, last = [rows for _, rows, _ in drawn.calls]
    names = [row.text.splitlines()[0] for row in first]
    assert names == [row.text.splitlines()[0] for row in last]
    by_name = {sample.name: (i, sample) for i, sample in enumerate(data.listing.samples)}
    assert {data.splits[by_name[name][0]] for name in names} == {"val"}
    batch = data.prepare(next(iter(data.loader("val"))))
    logits = module.eval()(batch["image"]).detach()
    for row, name in zip(last, names):
        index, sample = by_name[name]
        position = batch["index"].tolist().index(index)
        told = int(logits[position].argmax())
        assert row.correct == (told == sample.label)
        assert row.text.splitlines()[1:] == [
            f"true: {make.CLASSES[sample.label]}",
            f"predicted: {make.CLASSES[told]}, {100 * float(logits[position].softmax(0)[told]):.0f} %",
        ]
        expected = module.explain(batch["image"][position : position + 1], target=told).heatmaps[0, 0]
        shown = row.heatmaps[f"for {make.CLASSES[told]} (predicted)"]
        torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-5)
        assert len(row.heatmaps) == (1 if row.correct else 2)
        assert torch.equal(row.image, batch["image"][position])


def test_the_averaged_weights_are_shown(tmp_path, drawn):
    seen = []

    class Watch(pl.Callback):
        def on_validation_batch_start(self, trainer, module, *_):
            if not trainer.sanity_checking:
                seen.append(next(module.parameters()).clone())

    class Figures(HeatmapFigures):
        def _draw(self, trainer, module):
            seen.append(next(module.parameters()).clone())

    train(tmp_path, Figures(tmp_path), EMA(0.5), Watch(), epochs=1)
    assert len(seen) == 2
    assert torch.equal(*seen)


def test_drawing_leaves_training_as_it_is(tmp_path, drawn):
    with_figures, _ = train(tmp_path / "a", HeatmapFigures(tmp_path))
    without, _ = train(tmp_path / "b")
    assert len(drawn.calls) == 2
    for a, b in zip(with_figures.parameters(), without.parameters()):
        assert torch.equal(a, b)


def test_without_validation_training_images_are_drawn(tmp_path, drawn):
    train(tmp_path, HeatmapFigures(tmp_path, images=2), epochs=1, fractions=[0.8, 0.0, 0.2])
    ((_, rows, title),) = drawn.calls
    assert len(rows) == 2
    assert title.startswith("Training images")


@pytest.mark.parametrize("error", [OSError, InputError])  # `files.atomic` makes the second of the first
def test_a_full_disk_does_not_end_the_training(tmp_path, monkeypatch, error):
    def full(*_, **__):
        raise error("no space left on device")

    monkeypatch.setattr(fisnet_cuda.plot, "heatmap_grid", full)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tmp_path, HeatmapFigures(tmp_path), epochs=1)
    assert [w for w in caught if issubclass(w.category, FisnetWarning) and "no space left" in str(w.message)]


def test_the_figure_itself(tmp_path):
    train(tmp_path, HeatmapFigures(tmp_path, images=2), epochs=1)
    with Image.open(tmp_path / "heatmaps" / "epoch-0000.png") as image:
        assert min(image.size) > 200
