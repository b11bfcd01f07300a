"""What is saved when, which epoch is the best, and when training stops."""

from __future__ import annotations

import shutil

import pytest
import torch

from fisnet_cuda.errors import FisnetWarning, InputError
from fisnet_cuda.isnet.loss import ISNetLoss
from fisnet_cuda.train.callbacks import callbacks
from fisnet_cuda.train.checkpoints import Checkpoints, EarlyStop
from tests.train.tiny import Tiny, fit


def saved(run, name="last.ckpt"):
    return torch.load(run / name, weights_only=True)


@pytest.fixture
def moments(monkeypatch):
    """(epoch, batches done) of each save within an epoch, (epoch, "end") of the others."""
    seen = []
    save = Checkpoints._save

    def note(self, trainer, best):
        progress = trainer.fit_loop.epoch_progress.current
        within = progress.started != progress.processed
        seen.append((trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready if within else "end"))
        save(self, trainer, best)

    monkeypatch.setattr(Checkpoints, "_save", note)
    return seen


@pytest.mark.parametrize(
    ("options", "trainer", "expected"),
    [
        ({}, {}, ["end"]),
        ({"checkpoint_every_steps": 2}, {}, [2, 4, "end"]),  # of 6 batches: not after the last one
        ({"checkpoint_every_steps": 1}, {"accumulate_grad_batches": 2}, [2, 4, "end"]),  # not with gradients on the way
        ({"checkpoint_every_steps": 1}, {"val_check_interval": 3}, [1, 2, 4, 5, "end"]),  # not where validation is due
        ({"checkpoint_every_steps": 3}, {"val_check_interval": 3}, [4, "end"]),  # but at the next step
        ({"checkpoint_every_minutes": 1e-9}, {"limit_train_batches": 3}, [1, 2, "end"]),
    ],
)
def test_moments_of_saving(tmp_path, moments, options, trainer, expected):
    fit(tmp_path, [1.0], callbacks_of(tmp_path, **({"checkpoint_every_minutes": None} | options)), **trainer)
    assert [when for _, when in moments] == expected


def callbacks_of(tmp_path, **options):
    return callbacks(tmp_path, figures_every=0, **options)


def test_best_is_the_smallest_loss(tmp_path):
    fit(tmp_path, [3.0, 1.0, 2.0], callbacks_of(tmp_path))
    assert (saved(tmp_path, "best.ckpt")["epoch"], saved(tmp_path)["epoch"]) == (1, 2)
    assert saved(tmp_path)["callbacks"]["fisnet_cuda.Checkpoints"]["best"] == {"epoch": 1, "step": 12, "value": 1.0}


@pytest.mark.parametrize(("mode", "epoch"), [("max", 0), ("min", 1), ("auto", 1)])
def test_mode(tmp_path, mode, epoch):
    fit(tmp_path, [3.0, 1.0, 2.0], callbacks_of(tmp_path, mode=mode))
    assert saved(tmp_path, "best.ckpt")["epoch"] == epoch


def test_more_of_an_accuracy_is_better(tmp_path):
    fit(tmp_path, [3.0, 1.0, 2.0], callbacks_of(tmp_path, monitor="val/accuracy"))
    assert saved(tmp_path, "best.ckpt")["epoch"] == 0


def test_best_is_never_of_an_epoch_before_tuning_nor_of_nan(tmp_path):
    fit(tmp_path, [0.1, float("nan"), 2.0, 3.0], callbacks_of(tmp_path), tuning_epochs=1)
    assert saved(tmp_path, "best.ckpt")["epoch"] == 2


class Scheduled(Tiny):
    """P rises in epoch 2: losses of before are of another kind."""

    def __init__(self, *args):
        super().__init__(*args)
        self.loss = ISNetLoss({0: 0.1, 2: 0.7})

    def on_train_epoch_start(self):
        self.loss.set_epoch(self.current_epoch)


def test_losses_of_another_P_are_not_compared(tmp_path):
    values = [0.1, 0.1, 3.0, 2.0, 2.5, 2.5, 2.5]
    trainer = fit(tmp_path, values, callbacks_of(tmp_path, patience=2), module=Scheduled)
    assert (saved(tmp_path, "best.ckpt")["epoch"], trainer.current_epoch) == (3, 6)
    # a resumed run knows of which P its best is
    fit(tmp_path / "a", values[:4], callbacks_of(tmp_path / "a"), module=Scheduled)
    fit(tmp_path / "a", values[:5], callbacks_of(tmp_path / "a"), module=Scheduled, ckpt_path=tmp_path / "a" / "last.ckpt")
    assert saved(tmp_path / "a", "best.ckpt")["epoch"] == 3
    # what is no loss compares across all of them
    fit(tmp_path / "b", [3.0, 2.0, 1.0, 1.0], callbacks_of(tmp_path / "b", monitor="val/accuracy"), module=Scheduled)
    assert saved(tmp_path / "b", "best.ckpt")["epoch"] == 0


