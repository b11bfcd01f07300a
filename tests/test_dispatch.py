"""The choice between candidates: the logic with a fake timer and fake kernels, on the CPU."""

import functools
import json
import math
import subprocess
import sys
import threading
import time
import types
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fisnet_cuda as fc
from fisnet_cuda import _backend, dispatch, reference
from fisnet_cuda.dispatch import cache as cache_file
from fisnet_cuda.dispatch import choose, key, table, timing
from fisnet_cuda.dispatch.__main__ import main
from fisnet_cuda.dispatch.cache import Cache
from fisnet_cuda.dispatch.choose import Choice, Dispatcher, select
from fisnet_cuda.dispatch.key import OPS, Key
from fisnet_cuda.dispatch.policy import Policy
from fisnet_cuda.dispatch.timing import CudaTimer, not_real
from fisnet_cuda.dispatch.verify import Verifier, exact, relative_error
from fisnet_cuda.ops import library
from fisnet_cuda.reference import conv_geometry, linear_geometry

FREE = Policy()


class FakeTimer:
    """Times by tile ("" is candidate 0), one for each round; counts what it was asked."""

    def __init__(self, times, reason=""):
        self.times, self.reason, self.rounds, self.asked = times, reason, 0, []

    def cannot(self, values):
        return self.reason

    def round(self, candidates):
        tiles = [c.keywords.get("tile", "") for c in candidates]
        self.asked.append(tiles)
        self.rounds += 1
        return [self.times[tile][(self.rounds - 1) % len(self.times[tile])] for tile in tiles]


def fake_kernel(name="linear_act", tiles=("a",), spoil=None, serves=""):
    """A fused kernel of ``name``: the reference in the operands' dtype, with outputs that ``spoil(outputs, tile)`` changes."""

    def kernel(*operands, tile=None, poison=False, **options):
        if not torch.compiler.is_compiling():
            kernel.ran.append((tile, poison))
        outputs = getattr(reference, name)(*operands, **options)
        return spoil(outputs, tile) if spoil else outputs

    kernel.ran, kernel.serves, kernel.tiles = [], lambda *o, **k: serves, lambda *o, **k: tiles
    return kernel


def dense(dtype=torch.bfloat16, n=4):
    generator = torch.Generator().manual_seed(n)
    x, W = (torch.randn(shape, generator=generator).to(dtype) for shape in ((n, 6), (5, 6)))
    return x, W, linear_geometry()


def dispatcher(kernel, times, path=None, reason=""):
    return Dispatcher(lambda name: kernel, FakeTimer(times, reason), Cache(path))


def chosen(d, operands=None, options=None, policy=FREE, name="linear_act"):
    return d.choose(name, operands or dense(), options or {}, policy)


@pytest.fixture(autouse=True)
def own_state(monkeypatch, tmp_path):
    """The user's cache and environment are not the tests'."""
    monkeypatch.setenv("FISNET_CACHE", str(tmp_path / "user" / "dispatch.json"))
    monkeypatch.delenv("FISNET_DISPATCH", raising=False)
    dispatch.reset()
    yield
    dispatch.reset()


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error", fc.FisnetWarning)
        yield


@pytest.fixture
def precision():
    before = [(m, m.fp32_precision) for m in (torch.backends.cudnn.conv, torch.backends.cuda.matmul)]
    yield
    for m, value in before:
        m.fp32_precision = value
    torch.use_deterministic_algorithms(False)


# -- selection


@pytest.mark.parametrize(
    ("rounds", "choice"),
    [
        ([0.97, 0.97], "fused/a"),
        ([0.969, 0.969], "fused/a"),
        ([0.971, 0.971], "library"),
        ([0.5, 0.971], "library"),
        ([0.971, 0.5], "library"),
        ([1.5, 1.5], "library"),
        ([math.nan, math.nan], "library"),
    ],
)
def test_three_percent_in_both_rounds(rounds, choice, quiet):
    d = dispatcher(fake_kernel(), {"": [1.0, 1.0], "a": rounds})
    assert chosen(d) == Choice(choice, True)
    assert d.timer.asked == [["", "a"]] * 2, "two rounds, candidates in turns"


times = st.floats(1e-3, 1e3)


@given(st.tuples(times, times), st.dictionaries(st.sampled_from(["fused/a", "fused/b", "fused/c"]), st.tuples(times, times)))
def test_a_slower_kernel_is_never_chosen(first, others):
    choice = select({"library": first, **others}, list(others))
    fast = {n for n, t in others.items() if all(1 - x / x0 >= 0.03 - 1e-9 for x, x0 in zip(t, first))}
    surely = {n for n, t in others.items() if all(1 - x / x0 >= 0.03 + 1e-9 for x, x0 in zip(t, first))}
    assert choice in fast | {"library"}
    assert choice != "library" or not surely
    if choice != "library":
        worst = {n: max(x / x0 for x, x0 in zip(t, first)) for n, t in others.items()}
        assert worst[choice] <= min(worst[n] for n in fast) + 1e-9


def test_the_fastest_of_several():
    d = dispatcher(fake_kernel(tiles=("a", "b", "c")), {"": [1.0], "a": [0.9], "b": [0.8, 0.82], "c": [0.7, 0.99]})
    assert chosen(d).name == "fused/b"


