"""Heatmap figures: scales, notes, shapes that do not fit, and that nothing is left of a figure that failed."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fisnet_cuda import plot
from fisnet_cuda.errors import InputError
from fisnet_cuda.plot import Row, background_share, heatmap_grid


def row(heatmap=None, *, mask=True, h=12, w=16, **options):
    rng = np.random.default_rng(0)
    heatmap = rng.standard_normal((h, w)) if heatmap is None else heatmap
    return Row(rng.random((1, h, w)), np.eye(h, w) if mask else None, {"TB": heatmap}, "a.png", **options)


def sheet(rows, scale="each", percentile=99.5, overlay=False):
    return plot._Sheet([plot._Panels(r, i) for i, r in enumerate(rows)], None, scale, percentile, overlay, "logit")


def texts(rows, **options):
    figure = sheet(rows, **options).draw()
    ticks = [t.get_text() for ax in figure.axes for t in ax.get_yticklabels()]
    return [t.get_text() for t in figure.texts] + ticks


def heatmap_pixels(heatmap, **options):
    """What stands in the figure for a heatmap: RGB of its panel, as matplotlib draws it."""
    figure = sheet([row(heatmap, mask=False)], **options).draw()
    image = figure.axes[1].images[-1]
    return image.to_rgba(image.get_array(), norm=True)[..., :3]


def test_share_is_that_of_the_loss():
    from types import SimpleNamespace

    import fisnet_cuda as fc

    heatmap, mask = torch.randn(3, 9, 7), (torch.rand(9, 7) > 0.4).float()
    out = SimpleNamespace(logits=torch.zeros(1, 2), heatmaps=heatmap[None, None], hidden={})
    _, parts = fc.ISNetLoss()(out, torch.tensor([0]), mask[None, None])
    assert background_share(heatmap, mask) == pytest.approx(float(parts.background_share), rel=1e-5)


@given(st.integers(0, 10_000), st.floats(1e-6, 1e6))
def test_share_is_in_0_1_and_does_not_depend_on_the_scale(seed, factor):
    rng = np.random.default_rng(seed)
    heatmap, mask = rng.standard_normal((2, 5, 4)), rng.random((5, 4))
    share = background_share(heatmap, mask)
    assert 0 <= share <= 1
    assert background_share(-factor * heatmap, mask) == pytest.approx(share)
    assert background_share(heatmap, 1 - mask) == pytest.approx(1 - share)


@pytest.mark.parametrize("heatmap", [np.zeros((3, 3)), np.full((3, 3), np.nan), np.full((3, 3), np.inf)])
def test_share_of_nothing_is_nan(heatmap):
    assert math.isnan(background_share(heatmap, np.ones((3, 3))))


def test_red_is_for_blue_against_white_zero_and_the_scale_is_symmetric():
    heatmap = np.zeros((12, 16))
    heatmap[0, 0], heatmap[0, 1] = 4.0, -1.0  # a lone sign must not shift zero
    colours = heatmap_pixels(heatmap, percentile=100)
    assert colours[0, 0, 0] > colours[0, 0, 2] + 0.2  # red
    assert colours[0, 1, 2] > colours[0, 1, 0] + 0.1  # blue
    assert colours[5, 5].min() > 0.95
    assert {"+4", "0", "−4"} <= set(texts([row(heatmap)], percentile=100))


def test_each_has_its_own_scale_and_shared_has_one():
    rows = [row(np.eye(12, 16)), row(50 * np.eye(12, 16))]
    each, shared = sheet(rows, "each"), sheet(rows, "shared")
    assert each.limits == [[1.0], [50.0]]
    assert shared.limits[0] == shared.limits[1]
    assert len(each.draw().axes) == 2 * 3  # image, map, colour bar
    assert len(shared.draw().axes) == 2 * 2 + 1


def test_percentile_keeps_one_pixel_from_hiding_the_rest():
    heatmap = np.ones((40, 40))
    heatmap[0, 0] = 1e6
    assert sheet([row(heatmap, mask=False, h=40, w=40)]).limits == [[1.0]]
    said = " ".join(texts([row(heatmap, mask=False, h=40, w=40)]))
    assert "99.5th percentile" in said
    lone = np.zeros((40, 40))
    lone[0, 0] = -3.0  # the percentile is 0: the largest value is taken
    assert sheet([row(lone, mask=False, h=40, w=40)]).limits == [[3.0]]


def test_what_cannot_be_shown_is_said():
    nan = np.ones((2, 12, 16))
    nan[0, 0, 0], nan[1, 0, 0], nan[1, 5, 5] = np.nan, np.inf, np.nan
    assert any("2 of 192 pixels" in t for t in texts([row(nan)]))
    assert "zero everywhere" in texts([row(np.zeros((12, 16)))])
    assert "no mask" in texts([row(mask=False)])
    empty = Row(np.zeros((1, 4, 4)), np.zeros((4, 4)), {"x": np.ones((4, 4))})
    assert any("mask is empty" in t for t in texts([empty]))
    assert "in background: 0.0 %" in texts([row(np.eye(12, 16))])


def test_channels_are_summed_but_their_shares_are_not():
    heatmap = np.stack([np.eye(12, 16), -np.eye(12, 16)[::-1]])
    panels = plot._Panels(row(heatmap), 0)
    np.testing.assert_array_equal(panels.maps[0], heatmap.sum(0))
    assert panels.notes[0][0][0] == f"in background: {100 * background_share(heatmap, np.eye(12, 16)):.0f} %"


def test_right_and_wrong_are_written_not_only_coloured():
    assert "right" in texts([row(correct=True)])
    assert "WRONG" in texts([row(correct=False)])
    assert not {"right", "WRONG"} & set(texts([row()]))


@settings(max_examples=6)
@given(
    rows=st.integers(1, 16), maps=st.integers(0, 5), h=st.integers(1, 90), w=st.integers(1, 90), scale=st.sampled_from(plot.SCALES),
    overlay=st.booleans(), titled=st.booleans(),
)  # fmt: skip
def test_every_layout_stays_on_its_page(rows, maps, h, w, scale, overlay, titled):
    rng = np.random.default_rng(0)
    names = [f"class {'long ' * 8 if titled else ''}{k}" for k in range(maps)]
    all_rows = [
        Row(rng.random((3, h, w)), rng.random((h, w)), {n: rng.standard_normal((h, w)) for n in names}, "a/long_name/" * 4, i % 2 == 0)
        for i in range(rows)
    ]
    figure = sheet(all_rows, scale, overlay=overlay).draw()
    width, height = figure.bbox.width, figure.bbox.height
    renderer = figure.canvas.get_renderer()
    boxes = [artist.get_window_extent(renderer) for artist in (*figure.texts, *figure.axes, *figure.legends)]
    for box in boxes:
        assert box.x0 > -1
        assert box.y0 > -1
        assert box.x1 < width + 1
        assert box.y1 < height + 1
    panels = [ax.get_window_extent(renderer) for ax in figure.axes]
    for i, a in enumerate(panels):
        assert not any(a.overlaps(b) for b in panels[i + 1 :])


def test_file_is_whole_and_pyplot_is_not_touched(tmp_path):
    before = set(sys.modules)
    path = heatmap_grid(tmp_path / "new" / "maps.png", [row(), row()], title="a $title$ of {dollars", scale="shared", overlay=True)
    with Image.open(path) as image:
        image.load()
        assert min(image.size) > 300
    assert [p.name for p in path.parent.iterdir()] == ["maps.png"]
    assert "matplotlib.pyplot" not in set(sys.modules) - before


def test_nothing_is_left_of_a_figure_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(plot.Figure, "savefig", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        heatmap_grid(tmp_path / "maps.png", [row()])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "at least one Row"),
        ([row(), Row(np.zeros((4, 4)))], {}, r"rows\[1\].image"),
        ([Row(np.zeros((1, 4, 4)), np.zeros((4, 5)))], {}, r"rows\[0\].mask"),
        ([row(np.zeros(4))], {}, r"heatmaps\['TB'\]"),
        ([row()], {"scale": "own"}, "scale must be"),
        ([row()], {"percentile": 0}, "percentile must be"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        heatmap_grid(tmp_path / "maps.png", rows, **options)
    assert list(tmp_path.iterdir()) == []


def test_suffix_must_be_a_figures(tmp_path):
    with pytest.raises(InputError, match=r"must end in \.png"):
        heatmap_grid(tmp_path / "maps.xyz", [row()])


@pytest.mark.parametrize(
    ("value", "text"), [(0.0042, "0.0042"), (4.2e-5, "4.2e-5"), (130, "130"), (99.6, "100"), (12345, "1.2e4"), (2.31, "2.3")]
)
def test_numbers_have_two_digits(value, text):
    assert plot._number(value) == text


@given(st.text("ab/_- ", max_size=60), st.integers(6, 30))
def test_wrapping_keeps_every_letter(text, width):
    lines = plot._wrap(text, width)
    assert all(len(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
