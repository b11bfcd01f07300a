"""`ISNet` as a module: the model inside stays the user's own, checks and messages, dtypes, autocast, memory."""

import copy
import gc
import io
import os
import pathlib
import pickle
import warnings

import golden_nets
import pytest
import torch
from helpers import close, rand, randn
from torch import nn

import fisnet_cuda as fc

VARIANTS = ("original", "selective", "stochastic", "dual", "contrast")


def small(bn=True, dropout=0.0):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), *([nn.BatchNorm2d(6)] if bn else []), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Dropout(dropout), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(*layers)


def batch(n=4, dtype=torch.float32):
    masks = torch.zeros(n, 1, 8, 8)
    masks[:, :, 2:6, 3:7] = 1
    return rand(n, 3, 8, 8).to(dtype), torch.arange(n) % 4, masks


def step(net, loss, x, y, masks):
    total, _ = loss(net(x, relevance=True), y, masks)
    net.zero_grad()
    total.backward()
    return total.detach()


# ---- the model inside --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", golden_nets.NAMES)
def test_logits_are_the_models_bit_for_bit(name, mode):
    torch.manual_seed(0)
    model = golden_nets.build(name).train(mode == "train")
    x = torch.rand(3, 3, 32, 32) if name in ("resnet18s", "densenets") else torch.rand(3, 3, 16, 16)
    twin = copy.deepcopy(model)
    want = twin(x)
    net = fc.ISNet(model, "selective")
    out = net(x, relevance=True)
    assert torch.equal(out.logits, want)
    for (key, got), value in zip(model.state_dict().items(), twin.state_dict().values()):
        assert torch.equal(got, value), f"{key}: running statistics move once, as in a plain forward"
    assert torch.equal(net(x), twin(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_output(variant):
    net = fc.ISNet(small(), variant, supervise=("3", "5"))
    out = net(batch()[0], relevance=True)
    k = {"original": 4, "dual": 2}.get(variant, 1)
    assert out.logits.shape == (4, 4)
    assert out.heatmaps.shape == (4, k, 3, 8, 8)
    assert out.hidden["3"].shape == (4, k, 6, 4, 4)
    assert out.hidden["5"].shape == (4, k, 8, 2, 2)
    assert out.explained.shape == (4, k)
    assert out.explained.dtype == torch.int64
    logits, heatmaps, hidden, explained = out
    assert (logits, heatmaps, hidden, explained) == (out.logits, out.heatmaps, out.hidden, out.explained)
    assert isinstance(net(batch()[0]), torch.Tensor)


def everything_on(model):
    """Names of all attributes, hooks and flags of a module tree and its tensors."""
    found = {}
    for name, m in model.named_modules():
        found[name] = sorted(vars(m)), {k: len(v) for k, v in vars(m).items() if "hooks" in k and v is not None}, m.training
        found[f"{name} class"] = type(m), m.forward.__func__
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        hooks = t._backward_hooks, getattr(t, "_post_accumulate_grad_hooks", None)
        found[f"{name} tensor"] = sorted(vars(t)), hooks, t.requires_grad, t.data_ptr()
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_left_on_the_model(variant):
    model = small()
    before = everything_on(model)
    net = fc.ISNet(model, variant, supervise=("3",), max_map_bytes=1)
    step(net, fc.ISNetLoss(), *batch())
    fc.relevance(model, batch()[0])
    model.zero_grad()
    assert everything_on(model) == before
    assert net.model is model
    assert [id(p) for p in net.parameters()] == [id(p) for p in model.parameters()]


def test_state_dict_is_the_models():
    model = small()
    net = fc.ISNet(model)
    assert list(net.state_dict()) == list(model.state_dict())
    other = {k: torch.ones_like(v) for k, v in model.state_dict().items()}
    net.load_state_dict(other)
    assert (model[0].weight == 1).all()
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict({"0.weight": model[0].weight})
    small().load_state_dict(net.state_dict())


def test_state_dict_inside_another_module():
    outer = nn.ModuleDict({"net": fc.ISNet(small()), "head": nn.Linear(2, 2)})
    saved = outer.state_dict()
    assert "net.0.weight" in saved
    assert not any(k.startswith("net.model.") for k in saved)
    twin = nn.ModuleDict({"net": fc.ISNet(small()), "head": nn.Linear(2, 2)})
    with torch.no_grad():
        twin["net"].model[0].weight.zero_()
    twin.load_state_dict(saved)
    assert torch.equal(twin["net"].model[0].weight, outer["net"].model[0].weight)
    assert list(saved) == list(outer.state_dict()), "loading leaves the caller's dict alone"


@pytest.mark.parametrize("variant", ["selective", "dual"])
def test_copies_are_independent(variant):
    """deepcopy and pickle: a copy explains its own parameters."""
    net, x = fc.ISNet(small(), variant).eval(), batch()[0]
    want = net(x, relevance=True).heatmaps
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x, relevance=True).heatmaps, want)
        with torch.no_grad():
            twin.model[0].weight.mul_(2)
        assert not torch.equal(twin(x, relevance=True).heatmaps, want)
        assert torch.equal(net(x, relevance=True).heatmaps, want)


