"""What the report says, and that its figure can be read."""

import json
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fisnet_cuda.evaluate import Evaluation, RunResult, SubsetResult, verdict
from fisnet_cuda.evaluate.collect import Collected
from fisnet_cuda.evaluate.faithfulness import CURVES
from fisnet_cuda.evaluate.figure import draw
from fisnet_cuda.evaluate.metrics import classification
from fisnet_cuda.evaluate.results import attention, insertion, leaves, reference
from fisnet_cuda.evaluate.swap import BackgroundSwap


@cache
def subset(name, n=100, accuracy=0.9, share=0.3, faithful=True, classes=2, seed=0):
    """A subset with exactly this accuracy."""
    rng = np.random.default_rng([seed, n])
    labels = np.arange(n) % classes
    wrong = np.arange(n) >= round(accuracy * n)
    logits = rng.normal(size=(n, classes)) * 0.1 + 5 * np.eye(classes)[np.where(wrong, (labels + 1) % classes, labels)]
    nan = np.full(n, np.nan)
    masked = share is not None
    found = Collected(
        np.arange(n), labels, logits, np.full(n, "used" if masked else "none", "U5"),
        np.clip(rng.normal(share, 0.05, n), 0, 1) if masked else nan, np.full(n, 0.7) if masked else nan,
        np.ones(n) if masked else nan, np.full(n, 0.3) if masked else nan, np.ones(n) if masked else nan, {},
    )  # fmt: skip
    few = min(n, 8)
    curves = {key: torch.rand(few, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i, key in enumerate(CURVES)}
    return SubsetResult(
        name, classification(logits, labels, [f"class {c}" for c in range(classes)], 200), attention(found, 200, 0),
        insertion(curves, 64, labels[:few], 200, 0) if faithful else None, found, tuple(f"{name} {i}" for i in range(n)),
    )  # fmt: skip


def run(*subsets, name="net", classes=2):
    return RunResult(
        name, tuple(f"class {c}" for c in range(classes)), {s.name: s for s in subsets}, {"checkpoint": "runs/a/best.ckpt"}
    )


def test_a_fall_where_the_shortcut_is_broken_is_the_background():
    text = verdict(run(subset("test", 300, 0.7), subset("test/biased", 150, 0.97), subset("test/confounded", 150, 0.55)))
    assert text.startswith("accuracy falls from 97 % (test/biased) to 55 % (test/confounded): the net uses the background")
    assert "30 % of its relevance lies in the background (test/biased; spread evenly it would be 70 %)" in text


def test_a_larger_set_on_which_the_shortcut_lies_is_not_what_is_compared_with():
    said = "accuracy falls from 99 % (test/same) to 6 % (test/swapped): the net uses the background"
    assert verdict(run(subset("test/same", 100, 0.99), subset("test/swapped", 150, 0.06))).startswith(said)
    plain = verdict(run(subset("site A", 100, 0.99), subset("site B", 150, 0.06)))  # names that tell nothing
    assert plain.startswith("accuracy falls from 99 % (site A) to 6 % (site B): what it learned does not hold there")


@pytest.mark.parametrize(
    ("subsets", "words"),
    [
        ([("biased", 400, 0.97), ("hospital B", 400, 0.8)], "does not hold there, or these images are harder"),
        ([("biased", 4000, 0.95), ("unbiased", 4000, 0.945)], "accuracy holds: 95 % (biased), at the lowest 94 % (unbiased)"),
        ([("biased", 30, 0.9), ("unbiased", 30, 0.87)], "no fall of accuracy is shown"),
        ([("biased", 200, 0.7), ("unbiased", 200, 0.9)], "accuracy holds: 70 % (biased), elsewhere at least 90 % (unbiased)"),
        ([("test", 200, 0.9)], "one subset alone cannot tell"),
        (
            [("test", 50, 0.55)],
            "not shown to be better than always answering the most frequent class (50 %): there is nothing that could fall",
        ),
    ],
)
def test_verdicts(subsets, words):
    assert words in verdict(run(*(subset(*given) for given in subsets)))


def test_a_quiet_heatmap_is_not_taken_for_proof():
    assert "do not take it for proof" in verdict(run(subset("biased", 300, 0.97, 0.02), subset("confounded", 300, 0.5, 0.02)))
    assert "looks at the background as much as at the object" in verdict(run(subset("biased", 300, 0.97, 0.7)))


def swapped(given, same, other, n=200):
    swap = BackgroundSwap.of([n, same, same, other, min(same, other), n - other, 1, n / 9, n / 2], 0.5, {"alone in their class": 3})
    return SubsetResult(**{**vars(given), "swap": swap})


def test_the_background_swap_is_one_line_of_the_verdict_and_a_table():
    holds, leaks = swapped(subset("test/biased", share=0.01), 196, 195), swapped(subset("external", share=0.01), 196, 140)
    text = verdict(run(holds, subset("test/unbiased")))
    assert "Background swap (test/biased, 200 images): accuracy holds: 98 % with another image's background of the same class" in text
    net = run(holds, leaks, subset("other"))
    text = verdict(net)  # what warns comes first
    assert text.count("Background swap") == 1
    assert "Background swap (external, 200 images): the classifier uses the background" in text
    assert "The heatmap is quiet (" in text
    text = Evaluation((net,)).markdown()
    table = text.split("## Background swap")[1].split("\n## ")[0]
    assert [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")] == ["subset", "test/biased", "external"]
    assert "+28.0 (+" in table
    assert "test/biased, external: 3 images alone in their class are left out of the background swap." in text
    assert "+28.0" in Evaluation((net,)).summary()
    assert "swap gap" not in Evaluation((run(subset("other")),)).summary()


def test_what_is_compared():
    net = run(subset("test"), subset("test/a"), subset("test/b"), subset("c"))
    assert [s.name for s in leaves(net)] == ["test/a", "test/b", "c"]
    assert reference([subset("unbiased"), subset("test/biased")]).name == "test/biased"
    assert reference([subset("x", 90), subset("external", 200), subset("y", 20)]).name == "external"


def test_runs_on_the_same_images_are_compared_by_image():
    a, b = run(subset("test", accuracy=0.9), name="a"), run(subset("test", accuracy=0.8, share=0.1), name="b")
    (paired,) = Evaluation((a, b)).differences()
    assert paired.paired
    assert paired.accuracy.value == pytest.approx(-0.1)
    assert paired.share.high < -0.15
    # b errs where a errs and on some images more: paired, that is sure; as separate samples, with seven more, it is not
    assert paired.accuracy.high < 0
    other = subset("test", accuracy=0.83)
    other = SubsetResult(**{**vars(other), "identity": tuple(f"other {i}" for i in range(100))})
    (separate,) = Evaluation((a, run(other, name="b"))).differences()
    assert not separate.paired
    assert separate.accuracy.value == pytest.approx(-0.07)
    assert separate.accuracy.high > 0


def test_json_is_json_and_the_table_has_every_subset(tmp_path):
    one_class = subset("external", 20, 1.0, None, classes=2)
    one_class = SubsetResult(
        **{**vars(one_class), "classification": classification(np.eye(2)[np.zeros(20, int)], np.zeros(20, int), ("a", "b"))}
    )
    evaluation = Evaluation((run(subset("test"), one_class),), {"bootstrap": 200, "seed": 0}, {"torch": "2"})
    written = evaluation.write(tmp_path / "out")
    content = json.loads(written["json"].read_text())
    external = content["runs"][0]["subsets"]["external"]
    assert external["classification"]["auc_macro"] == {"value": None, "low": None, "high": None}
    assert any("AUC is not defined: all images are of one class (a)" in note for note in external["notes"])
    assert external["attention"] is None
    test = content["runs"][0]["subsets"]["test"]
    assert test["classification"]["accuracy"]["value"] == pytest.approx(0.9)
    assert sum(test["attention"]["background_share"]["histogram_of_tenths"]) == 100
    text = written["markdown"].read_text()
    table = [line for line in text.splitlines() if line.startswith("| test ") and "90.0" in line]
    assert "30." in table[0]
    assert "↑ more is better, ↓ less is better" in text
    assert "AUC is not defined" in text
    assert written["figure"].stat().st_size > 10_000


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("runs", [1, 3])
def test_figure_can_be_read(count, runs):
    """Nothing is cut off at the border, and no text of a panel runs into its neighbour's."""
    names = ["test", "test/biased", "test/unbiased", "test/confounded", "a hospital with a rather long name", "b", "c", "d"][:count]
    nets = [
        run(*(subset(n, 40 + i, 0.5 + 0.06 * i, None if n == "b" else 0.4) for i, n in enumerate(names)), name=f"net {k}")
        for k in range(runs)
    ]
    figure = draw(nets)
    FigureCanvasAgg(figure).draw()
    texts = [*figure.texts, *figure.axes[0].get_yticklabels()]
    texts += [t for ax in figure.axes for t in (ax.title, ax._left_title, ax.xaxis.label, *ax.texts) if t.get_text()]
    for text in texts:
        box = text.get_window_extent()
        inside = box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1
        assert inside, text.get_text()
    titles = [ax.title if ax.title.get_text() else ax._left_title for ax in figure.axes]
    for row in (titles, [ax.xaxis.label for ax in figure.axes]):
        extents = [t.get_window_extent() for t in row]
        assert len(extents) == 4
        assert all(a.x1 < b.x0 for a, b in pairwise(extents))


def test_no_nan_is_printed():
    a, b = run(subset("test"), name="a"), run(subset("test"), name="b")  # the differences are 0 for every image
    text = Evaluation((a, b)).markdown()
    assert "+0.0" in text
    assert "nan" not in text.lower()


def test_panels_without_numbers_are_left_out():
    figure = draw([run(subset("test", share=None, faithful=False))])
    assert len(figure.axes) == 2


def test_many_classes_do_not_flood_the_report():
    text = Evaluation((run(subset("test", classes=20), classes=20),)).markdown()
    assert "of 20 classes are in evaluation.json" in text
    assert max(map(len, text.splitlines())) < 700
