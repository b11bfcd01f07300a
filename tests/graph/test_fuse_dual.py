"""Dual's two products of a layer as one instruction: what is joined and what is not, and that results stay what they were."""

import copy

import golden_nets
import pytest
import torch
from graph import fused, test_zplus, zoo
from helpers import GraphNet, close, close_grads, rand, random_ops, randomise
from torch import nn

import fisnet_cuda as fc
from fisnet_cuda import ops as fused_ops
from fisnet_cuda.graph import fuse_dual
from fisnet_cuda.graph.fuse import _Program
from fisnet_cuda.graph.ir import Instr, Slot, slots_in


def block(bn=True):
    """A stem, a block with a skip, and one without; in it two layers in a row."""
    ops = [("stem", nn.Conv2d(3, 4, 3, 2, 1), "x"), ("relu0", nn.ReLU(), "stem")]

    def conv(index, source, groups=1, stride=1):
        ops.append((f"conv{index}", nn.Conv2d(4, 4, 3, stride, 1, groups=groups, bias=not bn), source))
        if bn:
            ops.append((f"bn{index}", nn.BatchNorm2d(4), f"conv{index}"))
        return f"bn{index}" if bn else f"conv{index}"

    ops.append(("relu1", nn.ReLU(), conv(1, "relu0")))
    ops.append(("add", "add", (conv(2, "relu1"), "relu0")))
    ops.append(("relu2", nn.ReLU(), "add"))
    ops.append(("relu3", nn.ReLU(), conv(3, "relu2", groups=2)))
    ops.append(("relu4", nn.ReLU(), conv(4, "relu3", stride=2)))
    ops += [("mean", nn.AdaptiveAvgPool2d(1), "relu4"), ("flat", "flatten", "mean"), ("head", nn.Linear(4, 3), "flat")]
    return ops


def net(ops=None, variant="dual", **options):
    return fc.ISNet(randomise(GraphNet(ops or block())), variant, check="never", **options)


def of(instrs, *names):
    return {i.layer: i for i in instrs if i.op in names}


# ---- what is joined ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bn", [True, False])
def test_no_product_of_the_two_maps_stays_alone(bn):
    forward, relevance = fused.instructions(net(block(bn)))
    ops = [i.op for i in (*forward, *relevance)]
    assert sum(i.fn in (fuse_dual._transposed, fuse_dual._transposed_phi) for i in relevance) == 5
    assert "conv^T" not in ops
    assert "conv+^T" not in ops
    assert ops.count("linear+") == 1  # the start of the z+ map
    assert "conv+" not in ops
    made = [i for i in forward if "dual_" in i.op]
    assert len(made) == 4  # the stem's input has bounds, not a sign: z^B
    for instr in made:
        P = instr.outs[3 if bn else 1]
        assert [i.op for i in relevance if P in slots_in(i.operands)] == ["z+"]


def test_adjoints_change_hands():
    """Where both maps leave a ReLU for one layer and nothing else; the block's end hands to the next layer and the skip."""
    found = net()
    forward, relevance = fused.instructions(found)
    handing = [i for i in relevance if dict(i.options).get("passes_on") or i.fn is fuse_dual._dual_phi_handed_over]
    taking = [i for i in relevance if i.fn in (fuse_dual._transposed, fuse_dual._transposed_phi) and i.operands[-1] is not None]
    assert len(handing) == len(taking) == 2
    assert {i.layer for i in handing} == {"relu1", "relu3"}
    readers = [s for i in (*forward, *relevance) for s in slots_in(i.operands)]
    for maker, reader in zip(handing, taking):
        if reader.fn is fuse_dual._transposed_phi:
            (first,) = [i for i in relevance if i.outs == tuple(slots_in(reader.operands[:2]))]
            assert slots_in(first.operands[:2]) == list(maker.outs)
        else:
            assert slots_in(reader.operands[:2]) == list(maker.outs)
        assert all(readers.count(slot) == 1 for slot in maker.outs)
        assert reader.operands[-1][1:] == (maker.operands[-2] if maker.fn is fuse_dual._transposed_phi else maker.operands[2:])[1:]


def test_what_callers_read_is_not_handed_over():
    found = net(supervise=("bn1", "bn3"))
    _, relevance = fused.instructions(found)
    assert not any(dict(i.options).get("passes_on") for i in relevance)


def test_one_map_alone_stays_as_it_is():
    for variant in ("selective", "original"):
        forward, relevance = fused.instructions(net(variant=variant))
        assert not any("dual" in i.op for i in (*forward, *relevance))
    # a z+ rule without Dual: the sums come from the forward, the products stay single
    forward, relevance = fused.instructions(net(variant="original", rules="epsilon_plus"))
    assert any("dual_conv" in i.op for i in forward)
    assert not any(i.fn is fuse_dual._transposed for i in relevance)


