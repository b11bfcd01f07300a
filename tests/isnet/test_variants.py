"""What is explained: the classes of the variants, eta and its gradient, draws, chunks of Original, given targets."""

import itertools
import math
from types import SimpleNamespace

import golden_nets
import pytest
import torch
from helpers import close, close_grads, rand, randn
from torch import nn

import fisnet_cuda as fc
from fisnet_cuda.isnet import variants

N = 6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def classifier(classes, seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 3 * 3, classes)
    return nn.Sequential(*layers).double()


def explain(model, variant, x, target=None, **options):
    return fc.ISNet(model, variant, check="never", **options)(x, relevance=True, target=target)


# ---- eta -------------------------------------------------------------------------------------------------------------


def eta(logits, index, t):
    """Section 3, literally."""
    P = logits.softmax(1).gather(1, index)
    return torch.log(P + t) - torch.log(1 - P + t)


@pytest.mark.parametrize("t", [1e-2, 1e-7])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_eta_and_its_gradient(classes, t):
    """``eta_gradient`` is the derivative of ``eta``, and its own derivative is that of plain autograd."""
    logits, index = randn(N, classes).requires_grad_(), torch.randint(0, classes, (N, 2), generator=generator())
    close(variants.eta(logits, index, t), eta(logits, index, t))
    got = variants.eta_gradient(logits, index, t)
    columns = [torch.autograd.grad(eta(logits, index[:, k : k + 1], t).sum(), logits, create_graph=True)[0] for k in (0, 1)]
    want = torch.stack(columns, 1)
    close(got, want)
    bar = randn(*got.shape, seed=1)
    second, second_want = (torch.autograd.grad(g, logits, bar)[0] for g in (got, want))
    # with two classes and t = 0 eta is linear: what is left of its curvature is a difference of large terms
    assert (second - second_want).abs().max() <= 1e-10 * max(1, second_want.abs().max())
    assert torch.autograd.gradcheck(lambda v: variants.eta_gradient(v, index, t), logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [80.0, 90.0, 200.0, 6e4])