def test_measured_once():
    d = dispatcher(fake_kernel(), {"": [1.0], "a": [0.5]})
    assert [chosen(d).name for _ in range(3)] == ["fused/a"] * 3
    assert d.timer.rounds == 2
    assert chosen(d, dense(n=7)).name == "fused/a"
    assert d.timer.rounds == 4, "another shape, another key"


# -- verification


def wrong(outputs, tile):
    return tuple(out * 1.5 for out in outputs)


def unwritten(outputs, tile):
    outputs[0].view(-1)[3] = math.nan
    return outputs


def raising(outputs, tile):
    raise RuntimeError("tile too large")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (wrong, r"the relative error of output 0 is 5\.0\de-01, the library's \d\.\d+e-03"),
        (unwritten, "1 of 20 elements of output 0 are not written"),
        (raising, "it raises RuntimeError: tile too large"),
        (lambda outputs, tile: (outputs[0].float(),), "output 0 is torch.float32 .* the library's is torch.bfloat16"),
        (lambda outputs, tile: (outputs[0][:2],), r"output 0 is torch.bfloat16 \[2, 5\]"),
        (lambda outputs, tile: (None,), "output 0 is none"),
    ],
)
def test_a_wrong_kernel_is_out_with_one_warning(spoil, why, tmp_path):
    kernel = fake_kernel(tiles=("a", "b"), spoil=lambda o, tile: spoil(o, tile) if tile == "a" else o)
    d = dispatcher(kernel, {"": [1.0], "a": [0.1], "b": [0.9]}, tmp_path / "c.json")
    with pytest.warns(fc.FisnetWarning, match=rf"linear_act\(x=bfloat16\[4,6\].*fused/a is not used here, .*{why}") as caught:
        assert [chosen(d).name for _ in range(2)] == ["fused/b"] * 2
    assert len(caught) == 1
    assert d.timer.asked == [["", "b"]] * 2, "what is wrong is not timed"
    again = dispatcher(kernel, {}, tmp_path / "c.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(again).name == "fused/b", "the cache knows"
    (entry,) = again.cache.entries().values()
    assert list(entry["blacklisted"]) == ["fused/a"]


def test_verification_is_with_poison_and_timing_without():
    kernel = fake_kernel()
    chosen(dispatcher(kernel, {"": [1.0], "a": [0.5]}))
    assert kernel.ran == [("a", True)]


def test_where_the_library_is_exact_one_rounding_is_allowed():
    x, W = torch.ones(1, 2, dtype=torch.float16), torch.eye(2, dtype=torch.float16)
    operands = (x, W, linear_geometry())
    v = Verifier("linear_act", operands, {}, exact("linear_act", operands, {}), library.linear_act(*operands), False)
    assert v.errors == [0.0]
    unit = torch.finfo(torch.float16).eps
    assert v.check((x + unit,))[1] == "", "one unit in the last place"
    assert "relative error" in v.check((x + 2 * unit,))[1]


def test_twice_the_librarys_error():
    x = torch.full((100,), 1.0, dtype=torch.bfloat16)
    v = Verifier("linear_act", (), {}, (x.double(),), (x + x * 2**-5,), False)
    assert v.check((x + x * 2**-4,))[1] == ""
    assert "relative error" in v.check((x + x * 2**-4 + x * 2**-6,))[1]


def test_relative_error():
    zero = torch.zeros(3)
    assert relative_error(zero, zero) == 0
    assert relative_error(zero + 1, zero) == math.inf
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


def test_exact_is_wider_than_the_products(precision):
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert exact("linear_act", dense(), {})[0].dtype == torch.float32
    assert exact("linear_act", dense(torch.float32), {})[0].dtype == torch.float64
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert exact("linear_act", dense(), {})[0].dtype == torch.float64, "float32 products would be TF32"


def test_where_the_library_is_noise_nothing_is_excused():
    x = torch.rand(100, dtype=torch.float64)
    v = Verifier("linear_act", (), {}, (x, x), ((0.6 * x).half(), x.half()), False)
    assert not v.cannot()
    assert "output 0" in v.check((torch.zeros_like(x).half(), x.half()))[1]
    assert v.check(((0.61 * x).half(), x.half()))[1] == ""
    assert "noise" in Verifier("linear_act", (), {}, (x,), (torch.zeros_like(x).half(),), False).cannot()


@pytest.mark.parametrize("value", [0.0, math.inf])
def test_a_result_that_tells_nothing_decides_nothing(value, tmp_path, quiet):
    d = dispatcher(fake_kernel(), {"": [1.0], "a": [0.5]}, tmp_path / "c.json")
    x, W, geometry = dense()
    for _ in range(2):
        assert chosen(d, (torch.full_like(x, value), W, geometry)) == Choice("library", False)
    assert chosen(d).name == "fused/a"
    assert d.timer.rounds == 2
    zero = (torch.zeros(9, 6).bfloat16(), W, geometry)
    assert [chosen(d, zero).settled for _ in range(choose.PATIENCE + 2)] == [False] * choose.PATIENCE + [True] * 2, "patience ends"


def test_every_op_can_be_verified(quiet):
    """Real operands of each of the ops: a kernel that is the reference itself passes; each wrong output is found."""
    g = conv_geometry(2, 1, 1, 1, 1)
    t = functools.partial(torch.rand, dtype=torch.float32)
    a, s, W, c = t(2, 3, 5, 5), t(4, 3, 5, 5), t(3, 3, 3, 3) - 0.5, t(3)
    calls = {
        "linear_act": ((a, W, g, c, c, a, True), {}),
        "transposed_phi": ((s, W, g, (5, 5), c, a, 0.01), {"skip": s, "scale": c, "keep_s": False}),
        "fprop_adjoint": ((s, W, g, c, a, s, 0.01), {"join": s}),
        "dual_fprop": ((a, W, g, c.sign(), c, c), {}),
        "dual_transposed_phi": ((a, a, W, g, (5, 5), c, a, a, 0.01, 0.01), {}),
        "dual_fprop_adjoint": ((a, a, W, g, c, a, a, a, a, 0.01, 0.01), {}),
        "dual_transposed_sum": ((a, a, W, g, (5, 5), c.sign()), {}),
    }
    assert set(calls) == set(OPS)
    for name, (operands, options) in calls.items():
        first = getattr(library, name)(*operands, **options)
        v = Verifier(name, operands, options, exact(name, operands, options), first, True)
        assert not v.cannot()
        outputs = getattr(reference, name)(*operands, **options)
        assert v.check(outputs)[1] == "", name
        assert len(v.asked) == (1 if name == "transposed_phi" else len(outputs)), "a result that nobody may look at is not checked"
        for i in v.asked:
            spoiled = [*outputs]
            spoiled[i] = outputs[i] * 1.01
            assert f"output {i}" in v.check(tuple(spoiled))[1], name


# -- trouble


def test_out_of_memory_falls_back_with_one_warning(tmp_path):
    def full(outputs, tile):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    kernel = fake_kernel(spoil=full)
    d = dispatcher(kernel, {"": [1.0], "a": [0.5]}, tmp_path / "c.json")
    with pytest.warns(fc.FisnetWarning, match="could not be measured, candidate 0 runs. OutOfMemoryError") as caught:
        assert [chosen(d) for _ in range(2)] == [Choice("library", True)] * 2
    assert len(caught) == 1
    assert len(kernel.ran) == 1
    assert not d.cache.entries(), "another process may have more memory"


def test_an_error_of_the_timer_falls_back(monkeypatch):
    d = dispatcher(fake_kernel(), {"": [1.0], "a": [0.5]})
    monkeypatch.setattr(d.timer, "round", lambda candidates: 1 / 0)
    with pytest.warns(fc.FisnetWarning, match="could not be measured"):
        assert chosen(d).name == "library"
    assert d._tuning.acquire(blocking=False), "the lock is free again"


def test_nothing_is_measured_where_it_cannot_be(quiet, tmp_path):
    """During capture or a trace: the cached choice, else candidate 0, which is asked anew next time."""
    d = dispatcher(fake_kernel(), {"": [1.0], "a": [0.5]}, tmp_path / "c.json", reason="a CUDA graph being captured")
    assert chosen(d) == Choice("library", False)
    assert not d.timer.rounds
    d.timer.reason = ""
    assert chosen(d).name == "fused/a"
    d.timer.reason = "a CUDA graph being captured"
    assert chosen(d) == Choice("fused/a", True)


def test_another_thread_does_not_wait():
    d = dispatcher(fake_kernel(), {"": [1.0], "a": [0.5]})
    with d._tuning:
        assert chosen(d) == Choice("library", False)
    assert chosen(d).name == "fused/a"


@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_measuring_disturbs_nothing(around):
    seen = []

    def look(outputs, tile):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), outputs[0].requires_grad))
        return outputs

    x, W, geometry = dense()
    W = nn.Parameter(W)
    before, random = (x.clone(), W.detach().clone()), torch.get_rng_state()
    with around(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert chosen(dispatcher(fake_kernel(spoil=look), {"": [1.0], "a": [0.5]}), (x, W, geometry)).name == "fused/a"
        assert torch.is_autocast_enabled("cpu")
    assert seen == [(False, False, False)]
    assert torch.equal(x, before[0])
    assert torch.equal(W, before[1])
    assert torch.equal(random, torch.get_rng_state())
    assert W.grad is None


def test_what_has_no_kernel_or_is_not_served_is_settled_without_measuring(quiet):
    for kernel in (None, fake_kernel(serves="groups"), fake_kernel(tiles=())):
        d = dispatcher(kernel, {})
        assert chosen(d) == Choice("library", True)
        assert not d.timer.rounds


# -- the key


def test_the_key_holds_what_matters():
    x, W, g = torch.rand(2, 4, 5, 5), torch.rand(3, 4, 3, 3), conv_geometry(2, 1, 1, 1, 1)

    def of(*operands, **options):
        return str(Key.of("linear_act", operands, options))

    same = of(x, W, g)
    assert same == of(x.clone(), W + 1, g, skip=None)
    assert same == of(x, W=W, geometry=g)
    others = [
        of(x[:1], W, g),
        of(x.double(), W, g),
        of(x.to(memory_format=torch.channels_last), W, g),
        of(x.repeat(1, 1, 1, 2)[..., ::2], W, g),
        of(x, W, conv_geometry(2, 1, 1, 1, 2)),
        of(x, W, g, None, torch.rand(3)),
        of(x, W, g, relu=True),
    ]
    assert len({same, *others}) == len(others) + 1

    def eps(e):
        return str(Key.of("transposed_phi", (x, W, g, (5, 5), None, x, e), {}))

    assert eps(0.1) == eps(0.01)
    assert len({eps(0.1), eps(0.0), eps(torch.rand(2, 1, 1, 1))}) == 3


def test_settings_are_part_of_the_key(precision):
    conv = (torch.rand(2, 4, 5, 5), torch.rand(3, 4, 3, 3), conv_geometry(2, 1, 1, 1, 1))
    texts = set()
    for operands, module, other in (
        (conv, torch.backends.cudnn.conv, torch.backends.cuda.matmul),
        (dense(torch.float32), torch.backends.cuda.matmul, torch.backends.cudnn.conv),
    ):
        for value in ("ieee", "tf32"):
            module.fp32_precision, other.fp32_precision = value, "ieee"
            assert key.tf32("linear_act", operands, {}) == (value == "tf32")
            assert Key.of("linear_act", operands, {}).mode == value
            texts.add((dispatch.flags(), str(Key.of("linear_act", operands, {}))))
    torch.use_deterministic_algorithms(True)
    assert Key.of("linear_act", dense(), {}).mode == "deterministic"
    texts.add((dispatch.flags(), str(Key.of("linear_act", dense(torch.float32), {}))))
    assert len(texts) == 5


def test_both_of_torchs_tf32_settings_are_read():
    code = (
        "import torch; from fisnet_cuda.dispatch.key import flags\n"
        "torch.backends.cudnn.allow_tf32 = False; torch.set_float32_matmul_precision('high'); print(*flags()[:2])\n"
        "torch.backends.cudnn.conv.fp32_precision = 'tf32'; torch.backends.fp32_precision = 'ieee'; print(*flags()[:2])\n"
        "torch.backends.cudnn.allow_tf32 = True; print(*flags()[:2])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    assert found[0].split()[0] != "tf32"
    assert found[0].split()[1] == "tf32"
    assert len(found) == 4, "and none of the mixtures raises"


def test_float32_kernels_are_candidates_only_where_tf32_is_allowed(precision, quiet):
    kernel = fake_kernel()
    d = dispatcher(kernel, {"": [1.0], "a": [0.5]})
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert chosen(d, dense(torch.float32)) == Choice("library", True)
    assert not d.timer.rounds
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert chosen(d, dense(torch.float32)).name == "fused/a"


# -- overrides


def test_rules():
    p = Policy.parse("*=library, dual_*=fused ,linear_act=-fused/64*,dual_fprop=-fused")
    assert p.forced("linear_act") == "library"
    assert p.forced("dual_fprop") == "fused"
    assert p.allowed("linear_act", ["fused/64x64", "fused/128x64"]) == ["fused/128x64"]
    assert not p.allows("dual_fprop", "fused/128x64")
    assert Policy.parse("") == Policy.parse(" , ") == FREE
    assert p.then(Policy.parse("*=fused")).forced("linear_act") == "fused"


@pytest.mark.parametrize("text", ["fused", "linear_act=", "=fused", "linear_act=fast", "conv=fused", "*=fused/", "*=-library", "*=-"])
def test_bad_rules(text, monkeypatch):
    with pytest.raises(ValueError, match=r"FISNET_DISPATCH: .*linear_act, transposed_phi, .*Candidates: library, fused, fused/<tile>"):
        Policy.parse(text)
    with pytest.raises(ValueError, match=r"forced\(...\): "), dispatch.forced(text):
        pass


def test_forced_is_neither_measured_nor_verified(quiet):
    kernel = fake_kernel(tiles=("a", "b"), spoil=wrong)
    d = dispatcher(kernel, {"": [1.0], "a": [9.0], "b": [9.0]})
    for rules, name in (
        ("*=library", "library"),
        ("*=fused", "fused/a"),
        ("*=fused/b", "fused/b"),
        ("*=fused,*=-fused/a", "fused/b"),
        ("linear_*=fused/[b-z]", "fused/b"),
    ):
        assert chosen(d, policy=Policy.parse(rules)) == Choice(name, True)
        assert chosen(d, dense(torch.float32), policy=Policy.parse(rules)).name == name
    assert not d.timer.rounds
    assert not kernel.ran


@pytest.mark.parametrize(
    ("kernel", "rules", "why"),
    [
        (None, "*=fused", "has no kernel here"),
        (fake_kernel(serves="groups"), "*=fused", r"does not serve this call \(groups\)"),
        (fake_kernel(), "*=fused/c", "is none of fused/a"),
        (fake_kernel(), "*=fused,*=-fused", "has no tile for this call that is not forbidden"),
    ],
)
def test_what_cannot_be_forced_says_so_once(kernel, rules, why):
    d = dispatcher(kernel, {})
    with pytest.warns(fc.FisnetWarning, match=f"linear_act is forced to fused.*{why}; candidate 0 runs") as caught:
        assert [chosen(d, dense(n=n), policy=Policy.parse(rules)).name for n in (3, 4)] == ["library"] * 2
    assert len(caught) == 1


def test_forbidden_kernels_never_run(tmp_path, quiet):
    kernel = fake_kernel(tiles=("a", "b"))
    d = dispatcher(kernel, {"": [1.0], "a": [0.5], "b": [0.8]}, tmp_path / "c.json")
    no_a = Policy.parse("*=-fused/a")
    assert chosen(d, policy=no_a).name == "fused/b"
    assert kernel.ran == [("b", True)]
    assert chosen(d).name == "fused/a", "allowed again, it is measured"
    assert d.timer.asked[2:] == [["", "a", "b"]] * 2
    assert chosen(d, policy=no_a).name == "fused/b", "from what was measured"
    assert chosen(d, policy=Policy.parse("*=-fused")).name == "library"
    assert d.timer.rounds == 4


# -- the cache


def test_round_trip(tmp_path):
    times = {"": [2.0, 2.5], "a": [1.0, 1.5]}
    chosen(dispatcher(fake_kernel(), times, tmp_path / "new" / "c.json"))
    d = dispatcher(fake_kernel(), {}, tmp_path / "new" / "c.json")
    assert chosen(d).name == "fused/a"
    assert not d.timer.rounds
    (entry,) = d.cache.entries().values()
    assert entry["medians"] == {"library": [2.0, 2.5], "fused/a": [1.0, 1.5]}
    assert entry["margins"] == {"fused/a": pytest.approx(0.4)}
    assert entry["errors"].keys() == {"library", "fused/a"}
    assert entry["operands"]["x"] == "bfloat16[4,6]"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["c.json"], "no temporary file is left"


def test_a_stored_choice_whose_tile_is_gone_is_measured_again(tmp_path):
    chosen(dispatcher(fake_kernel(), {"": [1.0], "a": [0.5]}, tmp_path / "c.json"))
    d = dispatcher(fake_kernel(tiles=("b",)), {"": [1.0], "b": [0.5]}, tmp_path / "c.json")
    assert chosen(d).name == "fused/b"


def test_other_versions_and_gpus_are_kept_and_not_used(tmp_path, monkeypatch):
    path = tmp_path / "c.json"
    chosen(dispatcher(fake_kernel(), {"": [1.0], "a": [0.5]}, path))
    for name, value in (("versions", lambda: "torch 9"), ("gpu", lambda device: "another GPU")):
        monkeypatch.setattr(key, name, value)
        d = dispatcher(fake_kernel(), {"": [1.0], "a": [2.0]}, path)
        assert chosen(d).name == "library"
        assert d.timer.rounds == 2
    monkeypatch.undo()
    d = dispatcher(fake_kernel(), {}, path)
    assert chosen(d).name == "fused/a"
    assert len(d.cache.entries()) == 3


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[]", b'{"format": 1}', b'{"format": 1, "entries": {"x": 3}}', b'{"format": 1, "entries": []}']
)
def test_a_corrupt_file_warns_once_and_is_replaced(tmp_path, content):
    path = tmp_path / "c.json"
    path.write_bytes(content)
    d = dispatcher(fake_kernel(), {"": [1.0], "a": [0.5]}, path)
    with pytest.warns(fc.FisnetWarning, match=r"c.json: cannot read: .*FISNET_CACHE") as caught:
        assert [chosen(d, dense(n=n)).name for n in (4, 7)] == ["fused/a"] * 2
    assert len(caught) == 1
    assert len(json.loads(path.read_text())["entries"]) == 2


@pytest.mark.parametrize("obstacle", ["a file for a folder", "a folder for the file"])
def test_an_unwritable_file_warns_once(tmp_path, obstacle):
    if obstacle == "a file for a folder":
        (tmp_path / "x").write_text("")
        path = tmp_path / "x" / "c.json"
    else:
        path = tmp_path / "x"
        path.mkdir()
    d = dispatcher(fake_kernel(), {"": [1.0], "a": [0.5]}, path)
    with pytest.warns(fc.FisnetWarning, match="Decisions hold for this process") as caught:
        assert [chosen(d, dense(n=n)).name for n in (4, 7, 4)] == ["fused/a"] * 3
    assert len(caught) == 1
    assert d.timer.rounds == 4


def test_another_format_is_not_read(tmp_path, quiet):
    path = tmp_path / "c.json"
    path.write_text('{"format": 2, "entries": {"x": 1}}')
    assert Cache(path).entries() == {}


WRITER = """
import sys, time
from pathlib import Path
from fisnet_cuda.dispatch.cache import Cache
cache, entry = Cache(Path(sys.argv[1])), {"choice": "library", "medians": {}, "blacklisted": {}}
Path(sys.argv[1] + sys.argv[2]).touch()
while len(list(Path(sys.argv[1]).parent.glob("c.json?"))) < 2:
    time.sleep(0.001)
for i in range(60):
    cache.put(f"{sys.argv[2]}{i}", entry)
"""


def test_two_processes_write_at_once(tmp_path):
    path = tmp_path / "c.json"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in "ab"]
    assert [w.wait(timeout=120) for w in writers] == [0, 0]
    assert set(json.loads(path.read_text())["entries"]) == {f"{name}{i}" for name in "ab" for i in range(60)}
    assert not [p for p in tmp_path.iterdir() if p.suffix in (".lock", ".tmp")]