def test_two_nets_in_one_process():
    """Several ISNets of one model, and of another one, in any order: each gives what it gives alone."""
    model, other, x = small().eval(), small(bn=False).eval(), batch()[0]
    alone = [fc.ISNet(m, v)(x, relevance=True).heatmaps for m, v in ((model, "selective"), (model, "dual"), (other, "original"))]
    nets = [fc.ISNet(model, "selective"), fc.ISNet(model, "dual"), fc.ISNet(other, "original")]
    outs = [net(x, relevance=True) for net in nets]
    again = [net(x, relevance=True) for net in reversed(nets)][::-1]
    for got, more, want in zip(outs, again, alone):
        assert torch.equal(got.heatmaps, want)
        assert torch.equal(more.heatmaps, want)
    sum((out.heatmaps**2).sum() for out in outs).backward()


def test_parameters_are_read_when_it_runs():
    """Replaced parameters, moved modules and other dtypes are seen, as EMA and checkpoints need it."""
    net, x = fc.ISNet(small().eval()), batch()[0]
    before = net(x, relevance=True).heatmaps
    net.model[0].weight = nn.Parameter(net.model[0].weight * 2)
    after = net(x, relevance=True).heatmaps
    assert not torch.equal(before, after)
    net.double()
    assert net(x.double(), relevance=True).heatmaps.dtype == torch.float64


def test_modes():
    net = fc.ISNet(small())
    assert net.train().model.training
    assert not net.eval().model[1].training
    net.train()
    net.model[1].eval()  # a frozen BatchNorm in a training network
    mean = net.model[1].running_mean.clone()
    net(batch()[0], relevance=True)
    assert torch.equal(net.model[1].running_mean, mean)
    assert not net.model[1].training


def test_dropout_draws_as_in_a_plain_forward():
    net = fc.ISNet(small(dropout=0.5).train(), "selective")
    x = batch()[0]
    torch.manual_seed(1)
    out = net(x, relevance=True)
    twin = copy.deepcopy(net.model)
    torch.manual_seed(1)
    assert torch.equal(out.logits, twin(x))
    torch.manual_seed(2)
    assert not torch.equal(net(x, relevance=True).heatmaps, out.heatmaps)


