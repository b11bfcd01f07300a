"""The whole tool, as its users have it: real files and real processes, from images on disk to an exported network.

A training that is killed with ``kill -9`` and started again is the one that was not, bit by bit; two processes are one with twice the
batch; what each command writes is read back and compared with what another way of computing it gives; and whatever is wrong with
a command line is told in one line, with nothing written.
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lightning")
pytest.importorskip("kornia")
import real_data
import torch
from data.make import folder
from PIL import Image

from tests.cli.commands import Commands, files, fresh, torchrun
from tests.train.runs import differences, metrics, state

NET = '''
import torch
from torch import nn


class Net(nn.Module):
    """Convolutions and, as asked for, BatchNorm and dropout."""

    def __init__(self, num_classes=2, in_channels=1, norm=True, dropout=0.2):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv1(x)))
        x = torch.relu(self.conv2(x)).mean((2, 3))
        return self.head(self.drop(x))


class Spectral(Net):
    """LRP has no rule for its Fourier transform."""

    def forward(self, x):
        return super().forward(torch.fft.fft2(x).abs())


class Broken(Net):
    def forward(self, x):
        return super().forward(x.flatten(1))
'''


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """``images/<class>/*.png`` with ``masks/`` beside it, a square outside the masks that gives the class away, and net.py."""
    root = folder(tmp_path_factory.mktemp("data"), n=90, size=24, mark=True)
    (root / "net.py").write_text(NET)
    return root


def training(data: Path, run: Path, *more: object) -> list[str]:
    """A command that trains."""
    argv = ["fit", "--path", data / "images", "--masks", data / "masks", "--size", 24, "--data.channels", 1]
    argv += ["--backbone", f"{data / 'net.py'}:Net", "--epochs", 2, "--lr", 0.1, "--trainer.accelerator", "cpu", "--run", run]
    return [str(a) for a in (*argv, *more)]


# ---- killed and resumed ------------------------------------------------------------------------------------------------

STEPS = 31  # an epoch: 63 training images, two by two
EVERYTHING = [
    *("-b", "2", "--variant", "stochastic", "--model.tune_epochs", "1", "--model.schedule", "cosine", "--model.warmup_steps", "5"),
    *("--data.augment", "strong", "--data.balance", "true", "--ema", "0.9", "--patience", "5", "--checkpoint_every_steps", "2"),
    *("--figures_images", "2"),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a training that was left alone; not to be changed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = fresh(*training(data, run, *EVERYTHING), cwd=data)
    assert (done.status, done.err) == (0, "")
    assert [line.split()[0] for line in done.out.splitlines() if "/2 " in line] == ["1/2", "2/2"]
    return run


def saved_step(run: Path) -> int:
    """How many steps the training that ``last.ckpt`` holds has made; 0: there is none yet."""
    last = run / "last.ckpt"
    return torch.load(last, weights_only=True, mmap=True)["global_step"] if last.exists() else 0


def killed(commands: Commands, argv: list[str], run: Path, epoch: int) -> int:
    """Trains until there is a checkpoint from the middle of that epoch, and a little longer; returns the checkpoint's step."""
    process = commands.start(*argv)
    while process.alive() and not epoch * STEPS < saved_step(run) < (epoch + 1) * STEPS:
        time.sleep(0.005)
    time.sleep(0.05)
    process.kill()
    assert process.end().status == -9
    return saved_step(run)


@pytest.fixture(scope="module")
def resumed(commands, data, trained):
    """The same training in another folder: killed in the epoch that trains the classifier alone, killed again in the next, let run."""
    run = trained.with_name("killed")
    argv = training(data, run, *EVERYTHING)
    steps = [killed(commands, argv, run, epoch) for epoch in (0, 1)]
    assert 0 < steps[0] < STEPS < steps[1] < 2 * STEPS
    done = commands.run(*argv)
    assert (done.status, done.err) == (0, "")
    assert f"going on with {run / 'last.ckpt'}" in done.out
    assert not [line for line in done.out.splitlines() if line.startswith("      1/2")]  # the first epoch is not repeated
    return run


@pytest.mark.parametrize("checkpoint", ["last.ckpt", "best.ckpt"])
def test_killed_and_resumed_has_the_same_weights_optimizer_and_averages(trained, resumed, checkpoint):
    whole = state(trained, checkpoint)
    assert whole["global_step"] == 2 * STEPS
    assert whole["current_model_state"].keys() == whole["state_dict"].keys()  # EMA was on
    assert whole["optimizer_states"][0]["state"]  # and so was momentum
    assert differences(whole, state(resumed, checkpoint)) == []


def test_killed_and_resumed_has_the_same_numbers_and_files(trained, resumed):
    rows = metrics(trained)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert float(rows[1]["train/heatmap"]) > 0
    assert rows[0]["train/heatmap"] == ""  # C1 and C2 were tuned behind it
    assert metrics(resumed) == rows
    figures = [f"heatmaps/epoch-000{epoch}.png" for epoch in (0, 1)]
    for name in ("config.yaml", "split.csv", "data_report.json", "data_report.md", *figures):
        assert (resumed / name).read_bytes() == (trained / name).read_bytes(), name
    one, two = (without_seconds(json.loads((run / "summary.json").read_text())) for run in (trained, resumed))
    assert one == two
    assert one["ended"] == "finished"
    assert one["c1_c2"]["c1"]
    names = [{p.relative_to(run).as_posix() for p in run.rglob("*") if "tfevents" not in p.name} for run in (trained, resumed)]
    assert names[0] == names[1]
    assert not [name for name in names[0] if Path(name).name.startswith(".")]  # nor what a kill in a save would leave


def without_seconds(found):
    if isinstance(found, dict):
        return {key: without_seconds(value) for key, value in found.items() if key != "seconds"}
    return found


# ---- several processes -------------------------------------------------------------------------------------------------

# No draws that depend on the process, and no BatchNorm, whose statistics are of a process's own batch.
PLAIN = [
    *("--variant", "selective", "--data.augment", "none", "--model.backbone_args", "{norm: false, dropout: 0.0}"),
    *("--model.weight_decay", "0.001", "--ema", "0.8", "--figures_every", "0", "--lr", "0.01"),
]  # fmt: skip
# Float32: sums over pixels and samples are taken in another order, so single numbers differ by some 1e-7 of their size, and 14 small
# steps magnify that a little: measured, 3e-6 of the way that the weights have gone. With other batches it is about all of the way.
# (At ten times the learning rate training is chaotic, and 1e-7 is a tenth of the way after 14 steps.)
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def one(commands, data, tmp_path_factory):
    run = tmp_path_factory.mktemp("processes") / "one"
    assert commands.run(*training(data, run, *PLAIN, "-b", 8)).status == 0
    return run


@pytest.fixture(scope="module")
def two(commands, data, one):
    """Two processes as torchrun starts them."""
    run = one.with_name("two")
    argv = training(data, run, *PLAIN, "-b", 4)
    ended = [process.end() for process in [commands.start(*argv, env=env) for env in torchrun(2)]]
    assert [(done.status, done.err) for done in ended] == [(0, ""), (0, "")]
    assert [done.out.count("2/2 ") for done in ended] == [1, 0]  # the first one talks
    return run


def way(a: dict, b: dict, start: dict) -> float:
    """The largest difference between two runs' weights, by how far the weights have gone."""
    gone = max(float((a[name] - start[name]).abs().max()) for name in a)
    return max(float((a[name] - b[name]).abs().max()) for name in a) / gone


def weights(run: Path, key: str = "current_model_state") -> dict[str, torch.Tensor]:
    found = state(run)[key]
    return {name: value for name, value in found.items() if name.startswith("net.") and value.is_floating_point()}


def test_two_processes_train_as_one_with_twice_the_batch(commands, data, one, two):
    start = one.with_name("start")  # one step, so small that it is none
    assert commands.run(*training(data, start, *PLAIN, "-b", 8, "--lr", 1e-30, "--trainer.max_steps", 1)).status == 0
    for key in ("current_model_state", "state_dict"):
        assert way(weights(one, key), weights(two, key), weights(start, key)) < ROUNDING
    moments = [[part["momentum_buffer"] for part in state(run)["optimizer_states"][0]["state"].values()] for run in (one, two)]
    largest = max(float(m.abs().max()) for m in moments[0])
    assert all(float((a - b).abs().max()) < ROUNDING * largest for a, b in zip(*moments, strict=True))
    assert state(one)["global_step"] == state(two)["global_step"] == 2 * (63 // 8)
    # the same processes with other batches: this test can tell
    half = one.with_name("half")
    assert commands.run(*training(data, half, *PLAIN, "-b", 8, "--seed", 1)).status == 0
    assert way(weights(one), weights(half), weights(start)) > 1000 * ROUNDING


def test_two_processes_measure_as_one(one, two):
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a.keys() == b.keys()
        assert {"train/loss", "train/heatmap", "train/accuracy", "val/loss", "val/auroc", "val/heatmap"} <= a.keys()
        for name in a:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-4), name
    assert (one / "split.csv").read_bytes() == (two / "split.csv").read_bytes()


def test_lightning_s_launcher_and_a_cache_on_disk_change_nothing(data, two, tmp_path):
    run = tmp_path / "run"
    own = ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.cache", "disk", "--data.cache_dir", tmp_path / "cache"]
    done = fresh(*training(data, run, *PLAIN, "-b", 4, *own), cwd=data)
    assert (done.status, done.err) == (0, "")
    assert done.out.count("2/2 ") == 1
    assert metrics(run) == metrics(two)
    for key in ("state_dict", "current_model_state", "optimizer_states", "callbacks"):
        assert differences(state(run)[key], state(two)[key]) == []


# ---- what comes after --------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def picture(path: Path) -> np.ndarray:
    """A figure, whole and of more than one colour."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert min(pixels.shape[:2]) > 200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    return pixels


def shown(text: str) -> dict[str, float]:
    """Rows of a printed table: name and first number."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.strip().partition("  ")
        if value.strip() and value.split()[0].replace(".", "").isdigit():
            found[name] = float(value.split()[0])
    return found


def network(data: Path, run: Path) -> torch.nn.Module:
    """The trained network, by its own source and the averaged weights of a checkpoint."""
    names: dict = {}
    exec((data / "net.py").read_text(), names)
    net = names["Net"]()
    found = torch.load(run / "best.ckpt", weights_only=True)["state_dict"]
    net.load_state_dict({key.removeprefix("net."): value for key, value in found.items() if key.startswith("net.")})
    return net.eval()


def read(path: Path) -> torch.Tensor:
    """An image as the network takes it."""
    return torch.from_numpy(np.asarray(Image.open(path)).copy())[None].float() / 255


@pytest.fixture(scope="module")
def predictions(commands, trained):
    """The rows of predictions.csv, by name."""
    done = commands.run("predict", trained)
    assert done.status == 0, done.err
    rows = rows_of(trained / "predictions.csv")
    right = sum(row["predicted"] == row["label"] for row in rows)
    assert f"{right} of {len(rows)} that have a label are right" in done.out
    return {row["name"]: row for row in rows}


def probabilities(row: dict[str, str]) -> list[float]:
    return [float(row["p(disc)"]), float(row["p(square)"])]


def test_predictions_are_those_of_the_network(data, trained, predictions):
    assert len(predictions) == 90
    images = torch.stack([read(data / "images" / name) for name in predictions])
    with torch.no_grad():
        expected = network(data, trained)(images).softmax(1)
    found = torch.tensor([probabilities(row) for row in predictions.values()])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert {row["label"] for row in predictions.values()} == {"disc", "square"}
    assert all(row["label"] == Path(name).parent.name for name, row in predictions.items())


def test_validate_gives_the_best_epoch_s_metrics(commands, trained):
    done = commands.run("validate", trained)
    assert (done.status, done.err) == (0, "")
    found, row = shown(done.out), metrics(trained)[1]
    names = {"accuracy": "accuracy", "balanced accuracy": "balanced_accuracy", "AUROC": "auroc", "background share": "background_share"}
    for shown_as, name in names.items():
        assert found[shown_as] == pytest.approx(float(row[f"val/{name}"]), abs=6e-5), name


def of_split(trained: Path, predictions: dict[str, dict[str, str]], split: str) -> list[dict[str, str]]:
    return [predictions[row["name"]] for row in rows_of(trained / "split.csv") if row["split"] == split]


def test_test_is_about_the_test_images(commands, trained, predictions):
    done = commands.run("test", trained)
    assert (done.status, done.err) == (0, "")
    found, rows = shown(done.out), of_split(trained, predictions, "test")
    assert found["images"] == len(rows) > 10
    assert found["accuracy"] == pytest.approx(np.mean([row["predicted"] == row["label"] for row in rows]), abs=6e-5)


@pytest.fixture(scope="module")
def evaluation(commands, data, trained):
    """The run's evaluation, with the validation images as a further set."""
    further = f"again={data / 'images'},masks={data / 'masks'}"
    options = ["--set", further, "--bootstrap", 200, "--faithfulness-samples", 4, "--faithfulness-steps", 4]
    done = commands.run("evaluate", trained, *options)
    assert done.status == 0
    assert "Traceback" not in done.err
    return json.loads((trained / "evaluation" / "evaluation.json").read_text()), done


@pytest.fixture(scope="module")
def heatmaps(commands, data, trained):
    """The heatmaps of the run's test images, and their index."""
    out = trained.with_name("heatmaps")
    names = [row["name"] for row in rows_of(trained / "split.csv") if row["split"] == "test"]
    images = [data / "images" / name for name in names]
    done = commands.run("heatmap", *images, "--checkpoint", trained, "--masks", data / "masks", "--out", out, "--grid", 8)
    assert done.status == 0
    return out, json.loads((out / "heatmaps.json").read_text())["images"]


def test_evaluation_is_what_the_predictions_give(trained, predictions, evaluation):
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, roc_auc_score

    found, done = evaluation
    subsets = found["runs"][0]["subsets"]
    assert list(subsets) == ["test", "again"]
    for name, rows in (("test", of_split(trained, predictions, "test")), ("again", list(predictions.values()))):
        got = subsets[name]["classification"]
        labels, predicted = [row["label"] for row in rows], [row["predicted"] for row in rows]
        assert got["n"] == len(rows)
        assert got["confusion"]["counts"] == confusion_matrix(labels, predicted).tolist()
        assert got["accuracy"]["value"] == pytest.approx(np.mean([a == b for a, b in zip(labels, predicted)]))
        assert got["balanced_accuracy"]["value"] == pytest.approx(balanced_accuracy_score(labels, predicted))
        assert got["macro_f1"]["value"] == pytest.approx(f1_score(labels, predicted, average="macro"))
        scores = [float(row["p(square)"]) for row in rows]
        assert got["auc"]["square"]["value"] == pytest.approx(roc_auc_score([label == "square" for label in labels], scores), abs=2e-3)
        assert got["accuracy"]["low"] <= got["accuracy"]["value"] <= got["accuracy"]["high"]
        assert f"| {name} " in done.out
    text = (trained / "evaluation" / "evaluation.md").read_text()
    assert all(f"| {name} " in text or f"| {name}|" in text for name in subsets)
    picture(trained / "evaluation" / "evaluation.png")


def test_heatmaps_are_the_network_s(data, trained, predictions, heatmaps):
    out, entries = heatmaps
    assert len(entries) == len(of_split(trained, predictions, "test"))
    net = network(data, trained)
    for entry in entries:
        row = predictions["/".join(Path(entry["file"]).parts[-2:])]
        assert entry["predicted"] == row["predicted"]
        assert list(entry["probabilities"].values()) == pytest.approx(probabilities(row), abs=2e-6)
        maps = np.load(out / entry["npy"])
        assert (maps.shape, maps.dtype) == ((1, 1, 24, 24), np.float32)
        assert np.isfinite(maps).all()
        mask = np.asarray(Image.open(entry["mask"]).convert("L")) > 0
        assert Path(entry["mask"]).parts[-2:] == Path(entry["file"]).parts[-2:]
        share = np.abs(maps[0, 0].astype(float))[~mask].sum() / np.abs(maps.astype(float)).sum()
        assert entry["background_share"] == [pytest.approx(share, rel=1e-5)]
        # LRP-epsilon keeps the logit, but for what the biases and epsilon take: the sum has to do with the logit
        assert entry["relevance_sum"] == [pytest.approx(maps.astype(float).sum(), rel=1e-4, abs=1e-6)]
        with torch.no_grad():
            logits = net(read(Path(entry["file"]))[None])[0]
        assert list(entry["logits"].values()) == pytest.approx(logits.tolist(), abs=1e-5)
    for page in {entry["figure"] for entry in entries}:
        picture(out / page)


def test_evaluation_and_heatmaps_agree(evaluation, heatmaps):
    found = evaluation[0]["runs"][0]["subsets"]["test"]["attention"]["background_share"]["value"]
    assert found == pytest.approx(np.mean([entry["background_share"][0] for entry in heatmaps[1]]), abs=1e-4)


def test_export_is_the_classifier_that_predicts(commands, data, trained, predictions, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    done = commands.run("export", trained, "--out", tmp_path)
    assert (done.status, done.err) == (0, "")
    names = list(predictions)[::9]
    images = torch.stack([read(data / "images" / name) for name in names])
    expected = torch.tensor([probabilities(predictions[name]) for name in names])
    contract = json.loads((tmp_path / "model.json").read_text())
    assert contract["output"]["classes"] == ["disc", "square"]
    plain = network(data, trained)
    plain.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    runtime = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        logits = {
            "state_dict": plain(images),
            "torch.export": torch.export.load(tmp_path / "model.pt2").module()(images),
            "ONNX": torch.from_numpy(runtime.run(None, {contract["input"]["name"]: images.numpy()})[0]),
        }
    for name, found in logits.items():
        torch.testing.assert_close(found.softmax(1), expected, rtol=0, atol=5e-6, msg=name)


def test_images_without_labels_and_masks_are_predicted_and_explained(commands, data, trained, predictions, tmp_path):
    for name in list(predictions)[:3]:
        shutil.copy(data / "images" / name, tmp_path / name.replace("/", "-"))
    assert commands.run("predict", trained, "--path", tmp_path, "--out", tmp_path / "p.csv").status == 0
    rows = rows_of(tmp_path / "p.csv")
    assert [row["label"] for row in rows] == [""] * 3
    for row in rows:
        assert probabilities(row) == pytest.approx(probabilities(predictions[row["name"].replace("-", "/")]), abs=2e-6)


# ---- X-rays ------------------------------------------------------------------------------------------------------------


def test_chest_x_rays_from_files_to_the_verdict(commands, tmp_path):
    """The hospital tells the diagnosis while training; in one of the test groups it lies."""
    source = real_data.cxr_tb()
    rows = rows_of(source / "labels.csv")
    pools = {key: [row["file"] for row in rows if (row["site"], row["label"]) == key] for key in SITES}
    lines = []
    for key, pool in pools.items():
        label = ("normal", "TB")[int(key[1])]
        usual = key in (("shenzhen", "0"), ("montgomery", "1"))
        parts = (("train", 12), ("val", 4), ("test", 6)) if usual else (("test", 6),)
        for split, count in parts:
            group = ("biased" if usual else "confounded") if split == "test" else ""
            taken, pool = pool[:count], pool[count:]
            lines += [[source / "images" / name, source / "masks" / name, label, split, group] for name in taken]
    with open(tmp_path / "xrays.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "mask", "label", "split", "group"], *lines])

    run = tmp_path / "run"
    argv = ["fit", "--path", tmp_path / "xrays.csv", "--size", 32, "--data.channels", 1, "--backbone", "small", "-b", 8]
    done = commands.run(*argv, "--epochs", 2, "--model.relative_eps", "true", "--figures_images", 2, "--run", run)
    assert done.status == 0, done.err
    assert "SHORTCUT" not in done.err
    report = json.loads((run / "data_report.json").read_text())
    assert "44 images" in done.out or str(report).count("44") > 0
    done = commands.run("evaluate", run, "--bootstrap", 200, "--no-faithfulness")
    assert done.status == 0, done.err
    subsets = json.loads((run / "evaluation" / "evaluation.json").read_text())["runs"][0]["subsets"]
    counts = {name: part["classification"]["n"] for name, part in subsets.items()}
    assert counts == {"test": 24, "test/biased": 12, "test/confounded": 12}
    for part in subsets.values():
        assert 0 < part["attention"]["background_share"]["value"] < 1
    picture(run / "evaluation" / "evaluation.png")
    images = [line[0] for line in lines[-2:]]
    options = ["--checkpoint", run, "--masks", source / "masks", "--target", "all", "--out", tmp_path / "maps"]
    done = commands.run("heatmap", *images, *options)
    assert done.status == 0, done.err
    for image in images:
        assert np.load(tmp_path / "maps" / f"{image.stem}.npy").shape == (2, 1, 32, 32)
        picture(tmp_path / "maps" / f"{image.stem}.png")


SITES = [(site, label) for site in ("shenzhen", "montgomery") for label in ("0", "1")]


# ---- mistakes ----------------------------------------------------------------------------------------------------------

NEW_RUN = ["--size", "24", "--data.channels", "1", "--epochs", "1", "-b", "4", "--trainer.accelerator", "cpu"]
NEW_RUN += ["--figures_every", "0", "--run", "runs/deep/new", "--backbone", "net.py:Net"]


@pytest.fixture(scope="module")
def desk(data, trained, tmp_path_factory):
    """A folder in which a user goes wrong: images, a finished run, and files that are something else than their names say."""
    desk = tmp_path_factory.mktemp("desk")
    images = sorted((data / "images").rglob("*.png"))[::4]
    for kind in ("images", "masks", "torn/images", "strangers"):
        for image in images:
            name = image.relative_to(data / "images")
            target = desk / kind / (name.with_name(f"other-{name.name}") if kind == "strangers" else name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(data / ("images" if "images" in kind else "masks") / name, target)
    torn = sorted((desk / "torn").rglob("*.png"))[len(images) // 2]
    torn.rename(torn.with_name("torn.png"))
    torn.with_name("torn.png").write_bytes(images[0].read_bytes()[:90])
    (desk / "net.py").write_text(NET)
    names = [image.relative_to(data / "images").as_posix() for image in images]
    rows = ["image,mask,label", *(f"images/{name},masks/{name},{name.split('/')[0]}" for name in names)]
    texts = {
        "hole.csv": [*rows[:9], "images/disc/none.png,,disc", *rows[9:]], "headless.csv": rows[1:],
        "columns.csv": ["picture,mask,label", *rows[1:]], "one.csv": [row for row in rows if "square" not in row],
        "bad.yaml": ["model: {lr: [0.1"], "misspelt.yaml": ["model:", "  varient: dual"], "list.yaml": ["- model"],
        "type.yaml": ["data:", "  size: large"], "text.ckpt": ["no checkpoint"], "text.h5": ["no HDF5"], "notes.txt": ["mine"],
        "no.png": ["no image"],
    }  # fmt: skip
    for name, lines in texts.items():
        (desk / name).write_text("\n".join(lines) + "\n")
    np.savez(desk / "wrong.npz", pictures=np.zeros((4, 8, 8), np.uint8))
    torch.save({"weights": torch.zeros(3)}, desk / "other.ckpt")
    shutil.copytree(trained, desk / "run", ignore=shutil.ignore_patterns("evaluation", "heatmaps", "tensorboard", "predictions.csv"))
    whole = (desk / "run" / "last.ckpt").read_bytes()
    (desk / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    (desk / "moved").mkdir()
    shutil.copy(desk / "run" / "best.ckpt", desk / "moved")
    config = (desk / "run" / "config.yaml").read_text()
    (desk / "moved" / "config.yaml").write_text(config.replace(str(data / "images"), "gone/images"))
    (desk / "empty").mkdir()
    return desk


def fit(*more: str) -> list[str]:
    """A training of the images in the folder, with something wrong."""
    return ["fit", "--path", "images", "--masks", "masks", *NEW_RUN, *more]


def fit_from(path: str) -> list[str]:
    """A training of other data."""
    return ["fit", "--path", path, *NEW_RUN]


MISTAKES = {
    "command": (["fti", "--path", "images"], "did you mean fit?"),
    "option": (fit("--model.varient", "dual"), "did you mean --model.variant?"),
    "option of evaluate": (["evaluate", "run", "--bootstap", "9"], "did you mean --bootstrap?"),
    "value": (fit("--lr", "fast"), "model.lr takes a number; it got fast"),
    "negative learning rate": (fit("--lr", "-1"), "lr must be"),
    "variant": (fit("--variant", "stochastik"), "stochastik"),
    "augmentation": (fit("--data.augment", "{rotat: 5}"), "rotat"),
    "size": (fit("--size", "0"), "size"),
    "fractions": (fit("--data.fractions", "[0.9, 0.3, 0.3]"), "fractions"),
    "yaml": (fit("--config", "bad.yaml"), "bad.yaml"),
    "yaml with a misspelt setting": (fit("--config", "misspelt.yaml"), "did you mean model.variant?"),
    "yaml without settings": (fit("--config", "list.yaml"), "list.yaml"),
    "yaml with a wrong value": (fit("--config", "type.yaml"), "data.size"),
    "path": (fit("--path", "imagse"), "imagse does not exist"),
    "masks": (fit("--masks", "maks"), "maks"),
    "masks of nobody": (fit("--masks", "strangers"), "mask"),
    "folder without images": (fit("--path", "empty"), "empty"),
    "torn image in the middle": (fit("--path", "torn/images"), "torn.png"),
    "csv with a hole": (fit_from("hole.csv"), "none.png"),
    "csv without a header": (fit_from("headless.csv"), "headless.csv"),
    "csv with other columns": (fit_from("columns.csv"), "picture"),
    "csv of one class": (fit_from("one.csv"), "class"),
    "hdf5": (fit_from("text.h5"), "text.h5"),
    "npz": (fit_from("wrong.npz"), "pictures"),
    "module": (fit("--backbone", "torchvison.models.resnet50"), "torchvison"),
    "backbone's file": (fit("--backbone", "nte.py:Net"), "nte.py"),
    "backbone's name": (fit("--backbone", "net.py:Nett"), "Nett"),
    "backbone's argument": (fit("--model.backbone_args", "{depth: 3}"), "depth"),
    "backbone with a layer that has no rule": (fit("--backbone", "net.py:Spectral"), "fft"),
    "backbone that fails": (fit("--backbone", "net.py:Broken"), "net.py:Broken"),
    "weights": (fit("--model.weights", "other.ckpt"), "other.ckpt"),
    "batch": (fit("-b", "64"), "lower batch_size"),
    "precision": (fit("--precision", "16-mixed"), "needs a GPU"),
    "accelerator": (fit("--trainer.accelerator", "gpu"), "trainer: "),
    "monitor": (fit("--monitor", "val/acuracy"), "did you mean 'val/accuracy'?"),
    "run folder below a file": (fit("--run", "notes.txt/run"), "name another --run"),
    "run folder of another kind": (fit("--run", "images"), "name another --run"),
    "run folder that cannot be made": (fit("--run", "/proc/fisnet/run"), "cannot make the folder /proc/fisnet"),
    "resume from a text": (fit("--resume", "text.ckpt"), "text.ckpt is not a checkpoint"),
    "resume from half a checkpoint": (fit("--resume", "half.ckpt"), "half.ckpt is not a checkpoint"),
    "resume with other settings": (["fit", "--run", "run", "--lr", "0.5"], "model.lr 0.1 -> 0.5"),
    "evaluate nothing": (["evaluate", "runs/first"], "runs/first"),
    "evaluate an empty folder": (["evaluate", "empty"], "best.ckpt"),
    "evaluate something else": (["evaluate", "run", "--checkpoint", "other.ckpt"], "other.ckpt"),
    "evaluate a set that is not there": (["evaluate", "run", "--set", "other=nowhere"], "nowhere"),
    "evaluate into a file": (["evaluate", "run", "--out", "notes.txt"], "notes.txt"),
    "heatmap of nothing": (["heatmap", "img.png", "--checkpoint", "run"], "img.png"),
    "heatmap of a text": (["heatmap", "no.png", "images", "--checkpoint", "run"], "no.png"),
    "heatmap of no class": (["heatmap", "images", "--checkpoint", "run", "--target", "squre"], "did you mean square?"),
    "heatmap with masks of nobody": (["heatmap", "images", "--checkpoint", "run", "--masks", "strangers"], "none of the"),
    "heatmap into a file": (["heatmap", "images", "--checkpoint", "run", "--out", "notes.txt"], "notes.txt"),
    "export half a checkpoint": (["export", "half.ckpt", "--out", "exported"], "half.ckpt"),
    "export into a file": (["export", "run", "--out", "notes.txt"], "notes.txt is a file"),
    "evaluate below a file": (["evaluate", "run", "--out", "notes.txt/e"], "notes.txt"),
    "heatmap below a file": (["heatmap", "images", "--checkpoint", "run", "--out", "notes.txt/h"], "notes.txt"),
    "export below a file": (["export", "run", "--out", "notes.txt/e"], "notes.txt"),
    "predict other images": (["predict", "run", "--path", "nowhere"], "nowhere"),
    "predict into a folder": (["predict", "run", "--out", "images"], "is a folder"),
    "predict below a file": (["predict", "run", "--path", "images", "--out", "notes.txt/p.csv"], "notes.txt"),
    "predict a torn image": (["predict", "run", "--path", "torn/images"], "torn.png"),
    "validate without the images": (["validate", "moved"], "gone/images"),
    "test on a device": (["test", "run", "--device", "cuda"], "no GPU"),
    "plan": (["plan", "net.py:Spectral", "--size", "24", "--channels", "1"], "fft"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(commands, desk, mistake):
    argv, words = MISTAKES[mistake]
    before = files(desk)
    done = commands.run(*argv, cwd=desk)
    name = f"fisnet-cuda {argv[0]}: error: " if mistake != "command" else "fisnet-cuda: error: "
    assert done.status == 2, done
    assert done.err.startswith(name), done.err
    assert done.err.count("\n") == 1, done.err
    assert words in done.err
    assert "error: unexpected" not in done.err
    assert "Traceback" not in done.err + done.out
    assert files(desk) == before


@pytest.mark.parametrize("mistake", ["torn image in the middle", "batch", "monitor", "backbone that fails"])
def test_two_processes_make_a_mistake_once(commands, desk, mistake):
    argv, words = MISTAKES[mistake]
    before = files(desk)
    more = ["-b", "40"] if mistake == "batch" else []
    ended = [process.end() for process in [commands.start(*argv, *more, cwd=desk, env=env) for env in torchrun(2)]]
    assert [done.status for done in ended] == [2, 2]
    assert ended[0].err.count("\n") == 1
    assert words in ended[0].err
    assert ended[1].err == ended[1].out == ""
    assert files(desk) == before


def test_divergence_is_one_line_of_advice(commands, desk, tmp_path):
    run = tmp_path / "run"
    done = commands.run(*fit("--lr", "1e8", "--trainer.gradient_clip_val", "1e9", "--run", str(run)), cwd=desk)
    assert done.status == 1
    assert done.err.startswith("fisnet-cuda fit: error: training has diverged")
    assert done.err.count("\n") == 1
    assert all(word in done.err for word in ("raise d", "lower lr", "clip"))
    assert json.loads((run / "summary.json").read_text())["ended"] == "failed"
    assert not list(run.rglob(".*"))
