"""Where the background hides: formulas on nets made by hand, where it is known, and the experiment from end to end."""

import math
import re
from pathlib import Path

import pytest
import real_data
import torch
from torch import nn

import fisnet_cuda as fc
from benchmarks.experiments import hidden, hiding
from benchmarks.experiments.biased_mnist import load
from benchmarks.experiments.command import parse, parser
from benchmarks.experiments.jobs import read_rows
from benchmarks.experiments.nets import build_net
from benchmarks.experiments.systems import Setting, build
from benchmarks.experiments.tasks import Images
from fisnet_cuda.evaluate.swap import background_swap

ABSOLUTE, RELATIVE = fc.rules.Epsilon(1e-2), fc.rules.Epsilon(1e-4, relative=True)


def share(net, x, M, epsilon, box_eps, target=None):
    return hidden.map_share(hidden.maps(net, x, epsilon, box_eps, target), M)


# ---- constructed nets: where the background hides is known -----------------------------------------------------------------


def test_epsilon_hides_a_background_that_decides():
    """A channel of amplitude 1e-4 that the next weights amplify: quiet with epsilon 0.01, loud with a small relative one."""
    net, x, M, y = hiding.epsilon_example()
    assert share(net, x, M, ABSOLUTE, 1e-2) < 3
    assert share(net, x, M, RELATIVE, 1e-2) > 40
    assert share(net, x, M, hidden.FINE, hidden.FINE_BOX) == pytest.approx(100 * 2 / 3, abs=0.5)  # it counts twice

    with torch.no_grad():
        logits, without = net(x), net(hiding.occlude(x, M))
    assert hiding.influence(logits, without) == pytest.approx(100 * 2 / 3, abs=0.1)
    swap = background_swap(net, x, M, y, margin=0)
    assert (swap.same.value, swap.other.value, swap.gap.value) == (1, 0, 1)


def test_relevance_left_by_two_epsilons():
    """At the second ReLU the background keeps 1e-4 v / (1e-4 v + e) of its relevance, at z^B as much as the foreground does."""
    net, x, M, _ = hiding.epsilon_example()
    one, mask = x[:1].double(), M[:1].double()
    v = one.max().item()
    R = hidden.maps(net.double(), one, ABSOLUTE, 1e-2)[:, 0]
    small, large = 1e-4 * v / (1e-4 * v + 1e-2), v / (v + 1e-2)
    assert (R * (1 - mask)).sum().item() == pytest.approx(4 * 2 * v * small * large, rel=1e-5)
    assert (R * mask).sum().item() == pytest.approx(4 * v * large**2, rel=1e-5)


def test_first_layer_hides_from_a_relative_epsilon():
    """z^B's epsilon is absolute, so a small first channel is hidden from relative epsilons; only a small z^B epsilon shows it."""
    net, x, M, _ = hiding.epsilon_example(hide_at=0)
    assert share(net, x, M, RELATIVE, 1e-2) < 3
    assert share(net, x, M, RELATIVE, 1e-6) > 60


def test_switched_off_units_hide_at_any_epsilon():
    """The mark of a class silences what speaks against it: nothing in the predicted class's map, all in the logits and the swap."""
    net, x, M, y = hiding.inhibition_example()
    assert share(net, x, M, hidden.FINE, hidden.FINE_BOX) < 1e-3
    every = torch.arange(2).expand(8, 2)
    assert share(net, x, M, hidden.FINE, hidden.FINE_BOX, every) > 50
    swap = background_swap(net, x, M, y, margin=0)
    assert swap.gap.value == 1
    (row,) = hiding.layer_effects(net, x, hiding.occlude(x, M), ABSOLUTE, 1e-2)
    assert row["effect_dead"] == pytest.approx(row["effect"])
    assert row["effect_below"] == row["effect_visible"] == 0


@pytest.mark.parametrize(("epsilon", "group"), [(ABSOLUTE, "below"), (RELATIVE, "visible")])
def test_layer_effects_find_the_hiding_place(epsilon, group):
    net, x, M, _ = hiding.epsilon_example()
    first, second = hiding.layer_effects(net, x, hiding.occlude(x, M), epsilon, 1e-2)
    assert (first["name"], second["name"]) == ("1", "3")
    assert second["effect"] == pytest.approx(100 * 2 / 3, abs=0.1)
    assert second[f"effect_{group}"] == pytest.approx(second["effect"])
    others = {"below", "dead", "visible"} - {group}
    assert all(second[f"effect_{other}"] == 0 for other in others)
    assert first["effect_visible"] == pytest.approx(first["effect"])
    assert (second["absorbed_background"] > 98) == (group == "below")
    assert second["units_below"] == pytest.approx(50 if group == "below" else 0)