@pytest.mark.parametrize("variant", VARIANTS)
def test_frozen_layers(variant):
    """Frozen parameters get no gradient; those of the others stay the same."""
    x, y, masks = batch()
    model, loss = small().double().eval(), fc.ISNetLoss()
    x = x.double()
    net = fc.ISNet(model, variant, generator=torch.Generator().manual_seed(0))
    step(net, loss, x, y, masks)
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    for frozen in (("0.weight", "0.bias", "1.weight", "1.bias"), ("4.weight",), ("9.weight", "9.bias")):
        net = fc.ISNet(model, variant, generator=torch.Generator().manual_seed(0))
        for n, p in model.named_parameters():
            p.requires_grad_(n not in frozen)
            p.grad = None
        step(net, loss, x, y, masks)
        for n, p in model.named_parameters():
            if n in frozen:
                assert p.grad is None
            else:
                close(p.grad, want[n], what=n)


def test_nothing_to_train():
    model = small().requires_grad_(False)
    out = fc.ISNet(model)(batch()[0], relevance=True)
    assert not out.heatmaps.requires_grad
    x = batch()[0].requires_grad_()
    fc.ISNet(model)(x, relevance=True).heatmaps.sum().backward()
    assert x.grad.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_gradients(variant):
    net, x = fc.ISNet(small().eval(), variant, generator=torch.Generator()), batch()[0]
    outs = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        net.generator.manual_seed(0)
        with mode():
            outs.append(net(x, relevance=True).heatmaps)
    assert outs[0].requires_grad
    assert not outs[1].requires_grad
    assert all(torch.equal(o, outs[1]) for o in outs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", [0, 1])
def test_empty_and_single_batches(variant, n):
    net = fc.ISNet(small().eval(), variant, supervise=("3",))
    out = net(torch.rand(n, 3, 8, 8), relevance=True)
    k = {"original": 4, "dual": 2}.get(variant, 1)
    assert out.logits.shape == (n, 4)
    assert out.heatmaps.shape == (n, k, 3, 8, 8)
    assert out.hidden["3"].shape == (n, k, 6, 4, 4)
    out.heatmaps.sum().backward()


@pytest.mark.parametrize("variant", VARIANTS)
def test_backward_is_first_order(variant):
    """Backward twice gives the same; a second derivative through relevance raises instead of being wrong."""
    net, x = fc.ISNet(small().double(), variant), batch(dtype=torch.float64)[0].requires_grad_()
    loss = (net(x, relevance=True).heatmaps ** 2).sum()
    leaves = [x, *net.model[0].parameters()]
    once, twice = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice))
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_the_authors_recipe_trains():
    """SGD, momentum 0.9, clipping at norm 1: the loss falls, background relevance too."""
    torch.manual_seed(0)
    x, y, masks = batch(16)
    net, loss = fc.ISNet(small(), "selective"), fc.ISNetLoss(P=0.7)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    seen = []
    for _ in range(30):
        total, parts = loss(net(x, relevance=True), y, masks)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        seen.append((total.item(), parts.background.item()))
    assert seen[-1][0] < 0.9 * seen[0][0]
    assert seen[-1][1] < seen[0][1]


# ---- memory ------------------------------------------------------------------------------------------------------------


def tensors():
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def resident_bytes():
    """Memory of this process, 0 where the system does not tell."""
    statm = pathlib.Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_leave_nothing_behind(variant):
    """50 steps: no tensor waits for the garbage collector (no reference cycles), and nothing grows."""
    net, loss = fc.ISNet(small(), variant, max_map_bytes=1 if variant == "original" else None), fc.ISNetLoss()
    x, y, masks = torch.rand(2, 3, 64, 64), torch.tensor([0, 1]), torch.ones(2, 1, 64, 64)
    masks[..., :20] = 0
    one_map = 2 * 6 * 64 * 64 * 4  # bytes of the first layer's output
    for _ in range(8):
        step(net, loss, x, y, masks)
    gc.collect()
    gc.disable()
    try:
        count, objects, size = tensors(), len(gc.get_objects()), resident_bytes()
        for _ in range(50):
            step(net, loss, x, y, masks)
        assert tensors() == count
        gc.collect()
        assert len(gc.get_objects()) <= objects + 10
        assert resident_bytes() - size < 25 * one_map, "half a map a step is left behind"
    finally:
        gc.enable()


