"""Which implementation runs: names, messages, the extension's absence and (a stand-in for) its presence."""

import importlib
import pathlib
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import fisnet_cuda as fc
from fisnet_cuda import _backend, ops, reference


@pytest.fixture
def extension(monkeypatch):
    """A stand-in for the compiled extension: one kernel that says when it ran."""
    ran = []

    def phi_scale(*args):
        ran.append("phi_scale")
        return reference.phi_scale(*args)

    kernels = {"phi_scale": phi_scale}
    monkeypatch.setattr(_backend, "_KERNELS", kernels)
    monkeypatch.setattr(_backend, "_load", lambda: (kernels, ""))
    return ran


@pytest.fixture
def no_extension(monkeypatch, fresh):
    """As if there were no compiled kernels, whether or not there are."""
    monkeypatch.setattr(_backend, "LIBRARY", _backend.LIBRARY.with_name("_C.missing.so"))


@pytest.fixture
def fresh():
    """Forget what was loaded and warned of, before and after."""
    _backend._load.cache_clear()
    _backend._warned.clear()
    yield
    _backend._load.cache_clear()
    _backend._warned.clear()


def test_importing_needs_no_gpu_and_initialises_none():
    """Importing neither loads the extension nor touches CUDA, matplotlib or scikit-learn."""
    code = (
        "import sys, torch, fisnet_cuda as fc; assert not torch.cuda.is_initialized();"
        "assert not {'matplotlib', 'sklearn', 'torchvision', 'fisnet_cuda.ops.cuda'} & set(sys.modules); print(fc.__version__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == fc.__version__


def test_without_the_extension(no_extension):
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


def test_the_reason_is_kept(no_extension):
    assert "no compiled CUDA kernels" in fc.info()["reason"] or _backend.build_note() == fc.info()["reason"]
    assert "FISNET_CUDA_BUILD=1 pip install --no-build-isolation" in fc.info()["remedy"]


def test_the_reason_of_the_build_is_told(no_extension, monkeypatch):
    monkeypatch.setattr(_backend, "build_note", lambda: "no CUDA toolkit was found")
    assert fc.info()["reason"] == "no CUDA toolkit was found"


@pytest.mark.parametrize("broken", ["library", "module"])
def test_a_broken_extension_is_not_a_missing_one(monkeypatch, fresh, tmp_path, broken):
    """What failed is told in info(), in the warning and in the error."""
    library = tmp_path / "_C.abi3.so"
    library.write_bytes(b"not a library")
    monkeypatch.setattr(_backend, "LIBRARY", library)
    if broken == "module":
        monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
        monkeypatch.setattr(importlib, "import_module", lambda name: 1 / 0)
    why = "division by zero" if broken == "module" else "ELF|too short"
    assert re.search(f"the CUDA kernels failed to load: .*({why})", fc.info()["reason"])
    with pytest.raises(RuntimeError, match=f"backend='cuda': the CUDA kernels failed to load: .*({why})"):
        _backend.check_backend("cuda")
    with pytest.warns(fc.FisnetWarning, match=f"failed to load: .*({why})"):
        assert _backend.kernel("phi_scale", "auto", OnGPU) is reference.phi_scale


class OnGPU:
    """As much of a CUDA tensor as the dispatcher looks at."""

    device = torch.device("cuda", 0)


def test_a_cuda_tensor_without_the_extension_warns_once(no_extension):
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
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    net = fc.ISNet(model, supervise=("3",))  # whose map is wanted before its phi, which then stays alone
    assert "phi_scale:reference" in str(net.plan("cpu"))
    assert "phi_scale:cuda" in str(net.plan("cuda"))
    assert "transposed_phi:library" in str(net.plan("cuda")), "this extension has no kernel for it"
    assert "phi_scale:reference" in str(fc.ISNet(model, supervise=("3",), backend="reference").plan("cuda"))
    assert "phi_scale:cuda" in str(fc.ISNet(model, supervise=("3",), backend="cuda").plan())


def test_info():
    info = fc.info()
    assert {"fisnet_cuda", "python", "torch", "torch_cuda", "gpu", "reference", "kernels", "reason", "remedy"} <= set(info)
    assert info["fisnet_cuda"] == fc.__version__
    assert info["torch"] == torch.__version__
    assert all(isinstance(v, (str, bool)) for v in info.values())
    assert bool(info["reason"]) == bool(info["remedy"]) == (not info["kernels"])
    for key in ("kernels_cuda", "kernels_archs", "kernels_compiler"):
        assert bool(info[key]) == info["kernels"], key


def test_reference_holds_every_kernel_that_ops_ask_for():
    """The names in ``kernel("...")`` calls of ops/ exist in the reference."""
    source = "".join(p.read_text() for p in pathlib.Path(ops.__file__).parent.glob("*.py"))
    names = set(re.findall(r'kernel\("(\w+)"', source))
    assert len(names) >= 8
    assert not [n for n in names if not hasattr(reference, n)]