# ---- formulas ----------------------------------------------------------------------------------------------------------------


def test_relu_outputs_and_patches_of_a_residual_net():
    model = build_net("resnet18_slim", 3, 1, (32, 32), seed=0).eval()
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        logits, found = hiding.relu_outputs(model, x)
        assert len(found) == 17
        assert list(found)[:3] == ["relu", "layer1.0.relu", "layer1.0.relu:2"]
        other = hiding.relu_outputs(model, x.flip(3))[1]
        assert torch.equal(hiding.patched(model, x, 2, found["layer1.0.relu:2"]), logits)
        assert torch.allclose(hiding.patched(model, x, 2, other["layer1.0.relu:2"]), model(x.flip(3)), atol=1e-5)
        assert torch.equal(model(x), logits)  # no hook is left


def test_occlusion():
    x, M = torch.tensor([[[[1.0, 3.0]], [[5.0, 7.0]]]]), torch.tensor([[[[1.0, 0.0]]]])
    assert hiding.mean_background(x, M).tolist() == [3, 7]
    assert hiding.occlude(x, M, torch.tensor([0.5, 2.0])).flatten().tolist() == [1, 0.5, 5, 2]


def test_influence_does_not_see_what_softmax_does_not_see():
    L = torch.tensor([[1.0, 3.0], [4.0, 2.0]])
    assert hiding.influence(L, L + 5) == 0
    assert hiding.influence(L, torch.zeros_like(L)) == pytest.approx(100)


@pytest.mark.parametrize("name", ["convnet", "convnet_bn"])
def test_box_denominator_is_that_of_the_rule(name):
    """R of z^B sums to R_out z'/(z' + e) less what the bias takes; here by its definition, entry by entry."""
    model = build_net(name, 3, 1, (16, 16), seed=0).eval()
    if name == "convnet_bn":
        nn.init.uniform_(model.norm1.weight, -1, 1)
        nn.init.normal_(model.norm1.bias)
        model.norm1.running_var.uniform_(0.5, 2)
    head = model[:2] if name == "convnet_bn" else model[:1]
    x = torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        z = hiding.box_denominator(model, x)
        pre, zero = head(x), head(torch.zeros(1, 1, 16, 16))
        # the least that the layer could give: each weight's negative part with 1, and the bias's negative part
        unit = torch.eye(256).reshape(256, 1, 16, 16)
        contributions = (head(unit) - zero).flatten(1)  # pixel x unit
        b = zero.flatten(1)[0]
        bias = b if name == "convnet" else (model.norm1.bias - model.norm1.running_mean
                                            * model.norm1.weight / (model.norm1.running_var + 1e-5).sqrt()).repeat_interleave(64)
        least = contributions.clamp(max=0).sum(0) + bias.clamp(max=0)
    assert torch.allclose(z.flatten(1), pre.flatten(1) - least, atol=1e-4)
    assert (z >= -1e-4).all()


def test_correlations_against_hand_numbers():
    x, y = torch.tensor([1.0, 2.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 10.0])
    assert hiding.pearson(x, y) == pytest.approx(15.0 / math.sqrt(4.75 * 50.0))
    # ranks 0, 1.5, 1.5, 3 and 0, 2, 1, 3
    assert hiding.spearman(x, y) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(hiding.pearson(torch.ones(4), y))


def test_auc_counts_ties_half():
    signal, lost = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([False, False, True, True])
    assert hiding.auc(signal, lost) == pytest.approx(3.5 / 4)
    assert math.isnan(hiding.auc(signal, torch.ones(4, dtype=torch.bool)))


def test_best_threshold():
    signal, lost = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([False, False, True, False, True])
    assert hiding.best_threshold(signal, lost) == 2.5  # misses none, one false alarm of three; 4.5 would miss one of two


def rows_of(seed, pairs):
    common = {"kind": "time", "seed": seed, "system": "selective", "accuracy_biased": 99.0}
    return [{**common, "swap_gap": signal, "lost": lost} for signal, lost in pairs]


def test_held_out_thresholds_come_from_other_seeds():
    rows = rows_of(0, [(1.0, 0.0), (20.0, 30.0)]) + rows_of(1, [(2.0, 0.0), (5.0, 40.0), (12.0, 1.0), (50.0, 60.0)])
    # for seed 1 the threshold is 10.5: it misses (5, 40) and warns of (12, 1); for seed 0 it is 3.5
    assert hidden.held_out(rows, "swap_gap") == (1, 3, 1, 3)


def test_untrained_nets_and_the_standard_net_are_not_judged():
    rows = rows_of(0, [(1.0, 0.0)])
    assert hidden.judged([*rows, {**rows[0], "accuracy_biased": 20.0}, {**rows[0], "system": "standard"}, {"kind": "layer"}]) == rows


