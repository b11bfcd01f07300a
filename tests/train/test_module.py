"""`ISNetModule`: the step, what is logged, seeds, settings, mixed precision, processes, and what a resumed training knows."""

import copy
import math
import warnings
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score
from tiny_training import QUIET, SPEC, Data, samples

import fisnet_cuda as fc
from fisnet_cuda.data.spec import InputSpec
from fisnet_cuda.errors import InputError
from fisnet_cuda.evaluate.metrics import auc_scores
from fisnet_cuda.train.checkpoint import load_run
from fisnet_cuda.train.module import VARIANTS, ISNetModule
from fisnet_cuda.train.scores import Scores

pytestmark = pytest.mark.filterwarnings("error::fisnet_cuda.FisnetWarning")


def module(**settings):
    return ISNetModule(SPEC, **{"backbone": "tiny_training.net", "variant": "selective", **settings})


def fit(model, data=None, callbacks=(), ckpt_path=None, **options):
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": list(callbacks), **options})
    trainer.fit(model, datamodule=data or Data(), ckpt_path=ckpt_path)
    return trainer


class Record(pl.Callback):
    """Everything that a training does, step by step; keeps a checkpoint after the steps in ``keep``."""

    def __init__(self, folder=None, keep=()):
        self.folder, self.keep = folder, keep
        self.losses, self.draws, self.rates, self.epochs = [], [], [], []

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.losses.append(float(outputs["total"]))
        self.draws.append(float(torch.rand(())))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        step = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if step in self.keep:
            trainer.save_checkpoint(self.folder / f"{step}.ckpt")

    def on_train_epoch_end(self, trainer, model):
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items() if name != "loss"})


def batch_of(n=6):
    return Data().prepare(samples(n, 5))


# ---- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_is_classification_and_heatmap_loss(variant):
    model, batch = module(variant=variant, P=0.6), batch_of()
    model.log = lambda *args, **options: None
    torch.manual_seed(3)
    total = model.training_step(batch, 0)["loss"]
    net = copy.deepcopy(model.net.model)
    cross_entropy = F.cross_entropy(net(batch["image"]), batch["label"])
    if variant == "standard":
        expected = cross_entropy
    else:
        torch.manual_seed(3)
        out = fc.ISNet(net, variant=variant)(batch["image"], relevance=True)
        expected, parts = fc.ISNetLoss(P=0.6)(out, batch["label"], batch["mask"], has_mask=batch["has_mask"])
        assert torch.allclose(model.train_means["background_share"].compute().float(), parts.background_share)
    torch.testing.assert_close(total, expected)
    total.backward()
    assert all(p.grad is not None for p in model.net.parameters())


def test_unlabelled_samples_train_the_heatmap_only():
    model, batch = module(P=0.5), batch_of()
    model.log = lambda *args, **options: None
    batch["label"] = torch.full_like(batch["label"], -1)
    total = model.training_step(batch, 0)["loss"]
    heatmap = model.train_means["heatmap"].compute()
    torch.testing.assert_close(total.double(), 0.5 * heatmap, check_dtype=False)
    assert model.train_means["accuracy"].sums[1] == 0


def test_class_weights_and_smoothing():
    model = module(class_weights=[1.0, 3.0], label_smoothing=0.1)
    logits, labels = torch.randn(5, 2), torch.tensor([0, 1, 1, -1, 0])
    expected = F.cross_entropy(logits, labels, torch.tensor([1.0, 3.0]), ignore_index=-1, label_smoothing=0.1)
    torch.testing.assert_close(model.classification(logits, labels), expected)


def test_balanced_class_weights_come_from_the_training_split_and_into_the_checkpoint(tmp_path):
    data = Data()
    labels, data.splits = [0, 0, 0, 1, 1], ["train"] * 4 + ["val"]
    data.listing = type("Listing", (), {"samples": [type("Sample", (), {"label": label}) for label in labels]})
    trainer = fit(module(class_weights="balanced"), data, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert load_run(tmp_path / "a.ckpt").classification.weights.tolist() == pytest.approx([4 / 6, 4 / 2])
    with pytest.raises(InputError, match="class_weights='balanced' counts the labels"):
        fit(module(class_weights="balanced"), Data(), max_epochs=1)


def test_bf16_mixed_precision_keeps_the_loss_in_float32():
    record = Record()
    trainer = fit(module(variant="dual"), callbacks=[record], precision="bf16-mixed", max_epochs=1)
    model = trainer.lightning_module
    assert all(math.isfinite(loss) for loss in record.losses)
    assert next(model.net.parameters()).dtype == torch.float32
    model.log = lambda *args, **options: None
    with torch.autocast("cpu", torch.bfloat16):
        assert model.training_step(trainer.datamodule.prepare(samples(4, 0)), 0)["loss"].dtype == torch.float32


def test_compiled_network_trains_to_the_same_losses_and_keeps_its_keys(monkeypatch):
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_(self, backend="eager"))
    plain, compiled = Record(), Record()
    fit(module(), callbacks=[plain], max_epochs=1)
    model = fit(module(compile=True), callbacks=[compiled], max_epochs=1).lightning_module
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
    assert all(key.startswith("net.0.") or ".0." not in key for key in model.state_dict())
    assert "net.0.weight" in model.state_dict()


