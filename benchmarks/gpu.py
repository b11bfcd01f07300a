"""``make gpu``: everything that needs a GPU, in one command and under eight minutes, without network.

Installs what travelled along, runs the GPU tests and compute-sanitizer, then the kernel benchmark and the step benchmark, and
writes ``<gpu>-<commit>.json`` and ``.md`` with every number. A stage that fails or runs out of time is reported and the next
one runs. Benchmarks prepare (compile) in processes of their own while the tests run, and are timed afterwards, one at a
time: see `benchmarks.gpu_worker`. Before the tests the dispatcher has the GPU for itself for a while: what runs a step's
products is decided by measurement, and all benchmarks share these choices. Results are written as they come; the JSON file is
whole at every moment.

``--dry-run`` does the same on a machine without a GPU, at tiny sizes, with the kernels emulated.

Exit code: 0; 1 when a test failed, a sanitizer found something or a result was wrong, or when one of these could not be
told; 2 when there is no GPU or nothing could be installed. Standard library only, until the packages are installed.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import gpu_wheels

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("tests", "sanitizer", "dispatch", "kernels", "steps", "classes", "heatmap", "profile")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OK, FAILED, TIMEOUT, SKIPPED = "ok", "failed", "timeout", "skipped"
# moments as shares of the whole time: preparing ends and timing begins; and what tests may take
PREPARED, TESTS, SANITIZER, INSTALL = 0.54, 0.27, 0.19, 0.30
FIRST = 0.10  # what the tests wait for choices; three quarters of it are for deciding
REPORTING = 8.0  # seconds kept for the report
GRACE = 15.0  # seconds for a worker that has used its time to write and end


# ---- processes -----------------------------------------------------------------------------------------------


class Job:
    """A process of its own group: its standard output line by line, everything else in a log.

    Args:
        name: of the log and in the progress lines.
        command: what to run.
        say: gets each line of standard output.
        folder: of the log.
        variables: environment.
    """

    alive: ClassVar[set[Job]] = set()

    def __init__(
        self, name: str, command: Sequence[str], say: Callable[[str], None], folder: Path, variables: dict[str, str]
    ) -> None:
        self.name, self.say = name, say
        self.alone, self.ready, self.lines = threading.Event(), threading.Event(), list[str]()
        self.log = folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}.log"
        self.started = time.monotonic()
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                bufsize=1, start_new_session=True,
            )  # fmt: skip
        Job.alive.add(self)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        output: IO[str] = self.process.stdout  # type: ignore[assignment]
        for line in output:
            line = line.rstrip("\n")
            self.lines.append(line)
            if line == "READY":
                self.ready.set()
            elif line == "ALONE":
                self.alone.set()
            elif line:
                self.say(line)
        self.alone.set()  # nothing more will come
        self.ready.set()

    def tell(self, line: str) -> None:
        """Write a line to its standard input; a process that has ended does not mind."""
        with contextlib.suppress(OSError):
            self.process.stdin.write(line + "\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]

    def finish(self, seconds: float) -> str:
        """Wait for the end, at most so long: "ok", "failed" or "timeout"; after that nothing of it is left."""
        try:
            self.process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGINT)  # pytest then still writes what it found
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(8)
            self.kill()
            return TIMEOUT
        self.kill()
        return OK if self.process.returncode == 0 else FAILED

    def signal(self, number: int) -> None:
        """Send a signal to the process itself."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.reader.join(2)
        Job.alive.discard(self)

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.started

    def tail(self, count: int = 12) -> str:
        """The end of what it said, standard error included."""
        errors = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join([*self.lines[-count:], *errors[-count:]])


@dataclass
class Worker:
    """A benchmark that prepares first and is timed in its turn.

    Args:
        name: in progress lines.
        kind: where its rows go: "kernels", "steps", ...
        command: arguments after ``python -m``.
        seconds: it would like for measuring; shared out in proportion.
        first: others start when it has the GPU for itself, and tests when it is prepared.
    """

    name: str
    kind: str
    command: list[str]
    seconds: float
    first: bool = False
    job: Job | None = None
    part: Path | None = None
    done: bool = False


