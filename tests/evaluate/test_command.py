"""``fisnet-cuda evaluate`` on real files."""

import json
import shutil

import pytest

pytest.importorskip("lightning")
import importlib.util
import sys
from pathlib import Path

from fisnet_cuda.cli import main

NAME = "fisnet_tests_small_run"
_spec = importlib.util.spec_from_file_location(NAME, Path(__file__).parent / "small_run.py")
small_run = importlib.util.module_from_spec(_spec)
sys.modules[NAME] = small_run  # the checkpoint names its backbone by import path
_spec.loader.exec_module(small_run)

QUICK = ["--bootstrap", "200", "--faithfulness-samples", "4", "--faithfulness-steps", "4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    data = small_run.folders(root)
    small_run.run_folder(root / "standard", data)
    small_run.run_folder(root / "isnet", data, variant="stochastic", epochs=12, P=0.5)
    return root


def test_a_shortcut_is_found(runs, capsys):
    assert main(["evaluate", str(runs / "standard"), *QUICK]) == 0
    out = capsys.readouterr().out
    content = json.loads((runs / "standard/evaluation/evaluation.json").read_text())
    subsets = content["runs"][0]["subsets"]
    assert list(subsets) == ["test", "test/biased", "test/unbiased"]
    n = {name: subset["classification"]["n"] for name, subset in subsets.items()}
    assert n == {"test": 72, "test/biased": 48, "test/unbiased": 24}
    accuracy = {name: subset["classification"]["accuracy"]["value"] for name, subset in subsets.items()}
    assert accuracy["test/biased"] == 1
    assert accuracy["test/unbiased"] < 0.8
    assert accuracy["test"] == pytest.approx((48 * accuracy["test/biased"] + 24 * accuracy["test/unbiased"]) / 72)
    assert "the net uses the background" in content["runs"][0]["verdict"]
    assert "the net uses the background" in out
    assert content["runs"][0]["variant"] == "standard"
    assert subsets["test"]["insertion_deletion"]["n"] == 4
    swap = subsets["test/biased"]["background_swap"]
    assert swap["n"] == 48
    assert swap["warns"]
    assert "Background swap (test/biased, 48 images): the classifier uses the background" in out
    assert (runs / "standard/evaluation/evaluation.png").stat().st_size > 10_000
    assert sorted(p.name for p in (runs / "standard/evaluation").iterdir()) == ["evaluation.json", "evaluation.md", "evaluation.png"]


def test_two_runs_beside_each_other_on_further_sets(runs, tmp_path, capsys):
    small_run.make.folder(tmp_path / "other", 12, 40, seed=9)
    given = f"external={tmp_path}/other/images,masks={tmp_path}/other/masks"
    out = tmp_path / "out"
    names = [str(runs / name) for name in ("standard", "isnet")]
    assert main(["evaluate", names[0], "--compare", names[1], "--set", given, "--out", str(out), "--no-faithfulness", *QUICK]) == 0
    content = json.loads((out / "evaluation.json").read_text())
    assert [run["name"] for run in content["runs"]] == ["standard", "isnet"]
    for run in content["runs"]:
        assert run["subsets"]["external"]["classification"]["n"] == 12
        assert run["subsets"]["external"]["attention"]["n"] == 12
        assert run["subsets"]["external"]["insertion_deletion"] is None
        assert run["subsets"]["external"]["background_swap"]["n"] == 12
    differences = content["differences_to_the_first_run"]
    assert [d["subset"] for d in differences] == ["test", "test/biased", "test/unbiased", "external"]
    assert all(d["paired_by_image"] for d in differences)
    assert differences[1]["background_share"]["high"] < 0  # the ISNet looks less at the background
    assert "| external" in (out / "evaluation.md").read_text()
    swaps = (out / "evaluation.md").read_text().split("## Background swap")[1].split("##")[0]
    assert [line.split("|")[1:3] for line in swaps.splitlines() if line.startswith("| test/biased")] == [
        [" test/biased   ", " standard "], [" test/biased   ", " isnet    "]
    ]  # fmt: skip


def test_columns_of_a_further_set_may_be_called_otherwise(runs, tmp_path):
    table = small_run.make.table(tmp_path / "other", 12, 40, seed=9)
    table.write_text(table.read_text().replace("image,mask,label", "file,lung,finding"))
    given = f"external={table},columns.image=file,columns.mask=lung,columns.label=finding"
    out = tmp_path / "out"
    arguments = ["--split", "none", "--set", given, "--out", str(out), "--no-faithfulness", "--swap-images", "0"]
    assert main(["evaluate", str(runs / "isnet"), *arguments, *QUICK]) == 0
    subset = json.loads((out / "evaluation.json").read_text())["runs"][0]["subsets"]["external"]
    assert subset["classification"]["n"] == subset["attention"]["n"] == 12
    assert subset["background_swap"] is None
    assert "## Background swap" not in (out / "evaluation.md").read_text()


def test_training_images_in_a_test_set_are_told(runs, tmp_path):
    shutil.copytree(runs / "images/biased", tmp_path / "copies/disc")  # some were trained on, by other names
    (tmp_path / "copies/square").mkdir()
    shutil.move(tmp_path / "copies/disc/001.png", tmp_path / "copies/square/renamed.png")
    out = tmp_path / "out"
    arguments = ["--split", "none", "--set", f"again={tmp_path}/copies", "--out", str(out), "--no-faithfulness"]
    assert main(["evaluate", str(runs / "standard"), *arguments, *QUICK]) == 0
    subset = json.loads((out / "evaluation.json").read_text())["runs"][0]["subsets"]["again"]
    trained = (runs / "standard/split.csv").read_text().count(",train,")
    assert 30 < trained < 96
    assert any(note.startswith(f"{trained} of 96 images are among the training images of standard") for note in subset["notes"])
    assert subset["attention"] is None


def test_a_part_of_the_images_is_said_to_be_one(runs, tmp_path):
    arguments = ["--samples", "20", "--no-faithfulness", "--out", str(tmp_path), "--checkpoint", str(runs / "isnet/best.ckpt")]
    assert main(["evaluate", str(runs / "isnet"), *arguments, *QUICK]) == 0
    subset = json.loads((tmp_path / "evaluation.json").read_text())["runs"][0]["subsets"]["test"]
    assert subset["classification"]["n"] == 20
    assert "20 of 72 images, drawn at random (--samples)" in subset["notes"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere"),
        (["RUN", "--checkpoint", "no.ckpt"], "--checkpoint no.ckpt"),
        (["RUN", "--checkpoint", "last"], "last.ckpt"),
        (["RUN", "--set", "external"], "NAME=PATH"),
        (["RUN", "--set", "external=nowhere"], "nowhere"),
        (["RUN", "--set", "external=x,colour=red"], "no option 'colour'"),
        (["RUN", "--set", "external=FOLDER,columns.picture=x"], "columns has no 'picture'"),
        (["RUN", "--set", "a=x", "--set", "a=y"], "given twice"),
        (["RUN", "--split", "none"], "nothing to evaluate"),
        (["RUN", "--bootstrap", "3"], "--bootstrap must be at least 100"),
        (["RUN", "--swap-images", "-1"], "--swap-images must be at least 0"),
        (["RUN", "--compare", "nowhere"], "nowhere"),
        (["RUN", "--out", "FILE"], "is a file"),
        (["RUN", "--deletion", "white"], "white"),
    ],
)
def test_mistakes_end_in_one_line(runs, tmp_path, capsys, arguments, words):
    (tmp_path / "file").write_text("")
    real = {"RUN": str(runs / "standard"), "FILE": str(tmp_path / "file")}
    arguments = [a.replace("FOLDER", str(runs / "images")) for a in arguments]
    assert main(["evaluate", *(real.get(a, a) for a in arguments)]) == 2
    out, err = capsys.readouterr()
    line = [line for line in err.splitlines() if "fisnet-cuda evaluate:" in line]
    assert len(line) == 1
    assert words in line[0]
    assert "Traceback" not in err
    assert out == ""