def test_a_lock_left_behind_delays_and_does_not_hang(tmp_path, quiet):
    path, lock = tmp_path / "c.json", tmp_path / "c.json.lock"
    lock.touch()
    start = time.monotonic()
    Cache(path).put("k", {"choice": "library", "medians": {}, "blacklisted": {}})
    assert time.monotonic() - start < 5
    assert path.exists()
    with cache_file._turn(lock, patience=5.0, stale=0.0):  # its maker is gone
        assert lock.exists()
    assert not lock.exists()


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv("FISNET_CACHE", str(tmp_path / "mine.json"))
    assert cache_file.default_path() == tmp_path / "mine.json"
    monkeypatch.setenv("FISNET_CACHE", str(tmp_path))
    assert cache_file.default_path() == tmp_path / "dispatch.json"
    monkeypatch.delenv("FISNET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert cache_file.default_path() == tmp_path / "fisnet_cuda" / "dispatch.json"
    assert cache_file.default_path().parts[-2:] == ("fisnet_cuda", "dispatch.json")


# -- the entry point


@pytest.fixture
def kernels(monkeypatch):
    """Fake kernels of two ops that CPU tensors get: one more than the truth, so that it shows which ran."""

    def more(outputs, tile):
        return tuple(out + 1 for out in outputs)

    fakes = {name: fake_kernel(name, ("a", "b"), more) for name in ("linear_act", "transposed_phi")}
    monkeypatch.setattr(_backend, "_KERNELS", fakes)
    monkeypatch.setattr(_backend, "_load", lambda: (fakes, ""))
    monkeypatch.setattr(_backend, "KERNEL_DEVICES", frozenset({"cuda", "cpu"}))
    return fakes


@pytest.fixture
def measured(monkeypatch):
    """A dispatcher of the fake kernels whose timer prefers tile b; the results' difference is excused."""
    d = Dispatcher(_backend.fused, FakeTimer({"": [1.0], "a": [0.9], "b": [0.5]}), Cache(None))
    monkeypatch.setattr(dispatch, "_dispatcher", functools.cache(lambda: d))
    monkeypatch.setattr(choose.Verifier, "check", lambda self, outputs: ([0.0], ""))
    monkeypatch.setattr(d.timer, "cannot", lambda values: not_real([v for v in values if isinstance(v, torch.Tensor)]))
    return d


def ran(*operands, backend="auto", **options):
    """Which implementation of linear_act runs."""
    truth = reference.linear_act(*operands, **options)[0]
    out = dispatch.run("linear_act", backend, *operands, **options)[0]
    return {0.0: "library", 1.0: "fused"}[round(float((out - truth).mean()), 3)]


def test_the_reference_path(kernels, monkeypatch, quiet):
    operands = dense(torch.float64)
    with dispatch.forced("*=fused"):
        assert ran(*operands) == "fused"
        assert ran(*operands, backend="reference") == "library"
        monkeypatch.setattr(_backend, "KERNEL_DEVICES", frozenset({"cuda"}))
        assert ran(*operands) == "library"
        with pytest.raises(RuntimeError, match="backend='cuda' needs tensors on a GPU"):
            ran(*operands, backend="cuda")


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(_backend, "_load", lambda: (None, "not built"))
    monkeypatch.setattr(_backend, "KERNEL_DEVICES", frozenset({"cuda", "cpu"}))
    monkeypatch.setattr(_backend, "_warned", {"not built"})
    operands = dense(torch.float64)
    assert ran(*operands) == "library"
    with dispatch.forced("*=fused"), pytest.warns(fc.FisnetWarning, match="has no kernel here"):
        assert ran(*operands) == "library"


def test_emulated_tensors_are_not_measured(kernels, quiet):
    operands = dense(torch.float64)
    assert ran(*operands) == "library"
    with dispatch.forced("*=fused/b"):
        assert ran(*operands) == ran(*operands) == "fused"
    assert kernels["linear_act"].ran == [("b", False)] * 2
    assert ran(*operands) == "library"
    assert ran(*operands, relu=True, skip=torch.rand(4, 5, dtype=torch.float64)) == "library"


def test_the_environment_variable(kernels, monkeypatch, quiet):
    monkeypatch.setenv("FISNET_DISPATCH", "linear_act=fused/b")
    dispatch.reset()
    assert ran(*dense(torch.float64)) == "fused"
    with dispatch.forced("*=library"):
        assert ran(*dense(torch.float64)) == "library"
        with dispatch.forced("linear_*=fused"):
            assert ran(*dense(torch.float64)) == "fused"
    monkeypatch.setenv("FISNET_DISPATCH", "linear_act=quick")
    dispatch.reset()
    with pytest.raises(ValueError, match="FISNET_DISPATCH: 'quick'"):
        ran(*dense(torch.float64))


def test_forced_is_of_its_thread_and_of_its_backward_passes(kernels, monkeypatch):
    operands, found = dense(torch.float64), {}

    def other(what):
        found[what] = ran(*operands)

    def in_thread(what):
        thread = threading.Thread(target=other, args=(what,))
        thread.start()
        thread.join()

    with dispatch.forced("*=fused"):
        in_thread("thread")
        monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 3)  # as in a thread of autograd's
        in_thread("backward")
    in_thread("after")
    assert found == {"thread": "library", "backward": "fused", "after": "library"}


