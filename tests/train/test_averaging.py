"""The average of the weights: its definition, what validates, what a checkpoint holds."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch

from fisnet_cuda.errors import InputError
from fisnet_cuda.train.averaging import EMA
from fisnet_cuda.train.callbacks import callbacks
from tests.train.tiny import Tiny, fit


class Watch(pl.Callback):
    """The weights after every step, those in validation, and those left."""

    def __init__(self):
        self.steps, self.validated, self.left = [], [], None

    def on_train_batch_end(self, trainer, module, *_):
        self.steps.append(module.line.weight.detach().clone())

    def on_validation_batch_start(self, trainer, module, *_):
        self.validated.append(module.line.weight.detach().clone())

    def on_train_end(self, trainer, module):
        self.left = module.line.weight.detach().clone()


def average(start, steps, decay):
    for t, weight in enumerate(steps, 1):
        d = min(decay, t / (t + 9))
        start = d * start + (1 - d) * weight
    return start


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9])
def test_definition_and_where_it_is_used(tmp_path, decay):
    watch = Watch()
    fit(tmp_path, [1.0, 1.0], [*callbacks(tmp_path, ema=decay, figures_every=0), watch])
    start = Tiny([]).line.weight.detach()
    assert len(watch.steps) == 12
    first, last = average(start, watch.steps[:6], decay), average(start, watch.steps, decay)
    for weight in watch.validated[:2]:
        torch.testing.assert_close(weight, first)
    for weight in (*watch.validated[2:], watch.left):
        torch.testing.assert_close(weight, last)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    torch.testing.assert_close(saved["state_dict"]["line.weight"], last)
    torch.testing.assert_close(saved["current_model_state"]["line.weight"], watch.steps[-1], rtol=0, atol=0)


def test_accumulated_batches_are_one_step(tmp_path):
    watch = Watch()
    ema = EMA(0.5)
    fit(tmp_path, [1.0], [ema, watch], accumulate_grad_batches=3, enable_checkpointing=False)
    assert ema.updates == 2
    torch.testing.assert_close(watch.left, average(Tiny([]).line.weight.detach(), watch.steps[2::3], 0.5))


def test_training_itself_is_the_same_without(tmp_path):
    watches = Watch(), Watch()
    fit(tmp_path, [1.0, 1.0], [EMA(0.9), watches[0]], enable_checkpointing=False)
    fit(tmp_path, [1.0, 1.0], [watches[1]], enable_checkpointing=False)
    assert torch.equal(torch.stack(watches[0].steps), torch.stack(watches[1].steps))


def test_shared_weights_buffers_and_counters():
    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(2, 2)
            self.b = torch.nn.Linear(2, 2)
            self.b.weight = self.a.weight
            self.norm = torch.nn.BatchNorm1d(2)
            self.register_buffer("c1", torch.ones(2))

    from fisnet_cuda.train.averaging import _averaged

    keys = set(_averaged(Net()))
    assert keys == {"a.weight", "a.bias", "b.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}


def test_a_run_without_an_average_is_not_resumed_with_one(tmp_path):
    fit(tmp_path, [1.0], callbacks(tmp_path, figures_every=0))
    with pytest.raises(InputError, match="without EMA"):
        fit(tmp_path, [1.0, 1.0], callbacks(tmp_path, ema=0.9, figures_every=0), ckpt_path=tmp_path / "last.ckpt")
