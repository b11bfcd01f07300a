"""A process that has imported what the command line needs, and forks itself for every command: ``python -m fisnet_cuda ...`` as a
process of its own, that can be killed, without the five seconds that the imports take.

Run by `tests.cli.commands`. Reads lines of JSON, ``{"argv", "cwd", "env", "out", "err"}`` or ``{"wait": pid}``, and answers each
with one number: the process id, or the exit status (negative: the signal that ended it; null: it is still there).
"""

import json
import os
import random
import runpy
import sys
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
                become(job)
                return
        print(json.dumps(answer), flush=True)


def become(job: dict) -> None:
    """What a fresh ``python -m fisnet_cuda`` starts from: its files, folder and environment, and random states of its own."""
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
    runpy.run_module("fisnet_cuda", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.path.insert(1, sys.argv[1])
    for module in ("fit", "validate", "test", "predict", "evaluate", "heatmap", "export", "plan", "info", "bench"):
        import_module(f"fisnet_cuda.cli.{module}")
    serve()