def test_the_first_use_measures_and_later_ones_do_not(kernels, measured):
    x, W, geometry = dense()
    for _ in range(3):
        dispatch.run("linear_act", "auto", x, W, geometry)
    assert kernels["linear_act"].ran == [("a", True), ("b", True), *[("b", False)] * 3]
    assert measured.timer.rounds == 2


def test_fake_tensors_take_the_cached_choice(kernels, measured):
    x, W, geometry = dense()

    def fake_ran():
        kernels["linear_act"].ran.clear()
        with FakeTensorMode() as mode:
            out = dispatch.run("linear_act", "auto", mode.from_tensor(x), mode.from_tensor(W), geometry)[0]
        assert out.shape == (4, 5)
        return kernels["linear_act"].ran

    assert fake_ran() == []
    assert not measured.timer.rounds
    dispatch.run("linear_act", "auto", x, W, geometry)
    assert fake_ran() == [("b", False)]


def test_what_is_no_real_computation():
    t = torch.ones(2)
    reasons = []

    def look(x):
        reasons.append(not_real([x]))
        return x

    assert not_real([t]) == not_real([nn.Parameter(t)]) == ""
    torch.func.vmap(look)(t)
    torch.func.grad(lambda x: look(x).sum())(t)
    torch.fx.experimental.proxy_tensor.make_fx(look)(t)
    with FakeTensorMode() as mode:
        look(t)
    look(mode.from_tensor(t))
    torch.jit.trace(look, t, check_trace=False)
    assert all(reasons), reasons
    assert not_real([t]) == ""