# ---- the run -------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The state of one run, and what it writes."""

    options: argparse.Namespace
    folder: Path  # of logs and parts
    begin: float = field(default_factory=time.monotonic)
    stages: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tests: dict[str, Any] = field(default_factory=dict)
    sanitizer: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    workers: list[Worker] = field(default_factory=list)
    finished: bool = False

    @property
    def device(self) -> str:
        """Of every stage."""
        return "cpu" if self.options.dry_run else "cuda"

    @property
    def total(self) -> float:
        """Seconds for everything."""
        return 60 * self.options.minutes

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.begin

    def left(self, share: float = 1.0) -> float:
        """Seconds until a share of the time has passed."""
        return share * self.total - self.elapsed

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{self.elapsed:6.1f} s] {text}", flush=True)

    def fail(self, what: str) -> None:
        """Something is not right, or cannot be told to be: the exit code will be 1."""
        self.failures.append(what)
        self.say(f"FAILED  {what}")

    def stage(self, name: str, status: str, seconds: float, detail: str = "") -> None:
        """Note how a stage ended."""
        self.stages.append({"name": name, "status": status, "seconds": round(seconds, 1), "detail": detail})
        first = detail.split("\n")[0]
        self.say(f"{name}: {status}, {seconds:.0f} s{', ' + first if first else ''}")
        self.save()

    def variables(self) -> dict[str, str]:
        """The environment of every stage."""
        found = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(gpu_wheels.SITE), found.get("PYTHONPATH")]))
        found["PYTHONUNBUFFERED"] = "1"
        found["FISNET_COMMIT"] = gpu_wheels.commit(self.options.wheels)
        found.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # there are many compilers at work
        return found

    def start(self, name: str, command: Sequence[str], echo: bool = True, **more: str) -> Job:
        """Start a process whose lines are progress."""
        say = (lambda line: self.say(f"{name}: {line}")) if echo else (lambda line: None)
        return Job(name, command, say, self.folder, {**self.variables(), **more})

    # ---- what is written ----

    def content(self) -> dict[str, Any]:
        """All results so far."""
        found: dict[str, Any] = {
            "name": "gpu", "environment": self.environment, "dry_run": self.options.dry_run, "finished": self.finished,
            "settings": {"minutes": self.options.minutes, "stages": self.options.only, "batch": self.options.batch},
            "seconds": round(self.elapsed, 1), "stages": self.stages, "failures": list(self.failures), "tests": self.tests,
            "sanitizer": self.sanitizer, "bars": [], "notes": list(self.notes), "wrong": False,
            **{kind: [] for kind in STAGES[2:]},
        }  # fmt: skip
        for worker in self.workers:
            if worker.part is None or not worker.part.exists():
                continue
            part = json.loads(worker.part.read_text())
            found[worker.kind] += part["rows"]
            found["bars"] += part["bars"]
            found["notes"] += [f"{worker.name}: {note}" for note in part["notes"]]
            found["wrong"] |= part["wrong"]
        return found

    def path(self, suffix: str) -> Path:
        """Where results go: ``<out>/<gpu>-<commit><suffix>``."""
        commit = re.sub(r"[^A-Za-z0-9.-]+", "-", self.environment.get("commit", "unknown"))
        return self.options.out / f"{'dry-run-' * self.options.dry_run}{self.environment['slug']}-{commit}{suffix}"

    def save(self) -> None:
        """Write the JSON file, so that it is a whole one at every moment."""
        if not self.environment:
            return
        path = self.path(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(path.name + ".new")
        new.write_text(json.dumps(self.content(), indent=1) + "\n")
        new.replace(path)

    def report(self) -> None:
        """Write both files and show the table."""
        self.save()
        sys.path.append(str(gpu_wheels.SITE))
        try:
            from benchmarks import gpu_report

            text = gpu_report.markdown(self.content())
        except Exception as error:
            self.fail(f"the table could not be made: {type(error).__name__}: {error}")
            return
        self.path(".md").write_text(text)
        print(f"\n{text}")
        print(self.path(".json"))
        print(self.path(".md"))


# ---- stages --------------------------------------------------------------------------------------------------


def install(run: Run) -> bool:
    """Packages and the compiled library; False when nothing can run."""
    start = time.monotonic()
    try:
        with _limit(max(run.left(INSTALL), 60)):
            gpu_wheels.install(run.options.wheels, lambda text: run.say(f"install: {text}"), read_smi("compute_cap"))
    except Exception as error:
        run.stage("install", FAILED, time.monotonic() - start, str(error))
        run.fail(f"install: {error}")
        return False
    run.stage("install", OK, time.monotonic() - start)
    return True


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise RuntimeError(f"it took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_smi(query: str) -> str:
    """What nvidia-smi reads of the GPU (nothing is ever set); empty where it cannot."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.split("\n")[0].strip() if run.returncode == 0 else ""


def _clocks() -> str:
    """SM and memory clock, temperature, power."""
    return read_smi("clocks.sm,clocks.mem,temperature.gpu,power.draw")


def environment(run: Run) -> bool:
    """The machine; False when there is no GPU, or the kernels do not load."""
    job = run.start("environment", [sys.executable, "-m", "benchmarks.gpu_report", "--device", run.device], echo=False)
    status = job.finish(90)
    if status != OK:
        run.stage("environment", status, job.seconds, job.tail(3))
        run.fail(f"environment: no usable PyTorch or GPU here:\n{job.tail()}")
        return False
    run.environment = json.loads(job.lines[-1])
    e = run.environment
    run.stage("environment", OK, job.seconds, f"{e['device']}, torch {e['torch']}, CUDA {e['cuda']}, fisnet_cuda {e['commit']}")
    if not e["kernels"] and not run.options.dry_run:
        run.fail(f"the kernels do not load: {e['reason_without_kernels']}")
        return False
    return True


def tests(run: Run) -> None:
    """The GPU tests, several processes at once."""
    results = run.folder / "tests.xml"
    command = [
        sys.executable, "-m", "pytest", *run.options.tests, "-m", "gpu", "-q", "-p", "no:cacheprovider", "--tb=short",
        "-o", "console_output_style=classic", f"--junitxml={results}", *run.options.test_args,
    ]  # fmt: skip
    cores = os.cpu_count() or 1
    if not run.options.dry_run and cores >= 8:
        command += ["-n", str(min(6, cores // 2))]
    job = run.start("tests", command, echo=False, OMP_NUM_THREADS="1")
    status = job.finish(min(run.options.test_seconds or run.total, run.total * TESTS, run.left()))
    found = _junit(results)
    run.tests = {"status": status, **found}
    if found:
        detail = f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"
    else:
        detail = "no result was written"
    for name in found.get("failing", [])[:40]:
        run.fail(f"test {name}")
    if status == TIMEOUT:
        run.fail("tests: out of time, the rest is not told")
    elif status == FAILED and not found.get("failing"):
        run.fail(f"tests: pytest ended with {job.process.returncode}\n{job.tail()}")
    run.stage("tests", status, job.seconds, detail)


def _junit(path: Path) -> dict[str, Any]:
    """Counts and the names of failing tests from pytest's file; empty when there is none."""
    if not path.exists():
        return {}
    cases = list(ET.parse(path).iter("testcase"))
    failing = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    messages = {}
    for c in failing:
        what = c.find("failure") if c.find("failure") is not None else c.find("error")
        messages[f"{c.get('classname')}::{c.get('name')}"] = (what.get("message") or "")[:500]  # type: ignore[union-attr]
    reasons = sorted({(c.find("skipped").get("message") or "")[:200] for c in skipped})  # type: ignore[union-attr]
    return {
        "passed": len(cases) - len(failing) - len(skipped), "failed": len(failing), "skipped": len(skipped),
        "failing": list(messages), "messages": messages, "why_skipped": reasons,
    }  # fmt: skip


def sanitizer(run: Run) -> None:
    """All four tools of compute-sanitizer on every kernel, at once, and each on a planted bug that it must find."""
    start = time.monotonic()
    script = [sys.executable, str(ROOT / "tests" / "gpu" / "sanitize.py"), "--device", run.device]
    tool = shutil.which("compute-sanitizer") or next(
        (str(p) for p in (Path("/usr/local/cuda/bin/compute-sanitizer"),) if p.exists()), None
    )
    if tool is None:
        detail = "compute-sanitizer is not installed here (it comes with the CUDA toolkit)"
        run.notes.append(f"sanitizer: {detail}")
        if run.options.dry_run:  # at least the script runs
            job = run.start("sanitize", script)
            status = job.finish(run.total * SANITIZER)
            if status != OK:
                run.fail(f"sanitizer: the script ended with {status}\n{job.tail()}")
        run.stage("sanitizer", SKIPPED, time.monotonic() - start, detail)
        return
    planted = _planted(run)
    jobs = {}
    for name in TOOLS:
        base = [tool, "--tool", name, "--error-exitcode", "99"]
        # only our kernels; but initcheck must see every kernel that writes what ours read
        only_ours = [] if name == "initcheck" else ["--kernel-regex", "kns=fisnet"]
        # every allocation by itself: then an access one element too far is seen
        jobs[name] = run.start(f"sanitizer {name}", [*base, *only_ours, *script], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if planted:
            jobs[f"planted {name}"] = run.start(f"planted {name}", [*base, str(planted), name], echo=False)
    end = min(run.total * SANITIZER, run.left())
    for name, job in jobs.items():
        status = job.finish(end - (time.monotonic() - start))
        summary = next((line for line in reversed(job.lines) if "SUMMARY" in line), "").strip("= ")
        if name == "initcheck" and job.process.returncode == 99 and not any(" fisnet::" in line for line in job.lines):
            run.notes.append(f"sanitizer initcheck: {summary}, none of it in a kernel of ours")
            status = OK
        run.sanitizer.append({"tool": name, "status": status, "seconds": round(job.seconds, 1), "summary": summary})
        if name.startswith("planted"):
            if job.process.returncode != 99:
                run.notes.append(f"sanitizer: {name.split()[1]} does not find its planted bug here, so its silence says little")
        elif status != OK:
            run.fail(f"sanitizer {name}: {status}, {summary or job.tail()}")
    good = sum(entry["status"] == OK for entry in run.sanitizer if not entry["tool"].startswith("planted"))
    status = OK if good == len(TOOLS) else FAILED
    run.stage("sanitizer", status, time.monotonic() - start, f"{good} of {len(TOOLS)} tools found nothing")


def _planted(run: Run) -> Path | None:
    """A small program with one bug for each tool; None without nvcc."""
    nvcc = shutil.which("nvcc") or next((str(p) for p in (Path("/usr/local/cuda/bin/nvcc"),) if p.exists()), None)
    if nvcc is None:
        run.notes.append("sanitizer: no nvcc here, so no planted bugs")
        return None
    program = run.folder / "planted"
    command = [nvcc, "-arch=native", "-lineinfo", "-o", str(program), str(ROOT / "tests" / "gpu" / "planted.cu")]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if made.returncode:
        run.notes.append(f"sanitizer: the planted bugs do not compile: {made.stderr.strip()[-300:]}")
        return None
    return program


# ---- benchmarks ----------------------------------------------------------------------------------------------


def workers(options: argparse.Namespace) -> list[Worker]:
    """What is timed, in order of importance."""
    found: list[Worker] = []
    wanted = set(options.only)
    device = ["--device", "cpu" if options.dry_run else "cuda"]

    def add(kind: str, name: str, module: str, seconds: float, *arguments: str, first: bool = False) -> None:
        if kind in wanted:
            found.append(Worker(name, kind, [f"benchmarks.{module}", *arguments, *device], seconds, first))

    deciding = ["--first", f"{0.75 * FIRST * 60 * options.minutes:.0f}"]
    if options.dry_run:
        add("dispatch", "dispatch", "dispatch", 20, "--quick", *deciding, *options.dispatch_args, first=True)
        add("kernels", "kernels", "kernels", 20, "--quick", "--dtypes", "fp32", *options.kernel_args)
        add("steps", "small", "gpu_step", 20, "--quick", "--graphs", *options.step_args)
        add("classes", "classes", "gpu_turn", 20, "classes", "--models", "small", "--classes", "2", "4", "--batch", "2", "--size",
            "32", "--rounds", "3", "--original-rounds", "2", "--warmup", "1")  # fmt: skip
        add("profile", "profile", "gpu_profile", 5, "--quick")
        return found
    batch = ["--batch", str(options.batch)]
    add("dispatch", "dispatch", "dispatch", 45, "--precision", "bf16", *batch, *deciding, *options.dispatch_args, first=True)
    for share in range(1, 5):
        add("kernels", f"kernels {share}/4", "kernels", 18, "--share", f"{share}/4", *options.kernel_args)

    def step(model: str, precision: str, seconds: float, *arguments: str, size: int = 224) -> None:
        more = ["--authors", str(options.authors)] if options.authors and precision == "tf32" else []
        add(
            "steps", f"{model} at {size}, {precision}", "gpu_step", seconds, "--model", model, "--precision", precision,
            "--size", str(size), *batch, *arguments, *more, *options.step_args,
        )  # fmt: skip

    small = 28
    step("resnet50", "bf16", 30, "--compiled", "4")
    step("resnet18", "bf16", 12, "--graphs", size=small)
    step("resnet18", "bf16", 14)
    step("densenet121", "bf16", 20)
    step("vgg16_bn", "bf16", 18)
    add(
        "classes", "classes", "gpu_turn", 20, "classes", "--models", "resnet18", "--classes", "2", "10", "100", "1000",
        "10000", *batch, "--size", "112", "--precision", "bf16", "--rounds", "12", "--original-rounds", "3",
        "--original-seconds", "6",
    )  # fmt: skip
    if options.profile:
        add("profile", "profile", "gpu_profile", 8, *batch, "--precision", "bf16")
    if options.zennit:
        add(
            "heatmap", "heatmap", "gpu_turn", 12, "heatmap", "--models", "resnet50", "--size", "224", *batch,
            "--rounds", "10", "--path", *(str(path) for path in options.zennit),
        )  # fmt: skip
    step("resnet50", "tf32", 14, "--compiled", "1")
    step("resnet18", "tf32", 8, "--compiled", "1")
    step("densenet121", "tf32", 10, "--compiled", "1")
    step("vgg16_bn", "tf32", 10, "--compiled", "1")
    step("resnet18", "tf32", 6, "--compiled", "1", "--graphs", size=small)
    return found


def launch(run: Run, worker: Worker, until: float) -> None:
    """Start a worker; it prepares until that many seconds after the run's start."""
    worker.part = run.folder / f"part-{len(list(run.folder.glob('part-*')))}-{run.workers.index(worker)}.json"
    moment = time.time() + until - run.elapsed
    command = [sys.executable, "-m", *worker.command, "--part", str(worker.part), "--wait", "--until", f"{moment:.1f}"]
    choices = str(run.folder / "dispatch.json")  # what one worker finds to be fastest is the choice of all
    if worker.kind == "dispatch" and not run.options.dry_run:  # where times are made up, so are choices
        command += ["--cache", choices]
    worker.job = run.start(worker.name, command, FISNET_CACHE=choices)


class Preparing(threading.Thread):
    """Starts the workers, a few at a time: as many as there are cores to compile with, beside the tests."""

    def __init__(self, run: Run, at_once: int) -> None:
        super().__init__(daemon=True)
        self.run_, self.at_once, self.over = run, at_once, threading.Event()

    def run(self) -> None:
        run = self.run_
        for worker in run.workers:
            while self._busy() >= self.at_once and not self.over.wait(0.1):
                pass
            if self.over.is_set():
                return
            launch(run, worker, PREPARED * run.total)
            while worker.first and not worker.job.alone.is_set() and not self.over.wait(0.1):  # type: ignore[union-attr]
                pass

    def _busy(self) -> int:
        return sum(w.job is not None and not w.job.ready.is_set() for w in self.run_.workers)

    def wait_for_first(self) -> None:
        """Until those that have the GPU for themselves are prepared, or the time for that is over."""
        first = [w for w in self.run_.workers if w.first]
        end = time.monotonic() + min(FIRST * self.run_.total, self.run_.left(PREPARED))
        while time.monotonic() < end and any(w.job is None or not w.job.ready.is_set() for w in first):
            time.sleep(0.1)

    def wait(self) -> None:
        """Until all are prepared, or the time for it is over."""
        while self.run_.left(PREPARED) > 0 and (self.is_alive() or self._busy()):
            time.sleep(0.1)
        self.over.set()
        self.join()


def measure(run: Run) -> None:
    """Time the workers one after the other."""
    rest = list(run.workers)
    run.environment["clocks_before"] = _clocks()
    while rest:
        worker = rest[0]
        share = worker.seconds / sum(w.seconds for w in rest)
        rest.pop(0)
        left = run.left() - REPORTING
        if left < 2:
            run.stage(worker.name, SKIPPED, 0, "no time left")
            if worker.job is not None:
                worker.job.kill()
            continue
        if worker.job is None:  # there was no time to prepare beside the tests
            launch(run, worker, run.elapsed + min(40, 0.4 * left))
        _turn(run, worker, share, left)
    run.environment["clocks_after"] = _clocks()
    run.save()


def _turn(run: Run, worker: Worker, share: float, left: float) -> None:
    job: Job = worker.job  # type: ignore[assignment]
    start = time.monotonic()
    if not job.ready.wait(min(45, left)):
        job.kill()
        run.stage(worker.name, TIMEOUT, job.seconds, "it was not prepared in time")
        return
    seconds = min(2 * worker.seconds, share * (run.left() - REPORTING))
    job.tell(f"go {seconds:.1f}")
    status = job.finish(min(2 * seconds + GRACE, run.left() - REPORTING / 2))
    part = json.loads(worker.part.read_text()) if worker.part and worker.part.exists() else {"rows": [], "wrong": False}
    timed = [row for row in part["rows"] if "wrong" not in row]
    detail = f"{len(timed)} rows"
    if part["wrong"]:
        run.fail(f"{worker.name}: a result is wrong, its time is withheld; see the notes")
    elif status == FAILED:  # not correctness, but not nothing either
        detail += f", {job.tail(2)}"
        run.fail(f"{worker.name}: {job.tail()}")
    run.stage(worker.name, status, time.monotonic() - start, detail)


# ---- the command ---------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results (benchmarks/results)")
    p.add_argument("--dry-run", action="store_true", help="without a GPU: the kernels emulated, everything tiny")
    p.add_argument("--minutes", type=float, default=7.75, help="for everything")
    p.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="which stages")
    p.add_argument("--profile", action="store_true", help="also profile Selective ResNet-50")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--zennit", type=Path, nargs="+", default=[], help="folders with zennit or captum: time their heatmaps too")
    p.add_argument("--authors", type=Path, help="folder of the authors' code (PedroRASB/FasterISNet): time its step too")
    p.add_argument("--wheels", type=Path, default=gpu_wheels.WHEELS, help="what 'make gpu-wheels' made (build/gpu_wheels)")
    p.add_argument("--tests", nargs="+", default=["tests/gpu", "tests/kernels"], help="which tests")
    p.add_argument("--test-args", type=shlex.split, default=[], help="more options of pytest: --test-args='-x -k loss'")
    p.add_argument("--test-seconds", type=float, help="at most so long for the tests")
    p.add_argument("--kernel-args", type=shlex.split, default=[], help="more options of benchmarks/kernels.py")
    p.add_argument("--dispatch-args", type=shlex.split, default=[], help="more options of benchmarks/dispatch.py")
    p.add_argument("--step-args", type=shlex.split, default=[], help="more options of benchmarks/gpu_step.py")
    p.add_argument("--at-once", type=int, help="how many benchmarks prepare at the same time")
    p.add_argument("--logs", type=Path, help="keep the logs of all stages in this folder")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = arguments().parse_args(argv)
    options.out, options.wheels = options.out.resolve(), options.wheels.resolve()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # so that what was started is ended
    atexit.register(_end_all)
    if options.logs:
        options.logs.mkdir(parents=True, exist_ok=True)
        return _run(Run(options, options.logs.resolve()))
    with tempfile.TemporaryDirectory(prefix="fisnet-gpu-") as folder:
        return _run(Run(options, Path(folder)))


def _run(run: Run) -> int:
    options = run.options
    if not (options.dry_run or install(run)) or not environment(run):
        return 2
    run.workers = workers(options)
    cores = os.cpu_count() or 1
    preparing = Preparing(run, options.at_once or max(1, cores // 2))
    try:
        preparing.start()
        preparing.wait_for_first()
        for name, stage in (("tests", tests), ("sanitizer", sanitizer)):
            if name in options.only:
                stage(run)
        preparing.wait()
        run.say("timing begins")
        measure(run)
        run.finished = True
    finally:
        preparing.over.set()
        run.report()
    run.say(f"{len(run.failures)} failures" if run.failures else "nothing failed")
    return int(bool(run.failures) or run.content()["wrong"])


def _end_all() -> None:
    for job in list(Job.alive):
        job.kill()


if __name__ == "__main__":
    sys.exit(main())
