"""BatchNorm with addition and ReLU: beside PyTorch's own modules, in train and eval mode."""

import copy

import pytest
import torch
from helpers import CHECKS, Case, close, grads, rand, randn
from torch import nn

from fisnet_cuda import ops

F = torch.nn.functional
MEAN, VAR = randn(3, seed=7), rand(3, seed=8, low=0.5, high=2.0)


def case(name, training, skip=False, relu=False, affine=True, size=(4, 3, 3, 2)):
    inputs = {"x": randn(*size, seed=1)}
    if affine:
        inputs |= {"weight": randn(size[1], seed=2), "bias": randn(size[1], seed=3)}
    if skip:
        inputs["skip"] = randn(*size, seed=4)

    def arguments(x, rest):
        named = dict(zip(list(inputs)[1:], rest))
        running = [t.to(x, copy=True) for t in (MEAN, VAR)]
        return named, running

    def op(x, *rest):
        named, running = arguments(x, rest)
        w, b, s = (named.get(n) for n in ("weight", "bias", "skip"))
        return ops.bn_act(x, w, b, *running, training, 0.1, 1e-5, s, relu)[0]

    def formula(x, *rest):
        named, running = arguments(x, rest)
        y = F.batch_norm(x, *running, named.get("weight"), named.get("bias"), training, 0.1, 1e-5)
        y = y + named["skip"] if skip else y
        return y.relu() if relu else y

    return Case(name, op, formula, inputs, function=False)


CASES = [
    case("train", True),
    case("train-skip-relu", True, skip=True, relu=True),
    case("train-relu-1d", True, relu=True, size=(5, 3)),
    case("train-plain", True, affine=False, size=(2, 3, 4)),
    case("eval", False),
    case("eval-skip-relu", False, skip=True, relu=True),
    case("eval-one", False, relu=True, size=(1, 3, 1, 1)),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bn_act(case, check):
    check(case)


@pytest.mark.parametrize("training", [True, False])
def test_statistics_are_those_of_the_forward(training):
    """Biased variance in train mode, detached in both; running statistics move as PyTorch moves them."""
    x = randn(4, 3, 5).requires_grad_()
    mean, var = MEAN.clone(), VAR.clone()
    want_mean, want_var = MEAN.clone(), VAR.clone()
    F.batch_norm(x, want_mean, want_var, None, None, training, 0.2, 1e-3)
    y, m, rstd = ops.bn_act(x, None, None, mean, var, training, 0.2, 1e-3)
    close(mean, want_mean)
    close(var, want_var)
    used_mean, used_var = (x.mean((0, 2)), x.var((0, 2), unbiased=False)) if training else (MEAN, VAR)
    close(m, used_mean.detach())
    close(rstd, (used_var + 1e-3).rsqrt().detach())
    assert not m.requires_grad
    assert not rstd.requires_grad
    close(y, (x - m[:, None]) * rstd[:, None])


def test_x_and_skip_stay_as_they_are():
    x, skip = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    before = x.clone(), skip.clone()
    ops.bn_act(x, None, None, MEAN, VAR, False, skip=skip, relu=True)
    assert torch.equal(x, before[0])
    assert torch.equal(skip, before[1])


def test_skip_of_another_dtype():
    x, skip = torch.rand(2, 3, 4).bfloat16(), torch.rand(2, 3, 4)
    y, _, _ = ops.bn_act(x, None, None, torch.zeros(3), torch.ones(3), False, skip=skip)
    assert y.dtype == torch.float32


@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_as_the_module(momentum, affine, track, training):
    module = nn.BatchNorm2d(3, momentum=momentum, affine=affine, track_running_stats=track).double().train(training)
    if affine:
        module.weight.data, module.bias.data = randn(3), randn(3, seed=1)
    ours = copy.deepcopy(module)
    for step in range(3):
        x = randn(2, 3, 4, 4, seed=step)
        want = module(x)
        y, _, _ = ops.tracked_bn_act(
            x, ours.weight, ours.bias, ours.running_mean, ours.running_var, ours.num_batches_tracked, training,
            momentum, ours.eps,
        )  # fmt: skip
        close(y, want)
    for name, value in module.named_buffers():
        close(ours.get_buffer(name), value)


@pytest.mark.parametrize("first", [0, 1])
def test_known_statistics_change_nothing(first):
    """Those of the channels outside a part, with whatever operands and gradients."""
    x, w, b = randn(4, 3, 5), randn(3, seed=1), randn(3, seed=2)
    part = x[:, first : first + 2]
    rest = x[:, 2 - 2 * first : 3 - 2 * first]
    found = []
    for known in (None, (part, first, rest.mean((0, 2)), (rest.var((0, 2), unbiased=False) + 1e-5).rsqrt())):
        inputs = [t.clone().requires_grad_() for t in (x, w, b)]
        running = MEAN.clone(), VAR.clone()
        y, mean, rstd = ops.bn_act(*inputs, *running, True, relu=True, known=known)
        found.append([y.detach(), mean, rstd, *running, *grads(y, inputs)])
    for got, want in zip(*found):
        close(got, want)


def test_known_statistics_of_other_channels():
    with pytest.raises(ValueError, match="known must have the 3 channels of x, got a part with 2 and statistics of 2"):
        ops.bn_act(torch.ones(2, 3), None, None, None, None, True, known=(torch.ones(2, 2), 0, torch.ones(2), torch.ones(2)))


def test_channels_last_stays():
    x = randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    y, _, _ = ops.bn_act(x, None, None, MEAN, VAR, True, relu=True)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    """(PyTorch's own backward kernel divides by the batch's size: a crash of the process, not an exception.)"""
    empty = torch.zeros(0, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    w, mean, var = randn(3).requires_grad_(), MEAN.clone(), VAR.clone()
    y, m, rstd = ops.bn_act(empty, w, w, mean, var, training, relu=True)
    assert y.shape == empty.shape
    assert m.shape == rstd.shape == (3,)
    assert torch.isfinite(rstd).all()
    assert torch.equal(mean, MEAN)
    assert not any(g.any() for g in grads(y, [empty, w]))


def test_one_value_a_channel_has_no_variance():
    with pytest.raises(ValueError, match=r"needs more than one value a channel, got an input \(1, 3\)"):
        ops.bn_act(torch.ones(1, 3), None, None, None, None, True)


def test_affine_scale_shift():
    """gamma keeps its gradient; beta, the linear map's bias and the statistics are constants (sections 2 and 4)."""
    gamma, beta, mean, rstd, b = (randn(3, seed=i).requires_grad_() for i in range(5))
    for bias in (b, None):
        scale, shift = ops.affine_scale_shift(gamma, beta, mean.detach(), rstd.detach(), bias)
        close(scale, gamma * rstd)
        close(shift, ((0 if bias is None else bias) - mean) * gamma * rstd + beta)
        g = grads((scale, shift), [gamma, beta, b])
        centre = (0 if bias is None else bias) - mean
        close(g[0], (randn(3) * rstd + randn(3, seed=1) * centre * rstd).detach())
        assert not g[1].any()
        assert not g[2].any()
    scale, shift = ops.affine_scale_shift(None, None, mean.detach(), rstd.detach())
    close(scale, rstd)
    close(shift, -mean * rstd)
