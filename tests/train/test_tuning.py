"""`TuneC1C2`: when it tunes, on what, and what training is like before."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from tiny_training import QUIET, SPEC, Data

import fisnet_cuda as fc
from fisnet_cuda.errors import InputError
from fisnet_cuda.train.module import ISNetModule
from fisnet_cuda.train.tuning import TuneC1C2, chosen

pytestmark = pytest.mark.filterwarnings("error::fisnet_cuda.FisnetWarning")


def module(**settings):
    return ISNetModule(SPEC, **{"backbone": "tiny_training.net", "variant": "selective", "tune_epochs": 1, **settings})


def fit(model, data=None, callbacks=(), ckpt_path=None, **options):
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 3, "callbacks": list(callbacks), **options})
    trainer.fit(model, datamodule=data or Data(), ckpt_path=ckpt_path)
    return trainer


class Watch(pl.Callback):
    """Epoch by epoch: is it still tuning, how often were heatmaps computed, what does the loss say."""

    def __init__(self, folder=None):
        self.folder, self.rows, self.weights = folder, [], None

    def on_fit_start(self, trainer, model):
        self.calls, explain = 0, model.net._explain

        def counted(*args):
            self.calls += model.net.training
            return explain(*args)

        model.net._explain = counted

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        if trainer.current_epoch == 1 and self.weights is None:
            self.weights = {key: value.clone() for key, value in model.state_dict().items()}

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        with torch.no_grad():
            self.last = float(outputs["total"])

    def on_validation_end(self, trainer, model):  # where checkpoints and early stopping look
        self.rows.append((model.tuning, self.calls, set(trainer.callback_metrics)))

    def on_train_epoch_end(self, trainer, model):
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


def test_first_the_classifier_alone_then_c1_and_c2_then_the_heatmap_loss():
    watch = Watch()
    model = fit(module(), callbacks=[watch]).lightning_module
    assert [(tuning, calls) for tuning, calls, _ in watch.rows] == [(True, 0), (False, 4), (False, 8)]
    assert "val/heatmap" not in watch.rows[0][2]
    assert "val/heatmap" in watch.rows[1][2]
    # the numbers are those of the tuning function, for the network as it was then
    data = Data()
    net = module().net
    net.load_state_dict({key.removeprefix("net."): value for key, value in watch.weights.items()})
    c1, c2 = fc.tune_c1_c2(net, [data.prepare(batch)["image"] for batch in data.loader("train")])
    assert model.tuned["c1"]["input"] == pytest.approx(c1["input"].tolist(), rel=1e-5)
    assert model.tuned["c2"]["input"] == pytest.approx(c2["input"].tolist(), rel=1e-5)
    assert model.loss.c1.values == model.tuned["c1"]


def test_before_tuning_the_loss_is_the_whole_cross_entropy():
    model = module(P=0.7)
    model.log = lambda *args, **options: None
    data = Data()
    batch = data.prepare(next(iter(data.loader("train"))))
    assert model.tuning
    total = model.training_step(batch, 0)["loss"]
    torch.testing.assert_close(total, F.cross_entropy(model.net(batch["image"]), batch["label"]))
    model.set_ranges({"input": [0.5]}, {"input": [2.0]})
    assert not model.tuning
    assert float(model.training_step(batch, 0)["loss"]) != pytest.approx(float(total))


def test_tuning_survives_a_resume_before_and_after_it(tmp_path):
    model = fit(module(), callbacks=[Watch(tmp_path)]).lightning_module
    for epoch in (0, 1):
        resumed = fit(module(), ckpt_path=tmp_path / f"{epoch}.ckpt").lightning_module
        assert resumed.tuned == model.tuned
        for (name, a), b in zip(model.state_dict().items(), resumed.state_dict().values()):
            assert torch.equal(a, b), (epoch, name)


def test_some_batches_spread_over_the_split():
    assert chosen(10, None) == (10, set(range(10)))
    assert chosen(10, 30) == (10, set(range(10)))
    assert chosen(9, 2) == (2, {0, 4})
    used = []

    class Count(Data):
        def prepare(self, batch):
            used.append(batch["index"].tolist())
            return super().prepare(batch)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return Data.prepare(self, batch)

    fit(module(tune_batches=2), Count(), max_epochs=2)
    assert used == [[0, 1, 2, 3], [8, 9, 10, 11]]


def test_dual_has_a_range_for_each_map(capsys):
    model = fit(module(variant="dual", supervise=["2"]), max_epochs=2).lightning_module
    assert {layer: len(values) for layer, values in model.tuned["c1"].items()} == {"input": 2, "2": 2}
    said = capsys.readouterr().out
    assert said.count("tuned after 1 epoch on all 4 batches of the training split") == 2
    assert f"C1 = {model.tuned['c1']['input'][1]:.4g}, C2 = {model.tuned['c2']['input'][1]:.4g}" in said


def test_the_callback_comes_along_once():
    model = module()
    trainer = fit(model, max_epochs=2)
    trainer.validate(model, datamodule=Data(), verbose=False)
    assert sum(isinstance(callback, TuneC1C2) for callback in trainer.callbacks) == 1
    assert not any(isinstance(callback, TuneC1C2) for callback in fit(module(tune_epochs=0), max_epochs=1).callbacks)


def test_errors():
    with pytest.raises(InputError, match="tune_epochs is 2 and training ends after 2 epochs: none is left for the heatmap loss"):
        fit(module(tune_epochs=2), max_epochs=2)

    class Other(pl.LightningDataModule):
        def train_dataloader(self):
            return Data().train_dataloader()

    with pytest.raises(InputError, match="tune_epochs needs training images without augmentation"):
        fit(module(), Other())  # at once, not after the epochs

    class Deaden(pl.Callback):
        def on_train_epoch_start(self, trainer, model):
            torch.nn.init.zeros_(model.net.model[-1].weight)

    with pytest.raises(InputError, match="C1 and C2 cannot be tuned: the heatmaps at 'input' are all zero"):
        fit(module(), callbacks=[Deaden()], max_epochs=2)
