"""How alike maps are, by hand and against SciPy; the experiment end to end at its smallest."""

import math

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from scipy.stats import spearmanr
from tiny_mnist import write_mnist

from benchmarks.experiments import agreement
from benchmarks.experiments.agreement import alike, checkpoints, look, looks, ranks, relevance, same_weights, spearman, top_shared
from benchmarks.experiments.jobs import read_rows
from benchmarks.experiments.nets import build_net
from benchmarks.experiments.systems import Setting
from benchmarks.experiments.tasks import Images


def test_equal_values_share_the_mean_rank():
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 3.0, 2.0])).tolist() == [4.0, 1.0, 4.0, 4.0, 2.0]
    assert ranks(torch.tensor([[1.0, 1.0], [2.0, 1.0]])).tolist() == [[1.5, 1.5], [2.0, 1.0]]


def test_spearman_by_hand():
    # no ties: 1 - 6 sum d^2 / (n (n^2 - 1)), d = (0, 1, -1, 0)
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    assert spearman(a, b).item() == pytest.approx(1 - 6 * 2 / (4 * 15))
    # ties: ranks (1.5, 1.5, 3) and (1, 2, 3): sqrt(3) / 2
    assert spearman(torch.tensor([5.0, 5.0, 7.0]), b[[0, 2, 3]]).item() == pytest.approx(math.sqrt(3) / 2)
    assert spearman(a, a * 10).item() == pytest.approx(1)
    assert spearman(a, 5 - a).item() == pytest.approx(-1)


def test_what_both_maps_leave_out_is_no_agreement():
    a, b = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([2.0, 1.0, 0.0])
    zeros = torch.zeros(50)
    assert spearman(torch.cat([a, zeros]), torch.cat([b, zeros])).item() == pytest.approx(-1)
    # a zero on one side counts
    assert spearman(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([2.0, 3.0, 1.0])).item() == pytest.approx(1)


def test_undefined_correlations_are_nan():
    pairs = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 4.0, 0.0]]), torch.tensor([[0.0, 0, 0], [1, 2, 3], [0, 5, 0]])
    assert spearman(*pairs).isnan().all()


def test_spearman_is_scipys():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 5, (20, 60), generator=generator).double()
    b = torch.randint(0, 5, (20, 60), generator=generator).double() + a * torch.rand(20, 60, generator=generator).round()
    found = spearman(a, b)
    for x, y, rho in zip(a, b, found):
        some = (x != 0) | (y != 0)
        assert rho.item() == pytest.approx(spearmanr(x[some], y[some]).statistic, abs=1e-12)


def test_top_shared_by_hand():
    a = torch.tensor([9.0, 8.0, 7.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    b = torch.tensor([0.0, 8.0, 7.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert top_shared(a, b, 0.3).item() == pytest.approx(2 / 3)
    assert top_shared(a, b, 0.01).item() == 0  # k = 1: pixel 0 and pixel 3
    assert top_shared(a, a, 0.3).item() == 1


def test_ties_at_the_edge_are_broken_at_random():
    a, b = torch.tensor([5.0, 1.0, 1.0, 1.0]), torch.tensor([5.0, 4.0, 3.0, 0.0])
    # k = 2: pixel 0 for sure; pixel 1, that b has too, is the second of a in one of three draws
    assert top_shared(a, b, 0.5).item() == pytest.approx((1 + 1 / 3) / 2)
    assert top_shared(torch.ones(100), torch.ones(100), 0.05).item() == pytest.approx(0.05)  # chance


def test_checkpoints():
    assert checkpoints(8) == [0, 1, 2, 4, 8]
    assert checkpoints(1) == [0, 1]


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(4, 1, 24, 24)
    masks[:, :, 6:18, 6:18] = 1
    return Images(torch.rand(4, 1, 24, 24, generator=generator), torch.arange(4), masks)


@pytest.fixture(scope="module")
def model():
    return build_net("convnet", 5, 1, (24, 24), seed=0)


def test_original_against_its_own_maps_agrees_wholly(model, images):
    setting = Setting("original")
    seen = look(relevance(model, "original", images.images, setting), images.masks, setting)
    row = alike(seen.A, seen.A)
    assert row["spearman"] == pytest.approx(1)
    assert row["top5"] == pytest.approx(100)
    assert row["images_compared"] == 4


def test_stochastic_shows_one_of_the_originals_maps(model, images):
    setting = Setting("stochastic")
    every = relevance(model, "original", images.images, setting)
    drawn = relevance(model, "stochastic", images.images, setting, seed=3)[:, 0]
    gaps = (every - drawn[:, None]).abs().flatten(2).amax(2)
    assert (gaps.amin(1) < 1e-6 * every.abs().amax()).all()


def test_many_draws_come_nearer_to_the_original(model, images):
    """The mean over draws tends to a weighted mean of the Original's maps, which one draw is far from."""
    rows = {row["map"]: row for row in same_weights(model, images, Setting("stochastic"), draws=12) if row["reference"] == "mean"}
    assert set(rows) == {
        "selective", "stochastic", "stochastic, 12 draws", "dual, z+", "dual, epsilon", "contrast", "contrast, 12 draws"
    }  # fmt: skip
    for name in ("stochastic", "contrast"):
        assert rows[f"{name}, 12 draws"]["spearman"] > rows[name]["spearman"]
    assert all(0 < row["loss_ratio"] < 100 for row in rows.values())


def test_background_loss_is_the_losss(model, images):
    from fisnet_cuda.ops.heatmap_loss import heatmap_loss

    setting = Setting("dual", d=0.5)
    seen = dict(looks(model, images, setting, draws=1))
    R = relevance(model, "dual", images.images, setting)
    both, _ = heatmap_loss(R, images.masks, d=0.5, E=1, c1=1, c2=25, foreground="hybrid", normalization="absRoIMean")
    torch.testing.assert_close((seen["dual, z+"].background + seen["dual, epsilon"].background) / 2, both)


def test_quick(tmp_path, monkeypatch, capsys):
    data = write_mnist(tmp_path / "mnist.npz")
    monkeypatch.setattr(agreement, "FASTER", ("stochastic", "dual"))
    monkeypatch.setattr(agreement, "WATCHED", ("original",))
    arguments = ["--data", str(data), "--quick", "--seeds", "1", "--processes", "1", "--out", str(tmp_path)]
    assert agreement.main(arguments) == 0
    rows = read_rows(tmp_path / "agreement-quick.csv")
    a = [row for row in rows if row["question"] == "same weights"]
    b = [row for row in rows if row["question"] == "different nets"]
    assert {(row["net_trained"], row["epoch"]) for row in a} == {(n, e) for n in agreement.WATCHED for e in (0, 1)}
    assert {row["net_trained"] for row in b} == {"original", "original, other seed", "standard", "stochastic", "dual"}
    # before training the nets of a seed are one net; the second Original is another
    start = {row["net_trained"]: row for row in b if row["epoch"] == 0}
    assert start["dual"]["spearman"] == start["standard"]["spearman"] == 1
    assert start["original, other seed"]["spearman"] < 1
    page = (tmp_path / "agreement-quick.md").read_text()
    assert page.count("| weights") == 2
    assert (tmp_path / "agreement-quick.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(agreement, "draw", lambda rows, path: path)  # the figure takes the longest
    assert agreement.main([*arguments, "--draw"]) == 0
    assert (tmp_path / "agreement-quick.md").read_text() == page
    assert "Different nets" in capsys.readouterr().out