# ---- dtypes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_models(variant, dtype):
    """At most twice as far from float64 as plain gradient * input of the same model in the same dtype, plus a rounding."""
    model = small().eval()
    x, y, masks = batch()
    target = None if variant in ("original", "dual") else torch.tensor([0, 1, 2, 3])
    want = fc.ISNet(model.double(), variant)(x.double(), relevance=True, target=target)
    plain_want = gradient_times_input(model, x.double())
    model = model.to(dtype)
    net = fc.ISNet(model, variant, check="never")
    out = net(x.to(dtype), relevance=True, target=target)
    assert out.heatmaps.dtype == torch.float32, "relevance starts in float32, as small numbers would vanish"
    assert torch.isfinite(out.heatmaps).all()
    plain = relative(gradient_times_input(model, x.to(dtype)), plain_want)
    assert relative(out.heatmaps, want.heatmaps) <= 2 * plain + 8 * torch.finfo(dtype).eps
    step(net, fc.ISNetLoss(), x.to(dtype), y, masks)
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == dtype for p in model.parameters())


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def gradient_times_input(model, x):
    x = x.detach().requires_grad_()
    return (x * torch.autograd.grad(model(x)[:, 0].sum(), x)[0]).detach()


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant):
    model = small().eval()
    x, y, masks = batch()
    target = torch.tensor([0, 1, 2, 3]) if variant != "dual" else None
    net = fc.ISNet(model, variant, check="never")
    want = net(x, relevance=True, target=target).heatmaps
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, relevance=True, target=target)
        assert out.logits.dtype == torch.bfloat16
        total, _ = fc.ISNetLoss()(out, y, masks)
    assert torch.isfinite(out.heatmaps).all()
    assert relative(out.heatmaps, want.double()) < 0.05
    total.backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18s", "densenets"])
