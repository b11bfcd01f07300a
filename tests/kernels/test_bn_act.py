"""BatchNorm + addition + ReLU and its backward on the kernels: the cases of the reference, and what only kernels have."""

import itertools

import golden_nets
import pytest
import torch
from emulator import SCHEDULES, configure
from helpers import CHECKS, EXACT, Case, close, error, gradcheck, grads, rand, randn
from test_batch_norm import CASES, MEAN, VAR
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fisnet_cuda as fc
from fisnet_cuda import _backend, ops, reference

F = torch.nn.functional
fisnet = torch.ops.fisnet
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def on(case, device):
    """The case with its op on ``device``: inputs and result stay on the CPU."""
    return case._replace(op=lambda *inputs: case.op(*(t.to(device) for t in inputs)).cpu())


def fan_case(name, training, copies, skip, size):
    """Several consumers, each with weights of its own, so that the gradients that the backward joins differ."""
    inputs = {"x": randn(*size, seed=1), "weight": randn(size[1], seed=2), "bias": randn(size[1], seed=3)}
    if skip:
        inputs["skip"] = randn(*size, seed=4)
    factors = [randn(*size, seed=20 + i) for i in range(copies)]
    mean, var = randn(size[1], seed=7), rand(size[1], seed=8, low=0.5, high=2.0)

    def joined(ys):
        return sum(y * f.to(y) for y, f in zip(ys, factors))

    def op(x, weight, bias, skip=None):
        running = mean.to(x, copy=True), var.to(x, copy=True)
        y, _, _, *more = ops.bn_act(x, weight, bias, *running, training, 0.1, 1e-5, skip, True, copies=copies)
        assert len(more) == copies - 1
        return joined([y, *more])

    def formula(x, weight, bias, skip=None):
        y = F.batch_norm(x, mean.to(x, copy=True), var.to(x, copy=True), weight, bias, training, 0.1, 1e-5)
        y = (y if skip is None else y + skip).relu()
        return joined([y] * copies)

    return Case(name, op, formula, inputs)


FAN = [
    fan_case("two", True, 2, False, (2, 3, 1, 3)),
    fan_case("three-skip", True, 3, True, (2, 2, 2, 3)),
    fan_case("four-whole-vectors", True, 4, False, (3, 4, 2, 1)),
    fan_case("six-skip", True, 6, True, (4, 3)),
    fan_case("eval-three", False, 3, False, (2, 3, 3)),
    fan_case("eval-two-skip", False, 2, True, (2, 3, 1, 3)),
    fan_case("volume", True, 2, True, (2, 2, 1, 1, 3)),
]