def test_eta_of_a_large_logit_spread_is_finite(spread, dtype):
    """(``exp(-Z)`` overflows in the authors' head when the spread passes 88.)"""
    logits = torch.tensor([[spread, 0.0, -spread]], dtype=dtype, requires_grad=True)
    index = torch.tensor([[0, 1, 2]])
    g = variants.eta_gradient(logits, index, 1e-2)
    assert g.dtype == torch.promote_types(dtype, torch.float32)
    (back,) = torch.autograd.grad(g.sum(), logits)
    assert all(torch.isfinite(v).all() for v in (g, back, variants.eta(logits, index, 1e-2)))
    exact = math.log(1.01 / 0.01)
    assert variants.eta(logits, index, 1e-2)[0].tolist() == pytest.approx([exact, -exact, -exact], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eta_is_computed_in_float32(dtype):
    logits, index = randn(N, 4).to(dtype), torch.zeros(N, 1, dtype=torch.long)
    exact = variants.eta_gradient(logits.double(), index, 1e-2)
    close(variants.eta_gradient(logits, index, 1e-2).double(), exact, 1e-6)


@pytest.mark.parametrize("select", ["lowest", "random", "top"])
def test_selective_explains_eta_of_its_class(select):
    """The heatmap is that of the logits weighted by d eta / d logits, which by linearity Original's maps give."""
    model, x = classifier(5), rand(N, 3, 8, 8)
    out = explain(model, "selective", x, select=select, generator=generator())
    maps = explain(model, "original", x).heatmaps
    weights = variants.eta_gradient(out.logits, out.explained, 1e-2)
    close(out.heatmaps[:, 0], torch.einsum("nc,nc...->n...", weights[:, 0], maps))
    top, low = out.logits.argmax(1), out.logits.argmin(1)
    picked = out.explained[:, 0]
    assert {"lowest": picked.equal(low), "top": picked.equal(top), "random": bool((picked != top).all())}[select]


def test_lowest_and_top_of_equal_logits_are_the_first():
    logits = torch.zeros(2, 3)
    assert variants.select_class(logits, "lowest", None).tolist() == [0, 0]
    assert variants.select_class(logits, "top", None).tolist() == [0, 0]


# ---- draws -----------------------------------------------------------------------------------------------------------


def chi_square(counts, expected):
    """Pearson's statistic beside its mean plus five standard deviations."""
    freedom = len(counts) - 1
    statistic = sum((c - e) ** 2 / e for c, e in zip(counts, expected))
    return statistic, freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("classes", [2, 3, 5, 10])
def test_stochastic_draws_the_top_with_probability_one_half(classes):
    """Exactly 1/2, the others uniformly. (The authors' loop gives 5/11.)"""
    draws = 200_000
    top = classes // 2
    logits = torch.zeros(draws, classes)
    logits[:, top] = 1.0
    counts = variants.draw_class(logits, generator(1)).bincount(minlength=classes).tolist()
    expected = [draws / 2 if c == top else draws / 2 / (classes - 1) for c in range(classes)]
    statistic, limit = chi_square(counts, expected)
    assert statistic < limit, counts
    theirs = [draws * 5 / 11 if c == top else draws * 6 / 11 / (classes - 1) for c in range(classes)]
    assert chi_square(counts, theirs)[0] > 20 * limit, "the test can tell 1/2 from 5/11"


@pytest.mark.parametrize("classes", [3, 7])
def test_random_other_class_is_uniform(classes):
    draws = 100_000
    logits = torch.zeros(draws, classes)
    logits[:, -1] = 1.0
    counts = variants.select_class(logits, "random", generator(2)).bincount(minlength=classes).tolist()
    assert counts.pop() == 0
    statistic, limit = chi_square(counts, [draws / (classes - 1)] * (classes - 1))
    assert statistic < limit, counts


def test_samples_are_drawn_one_by_one():
    """Top or not is independent from sample to sample, also where each has another top."""
    logits = torch.eye(4).repeat(5000, 1)
    is_top = variants.draw_class(logits, generator(3)) == logits.argmax(1)
    pairs = (is_top[:-1].long() * 2 + is_top[1:].long()).bincount(minlength=4).tolist()
    statistic, limit = chi_square(pairs, [len(logits) / 4] * 4)
    assert statistic < limit, pairs


@pytest.mark.parametrize(
    ("variant", "options"),
    [("stochastic", {}), ("selective", {"select": "random"}), ("contrast", {}), ("contrast", {"multilabel": True})],
)
def test_draws_are_reproducible(variant, options):
    """Classes, or (Contrast) the maps of what was drawn."""
    model, x = classifier(10), rand(40, 3, 8, 8)
    what = "heatmaps" if variant == "contrast" else "explained"
    first, again, other = (
        getattr(explain(model, variant, x, generator=generator(seed), **options), what) for seed in (4, 4, 5)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    net = fc.ISNet(model, variant, generator=generator(4), check="never", **options)
    one, two = (getattr(net(x, relevance=True), what) for _ in range(2))
    assert torch.equal(one, first)
    assert not torch.equal(one, two), "the generator moves on"
    torch.manual_seed(6)
    unseeded = getattr(explain(model, variant, x, **options), what)
    torch.manual_seed(6)
    assert torch.equal(getattr(explain(model, variant, x, **options), what), unseeded), "without one, torch.manual_seed counts"


@pytest.mark.parametrize("draw", [variants.draw_class, lambda logits, g: variants.draw_contrast(logits, False, g)])
def test_generator_must_be_where_the_logits_are(draw):
    with pytest.raises(ValueError, match="generator is on cpu and the logits are on meta: make it there"):
        draw(torch.zeros(2, 3, device="meta"), generator())


def test_stochastic_explains_a_logit():
    model, x = classifier(4), rand(N, 3, 8, 8)
    out = explain(model, "stochastic", x, generator=generator())
    close(out.heatmaps, explain(model, "original", x, target=out.explained).heatmaps)


# ---- Contrast --------------------------------------------------------------------------------------------------------


def whole(classes, multilabel):
    """Whether ``v`` is drawn from all unit vectors, not from those with zero sum alone."""
    return multilabel or classes == 2


def moment(classes, multilabel):
    """``E[v v^T]`` of a uniform unit vector: a projection over its rank."""
    eye = torch.eye(classes, dtype=torch.float64)
    return eye / classes if whole(classes, multilabel) else (eye - 1 / classes) / (classes - 1)


def draws_of(v):
    """Mean of ``v v^T`` and five standard errors of it."""
    products = v[:, :, None] * v[:, None, :]
    return products.mean(0), 5 * products.std(0) / len(v) ** 0.5


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_contrast_is_uniform_on_its_sphere(classes, multilabel):
    """Unit norm, zero sum (or none of that), mean 0 and equal second moments in all directions."""
    logits = torch.zeros(50_000, classes, dtype=torch.float64)
    v = variants.draw_contrast(logits, multilabel, generator(1))
    close(v.norm(dim=1), torch.ones(len(v)), 1e-12)
    assert bool((v.sum(1).abs() < 1e-12).all()) is not whole(classes, multilabel)
    assert (v.mean(0).abs() <= 5 / (classes * len(v)) ** 0.5).all()
    found, error = draws_of(v)
    assert ((found - moment(classes, multilabel)).abs() <= error).all()
    assert not torch.equal(v[0], v[1]), "each sample has its own"


def test_contrast_has_no_preferred_direction():
    """Fourth moments: ``E[(v . u)^4] = 3 / (d (d + 2))`` for every unit vector u of the d = C - 1 dimensions (a Gaussian that is not
    normalised, and random signs, fail here)."""
    v = variants.draw_contrast(torch.zeros(200_000, 4, dtype=torch.float64), False, generator(2))
    for u in ([1, -1, 0, 0], [1, 1, -1, -1], [3, -1, -1, -1]):
        u = torch.tensor(u, dtype=torch.float64)
        fourth = (v @ (u / u.norm())) ** 4
        assert abs(fourth.mean() - 3 / (3 * 5)) <= 5 * fourth.std() / len(v) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 2, 1000])
