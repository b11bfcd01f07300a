"""What the kernel benchmark times: one file an op with a list ``CASES``; files are found by themselves."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class Sizes:
    """The tensors of a case: activations ``[N, C, H, W]``, K maps."""

    N: int = 64
    C: int = 256
    H: int = 56
    W: int = 56
    K: int = 1
    layout: str = "channels_last"

    def tensor(self, *shape: int, device: str, dtype: torch.dtype, seed: int) -> Tensor:
        """Normal values, the same every time; 4-d ones in the layout."""
        generator = torch.Generator(device).manual_seed(seed)
        t = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
        return t.contiguous(memory_format=LAYOUTS[self.layout]) if t.dim() == 4 else t

    def relevance(self, *, device: str, dtype: torch.dtype, seed: int) -> Tensor:
        """``[N*K, C, H, W]``."""
        return self.tensor(self.N * self.K, self.C, self.H, self.W, device=device, dtype=dtype, seed=seed)

    def activation(self, *, device: str, dtype: torch.dtype, seed: int) -> Tensor:
        """``[N, C, H, W]``, the output of a ReLU."""
        return self.tensor(self.N, self.C, self.H, self.W, device=device, dtype=dtype, seed=seed).relu()


@dataclass(frozen=True)
class KernelCase:
    """One kernel at one setting.

    Attributes:
        name: "op/setting".
        kernel: its name in `fisnet_cuda.reference` (and in the kernel table).
        make: ``make(sizes, device, dtype) -> (args, kwargs)`` of that function.
        traffic: ``traffic(args, kwargs, outputs) -> bytes`` that cannot be avoided: every operand read once, every result
            written once. The floor of the kernel is this over the bandwidth of a device copy.
        sizes: what the table reports; ResNet-50's first stage unless the op lives elsewhere.
        eager: what PyTorch users would write, where that is not the reference itself; same arguments.
        run: ``run(function, *args, **kwargs)`` in place of ``function(*args, **kwargs)``, where more than one call is timed.
        flops: ``flops(sizes)``, for products of linear maps: what they multiply and add, whose time on the tensor cores is a second
            floor. Theirs are rounded to TF32 in float32, every tile shape is timed, and torch.compile is left out.
        rank: 0 for what a step of Selective or Stochastic ISNet spends its time in, 2 for rare settings: the last of these are
            lost where time runs out.
    """

    name: str
    kernel: str
    make: Callable[[Sizes, str, torch.dtype], tuple[tuple, dict[str, Any]]]
    traffic: Callable[[tuple, dict[str, Any], Any], int]
    sizes: Sizes = Sizes()
    eager: Callable | None = None
    run: Callable | None = None
    flops: Callable[[Sizes], int] | None = None
    rank: int = 1


def nbytes(*tensors: Any) -> int:
    """Bytes of the tensors among the arguments, at any depth; None and numbers count nothing, one tensor counts once."""
    seen: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            seen[id(value)] = value.numel() * value.element_size()
        elif isinstance(value, (tuple, list)):
            for part in value:
                visit(part)
        elif isinstance(value, dict):
            visit(tuple(value.values()))

    visit(tensors)
    return sum(seen.values())


def read_and_written(args: tuple, kwargs: dict[str, Any], outputs: Any) -> int:
    """The usual traffic: every operand once, every result once."""
    return nbytes(args, kwargs, outputs)


def all_cases() -> list[KernelCase]:
    """The cases of every file of this folder."""
    found: list[KernelCase] = []
    for module in pkgutil.iter_modules(__path__):
        found += importlib.import_module(f"{__name__}.{module.name}").CASES
    return found
