"""What a wrapped model must be equal to, by plain autograd of the model itself.

With eps = 0 and no rule of its own for the first layer, LRP-epsilon of a piecewise linear network is `x * gradient` of the
explained logit, and the gradient of a heatmap loss is a double backward. In train mode the relevance of BatchNorm takes
its statistics as constants, so there the truth is the eval mode of a copy that holds the batch's statistics.

    truth.check(make_model, x)       # everything below
    truth.logits(make_model, x)      # bit for bit, in both modes and layouts, with buffers and random numbers
    truth.heatmaps(make_model, x)    # values and gradients against autograd, conservation
    truth.variants(make_model, x)    # all variants run and train, and leave the model alone
    truth.snapshot(model)            # everything that wrapping must not change
"""

import copy

import torch
from helpers import close, close_grads
from torch import nn

import fisnet_cuda as fc

VARIANTS = ("original", "selective", "stochastic", "dual", "contrast")
EPS0 = fc.rules.Epsilon(0.0)


def check(make, x, piecewise_linear=True, first_layer="zb", layouts=True):
    logits(make, x, layouts)
    if piecewise_linear:
        heatmaps(make, x)
    variants(make, x, first_layer)


def snapshot(model):
    """Attributes, hooks, modes, parameters and buffers of every module, by identity; numbers by value."""

    def flat(value):
        if isinstance(value, dict):
            return {k: flat(v) for k, v in value.items()}
        return [flat(v) for v in value] if isinstance(value, (list, tuple)) else id(value)

    return [(path, {k: flat(v) for k, v in vars(m).items()}) for path, m in model.named_modules()]


def logits_of(result):
    return result if isinstance(result, torch.Tensor) else result["logits"] if isinstance(result, dict) else result.logits


def logits(make, x, layouts=True):
    """Logits of net(x, relevance=True), statistics and the generator afterwards, beside the model's own."""
    formats = [torch.contiguous_format]
    if layouts and x.dim() in (4, 5):
        formats.append(torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    for training in (False, True):
        for layout in formats:
            plain = make().to(memory_format=layout).train(training)
            model = copy.deepcopy(plain)
            net = fc.ISNet(model, first_layer="epsilon", check="never", example_input=x)
            for _ in range(2):  # twice: statistics are cumulative
                batch = x.clone(memory_format=layout)
                torch.manual_seed(1)
                want, state = logits_of(plain(batch.clone(memory_format=layout))), torch.get_rng_state()
                torch.manual_seed(1)
                out = net(batch, relevance=True)
                what = f"training={training}, {layout}"
                assert torch.equal(out.logits, want), f"logits differ: {what}"
                assert torch.equal(torch.get_rng_state(), state), f"other random numbers: {what}"
                for (name, got), (_, value) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
                    assert torch.equal(got, value), f"buffer {name} differs: {what}"


def with_batch_statistics(model, x):
    """A copy in eval mode whose BatchNorms hold the statistics that ``model`` in train mode takes from ``x``."""
    model = copy.deepcopy(model).train()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def hold(module, inputs):
        v = inputs[0].detach()
        axes = [0, *range(2, v.dim())]
        module.running_mean, module.running_var = v.mean(axes), v.var(axes, unbiased=False)
        module.eval()

    handles = [m.register_forward_pre_hook(hold) for m in norms]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return model.eval()


def gradient_x_input(model, x, target, names):
    """``(heatmap, gradients of a function of it by parameter)``, differentiated twice."""
    x = x.clone().requires_grad_()
    z = logits_of(model(x.clone()))[:, target].sum()
    R = x * torch.autograd.grad(z, x, create_graph=True)[0]
    return R.detach(), gradients(R, model, names)


def gradients(R, model, names):
    """Gradients of a function of a heatmap that is neither linear nor even."""
    weights = torch.linspace(-1, 2, R.numel(), dtype=R.dtype).view(R.shape)
    loss = (R * weights + R.square()).sum()
    params = dict(model.named_parameters())
    asked = [params[n] for n in names if params[n].requires_grad]
    if not loss.requires_grad or not asked:
        return {n: torch.zeros_like(params[n]) for n in names}
    found = iter(torch.autograd.grad(loss, asked, allow_unused=True))
    every = {n: next(found) if params[n].requires_grad else None for n in names}
    return {n: torch.zeros_like(params[n]) if g is None else g for n, g in every.items()}


def heatmaps(make, x, target=1, train=True):
    """Values and gradients against autograd in eval mode (float64); in train mode the values too; conservation."""
    model, x = make().double().eval(), x.double()
    names = [n for n, _ in model.named_parameters()]
    want, want_grads = gradient_x_input(copy.deepcopy(model), x, target, names)
    assert want.abs().max() > 0, "nothing to compare"
    R = fc.relevance(model, x, target=target, rules=EPS0)[:, 0]
    close(R.detach(), want, what="heatmap")
    got_grads = gradients(R, model, names)
    if max((g.abs().max() for g in want_grads.values()), default=0):
        close_grads(got_grads, want_grads, 1e-9)
    report = fc.check_conservation(model, x, target=target, rules=fc.rules.Epsilon(1e-2), tolerance=1e-9)
    assert report.violations == (), str(report)
    drops = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p for m in model.modules())
    has_bn = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if train and has_bn and not drops:
        frozen = with_batch_statistics(model, x)
        want, want_grads = gradient_x_input(frozen, x, target, names)
        net = fc.ISNet(copy.deepcopy(model).train(), first_layer="epsilon", rules=EPS0, check="never", example_input=x)
        R = net(x, relevance=True, target=target).heatmaps[:, 0]
        close(R.detach(), want, what="heatmap in train mode")
        close_grads(gradients(R, net.model, names), want_grads, 1e-9)


def variants(make, x, first_layer="zb"):
    """All variants, train mode: finite heatmaps and gradients that reach every trained parameter; nothing stays."""
    for variant in VARIANTS:
        torch.manual_seed(0)
        model = make().train()
        before = snapshot(model)
        net = fc.ISNet(model, variant=variant, first_layer=first_layer, example_input=x)
        assert snapshot(model) == before, f"wrapping changed the model ({variant})"
        out = net(x, relevance=True)
        assert out.heatmaps.shape[2:] == x.shape[1:]
        assert torch.isfinite(out.heatmaps).all(), variant
        assert (out.heatmaps != 0).any(), variant
        (out.heatmaps.square().sum() + out.logits.square().sum()).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert p.grad is not None, f"{variant}: no gradient for {name}"
                assert torch.isfinite(p.grad).all(), f"{variant}: gradient of {name}"
        del out
        model.zero_grad(set_to_none=True)
        after = snapshot(model)
        assert after == before, f"running changed the model ({variant})"
        assert str(net.plan())
