"""The whole method against numbers from the authors' code: `net(x, relevance=True)`, the loss, `backward`."""

import golden_nets
import pytest
import torch
from helpers import close

import fisnet_cuda as fc

BASIC = ("selective", "stochastic", "original")
MORE = ("label_logit", "selective_noZb", "selective_e0_noZb")
FLEX = [(name, variant) for name in golden_nets.NAMES for variant in BASIC]
FLEX += [(name, variant) for name in ("seq", "seqbn") for variant in MORE]


def make(name, variant, **options):
    model, data = golden_nets.load(name)
    meta = data["meta"]
    eps = 0.0 if "_e0" in variant else meta["e"]
    first = "epsilon" if "_noZb" in variant else "zb"
    kind = variant.split("_")[0] if variant.split("_")[0] in BASIC else "selective"
    options = {"eps": eps, "eta_eps": meta["selectiveEps"], "first_layer": first} | options
    return fc.ISNet(model, kind, input_low=meta["l"], input_high=meta["h"], **options), model, data


def target_of(variant, data):
    """Stochastic's drawn classes and the labels are given; the rest the variant finds itself."""
    if variant == "stochastic":
        return data["flex/stochastic/selected"].long()
    return data["y"].long() if variant == "label_logit" else None


def golden_loss(data, key, layers=()):
    """(theirs are called A, B, cut and cut2)"""
    meta = data["meta"]
    cuts = [data[f"{key}/{cut}"] for cut in ("cut", "cut2")]
    if layers:
        inner = [{layer: data[f"{key}/{cut}/{layer}"] for layer in layers} for cut in ("cut", "cut2")]
        cuts = [{"input": cut} | rest for cut, rest in zip(cuts, inner)]
    return fc.ISNetLoss(
        P=meta["P"], d=meta["d"], E=meta["E"], w1=meta["A"], w2=meta["B"], c1=cuts[0], c2=cuts[1],
        foreground=meta["foreground"], normalization=meta["norm"], d_loss=meta["dLoss"],
    )  # fmt: skip


def check_training_step(model, data, key, out, layers=()):
    """Losses, and after one plain backward every gradient that the file has and the norms of all."""
    total, parts = golden_loss(data, key, layers)(out, data["y"].long(), data["mask"])
    close(total, data[f"{key}/total"], what="total")
    close(parts.classification, data[f"{key}/cls"], what="classification")
    close(parts.heatmap, data[f"{key}/hloss"], what="heatmap loss")
    total.backward()
    found = dict(model.named_parameters())
    names = data["meta"]["param_order"]
    assert list(found) == names
    close(torch.stack([found[n].grad.norm() for n in names]), data[f"{key}/gradnorm"], what="norms")
    stored = [n for n in names if f"{key}/grad/{n}" in data]
    assert len(stored) >= 4
    for n in stored:
        close(found[n].grad, data[f"{key}/grad/{n}"], what=n)
    return parts


@pytest.mark.parametrize(("name", "variant"), FLEX)
def test_flex(name, variant):
    net, model, data = make(name, variant)
    key = f"flex/{variant}"
    out = net(data["x"], relevance=True, target=target_of(variant, data))
    close(out.logits, data["logits"], what="logits")
    close(out.heatmaps, data[f"{key}/heatmap"], what="heatmaps")
    if f"{key}/selected" in data:
        assert torch.equal(out.explained[:, 0], data[f"{key}/selected"].long().flatten())
    if f"{key}/eta" in data:
        eta = fc.isnet.variants.eta(out.logits, out.explained, data["meta"]["selectiveEps"])
        close(eta.flatten(), data[f"{key}/eta"].flatten(), what="eta")
    mask = data["mask"].to(out.heatmaps).unsqueeze(1)
    close((out.heatmaps.abs() * mask).sum((2, 3, 4)), data[f"{key}/F"].view(len(mask), -1), what="F")
    parts = check_training_step(model, data, key, out)
    close(parts.background, data[f"{key}/bg"].mean(), what="background")
    close(parts.foreground, data[f"{key}/fg"].mean(), what="foreground")