def test_contrast_is_the_same_draw_in_every_dtype(classes, dtype):
    """In float32 or wider, and detached; large numbers of classes keep their zero sum."""
    logits = torch.zeros(7, classes, dtype=dtype, requires_grad=True)
    v = variants.draw_contrast(logits, False, generator(3))
    assert v.dtype == torch.promote_types(dtype, torch.float32)
    assert not v.requires_grad
    exact = variants.draw_contrast(logits.double(), False, generator(3))
    unit = torch.finfo(v.dtype).eps
    assert (v - exact).abs().max() <= unit
    if classes > 2:
        assert (v.double().sum(1).abs() <= unit * classes**0.5).all()


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("classes", [2, 5])
def test_a_draw_of_equal_numbers_is_not_divided_by_zero(monkeypatch, classes, multilabel):
    for value in (0.0, 1.5, -1.0):
        monkeypatch.setattr(variants, "_gaussian", lambda like, g, value=value: torch.full(like.shape, value))
        v = variants.draw_contrast(torch.zeros(3, classes, dtype=torch.float64), multilabel, None)
        close(v.norm(dim=1), torch.ones(3), 1e-12)
        assert whole(classes, multilabel) or (v.sum(1).abs() < 1e-12).all()
    almost = torch.tensor([[1.0, 1.0 + 2**-23, 1.0]])  # their mean is one of them, in float32
    monkeypatch.setattr(variants, "_gaussian", lambda like, g: almost)
    close(variants.draw_contrast(torch.zeros(1, 3), False, None), torch.tensor([[-1.0, 2, -1]]) / 6**0.5, 1e-6)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_contrast_explains_a_combination_of_the_logits(training, multilabel):
    """Its map, and the inner ones, are those of the classes times the weights that were drawn: LRP-epsilon is linear in its start."""
    model, x = classifier(5).train(training), rand(N, 3, 8, 8)
    options = {"supervise": ("1", "2")}
    out = explain(model, "contrast", x, generator=generator(7), multilabel=multilabel, **options)
    v = variants.draw_contrast(out.logits, multilabel, generator(7))
    assert out.explained.tolist() == [[-1]] * N
    classes = torch.arange(5).expand(N, 5)
    for each in (explain(model, "original", x, **options), explain(model, "selective", x, classes, **options)):
        close(out.heatmaps[:, 0], torch.einsum("nc,nc...->n...", v, each.heatmaps))
        for layer in options["supervise"]:
            close(out.hidden[layer][:, 0], torch.einsum("nc,nc...->n...", v, each.hidden[layer]))