@pytest.mark.parametrize("check", [c for c in CHECKS if c is not gradcheck], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", [*CASES, *FAN], ids=str)
def test_cases(device, case, check):
    check(on(case, device))


@pytest.mark.parametrize("case", [*CASES, *FAN], ids=str)
def test_gradcheck(device, case):
    """Along random directions: every entry apart would take the emulator minutes."""
    inputs = [t.clone().requires_grad_() for t in case.inputs.values()]
    assert torch.autograd.gradcheck(on(case, device).op, inputs, fast_mode=True)


# ---- sizes, layouts, dtypes ----------------------------------------------------------------------------------------------

SIZES = [
    (2, 8, 4, 4), (3, 16), (2, 24, 2, 2, 2),  # whole vectors of channels
    (3, 4, 8), (2, 12, 3, 5), (1, 40, 17),  # of some types only
    (2, 1, 5, 3), (2, 5, 7, 7),  # one channel, odd ones
    (1, 3, 1, 2), (2, 3, 1, 1),  # N H W = 2, one pixel
]  # fmt: skip


def arguments(size, dtype, device, layout=None, skip=True, seed=0, offset=0.0):
    x, s = ((randn(*size, seed=seed + i) * 2 + offset).to(device, dtype) for i in (0, 1))
    if layout is not None:
        x, s = (t.contiguous(memory_format=layout) for t in (x, s))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    w, b = (randn(size[1], seed=seed + i).to(device, wide) for i in (2, 3))
    running = (randn(size[1], seed=7) * 0.1).to(device, wide), rand(size[1], seed=8, low=0.5, high=2.0).to(device, wide)
    return x, w, b, running, s if skip else None


def step(x, w, b, running, skip, training, backend="auto", momentum=0.1, copies=3, known=None):
    """Everything that a forward and a backward from ``copies`` consumers compute, by name."""
    running = [None if t is None else t.clone() for t in running]
    inputs = {n: t.detach().requires_grad_() for n, t in (("x", x), ("weight", w), ("bias", b), ("skip", skip)) if t is not None}
    args = [inputs.get(n) for n in ("x", "weight", "bias")]
    y, mean, rstd, *more = ops.bn_act(
        *args, *running, training, momentum, 1e-5, inputs.get("skip"), True, copies=copies, known=known, backend=backend
    )
    bars = [randn(*x.shape, seed=30 + i).to(x) for i in range(copies)]
    found = torch.autograd.grad([y, *more], list(inputs.values()), bars)
    assert all(g.dtype == t.dtype for g, t in zip(found, inputs.values()))
    results = {"y": y, "mean": mean, "rstd": rstd, **{f"gradient of {n}": g for n, g in zip(inputs, found)}}
    results |= {n: t for n, t in zip(("running mean", "running var"), running) if t is not None}
    return {n: t.detach() for n, t in results.items()}


def at_most_twice(got, usual, exact, dtype):
    """The rule of tests/helpers.py: twice the error of PyTorch in this dtype, plus a rounding floor."""
    for name, want in exact.items():
        unit = torch.finfo(torch.float32 if "running" in name or name in ("mean", "rstd") else dtype).eps
        allowed = 2 * error(usual[name], want) + 2 * unit if dtype != torch.float64 else EXACT  # that is the reference itself
        seen = error(got[name], want)
        assert seen <= allowed, f"{name}: error {seen:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_and_dtypes(device, size, dtype, training):
    for layout in (None, LAYOUTS.get(len(size))):
        given = arguments(size, dtype, device, layout)
        x, w, b, running, skip = given
        exact = step(x.double(), w.double(), b.double(), [t.double() for t in running], skip.double(), training, "reference")
        got, usual = step(*given, training), step(*given, training, "reference")
        assert got["y"].dtype == dtype
        assert got["y"].stride() == x.stride()
        assert got["gradient of x"].stride() == x.stride()
        at_most_twice(got, usual, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_many_slabs(device, layout, dtype):
    """Enough rows that a channel is shared out over blocks."""
    given = arguments((2, 8, 64, 72), dtype, device, layout)
    x, w, b, running, skip = given
    exact = step(x.double(), w.double(), b.double(), [t.double() for t in running], skip.double(), True, "reference")
    at_most_twice(step(*given, True), step(*given, True, "reference"), exact, dtype)


def test_many_channels(device):
    """More channels than one tile of blocks, and than one block of the finishing kernels."""
    given = arguments((3, 300, 2, 2), torch.float32, device, torch.channels_last)
    got, want = step(*given, True), step(*given, True, "reference")
    for name, value in want.items():
        close(got[name], value, 1e-5, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned(device, dtype):
    """Dense tensors that start one element behind a 16-byte boundary."""
    x, w, b, running, skip = arguments((2, 8, 4, 4), dtype, device)
    want = step(x, w, b, running, skip, True)
    x, skip = (torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in (x, skip))
    assert x.data_ptr() % 16
    for name, value in step(x, w, b, running, skip, True).items():
        close(value, want[name], 4 * torch.finfo(dtype).eps, name)


@pytest.mark.parametrize("training", [True, False])
def test_optional_operands(device, training):
    """With and without weight, bias, running statistics and skip."""
    x, w, b, running, skip = arguments((2, 8, 3, 3), torch.float64, device)
    for has_w, has_b, has_skip, tracks in itertools.product((True, False), repeat=4):
        if not training and not tracks:
            continue
        given = x, w if has_w else None, b if has_b else None, running if tracks else (None, None), skip if has_skip else None
        got, want = step(*given, training), step(*given, training, "reference")
        for name, value in want.items():
            close(got[name], value, what=name)


# ---- statistics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("first", [1e4, 0.0, 1e6], ids=["offset", "first value is 0", "first value is an outlier"])
def test_statistics_of_large_offsets(device, layout, first):
    """1e4 +- 1 in float32: E[x^2] - E[x]^2 would have no digit left."""
    x = (1e4 + randn(4, 8, 16, 16)).float()
    x[0, :, 0, 0] = first
    x = x.to(device).contiguous(memory_format=layout)
    mean, rstd = fisnet.bn_statistics(x, None, None, 0.1, 1e-5)
    exact = x.double().cpu()
    close(mean.cpu(), exact.mean((0, 2, 3)), 4e-7 if first > 1e5 else 6e-8)
    close(rstd.cpu(), (exact.var((0, 2, 3), unbiased=False) + 1e-5).rsqrt(), 1e-5 if first > 1e5 else 1e-6)


def test_forward_of_a_large_offset(device):
    """The mean is taken off before anything is scaled: what is left is its rounding to float32."""
    x = (1e4 + randn(4, 8, 16, 16)).float().to(device)
    y, mean, rstd = ops.bn_act(x, None, None, None, None, True)
    shape = (1, -1, 1, 1)
    close(y, (x.double() - mean.view(shape).double()) * rstd.view(shape).double(), 1e-6)


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_as_the_module(device, momentum, track, training):
    """Outputs and buffers beside torch's own module, over steps; the variance that runs is the unbiased one."""
    module = nn.BatchNorm2d(3, momentum=momentum, track_running_stats=track).to(device).train(training)
    module.weight.data, module.bias.data = randn(3).float().to(device), randn(3, seed=1).float().to(device)
    ours = {name: b.clone() for name, b in module.named_buffers()}
    for seed in range(3):
        x = randn(2, 3, 4, 4, seed=seed).float().to(device)
        want = module(x)
        y, _, _ = ops.tracked_bn_act(
            x, module.weight, module.bias, ours.get("running_mean"), ours.get("running_var"), ours.get("num_batches_tracked"),
            training, momentum, module.eps,
        )  # fmt: skip
        close(y.detach(), want.detach(), 1e-5)
    for name, value in module.named_buffers():
        close(ours[name].float(), value.float(), 2 * torch.finfo(torch.float32).eps, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_running_statistics_of_the_activations_dtype(device, dtype):
    """A whole model in bfloat16 has its buffers and parameters there too."""
    x = randn(4, 3, 3).to(device, dtype)
    mean, var = MEAN.to(device, dtype), VAR.to(device, dtype)
    w = torch.ones(3, dtype=dtype, device=device, requires_grad=True)
    exact = x.double().mean((0, 2)), x.double().var((0, 2))
    want = [0.75 * r.double() + 0.25 * e for r, e in zip((mean, var), exact)]
    y, _, _ = ops.bn_act(x, w, None, mean, var, True, 0.25, relu=True)
    assert y.dtype == mean.dtype == dtype
    for got, value in zip((mean, var), want):
        close(got, value, torch.finfo(dtype).eps)
    assert grads(y.cpu(), [w])[0].dtype == dtype


def test_strided_running_statistics(device):
    x = randn(4, 3, 3).to(device)
    both = torch.stack([MEAN, VAR], 1).to(device)
    want = MEAN.to(device), VAR.to(device)
    ops.bn_act(x, None, None, *want, True)
    ops.bn_act(x, None, None, both[:, 0], both[:, 1], True)
    assert torch.equal(both, torch.stack(want, 1))


class Statistics(TorchDispatchMode):
    """How many channels each pass over memory for statistics reads."""

    def __init__(self):
        super().__init__()
        self.channels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname == "bn_statistics":
            self.channels.append(args[0].shape[1])
        return func(*args, **(kwargs or {}))


def known_but(x, first, count):
    """The statistics of all channels but ``count`` from ``first``, and those."""
    part, rest = x[:, first : first + count], torch.cat([x[:, :first], x[:, first + count :]], 1)
    if x.is_contiguous(memory_format=torch.channels_last):
        part, rest = (t.contiguous(memory_format=torch.channels_last) for t in (part, rest))
    return part, first, *ops.bn_act(rest, None, None, None, None, True)[1:]


@pytest.mark.parametrize(("first", "count"), [(0, 5), (3, 8), (11, 1)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_known_statistics(device, dtype, layout, first, count):
    """Only the other channels are measured; the results are those of the whole."""
    given = arguments((3, 12, 3, 5), dtype, device, layout)
    x, w, b, running, skip = given
    exact = step(x.double(), w.double(), b.double(), [t.double() for t in running], skip.double(), True, "reference")
    known = known_but(x, first, count)
    with Statistics() as seen:
        got = step(*given, True, known=known)
    assert seen.channels == [count]
    at_most_twice(got, step(*given, True, "reference"), exact, dtype)


def test_known_statistics_of_many_channels(device):
    """More than one block of the finishing kernel on either side of the part, and no running statistics."""
    x, w, b, _, skip = arguments((2, 100, 2, 2), torch.float32, device)
    given = x, w, b, (None, None), skip, True
    got, want = step(*given, known=known_but(x, 37, 21)), step(*given)
    for name, value in want.items():
        close(got[name], value, 1e-5, name)


def test_known_statistics_that_are_less_exact(device):
    """A part in another dtype than x, as autocast may have it: everything is measured."""
    given = arguments((3, 4, 5), torch.float64, device)
    known = known_but(given[0].float(), 1, 2)
    with Statistics() as seen:
        got = step(*given, True, known=known)
    assert seen.channels == [4]
    for name, value in step(*given, True).items():
        assert torch.equal(got[name], value), name


def test_known_statistics_in_eval_mode(device):
    """They are those of a batch: the running ones are used."""
    given = arguments((3, 4, 5), torch.float64, device)
    got, want = step(*given, False, known=known_but(given[0], 1, 2)), step(*given, False)
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_known_statistics_of_a_constant_channel(device):
    """Its variance is 0, with eps 0 too; NaN stays."""
    for eps, value in ((1e-5, 1.0), (0.0, 1.0), (1e-5, torch.nan)):
        x = torch.ones(2, 3, 4, device=device)
        x[:, 0] = value
        _, mean, rstd = ops.bn_act(x[:, :1], None, None, None, None, True, eps=eps)
        running_mean, running_var = x.new_zeros(3), x.new_ones(3)
        ops.bn_act(x, None, None, running_mean, running_var, True, 1.0, eps, known=(x[:, 1:], 1, mean, rstd))
        first, *others = running_var.tolist()
        assert others == [0.0, 0.0]
        assert first != first if value != value else 0.0 <= first <= 2 * eps * torch.finfo(torch.float32).eps


# ---- the mask, values, memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_mask(device, size, dtype):
    """A bit an element in the order of memory; the last byte is filled up with zeros."""
    for layout in (None, LAYOUTS.get(len(size))):
        x, w, b, _, skip = arguments(size, dtype, device, layout)
        statistics = [t.to(w) for t in (randn(size[1], seed=5), rand(size[1], seed=6, low=0.5))]
        for relu in (True, False):
            y, mask = fisnet.bn_apply(x, *statistics, w, b, skip, relu, True)
            assert mask.numel() == -(-x.numel() // 8)
            assert torch.equal(mask, reference.batch_norm.pack_mask(y))
            assert torch.equal(reference.batch_norm.unpack_mask(mask, y), y > 0)
        assert not fisnet.bn_apply(x, *statistics, w, b, skip, True, False)[1].numel()


def test_not_a_number_stays(device):
    """As in PyTorch's ReLU: a NaN is not silently a dead unit, in the forward or the backward."""
    x = torch.tensor([[1.0, torch.nan, -1.0]], device=device, requires_grad=True)
    zero, one = torch.zeros(3, device=device), torch.ones(3, device=device)
    y, _, _ = ops.bn_act(x, None, None, zero, one, False, eps=0.0, relu=True)
    assert y.tolist()[0][::2] == [1.0, 0.0]
    assert y[0, 1].isnan()
    (g,) = torch.autograd.grad(y, [x], torch.ones_like(y))
    assert g.tolist() == [[1.0, 1.0, 0.0]]


def test_operands_stay_as_they_are(device):
    given = arguments((2, 8, 3, 3), torch.float32, device)
    flat = [t for part in given for t in (part if isinstance(part, tuple) else (part,))]
    before = [t.clone() for t in flat]
    step(*given, True)
    assert all(torch.equal(t, b) for t, b in zip(flat, before))


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(device, training):
    x = torch.zeros(0, 3, 4, 4, device=device, requires_grad=True)
    w, mean, var = (t.float().to(device) for t in (randn(3), MEAN, VAR))
    w.requires_grad_()
    before = mean.clone()
    y, m, rstd, more = ops.bn_act(x, w, w, mean, var, training, relu=True, copies=2)
    assert y.shape == more.shape == x.shape
    assert m.shape == rstd.shape == (3,)
    assert torch.isfinite(rstd).all()
    assert torch.equal(mean, before)
    assert not any(g.any() for g in torch.autograd.grad([y, more], [x, w], [torch.ones_like(y)] * 2))


def test_layouts_that_differ(device):
    """The result has the layout of x, whatever skip and the gradients have."""
    x, w, b, running, skip = arguments((2, 8, 3, 3), torch.float64, device)
    want = step(x, w, b, running, skip, True)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, skip)]
    for first, second in ((x, last[1]), (last[0], skip), last):
        got = step(first, w, b, running, second, True)
        assert got["y"].stride() == first.stride()
        for name, value in want.items():
            close(got[name], value, what=name)


# ---- the backward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_backward_beside_the_reference(device, count, training, layout):
    """Any number of gradients, with and without a mask, and whichever results are needed."""
    x, w, _, _, _ = arguments((2, 8, 3, 4), torch.float64, device, layout)
    mean, rstd = x.mean((0, 2, 3)), x.var((0, 2, 3)).rsqrt()
    bars = [randn(*x.shape, seed=40 + i).to(device).contiguous(memory_format=layout) for i in range(count)]
    packed = reference.batch_norm.pack_mask(randn(*x.shape, seed=50).to(device).contiguous(memory_format=layout))
    for mask, needs in itertools.product((packed, None), itertools.product((True, False), repeat=3)):
        given = bars, mask, x, mean, rstd, w, training, *needs
        want, got = reference.bn_act_backward(*given), _backend._load()[0]["bn_act_backward"](*given)
        for g, value in zip(got, want):
            assert (g is None) == (value is None)
            if value is not None:
                close(g, value)


def test_consumers_without_a_gradient(device):
    """Outputs that nobody uses cost nothing, and count as 0."""
    x, w, b, running, skip = arguments((2, 3, 5), torch.float64, device)
    x.requires_grad_()
    bar = randn(2, 3, 5).to(device)
    want = None
    for used in range(3):
        y, _, _, *more = ops.bn_act(x, w, b, *(r.clone() for r in running), True, skip=skip, relu=True, copies=3)
        (got,) = torch.autograd.grad([y, *more][used], [x], bar)
        want = got if want is None else want
        assert torch.equal(got, want)


def test_a_networks_gradients_are_joined_once(device):
    """The consumers of a layer (next convolution, skip, relevance) hand their gradients to one call of the backward."""
    seen = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._opname == "bn_act_backward":
                seen.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    net = fc.ISNet(golden_nets.build("resnet18s").to(device), "selective", check="never").train()
    out = net(rand(2, 3, 16, 16).to(device, next(net.parameters()).dtype), relevance=True)
    with Calls():
        ((out.heatmaps**2).sum() + out.logits.sum()).backward()
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert len(seen) == norms
    assert max(seen) == 3


def test_copies_are_aliases(device):
    x, w, b, running, _ = arguments((2, 3, 5), torch.float32, device)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y, _, _, *more = ops.bn_act(x.requires_grad_(grad), w, b, *running, True, relu=True, copies=4)
        assert all(t.data_ptr() == y.data_ptr() for t in more)
        assert all(t.requires_grad == grad for t in (y, *more))


def test_second_derivatives_are_refused(device):
    x = randn(4, 3).to(device).requires_grad_()
    y, _, _ = ops.bn_act(x, None, None, None, None, True, relu=True)
    (g,) = torch.autograd.grad(y, [x], torch.ones_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


# ---- determinism, and what torch asks of an operator ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(2, 8, 24, 24), (3, 5, 7, 7)], ids=str)
def test_bitwise_the_same_every_time(device, size, layout, dtype):
    given = arguments(size, dtype, device, layout)
    want = step(*given, True)
    for schedule in SCHEDULES:
        if device == "cpu":
            configure(*schedule)
        for name, value in step(*given, True).items():
            assert torch.equal(value, want[name]), name


def operator_calls(device):
    x, w, b, running, skip = arguments((2, 8, 3, 3), torch.float32, device, torch.channels_last)
    mean, rstd = x.mean((0, 2, 3)), x.var((0, 2, 3)).rsqrt()
    y, mask = fisnet.bn_apply(x, mean, rstd, w, b, skip, True, True)
    return [
        (fisnet.bn_statistics, (x, *running, 0.1, 1e-5)),
        (fisnet.bn_statistics, (x.bfloat16(), None, None, 0.1, 1e-5)),
        (fisnet.bn_statistics, (x, *(torch.cat([t, t]) for t in running), 0.1, 1e-5, mean, rstd, 3)),
        (fisnet.bn_apply, (x, mean, rstd, w, b, skip, True, True)),
        (fisnet.bn_apply, (x.double(), mean.double(), rstd.double(), None, None, None, False, False)),
        (fisnet.bn_act_backward, ([y, x], mask, x, mean, rstd, w, True, True, True, True)),
        (fisnet.bn_act_backward, ([y], None, x, mean, rstd, None, False, True, False, False)),
        (fisnet.bn_act_backward, ([y], mask, x, mean, rstd, None, True, False, False, True)),
    ]


@pytest.mark.parametrize("index", range(8))
def test_opcheck(device, index):
    """Schema (what is written, what is an alias), fake tensors' shapes and strides, tracing."""
    op, args = operator_calls(device)[index]
    torch.library.opcheck(op, args)


def test_wrong_operands_are_refused(device):
    x = randn(2, 3, 4).to(device)
    v = x.new_ones(3)
    for call, message in [
        (lambda: fisnet.bn_statistics(x[:1, :, :1].contiguous(), None, None, 0.1, 1e-5), "one value a channel"),
        (lambda: fisnet.bn_statistics(x, v, None, 0.1, 1e-5), "come together"),
        (lambda: fisnet.bn_statistics(x, v, v.float(), 0.1, 1e-5), "running_var must be"),
        (lambda: fisnet.bn_statistics(x, None, None, 0.1, 1e-5, v, None), "known_mean and known_rstd come together"),
        (lambda: fisnet.bn_statistics(x, None, None, 0.1, 1e-5, v.float(), v), "known_mean must be"),
        (lambda: fisnet.bn_statistics(x, None, None, 0.1, 1e-5, v, v, 4), "first must lie within the 3 known channels, got 4"),
        (lambda: fisnet.bn_statistics(x, v, v, 0.1, 1e-5, v, v, 0), "vectors of 6 values"),
        (lambda: fisnet.bn_apply(x, v, v.float(), None, None, None, True, True), "rstd must be"),
        (lambda: fisnet.bn_apply(x[..., ::2], v, v, None, None, None, True, True), "must be dense"),
        (lambda: fisnet.bn_act_backward([], None, x, v, v, None, True, True, True, True), "takes 1 to 4"),
        (lambda: fisnet.bn_act_backward([x], v, x, v, v, None, True, True, True, True), "mask must hold"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("measured", [8, 3])
def test_compiled(device, measured):
    """fullgraph, with running statistics that are updated in place and three consumers; nothing is compiled twice."""
    torch._dynamo.reset()
    x, w, b, running, skip = arguments((2, 8, 3, 3), torch.float64, device)
    want = step(x, w, b, running, skip, True)
    known = known_but(x, 2, measured) if measured < 8 else None

    def run(x, w, b, mean, var, skip):
        y, m, rstd, *more = ops.bn_act(x, w, b, mean, var, True, 0.1, 1e-5, skip, True, copies=3, known=known)
        return y, m, rstd, *more

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        mean, var = (t.clone() for t in running)
        inputs = [t.detach().clone().requires_grad_() for t in (x, w, b, skip)]
        with torch._dynamo.config.patch(error_on_recompile=True):
            y, m, rstd, *more = compiled(*inputs[:3], mean, var, inputs[3])
        bars = [randn(*x.shape, seed=30 + i).to(x) for i in range(3)]
        found = torch.autograd.grad([y, *more], inputs, bars)
        names = ("y", "mean", "rstd", "running mean", "running var", *(f"gradient of {n}" for n in ("x", "weight", "bias", "skip")))
        for name, value in zip(names, (y, m, rstd, mean, var, *found)):
            close(value.detach(), want[name], what=name)
