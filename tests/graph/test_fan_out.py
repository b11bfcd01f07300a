"""One output per consumer: who reads which slot, what stays in memory, and that nothing else changes."""

import golden_nets
import pytest
import torch
from helpers import GraphNet, close, close_grads, rand, randomise
from torch import Tensor, nn

import fisnet_cuda as fc
from fisnet_cuda.graph import program
from fisnet_cuda.graph.fan_out import JOINS, fan_out
from fisnet_cuda.graph.ir import Instr, Slot, slots_in

VARIANTS = ("original", "selective", "stochastic", "dual", "contrast")


def block():
    """A BatchNorm before a ReLU with three consumers, and one behind an addition."""
    return [
        ("stem", nn.Conv2d(3, 4, 3, 2, 1), "x"),
        ("stem_relu", nn.ReLU(), "stem"),
        ("conv", nn.Conv2d(4, 4, 3, 1, 1), "stem_relu"),
        ("bn", nn.BatchNorm2d(4), "conv"),
        ("relu", nn.ReLU(), "bn"),
        ("conv2", nn.Conv2d(4, 4, 3, 1, 1), "relu"),
        ("bn2", nn.BatchNorm2d(4), "conv2"),
        ("add", "add", ("bn2", "relu")),
        ("relu2", "relu", "add"),
        ("mean", nn.AdaptiveAvgPool2d(1), "relu2"),
        ("flat", "flatten", "mean"),
        ("head", nn.Linear(4, 3), "flat"),
    ]


def net(ops=None, variant="selective", **options):
    return fc.ISNet(randomise(GraphNet(ops or block())), variant, **options)


def instructions(net):
    lowered = net._programs[True][0].lowered
    return [*lowered.forward, *lowered.relevance]


def producers(net):
    return [i for i in instructions(net) if i.kernel == "bn_act"]


def copies(instr):
    return dict(instr.options).get("copies", 1)


def aliases(instr):
    """The slots behind an instruction's own results."""
    return instr.outs[len(instr.outs) - copies(instr) + 1 :]


# ---- the pass ------------------------------------------------------------------------------------------------------------


def handed_over(instr):
    return dict(instr.options).get("handed_over", False)


def made(outs=(1, 2, 3), **kw):
    return Instr("bn_relu", None, (Slot(0),), outs, "bn", kernel="bn_act", **kw)


def reads(*operands, op="conv", out=9):
    return Instr(op, None, operands, (out,), op)


@pytest.mark.parametrize(
    ("readers", "protected", "want"),
    [
        ([], set(), []),
        ([(1,)], set(), [(1,)]),
        ([(1,), (1,)], set(), [(20,), (1,)]),
        ([(1,), (7,), (1,), (1,)], set(), [(20,), (7,), (21,), (1,)]),
        ([(1,), (1,)], {1}, [(20,), (21,)]),
        ([(1,)], {1}, [(20,)]),
        ([(1,)] * 6, set(), [(20,), (21,), (22,), (1,), (1,), (1,)]),
        ([(1, 1), (1,)], set(), [(20, 21), (1,)]),  # no Function gets one tensor twice
        ([(2,), (3,), (2,)], set(), [(2,), (3,), (2,)]),  # statistics are constants
    ],
    ids=str,
)
def test_who_reads_what(readers, protected, want):
    relevance = tuple(reads(*map(Slot, slots)) for slots in readers)
    (first,), after, slots = fan_out((made(),), relevance, protected, 20)
    assert [tuple(slots_in(i.operands)) for i in after] == want
    assert slots == 20 + len({s for part in want for s in part if s >= 20})
    assert first.outs == (1, 2, 3, *range(20, slots))
    assert copies(first) == slots - 20 + 1


def test_looks_are_no_consumers():
    """Shapes and detached scales have no gradient: they read the value's own slot."""
    forward = (made(), reads(Slot(1), op="size"), reads(Slot(1)))
    relevance = (reads(Slot(1), op="relative_epsilon"), reads((Slot(5), (Slot(1),)), op="concat"))
    forward, relevance, slots = fan_out(forward, relevance, frozenset(), 20)
    assert slots == 21
    assert [i.operands for i in (*forward[1:], *relevance)] == [(Slot(1),), (Slot(20),), (Slot(1),), ((Slot(5), (Slot(1),)),)]


def test_other_instructions_stay():
    instrs = (reads(Slot(0), op="conv", out=1), reads(Slot(1)), reads(Slot(1)))
    assert fan_out(instrs, (), frozenset(), 20) == (instrs, (), 20)


# ---- in a program --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_alias_has_one_reader(variant):
    for model in (GraphNet(block()), golden_nets.build("densenets")):
        found = fc.ISNet(model, variant)
        readers = [s for i in instructions(found) for s in slots_in(i.operands)]
        made = producers(found)
        assert any(copies(i) > 1 for i in made)
        for instr in made:
            assert len(aliases(instr)) == copies(instr) - 1 < JOINS["bn_act"]
            assert all(readers.count(slot) == 1 for slot in aliases(instr))
            if copies(instr) < JOINS["bn_act"]:
                seen = [i for i in instructions(found) if instr.outs[0] in slots_in(i.operands) and i.op not in ("size", "shape")]
                assert sum(not handed_over(i) for i in seen) <= 1


