"""Every spelling of every layer (zoo.py), wrapped as it is, beside the model itself and plain autograd (truth.py)."""

import pytest
from graph import truth, zoo
from graph.zoo import CASES


@pytest.mark.parametrize("name", CASES)
def test_logits(name):
    truth.logits(*zoo.build(name), CASES[name][2].get("layouts", True))


@pytest.mark.parametrize("name", [n for n, (_, _, o) in CASES.items() if o.get("piecewise_linear", True)])
def test_heatmaps(name):
    make, x = zoo.build(name)
    truth.heatmaps(make, x, train=CASES[name][2].get("train_truth", True))


@pytest.mark.parametrize("name", CASES)
def test_variants(name):
    make, x = zoo.build(name)
    truth.variants(make, x, CASES[name][2].get("first_layer", "zb"))
