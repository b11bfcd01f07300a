"""A process that has imported what the command line needs, and forks itself for every command: ``python -m fisnet_cuda ...`` as a
process of its own, that can be killed, without the five seconds that the imports take.

Run by `tests.cli.commands`. Reads lines of JSON, ``{"argv", "cwd", "env", "out", "err"}`` or ``{"wait": pid}``, and answers each
with one number: the process id, or the exit status (negative: the signal that ended it; null: it is still there).
"""

import atexit
import gc
import json
import os
import random
import runpy
import sys
import threading
from importlib import import_module


def serve() -> None:
    """Forks and waits as it is told, until its input ends. In a forked process: runs the command."""
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            pid, status = os.waitpid(job["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                leave(become(job))
        print(json.dumps(answer), flush=True)


def become(job: dict) -> int:
    """What a fresh ``python -m fisnet_cuda`` starts from: its files, folder and environment, and random states of its own.
    Returns the exit status."""
    import numpy
    import torch

    for number, name, mode in ((0, os.devnull, os.O_RDONLY), (1, job["out"], os.O_WRONLY), (2, job["err"], os.O_WRONLY)):
        file = os.open(name, mode)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    random.seed()
    numpy.random.seed()
    torch.seed()
    sys.argv = ["fisnet_cuda", *job["argv"]]
    sys.path[0] = job["cwd"]
    try:
        runpy.run_module("fisnet_cuda", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def leave(status: int) -> None:
    """The end of a process as Python has it, but for taking apart, for a second, what the imports have made."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.path.insert(1, sys.argv[1])
    for module in ("fit", "validate", "test", "predict", "evaluate", "heatmap", "export", "plan", "info", "bench"):
        import_module(f"fisnet_cuda.cli.{module}")
    gc.freeze()  # what is there is not looked at again, so that processes go on sharing its memory
    serve()