class Layer(torch.autograd.Function):
    """A dense layer whose products both go through `dispatch.run`."""

    @staticmethod
    def forward(ctx, x, W, relu):
        ctx.save_for_backward(x, W)
        return dispatch.run("linear_act", "auto", x, W, linear_geometry(), relu=relu)[0]

    @staticmethod
    def backward(ctx, g):
        x, W = ctx.saved_tensors
        return dispatch.run("transposed_phi", "auto", g, W, linear_geometry(), (), None, x, 0.5)[0], None, None


def step(function, x, W):
    x = x.clone().requires_grad_()
    y = function(x, W)
    y.sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("choice", ["library", "fused/a", "fused/b"])
def test_torch_compile_takes_the_cached_choice(kernels, measured, choice):
    """fullgraph: forward and backward; the choice is the one of eager code, and is never measured inside."""
    torch._dynamo.reset()
    x, W, _ = dense()
    measured.timer.times = {"": [1.0], "a": [2.0], "b": [2.0]} | ({choice[-1]: [0.5]} if choice != "library" else {})

    def function(x, W):
        return Layer.apply(x, W, False).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    first = step(compiled, x, W)
    assert not measured.timer.rounds
    with dispatch.forced("*=library"):
        assert all(map(torch.equal, first, step(function, x, W)))
    eager = step(function, x, W)
    assert measured.timer.rounds == 4
    torch._dynamo.reset()
    for k in kernels.values():
        k.ran.clear()
    assert all(map(torch.equal, eager, step(compiled, x, W)))
    assert all(map(torch.equal, eager, step(compiled, x, W)))
    assert {e["choice"] for e in measured.cache.entries().values()} == {choice}
    assert torch.equal(first[1], eager[1]) == (choice == "library")
    assert measured.timer.rounds == 4


