"""The command line as users have it: processes, files, exit statuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120  # seconds; a command that hangs is killed
# what a launcher of the tests themselves, or another test, may have left
NOT_OURS = ("FISNET_CUDA_RUN", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")


@dataclass
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str


class Commands:
    """Starts commands in a folder; close it in the end.

    Args:
        folder: for what the commands print.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.zygote = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py")), str(ROOT)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment(),
        )  # fmt: skip

    def _ask(self, **job: object) -> int | None:
        self.zygote.stdin.write(json.dumps(job) + "\n")
        self.zygote.stdin.flush()
        return json.loads(self.zygote.stdout.readline())

    def start(self, *argv: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> Running:
        """Begins a command."""
        self.count += 1
        out, err = (self.folder / f"{self.count}.{kind}" for kind in ("out", "err"))
        out.touch()
        err.touch()
        pid = self._ask(
            argv=list(map(str, argv)), cwd=str(cwd or self.folder), env=environment(**(env or {})), out=str(out), err=str(err)
        )
        return Running(self, pid, out, err)

    def run(self, *argv: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> Done:
        """A command from its beginning to its end."""
        return self.start(*argv, cwd=cwd, env=env).end()

    def close(self) -> None:
        """Nothing is started any more."""
        self.zygote.stdin.close()
        self.zygote.wait(10)


@dataclass
class Running:
    """A command that has begun."""

    owner: Commands
    pid: int
    out: Path
    err: Path
    status: int | None = None

    def alive(self) -> bool:
        """Whether it has not ended yet."""
        if self.status is None:
            self.status = self.owner._ask(wait=self.pid)
        return self.status is None

    def kill(self) -> None:
        """``kill -9``."""
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> Done:
        """Wait for it."""
        until = time.monotonic() + PATIENCE
        while self.alive():
            if time.monotonic() > until:
                self.kill()
                until = float("inf")
            time.sleep(0.01)
        return Done(self.status, self.out.read_text(), self.err.read_text())


def fresh(*argv: object, cwd: Path, env: dict[str, str] | None = None) -> Done:
    """A command in a fresh interpreter, imports and all."""
    done = subprocess.run(
        [sys.executable, "-m", "fisnet_cuda", *map(str, argv)], cwd=cwd, env=environment(**(env or {})), capture_output=True, text=True,
        timeout=2 * PATIENCE,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def environment(**more: str) -> dict[str, str]:
    """This process's, with this package in the path and one thread."""
    kept = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def torchrun(world: int) -> list[dict[str, str]]:
    """The environments that torchrun gives the processes of one machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """All files and folders below, with sizes and times: equal before and after what must not write."""
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) if p.is_file() else (0, 0) for p in folder.rglob("*")}