def test_contrast_of_two_classes_goes_round_the_circle():
    """All angles alike, so that ``v . logits`` changes its sign at any ratio of the logits; the decision is one direction of many."""
    v = variants.draw_contrast(torch.zeros(100_000, 2), False, generator(3))
    angles = torch.atan2(v[:, 1], v[:, 0]) / math.tau + 0.5
    counts = (36 * angles).long().clamp(max=35).bincount(minlength=36).tolist()
    statistic, limit = chi_square(counts, [len(v) / 36] * 36)
    assert statistic < limit, counts
    assert torch.equal(v, variants.draw_contrast(torch.zeros(100_000, 2), True, generator(3))), "as of independent sigmoids"
    model, x = classifier(2), rand(40, 3, 8, 8)
    R = explain(model, "original", x).heatmaps
    close(
        explain(model, "contrast", x, generator=generator()).heatmaps[:, 0],
        torch.einsum("nc,nc...->n...", variants.draw_contrast(torch.zeros(40, 2), False, generator()).double(), R),
        1e-6,
    )


@pytest.mark.parametrize(("classes", "multilabel"), [(6, False), (6, True), (2, False)])
def test_square_of_contrasts_map_estimates_those_of_all_classes(classes, multilabel):
    """``E[R_v^2] = sum_c (R_c - mean R)^2 / (C - 1)``; with two classes or independent sigmoids ``sum_c R_c^2 / C``: exactly by the
    second moment, within five standard errors over draws, and over a batch of one image again and again."""
    model, x = classifier(classes), rand(1, 3, 8, 8)
    R = explain(model, "original", x).heatmaps[0].flatten(1)  # [C, pixels]
    expected = R.square().mean(0) if whole(classes, multilabel) else (R - R.mean(0)).square().sum(0) / (classes - 1)
    close(torch.einsum("cp,cd,dp->p", R, moment(classes, multilabel), R), expected)
    v = variants.draw_contrast(torch.zeros(20_000, classes, dtype=torch.float64), multilabel, generator(8))
    batch = explain(model, "contrast", x.expand(4000, -1, -1, -1), generator=generator(9), multilabel=multilabel).heatmaps.flatten(1)
    for squares in ((v @ R).square(), batch.square()):
        error = squares.std(0) / len(squares) ** 0.5
        assert ((squares.mean(0) - expected).abs() <= 5 * error).all()
    assert (R.square().mean(0) - R[0].square()).abs().max() > 0.1 * expected.max(), "one class alone would not do"


def test_square_of_two_classes_is_that_of_the_decision_and_of_the_mean():
    R = explain(classifier(2), "original", rand(1, 3, 8, 8)).heatmaps[0]
    decision, mean = (R[1] - R[0]) / 2**0.5, (R[0] + R[1]) / 2**0.5
    v = torch.linspace(0, math.tau, 13, dtype=torch.float64)[:-1]  # E over the circle of anything quadratic, exactly
    squares = torch.einsum("vc,c...->v...", torch.stack([v.cos(), v.sin()], 1), R).square().mean(0)
    close(squares, (decision.square() + mean.square()) / 2)
    close(squares, R.square().mean(0))


def test_chunks_and_targets_leave_contrast_alone():
    model, x = classifier(5), rand(2, 3, 8, 8)
    whole, parts = (explain(model, "contrast", x, generator=generator(), max_map_bytes=m) for m in (None, 1))
    assert torch.equal(whole.heatmaps, parts.heatmaps)
    g = generator()
    state = g.get_state()
    explain(model, "contrast", x, target=1, generator=g)
    assert torch.equal(g.get_state(), state), "a target draws nothing"


# ---- few classes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_few_classes(variant, classes):
    """One class: every variant explains its logit (the authors' Stochastic loops for ever, and eta is constant; Contrast's
    zero-sum vectors are all zero)."""
    model, x = classifier(classes), rand(N, 3, 8, 8)
    for select in ("lowest", "random", "top") if variant == "selective" else ("lowest",):
        out = explain(model, variant, x, select=select)
        out.heatmaps.sum().backward()
        assert torch.isfinite(out.heatmaps).all()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        if classes == 1:
            want = explain(model, "original", x).heatmaps
            close(out.heatmaps[:, -1:], want)
            assert (out.explained == (-1 if variant in ("dual", "contrast") else 0)).all()
        elif variant == "stochastic":
            assert set(out.explained.flatten().tolist()) <= {0, 1}


def test_multilabel_explains_logits():
    model, x = classifier(5), rand(N, 3, 8, 8)
    out = explain(model, "selective", x, multilabel=True)
    assert torch.equal(out.explained[:, 0], out.logits.argmin(1))
    close(out.heatmaps, explain(model, "original", x, target=out.explained).heatmaps)


