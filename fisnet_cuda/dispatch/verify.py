"""Whether a candidate computes what the op is: its error beside the library's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .key import arguments, float32_is_tf32

FACTOR = 2.0  # a candidate's error may be this much of the library's
NOISE = 0.5  # where the library's own error is larger, twice as much would allow anything, a result of zeros too
TF32_ROUNDING = 2.0**-11


def exact(name: str, operands: tuple, options: dict) -> tuple:
    """The op by its reference, in a dtype wider than that of the operands and of their products.

    float32 for 16-bit operands where PyTorch's float32 products are float32, else float64: no global setting is touched.
    """
    narrow = operands[0].dtype.itemsize < 4 and not float32_is_tf32(name, operands, options)
    dtype = torch.float32 if narrow else torch.float64

    def wide(v: Any) -> Any:
        return v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v

    return getattr(reference, name)(*map(wide, operands), **{n: wide(v) for n, v in options.items()})


class Verifier:
    """Compares candidates with the exact result of one call, and with what the library makes of it.

    Args:
        name: the op.
        operands, options: the call.
        exact: its result in a wider dtype.
        library: its result by candidate 0.
        tf32: whether its products may be made in TF32, whose rounding then is the floor of the allowed error.
    """

    def __init__(self, name: str, operands: tuple, options: dict, exact: tuple, library: tuple, tf32: bool):
        self.exact, self.library, self.tf32 = exact, library, tf32
        self.asked = [i for i, out in enumerate(library) if isinstance(out, Tensor) and _asked(name, operands, options, i)]
        self.errors = [relative_error(library[i], exact[i]) for i in self.asked]

    def cannot(self) -> str:
        """Why this call can tell nothing about any candidate; empty when it can."""
        if not all(bool(torch.isfinite(self.library[i]).all() & torch.isfinite(self.exact[i]).all()) for i in self.asked):
            return "its result is not finite"
        if not any(bool(self.exact[i].any()) for i in self.asked):
            return "its result is zero"
        if all(error > NOISE for error in self.errors):
            return "the library's result is noise"
        return ""

    def check(self, outputs: tuple) -> tuple[list[float], str]:
        """The errors of a candidate's ``outputs`` (made with ``poison=True``), and what is wrong with them, if anything."""
        errors = []
        for i, error in zip(self.asked, self.errors):
            out, like = outputs[i], self.library[i]
            if not isinstance(out, Tensor) or out.shape != like.shape or out.dtype != like.dtype:
                return errors, f"output {i} is {_kind(out)}, the library's is {_kind(like)}"
            if not bool(torch.isfinite(out).all()):
                bad = int((~torch.isfinite(out)).sum())
                return errors, f"{bad} of {out.numel()} elements of output {i} are not written or not finite; the library's are"
            errors.append(relative_error(out, self.exact[i]))
            fair = max(error, self.floor(out.dtype))
            bound = max(fair, min(FACTOR * fair, NOISE))
            if not errors[-1] <= bound:
                return errors, (
                    f"the relative error of output {i} is {errors[-1]:.2e}, the library's {error:.2e}; at most {bound:.2e} is allowed"
                )
        return errors, ""

    def floor(self, dtype: torch.dtype) -> float:
        """One rounding of the dtype, where the library may happen to be exact."""
        unit = torch.finfo(dtype).eps / 2
        return max(unit, TF32_ROUNDING) if self.tf32 else unit


def relative_error(out: Tensor, exact: Tensor) -> float:
    """``|out - exact| / |exact|``, euclidean; 0/0 is 0."""
    off, size = _norm(out.to(exact.dtype) - exact), _norm(exact)
    return off / size if size else (0.0 if off == 0 else float("inf"))


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t, dtype=torch.float64))


def _kind(out: Any) -> str:
    return f"{out.dtype} {list(out.shape)}" if isinstance(out, Tensor) else "none"


def _asked(name: str, operands: tuple, options: dict, i: int) -> bool:
    """Whether the caller may look at output ``i``: without ``keep_s`` nobody may look at `transposed_phi`'s second one."""
    if name != "transposed_phi" or i == 0:
        return True
    named = arguments(name, operands, options)
    return named["keep_s"] or named["a"] is None or named["scale"] is None