# ---- the experiment ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mnist():
    return str(real_data.mnist())


def test_measuring_does_not_change_the_training(mnist):
    system = build(Setting("stochastic"), load(mnist, 600, 60))
    before = system.net.generator.get_state()
    val = load(mnist, 600, 60).val[slice(0, 32)]
    first, second = hidden.signals(system, val, 8), hidden.signals(system, val, 8)
    assert torch.equal(before, system.net.generator.get_state())
    assert first == second
    assert set(hidden.SIGNALS) <= set(first)


def test_signals_of_a_clean_and_a_biased_net():
    """Signals that ask the logits tell the constructed net from one that sees the foreground alone."""
    net, x, M, y = hiding.epsilon_example()
    blind, *_ = hiding.epsilon_example()
    with torch.no_grad():
        blind[5].weight.view(2, 2, 4, 4)[:, 1] = 0

    class Made:
        setting = Setting("standard", eps=1e-2, relative=False)

        def __init__(self, model):
            self.model = model

        def eval(self):
            pass

    found, clean = (hidden.signals(Made(model), Images(x, y, M)) for model in (net, blind))
    assert found["share_own"] < 3
    assert found["share_fine"] > 60
    assert found["gap_epsilon"] > 60 > 3 > clean["gap_epsilon"]
    assert found["occluded_zero"] > 60
    assert clean["occluded_zero"] == 0
    assert found["swap_shift"] > 50
    assert clean["swap_shift"] == pytest.approx(0, abs=1e-4)


def test_small_task(mnist):
    task = hidden.load_small(mnist, 600, 60)
    biased, unbiased, confounded = (task.tests[marks].images.float() for marks in ("biased", "unbiased", "confounded"))
    for n, c in enumerate(task.tests["biased"].labels.tolist()):
        square = biased[n] - unbiased[n]
        assert square.nonzero()[:, 1:].tolist() == [[y, x] for y in range(1 + 3 * c, 4 + 3 * c) for x in (1, 2, 3)]
        assert not (square > 0)[task.tests["biased"].masks[n] > 0].any()
    places = [(images - unbiased).flatten(1).argmax(1) for images in (biased, confounded)]
    assert (places[0] != places[1]).all()


def test_digits_task():
    pytest.importorskip("sklearn")
    task = hidden.load_digits("", 1500, 60)
    assert (len(task.train), len(task.val), len(task.tests["biased"])) == (1500, 1000, 60)
    difference = task.tests["biased"].images.float() - task.tests["confounded"].images.float()
    assert (difference.flatten(1).abs().sum(1) > 0).all()
    assert not (difference.abs() * (task.tests["biased"].masks > 0)).any()


def test_fine_first_layer(mnist):
    system = build(Setting("selective_fine_first", eps=1e-4, relative=True), load(mnist, 600, 60))
    assert hidden.own_rules(system) == (RELATIVE, 1e-6)
    assert hidden.own_rules(build(Setting("selective", eps=1e-5, relative=False), load(mnist, 600, 60)))[1] == 1e-5


@pytest.mark.parametrize("net", ["convnet", "resnet18"])
def test_quick_run(mnist, tmp_path, net, monkeypatch, capsys):
    every, systems = hidden.jobs, {"standard", "selective", "dual"} if net == "convnet" else {"stochastic"}

    def few(run, part):
        return list({job["system"]: job for job in every(run, part) if job["system"] in systems and job["net"] != "resnet18"}.values())

    monkeypatch.setattr(hidden, "jobs", few)
    arguments = ["--data", mnist, "--quick", "--seeds", "2", "--out", str(tmp_path), "--processes", "1", "--net", net]
    assert hidden.main(arguments) == 0
    name = "hidden-quick" if net == "convnet" else "hidden_resnet18-quick"
    rows = read_rows(tmp_path / f"{name}.csv")
    assert {row["kind"] for row in rows} == {"time", "layer"}
    assert all(math.isfinite(row["swap_gap"]) for row in rows if row["kind"] == "time")
    for figure in ("courses", "signals", "layers"):
        assert (tmp_path / f"{name}-{figure}.png").stat().st_size > 5_000
    assert "Which signal warns?" in (tmp_path / f"{name}.md").read_text()
    assert "Which settings hold?" in capsys.readouterr().out
    assert not [job for job in few(parse(parser(""), ["--quick"])[1], net) if job not in [{k: r[k] for k in job} for r in rows]]


def test_page_of_quiet_heatmaps(capsys):
    """The examples of the page run and print what the page says."""
    text = (Path(__file__).parents[2] / "docs" / "quiet-heatmaps.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/quiet-heatmaps.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] in text.replace("\n", " ")
    assert names["hidden"] < 0.03
    assert names["shown"] > 0.5
