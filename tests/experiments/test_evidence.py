"""Numbers in README.md and docs/evidence.md are those of the committed result files."""

from __future__ import annotations

import math
import re
from pathlib import Path
from statistics import fmean

import pytest

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
    "stochastic isnet + backgrounds swapped": "stochastic_mixed",
}  # fmt: skip
CONTROLS = {"control: lungs blacked out": "background", "control: the lungs' outline only": "outline",
            "control: trained without the shortcut": "fair"}  # fmt: skip


def tables(page: Path, heading: str) -> list[list[list[str]]]:
    """The tables below a heading, as cells."""
    body = re.split(rf"(?m)^## {heading}$", page.read_text())[1].split("\n## ")[0]
    blocks = re.findall(r"(?m)(?:^\|.*\n)+", body + "\n")
    return [[[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()] for block in blocks]


def check(cells: list[list[str]], rows: list[dict], columns: list[str]) -> int:
    """Compares every cell with the mean (lowest-highest) of its rows; the number of cells compared."""
    compared = 0
    for name, *numbers in cells[2:]:
        plain, deep = name.lower().removesuffix(" + deep supervision"), name.endswith("deep supervision")
        view = CONTROLS.get(plain, "shortcut")
        system = NAMES["standard" if plain in CONTROLS else plain]
        mine = [row for row in rows if row["system"] == system and row["deep"] == deep and row.get("view", view) == view]
        assert mine, f"no rows for {name}"
        for column, text in zip(columns, numbers, strict=True):
            if text in ("", "-"):
                continue
            found = [float(row[column]) for row in mine if row[column] is not None and math.isfinite(row[column])]
            wanted = re.fullmatch(r"(-?[\d.]+)(?: \((-?[\d.]+)-(-?[\d.]+)\))?", text)
            assert wanted, f"{name}, {column}: {text}"
            for said, is_so in zip(wanted.groups(), (fmean(found), min(found), max(found))):
                assert said is None or float(said) == pytest.approx(is_so, abs=0.0501), f"{name}, {column}: {text}, not {is_so}"
            compared += 1
    return compared


def test_biased_mnist():
    rows = read_rows(RESULTS / "biased_mnist.csv")
    sets = ["accuracy_biased", "accuracy_unbiased", "accuracy_confounded"]
    (evidence,) = tables(ROOT / "docs" / "evidence.md", "Biased MNIST")
    assert check(evidence, rows, [*sets, "share", "swap_gap"]) > 40
    (short,) = tables(ROOT / "README.md", r"Does it work\?")
    assert check(short, rows, sets) >= 15


def test_chest_xrays():
    rows = read_rows(RESULTS / "chest_xray.csv")
    (evidence,) = tables(ROOT / "docs" / "evidence.md", "Chest X-rays from two hospitals")
    assert check(evidence, rows, ["auroc_same", "auroc_swapped", "auroc_within", "share", "swap_gap"]) > 50


def test_hidden():
    rows = [row for row in read_rows(RESULTS / "hidden.csv") if row["kind"] == "time"]
    (cells,) = tables(ROOT / "docs" / "evidence.md", r"Does a quiet heatmap mean a clean classifier\?")
    for training, steps, *numbers in cells[2:]:
        mine = [row for row in rows if row["system"] == "selective" and row["relative"] == ("relative" in training)
                and row["steps"] == int(steps.replace(",", "")) == row["step"] and row["task"] == "small"]  # fmt: skip
        assert len(mine) == 1, training
        columns = ["accuracy_biased", "accuracy_unbiased", "accuracy_confounded", "share_fine", "swap_gap"]
        for column, text in zip(columns, numbers, strict=True):
            assert float(text) == pytest.approx(mine[0][column], abs=0.051 if column != "share_fine" else 0.0051), (training, column)