@pytest.mark.parametrize("rules", ["*=library", "*=fused/b", "linear_act=fused,transposed_phi=library"])
def test_torch_compile_under_force(kernels, rules, quiet):
    torch._dynamo.reset()
    x, W, _ = dense(torch.float64)

    def function(x, W):
        return Layer.apply(x, W, True)

    with dispatch.forced(rules):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert all(map(torch.equal, step(function, x, W), step(compiled, x, W)))


def test_torch_compile_with_dynamic_sizes_runs_candidate_0(kernels, quiet):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, W: Layer.apply(x, W, False), fullgraph=True, backend="aot_eager", dynamic=True)
    with dispatch.forced("*=fused"):
        for n in (3, 4, 5):
            x, W, geometry = dense(torch.float64, n)
            assert torch.equal(step(compiled, x, W)[0], reference.linear_act(x, W, geometry)[0])


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_torch_compile_with_settings_that_change(kernels, dynamic, quiet):
    """Numbers that become symbolic in the second compilation."""
    torch._dynamo.reset()
    s, W, a = (torch.rand(n, m, dtype=torch.float64) for n, m in ((3, 4), (4, 5), (3, 5)))

    def function(eps, size):
        return dispatch.run("transposed_phi", "auto", s, W, linear_geometry(), (size,), None, a, eps)[0]

    compiled = torch.compile(function, fullgraph=True, backend="eager", dynamic=dynamic)
    with dispatch.forced("*=fused"):
        for i in range(3):
            more = compiled(0.1 + i, 3 + i) - reference.transposed_phi(s, W, linear_geometry(), (), None, a, 0.1 + i)[0]
            assert round(float(more.mean()), 3) in (0.0, 1.0)
    assert dynamic is not False or more.mean() > 0.5


