"""Which implementation runs: names, messages, the extension's absence and (a stand-in for) its presence."""

import importlib
import subprocess
import sys
import types
import warnings

import pytest
import torch
from torch import nn

import fisnet_cuda as fc
from fisnet_cuda import _backend, ops, reference

on_cpu_only = pytest.mark.skipif(_backend._load()[0] is not None, reason="the CUDA kernels are installed here")


@pytest.fixture
def extension(monkeypatch):
    """A stand-in for the compiled extension: one kernel that says when it ran."""
    ran = []

    def phi_scale(*args):
        ran.append("phi_scale")
        return reference.phi_scale(*args)

    module = types.ModuleType("fisnet_cuda._kernels")
    module.phi_scale = phi_scale
    monkeypatch.setattr(_backend, "_load", lambda: (module, ""))
    return ran


@pytest.fixture
def fresh():
    """Forget what was loaded and warned of, before and after."""
    for cached in (_backend._load, _backend._warn_once):
        cached.cache_clear()
    yield
    for cached in (_backend._load, _backend._warn_once):
        cached.cache_clear()


def test_importing_needs_no_gpu_and_initialises_none():
    """Importing neither loads the extension nor touches CUDA, matplotlib or scikit-learn."""
    code = (
        "import sys, torch, fisnet_cuda as fc; assert not torch.cuda.is_initialized();"
        "assert not {'matplotlib', 'sklearn', 'torchvision', 'fisnet_cuda._kernels'} & set(sys.modules); print(fc.__version__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == fc.__version__


@on_cpu_only
def test_without_the_extension():
    for backend in ("auto", "reference"):
        assert _backend.check_backend(backend) == backend
        assert _backend.kernel("phi_scale", backend, torch.ones(1)) is reference.phi_scale
        assert _backend.implementation("phi_scale", backend) == "reference"
    with pytest.raises(RuntimeError, match=r"backend='cuda': .* Use backend='auto' or 'reference'; see fisnet_cuda.info\(\)"):
        _backend.check_backend("cuda")
    with pytest.raises(RuntimeError, match="backend='cuda'"):
        fc.ISNet(nn.Sequential(nn.Linear(2, 2)), backend="cuda")


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cuda, got 'gpu'"):
        _backend.check_backend("gpu")


@on_cpu_only
def test_the_reason_is_kept(monkeypatch, fresh):
    """What failed is told in info(), in the warning and in the error; a broken extension is not a missing one."""
    assert "no compiled CUDA kernels" in fc.info()["reason"]
    real = importlib.import_module

    def broken(name, *rest):
        if name == "fisnet_cuda._kernels":
            raise OSError("libcudart.so.12: cannot open shared object file")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", broken)
    _backend._load.cache_clear()
    assert "failed to load: libcudart.so.12" in fc.info()["reason"]
    with pytest.raises(RuntimeError, match="libcudart"):
        _backend.check_backend("cuda")

    def needs_another(name, *rest):
        if name == "fisnet_cuda._kernels":
            raise ModuleNotFoundError("No module named 'nvidia'", name="nvidia")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", needs_another)
    _backend._load.cache_clear()
    assert "failed to load: No module named 'nvidia'" in fc.info()["reason"]


class OnGPU:
    """As much of a CUDA tensor as the dispatcher looks at."""

    device = torch.device("cuda", 0)


@on_cpu_only
def test_a_cuda_tensor_without_the_extension_warns_once(fresh):
    with pytest.warns(fc.FisnetWarning, match=r"CUDA tensors run the PyTorch reference: .*fisnet_cuda.info\(\)"):
        assert _backend.kernel("phi_scale", "auto", OnGPU) is reference.phi_scale
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _backend.kernel("dgrad", "auto", OnGPU) is reference.dgrad
        assert _backend.kernel("phi_scale", "reference", OnGPU) is reference.phi_scale
    with pytest.raises(RuntimeError, match="backend='cuda': "):
        _backend.kernel("phi_scale", "cuda", OnGPU)


def test_auto_goes_by_device(extension):
    cpu = torch.ones(1)
    assert _backend.kernel("phi_scale", "auto", cpu) is reference.phi_scale
    assert _backend.kernel("phi_scale", "auto", OnGPU) is not reference.phi_scale
    assert _backend.kernel("phi_scale", "cuda", OnGPU) is not reference.phi_scale
    assert _backend.kernel("phi_scale", "reference", OnGPU) is reference.phi_scale
    assert _backend.kernel("dgrad", "auto", OnGPU) is reference.dgrad, "an op without a kernel"
    with pytest.raises(RuntimeError, match="backend='cuda' needs tensors on a GPU, got one on cpu: move the input"):
        ops.phi_scale(torch.ones(1, 1), torch.ones(1, 1), 0.1, backend="cuda")
    assert not extension


def test_plan_tells_what_runs(extension):
    net = fc.ISNet(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)))
    assert "phi_scale:reference" in str(net.plan("cpu"))
    assert "phi_scale:cuda" in str(net.plan("cuda"))
    assert "dgrad:reference" in str(net.plan("cuda"))
    assert "phi_scale:reference" in str(fc.ISNet(net.model, backend="reference").plan("cuda"))
    assert "phi_scale:cuda" in str(fc.ISNet(net.model, backend="cuda").plan())


def test_info():
    info = fc.info()
    assert {"fisnet_cuda", "python", "torch", "torch_cuda", "gpu", "reference", "kernels", "reason", "remedy"} <= set(info)
    assert info["fisnet_cuda"] == fc.__version__
    assert info["torch"] == torch.__version__
    assert all(isinstance(v, (str, bool)) for v in info.values())
    assert bool(info["reason"]) == bool(info["remedy"]) == (not info["kernels"])


@on_cpu_only
def test_reference_holds_every_kernel_that_ops_ask_for():
    """The names in ``kernel("...")`` calls of ops/ exist in the reference."""
    import pathlib
    import re

    source = "".join(p.read_text() for p in pathlib.Path(ops.__file__).parent.glob("*.py"))
    names = set(re.findall(r'kernel\("(\w+)"', source))
    assert len(names) >= 8
    assert not [n for n in names if not hasattr(reference, n)]