def test_training_does_not_stop_before_P_has_come_to_its_last_value(tmp_path):
    trainer = fit(tmp_path, [1.0, 2.0, 3.0, 2.0, 2.5, 2.5], callbacks_of(tmp_path, patience=1), module=Scheduled)
    assert trainer.current_epoch == 5


class Plateau(Scheduled):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        return [optimizer], [{"scheduler": plateau, "interval": "epoch", "monitor": "val/loss"}]


def test_plateaus_wait_anew_with_another_P(tmp_path):
    trainer = fit(tmp_path, [0.1, 0.2, 3.0, 2.0, 1.9, 1.8], callbacks_of(tmp_path), module=Plateau)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1


def test_without_validation_there_is_no_best(tmp_path):
    fit(tmp_path, [1.0], callbacks_of(tmp_path), limit_val_batches=0)
    assert (tmp_path / "last.ckpt").exists()
    assert not (tmp_path / "best.ckpt").exists()


def test_an_epoch_without_validation_is_not_the_best_by_the_value_of_an_older_one(tmp_path):
    fit(tmp_path, [5.0, 4.0, 3.0, 2.0, 1.0], callbacks_of(tmp_path), check_val_every_n_epoch=2)
    assert saved(tmp_path, "best.ckpt")["epoch"] == 3
    rows = saved(tmp_path)["callbacks"]["fisnet_cuda.RunFolder"]["rows"]
    assert ["val/loss" in row for row in rows] == [False, True, False, True, False]


def test_an_unknown_monitor_is_named_with_the_nearest(tmp_path):
    with pytest.raises(InputError, match="'val/los' is not logged: did you mean 'val/loss'") as caught:
        fit(tmp_path, [1.0], callbacks_of(tmp_path, monitor="val/los"))
    assert "\n" not in str(caught.value)


def test_stops_when_nothing_improves_after_tuning(tmp_path):
    # the losses of the two epochs before tuning are smaller, and do not count
    trainer = fit(tmp_path, [0.1, 0.2, 3.0, 2.0, 2.5, 2.5, 1.0], callbacks_of(tmp_path, patience=2), tuning_epochs=2)
    assert trainer.current_epoch == 6
    assert saved(tmp_path, "best.ckpt")["epoch"] == 3


def test_what_had_stopped_stays_stopped_unless_there_is_more_patience(tmp_path):
    values = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert fit(tmp_path, values, callbacks_of(tmp_path, patience=2)).current_epoch == 3
    again = fit(tmp_path, values, callbacks_of(tmp_path, patience=2), ckpt_path=tmp_path / "last.ckpt")
    assert (again.current_epoch, again.global_step) == (3, 18)
    more = fit(tmp_path, values, callbacks_of(tmp_path, patience=4), ckpt_path=tmp_path / "last.ckpt")
    assert more.current_epoch == 5


def test_best_of_the_run_that_is_resumed_comes_along(tmp_path):
    fit(tmp_path / "a", [1.0, 2.0], callbacks_of(tmp_path / "a"))
    fit(tmp_path / "b", [1.0, 2.0, 3.0], callbacks_of(tmp_path / "b"), ckpt_path=tmp_path / "a" / "last.ckpt")
    assert saved(tmp_path / "b", "best.ckpt")["epoch"] == 0
    assert saved(tmp_path / "b")["epoch"] == 2


def test_a_best_that_is_gone_is_said(tmp_path):
    fit(tmp_path / "a", [1.0, 2.0], callbacks_of(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    shutil.move(tmp_path / "a" / "last.ckpt", tmp_path / "b" / "last.ckpt")
    with pytest.warns(FisnetWarning, match="not that of epoch 0"):
        fit(tmp_path / "b", [1.0, 2.0, 3.0], callbacks_of(tmp_path / "b"), ckpt_path=tmp_path / "b" / "last.ckpt")
    assert saved(tmp_path / "b", "best.ckpt")["epoch"] == 2


def test_another_global_batch_in_mid_epoch_is_refused(tmp_path):
    class Stop(Tiny):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 3:
                raise ConnectionError

    with pytest.raises(ConnectionError):
        fit(tmp_path, [1.0], callbacks_of(tmp_path, checkpoint_every_steps=2), module=Stop)
    with pytest.raises(InputError, match="global batch 4, and now it is 6"):
        fit(tmp_path, [1.0], callbacks_of(tmp_path), ckpt_path=tmp_path / "last.ckpt", batch_size=6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: callbacks("x", mode="up"), "mode must be"),
        (lambda: callbacks("x", checkpoint_every_steps=0), "checkpoint_every_steps"),
        (lambda: EarlyStop(patience=0), "patience"),
        (lambda: callbacks("x", ema=1.0), "ema"),
        (lambda: callbacks("x", figures_every=-1), "figures_every"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(InputError, match=words):
        make()