def test_every_flex_variant_of_the_files_is_covered():
    for name in golden_nets.NAMES:
        files = {k.split("/")[1] for k in golden_nets.arrays(f"{name}_eval") if k.startswith("flex/")}
        assert files == {variant for n, variant in FLEX if n == name}


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18s", ("layer1", "layer2", "layer3", "layer4")),
        ("densenets", ("features.transition1.relu", "features.fReLU")),
    ],
)
def test_deep_supervision(name, layers):
    net, model, data = make(name, "selective", supervise=layers)
    key = "flex_lds/selective"
    assert tuple(str(v) for v in data[f"{key}/layers"]) == ("input", *layers)
    out = net(data["x"], relevance=True)
    assert tuple(out.hidden) == layers
    for layer in layers:
        close(out.hidden[layer], data[f"{key}/hidden/{layer}"], what=layer)
    parts = check_training_step(model, data, key, out, layers)
    close(torch.stack([parts.layers[v].heatmap for v in ("input", *layers)]), data[f"{key}/layer_losses"])


def make_dual(name):
    model, data = golden_nets.load(name)
    return fc.ISNet(model, "dual", eps=data["meta"]["e"]), data


@pytest.mark.parametrize("name", ["seq", "seqbn", "vgg"])
def test_dual(name):
    """Map 0 is LRP-Block's z+ map; map 1, by linearity, the sum of LRP-Flex's Original."""
    net, data = make_dual(name)
    out = net(data["x"], relevance=True)
    close(out.heatmaps[:, 0], data["block/dual/heatmap"][:, 0], what="z+")
    assert (out.heatmaps[:, 0] >= 0).all()
    close(out.heatmaps[:, 1], data["flex/original/heatmap"].sum(1), what="epsilon")
    assert (out.explained == -1).all()


@pytest.mark.parametrize("name", ["resnet18s", "densenets"])
def test_dual_epsilon_map_is_the_sum_of_originals(name):
    net, data = make_dual(name)
    close(net(data["x"], relevance=True).heatmaps[:, 1], data["flex/original/heatmap"].sum(1))


@pytest.mark.parametrize("name", golden_nets.NAMES)
def test_float32(name):
    """As far from the goldens as any float32 implementation: bounds from goldens/README.md."""
    net, model, data = make(name, "selective")
    model.float()
    out = net(data["x"].float(), relevance=True)
    close(out.logits.double(), data["logits"], 4e-6)
    close(out.heatmaps.double(), data["flex/selective/heatmap"], 1e-4)
    total, _ = golden_loss(data, "flex/selective")(out, data["y"].long(), data["mask"])
    close(total.double(), data["flex/selective/total"], 1e-5)
    total.backward()
    for n, p in model.named_parameters():
        if f"flex/selective/grad/{n}" in data:
            close(p.grad.double(), data[f"flex/selective/grad/{n}"], 8e-4, n)


@pytest.mark.parametrize("name", golden_nets.NAMES)
@pytest.mark.parametrize("variant", ["selective", "original"])
def test_channels_last(name, variant):
    net, model, data = make(name, variant)
    model.to(memory_format=torch.channels_last)
    out = net(data["x"].contiguous(memory_format=torch.channels_last), relevance=True)
    close(out.heatmaps, data[f"flex/{variant}/heatmap"])
    check_training_step(model, data, f"flex/{variant}", out)


@pytest.mark.parametrize("name", golden_nets.NAMES)
def test_fc_relevance_gives_the_same_maps(name):
    model, data = golden_nets.load(name)
    rules = fc.rules.RuleMap(first=fc.rules.ZB())
    got = fc.relevance(model, data["x"], data["flex/stochastic/selected"].long(), rules)
    close(got, data["flex/stochastic/heatmap"])