@pytest.mark.parametrize("variant", ["selective", "dual"])
def test_autocast_in_train_mode(name, variant):
    """Batch statistics, skips and concatenations with mixed dtypes: no further from float32 than twice what autocast
    does to plain gradient * input; backward works."""
    torch.manual_seed(0)
    model = golden_nets.build(name)
    net, x = fc.ISNet(model, variant, check="never"), torch.rand(4, 3, 32, 32)
    want = net(x, relevance=True, target=0).heatmaps
    plain_want = gradient_times_input(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        out, same = net(x, relevance=True), net(x, relevance=True, target=0)
        plain, logits = gradient_times_input(model, x), model(x)
    assert out.logits.dtype == logits.dtype
    assert relative(same.heatmaps, want.double()) <= 2 * relative(plain, plain_want.double())
    (out.heatmaps.float() ** 2).sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_channels_last(variant):
    model = small().double().eval()
    x = batch(dtype=torch.float64)[0]
    net = fc.ISNet(model, variant, generator=torch.Generator().manual_seed(0))
    want = net(x, relevance=True).heatmaps
    model.to(memory_format=torch.channels_last)
    net = fc.ISNet(model, variant, generator=torch.Generator().manual_seed(0))
    got = net(x.contiguous(memory_format=torch.channels_last), relevance=True)
    close(got.heatmaps, want)


# ---- checks ------------------------------------------------------------------------------------------------------------


def test_check_first_looks_once():
    bad = batch()[0]
    bad[0, 0, 0, 0] = torch.nan
    net = fc.ISNet(small(), check="first")
    with pytest.raises(ValueError, match="x holds NaN or infinity: clean the input"):
        net(bad, relevance=True)
    with pytest.raises(ValueError, match="NaN"):  # a failed check is made again
        net(bad, relevance=True)
    net(batch()[0], relevance=True)
    net(bad, relevance=True)


def test_check_always_and_never():
    bad = torch.full((2, 3, 8, 8), torch.inf)
    net = fc.ISNet(small(), check="always")
    net(batch()[0], relevance=True)
    with pytest.raises(ValueError, match="infinity"):
        net(bad, relevance=True)
    fc.ISNet(small(), check="never")(bad, relevance=True)


def test_logits_alone_are_not_checked():
    fc.ISNet(small(), check="always")(torch.full((2, 3, 8, 8), torch.nan))


def test_inputs_beyond_the_bounds():
    x = batch()[0] * 2 - 0.5
    outside = int(((x < -1e-3) | (x > 1 + 1e-3)).sum())
    text = rf"{outside} of {x.numel()} input values lie outside input_low=0.0, input_high=1.0 .*first_layer='epsilon'"
    net = fc.ISNet(small())
    with pytest.warns(fc.FisnetWarning, match=text):
        net(x, relevance=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x, relevance=True)  # once
        fc.ISNet(small(), check="always", input_low=-0.5, input_high=1.5)(x, relevance=True)
        fc.ISNet(small(), check="always", first_layer="epsilon")(x, relevance=True)
        fc.ISNet(small(), check="always", input_low=(-0.5, -0.5, -0.5), input_high=torch.full((3,), 1.5))(x, relevance=True)
        fc.ISNet(small(), check="never")(x, relevance=True)
    per_channel = fc.ISNet(small(), check="always", input_low=(-0.5, -0.5, 0.0), input_high=1.5)
    with pytest.warns(fc.FisnetWarning, match=f"{int((x[:, 2] < -1e-3).sum())} of"):
        per_channel(x, relevance=True)


def test_the_warning_points_at_the_callers_line():
    with pytest.warns(fc.FisnetWarning) as caught:
        fc.ISNet(small())(batch()[0] + 1, relevance=True)
    assert caught[0].filename == __file__


# ---- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"variant": "selectiv"}, ValueError, "variant must be one of 'original', .*got 'selectiv'"),
        ({"select": "worst"}, ValueError, "select must be one of 'lowest', 'random', 'top', got 'worst'"),
        ({"first_layer": "z+"}, ValueError, "first_layer must be one of 'zb', 'epsilon', got"),
        ({"check": True}, ValueError, "check must be one of"),
        ({"backend": "gpu"}, ValueError, "backend must be one of auto, reference, cuda, got 'gpu'"),
        ({"eps": -1.0}, ValueError, "eps must be finite and >= 0, got -1.0"),
        ({"eps": "small"}, TypeError, "eps must be a number, got str"),
        ({"eps": True}, TypeError, "eps must be a number, got bool"),
        ({"eps": float("nan")}, ValueError, "eps must be finite"),
        ({"eta_eps": 0}, ValueError, "eta_eps must be a number > 0, got 0"),
        ({"eta_eps": "t"}, ValueError, "eta_eps must be a number > 0, got 't'"),
        ({"max_map_bytes": 0}, ValueError, "max_map_bytes must be > 0 or None, got 0"),
        ({"supervise": "layer1"}, TypeError, r"write supervise=\('layer1',\)"),
        ({"supervise": (3,)}, TypeError, "supervise must hold layer names .*got int"),
        ({"supervise": ("4x",)}, ValueError, "supervise: there is no layer '4x'. .*'4'.* lists the layers"),
        ({"rules": "epsilonplus"}, ValueError, "unknown preset 'epsilonplus'; the presets are"),
        ({"rules": {"convv": fc.rules.ZPlus()}}, ValueError, "rules: no layer matches 'convv'"),
        ({"rules": {"0": 1}}, TypeError, "rules: '0' must be one of Epsilon"),
        ({"rules": 3}, TypeError, "rules must be a rule, a preset's name.*got int"),
        ({"input_low": 1.0}, ValueError, "low must be below high, got low=1.0, high=1.0"),
        ({"input_low": "0"}, (TypeError, ValueError), "input_low"),
        ({"input_high": None}, TypeError, "input_high must be a number or one number per channel, got NoneType"),
        ({"input_low": (0.0, 0.0), "input_high": (1.0, 1.0, 1.0)}, ValueError, "low has 2 channels and high has 3"),
    ],
)
def test_constructor_errors(options, error, text):
    with pytest.raises(error, match=text):
        fc.ISNet(small(), **options)


