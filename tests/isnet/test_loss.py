"""ISNetLoss: the authors' numbers for whole nets, what it does with masks and labels, and every message."""

import copy
import itertools
import math
import pickle
import warnings
from types import SimpleNamespace

import golden_nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fisnet_cuda.errors import FisnetWarning
from fisnet_cuda.isnet.loss import ISNetLoss, LossParts, MaskReport, check_masks
from fisnet_cuda.ops.heatmap_loss import heatmap_loss, resize_mask


def disc(n=1, size=8, channels=None):
    """Masks with a square of foreground in the middle."""
    mask = torch.zeros(n, size, size)
    mask[:, size // 4 : -(size // 4), size // 4 : -(size // 4)] = 1
    return mask if channels is None else mask.unsqueeze(1).repeat(1, channels, 1, 1)


def output(n=4, K=2, C=3, classes=5, size=8, hidden=(), seed=0, dtype=torch.float32, grad=False):
    """What a network returns, and labels."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    out = SimpleNamespace(
        logits=random(n, classes),
        heatmaps=random(n, K, C, size, size),
        hidden={f"layer{i}.relu": random(n, K, 2 + i, s, s) for i, s in enumerate(hidden)},
    )
    return out, torch.arange(n) % classes


def quiet(**options):
    return ISNetLoss(**{"check": "never", **options})


# --- goldens -----------------------------------------------

NETS = {name: golden_nets.arrays(f"{name}_eval") for name in golden_nets.NAMES}
VARIANTS = [
    (name, key.removesuffix("/hloss"))
    for name, arrays in NETS.items()
    for key in arrays
    if key.endswith("/hloss") and not key.startswith("flex_lds")
]


def golden_loss(meta, c1, c2):
    return ISNetLoss(
        P=meta["P"], d=meta["d"], E=meta["E"], w1=meta["A"], w2=meta["B"], c1=c1, c2=c2,
        foreground=meta["foreground"], normalization=meta["norm"], d_loss=meta["dLoss"],
    )


def close(got, expected):
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("net", "variant"), VARIANTS)
def test_golden(net, variant):
    data = NETS[net]
    get = lambda key: data[f"{variant}/{key}"]  # noqa: E731
    c1, c2, masks, heatmaps = get("cut"), get("cut2"), data["mask"], get("heatmap")
    out = SimpleNamespace(logits=data["logits"], heatmaps=heatmaps, hidden={})
    total, parts = golden_loss(data["meta"], c1, c2)(out, data["y"], masks)
    close(total, get("total"))
    close(parts.classification, get("cls"))
    close(parts.heatmap, get("hloss"))
    close(parts.background, get("bg").mean())
    close(parts.foreground, get("fg").mean())
    close((heatmaps.abs() * masks.unsqueeze(1)).sum((2, 3, 4)), get("F"))
    per_sample = heatmap_loss(
        heatmaps, masks, d=0.9, E=1.0, c1=c1, c2=c2, foreground="hybrid", normalization="absRoIMean"
    )
    close(per_sample[0], get("bg"))
    close(per_sample[1], get("fg"))


def test_golden_nets_cover_every_variant():
    assert len(VARIANTS) >= 20
    assert {variant for _, variant in VARIANTS} >= {"flex/selective", "flex/original", "block/dual"}


@pytest.mark.parametrize("net", ["resnet18s", "densenets"])
def test_golden_deep_supervision(net):
    data = NETS[net]
    prefix = "flex_lds/selective"
    layers = [str(layer) for layer in data[f"{prefix}/layers"]]
    assert layers[0] == "input"
    c1, c2 = (
        {layer: data[f"{prefix}/{cut}" + ("" if layer == "input" else f"/{layer}")] for layer in layers}
        for cut in ("cut", "cut2")
    )
    hidden = {layer: data[f"{prefix}/hidden/{layer}"] for layer in layers[1:]}
    out = SimpleNamespace(logits=data["logits"], heatmaps=data["flex/selective/heatmap"], hidden=hidden)
    total, parts = golden_loss(data["meta"], c1, c2)(out, data["y"], data["mask"])
    close(total, data[f"{prefix}/total"])
    close(parts.heatmap, data[f"{prefix}/hloss"])
    close(parts.background, data[f"{prefix}/bg"].mean())
    assert list(parts.layers) == layers
    close(torch.stack([parts.layers[layer].heatmap for layer in layers]), data[f"{prefix}/layer_losses"])


# --- the equation -----------------------------------------------


def test_defaults_are_those_of_the_paper():
    out, labels = output()
    explicit = ISNetLoss(0.7, 0.9, 1, 1, 3, 1, 25, "hybrid", "absRoIMean", 0.8)
    total, parts = ISNetLoss()(out, labels, disc(4))
    assert torch.equal(total, explicit(out, labels, disc(4))[0])
    torch.testing.assert_close(parts.heatmap, parts.background + 3 * parts.foreground)
    torch.testing.assert_close(total, 0.3 * parts.classification + 0.7 * parts.heatmap)


@pytest.mark.parametrize("P", [0.0, 0.25, 1.0])
def test_P_mixes(P):
    out, labels = output(grad=True)
    total, parts = quiet(P=P)(out, labels, disc(4))
    torch.testing.assert_close(total.detach(), (1 - P) * parts.classification + P * parts.heatmap)
    total.backward()
    assert (out.logits.grad.abs().max() > 0) == (P < 1)
    assert (out.heatmaps.grad.abs().max() > 0) == (P > 0)


def test_gradcheck_with_deep_supervision_and_a_missing_mask():
    out, labels = output(n=3, size=4, hidden=(3, 2), dtype=torch.float64)
    masks = disc(3, 4).double()
    masks[1] = torch.nan
    loss = quiet(c1=2.0, c2=9.0)

    def total(logits, heatmaps, *hidden):
        shown = SimpleNamespace(
            logits=logits, heatmaps=heatmaps, hidden=dict(zip(out.hidden, hidden, strict=True))
        )
        return loss(shown, labels, masks)[0]

    tensors = [t.requires_grad_() for t in (out.logits, out.heatmaps, *out.hidden.values())]
    assert torch.autograd.gradcheck(total, tensors)


@pytest.mark.parametrize("d_loss", [0.0, 0.5, 1.0])
def test_layers_are_pooled_by_rank(d_loss):
    out, labels = output(hidden=(4, 2))
    _, parts = quiet(d_loss=d_loss)(out, labels, disc(4))
    ranked = sorted((layer.heatmap.item() for layer in parts.layers.values()), reverse=True)
    weights = [d_loss**i for i in range(3)]
    expected = sum(w * v for w, v in zip(weights, ranked, strict=True)) / sum(weights)
    assert len(ranked) == 3
    assert parts.heatmap.item() == pytest.approx(expected, rel=1e-6)
    assert parts.background.item() == parts.layers["input"].background.item()


def test_one_layer_needs_no_hidden():
    out, labels = output()
    expected = quiet()(out, labels, disc(4))[0]
    for hidden in (None, {}):
        out.hidden = hidden
        assert torch.equal(quiet()(out, labels, disc(4))[0], expected)
    del out.hidden
    assert torch.equal(quiet()(out, labels, disc(4))[0], expected)


def test_background_share():
    out, labels = output(n=3)
    out.heatmaps[2] = 0
    masks = disc(3)
    expected = []
    for n, k in itertools.product(range(3), range(2)):
        A = out.heatmaps[n, k].abs()
        expected.append((A[:, masks[n] == 0].sum() / A.sum()).item() if n < 2 else 0.0)
    _, parts = quiet()(out, labels, masks)
    assert parts.background_share.item() == pytest.approx(np.mean(expected), rel=1e-5)
    assert quiet()(out, labels, torch.ones(3, 8, 8))[1].background_share.item() == 0


def test_parts_hold_no_graph():
    out, labels = output(grad=True, hidden=(4,))
    total, parts = quiet()(out, labels, disc(4))
    assert isinstance(parts, LossParts)
    assert total.requires_grad
    flat = [parts.classification, parts.background, parts.foreground, parts.heatmap, parts.background_share]
    flat += [value for layer in parts.layers.values() for value in layer] + list(parts.counts.values())
    assert all(value.dim() == 0 and not value.requires_grad for value in flat)


# --- C1, C2, P -----------------------------------------------


def test_c1_c2_for_each_map():
    out, labels = output()
    _, parts = quiet(c1=[1.0, 2.0], c2=torch.tensor([3.0, 4.0]))(out, labels, disc(4))
    expected = []
    for k, (c1, c2) in enumerate([(1.0, 3.0), (2.0, 4.0)]):
        alone = SimpleNamespace(logits=out.logits, heatmaps=out.heatmaps[:, k : k + 1], hidden={})
        expected.append(quiet(c1=c1, c2=c2)(alone, labels, disc(4))[1].foreground)
    torch.testing.assert_close(parts.foreground, torch.stack(expected).mean())


def test_c1_c2_by_layer():
    out, labels = output(hidden=(4,))
    c1 = {"input": 1, "layer0.relu": torch.tensor([0.5, 0.7])}
    c2 = {"input": 5, "layer0.relu": np.float32(2), "a layer that is not supervised": 3}
    _, parts = quiet(c1=c1, c2=c2)(out, labels, disc(4))
    inner = SimpleNamespace(logits=out.logits, heatmaps=out.hidden["layer0.relu"], hidden={})
    _, alone = quiet(c1=[0.5, 0.7], c2=2)(inner, labels, disc(4))
    torch.testing.assert_close(parts.layers["layer0.relu"].foreground, alone.foreground)
    assert parts.foreground.item() == quiet(c1=1, c2=5)(out, labels, disc(4))[1].foreground.item()


def test_values_for_each_map_are_buffers_and_numbers_are_not():
    assert [b.tolist() for b in ISNetLoss(c1=[1, 2], c2=[3]).buffers()] == [[1, 2]]
    assert ISNetLoss(c1=[1, 2]).state_dict() == {}
    assert ISNetLoss(c1=[1, 2]).to("meta").c1.values0.is_meta


def test_repr_names_what_it_computes():
    text = repr(ISNetLoss(P={0: 0.5}, c1=[1, 2], c2={"input": [3, 4], "layer1": 5}))
    for part in ("P={0: 0.5}", "[1.0, 2.0]", "'layer1': 5.0", "foreground='hybrid'", "epoch=0"):
        assert part in text


def test_schedule():
    loss = quiet(P={0: 0.0, 2: 0.5, 5: 1})
    seen = []
    for epoch in range(7):
        loss.set_epoch(epoch)
        seen.append(loss.P_now)
    assert seen == [0, 0, 0.5, 0.5, 0.5, 1, 1]
    assert loss.epoch == 6
    out, labels = output()
    total, parts = loss(out, labels, disc(4))
    assert total.item() == parts.heatmap.item()
    assert ISNetLoss(P=0.3).P_now == 0.3


def test_a_copy_is_a_copy():
    loss = ISNetLoss(P={0: 0.5}, c1=[1, 2], c2={"input": [3, 4]})
    loss.set_epoch(3)
    out, labels = output()
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin.epoch == 3
        assert torch.equal(twin(out, labels, disc(4))[0], loss(out, labels, disc(4))[0])


# --- labels -----------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_class_labels(dtype):
    out, labels = output()
    _, parts = quiet()(out, labels.to(dtype), disc(4))
    torch.testing.assert_close(parts.classification, F.cross_entropy(out.logits, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool])
def test_multi_label(dtype):
    out, _ = output()
    labels = torch.rand(4, 5) > 0.5
    _, parts = quiet()(out, labels.to(dtype), disc(4))
    expected = F.binary_cross_entropy_with_logits(out.logits, labels.float())
    torch.testing.assert_close(parts.classification, expected)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_logit(shape):
    out, _ = output(classes=1)
    labels = torch.tensor([0.0, 1, 1, 0])
    _, parts = quiet()(out, labels.view(shape), disc(4))
    expected = F.binary_cross_entropy_with_logits(out.logits[:, 0], labels)
    torch.testing.assert_close(parts.classification, expected)


def test_own_classification_loss():
    out, labels = output(dtype=torch.bfloat16)
    own = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    _, parts = quiet(classification_loss=own)(out, labels, disc(4))
    assert parts.classification.dtype == torch.float32
    torch.testing.assert_close(parts.classification, own(out.logits.float(), labels))
    soft = torch.full((4, 5), 0.2)
    assert quiet(classification_loss=lambda z, y: (z * y).mean())(out, soft, disc(4))[0].isfinite()


# --- masks -----------------------------------------------


@pytest.mark.parametrize(
    "masks",
    [
        disc(4).bool(), disc(4).to(torch.uint8), disc(4).half(), disc(4).double(), disc(4, channels=1),
        disc(4, channels=3), disc(4, channels=3).to(torch.uint8), disc(4, size=16),
    ],
)  # fmt: skip
def test_mask_forms_agree(masks):
    out, labels = output(hidden=(4,))
    expected = quiet()(out, labels, disc(4))[0]
    torch.testing.assert_close(ISNetLoss()(out, labels, masks)[0], expected, rtol=1e-6, atol=0)


def test_masks_are_resized_to_each_map():
    """13 pixels do not divide any map; a mask smaller than the map grows."""
    for size in (13, 3):
        masks = (torch.rand(4, 1, size, size, generator=torch.Generator().manual_seed(1)) > 0.7).float()
        out, labels = output(hidden=(4, 1))
        _, parts = quiet(c1=2, c2=9)(out, labels, masks)
        for name, R in {"input": out.heatmaps, **out.hidden}.items():
            options = {"d": 0.9, "E": 1.0, "c1": 2.0, "c2": 9.0}
            options |= {"foreground": "hybrid", "normalization": "absRoIMean"}
            background, foreground = heatmap_loss(R, resize_mask(masks, R.shape[3:]), **options)
            torch.testing.assert_close(parts.layers[name].background, background.mean())
            torch.testing.assert_close(parts.layers[name].foreground, foreground.mean())


def test_inner_layers_see_the_union_of_a_mask_with_channels():
    out, labels = output(hidden=(8,))
    masks = torch.zeros(4, 3, 8, 8)
    masks[:, 0, 2:4], masks[:, 2, 5:6] = 1, 1
    _, parts = quiet()(out, labels, masks)
    _, union = quiet()(out, labels, masks.amax(1))
    assert parts.layers["layer0.relu"].heatmap.item() == union.layers["layer0.relu"].heatmap.item()
    assert parts.background.item() != union.background.item()


def test_soft_masks_weigh():
    out, labels = output(n=1)
    soft = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(3))
    _, parts = quiet()(out, labels, soft)
    A = out.heatmaps.abs()
    expected = ((A * (1 - soft)).sum((2, 3, 4)) / A.sum((2, 3, 4))).mean()
    torch.testing.assert_close(parts.background_share, expected)


@pytest.mark.parametrize("way", ["nan", "has_mask", "both"])
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_samples_without_a_mask_are_skipped(way, channels):
    out, labels = output(hidden=(4, 2), grad=True)
    masks, has_mask = disc(4, channels=channels), None
    if way != "has_mask":
        masks[1] = torch.nan
    else:
        masks[1] = 0  # whatever a collate function puts there
    if way != "nan":
        has_mask = torch.tensor([True, False, True, True])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        total, parts = ISNetLoss(c2=2, check="always")(out, labels, masks, has_mask=has_mask)
    total.backward()
    keep = [0, 2, 3]
    hidden = {layer: R[keep] for layer, R in out.hidden.items()}
    rest = SimpleNamespace(logits=out.logits[keep], heatmaps=out.heatmaps[keep], hidden=hidden)
    _, expected = quiet(c2=2)(rest, labels[keep], disc(3))
    for name in ("background", "foreground", "heatmap", "background_share"):
        torch.testing.assert_close(getattr(parts, name), getattr(expected, name))
    torch.testing.assert_close(parts.classification, F.cross_entropy(out.logits, labels).detach())
    assert {key: int(value) for key, value in parts.counts.items()} == {
        "with_mask": 3, "without_mask": 1, "empty": 0, "full": 0, "inverted": 0,
    }  # fmt: skip
    for R in (out.heatmaps, *out.hidden.values()):
        assert R.grad[1].abs().max() == 0
        assert R.grad[keep].abs().sum() > 0
    assert out.logits.grad[1].abs().max() > 0


def test_has_mask_covers_what_is_not_a_mask_at_all():
    out, labels = output(grad=True)
    masks = disc(4)
    masks[3, 0, 0], masks[3, 1, 1], masks[3, 2, 2] = torch.nan, 255, -1
    out.heatmaps.data[3] *= 1e32
    total, _ = ISNetLoss(check="always")(out, labels, masks, has_mask=torch.tensor([True, True, True, False]))
    total.backward()
    assert total.isfinite()
    assert out.heatmaps.grad.isfinite().all()


@pytest.mark.parametrize("masks", [None, torch.full((4, 8, 8), torch.nan)])
@pytest.mark.parametrize("P", [0.7, 1.0])
def test_no_masks_at_all(masks, P):
    out, labels = output(hidden=(4,), grad=True)
    total, parts = ISNetLoss(P=P, check="always")(out, labels, masks)
    total.backward()
    torch.testing.assert_close(total.detach(), (1 - P) * F.cross_entropy(out.logits, labels).detach())
    assert parts.heatmap.item() == parts.background.item() == parts.background_share.item() == 0
    assert parts.counts["without_mask"].item() == 4
    assert parts.counts["with_mask"].item() == 0
    assert out.heatmaps.grad is None or out.heatmaps.grad.abs().max() == 0


def test_without_masks_no_heatmaps_are_needed():
    out, labels = output()
    out.heatmaps = None
    total, parts = ISNetLoss()(out, labels)
    torch.testing.assert_close(total, 0.3 * parts.classification)


def test_counts_are_made_in_every_call():
    out, _ = output(n=6)
    masks = disc(6)
    masks[0], masks[1], masks[2], masks[5] = 0, 1, 1 - masks[2], torch.nan
    _, parts = quiet()(out, torch.arange(6) % 5, masks)
    expected = {"with_mask": 5, "without_mask": 1, "empty": 1, "full": 1, "inverted": 1}
    assert {key: int(value) for key, value in parts.counts.items()} == expected
    assert all(value.dtype == torch.int64 for value in parts.counts.values())


@pytest.mark.parametrize(("size", "rank"), [(6, 1), (5, 3), (1, 2)])
def test_other_numbers_of_spatial_axes(size, rank):
    R = torch.randn(2, 1, 3, *[size] * rank, requires_grad=True)
    out = SimpleNamespace(logits=torch.zeros(2, 4), heatmaps=R, hidden={})
    for shape in ((2,), (2, 1), (2, 3)):
        masks = torch.rand(*shape, *[size + 1] * rank) > 0.5
        total, _ = quiet()(out, torch.zeros(2).long(), masks)
        total.backward()
    assert R.grad.isfinite().all()


def test_empty_and_full_masks_train_without_nan():
    out, labels = output(grad=True, hidden=(4,))
    masks = disc(4)
    masks[0], masks[1] = 0, 1
    out.heatmaps.data[2] = 0
    total, _ = quiet()(out, labels, masks)
    total.backward()
    assert total.isfinite()
    assert all(R.grad.isfinite().all() for R in (out.heatmaps, *out.hidden.values()))


# --- dtypes, autocast, fake tensors, compile -----------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs(dtype):
    out, labels = output(dtype=dtype, hidden=(4,), grad=True)
    total, parts = quiet()(out, labels, disc(4))
    total.backward()
    assert {total.dtype, parts.background.dtype, parts.background_share.dtype} == {torch.float32}
    assert out.heatmaps.grad.dtype == dtype
    wide = SimpleNamespace(
        logits=out.logits.float(), heatmaps=out.heatmaps.float(),
        hidden={k: v.float() for k, v in out.hidden.items()},
    )  # fmt: skip
    expected, wide_parts = quiet()(wide, labels, disc(4))
    assert torch.equal(total, expected)
    assert torch.equal(parts.background_share, wide_parts.background_share)


def test_autocast_changes_nothing():
    out, labels = output(hidden=(4,))
    matmul = lambda z, y: (z @ torch.ones(5, 1)).mean()  # noqa: E731
    for options in ({}, {"classification_loss": matmul}):
        expected = quiet(**options)(out, labels, disc(4))[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = quiet(**options)(out, labels, disc(4))[0]
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)


@pytest.mark.parametrize("check", ["first", "always"])
def test_fake_tensors(check):
    """No value is read: a host sync would raise here, even with checks on."""
    with FakeTensorMode():
        out, labels = output(hidden=(4, 1))
        for masks in (disc(4), disc(4, size=20, channels=3).bool(), None):
            loss = ISNetLoss(check=check, c1={"input": 1, "layer0.relu": 1, "layer1.relu": 2})
            tensors = [out.logits, out.heatmaps, *out.hidden.values()]
            for t in tensors:
                t.requires_grad_()
            has_mask = None if masks is None else torch.empty(4, dtype=torch.bool)
            total, _ = loss(out, labels, masks, has_mask=has_mask)
            total.backward()
            assert not loss.checked
            assert out.logits.grad.shape == out.logits.shape
        assert out.heatmaps.grad.shape == out.heatmaps.shape


@pytest.mark.parametrize("check", ["never", "first"])
def test_compiles_without_a_graph_break(check):
    torch._dynamo.reset()
    loss = ISNetLoss(P={0: 0.2, 1: 0.7}, c1=[1.0, 2.0], c2={"input": 5, "layer0.relu": 7}, check=check)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    masks = disc(4, channels=1)
    masks[1] = torch.nan
    for epoch in range(2):
        loss.set_epoch(epoch)
        results = []
        for run in (compiled, loss):
            out, labels = output(hidden=(4,), grad=True)
            total, parts = run(out, labels, masks)
            total.backward()
            assert loss.checked == (check == "first" and (run is loss or epoch > 0))
            results.append((total.detach(), parts.background_share, parts.heatmap, out.heatmaps.grad))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


# --- checks -----------------------------------------------


def test_checks_run_when_asked():
    bad, labels = output()
    bad.heatmaps[1, 0, 0, 0, 0] = torch.nan
    good, _ = output()
    ISNetLoss(check="never")(bad, labels, disc(4))
    first = ISNetLoss(check="first")
    first(good, labels)  # no masks: nothing is checked yet
    assert not first.checked
    first(good, labels, disc(4))
    assert first.checked
    first(bad, labels, disc(4))
    always = ISNetLoss(check="always")
    always(good, labels, disc(4))
    with pytest.raises(ValueError, match="heatmaps of 1 of 4 samples are not finite at 'input'"):
        always(bad, labels, disc(4))


def test_a_failed_check_is_repeated():
    loss = ISNetLoss()
    out, labels = output()
    for _ in range(2):
        with pytest.raises(ValueError, match="masks must be within"):
            loss(out, labels, disc(4) * 255)


def test_inner_maps_are_checked_too():
    out, labels = output(hidden=(4,))
    out.hidden["layer0.relu"][:2] = torch.inf
    with pytest.raises(ValueError, match=r"2 of 4 samples are not finite at 'layer0\.relu'"):
        ISNetLoss()(out, labels, disc(4))


@pytest.mark.parametrize(
    ("masks", "text"),
    [
        (disc(4).to(torch.uint8) * 255, r"within \[0, 1\], 1 = foreground, got values from 0 to 255"),
        (disc(4) * 255, "from 0 to 255; use masks > threshold"),
        (-disc(4).long(), "from -1 to 0"),
        (disc(4) * 1.5, "from 0 to 1.5"),
        (disc(4) * torch.inf, r"within \[0, 1\]|NaN in some pixels"),
        (disc(4).masked_fill(disc(4) > 0, torch.nan), "4 samples that are NaN in some pixels only"),
    ],
)
def test_mask_values(masks, text):
    out, labels = output()
    with pytest.raises(ValueError, match=text):
        ISNetLoss()(out, labels, masks)
    with pytest.raises(ValueError, match=text):
        check_masks(masks)


def test_label_values():
    out, _ = output()
    for labels, wrong in (([0, 5, 5, 9], r"\[5, 9\]"), ([0, -1, 0, 0], r"\[-1\]")):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 5\) for 5 logits, got " + wrong):
            ISNetLoss()(out, torch.tensor(labels), disc(4))
    ISNetLoss()(out, torch.tensor([0, 1, -100, 2]), disc(4))


def test_one_warning_with_counts_and_remedies():
    out, labels = output()
    masks = disc(4)
    masks[0], masks[1], masks[2] = 0, 1, 1 - masks[2]
    loss = ISNetLoss()
    with pytest.warns(FisnetWarning) as caught:
        loss(out, labels, masks)
    assert len(caught) == 1
    text = str(caught[0].message)
    for part in ("1 of 4 masks are empty", "NaN, or has_mask=False", "1 of 4 masks have no background"):
        assert part in text
    assert "1 of 4 masks look inverted" in text
    assert "pass 1 - mask" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(out, labels, masks)  # "first" has had its say


def test_good_masks_warn_of_nothing():
    out, labels = output()
    touching = disc(4)
    touching[:, :, :2] = 1  # a foreground may well reach a border
    touching[:, -2:] = 1
    large = torch.zeros(4, 8, 8)
    large[:, 1:] = 1  # most of the border, but all of the interior
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for masks in (disc(4), touching, large, disc(4).bool(), None):
            ISNetLoss()(out, labels, masks)


# --- check_masks -----------------------------------------------


def test_check_masks_counts_a_data_set():
    square = disc(1)[0]
    items = [
        disc(2),  # a batch
        disc(3, size=12, channels=3).bool(),  # another size, with channels
        square.numpy(),  # one mask, as an array
        None,
        torch.zeros(2, 8, 8),
        torch.ones(1, 8, 8, dtype=torch.uint8),
        1 - square,
        torch.full((2, 1, 8, 8), torch.nan),
    ]
    with pytest.warns(FisnetWarning, match="2 of 10 masks are empty") as caught:
        report = check_masks(iter(items))
    assert len(caught) == 1
    assert report == MaskReport(n=13, without=3, empty=2, full=1, inverted=1)


@pytest.mark.parametrize("masks", [disc(5), disc(5, channels=3).numpy(), [], disc(5, channels=3).bool()])
def test_check_masks_is_quiet_when_all_is_well(masks):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = check_masks(masks)
    assert report == MaskReport(len(masks), 0, 0, 0, 0)
    assert report.problems() == ""


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_inverted_in_any_number_of_axes(rank):
    mask = torch.zeros(1, *[7] * rank)
    mask[(0, *[slice(2, 5)] * rank)] = 1
    assert check_masks(mask, spatial_dims=rank).inverted == 0
    with pytest.warns(FisnetWarning, match="1 of 1 masks look inverted"):
        assert check_masks(1 - mask, spatial_dims=rank).inverted == 1


@pytest.mark.parametrize("size", [1, 2])
def test_a_mask_without_an_interior_is_never_suspect(size):
    mask = torch.ones(1, size, size)
    mask[0, 0, 0] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert check_masks(mask).inverted == 0


@pytest.mark.parametrize(
    ("masks", "options", "error", "text"),
    [
        (["a"], {}, TypeError, "masks must hold tensors or arrays, got str"),
        ([torch.ones(2, 4, 4) * 1j], {}, TypeError, "must be bool, integer or float, got torch.complex64"),
        ([torch.ones(4)], {}, ValueError, r"with 2 spatial axes.*got \[4\]; see spatial_dims"),
        (torch.ones(2, 3, 4, 4, 4), {}, ValueError, r"got \[2, 3, 4, 4, 4\]"),
        (torch.ones(2, 0, 4), {}, ValueError, "none of them empty"),
        (disc(2), {"spatial_dims": 4}, ValueError, "spatial_dims must be 1, 2 or 3, got 4"),
    ],
)
def test_check_masks_errors(masks, options, error, text):
    with pytest.raises(error, match=text):
        check_masks(masks, **options)


# --- messages -----------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"P": 1.2}, ValueError, r"P must be in \[0, 1\], got 1.2"),
        ({"P": "0.7"}, TypeError, "P must be a number, got '0.7'"),
        ({"P": {1: 0.5, 3: 0.7}}, ValueError, r"what holds from epoch 0 on, got the epochs \[1, 3\]"),
        ({"P": {}}, ValueError, "from epoch 0 on"),
        ({"P": {0: 2}}, ValueError, r"P\[0\] must be in \[0, 1\], got 2"),
        ({"P": {0.5: 0.1}}, TypeError, "an epoch of P must be an integer, got float"),
        ({"d": -0.1}, ValueError, r"d must be in \[0, 1\]"),
        ({"d": math.nan}, ValueError, "d must be in"),
        ({"d": None}, TypeError, "d must be a number, got NoneType"),
        ({"E": 0}, ValueError, "E must be finite and > 0, got 0"),
        ({"w1": -1}, ValueError, "w1 must be finite and >= 0, got -1"),
        ({"w2": math.inf}, ValueError, "w2 must be finite"),
        ({"d_loss": 2}, ValueError, "d_loss must be in"),
        ({"c1": 0}, ValueError, "c1 must be finite and > 0, got 0"),
        ({"c1": "1"}, TypeError, "c1 must be a number, got '1'"),
        ({"c1": object()}, TypeError, "c1 must be a number, a tensor or.*got object"),
        ({"c1": [1.0, -2.0]}, ValueError, "c1 must be finite and > 0, got -2.0"),
        ({"c1": []}, ValueError, "c1 must have a value for each map, got none"),
        ({"c2": torch.tensor([[30.0]])}, TypeError, "c2 must be a number, got list"),
        ({"c2": {"layer1": 0}}, ValueError, r"c2\['layer1'\] must be finite and > 0"),
        ({"c1": 30}, ValueError, r"c1 must not exceed c2, got \[30.0\] and \[25.0\]"),
        ({"c1": [1, 30]}, ValueError, r"c1 must not exceed c2, got \[1.0, 30.0\] and"),
        ({"c1": {"input": 9}, "c2": {"input": 8}}, ValueError, "c1 must not exceed c2 for layer 'input'"),
        ({"c1": {"a": 1}, "c2": 0.5}, ValueError, "c1 must not exceed c2 for layer 'a'"),
        ({"c1": 9, "c2": {"a": 8}}, ValueError, "c1 must not exceed c2 for layer 'a'"),
        ({"c1": [1, 2], "c2": [3, 4, 5]}, ValueError, "c1 has 2 values, c2 has 3; give one for each map"),
        ({"foreground": "L3"}, ValueError, "foreground must be one of 'hybrid', 'L2', 'L1', got 'L3'"),
        ({"normalization": "mean"}, ValueError, "normalization must be one of"),
        ({"check": True}, ValueError, "check must be one of 'first', 'always', 'never', got True"),
        ({"backend": "tpu"}, ValueError, "backend must be one of"),
        ({"classification_loss": "ce"}, TypeError, r"must be a function of \(logits, labels\), got str"),
    ],
)
def test_constructor_errors(options, error, text):
    with pytest.raises(error, match=text):
        ISNetLoss(**options)


def test_set_epoch_errors():
    with pytest.raises(TypeError, match="epoch must be an integer, got float"):
        ISNetLoss().set_epoch(1.0)
    with pytest.raises(ValueError, match="epoch must be >= 0, got -1"):
        ISNetLoss().set_epoch(-1)


def changed(**changes):
    out, labels = output(hidden=(4,))
    vars(out).update({key: value for key, value in changes.items() if key in vars(out)})
    arguments = {"out": out, "labels": labels, "masks": disc(4), "has_mask": None}
    arguments |= {key: value for key, value in changes.items() if key in arguments}
    return arguments


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"out": torch.ones(4, 5)}, TypeError, r"what net\(x, relevance=True\) returns, got a tensor"),
        ({"logits": torch.ones(4)}, ValueError, r"must be float \[N, C\], got torch.float32 \[4\]"),
        ({"logits": torch.ones(4, 5).long()}, ValueError, "out.logits must be float.*torch.int64"),
        ({"heatmaps": None}, ValueError, r"out.heatmaps is None, but masks are given; call net\(x, rel"),
        ({"heatmaps": torch.ones(4, 1, 3, 8, 8).long()}, TypeError, "heatmaps must be a float tensor"),
        ({"heatmaps": torch.ones(4, 3, 8)}, ValueError, r"heatmaps must be \[N, K, channels, \*spatial\]"),
        ({"heatmaps": torch.ones(3, 1, 3, 8, 8), "hidden": {}}, ValueError, "has 3 samples, out.logits 4"),
        ({"heatmaps": torch.ones(4, 1, 3, 8, 8, device="meta")}, ValueError, "out.heatmaps is on meta"),
        ({"hidden": {"fc": torch.ones(4, 2, 9)}}, ValueError, r"out.hidden\['fc'\].*supervise layers"),
        ({"hidden": {"a": None}}, TypeError, r"out.hidden\['a'\] must be a float tensor, got NoneType"),
        ({"masks": disc(4).numpy()}, TypeError, "masks must be a bool, integer or float tensor, got ndarray"),
        ({"masks": disc(4) * 1j}, TypeError, "got a tensor of torch.complex64"),
        ({"masks": disc(3)}, ValueError, "masks has 3 samples, the heatmaps 4; use NaN where"),
        ({"masks": disc(4, channels=2)}, ValueError, r"\[N, 1, H, W\] or \[N, 3, H, W\].*\[4, 2, 8, 8\]"),
        ({"masks": torch.ones(4)}, ValueError, r"masks must be \[N, H, W\].*got \[4\]"),
        ({"masks": torch.ones(4, 0, 8)}, ValueError, "masks must be"),
        ({"masks": disc(4).to("meta")}, ValueError, r"masks is on meta.*on cpu; use masks.to\('cpu'\)"),
        ({"masks": None, "has_mask": torch.ones(4).bool()}, ValueError, "has_mask is given without masks"),
        ({"has_mask": [True] * 4}, TypeError, "has_mask must be a bool tensor, got list"),
        ({"has_mask": torch.ones(4)}, TypeError, "has_mask must be.*got a tensor of torch.float32"),
        ({"has_mask": torch.ones(3).bool()}, ValueError, r"has_mask must be \[N\] with N = 4, got \[3\]"),
        ({"has_mask": torch.ones(4, device="meta").bool()}, ValueError, "has_mask is on meta"),
        ({"labels": [0] * 4}, TypeError, "labels must be an integer, float or bool tensor, got list"),
        ({"labels": torch.zeros(4, 1).long()}, ValueError, r"must be \[4\], got \[4, 1\]; use labels"),
        ({"labels": torch.zeros(4)}, ValueError, r"multi-label and must be \[4, 5\].*use labels.long\(\)"),
        ({"labels": torch.zeros(4, device="meta").long()}, ValueError, "labels is on meta"),
        ({"logits": torch.ones(4, 1)}, ValueError, r"there is one logit; use labels.float\(\)"),
    ],
)
def test_call_errors(changes, error, text):
    with pytest.raises(error, match=text):
        quiet()(**changed(**changes))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"c1": {"input": 1}}, r"c1 has no value for layer 'layer0.relu', only for \['input'\]; add one"),
        ({"c2": {"layer0.relu": 9}}, "c2 has no value for layer 'input'"),
        ({"c1": [1, 2, 3]}, "c1 has 3 values for layer 'input', which has 2 maps a sample; give one value"),
        ({"classification_loss": lambda z, y: z}, r"must return a 0-d tensor, got \[4, 5\]; use reduction"),
        ({"classification_loss": lambda z, y: 0.0}, "must return a 0-d tensor, got float"),
    ],
)
def test_errors_of_options_that_do_not_fit_the_output(options, text):
    with pytest.raises(ValueError, match=text):
        quiet(**options)(**changed())


def test_axes_are_named_as_users_name_them():
    for rank, names in ((1, r"\[N, W\]"), (3, r"\[N, D, H, W\]")):
        heatmaps = torch.ones(4, 1, 3, *[2] * rank)
        with pytest.raises(ValueError, match=f"masks must be {names}"):
            quiet()(**changed(heatmaps=heatmaps, hidden={}, masks=torch.ones(4)))
