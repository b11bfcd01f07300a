"""What only a GPU can show: streams, CUDA graphs, host syncs, large shared memory, the wheel beside torch's own libraries."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gpu.steps import VARIANTS, Step, distance

import fisnet_cuda as fc
from benchmarks import gpu_wheels
from benchmarks.gpu_step import captured
from fisnet_cuda import _backend, ops

ROOT = Path(__file__).resolve().parents[2]
LONG = 200_000_000  # GPU cycles, a tenth of a second
gpu = pytest.mark.gpu


@gpu
class TestStreams:
    def test_kernels_run_on_the_current_stream(self, cuda):
        """The operand is filled late on a side stream: a kernel on any other stream would read what was there before."""
        a = torch.rand(4, 8, 16, 16, device=cuda)
        new, g = torch.randn(4, 8, 16, 16, device=cuda), torch.zeros(4, 8, 16, 16, device=cuda)
        want = ops.phi_scale(new, a, 0.01)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG)
            g.copy_(new)
            got = ops.phi_scale(g, a, 0.01)
        start = time.perf_counter()
        stream.synchronize()
        assert time.perf_counter() - start > 0.01, "the kernel did not wait, or the host did"
        assert torch.equal(got, want)

    def test_a_whole_step_on_a_side_stream(self, cuda, deterministic):
        plain, aside = (Step("resnet18s", "dual", cuda) for _ in range(2))
        plain()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG)
            aside()
        stream.synchronize()
        for name, want in plain.results().items():
            assert torch.equal(aside.results()[name], want), name

    def test_many_streams_at_once(self, cuda):
        a, g = torch.rand(8, 64, 32, 32, device=cuda), torch.randn(8, 64, 32, 32, device=cuda)
        want = ops.phi_scale(g, a, 0.01)
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(8)]
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(ops.phi_scale(g, a, 0.01))
        torch.cuda.synchronize()
        assert all(torch.equal(f, want) for f in found)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_captured_step_replays_what_eager_computes(device, variant, optimizer, deterministic):
    """Forward, loss, backward, clipping and optimizer in one CUDA graph; on the CPU, where there are none, the same calls."""
    if device == "cpu" and (variant, optimizer) != ("selective", "sgd"):
        pytest.skip("one case emulated")
    eager, graph = (Step("resnet18s", variant, device, optimizer=optimizer) for _ in range(2))
    replay = captured(graph, device, graph.generator, warmup=3)
    for _ in range(3):
        eager()
    for round_ in range(3):
        eager()
        replay()
        if device == "cuda":
            torch.cuda.synchronize()
        assert torch.equal(graph.seen["explained"], eager.seen["explained"]), f"round {round_}"
        for name in ("logits", "heatmaps", "total"):
            assert distance(graph.seen[name], eager.seen[name]) <= 1e-3, f"{name}, round {round_}"
        assert distance(graph.weights(), eager.weights()) <= 1e-4, f"weights, round {round_}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_captured_step_sees_new_images(device, variant):
    """A replay reads its inputs anew."""
    if device == "cpu" and variant != "dual":
        pytest.skip("one case emulated")
    graph, eager = (Step("seqbn", variant, device) for _ in range(2))
    replay = captured(graph, device, graph.generator)
    for _ in range(3):
        eager()
    new = torch.rand(graph.x.shape, generator=torch.Generator().manual_seed(9)).to(device)
    for step in (graph, eager):
        step.x.copy_(new)
    replay()
    eager()
    assert distance(graph.seen["heatmaps"], eager.seen["heatmaps"]) <= 1e-3


@gpu
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("net", ["resnet18s", "densenets", "vgg"])
def test_no_host_sync_in_a_step(cuda, net, variant, precision):
    """The first step looks at values once, to check them; no later one waits for the GPU."""
    step = Step(net, variant, cuda, precision, optimizer="sgd")
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_the_guard_catches_a_sync(cuda):
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(3, device=cuda).sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("pixels", [(64, 72), (70, 70), (64, 80), (72, 72), (96, 100)])
def test_shared_memory_about_48_kb(cuda, pixels):
    """A block has 48 KB, static arrays included, unless its kernel asks for more: keys of 64x80 pixels take all of it."""
    R, mask = torch.randn(2, 1, 1, *pixels, device=cuda), torch.rand(2, 1, *pixels, device=cuda).round()
    settings = {"d": 0.99, "E": 1.0, "c1": 1.0, "c2": 5.0, "foreground": "hybrid", "normalization": "absRoIMean"}
    got, want = (ops.heatmap_loss(R, mask, backend=backend, **settings) for backend in ("cuda", "reference"))
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@gpu
def test_more_than_48_kb_of_shared_memory(cuda, tmp_path):
    """The step of a network with a 7x7 stem and a large map to rank: right, and with kernels that ask for more than 48 KB."""
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.cases import Setup, TrainingStep

    maps = {}
    for backend in ("auto", "reference"):
        setup = Setup("resnet18", batch=2, size=224, device=cuda)
        step = TrainingStep("selective", setup, update=False, backend=backend)
        with torch.no_grad():
            maps[backend] = step.net(step.images, relevance=True).heatmaps
    assert distance(maps["auto"], maps["reference"]) <= 1e-3
    step = TrainingStep("selective", setup, update=False)
    step()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    path = tmp_path / "trace.json"
    seen.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    ours = {e["name"]: e["args"].get("shared memory", 0) for e in events if "fisnet::" in e.get("name", "") and "args" in e}
    assert ours, "no kernel of ours ran"
    if max(ours.values()) <= 48 * 1024:
        pytest.skip(f"no kernel of this step asks for more than 48 KB (the most: {max(ours.values())} bytes)")


# ---- the library as it is installed --------------------------------------------------------------------------

PROGRAM = """
import sys, torch, fisnet_cuda as fc
from fisnet_cuda import _backend, ops, reference
info = fc.info()
assert info["kernels"], info["reason"]
assert sys.argv[1] in fc.__file__, fc.__file__
torch.manual_seed(0)
a, g = torch.rand(4, 8, 9, 7, device="cuda"), torch.randn(4, 8, 9, 7, device="cuda")
got = ops.phi_scale(g, a, 0.01)
assert "phi_scale" in _backend._load()[0]
torch.testing.assert_close(got, reference.phi_scale(g, a, 0.01)[1])
torch.testing.assert_close(ops.phi_scale(g.half(), a.half(), 0.01), got.half(), rtol=2e-2, atol=2e-2)
assert torch.mm(a.view(32, 63), a.view(32, 63).T).isfinite().all()  # torch's own CUDA works beside ours
libraries = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
assert any("libtorch_cuda" in name for name in libraries)
print(sum("libcudart" in name for name in libraries), "libcudart loaded")
"""


@gpu
def test_the_wheel_runs_beside_torchs_own_cudart(cuda, tmp_path):
    """Installed by itself, away from the checkout: it loads, finds torch's stream, and brings no second shared cudart."""
    wheels = [w for w in gpu_wheels.WHEELS.glob("fisnet_cuda-*.whl") if gpu_wheels.has_kernels(w)]
    if not wheels or gpu_wheels.record(gpu_wheels.WHEELS).get("kernels") != gpu_wheels.of_kernels():
        pytest.skip("no wheel of these sources here; `make gpu-wheels` makes it")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*pip, str(wheels[0])], check=True, capture_output=True)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(gpu_wheels.SITE)])}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    run = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    (library,) = tmp_path.glob("fisnet_cuda/_C*.so")
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True)
    assert "libcudart" not in needed.stdout