# ---- Original --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("supervise", [(), ("1",)])
@pytest.mark.parametrize("parts", [1, 3])
def test_original_in_chunks(parts, supervise):
    """Classes folded into the batch in parts of one or of several: the same maps and gradients as all at once."""
    model, x, results = classifier(7), rand(2, 3, 8, 8), []
    for limit in (None, limit_for(parts, model, x)):
        model.zero_grad()
        net = fc.ISNet(model, "original", max_map_bytes=limit, supervise=supervise, check="never")
        calls = count_relevance_calls(net)
        out = net(x, relevance=True)
        maps = [out.heatmaps, *out.hidden.values()]
        functional = sum((m * randn(*m.shape, seed=i)).sum() for i, m in enumerate(maps)) + out.logits.sum()
        forward_calls = len(calls)
        functional.backward()
        results.append((maps, {n: p.grad.clone() for n, p in model.named_parameters()}))
        with torch.no_grad():
            without = net(x, relevance=True)
        for got, want in zip([without.heatmaps, *without.hidden.values()], maps):
            close(got, want.detach())
        assert forward_calls == (1 if limit is None else -(-7 // parts))
    assert results[0][0][0].shape == (2, 7, 3, 8, 8)
    for got, want in zip(results[1][0], results[0][0]):
        close(got, want)
    close_grads(results[1][1], results[0][1])


def limit_for(maps, model, x):
    """A ``max_map_bytes`` that lets so many of seven maps be computed at once."""
    program = fc.ISNet(model, "original")._programs[model.training][0]
    env = program.run_forward(model, x)[: program.lowered.slots]
    limits = (2**k // 4 * m for k in range(2, 40) for m in (4, 5, 6, 7))
    return next(v for v in limits if fc.ISNet(model, "original", max_map_bytes=v)._chunk(env, 7) == maps)


def count_relevance_calls(net):
    calls, run = [], net._relevance

    def counted(*args):
        calls.append(args)
        return run(*args)

    net._relevance = counted
    return calls


def test_original_in_chunks_with_batch_statistics():
    """The backward computes each part again, not the forward: BatchNorm's running statistics move once."""
    tracked = {}
    for limit in (None, 1):
        model, data = golden_nets.load("seqbn")
        net = fc.ISNet(model.train(), "original", max_map_bytes=limit)
        out = net(data["x"], relevance=True)
        (out.heatmaps**2).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        tracked[limit] = [out.heatmaps.detach(), *model.buffers()], grads
    for got, want in zip(tracked[1][0], tracked[None][0]):
        close(got, want)
    close_grads(tracked[1][1], tracked[None][1])


def test_original_explains_every_class():
    model, x = classifier(4), rand(2, 3, 8, 8)
    out = explain(model, "original", x)
    assert out.explained.tolist() == [[0, 1, 2, 3]] * 2
    for c in range(4):
        close(out.heatmaps[:, c : c + 1], explain(model, "selective", x, target=c).heatmaps)


def test_maps_of_original_sum_to_duals_epsilon_map():
    model, x = classifier(4), rand(2, 3, 8, 8)
    out = explain(model, "dual", x)
    assert out.explained.tolist() == [[-1, -1]] * 2
    close(out.heatmaps[:, 1], explain(model, "original", x).heatmaps.sum(1))


# ---- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_target(variant):
    """One int, a class a sample, several a sample, any integer dtype: epsilon maps of those logits, whatever the variant."""
    model, x = classifier(4), rand(3, 3, 8, 8)
    maps = explain(model, "original", x).heatmaps
    rows = torch.arange(3)[:, None]
    for target in (2, torch.tensor([0, 3, 1]), torch.tensor([[0, 1], [3, 3], [2, 0]]), torch.tensor([1, 2, 3]).int()):
        out = explain(model, variant, x, target=target)
        index = torch.full((3, 1), target) if isinstance(target, int) else target.long().view(3, -1)
        assert torch.equal(out.explained, index)
        assert out.explained.dtype == torch.int64
        close(out.heatmaps, maps[rows, index])


@pytest.mark.parametrize(
    ("target", "error", "text"),
    [
        (4, ValueError, "target is 4 and the model has 4 classes"),
        (-1, ValueError, "target is -1 and the model has 4 classes"),
        (True, TypeError, "target must be an int or an integer tensor .* got bool"),
        ([0, 1, 2], TypeError, "target must be an int or an integer tensor .* got list"),
        (torch.zeros(3), TypeError, r"target must hold class indices \(int64\), got torch.float32"),
        (torch.zeros(3, dtype=torch.bool), TypeError, "got torch.bool"),
        (torch.zeros(2, dtype=torch.long), ValueError, r"target must be \[N\] or \[N, K\] with N=3, got \(2,\)"),
        (torch.zeros(3, 1, 1, dtype=torch.long), ValueError, r"got \(3, 1, 1\)"),
        (torch.zeros(3, dtype=torch.long, device="meta"), ValueError, "target is on meta and the logits are on cpu: move"),
    ],
)
def test_target_errors(target, error, text):
    with pytest.raises(error, match=text):
        explain(classifier(4), "selective", rand(3, 3, 8, 8), target=target)


@pytest.mark.parametrize("bad", [[0, 4, 1], [-1, 0, 1]])
def test_target_beyond_the_classes(bad):
    """Values are looked at when the input's are: on the first call, always or never."""
    model, x = classifier(4), rand(3, 3, 8, 8)
    for check in ("first", "always"):
        net = fc.ISNet(model, "selective", check=check)
        with pytest.raises(ValueError, match=r"target holds .* and the model has 4 classes"):
            net(x, relevance=True, target=torch.tensor(bad))
    with pytest.raises(ValueError, match=r"target holds .* and the model has 4 classes"):
        fc.relevance(model, x, torch.tensor(bad))


def test_target_needs_relevance():
    with pytest.raises(ValueError, match="target= says what to explain: pass relevance=True with it"):
        fc.ISNet(classifier(4))(rand(1, 3, 8, 8), target=1)


# ---- two classes: the wall between the answers -------------------------------------------------------------------------


def linear(weights: list[list[float]], background: float = 0.0):
    """A linear net without bias, ``[[w]]`` a row for each class; the last pixel is the background, the others are 1 and foreground."""
    pixels = len(weights[0])
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 2, bias=False)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(weights))
    x = torch.ones(1, 1, 1, pixels, dtype=torch.float64)
    x[..., -1] = background
    masks = torch.ones(1, 1, pixels)
    masks[..., -1] = 0
    return model, x, masks


def gradient(variant: str, weights: list[list[float]], draws: int = 20_000, background: float = 0.0, **loss: float) -> torch.Tensor:
    """Expected gradient of the loss with respect to the weights, over draws; the answer should be class 0."""
    model, x, masks = linear(weights, background)
    net = fc.ISNet(model, variant, first_layer="epsilon", generator=generator(), check="never")
    out = net(x.expand(draws, -1, -1, -1), relevance=True)
    fc.ISNetLoss(**loss)(out, torch.zeros(draws, dtype=torch.long), masks.expand(draws, -1, -1))[0].backward()
    return model[1].weight.grad


def pull(variant: str, w2: float, weights: list[list[float]]) -> float:
    """Which way a step moves l_0 - l_1; > 0: to the right answer."""
    step = -gradient(variant, weights, P=0.7, w2=w2).sum(1)
    return float(step[0] - step[1])


@pytest.mark.parametrize(
    ("variant", "w2", "right"),
    [("selective", 3.0, False), ("selective", 0.12, False), ("selective", 0.1, True),
     ("contrast", 3.0, True), ("stochastic", 3.0, True), ("original", 3.0, True)],
)  # fmt: skip
def test_the_foreground_loss_of_selective_holds_a_wrong_answer_unless_w2_is_small(variant, w2, right):
    """docs/tool.md, "Two classes": at the turn, 2 P w2 / C1 against (1 - P) / 2; a foreground of one sign."""
    assert (pull(variant, w2, [[1.500, 0.0], [1.501, 0.0]]) > 0) == right


def test_a_foreground_of_both_signs_has_no_wall():
    assert pull("selective", 3.0, [[4.0, -2.0, 0.0], [2.0, 0.001, 0.0]]) > 0


ANGLES = (torch.arange(2000, dtype=torch.float64) + 0.5) * math.tau / 2000  # at none of them is a map's total exactly 0 below
CIRCLE = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
DECISION = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64) / 2**0.5


