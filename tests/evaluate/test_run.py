"""`evaluate` on a small ISNet: one pass, whatever the batches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import fisnet_cuda as fc
from fisnet_cuda.data.spec import InputSpec
from fisnet_cuda.errors import InputError
from fisnet_cuda.evaluate import Options, background_swap, evaluate
from fisnet_cuda.evaluate.attention import background_share
from fisnet_cuda.evaluate.collect import collect

SPEC = InputSpec((8, 8), 1, ("a", "b"))
FEW = Options(samples=5, steps=4)


def module(variant="selective"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(4 * 36, 2))
    return SimpleNamespace(net=fc.ISNet(model, variant=variant), spec=SPEC)


def batches(size=4, n=14):
    """Sample 3 has no mask, 5 an empty one, 7 a full one."""
    generator = torch.Generator().manual_seed(1)
    data = {"image": torch.rand(n, 1, 8, 8, generator=generator), "label": torch.arange(n) % 2, "index": torch.arange(n) + 100}
    data["mask"] = torch.zeros(n, 1, 8, 8)
    data["mask"][:, :, 2:6, 3:7] = 1
    data["mask"][[3, 5]], data["mask"][7] = 0, 1
    data["has_mask"] = torch.arange(n) != 3
    return [{key: value[i : i + size] for key, value in data.items()} for i in range(0, n, size)]


@pytest.mark.parametrize("variant", ["selective", "dual", "original"])
def test_the_predicted_class_is_explained_by_the_nets_own_rules(variant):
    one = module(variant)
    one.net.eval()
    found = collect(one.net, batches(14), 2)
    (batch,) = batches(14)
    with torch.no_grad():
        logits = one.net(batch["image"])
        R = one.net(batch["image"], relevance=True, target=logits.argmax(1)).heatmaps[:, 0]
    want = background_share(R, batch["mask"]).numpy()
    used = found.mask == "used"
    assert found.mask[[3, 5, 7]].tolist() == ["none", "empty", "full"]
    assert used.sum() == 11
    assert found.share[used] == pytest.approx(want[used], abs=1e-5)
    assert np.isnan(found.share[~used]).all()
    assert found.logits == pytest.approx(logits.double().numpy())
    assert found.area[used] == pytest.approx(0.75)


def test_batches_make_no_difference_and_nothing_is_left_changed():
    one = module()
    one.net.train()
    one.net.model[1].eval()  # one that the user froze
    before = {key: value.clone() for key, value in one.net.state_dict().items()}
    a, b = (
        evaluate(one, {"test": batches(size)}, bootstrap=100, faithful=FEW).to_dict()["runs"][0]["subsets"]["test"] for size in (3, 14)
    )
    assert [part.training for part in one.net.model] == [True, False, True, True, True, True]
    assert all(torch.equal(value, before[key]) for key, value in one.net.state_dict().items())

    def compare(x, y):
        if isinstance(x, dict):
            assert x.keys() == y.keys()
            for key in x:
                compare(x[key], y[key])
        elif isinstance(x, list):
            for u, v in zip(x, y):
                compare(u, v)
        else:
            assert x == (pytest.approx(y, abs=1e-5, nan_ok=True) if isinstance(x, float) else y)

    compare(a, b)
    assert a["insertion_deletion"]["n"] == 5
    assert a["attention"]["left_out"] == {"without_mask": 1, "mask_without_foreground": 1, "mask_without_background": 1}


def test_samples_for_insertion_hang_on_the_seed():
    one = module()
    one.net.eval()
    kept = [set(collect(one.net, batches(), 2, keep=5, seed=seed).kept) for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]
    found = collect(one.net, batches(), 2, keep=5)
    (everything,) = batches(14)
    assert all(torch.equal(image, everything["image"][place]) for place, image in found.kept.items())
    assert len(collect(one.net, batches(), 2, keep=99).kept) == 14


def test_backgrounds_are_swapped_as_by_hand_whatever_the_batches():
    one = module()
    one.net.eval()
    (everything,) = batches(14)
    want = background_swap(one.net, everything["image"], everything["mask"], everything["label"], has_mask=everything["has_mask"])
    for size in (3, 14):
        evaluation = evaluate(one, {"test": batches(size)}, bootstrap=100, faithful=Options(samples=2, steps=4, batch_size=size))
        found = evaluation.runs[0].subsets["test"].swap
        assert found.n == want.n == 11
        assert (found.plain, found.same, found.other) == (want.plain, want.same, want.other)
        assert found.shift == pytest.approx(want.shift, abs=1e-5)
    drawn = collect(one.net, batches(4), 2, keep_masked=5).masked
    assert len(drawn) == 5
    assert drawn.keys() == collect(one.net, batches(3), 2, keep_masked=5).masked.keys()
    assert all(torch.equal(x, everything["image"][i]) and torch.equal(M, everything["mask"][i]) for i, (x, M) in drawn.items())
    assert not {3, 5, 7} & drawn.keys()


def test_without_masks_and_without_labels():
    plain = [{key: value for key, value in batch.items() if "mask" not in key} for batch in batches()]
    subset = evaluate(module(), {"test": plain}, bootstrap=100, faithful=Options(samples=0)).runs[0].subsets["test"]
    assert subset.attention is None
    assert subset.insertion is None
    assert subset.swap is None
    unlabelled = [{**batch, "label": torch.full_like(batch["label"], -1)} for batch in batches()]
    whole = evaluate(module(), {"test": unlabelled}, bootstrap=100, faithful=FEW)
    subset = whole.runs[0].subsets["test"]
    assert subset.classification.n == 0
    assert subset.attention.n == 11
    assert "no image has a label" in whole.markdown()


@pytest.mark.parametrize(
    ("loaders", "options", "words"),
    [
        ({"test": []}, {}, "test has no images"),
        ({}, {}, "there is no subset"),
        ({"test": batches()}, {"bootstrap": 10}, "at least 100"),
        ({"test": batches()}, {"tolerance": -1}, "tolerance"),
        ({"test": batches()}, {"swap_images": -1}, "swap_images"),
    ],
)
def test_what_cannot_be_evaluated(loaders, options, words):
    with pytest.raises(InputError, match=words):
        evaluate(module(), loaders, **options)


def test_a_diverged_network_and_one_of_other_classes_are_refused():
    broken = module()
    broken.net.model[-1].weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite for 14 of 14 images of test"):
        evaluate(broken, {"test": [{k: v for k, v in b.items() if "mask" not in k} for b in batches()]}, faithful=Options(samples=0))
    other = SimpleNamespace(net=module().net, spec=InputSpec((8, 8), 1, ("a", "b", "c")))
    with pytest.raises(InputError, match="2 outputs and the data have 3 classes"):
        evaluate(other, {"test": batches()})


def test_progress_goes_to_standard_error(capsys):
    evaluate(module(), {"a set of a very long name": batches()}, name="net", bootstrap=100, faithful=FEW, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "14 images" in err
    assert "insertion and deletion" in err


def test_a_shortcut_that_hides_below_epsilon_is_found_by_the_swap_alone():
    """The mark outweighs the object three to one, by an activation of 1e-5: the heatmap shows nothing of it."""
    n, labels = 120, torch.arange(120) % 2
    x, M = torch.zeros(n, 1, 8, 8), torch.zeros(n, 1, 8, 8)
    M[:, :, 2:6, 2:6] = 1
    x[torch.arange(n), 0, 3, 3 + labels] = x[torch.arange(n), 0, 7, labels] = 1
    data = {"image": x, "label": labels, "mask": M, "has_mask": torch.ones(n, dtype=torch.bool), "index": torch.arange(n)}
    first, last = nn.Linear(64, 4, bias=False), nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        first.weight.zero_(), last.weight.zero_()
        for c in range(2):
            first.weight[c, 3 * 8 + 3 + c], first.weight[2 + c, 7 * 8 + c] = 1, 1e-5
            last.weight[c, c], last.weight[c, 2 + c] = 1, 3e5
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last)

    def measured(eps):
        net = fc.ISNet(model, variant="selective", first_layer="epsilon", eps=eps)
        whole = evaluate(SimpleNamespace(net=net, spec=SPEC), {"test": [data]}, bootstrap=100, faithful=Options(samples=0))
        return whole.runs[0].subsets["test"], whole.verdicts()[0]

    subset, said = measured(fc.rules.Epsilon(0.01))
    assert subset.attention.share.value < 0.01
    assert (subset.swap.plain.value, subset.swap.same.value, subset.swap.other.value) == (1, 1, 0)
    assert "the classifier uses the background" in said
    assert "The heatmap is quiet (0.3 % of its relevance in the background) but the classifier is not clean" in said
    subset, said = measured(fc.rules.Epsilon(1e-4, relative=True))
    assert subset.attention.share.value > 0.2
    assert "quiet" not in said