def test_aliases_of_a_block():
    """The block's first ReLU: next convolution, skip and relevance; its second: pool and relevance."""
    first, second = producers(net())
    assert (first.op, copies(first)) == ("conv_bn_relu", 3)
    assert (second.op, copies(second)) == ("conv_bn_add_relu", 2)


def test_aliases_of_relevance():
    """What the block's last ReLU hands on goes through the block and past it: two readers of one ``s``."""
    ops = [
        ("stem", nn.Conv2d(3, 4, 3), "x"),
        ("relu0", nn.ReLU(), "stem"),
        ("pool", nn.AvgPool2d(3, 1, 1), "relu0"),
        ("add", "add", ("pool", "relu0")),
        ("relu1", nn.ReLU(), "add"),
        ("conv1", nn.Conv2d(4, 4, 3), "relu1"),
        ("relu2", nn.ReLU(), "conv1"),
        ("flat", "flatten", "relu2"),
        ("head", nn.Linear(4 * 25, 3), "flat"),
    ]
    found = [i for i in instructions(net(ops)) if i.kernel in ("phi_scale", "transposed_phi") and copies(i) > 1]
    assert [(i.layer, i.op, len(i.outs)) for i in found] == [("conv1", "conv^T_phi", 2)]


def test_supervised_layers_and_logits_keep_their_slots():
    ops = [*block()[:-1], ("head", nn.Linear(4, 3), "flat"), ("last", nn.BatchNorm1d(3), "head")]
    found = net(ops, supervise=("relu", "last"))
    x = rand(2, 3, 9, 9)
    out = found(x, relevance=True)
    close(out.logits, found.model(x))
    assert set(out.hidden) == {"relu", "last"}


class Recorder:
    """Which memory is alive after each instruction of a program."""

    def __init__(self, monkeypatch):
        self.live = []
        real = program._execute

        def execute(calls, env):
            for call in calls:
                real((call,), env)
                self.live.append({v.untyped_storage().data_ptr() for v in env if isinstance(v, Tensor)})

        monkeypatch.setattr(program, "_execute", execute)


def test_memory_lives_as_long_as_before(monkeypatch):
    """The same storages are alive after every instruction, with aliases and without; but for an activation whose phi's
    adjoint is handed over, which is there for one instruction more."""

    def counts(found):
        recorder = Recorder(monkeypatch)
        with torch.no_grad():
            found(rand(2, 3, 9, 9), relevance=True)
        monkeypatch.undo()
        return [len(alive) for alive in recorder.live]

    with_aliases = counts(net(check="never"))
    monkeypatch.setattr(program, "fan_out", lambda forward, relevance, protected, slots: (forward, relevance, slots))
    without = counts(net(check="never"))
    assert max(with_aliases) == max(without)
    assert {more - less for more, less in zip(with_aliases, without)} == {0, 1}


def test_the_bound_on_maps_counts_an_activation_once():
    """Original's chunks follow the memory of what is kept, which aliases share."""
    found = net(variant="original")
    built = found._programs[True][0]
    env = built.run_forward(found.model, rand(2, 3, 9, 9))
    kept = [v for v in env[: built.lowered.slots] if isinstance(v, Tensor) and v.dim() > 1]
    assert len({v.data_ptr() for v in kept}) == len(kept)
    own = [s for i in producers(found) for s in aliases(i)]
    assert own
    assert min(own) >= built.lowered.slots


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_results_are_those_without(monkeypatch, variant, training):
    """Bitwise on the reference path: it gets the same tensor each time."""

    def run():
        found = net(variant=variant, generator=torch.Generator().manual_seed(0)).train(training)
        out = found(rand(2, 3, 9, 9), relevance=True)
        ((out.heatmaps**2).sum() + (out.logits**2).sum()).backward()
        return out, {n: p.grad for n, p in found.model.named_parameters()}

    out, grads = run()
    monkeypatch.setattr(program, "fan_out", lambda forward, relevance, protected, slots: (forward, relevance, slots))
    want, want_grads = run()
    assert torch.equal(out.heatmaps, want.heatmaps)
    assert torch.equal(out.logits, want.logits)
    close_grads(grads, want_grads, 1e-14)


def test_the_reference_gives_the_same_tensor():
    """No alias, no view, no copy: nothing that autograd would have to go through."""
    found = net()
    built = found._programs[True][0]
    env = built.run_forward(found.model, rand(2, 3, 9, 9).requires_grad_())
    kept = [[env[s] for s in (i.outs[0], *aliases(i)) if env[s] is not None] for i in producers(found)]
    assert all(v is values[0] for values in kept for v in values)


def test_plan_says_what_runs():
    plan = str(net().plan("cpu"))
    assert "bn_act:reference" in plan
    assert "copies" not in plan
