"""Public names of a package that are imported when they are first asked for, so that what one part needs is not needed by all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazy"]


def lazy(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its ``__name__``.
        homes: public name -> the module of the package that it lives in.

    Example:
        >>> getattr_, dir_ = lazy("fisnet_cuda", {"ISNet": "isnet.module"})
        >>> getattr_("ISNet").__name__, dir_()
        ('ISNet', ['ISNet'])
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f".{homes[name]}", package), name)

    return get, lambda: sorted(homes)
