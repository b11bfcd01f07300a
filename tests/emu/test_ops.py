"""What the emulator finds while an operator runs arrives in Python, through torch's dispatcher and autograd."""

import re

import numpy as np
import pytest
import torch
from emulator import KernelError, configure, emulated, reset_stats, stats

from fisnet_cuda import ops


def phi_scale():
    """The sum of phi_scale with a scale; its backward reduces in shared memory."""
    g, a, scale = torch.randn(2, 3, 4, 4, requires_grad=True), torch.rand(2, 3, 4, 4), torch.ones(3, requires_grad=True)
    return ops.phi_scale(g, a, 0.1, scale=scale).sum()


def test_error_crosses_dispatcher_and_autograd():
    """A kernel fails in a fiber, below C++ frames of torch's; the emulator goes on afterwards."""
    with emulated():
        loss = phi_scale()
        configure(max_shared=1000)
        with pytest.raises(RuntimeError, match="this block has 4096 bytes of shared memory, and may have 1000"):
            loss.backward(retain_graph=True)
        configure()
        loss.backward()
        phi_scale().backward()


def test_counts_arrive_from_operators():
    with emulated():
        reset_stats()
        phi_scale().backward()
        counts = stats()
    assert counts["blocks"] > 0
    assert counts["threads"] % counts["blocks"] == 0
    assert counts["barriers"] > 0
    assert {counts[name] for name in counts if "conflicts" in name} == {0}
    reset_stats()
    assert set(stats().values()) == {0}


def test_error_leaves_emulated_with_source_lines(unit):
    """Those of both accesses."""

    def run():
        x = np.zeros(64, np.float32)
        unit("missing_barrier/bug", x, np.zeros_like(x), threads=64)

    with pytest.raises(KernelError) as found, emulated():
        run()
    assert len(re.findall(r"\[bugs\.cu:\d+( < [^]]+)?\]", str(found.value))) == 2, str(found.value)


def test_other_errors_pass_emulated_unchanged():
    with pytest.raises(RuntimeError, match=r"^mine$") as found, emulated():
        raise RuntimeError("mine")
    assert type(found.value) is RuntimeError