# -- what is told


def test_plan_names(kernels, monkeypatch):
    on = functools.partial(_backend.implementation, "linear_act", "auto")
    assert on() == on(torch.device("cpu")) == "library|fused"
    assert _backend.implementation("linear_act", "reference") == "reference"
    assert _backend.implementation("dual_fprop", "auto") == "library", "no fused kernel"
    with dispatch.forced("*=fused/b"):
        assert on() == "fused/b"
    with dispatch.forced("*=-fused"):
        assert on() == "library"
    monkeypatch.setattr(_backend, "KERNEL_DEVICES", frozenset({"cuda"}))
    assert on(torch.device("cpu")) == "reference"


def test_report(kernels, measured, capsys, monkeypatch):
    dispatch.run("linear_act", "auto", *dense())
    assert dispatch.decisions() == [], "this machine has no GPU of that name"
    dispatch.report(everything=True)
    told = capsys.readouterr().out
    assert "linear_act: fused/b" in told
    assert "x bfloat16[4,6]" in told
    assert "* fused/b     500.0     500.0 us  +50.0%" in told
    (entry,) = dispatch.decisions(everything=True)
    entry = {**entry, "choice": "library", "medians": {}, "margins": {}, "blacklisted": {"fused/a": "it raises"}}
    assert "fused/a  out: it raises" in table.paragraphs([entry])