def test_a_signed_input_keeps_its_two_products():
    ops = [("stem", nn.Conv2d(3, 4, 3), "x"), ("conv", nn.Conv2d(4, 4, 3), "stem"), ("relu", nn.ReLU(), "conv"),
           ("flat", "flatten", "relu"), ("head", nn.Linear(4 * 25, 3), "flat")]  # fmt: skip
    forward, relevance = fused.instructions(net(ops))
    assert not any("dual_conv" in i.op for i in (*forward, *relevance))


def pair(first, second, between=()):
    """Two products of one layer around other instructions."""
    geometry = fused_ops.linear_geometry()
    weight = Instr("W+", None, ("W", None), (5,), "fc", "z+")
    one = Instr("linear^T", fused_ops.transposed, (Slot(1), "W", geometry, (), None), (10,), "fc", "epsilon", "dgrad")
    plus = Instr("linear+^T", fused_ops.transposed, (Slot(2), Slot(5), geometry, (), None), (11,), "fc", "z+", "dgrad")
    made = {"one": one, "plus": plus}
    return _Program([weight, made[first], *between, made[second]], frozenset())


def read(slot, out):
    return Instr("reads", None, (Slot(slot),), (out,), "other")


@pytest.mark.parametrize(("first", "second"), [("one", "plus"), ("plus", "one")])
@pytest.mark.parametrize("between", ["nothing", "operand", "reader", "both"])
def test_where_the_pair_goes(first, second, between):
    """Behind what it reads and before what reads it; where there is no such place the two stay apart."""
    out, s = (10, 2) if first == "one" else (11, 1)
    made = {"nothing": (), "operand": (read(0, s),), "reader": (read(out, 20),), "both": (read(0, s), read(out, 20))}[between]
    p = pair(first, second, made)
    for position, instr in enumerate(p.instrs):
        if instr is not None:
            fuse_dual.dual_transposed(p, position)
    ops = [i.op for i in p.instrs if i is not None]
    if between == "both":
        assert "dual_linear^T" not in ops
        return
    at = [i.op if i else None for i in p.instrs].index("dual_linear^T")
    assert p.instrs[at].outs == (10, 11)
    assert all(p.maker.get(slot, -1) < at for slot in slots_in(p.instrs[at].operands))
    assert all(reader > at for slot in (10, 11) for reader in p.readers.get(slot, []))


# ---- results -------------------------------------------------------------------------------------------------------------


def compare(monkeypatch, make, x, grad=True, bound=1e-9, **options):
    """Without the patterns; with them, bit for bit; and with the fused ops switched on."""
    model = make()
    options = {"variant": "dual", "check": "never", **options}
    with monkeypatch.context() as m:
        fused.without(m)
        plain = fc.ISNet(copy.deepcopy(model), **options)
        want, want_grads = fused.run(plain, x, grad)
    joined = fc.ISNet(copy.deepcopy(model), **options)
    got, got_grads = fused.run(joined, x, grad)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.heatmaps, want.heatmaps)
    if grad:
        close_grads(got_grads, want_grads, 1e-14)
    with monkeypatch.context() as m:
        calls = fused.forced(m)
        forced = fc.ISNet(copy.deepcopy(model), **options)
        got, got_grads = fused.run(forced, x, grad)
    close(got.logits, want.logits)
    close(got.heatmaps, want.heatmaps, bound)
    for name, h in want.hidden.items():
        close(got.hidden[name], h, bound)
    if grad:
        close_grads(got_grads, want_grads, bound)
    for (name, b), (_, c) in zip(forced.named_buffers(), plain.named_buffers(), strict=True):
        close(b.double(), c.double(), what=name)
    return calls


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", golden_nets.NAMES)
def test_golden_networks(monkeypatch, name, training, grad):
    model, data = golden_nets.load(name)
    calls = compare(monkeypatch, lambda: model.train(training), data["x"], grad)
    wanted = {"dual_transposed_phi"} | ({"dual_fprop", "dual_fprop_adjoint", "dual_transposed_sum"} if grad else set())
    assert wanted <= set(calls)
    assert grad or "dual_fprop" not in calls  # one z+ sum at a time