def test_model_must_be_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        fc.ISNet(lambda x: x)


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        ([1.0], TypeError, r"x must be a tensor \[N, C_in, ...\], got list"),
        (torch.rand(3), ValueError, r"x must be \[N, C_in, ...\], got \(3,\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), TypeError, "x must be floating point, got torch.uint8: convert it"),
        (torch.rand(2, 3, 8, 8, device="meta"), ValueError, "x is on meta and the model is on cpu: move one of them"),
        (torch.rand(2, 3, 8, 8).double(), (TypeError, ValueError), "x is torch.float64 and the model is torch.float32"),
    ],
)
def test_input_errors(x, error, text):
    with pytest.raises(error, match=text):
        fc.ISNet(small())(x, relevance=True)


@pytest.mark.parametrize("check", ["first", "never"])
def test_bounds_of_other_channels(check):
    net = fc.ISNet(small(), input_low=(0.0, 0.0), input_high=(1.0, 1.0), check=check)
    with pytest.raises(ValueError, match="input_low has 2 channels and the input has 3: give 1 or 3"):
        net(batch()[0], relevance=True)


def test_the_model_must_return_logits():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r"the model must return logits \[N, C\], got a tensor \(2, 4, 6, 6\)"):
        fc.ISNet(model)(torch.rand(2, 3, 8, 8), relevance=True)


def test_batch_of_one_in_train_mode():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="BatchNorm in train mode needs more than one value a channel"):
        fc.ISNet(model, first_layer="epsilon")(torch.rand(1, 3), relevance=True)


# ---- looking -----------------------------------------------------------------------------------------------------------


def test_plan_and_layers():
    net = fc.ISNet(small(), "dual")
    text = str(net.plan())
    assert text.splitlines()[0].split() == ["layer", "forward", "relevance", "rule", "kernel"]
    assert "zB[0, 1]" in text
    assert "z+(0.01)" in text
    assert "epsilon(0.01)" in text
    assert net.plan() == fc.ISNet(small(), "dual").plan()
    assert net.plan() != fc.ISNet(small(), "selective").plan()
    for name in net.layers():
        fc.ISNet(small(), supervise=(name,))
    assert "variant='dual'" in repr(net)


@pytest.mark.parametrize("variant", VARIANTS)
def test_supervised_maps_are_relevance_too(variant):
    """An inner map sums to what the layers below it get, up to biases and epsilon; the input's map does not change."""
    model = small(bn=False).double().eval()
    for m in model.modules():
        if getattr(m, "bias", None) is not None:
            m.bias.data.zero_()
    x, seed = batch(dtype=torch.float64)[0], torch.Generator()
    options = {"eps": 1e-12, "first_layer": "epsilon", "generator": seed}
    plain = fc.ISNet(model, variant, **options)
    seed.manual_seed(0)
    want = plain(x, relevance=True).heatmaps
    seed.manual_seed(0)
    out = fc.ISNet(model, variant, supervise=("1", "2", "4", "7"), **options)(x, relevance=True)
    close(out.heatmaps, want)
    total = want.flatten(2).sum(2)
    for name, R in out.hidden.items():
        close(R.flatten(2).sum(2), total, 1e-6, name)


def test_random_functional_of_everything_has_gradients():
    """logits, heatmaps and inner maps of one call are parts of one graph."""
    net = fc.ISNet(small().double(), "dual", supervise=("1", "5"))
    out = net(batch(dtype=torch.float64)[0], relevance=True)
    parts = [out.logits, out.heatmaps, *out.hidden.values()]
    sum((p * randn(*p.shape)).sum() for p in parts).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
