"""The table of module types that tracing stops at: torch.nn layers with a normal form, and `fisnet_cuda.nn`."""

from __future__ import annotations

from torch import nn

LEAVES: tuple[type[nn.Module], ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Tanh, nn.Softplus, nn.Mish,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity, nn.Flatten, nn.Unflatten,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
)  # fmt: skip


def leaf_type(module: nn.Module) -> type[nn.Module] | None:
    """The table's type that ``module`` computes like, or None.

    A user's subclass counts only while it keeps the layer's own forward; a layer with a forward of its own is traced.
    """
    if "forward" in vars(module):  # replaced on the instance
        return None
    for base in LEAVES:
        if not isinstance(module, base):
            continue
        kind = type(module)
        same = kind.forward is base.forward
        if same and getattr(kind, "_conv_forward", None) is getattr(base, "_conv_forward", None):
            return base
    return None


def is_leaf(module: nn.Module) -> bool:
    """Whether tracing stops at ``module``: it has a normal form, or it is torch.nn's and will be refused by name."""
    if hasattr(module, "lrp_expand") or leaf_type(module) is not None:
        return True
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    torchs_own = type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, containers)
    return torchs_own and "forward" not in vars(module)
