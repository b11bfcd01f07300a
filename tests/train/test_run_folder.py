"""What a run's folder holds after a training that finished, stopped early, failed or was interrupted; and with real data."""

from __future__ import annotations

import csv
import json

import lightning.pytorch as pl
import pytest
import torch

from fisnet_cuda.data.module import MaskedImageData
from fisnet_cuda.train.callbacks import callbacks
from fisnet_cuda.train.divergence import DivergedError
from fisnet_cuda.train.module import ISNetModule
from fisnet_cuda.train.run_folder import table
from tests.data import make
from tests.train.tiny import Tiny, fit


def rows(run):
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def summary(run):
    return json.loads((run / "summary.json").read_text())


def own(run, **options):
    return callbacks(run, figures_every=0, **options)


class Ends(Tiny):
    """Logs where Lightning lets a module log last."""

    def on_train_epoch_end(self):
        self.log("train/end", 10.0 + self.current_epoch)


def test_a_row_an_epoch(tmp_path):
    fit(tmp_path, [3.0, float("nan"), 2.0], own(tmp_path), module=Ends)
    found = rows(tmp_path)
    assert list(found[0]) == ["epoch", "step", "train/end", "train/loss", "val/accuracy", "val/loss", "lr", "seconds"]
    assert [(r["epoch"], r["step"], r["val/loss"], r["train/end"]) for r in found] == [
        ("0", "6", "3", "10"), ("1", "12", "nan", "11"), ("2", "18", "2", "12"),
    ]  # fmt: skip
    assert all(float(r["lr"]) == 0.1 and float(r["seconds"]) > 0 for r in found)


def test_train_loss_is_the_mean_over_the_epoch(tmp_path):
    losses = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    fit(tmp_path, [1.0, 1.0], [*own(tmp_path), Watch()])
    for epoch, row in enumerate(rows(tmp_path)):
        assert float(row["train/loss"]) == pytest.approx(sum(losses[6 * epoch : 6 * epoch + 6]) / 6, rel=1e-6)


def test_rows_of_repeated_epochs_are_replaced(tmp_path):
    fit(tmp_path, [3.0, 1.0, 2.0, 2.0], own(tmp_path))
    assert [r["val/loss"] for r in rows(tmp_path)] == ["3", "1", "2", "2"]
    fit(tmp_path, [9.0, 9.0, 7.0], own(tmp_path), ckpt_path=tmp_path / "best.ckpt")
    assert [(r["epoch"], r["val/loss"]) for r in rows(tmp_path)] == [("0", "3"), ("1", "1"), ("2", "7")]


def test_columns_that_come_later():
    assert table([{"epoch": 0, "lr": 0.1, "seconds": 1.0}, {"epoch": 1, "val/heatmap": 2.0, "seconds": 1.0}]).splitlines() == [
        "epoch,val/heatmap,lr,seconds", "0,,0.1,1", "1,2,,1",
    ]  # fmt: skip
    value = torch.tensor(1 / 3)  # written with all digits of a float32
    assert torch.tensor(float(table([{"a": float(value)}]).splitlines()[1])) == value


def test_summary_of_a_finished_run(tmp_path):
    fit(tmp_path, [3.0, 1.0, 2.0], own(tmp_path))
    found = summary(tmp_path)
    assert (found["ended"], found["epochs"], found["steps"], found["monitor"]) == ("finished", 3, 18, "val/loss")
    assert (found["best"]["epoch"], found["best"]["val/loss"], found["last"]["val/loss"]) == (1, 1.0, 2.0)
    assert found["versions"]["torch"] == torch.__version__
    assert found["parameters"] == 4
    fit(tmp_path, [3.0, 1.0, 2.0, 5.0], own(tmp_path), ckpt_path=tmp_path / "last.ckpt")
    again = summary(tmp_path)
    assert (again["epochs"], again["best"]["epoch"]) == (4, 1)
    assert again["seconds"] > again["last"]["seconds"]


def test_summary_of_an_early_stop(tmp_path):
    fit(tmp_path, [1.0, 2.0, 3.0, 4.0], own(tmp_path, patience=1))
    assert (summary(tmp_path)["ended"], summary(tmp_path)["epochs"]) == ("stopped early", 2)


def test_summary_of_a_failure(tmp_path):
    class Fails(Tiny):
        def on_train_batch_start(self, batch, batch_idx):
            if self.current_epoch == 1:
                raise ConnectionError("the disk\nis gone")

    with pytest.raises(ConnectionError):
        fit(tmp_path, [1.0, 2.0], own(tmp_path), module=Fails)
    found = summary(tmp_path)
    assert (found["ended"], found["error"], found["epochs"]) == ("failed", "the disk", 1)


def test_summary_of_an_interruption(tmp_path):
    class Interrupted(Tiny):
        def on_train_batch_start(self, batch, batch_idx):
            if self.current_epoch == 1:
                raise KeyboardInterrupt

    with pytest.raises(BaseException):  # noqa: B017, PT011  (a SystemExit of Lightning's)
        fit(tmp_path, [1.0, 2.0], own(tmp_path), module=Interrupted)
    assert (summary(tmp_path)["ended"], summary(tmp_path)["epochs"]) == ("interrupted", 1)


def test_a_diverged_run_keeps_its_last_good_checkpoint(tmp_path):
    class Diverges(Tiny):
        variant = "standard"

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.current_epoch == 1 and batch_idx == 3 else loss

    class Hyper(Diverges):
        def __init__(self, *args):
            super().__init__(*args)
            self._set_hparams({"lr": 0.1, "d": 0.9})

    with pytest.raises(DivergedError, match=r"last good checkpoint is .*last.ckpt"):
        fit(tmp_path, [1.0, 2.0], own(tmp_path, checkpoint_every_steps=2), module=Hyper)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 8
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    assert summary(tmp_path)["ended"] == "failed"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the package's own module and data, with everything that a folder can hold."""
    root = tmp_path_factory.mktemp("real")
    data = MaskedImageData(str(make.folder(root / "data", n=40, size=24)), size=24, channels=1, batch_size=8)
    module = ISNetModule(data.spec, backbone="fisnet_cuda.nets.small", variant="selective", tune_epochs=1, lr=0.05)
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=callbacks(root / "run", ema=0.9, figures_every=2, figures_images=3), logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, data)
    return root / "run", data, module


def test_folder_of_a_real_run(trained):
    run, data, module = trained
    assert {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()} == {
        "best.ckpt", "last.ckpt", "metrics.csv", "summary.json", "split.csv", "data_report.json", "data_report.md",
        "heatmaps/epoch-0000.png", "heatmaps/epoch-0001.png",
    }  # fmt: skip
    with (run / "split.csv").open() as file:
        assert [row["split"] for row in csv.DictReader(file)] == data.splits
    assert (run / "data_report.md").read_text() == f"{data.report}\n"
    assert json.loads((run / "data_report.json").read_text())["images"] == 40
    found = rows(run)
    assert [row["val/heatmap"] != "" for row in found] == [False, True, True]  # the first epoch trained the classifier alone
    assert summary(run)["c1_c2"] == module.tuned
    assert summary(run)["best"]["epoch"] > 0


def test_read_back(trained):
    from fisnet_cuda.train.checkpoint import load_run

    run, _, module = trained
    last = load_run(run, which="last")
    for key, value in module.state_dict().items():  # after training the module holds the average, as the checkpoint does
        if "num_batches_tracked" not in key:
            assert torch.equal(last.state_dict()[key], value), key
