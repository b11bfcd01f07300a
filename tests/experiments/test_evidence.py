"""Numbers in README.md and docs/evidence.md are those of the committed result files."""

from __future__ import annotations

import math
import re
from pathlib import Path
from statistics import fmean, mode

import pytest

from benchmarks.experiments import sensitivity
from benchmarks.experiments.jobs import read_rows

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "experiments"
NAMES = {
    "standard": "standard", "standard net": "standard", "selective": "selective", "selective isnet": "selective",
    "stochastic": "stochastic", "stochastic isnet": "stochastic", "dual": "dual", "dual isnet": "dual", "contrast": "contrast",
    "contrast isnet (ours)": "contrast", "original": "original", "original isnet": "original",
    "original isnet (seed 0)": "original",
    "input masked by the true mask": "masked", "digits cut out by the true masks": "masked",
    "segmentation net, then classifier": "segmented", "rrr, input gradients": "rrr",
    "right for the right reasons (input gradients)": "rrr", "grad-cam attention loss": "gradcam", "hirescam attention loss": "hirescam",
    "backgrounds swapped in training": "mixed", "backgrounds swapped at random in training": "mixed",
    "stochastic isnet + backgrounds swapped": "stochastic_mixed", "stochastic + backgrounds swapped": "stochastic_mixed",
    "contrast isnet (ours) + backgrounds swapped": "contrast_mixed", "contrast + backgrounds swapped": "contrast_mixed",
}  # fmt: skip
CONTROLS = {"control: lungs blacked out": "background", "control: the lungs' outline only": "outline",
            "control: trained without the shortcut": "fair"}  # fmt: skip