def test_command_line(capsys, tmp_path):
    path = cache_file.default_path()
    Cache(path).put("k", {"choice": "library", "medians": {}, "blacklisted": {}})
    main([])
    assert "no op has been measured" in capsys.readouterr().out
    main(["--clear"])
    assert str(path) in capsys.readouterr().out
    assert not path.exists()
    done = subprocess.run([sys.executable, "-m", "fisnet_cuda.dispatch"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "no op has been measured"
    assert not done.stderr


# -- the real timer


def test_the_timer_refuses_what_it_cannot_measure(monkeypatch):
    timer = CudaTimer()
    assert timer.cannot([torch.ones(1), None, 3]) == "tensors that are not on a GPU"
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = torch.empty(1, device="cuda")
    assert timer.cannot([on_gpu]) == "tensors without data"
    monkeypatch.setattr(timing, "not_real", lambda tensors: "")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert timer.cannot([on_gpu]) == "a CUDA graph being captured"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert timer.cannot([on_gpu]) == ""


def test_the_timer_runs_candidates_in_turns_behind_a_flush(monkeypatch):
    """What it asks of CUDA, and in which order; medians of each candidate's own spans."""
    log, waits = [], set()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return float(len(log))

    class Flush:
        def zero_(self):
            log.append("flush")

    def empty(size, *, dtype, device):
        assert size > 50 << 20
        return Flush()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(L2_cache_size=50 << 20))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep") or waits.add(cycles), raising=False)
    stream = types.SimpleNamespace(synchronize=lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch, "empty", empty)
    times = CudaTimer(runs=10).round([lambda: log.append("a"), lambda: log.append("b")])
    assert log[: 2 * timing.WARM_UP] == ["a"] * timing.WARM_UP + ["b"] * timing.WARM_UP
    turn = [step for name in "ab" for step in ("flush", "sleep", "event", name, "event")]
    assert log[2 * timing.WARM_UP :] == turn * 10 + ["wait"]
    assert times == [float(len(log))] * 2
    waits.clear()
    CudaTimer(runs=2).round([lambda: None, lambda: time.sleep(2e-3)])
    (wait,) = waits  # one for all candidates, by what the slowest asks of the host
    assert 2 * 2e-3 * timing.CLOCK <= wait <= timing.HEAD_START[1]
    assert [timing.head_start(s) for s in (0.0, 1e-3, 1.0)] == [200_000, 4_000_000, 20_000_000]


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return "cuda"


@pytest.mark.gpu
def test_cuda_timer(cuda):
    """More work takes longer, on the current stream; a buffer in L2 is not faster for it."""
    small, large = torch.rand(1 << 20, device=cuda), torch.rand(1 << 26, device=cuda)
    with torch.cuda.stream(torch.cuda.Stream()):
        times = CudaTimer().round([lambda: small.add(1), lambda: large.add(1)])
    assert 0 < times[0] < times[1] < 10


@pytest.mark.gpu
def test_measured_on_a_gpu(cuda, monkeypatch, tmp_path):
    """A kernel that computes the product four times loses; capture measures nothing."""

    def slow(outputs, tile):
        for _ in range(3):
            torch.cuda._sleep(1_000_000)
        return outputs

    x, W = torch.rand(64, 64, device=cuda).bfloat16(), torch.rand(64, 64, device=cuda).bfloat16()
    d = Dispatcher(lambda name: fake_kernel(spoil=slow), CudaTimer(), Cache(tmp_path / "c.json"))
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        captured = d.choose("linear_act", (x, W, linear_geometry()), {}, FREE)
    assert captured == Choice("library", False)
    assert d.choose("linear_act", (x, W, linear_geometry()), {}, FREE) == Choice("library", True)
    (entry,) = d.cache.entries().values()
    assert all(m < 0 for m in entry["margins"].values())
