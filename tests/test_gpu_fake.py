"""The cases of `make gpu` at their real sizes over fake tensors: those that are cheap here; ``make gpu GPU_ARGS='--dry-run --only
fake'`` runs all of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import fake_gpu
from benchmarks.kernel_cases import all_cases
from fisnet_cuda import _backend

ROOT = Path(__file__).resolve().parents[1]
reason = fake_gpu.needs() or _backend._load()[1]
pytestmark = pytest.mark.skipif(bool(reason), reason=reason or "there are fake GPUs here")


def fake(*only: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """``python -m benchmarks.gpu_fake``, or other code with the stand-in for a CUDA device."""
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "benchmarks.gpu_fake", "--only", *only]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    if code:
        variables[fake_gpu.PRELOAD] = str(fake_gpu.library())
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=1200)


def test_every_kernel_case_at_its_real_size():
    """Also what the machine's description asks of CUDA. What cannot go over fake tensors is named."""
    done = fake("machine", "kernels")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = [int(count) for count in re.findall(r"^kernels \d/4: (\d+) cases", done.stdout, re.MULTILINE)]
    assert sum(counts) == 2 * len(all_cases()), "bf16 and fp32"
    for word in ("values", "times", "torch.compile", "CUDA graphs", "memory", "compute-sanitizer"):
        assert f"- {word}" in done.stdout or word in done.stdout
    assert "0 problems" in done.stdout


@pytest.mark.slow
def test_a_networks_steps_at_their_real_size():
    """One of the nets: every variant, products by the library, graphs; and the float64 check before them."""
    done = fake("resnet18 at 28, bf16")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "resnet18 at 28, bf16: 12 cases" in done.stdout


@pytest.mark.slow
def test_a_wrong_shape_is_found():
    """In a case, in a kernel's fake results, and in a fused product."""
    code = """
import torch
from benchmarks import fake_gpu, gpu_fake, kernels
from benchmarks.kernel_cases import phi_scale, Sizes, KernelCase, read_and_written
right = phi_scale._forward
def wrong(sizes, device, dtype):
    (g, a, eps), kwargs = right(sizes, device, dtype)
    return (g[:, :3], a, eps), kwargs
phi_scale.CASES[:] = [KernelCase("phi_scale", "phi_scale", wrong, read_and_written)]
with fake_gpu.device():
    assert torch.ones(2, device="cuda").sum().item() == 0.0
    assert bool(torch.ones(2, device="cuda").isfinite().all())
    count, problems = gpu_fake._reported(lambda: gpu_fake._worker(["benchmarks.kernels", "--cases", "phi_scale", "--device", "cuda"]))
print(count, problems)
"""
    done = fake(code=code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "0 [" in done.stdout
    assert done.stdout.count("is wrong: ") >= 2, done.stdout
