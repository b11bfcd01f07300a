"""Files that are whole or not there: everything that the tool writes goes through here."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError

__all__ = ["atomic", "check_folder", "make_folder", "write_json", "write_text"]


def make_folder(path: str | Path) -> Path:
    """The folder, made if it is not there.

    Raises:
        InputError: it cannot be made, or is a file.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{path} is a file (or lies below one), and a folder is needed: name another one") from None
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror}") from None
    return path


def check_folder(path: str | Path) -> None:
    """Sees, before the work is done, that its results can be written to a folder, which need not be there yet.

    Raises:
        InputError: it is a file or lies below one, or there is no permission.

    Example:
        >>> import tempfile
        >>> check_folder(Path(tempfile.mkdtemp()) / "not" / "yet")
    """
    path = Path(path)
    there = next(part for part in (path, *path.absolute().parents) if part.exists())
    if not there.is_dir():
        raise InputError(f"{path} is a file (or lies below one), and a folder is needed: name another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"cannot write into {there}: no permission; name another folder")


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary file beside ``path`` (of the same suffix) that takes its place once the block has ended, and is removed if
    the block raises: whoever reads ``path`` sees the old file or the new one, never half of one.

    Raises:
        InputError: the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with atomic(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text(), [p.name for p in target.parent.iterdir()]
        ('whole', ['a.txt'])
    """
    path = Path(path)
    make_folder(path.parent)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise InputError(f"cannot write into {path.parent}: {error.strerror}") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write text, whole or not at all; returns the path."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON that any reader takes, whole or not at all; NaN and infinity become null. Returns the path.

    Example:
        >>> import tempfile
        >>> write_json(Path(tempfile.mkdtemp()) / "a.json", {"auc": float("nan")}).read_text()
        '{\\n "auc": null\\n}\\n'
    """
    return write_text(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return str(content) if isinstance(content, Path) else content
