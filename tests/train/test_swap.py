"""The background swap in the course of training: the numbers, that nothing else changes, and what is said."""

from __future__ import annotations

import csv
import math
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from fisnet_cuda.data.module import MaskedImageData
from fisnet_cuda.errors import InputError
from fisnet_cuda.evaluate.swap import BackgroundSwap, background_swap, choose_images
from fisnet_cuda.train.averaging import EMA
from fisnet_cuda.train.callbacks import callbacks
from fisnet_cuda.train.module import ISNetModule
from fisnet_cuda.train.swap import NAMES, SwapCheck
from tests.data import make


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make.folder(tmp_path_factory.mktemp("marked"), n=160, size=16, mark=True)


def train(folder, given, epochs=2, variant="standard", ckpt=None, sanity=0, **options):
    kind = {"size": 16, "channels": 1, "batch_size": 16, "augment": "none", "fractions": [0.5, 0.5, 0.0]}
    data = MaskedImageData(str(folder), **(kind | options))
    module = ISNetModule(data.spec, backbone="fisnet_cuda.nets.small", variant=variant, lr=0.1)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=given, logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=sanity, enable_checkpointing=any(hasattr(c, "monitor") for c in given),
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
    return trainer, module, data


def rows(run):
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


def test_a_net_that_reads_the_mark_is_told(images, tmp_path, capsys):
    _, module, data = train(images, callbacks(tmp_path, figures_every=0, swap_images=60), epochs=6)
    found = rows(tmp_path)
    assert len(found) == 6
    assert all(name in found[-1] for name in NAMES)
    subset = data.subset("val")
    positions = choose_images(subset.labels, torch.ones(len(subset), dtype=torch.bool), 60)
    batch = data.prepare(subset.__getitems__(positions.tolist()))
    module.eval()
    want = background_swap(module, batch["image"], batch["mask"], batch["label"])
    assert 59 <= want.n <= 60
    last = {name: float(found[-1][name]) for name in NAMES}
    values = (want.gap.value, want.gap.low, want.same.value, want.other.value, want.follows.value)
    assert last == pytest.approx(dict(zip(NAMES, values)))
    assert want.gap.value > 0.8
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("background swap")]
    share = float(found[-1]["val/background_share"])
    assert lines == [f"background swap ({want.n} validation images, after 6 epochs): {want.says(share, 'standard')}"]
    assert "the classifier uses the background" in lines[0]


@pytest.mark.parametrize("variant", ["standard", "stochastic"])
def test_backgrounds_swapped_in_training(images, tmp_path, variant):
    """Logged, learned from, and the same wherever it was stopped."""
    swap = {"variant": variant, "swap_background": 0.5}
    _, whole, data = train(images, callbacks(tmp_path / "whole", figures_every=0, swap_images=20), epochs=3, **swap)
    found = rows(tmp_path / "whole")
    steps = len(data.subset("train")) // 16
    counts = [float(row["train/swapped"]) * 16 * steps for row in found]
    assert counts == pytest.approx([round(count) for count in counts], abs=1e-6)
    assert 0.3 < sum(counts) / (3 * 16 * steps) < 0.7
    assert len(set(counts)) > 1
    train(images, callbacks(tmp_path / "cut", figures_every=0, swap_images=20), epochs=1, **swap)
    again = {"ckpt": tmp_path / "cut" / "last.ckpt", **swap}
    _, resumed, _ = train(images, callbacks(tmp_path / "cut", figures_every=0, swap_images=20), epochs=3, **again)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
    assert [row["train/swapped"] for row in rows(tmp_path / "cut")] == [row["train/swapped"] for row in found]


def test_without_swaps_nothing_is_logged_of_them(images, tmp_path):
    train(images, callbacks(tmp_path, figures_every=0, swap_every=0), epochs=1)
    assert "train/swapped" not in rows(tmp_path)[0]


