"""`DivergenceGuard`: training that has come apart stops, says what helps, and leaves no spoiled checkpoint behind."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny_training import QUIET, SPEC, Data

from fisnet_cuda.errors import InputError
from fisnet_cuda.train.divergence import DivergedError, DivergenceGuard
from fisnet_cuda.train.module import ISNetModule

pytestmark = pytest.mark.filterwarnings("error::fisnet_cuda.FisnetWarning")


class Spoiled(ISNetModule):
    """Multiplies the loss from one batch of the training on."""

    factor, start = 1.0, 0

    def training_step(self, batch, batch_idx):
        result = super().training_step(batch, batch_idx)
        if self.trainer.fit_loop.epoch_loop.total_batch_idx >= self.start:
            result = {key: value * self.factor for key, value in result.items()}
        return result


def fit(factor, start, callbacks=(), guard=None, settings=None, **options):
    model = Spoiled(SPEC, **{"backbone": "tiny_training.net", "variant": "selective", "lr": 1e-6, **(settings or {})})
    model.factor, model.start = factor, start
    options = {**QUIET, "max_epochs": 4, "callbacks": [guard or DivergenceGuard(every=2, window=3), *callbacks], **options}
    trainer = pl.Trainer(**options)
    trainer.fit(model, datamodule=Data())
    return trainer


def diverged(*args, **options):
    with pytest.raises(DivergedError) as caught:
        fit(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_healthy_training_goes_through():
    trainer = fit(1.0, 0)
    assert trainer.global_step == 16


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite(value):
    message = diverged(value, 6)
    assert message == (
        "training has diverged: the loss was not finite in step 7 (epoch 1). What usually helps, one at a time: raise d to 0.996 "
        "(it is 0.9); lower lr to 1e-07 (it is 1e-06); clip gradients at norm 1 (gradient_clip_val is off). No checkpoint was "
        "written before."
    )


def test_loss_that_explodes():
    message = diverged(1e4, 6)
    assert "the loss rose to" in message
    assert "in step 7 (epoch 1), from" in message
    fit(1e4, 6, guard=DivergenceGuard(every=2, window=3, factor=None), settings={"lr": 1e-12})


def test_a_loss_that_grows_a_little_does_not_stop_the_training():
    assert fit(5.0, 6).global_step == 16


def test_a_new_loss_is_measured_anew():
    """The heatmap loss that comes after C1 and C2 were tuned may be far above the classification loss."""
    settings = {"tune_epochs": 1}
    assert fit(1e4, 4, settings=settings, max_epochs=2).global_step == 8
    diverged(1e4, 8, settings=settings)
    assert fit(1e4, 4, settings={"P": {0: 0.1, 1: 0.7}}, max_epochs=2).global_step == 8


def test_advice_fits_the_settings():
    message = diverged(float("nan"), 0, settings={"variant": "standard", "lr": 0.1}, gradient_clip_val=1.0)
    assert "raise d" not in message
    assert "clip" not in message
    assert "lower lr to 0.01 (it is 0.1)." in message
    message = diverged(float("nan"), 0, settings={"d": 0.996}, gradient_clip_val=5.0)
    assert "raise d" not in message
    assert "clip gradients at norm 1 (gradient_clip_val is 5.0)" in message


def test_the_last_good_checkpoint_is_named_and_good(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    guard = DivergenceGuard(every=1000, window=3)
    message = diverged(float("nan"), 6, [save], guard, enable_checkpointing=True)
    assert "in step 7 (epoch 1)" in message  # seen when the checkpoint of that step was about to be written
    assert message.endswith(f"The last good checkpoint is {tmp_path / 'step=6.ckpt'}.")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step={i}.ckpt" for i in range(1, 7)]
    for path in tmp_path.iterdir():
        assert all(v.isfinite().all() for v in torch.load(path, weights_only=True)["state_dict"].values())


def test_a_process_that_is_well_ends_with_the_others(monkeypatch):
    """It says that another one diverged, not that its own weights did."""
    monkeypatch.setattr(SingleDeviceStrategy, "reduce_boolean_decision", lambda *args, **options: True)
    assert diverged(1.0, 0).startswith("training has diverged in another process by step 2. ")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    class Spoil(pl.Callback):
        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                model.net.model[0].weight.data.fill_(float("nan"))

    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    message = diverged(1.0, 99, [Spoil(), save], DivergenceGuard(every=1000), enable_checkpointing=True)
    assert message.startswith("training has diverged: weights were not finite by step 3.")
    assert len(list(tmp_path.iterdir())) == 2


def test_before_a_validation_it_looks():
    seen = []

    class Seen(pl.Callback):
        def on_validation_batch_start(self, *args):
            seen.append(1)

    diverged(float("nan"), 2, [Seen()], DivergenceGuard(every=1000))
    assert seen == []


def test_the_host_looks_only_every_so_many_steps(monkeypatch):
    looks = []
    monkeypatch.setattr(DivergenceGuard, "_look", lambda self, *args, **options: looks.append(1))
    guard = DivergenceGuard(every=3, window=2)
    # no value of the device is read while a step is watched
    for name in ("__bool__", "__int__", "__float__", "item", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, _forbidden(name, getattr(torch.Tensor, name)))
    model = ISNetModule(SPEC, backbone="tiny_training.net")
    with _Forbid():
        for step in range(6):
            guard._watch(torch.tensor(1.0), model, step)
    assert looks == []


class _Forbid:
    active = False

    def __enter__(self):
        _Forbid.active = True

    def __exit__(self, *args):
        _Forbid.active = False


def _forbidden(name, method):
    def call(self, *args):
        assert not _Forbid.active, f"{name} waits for the device"
        return method(self, *args)

    return call


def test_accumulated_losses_are_not_divided():
    seen = []

    class Guard(DivergenceGuard):
        def _watch(self, loss, model, step):
            seen.append(float(loss))

    fit(1.0, 0, guard=Guard(), max_epochs=1, accumulate_grad_batches=2)
    accumulated = seen.copy()
    seen.clear()
    fit(1.0, 0, guard=Guard(), max_epochs=1)
    assert accumulated == pytest.approx(seen, rel=1e-3)


@pytest.mark.parametrize("arguments", [{"every": 0}, {"window": 0}, {"factor": 1.0}, {"factor": float("nan")}])
def test_arguments(arguments):
    with pytest.raises(InputError, match=f"{next(iter(arguments))} must be"):
        DivergenceGuard(**arguments)


def test_it_is_an_input_error_with_its_own_exit_status():
    assert issubclass(DivergedError, InputError)
    assert DivergedError.exit_code == 1