def expected(directions, difference, mean, leak=0.0, **loss):
    """Heatmap loss, expected over the directions ``v``, and the total loss's slopes along ``(l_0 - l_1) / sqrt(2)`` and along
    ``(l_0 + l_1) / sqrt(2)``, at which the logits are given as ``[B]``; class 0 is right. To it: a slope < 0.

    A class's map is its logit, 3/4 and 1/4 of it on two pixels of foreground, and 1/5 on one of background; there the classes differ
    by ``leak`` besides."""
    at = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in (difference, mean)], -1).view(-1, 2).requires_grad_()
    logits = torch.stack([at[:, 1] + at[:, 0], at[:, 1] - at[:, 0]], 1) / 2**0.5
    maps = logits[:, :, None] * torch.tensor([0.75, 0.25, 0.2], dtype=torch.float64)
    maps = maps + torch.tensor([[0, 0, leak], [0, 0, -leak]])
    points, n = len(at), len(directions)
    maps = torch.einsum("vc,bcp->bvp", directions, maps).reshape(-1, 1, 1, 1, 3)
    out = SimpleNamespace(logits=logits[:, None].expand(-1, n, -1).reshape(-1, 2), heatmaps=maps, hidden={})
    labels, masks = torch.zeros(points * n, dtype=torch.long), torch.tensor([[[1.0, 1.0, 0.0]]]).expand(points * n, -1, -1)
    total, parts = fc.ISNetLoss(**loss)(out, labels, masks)
    (slopes,) = torch.autograd.grad(total * points, at)
    return parts.heatmap.item(), *slopes.unbind(1)


