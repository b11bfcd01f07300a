"""Layouts of maps, and what is done about slices of them."""

import pytest
import torch

from fisnet_cuda.ops import conv_geometry, transposed_phi
from fisnet_cuda.ops.layout import memory_format, undivided

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])


@LAYOUTS
def test_a_slice_becomes_a_map_of_its_own(layout):
    whole = torch.rand(2, 8, 3, 3).contiguous(memory_format=layout)
    part = whole[:, 2:6]
    made = undivided(part)
    assert torch.equal(made, part)
    assert memory_format(made) == layout
    assert made.untyped_storage().nbytes() < whole.untyped_storage().nbytes()


@LAYOUTS
def test_other_tensors_come_back_as_they_are(layout):
    whole = torch.rand(2, 8, 3, 3).contiguous(memory_format=layout)
    for t in (whole, whole[:1], torch.rand(2, 8, 1, 1).expand(2, 8, 3, 3), torch.rand(3, 4).t()):
        assert undivided(t) is t


@LAYOUTS
def test_relevance_of_a_slice_keeps_no_more_than_the_slice(layout):
    """A dense block's layers read slices of the block's relevance: what the backward needs of them is not the whole map."""
    whole = torch.rand(2, 8, 3, 3).contiguous(memory_format=layout).requires_grad_()
    s, W = whole[:, 2:6], torch.rand(4, 5, 3, 3, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        transposed_phi(s, W, conv_geometry(2, 1, 1, 1, 1), (3, 3)).sum().backward()
    assert kept
    assert all(t.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() for t in kept)
    assert float(whole.grad[:, :2].abs().sum()) == 0 < float(whole.grad[:, 2:6].abs().sum())
