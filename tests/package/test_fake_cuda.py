"""The CUDA path without a GPU: whole ISNet steps over fake tensors on "cuda", eagerly and by torch.compile(fullgraph=True).

Autograd asks for an accelerator before it runs a backward pass over CUDA tensors. fake_cuda.cpp is one that computes nothing; it
must be there before torch is, so each run has a process of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from package import tools

from fisnet_cuda import _backend

HERE = Path(__file__).parent
# operators that a training step of the little net rightly does without: {name: why}
UNREACHED = {"fisnet::build_info": "tells about the build"}
CHANGES = {"fisnet::bn_statistics": ("running_mean", "running_var")}  # operands that operators change in place

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing: no stand-in for a CUDA device can be built"),
    pytest.mark.skipif(
        torch.version.cuda is not None and not torch.cuda.is_available(), reason="torch has CUDA here, but there is no GPU"
    ),
]
needs_kernels = pytest.mark.skipif(_backend._load()[0] is None, reason=f"the extension is not built: {_backend._load()[1]}")


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """The options that give the CPU build of torch a CUDA device."""
    if torch.version.cuda is not None:
        return []
    library, where = tmp_path_factory.mktemp("stand_in") / "fake_cuda.so", Path(torch.__file__).parent
    tools.run(
        "g++", "-shared", "-fPIC", "-std=c++20", f"-I{where}/include", HERE / "fake_cuda.cpp", "-o", library, f"-L{where}/lib",
        "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{where}/lib",
    )  # fmt: skip
    return ["--stand-in", str(library)]


def steps(*arguments):
    done = subprocess.run(
        [sys.executable, str(HERE / "fake_cuda_step.py"), *arguments], capture_output=True, text=True, cwd=tools.ROOT,
        env=os.environ | {"PYTHONPATH": str(tools.ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def registered():
    """The operators of the extension."""
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fisnet::")}


@needs_kernels
def test_every_operator_is_used_by_a_training_step(stand_in):
    """Forward, loss and backward of all variants, in both memory layouts and with fused products: every operator is reached."""
    seen, said = steps(*stand_in, "--ways", "eager", "channels_last", "fused")
    assert "run the PyTorch reference" not in said
    for variant in ("original", "selective", "stochastic", "contrast"):
        assert {"fisnet::phi_scale", "fisnet::phi_scale_backward"} <= set(seen[variant]["eager"]), variant
    for variant, ways in seen.items():
        assert ways["eager"] == ways["channels_last"], variant
    reached = {name for ways in seen.values() for way in ways.values() for name in way}
    assert registered() - reached == set(UNREACHED), "an operator that no training step uses, or no longer needs its excuse"


@needs_kernels
@pytest.mark.parametrize("variant", ["original", "selective", "stochastic", "dual", "contrast"])
def test_a_compiled_step(stand_in, variant):
    """fullgraph=True; its graphs, forward and backward, hold the operators that run eagerly."""
    seen, _ = steps(*stand_in, "--variants", variant, "--ways", "eager", "compiled", "fused", "fused compiled")
    assert seen[variant]["compiled"] == seen[variant]["eager"]
    assert seen[variant]["fused compiled"] == seen[variant]["fused"] != seen[variant]["eager"]


def test_a_step_without_kernels(stand_in):
    """The same over the reference: it says so once, and compiles without a graph break."""
    seen, said = steps(*stand_in, "--without-kernels", "--variants", "selective", "--ways", "eager", "compiled")
    assert seen == {"selective": {"eager": [], "compiled": []}}
    assert said.count("CUDA tensors run the PyTorch reference") == 1


@needs_kernels
def test_every_operator_is_complete():
    """Registered for CUDA, with a fake kernel that gives shapes, and with a schema that says what it changes."""
    names = registered() - {"fisnet::build_info"}
    assert names
    for name in sorted(names):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), f"{name} has no CUDA implementation"
        assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None, f"{name} has no fake kernel"
        schema = getattr(torch.ops.fisnet, name.removeprefix("fisnet::")).default._schema
        changed = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
        assert changed == set(CHANGES.get(name, ())), f"{name} writes to {changed}"
        assert not any(r.alias_info for r in schema.returns), f"{name} returns an operand"
    assert torch.ops.fisnet.build_info()
