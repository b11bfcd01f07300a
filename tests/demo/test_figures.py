"""The demo's figures: every text lies on the canvas and none over another, whatever the numbers."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.text import Text

from fisnet_cuda.demo import classes, digits, figures
from fisnet_cuda.demo.nets import small_net
from fisnet_cuda.demo.train import Trained


@pytest.fixture
def drawn(monkeypatch):
    """What the last drawing put on its canvas: ``[(words, (left, lower, right, upper) in pixels, (width, height) of the canvas)]``."""
    found = []
    draw_text, draw_figure = Text.draw, Figure.draw

    def text(self, renderer, *args, **kwargs):
        if self.get_visible() and self.get_text().strip():
            found.append((self.get_text(), Text.get_window_extent(self, renderer).extents, (renderer.width, renderer.height)))
        return draw_text(self, renderer, *args, **kwargs)

    def figure(self, renderer, *args, **kwargs):
        found.clear()
        return draw_figure(self, renderer, *args, **kwargs)

    monkeypatch.setattr(Text, "draw", text)
    monkeypatch.setattr(Figure, "draw", figure)
    return found


def faults(drawn):
    """Texts that are cut, and pairs of texts that overlap."""
    cut = [
        words
        for words, (left, lower, right, upper), (width, height) in drawn
        if min(left, lower) < 0 or right > width or upper > height
    ]
    over = [
        (a, b)
        for (a, p, _), (b, q, _) in itertools.combinations(drawn, 2)
        if min(p[2], q[2]) - max(p[0], q[0]) > 1 and min(p[3], q[3]) - max(p[1], q[1]) > 1  # one pixel is a rounded edge
    ]
    return cut, over


def step_times(milliseconds, counts=(2, 10, 100, 1000), original_up_to=100):
    """Step times ``{kind: (at the fewest classes, at the most)}``, on straight lines."""
    rows = []
    for kind, (first, last) in milliseconds.items():
        for i, count in enumerate(counts):
            if kind == "original" and count > original_up_to:
                continue
            p50 = first + (last - first) * i / (len(counts) - 1)
            rows.append(classes.StepTime(kind, count, 0.9 * p50, p50, 1.2 * p50))
    return rows


REAL = {
    "plain": (13.1, 13.4), "original": (66.0, 9300.0), "selective": (42.8, 46.9), "stochastic": (44.5, 45.7), "dual": (90.0, 88.4),
    "contrast": (43.9, 46.2),
}  # fmt: skip


@pytest.mark.parametrize(
    "times",
    [
        pytest.param(step_times(REAL), id="as measured"),
        pytest.param(step_times(REAL, (2, 10)), id="quick"),
        pytest.param(step_times(dict.fromkeys(REAL, (50.0, 50.0))), id="all alike"),
        pytest.param(step_times({**REAL, "dual": (50.0, 410000.0), "original": (60.0, 1e6)}), id="minutes"),
        pytest.param(step_times({**REAL, "dual": (30.0, 6200.0)}), id="original ends beside dual"),
    ],
)
def test_no_name_of_a_line_is_cut_or_covered(times, drawn, tmp_path):
    path = figures.classes_figure(times, tmp_path / "classes.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    words = " ".join(words for words, *_ in drawn)
    for name in ("Original, a heatmap per class", "Contrast (ours), 1 heatmap", "Dual, 2 heatmaps", "plain training", "Low is good"):
        assert name in words
    assert faults(drawn) == ([], [])


@pytest.mark.parametrize(
    ("names", "accuracy"),
    [(["Standard", "Stochastic ISNet", "Selective ISNet"], 100.0), (["Standard", *["Selective, papers"] * 3], 10.0)],
)
def test_no_text_beside_heatmaps_is_cut_or_covered(names, accuracy, drawn, tmp_path):
    tests = digits.evaluation_sets(digits.load_originals(0)[1], variants=1, seed=1)
    torch.manual_seed(0)
    nets = [Trained(name, small_net(10), dict.fromkeys(digits.MARKS, accuracy), 0.0, 1.0) for name in names]
    figures.heatmaps_figure(nets, tests, tmp_path / "heatmaps.png")
    assert any("guessing" in words for words, *_ in drawn)
    assert faults(drawn) == ([], [])


def test_names_are_moved_as_little_as_can_be():
    assert figures.spread([0.1, 0.5, 0.9], [0.1] * 3) == pytest.approx([0.1, 0.5, 0.9])
    assert figures.spread([0.5] * 3, [0.1] * 3) == pytest.approx([0.4, 0.5, 0.6])
    assert figures.spread([0.0, 0.0, 1.0], [0.2, 0.1, 0.2]) == pytest.approx([0.1, 0.25, 0.9])  # cut to the range
    assert figures.spread([0.5, 0.5], [0.8, 0.6]) == pytest.approx([0.4, 1.1])  # no room: over the top, never over each other