def tables(page: Path, heading: str) -> list[list[list[str]]]:
    """The tables below a heading, as cells."""
    body = re.split(rf"(?m)^## {heading}$", page.read_text())[1].split("\n## ")[0]
    blocks = re.findall(r"(?m)(?:^\|.*\n)+", body + "\n")
    return [[[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()] for block in blocks]


def agrees(text: str, found: list[float], what: str, within: float = 0.0501) -> None:
    """A cell, ``mean (lowest-highest)`` or the mean alone, against its numbers."""
    wanted = re.fullmatch(r"(-?[\d.]+)(?: \((-?[\d.]+)-(-?[\d.]+)\))?", text)
    assert wanted, f"{what}: {text}"
    for said, is_so in zip(wanted.groups(), (fmean(found), min(found), max(found))):
        assert said is None or float(said) == pytest.approx(is_so, abs=within), f"{what}: {text}, not {is_so}"


def numbers(rows: list[dict], column: str) -> list[float]:
    return [float(row[column]) for row in rows if row[column] is not None and math.isfinite(row[column])]


def check(cells: list[list[str]], rows: list[dict], columns: list[str]) -> int:
    """Compares every cell with the mean (lowest-highest) of its rows; the number of cells compared."""
    compared, usual = 0, mode(row["steps"] for row in rows)
    for name, *texts in cells[2:]:
        longer = re.fullmatch(r"(.*), ([\d,]+) steps", name)
        name, steps = (longer[1], int(longer[2].replace(",", ""))) if longer else (name, usual)
        plain, deep = name.lower().removesuffix(" + deep supervision"), name.endswith("deep supervision")
        view = CONTROLS.get(plain, "shortcut")
        system = NAMES["standard" if plain in CONTROLS else plain]
        mine = [row for row in rows if row["system"] == system and row["deep"] == deep and row.get("view", view) == view
                and row["steps"] == steps]  # fmt: skip
        assert mine, f"no rows for {name}"
        for column, text in zip(columns, texts, strict=True):
            if text in ("", "-"):
                continue
            agrees(text, numbers(mine, column), f"{name}, {column}")
            compared += 1
    return compared


def test_biased_mnist():
    rows = read_rows(RESULTS / "biased_mnist.csv")
    sets = ["accuracy_biased", "accuracy_unbiased", "accuracy_confounded"]
    (evidence,) = tables(ROOT / "docs" / "evidence.md", "Biased MNIST")
    assert check([line[:-1] for line in evidence], rows, [*sets, "share", "swap_gap"]) > 60
    (short,) = tables(ROOT / "README.md", r"Does it work\?")
    assert check(short, rows, sets) >= 15


def test_time_per_epoch():
    clock = {(row["system"], row["deep"]): row for row in read_rows(RESULTS / "biased_mnist-time.csv")}
    (evidence,) = tables(ROOT / "docs" / "evidence.md", "Biased MNIST")
    for name, *_, text in evidence[2:]:
        if text == "-":
            continue
        plain, deep = name.lower().removesuffix(" + deep supervision"), name.endswith("deep supervision")
        row = clock[NAMES[plain], deep]
        seconds, ratio = re.fullmatch(r"(\d+) s, ([\d.]+)x", text).groups()
        assert float(seconds) == pytest.approx(row["epoch_seconds"], abs=0.51), name
        assert float(ratio) == pytest.approx(row["ratio"], abs=0.051), name


def test_chest_xrays():
    rows = read_rows(RESULTS / "chest_xray.csv")
    (evidence,) = tables(ROOT / "docs" / "evidence.md", "Chest X-rays from two hospitals")
    assert check(evidence, rows, ["auroc_same", "auroc_swapped", "auroc_within", "share", "swap_gap"]) > 50


def test_scenes():
    rows = read_rows(RESULTS / "scenes.csv")
    (cells,) = tables(ROOT / "docs" / "evidence.md", "2 to 200 classes in the same time")
    counts = [int(text.split()[0]) for text in cells[0][1:-1]]
    for name, *texts, steps in cells[2:]:
        mine = [row for row in rows if row["system"] == NAMES[name.lower()]]
        for classes, text in zip(counts, texts, strict=True):
            agrees(text, numbers([row for row in mine if row["classes"] == classes], "accuracy_confounded"), f"{name}, {classes}")
        first, last = (numbers([row for row in mine if row["classes"] == classes], "steps_done") for classes in (counts[0], counts[-1]))
        assert steps == f"{round(fmean(first)):,} to {round(fmean(last)):,}", name


NETS = {  # -> task, net, steps where a line does not say
    "small": ("small", "convnet3", 1500), "with BatchNorm": ("small", "convnet3_bn", 1500),
    "slim ResNet-18": ("mnist", "resnet18_slim", 2500), "ResNet-18": ("mnist", "resnet18", 800),
}  # fmt: skip
TRAINING = re.compile(
    r"(?P<system>[\w +]+?)(?:, (?P<eps>0\.01|1e-4 relative)(?:, w1 (?P<w1>\d+))?(?:, rate (?P<rate>[\d.]+))?)?"
    r"(?:, (?P<steps>[\d,]+) steps)?"
)


def test_hidden():
    rows = [row for name in ("hidden", "hidden_resnet18") for row in read_rows(RESULTS / f"{name}.csv") if row["kind"] == "time"]
    (cells,) = tables(ROOT / "docs" / "evidence.md", r"Does a quiet heatmap mean a clean classifier\?")
    assert len(cells) > 15
    for net, training, seeds, *texts in cells[2:]:
        said, (task, name, usual) = TRAINING.fullmatch(training), NETS[net]
        assert said, training
        steps = int(said["steps"].replace(",", "")) if said["steps"] else usual
        mine = [
            row for row in rows
            if (row["task"], row["net"], row["steps"], row["step"]) == (task, name, steps, steps)
            and row["system"] == NAMES[said["system"].lower()] and row["select"] == "lowest" and row["eta_eps"] == 0.01
            and (said["eps"] is None or (row["eps"], row["relative"]) == ((0.01, False) if said["eps"] == "0.01" else (1e-4, True)))
            and row["w1"] == float(said["w1"] or 1) and row["lr"] == float(said["rate"] or 0.08)
        ]  # fmt: skip
        assert len(mine) == int(seeds), (net, training)
        for column, text in zip(["accuracy_biased", "accuracy_unbiased", "accuracy_confounded"], texts):
            agrees(text, numbers(mine, column), f"{net}, {training}, {column}")
        agrees(texts[3], numbers(mine, "share_fine"), f"{net}, {training}, share", 0.0051)
        agrees(texts[4], numbers(mine, "swap_gap"), f"{net}, {training}, gap")


def test_inference():
    text = (ROOT / "docs" / "evidence.md").read_text().split("## What inference costs")[1].split("\n## ")[0]
    rows = {row["net"]: row for row in read_rows(RESULTS / "inference.csv") if row["form"] == "ISNet"}
    for net in ("convnet", "resnet18", "densenet121"):
        row = rows[net]
        assert f"{row['ratio_p50']:.2f} ({row['ratio_p20']:.2f}-{row['ratio_p80']:.2f})" in text, net


def test_agreement():
    rows = [row for row in read_rows(RESULTS / "agreement.csv") if row["question"] == "same weights" and row["reference"] == "mean"]
    last = [row for row in rows if row["epoch"] == max(row["epoch"] for row in rows)]
    (cells,) = tables(ROOT / "docs" / "evidence.md", r"Do the Faster variants look at what the Original looks at\?")
    for name, *texts in cells[2:]:
        mine = [row for row in last if row["map"] == name.lower().removesuffix(", one draw")]
        columns = [(column, net) for column in ("spearman", "loss_ratio") for net in ("standard", "original", "stochastic")]
        for (column, net), text in zip(columns, texts, strict=True):
            found = numbers([row for row in mine if row["net_trained"] == net], column)
            agrees(text, found, f"{name}, {net}, {column}", 0.0051)
    blind = [r["loss_ratio"] for r in rows if (r["map"], r["net_trained"]) == ("selective", "standard") and r["epoch"]]
    assert max(blind) < 1e-6


def test_sensitivity():
    found = {(r.grid.title, r.system): r for r in sensitivity.results(read_rows(RESULTS / "sensitivity.csv"))}
    (cells,) = tables(ROOT / "docs" / "evidence.md", r"How far can the settings be off\?")
    for setting, recommended, *texts in cells[2:]:
        for system, text in zip(sensitivity.SYSTEMS, texts, strict=True):
            result = found.pop((setting, system), None)
            if result is None:
                assert text == "-", (setting, system)
                continue
            assert recommended == (result.grid.recommended or "(relative)")
            assert text == f"{sensitivity.range_text(result)} (of {', '.join(result.rows)})", (setting, system)
    assert not found, "every grid is in the table"


def test_image_folders():
    (cells,) = tables(ROOT / "docs" / "evidence.md", "With images of your own")
    rows = [read_rows(RESULTS / f"image_folder-{name}.csv") for name in ("xrays-mark", "scenes-background")]
    sets = [f"accuracy_{name}" for name in ("biased", "unbiased", "confounded")]
    assert check([line[:4] for line in cells], rows[0], sets) == check([[line[0], *line[4:]] for line in cells], rows[1], sets) == 18