@pytest.mark.parametrize("seed", range(12))
def test_random_networks(monkeypatch, seed):
    ops = random_ops(seed, bn=seed % 4 != 3)
    model = randomise(GraphNet(ops), seed).train(seed % 2 == 0)
    first_layer = ("zb", "epsilon")[seed // 2 % 2]
    compare(monkeypatch, lambda: model, rand(2, 3, 9, 9, seed=seed), first_layer=first_layer)


@pytest.mark.parametrize(
    "options",
    [
        {"eps": fc.rules.Epsilon(0.05, relative=True)},
        {"supervise": ("relu1", "bn2", "relu3")},
        {"variant": "original", "rules": "epsilon_plus"},
        {"variant": "original", "rules": "epsilon_plus", "max_map_bytes": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("bn", [True, False])
def test_options(monkeypatch, options, bn):
    if not bn and "supervise" in options:
        options = {"supervise": ("relu1", "conv2", "relu3")}
    model = randomise(GraphNet(block(bn)))
    compare(monkeypatch, lambda: model, rand(2, 3, 9, 9), **options)


@pytest.mark.parametrize("name", [n for n in test_zplus.CASES if n not in ("GroupNorm", "LayerNorm")])
def test_rarer_networks_beside_the_oracle(monkeypatch, name):
    cls, words, shape, firsts, modes, others = test_zplus.CASES[name]
    fused.forced(monkeypatch)
    model = randomise(cls(), 3).train(modes[-1])
    test_zplus.compare(model, test_zplus.oracle(model, words, others), rand(*shape, seed=1), firsts[-1])


@pytest.mark.parametrize("name", [n for n in zoo.CASES if "Shared" in n or "Dense" in n or "Group" in n])
def test_layers_used_twice(monkeypatch, name):
    make, x = zoo.build(name)
    compare(monkeypatch, lambda: make().double(), x.double(), first_layer="epsilon", example_input=x.double())


def test_a_batch_norm_scale_of_zero_and_a_frozen_layer(monkeypatch):
    model = randomise(GraphNet(block()))
    assert any((m.weight == 0).any() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    model.conv3.weight.requires_grad_(False)
    model.bn3.weight.requires_grad_(False)
    compare(monkeypatch, lambda: model, rand(2, 3, 9, 9))


def test_w_plus_is_not_made_where_the_fused_ops_run(monkeypatch):
    made = []
    real = fuse_dual._signed_positive
    monkeypatch.setattr(fuse_dual, "_signed_positive", lambda *w: made.append(w) or real(*w))
    x = rand(2, 3, 9, 9)
    found = net()
    fused.run(found, x)
    assert len(made) == 4
    made.clear()
    fused.forced(monkeypatch)
    fused.run(found, x)
    assert not made


def test_sums_that_a_batch_norm_of_several_maps_reads(monkeypatch):
    """A dense block's new maps: their sums stay instructions of relevance, which find them made by the forward."""
    found = fc.ISNet(golden_nets.build("densenets").double(), "dual", check="never")
    forward, relevance = fused.instructions(found)
    late = [i for i in relevance if i.fn is fuse_dual._sum]
    assert len(late) == 6
    for instr in late:
        (P,) = instr.outs
        assert [P in i.outs for i in forward if i.layer == instr.layer and "conv" in i.op] == [True]
        assert instr.operands[0] == Slot(P)
    made = []
    real = fuse_dual.rule_ops.plus_product
    monkeypatch.setattr(fuse_dual.rule_ops, "plus_product", lambda *w: made.append(w) or real(*w))
    x = rand(2, 3, 32, 32)
    fused.run(found, x)
    assert len(made) == 6
    fused.forced(monkeypatch)
    fused.run(found, x)
    assert len(made) == 6


def test_mixed_precision(monkeypatch):
    model, data = golden_nets.load("resnet18s")
    model, x = model.float().train(), data["x"].float()
    plain = fc.ISNet(copy.deepcopy(model), "dual", check="never")
    forced = fc.ISNet(copy.deepcopy(model), "dual", check="never")

    def step(found):
        with torch.autocast("cpu", torch.bfloat16):
            out = found(x, relevance=True)
        (out.heatmaps.float().square().mean() + out.logits.float().square().mean()).backward()
        return out.heatmaps.float(), [p.grad for p in found.parameters()]

    want, _ = step(plain)
    exact = fc.ISNet(copy.deepcopy(model), "dual", check="never")(x, relevance=True).heatmaps
    fused.forced(monkeypatch)
    got, grads = step(forced)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads)
    usual = (want - exact).norm()
    assert (got - exact).norm() <= 2 * usual


# ---- compiled ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [False, True])
def test_compiled_without_a_graph_break(monkeypatch, on):
    torch._dynamo.reset()
    if on:
        fused.forced(monkeypatch, spy=False)  # a side effect that no compiler follows
    found, x = net(), rand(2, 3, 9, 9)
    want, want_grads = fused.run(found, x)
    found.zero_grad()
    compiled = torch.compile(lambda x: found(x, relevance=True)[:2], fullgraph=True, backend="aot_eager")
    logits, heatmaps = compiled(x)
    weights = torch.linspace(-1, 2, heatmaps.numel(), dtype=x.dtype).view(heatmaps.shape)
    ((heatmaps * weights).sum() + heatmaps.square().sum() + logits.square().sum()).backward()
    close(heatmaps.detach(), want.heatmaps.detach())
    close_grads({n: p.grad for n, p in found.model.named_parameters()}, want_grads)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x)
    torch._dynamo.reset()


def test_plan_says_what_runs():
    plan = str(net().plan("cpu"))
    assert "dual_conv_bn_relu" in plan
    assert "dual_conv^T" in plan
    assert "dual_transposed_phi:" in plan
