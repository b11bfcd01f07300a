"""Runs read back without their data: weights, settings, C1 and C2, and nothing that could run code."""

import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from tiny_training import QUIET, SPEC, Data

from fisnet_cuda.data.spec import InputSpec
from fisnet_cuda.errors import FisnetWarning, InputError
from fisnet_cuda.train.checkpoint import checkpoint_path, load_run, run_config
from fisnet_cuda.train.module import ISNetModule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "default::fisnet_cuda.FisnetWarning")


def train(path, callbacks=(), spec=SPEC, **settings):
    model = ISNetModule(spec, **{"backbone": "tiny_training.net", "variant": "dual", **settings})
    trainer = pl.Trainer(**QUIET, max_epochs=2, callbacks=list(callbacks))
    trainer.fit(model, datamodule=Data(spec))
    trainer.save_checkpoint(path)
    return model


def test_everything_comes_back_but_the_data(tmp_path):
    spec = InputSpec((12, 12), 1, ("dark", "bright"), mean=(0.5,), std=(0.25,), window=(0.0, 255.0))
    settings = {
        "tune_epochs": 1, "P": {0: 0.2, 1: 0.6}, "rules": {"conv": {"rule": "gamma", "gamma": 0.5}}, "supervise": ["2"],
        "eps": 0.02, "backbone_args": {"dropout": 0.25}, "class_weights": [1.0, 2.0], "seed": 3,
    }  # fmt: skip
    model = train(tmp_path / "last.ckpt", spec=spec, **settings).eval()
    loaded = load_run(tmp_path, which="last")
    assert not loaded.training
    assert loaded.spec == spec
    assert dict(loaded.hparams) == dict(model.hparams)
    assert loaded.tuned == model.tuned is not None
    assert set(loaded.tuned["c1"]) == {"input", "2"}
    assert loaded.loss.c2.values == model.loss.c2.values
    assert loaded.loss.P_now == 0.6
    assert not loaded.tuning
    x = torch.rand(3, 1, 12, 12)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(loaded.explain(x).heatmaps, model.explain(x).heatmaps)
    assert loaded.classification.weights.tolist() == [1.0, 2.0]
    # validated as it was in training
    before, after = (pl.Trainer(**QUIET).validate(m, datamodule=Data(spec), verbose=False)[0] for m in (model, loaded))
    assert before == after


def test_file_holds_the_users_model_and_no_code(tmp_path):
    model = train(tmp_path / "a.ckpt", tune_epochs=1, schedule="cosine")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    own = model.net.model.state_dict()
    assert list(content["state_dict"]) == [f"net.{key}" for key in own]
    plain = type(model.net.model)(*model.net.model)
    plain.load_state_dict({key.removeprefix("net."): value for key, value in content["state_dict"].items()})
    assert content["hyper_parameters"]["spec"] == SPEC.to_dict()


def test_lightnings_own_way_of_loading_works(tmp_path):
    model = train(tmp_path / "a.ckpt", tune_epochs=1)
    loaded = ISNetModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.tuned == model.tuned


class SaveInTraining(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, model):
        trainer.save_checkpoint(self.path)


def test_averaged_weights_are_loaded(tmp_path):
    train(tmp_path / "z.ckpt", [EMAWeightAveraging(decay=0.5), SaveInTraining(tmp_path / "a.ckpt")], tune_epochs=1, lr=0.1)
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    name = "net.0.weight"
    assert not torch.equal(content["state_dict"][name], content["current_model_state"][name])
    loaded = load_run(tmp_path / "a.ckpt")
    assert torch.equal(loaded.state_dict()[name], content["state_dict"][name])


def test_weights_to_start_from_are_not_needed_again(tmp_path):
    start = tmp_path / "start.pt"
    torch.save(ISNetModule(SPEC, backbone="tiny_training.net", seed=9).net.state_dict(), start)
    model = ISNetModule(SPEC, backbone="tiny_training.net", weights=str(start), seed=1)
    assert torch.equal(model.net.model[0].weight, torch.load(start)["0.weight"])
    train(tmp_path / "a.ckpt", weights=str(start))
    start.unlink()
    assert load_run(tmp_path / "a.ckpt").hparams["weights"] == str(start)


def test_which_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"has no best.ckpt: did training get so far"):
        checkpoint_path(tmp_path)
    (tmp_path / "last.ckpt").touch()
    with pytest.warns(FisnetWarning, match="has no best.ckpt yet: last.ckpt is used"):
        assert checkpoint_path(tmp_path).name == "last.ckpt"
    (tmp_path / "best.ckpt").touch()
    assert checkpoint_path(tmp_path).name == "best.ckpt"
    assert checkpoint_path(tmp_path, "last").name == "last.ckpt"
    assert checkpoint_path(tmp_path / "last.ckpt") == tmp_path / "last.ckpt"
    with pytest.raises(InputError, match="which must be one of best, last"):
        checkpoint_path(tmp_path, "first")
    with pytest.raises(InputError, match="there is no run folder or checkpoint"):
        checkpoint_path(tmp_path / "nowhere")
    (tmp_path / "last.ckpt").unlink()
    with pytest.raises(InputError, match=r"has no last.ckpt; there are best.ckpt: name one of them"):
        checkpoint_path(tmp_path, "last")


class Danger:
    def __reduce__(self):
        return print, ("code was run",)


def test_files_that_are_no_checkpoints(tmp_path, capsys):
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"a.ckpt"):
        load_run(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"a.ckpt cannot be read"):
        load_run(path)
    torch.save({"state_dict": Danger(), "hyper_parameters": {}, "isnet": {}}, path)
    with pytest.raises(InputError, match="holds more than weights and settings"):
        load_run(path)
    path.write_bytes(pickle.dumps(Danger()))
    with pytest.raises(InputError, match=r"a.ckpt"):
        load_run(path)
    assert "code was run" not in capsys.readouterr().out
    torch.save({"0.weight": torch.ones(1)}, path)
    with pytest.raises(InputError, match="is not a checkpoint of fisnet-cuda fit: start a new training from it"):
        load_run(path)


def test_checkpoints_that_do_not_fit(tmp_path):
    train(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)

    for settings, message in (
        ({"backbone": "gone.net"}, r"b.ckpt: backbone gone.net: there is no module 'gone' here"),
        ({"unheard_of": 1}, "b.ckpt does not fit this version of the package or of the backbone: .*unheard_of"),
        ({"backbone": "fisnet_cuda.nets.small"}, "b.ckpt does not fit this version of the package or of the backbone"),
    ):
        torch.save({**content, "hyper_parameters": {**content["hyper_parameters"], **settings}}, tmp_path / "b.ckpt")
        with pytest.raises(InputError, match=message) as caught:
            load_run(tmp_path / "b.ckpt")
        assert "\n" not in str(caught.value)


def test_config_of_a_run(tmp_path):
    with pytest.raises(InputError, match=r"there is no .*config.yaml"):
        run_config(tmp_path)
    (tmp_path / "config.yaml").write_text("model:\n  lr: 0.1\n")
    assert run_config(tmp_path) == run_config(tmp_path / "best.ckpt") == {"model": {"lr": 0.1}}
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(InputError, match="is not YAML"):
        run_config(tmp_path)
    (tmp_path / "config.yaml").write_text("3")
    with pytest.raises(InputError, match="holds no settings"):
        run_config(tmp_path)