def test_a_checkpoint_of_before_there_were_swaps_is_gone_on_with(images, tmp_path):
    whole = train(images, callbacks(tmp_path / "whole", figures_every=0, swap_every=0), epochs=2)[1]
    train(images, callbacks(tmp_path, figures_every=0, swap_every=0), epochs=1)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    sums = checkpoint["isnet"]["train_means"]
    checkpoint["isnet"]["train_means"] = sums[:, :-1]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    _, resumed, _ = train(images, callbacks(tmp_path, figures_every=0, swap_every=0), epochs=2, ckpt=tmp_path / "last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


def test_checking_leaves_training_as_it_is(images, tmp_path):
    _, checked, _ = train(images, [SwapCheck(images=30)], variant="stochastic", sanity=1)
    state = torch.get_rng_state()
    _, without, _ = train(images, [], variant="stochastic", sanity=1)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(checked.parameters(), without.parameters()):
        assert torch.equal(a, b)


def test_an_epoch_that_is_not_checked_has_no_numbers(images, tmp_path):
    train(images, callbacks(tmp_path, figures_every=0, swap_every=3, swap_images=20), epochs=4)
    assert [row["val/swap_gap"] != "" for row in rows(tmp_path)] == [True, False, True, False]
    train(images, callbacks(tmp_path / "never", figures_every=0, swap_every=0), epochs=1)
    assert not set(NAMES) & set(rows(tmp_path / "never")[0])


@pytest.mark.parametrize(
    ("masks", "options", "words"),
    [(False, {}, "no validation image has a mask"), (True, {"fractions": [0.8, 0.0, 0.2]}, "no validation split")],
)
def test_where_there_is_nothing_to_swap(tmp_path, capsys, masks, options, words):
    folder = make.folder(tmp_path / "data", n=48, size=16, parallel=masks)
    calls = []
    check = SwapCheck()
    check._measure = lambda *_: calls.append(1)
    train(folder / "images", [check], **options)
    out = capsys.readouterr().out
    assert not calls
    assert out.count("background swap left out") == 1
    assert words in out


def test_the_averaged_weights_are_checked(images):
    seen = []

    class Watch(pl.Callback):
        def on_validation_batch_start(self, trainer, module, *_):
            seen.append(next(module.parameters()).clone())

    class Check(SwapCheck):
        def _measure(self, trainer, module):
            seen.append(next(module.parameters()).clone())
            return super()._measure(trainer, module)

    train(images, [Check(images=8), EMA(0.5), Watch()], epochs=1)
    assert len(seen) > 1
    assert all(torch.equal(weights, seen[0]) for weights in seen)


def test_a_finished_run_that_is_resumed_says_it_again(images, tmp_path, capsys):
    train(images, callbacks(tmp_path, figures_every=0, swap_images=40), epochs=1)
    first = capsys.readouterr().out
    train(images, callbacks(tmp_path, figures_every=0, swap_images=40, swap_every=5), epochs=2, ckpt=tmp_path / "last.ckpt")
    again = capsys.readouterr().out
    assert first.startswith("background swap (40 validation images, after 1 epoch): ")
    assert again == first  # the second epoch was not its turn


def test_the_heatmap_is_crossed_with_it():
    check = SwapCheck()
    sums = [100, 99, 98, 60, 60, 35, 1, 38, 70]
    check.load_state_dict({"last": {"epoch": 8, "sums": sums, "guessing": 0.5, "left_out": {}, "share": 0.001}})
    said = []

    class Trainer:
        print = said.append

    class Module:
        variant = "selective"

    check.on_train_end(Trainer, Module)
    assert said == [f"background swap (100 validation images, after 9 epochs): {BackgroundSwap.of(sums, 0.5).says(0.001, 'selective')}"]
    assert "The heatmap is quiet (0.1 %" in said[0]
    assert not math.isnan(check.state_dict()["last"]["share"])


def test_a_check_of_what_was_trained_says_so():
    check, said = SwapCheck(), []
    sums = [100, 99, 98, 97, 97, 1, 1, 2, 70]
    check.load_state_dict({"last": {"epoch": 8, "sums": sums, "guessing": 0.5, "left_out": {}, "share": 0.001}})
    for P in (0.0, 0.5):
        check.on_train_end(SimpleNamespace(print=said.append, datamodule=SimpleNamespace(swap_background=P)), SimpleNamespace())
    assert said[1] == said[0] + " Backgrounds were swapped in training, too: this is no independent witness."


@pytest.mark.parametrize("every", [0, 3])
def test_what_chooses_the_best_epoch_must_be_measured_in_every_epoch(tmp_path, every):
    with pytest.raises(InputError, match="monitor val/swap_gap needs a background swap in every epoch"):
        callbacks(tmp_path, monitor="val/swap_gap", swap_every=every)
    assert callbacks(tmp_path, monitor="val/swap_gap")


@pytest.mark.parametrize(("given", "words"), [({"every": -1}, "swap_every"), ({"images": 3}, "swap_images")])
def test_settings_are_refused(given, words):
    with pytest.raises(InputError, match=words):
        SwapCheck(**given)