def test_module_can_be_copied_for_averaging():
    model = fit(module(), max_epochs=1).lightning_module
    other = copy.deepcopy(model)
    x = torch.rand(2, 1, 12, 12)
    assert torch.equal(other.explain(x).heatmaps, model.explain(x).heatmaps)


# ---- explaining ------------------------------------------------------------------------------------------------------


def test_explain_leaves_modes_and_randomness_alone():
    model, x = module(variant="stochastic", backbone_args={"dropout": 0.5}).train(), torch.rand(4, 1, 12, 12)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    first, second = model.explain(x), model.explain(x)
    assert torch.equal(first.heatmaps, second.heatmaps)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(m.training for m in model.net.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not first.heatmaps.requires_grad


@pytest.mark.parametrize("variant", VARIANTS)
def test_explain_targets(variant):
    model, x = module(variant=variant).eval(), torch.rand(4, 1, 12, 12)
    predicted = model(x).argmax(1)
    told = model.explain(x, "predicted")
    assert torch.equal(told.explained[:, 0], predicted)
    labels = torch.tensor([0, 1, -1, 1])
    assert torch.equal(model.explain(x, "label", labels).explained[:, 0], torch.where(labels >= 0, labels, predicted))
    assert torch.equal(model.explain(x, labels.clamp(min=0)).explained[:, 0], labels.clamp(min=0))
    rules = fc.rules.RuleMap(first=fc.rules.ZB(0.0, 1.0, 0.01))
    torch.testing.assert_close(told.heatmaps, fc.relevance(model.net, x, predicted, rules))
    if variant == "standard":
        torch.testing.assert_close(model.explain(x).heatmaps, told.heatmaps)
    with pytest.raises(InputError, match="target must be"):
        model.explain(x, "label")


def test_bounds_of_the_first_layer_are_those_of_the_normalised_image():
    spec = InputSpec((12, 12), 1, ("a", "b"), mean=(0.5,), std=(0.25,))
    model = ISNetModule(spec, backbone="tiny_training.net")
    assert model.net._bounds == (-2.0, 2.0)


# ---- what is logged --------------------------------------------------------------------------------------------------


def test_names_of_what_is_logged():
    metrics = fit(module(), max_epochs=1).callback_metrics
    terms = {"loss", "classification", "heatmap", "background", "foreground", "background_share", "accuracy"}
    assert {f"train/{t}" for t in terms} <= set(metrics)
    assert {f"val/{t}" for t in terms | {"balanced_accuracy", "macro_f1", "auroc"}} <= set(metrics)
    assert float(metrics["val/loss"]) == pytest.approx(0.3 * float(metrics["val/classification"]) + 0.7 * float(metrics["val/heatmap"]))
    standard = fit(module(variant="standard"), max_epochs=1).callback_metrics
    assert "train/heatmap" not in standard
    assert 0 < float(standard["val/background_share"]) < 1
    assert float(standard["val/loss"]) == float(standard["val/classification"])


def test_validation_does_not_depend_on_the_batch_size():
    model = module()
    results = []
    for batch_size in (1, 3, 10):
        trainer = pl.Trainer(**QUIET)
        results.append(trainer.validate(model, datamodule=Data(batch_size=batch_size), verbose=False)[0])
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-5)