def test_contrast_of_two_classes_pulls_to_neither_answer_at_the_turn():
    """At the defaults, wherever the logits' mean is: the decision's map is held with 2 P w2 / C1 = 4.2 against the classification
    loss's (1 - P) / sqrt(2) = 0.21; a draw of the whole circle with nothing."""
    means = torch.tensor([0.3, 1.0, 3.0])
    classification = torch.tensor(-0.3 / 2**0.5, dtype=torch.float64)
    close(expected(CIRCLE, torch.zeros(3), means)[1], classification.expand(3), 1e-3)
    close(expected(DECISION, torch.full((3,), -1e-6), means, w1=0)[1], (4.2 + classification).expand(3), 1e-3)


def test_expected_heatmap_loss_of_two_classes_depends_on_the_length_of_the_logits_alone():
    """Nothing to be climbed along the circle from any answer to any other; and it falls outwards, up to C2."""
    values = []
    for r in (0.2, 0.9, 1.5, 5.0, 20.0):
        around = [expected(CIRCLE, r * math.cos(t), r * math.sin(t))[0] for t in (0.0, 0.5, 1.7, 3.0, 4.4)]
        assert max(around) - min(around) < 1e-3
        values.append(around[0])
    assert all(near > far + 1e-3 for near, far in itertools.pairwise(values))
    sure, turn = (expected(DECISION, math.cos(t), math.sin(t), w1=0)[0] for t in (0.0, math.pi / 2))
    assert turn - sure == pytest.approx(3), "the decision alone: w2 higher where the answer turns"


def test_a_wrong_answer_of_two_classes_is_always_led_out():
    """A mean of C1 or more (along its unit vector): downhill on the straight way to the right answer. Less: downhill, too, round the
    origin. The decision alone stays where it is."""
    steps = torch.linspace(-4, 1, 101)
    for mean in (1.0, 2.0, -1.0):
        assert (expected(CIRCLE[::5], steps, torch.full((101,), mean))[1] < 0).all()
        assert (expected(DECISION, steps, torch.full((101,), mean))[1] > 0).any()
    ends = {}
    for name, directions in (("circle", CIRCLE[::5]), ("decision", DECISION)):
        difference, mean = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)
        for _ in range(100):
            _, a, b = expected(directions, difference, mean)
            difference, mean = difference - 0.3 * a, mean - 0.3 * b
        ends[name] = difference.item()
    assert ends["circle"] > 0.5
    assert ends["decision"] < -0.5


def test_the_background_loss_is_a_wall_of_its_own_around_the_decision():
    """At any w2: a ratio to the foreground's mean, which is 0 at the turn, while relevance that is left in the background is not."""
    far, near = ([expected(v, d, 1.0, leak=0.1, w2=0)[0] for v in (DECISION, CIRCLE)] for d in (-0.1, -1e-4))
    assert near[0] - far[0] > 3
    assert abs(near[1] - far[1]) < 0.1
