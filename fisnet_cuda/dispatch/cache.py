"""Decisions that outlive the process: one JSON file, shared with other processes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..errors import FisnetWarning

VARIABLE = "FISNET_CACHE"
FORMAT = 1


def default_path() -> Path | None:
    """``$FISNET_CACHE``, else dispatch.json in the user's cache folder; None where there is no such folder."""
    if given := os.environ.get(VARIABLE):
        path = Path(given).expanduser()
        return path / "dispatch.json" if path.is_dir() else path
    try:
        if sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # nobody's home
        return None
    return base / "fisnet_cuda" / "dispatch.json"


class Cache:
    """Entries by key. The file is read once and written whole, through a temporary file, after every new entry.

    Before each write the file is read again, so that what other processes wrote meanwhile stays. Where the file cannot be
    read or written, entries live in memory and one warning says so.

    Args:
        path: of the file; None keeps everything in memory.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._own: dict[str, dict] = {}
        self._read: dict[str, dict] | None = None
        self._thread_lock = threading.Lock()
        self._warned = False

    def get(self, key: str) -> dict | None:
        """The entry of ``key``."""
        return self.entries().get(key)

    def entries(self) -> dict[str, dict]:
        """All entries, also those of other GPUs and versions."""
        if self._read is None:
            self._read = self._load()
        return self._read

    def put(self, key: str, entry: dict) -> None:
        """Keep ``entry``, here and in the file."""
        with self._thread_lock:
            self._own[key] = entry
            self.entries()[key] = entry
            if self.path is None:
                return
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with _turn(self.path.with_name(self.path.name + ".lock")):
                    self._read = {**self._load(), **self._own}
                    self._write(self._read)
            except OSError as error:
                self._warn(f"cannot write: {error}")

    def clear(self) -> None:
        """Forget everything, and remove the file."""
        self._own, self._read = {}, {}
        if self.path is not None and self.path.is_file():
            self.path.unlink()

    def _load(self) -> dict[str, dict]:
        if self.path is None:
            return {}
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if stored["format"] != FORMAT:
                return {}  # another version of the package wrote it; it is replaced
            entries = stored["entries"]
            if not all(isinstance(e, dict) and {"choice", "medians", "blacklisted"} <= e.keys() for e in entries.values()):
                raise ValueError("an entry lacks its fields")
            return entries
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._warn(f"cannot read: {type(error).__name__}: {error}")
            return {}

    def _write(self, entries: dict[str, dict]) -> None:
        assert self.path is not None
        if self.path.exists() and not self.path.is_file():
            raise OSError("not a regular file")
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name, suffix=".tmp")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump({"format": FORMAT, "entries": entries}, file, indent=1)
            os.replace(temporary, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def _warn(self, what: str) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"the cache of measured kernels, {self.path}: {what}. Decisions hold for this process; ${VARIABLE} sets another path.",
            FisnetWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def _turn(lock: Path, patience: float = 1.0, stale: float = 10.0) -> Iterator[None]:
    """Inside, other processes' turns wait; for no more than ``patience`` seconds, for a lost entry is only measured again."""
    end, mine = time.monotonic() + patience, False
    while not mine and time.monotonic() < end:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            mine = True
        except FileExistsError:
            with contextlib.suppress(OSError):
                if time.time() - lock.stat().st_mtime > stale:  # whoever made it is gone
                    lock.unlink()
            time.sleep(0.002)
    try:
        yield
    finally:
        if mine:
            with contextlib.suppress(OSError):
                lock.unlink()