def test_scores_are_sklearns():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(60, 4, generator=generator), torch.randint(0, 3, (60,), generator=generator)  # class 3 never occurs
    scores = Scores(4)
    for rows in torch.arange(60).split(17):
        scores.update(logits[rows], labels[rows], torch.tensor(0.0), torch.tensor(1.0), None, torch.tensor(0))
    scores.update(torch.randn(3, 4), torch.full((3,), -1), torch.tensor(0.0), torch.tensor(0.0), None, torch.tensor(0))
    result, told, probabilities = scores.compute(), logits.argmax(1), logits.softmax(1)
    assert float(result["accuracy"]) == pytest.approx(float((told == labels).double().mean()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert float(result["balanced_accuracy"]) == pytest.approx(balanced_accuracy_score(labels, told))
    assert float(result["macro_f1"]) == pytest.approx(f1_score(labels, told, average="macro"))
    expected = sum(roc_auc_score(labels == c, probabilities[:, c]) for c in range(3)) / 3
    assert float(result["auroc"]) == pytest.approx(expected)
    assert "heatmap" not in result


@pytest.mark.parametrize("classes", [2, 3])
def test_auroc_of_a_sure_net(classes):
    """Its probabilities are 1.0 in float32, for all samples."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(80, classes, generator=generator), torch.randint(0, 2, (80,), generator=generator)
    logits[:, 0] += 200 - labels
    assert (logits.softmax(1)[:, 0] == 1).all()
    scores = Scores(classes)
    scores.update(logits, labels, torch.tensor(0.0), torch.tensor(1.0), None, torch.tensor(0))
    expected = [roc_auc_score(labels == c, auc_scores(logits.double().numpy())[:, c]) for c in range(2)]
    assert min(expected) > 0.6
    assert float(scores.compute()["auroc"]) == pytest.approx(sum(expected) / 2, abs=1e-3)


def test_auroc_of_one_class_is_nan():
    scores = Scores(2)
    scores.update(torch.randn(3, 2), torch.ones(3).long(), torch.tensor(0.0), torch.tensor(1.0), None, torch.tensor(0))
    assert math.isnan(scores.compute()["auroc"])


def test_predictions():
    batches = pl.Trainer(**QUIET).predict(module(), datamodule=Data())
    assert torch.cat([b["index"] for b in batches]).tolist() == list(range(10))
    torch.testing.assert_close(torch.cat([b["probabilities"] for b in batches]).sum(1), torch.ones(10))


# ---- seeds and resuming ----------------------------------------------------------------------------------------------


def test_initial_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    a = module(seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(10)
    b, c = module(seed=4), module(seed=5)
    assert torch.equal(a.net.model[0].weight, b.net.model[0].weight)
    assert not torch.equal(a.net.model[0].weight, c.net.model[0].weight)


def test_every_batch_draws_anew_whatever_happens_between():
    class Disturb(pl.Callback):
        def on_train_batch_start(self, *args):
            torch.rand(7)

        def on_train_batch_end(self, *args):
            torch.rand(3)

    settings = {"variant": "stochastic", "backbone_args": {"dropout": 0.3}}
    runs = []
    for callbacks in ([], [Disturb()]):
        record, data = Record(), Data()
        fit(module(**settings), data, [*callbacks, record], accumulate_grad_batches=2)
        runs.append((data.drawn, record.losses))
    assert runs[0] == runs[1]
    assert len(set(runs[0][0])) == 8  # 2 epochs of 4 batches: also the two of one optimizer step


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("step", "variant"), [(2, "stochastic"), (4, "stochastic"), (6, "stochastic"), (6, "contrast"), (8, "stochastic")]
)
def test_resumed_anywhere_it_goes_on_as_if_nothing_had_happened(tmp_path, step, variant, accumulate):
    settings = {
        "variant": variant, "backbone_args": {"dropout": 0.3}, "P": {0: 0.3, 2: 0.7}, "tune_epochs": 1, "schedule": "cosine",
        "warmup_steps": 2,
    }  # fmt: skip
    whole = Record(tmp_path, keep=(step,))
    first = Data()
    end = fit(module(**settings), first, [whole], max_epochs=3, accumulate_grad_batches=accumulate).lightning_module
    part, data = Record(), Data(start=step % 4)
    resumed = fit(module(**settings), data, [part], tmp_path / f"{step}.ckpt", max_epochs=3, accumulate_grad_batches=accumulate)
    assert part.losses == whole.losses[step:]
    assert part.draws == whole.draws[step:]
    assert part.rates == whole.rates[step:]
    assert data.drawn == first.drawn[step:]
    assert part.epochs == whole.epochs[-len(part.epochs) :]
    assert resumed.lightning_module.tuned == end.tuned
    assert resumed.lightning_module.loss.P_now == 0.7
    for (name, a), b in zip(end.state_dict().items(), resumed.lightning_module.state_dict().values()):
        assert torch.equal(a, b), name


def test_p_schedule_goes_by_the_epoch():
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, model, *args):
            seen.append(model.loss.P_now)

        def on_validation_batch_end(self, trainer, model, *args):
            seen.append(-model.loss.P_now)

    trainer = fit(module(P={0: 0.0, 1: 0.5}), callbacks=[Look()], max_epochs=2)
    assert seen == [0.0] * 4 + [-0.0] * 3 + [0.5] * 4 + [-0.5] * 3
    assert float(trainer.callback_metrics["train/heatmap"]) > 0


# ---- learning rates --------------------------------------------------------------------------------------------------


def rates(**settings):
    record = Record()
    fit(module(variant="standard", lr=1.0, **settings), Data(train=8), [record], max_epochs=8, limit_val_batches=1)  # 2 steps an epoch
    return [1.0, *record.rates[:-1]] if not settings.get("warmup_steps") else record.rates[:-1]


def test_schedules():
    assert rates() == [1.0] * 16
    assert rates(schedule="step") == pytest.approx([1.0] * 8 + [0.1] * 4 + [0.01] * 4)
    assert rates(schedule="cosine") == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 16)) for i in range(16)])
    warm = rates(schedule="cosine", warmup_steps=4)
    assert warm[:3] == pytest.approx([0.5, 0.75, 1.0])
    assert warm[3:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 12)) for i in range(12)])
    assert rates(warmup_steps=4) == pytest.approx([0.5, 0.75] + [1.0] * 13)
    assert rates(schedule="plateau", warmup_steps=4) == pytest.approx([0.5, 0.75] + [1.0] * 13)


def test_plateau_does_not_look_at_the_tuning_epochs():
    model = module(schedule="plateau", tune_epochs=1)
    trainer = fit(model, max_epochs=1 + 1)
    plateau = trainer.lr_scheduler_configs[0].scheduler
    assert plateau.last_epoch == 1
    assert plateau.best == pytest.approx(float(trainer.callback_metrics["val/loss"]))


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_optimizers(name, kind):
    trainer = fit(module(optimizer=name, lr=1e-3, momentum=0.8, weight_decay=0.02), max_epochs=1)
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.02)
    assert group.get("momentum", group.get("betas", (None,))[0] if name != "sgd" else None) == 0.8
    assert optimizer.state  # it has stepped


def test_schedules_without_an_end():
    with pytest.raises(InputError, match="schedule 'cosine' needs to know when training ends"):
        fit(module(schedule="cosine"), max_epochs=-1, limit_train_batches=1)
    with pytest.raises(InputError, match="warmup_steps is 8 and training has 8 steps"):
        fit(module(schedule="step", warmup_steps=8))


def test_command_line_can_choose_optimizer_and_schedule():
    from lightning.pytorch.cli import LightningCLI

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser):
            parser.link_arguments("data.spec", "model.spec", apply_on="instantiate")

    options = [f"--trainer.{key}={str(value).lower()}" for key, value in QUIET.items()]
    cli = CLI(
        ISNetModule, Data, run=False, seed_everything_default=False, save_config_callback=None,
        args=["--model.backbone=tiny_training.net", "--model.P={0: 0.1, 3: 0.7}", "--optimizer=torch.optim.Adam", "--optimizer.lr=0.02",
              "--lr_scheduler=torch.optim.lr_scheduler.ExponentialLR", "--lr_scheduler.gamma=0.5", "--trainer.max_epochs=1", *options],
    )  # fmt: skip
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert isinstance(cli.trainer.optimizers[0], torch.optim.Adam)
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)
    assert cli.model.loss.P == {0: 0.1, 3: 0.7}
    assert cli.model.hparams["spec"] == SPEC.to_dict()


# ---- two processes ---------------------------------------------------------------------------------------------------


class Tell(pl.Callback):
    """Writes down what a process knows at the end."""

    def __init__(self, folder):
        self.folder = folder

    def on_fit_end(self, trainer, model):
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        assert trainer.world_size == 2
        torch.save((model.tuned, metrics, model.state_dict()), self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.slow
def test_two_processes_agree_and_count_each_sample_once(tmp_path):
    settings = {"tune_epochs": 1, "tune_batches": 2, "lr": 0.05}
    options = {"strategy": "ddp_spawn", "devices": 2, "max_epochs": 2}
    data = Data(batch_size=2, val=5)  # 3 validation samples in 2 batches for one, 2 in 1 for the other
    pl.Trainer(**{**QUIET, **options}, callbacks=[Tell(tmp_path)]).fit(module(**settings), datamodule=data)
    (tuned, metrics, weights), (tuned1, metrics1, weights1) = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    assert tuned == tuned1
    assert {k: v for k, v in metrics.items() if k != "loss"} == {k: v for k, v in metrics1.items() if k != "loss"}
    statistics = [key for key in weights if "running" in key]
    assert all(torch.equal(weights[key], weights1[key]) for key in weights if key not in statistics)
    # validated by hand: each process has its samples, and its own BatchNorm statistics
    total, right = 0.0, 0
    for rank, state in enumerate((weights, weights1)):
        model = module(**settings).eval()
        model.load_state_dict(state)
        batch = data.prepare({key: value[rank::2] for key, value in data.val.items()})
        logits = model(batch["image"]).detach()
        total += float(F.cross_entropy(logits, batch["label"], reduction="sum"))
        right += int((logits.argmax(1) == batch["label"]).sum())
    assert metrics["val/classification"] == pytest.approx(total / 5, rel=1e-5)
    assert metrics["val/accuracy"] == pytest.approx(right / 5)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "fast"}, "variant must be one of stochastic, selective, dual, original, contrast, standard, got 'fast'"),
        ({"schedule": "linear"}, "schedule must be one of"),
        ({"optimizer": "adamax"}, "optimizer must be one of sgd, adam, adamw, got 'adamax'"),
        ({"P": 1.5}, r"P must be in \[0, 1\], got 1.5"),
        ({"P": {1: 0.5}}, "P must say what holds from epoch 0 on"),
        ({"d": 2}, "d must be in"),
        ({"c1": 30.0}, "c1 must not exceed c2"),
        ({"lr": 0}, "lr must be > 0"),
        ({"lr": -1.0}, "lr must be finite and >= 0"),
        ({"momentum": True}, "momentum must be"),
        ({"supervise": ["layer9"]}, "layer9"),
        ({"eps": -1.0}, "eps"),
        ({"rules": "zplu"}, "unknown preset 'zplu'"),
        ({"rules": {"conv": "gama"}}, "rules: 'conv' must be"),
        ({"rules": {"conv": {"rule": "gamma", "delta": 1}}}, "rules: 'conv': .*delta"),
        ({"class_weights": [1.0]}, "class_weights must be 'balanced' or one number >= 0 for each of the 2 classes"),
        ({"tune_epochs": 1, "variant": "standard"}, "tune_epochs is for the heatmap loss"),
        ({"tune_batches": 0}, "tune_batches must be at least 1"),
    ],
)
def test_settings_that_cannot_be_used(settings, message):
    with pytest.raises(InputError, match=message) as caught:
        module(**settings)
    assert "\n" not in str(caught.value)


def test_spec_is_needed():
    with pytest.raises(InputError, match="spec is missing"):
        ISNetModule(backbone="tiny_training.net")
    with pytest.raises(InputError, match="spec must be"):
        ISNetModule({"sise": [3, 3]})


def test_masks_that_cannot_be_right_are_one_line():
    class Wrong(Data):
        def prepare(self, batch):
            return {**super().prepare(batch), "mask": batch["mask"].float()}

    with pytest.raises(InputError, match=r"masks must be within \[0, 1\]"):
        fit(module(), Wrong())


@pytest.mark.parametrize("masks", [0, 1])
def test_a_training_split_without_any_mask_is_for_the_standard_variant(masks):
    data = Data()
    has_mask = torch.tensor([True, True, masks > 0, False])
    subset = type("Subset", (), {"store": SimpleNamespace(has_mask=has_mask), "indices": torch.tensor([2, 3]), "__len__": lambda s: 2})
    data.subset = lambda name: subset()
    fit(module(variant="standard"), data, max_epochs=1)
    if masks:
        fit(module(), data, max_epochs=1)
    else:
        with pytest.raises(InputError, match="none of the 2 training images has a mask, and variant 'selective' learns from masks"):
            fit(module(), data, max_epochs=1)


def test_plateau_needs_a_validation_split():
    data = Data()
    data.splits = ["train", "test"]
    with pytest.raises(InputError, match="schedule 'plateau' goes by val/loss, and there is no validation split"):
        fit(module(schedule="plateau"), data)


def test_rules_by_layer():
    model = module(rules={"conv": {"rule": "gamma", "gamma": 0.5}, "9": "z_plus"}, first_layer="epsilon")
    plan = str(model.net.plan()).lower()
    assert "gamma" in plan