FIRST_LAUNCH = """
import torch
from torch.nn.functional import conv2d
from fisnet_cuda import dispatch
from fisnet_cuda.reference import conv_geometry
torch.manual_seed(0)
sizes = (2, 64, 20, 20), (64, 64, 3, 3)
x, W = (torch.randn(size, device="cuda").bfloat16().to(memory_format=torch.channels_last) for size in sizes)
W, graph = W / 24, torch.cuda.CUDAGraph()
want = conv2d(x, W, padding=1).relu()
with dispatch.forced("linear_act=fused/128x64"), torch.cuda.graph(graph):
    (y,) = dispatch.run("linear_act", "cuda", x, W, conv_geometry(2, 1, 1, 1, 1), relu=True)
graph.replay()
torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)
"""


@gpu
def test_a_kernels_first_launch_may_be_captured(cuda):
    """Loading it and asking for more than 48 KB then happen inside the capture."""
    done = subprocess.run([sys.executable, "-c", FIRST_LAUNCH], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@gpu
def test_every_kernel_is_built_for_this_gpu(cuda):
    """Attributes of every registered kernel can be read, so each has code that runs here; none uses local memory."""
    kernels = json.loads(torch.ops.fisnet.build_info())["kernels"]
    assert kernels
    for name, attributes in kernels.items():
        assert attributes, f"{name} has no code for this GPU"
        assert attributes["local"] == 0, f"{name} spills {attributes['local']} bytes"


@gpu
def test_plan_names_the_kernels(cuda):
    assert "cuda" in str(Step("resnet18s", "dual", cuda).net.plan())
    assert fc.info()["kernels"]
    assert _backend.kernel("phi_scale", "cuda", torch.empty(0, device=cuda)) is not fc.reference.phi_scale
