"""``make gpu``: everything that needs a GPU, in one command and under eight minutes, without network.

Installs what travelled along, launches every kernel once, runs the GPU tests and compute-sanitizer, then the benchmarks of
steps, kernels and classes, and writes ``<gpu>-<commit>.json`` and ``.md`` with every number. A stage that fails or runs out of
time is reported and the next one runs; within a stage the most valuable comes first, so that it loses only its last cases.
Benchmarks prepare (compile) in processes of their own while the tests run, and are timed afterwards, one at a time: see
`benchmarks.gpu_worker`. Before the tests the dispatcher has the GPU for itself for a while: what runs a step's products is
decided by measurement, and all benchmarks share these choices. Results are written as they come; the JSON file is whole at every
moment, and has every case that is finished, also when the run is killed.

``--resume`` takes up the results of earlier runs with the same sources, GPU, versions and settings: what they did well is not
done again (see `benchmarks.gpu_resume`). ``--dry-run`` does everything on a machine without a GPU, at tiny sizes, with the kernels
emulated, and at real sizes over fake tensors (see `benchmarks.gpu_fake`).

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

if not __package__:  # run as a file: the package is one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import gpu_resume, gpu_wheels

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CORRECT, TIMED = ("launches", "tests", "sanitizer"), tuple(gpu_resume.KEYS)
STAGES = (*CORRECT, *TIMED)
FAKE = "fake"  # a stage of dry runs
SANITIZE = ROOT / "tests" / "gpu" / "sanitize.py"
NO_TESTS = 5  # pytest's exit code where none was left to run
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OK, FAILED, TIMEOUT, SKIPPED = gpu_resume.OK, "failed", "timeout", "skipped"
PREPARED = 0.54  # the moment, as a share of the whole time, when preparing ends and timing begins
# what a stage may take of the whole time; the rest is for timing, shared out by `Worker.seconds`
SHARES = {"install": 0.30, "launches": 0.08, "tests": 0.27, "sanitizer": 0.19}
PARTS = (*SHARES, *TIMED)
FIRST = 0.10  # what the tests wait for choices; three quarters of it are for deciding
OUTCOMES, CHOICES = "tests.jsonl", "dispatch.json"  # what comes of each test, and what the dispatcher has found; in a run's folder
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
        most: seconds that it gets where there are more; twice what it would like.
    """

    name: str
    kind: str
    command: list[str]
    seconds: float
    first: bool = False
    most: float | None = None
    job: Job | None = None
    part: Path | None = None

    def found(self) -> dict[str, Any]:
        """Its report so far."""
        nothing: dict[str, Any] = {"rows": [], "bars": [], "notes": [], "missing": [], "wrong": False}
        return json.loads(self.part.read_text()) if self.part and self.part.exists() else nothing


# ---- the run -------------------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """Something that is not right, or cannot be told to be."""

    stage: str
    what: str


@dataclass
class Run:
    """The state of one run, and what it writes."""

    options: argparse.Namespace
    folder: Path  # of logs and parts
    begin: float = field(default_factory=time.monotonic)
    stages: list[dict[str, Any]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tests: dict[str, Any] = field(default_factory=dict)
    sanitizer: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, str] = field(default_factory=dict)
    earlier: gpu_resume.Earlier = field(default_factory=gpu_resume.Earlier)
    workers: list[Worker] = field(default_factory=list)
    finished: bool = False
    lock: Any = field(default_factory=threading.RLock)  # of the result file

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

    def limit(self, part: str) -> float:
        """Seconds that a stage may take, from now on."""
        return min(self.options.seconds.get(part, SHARES[part] * self.total), self.left())

    def done(self, name: str, command: Sequence[str] = ()) -> bool:
        """Whether an earlier run has done this stage well; says so."""
        if not gpu_resume.is_done(self.earlier.content, name, command):
            return False
        self.say(f"{name}: done before")
        return True

    def fail(self, stage: str, what: str) -> None:
        """Something is not right, or cannot be told to be: the exit code will be 1."""
        self.failures.append(Failure(stage, what))
        self.say(f"FAILED  {stage}: {what}")

    def stage(self, name: str, status: str, seconds: float, detail: str = "", command: Sequence[str] = (), wrong: bool = False) -> None:
        """Note how a stage ended."""
        entry = {"name": name, "status": status, "seconds": round(seconds, 1), "detail": detail, "command": list(command)}
        self.stages.append({**entry, "wrong": wrong, "date": self.environment.get("date", "")})
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
        """All results so far, those of earlier runs included."""
        choices = self.folder / CHOICES
        took = {"date": self.environment.get("date"), "commit": self.environment.get("commit"), "seconds": round(self.elapsed, 1)}
        found: dict[str, Any] = {
            "name": "gpu", "identity": self.identity, "environment": self.environment, "dry_run": self.options.dry_run,
            "finished": self.finished, "runs": [{**took, "finished": self.finished}],
            "settings": {"minutes": self.options.minutes, "stages": self.options.only, "batch": self.options.batch},
            "seconds": took["seconds"], "stages": list(self.stages), "failures": [list(failure) for failure in self.failures],
            "missing": [], "tests": self.tests or _outcomes(self.folder / OUTCOMES, "running"), "sanitizer": list(self.sanitizer),
            "bars": [], "notes": list(self.notes), "wrong": any(stage["wrong"] for stage in self.stages),
            "choices": choices.read_text() if choices.exists() else "", **{kind: [] for kind in TIMED},
        }  # fmt: skip
        for worker in self.workers:
            part = worker.found()
            found[worker.kind] += part["rows"]
            found["bars"] += part["bars"]
            found["notes"] += [f"{worker.name}: {note}" for note in part["notes"]]
            found["missing"] += [[worker.name, what] for what in part["missing"]]
            found["wrong"] |= part["wrong"]
        return gpu_resume.merged(self.earlier.content, found)

    def path(self, suffix: str) -> Path:
        """Where results go: ``<out>/<gpu>-<commit><suffix>``."""
        commit = re.sub(r"[^A-Za-z0-9.-]+", "-", self.environment.get("commit", "unknown"))
        return self.options.out / f"{'dry-run-' * self.options.dry_run}{self.environment['slug']}-{commit}{suffix}"

    def save(self) -> None:
        """Write the JSON file, so that it is a whole one at every moment."""
        if not self.environment:
            return
        with self.lock:
            path = self.path(".json")
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(path.name + ".new")
            new.write_text(json.dumps(self.content(), indent=1) + "\n")
            new.replace(path)

    def put_aside(self) -> None:
        """What lies where results will go, and is not taken up, keeps its date in its name: nothing is lost."""
        path = self.path(".json")
        if self.options.dry_run or not path.exists() or path.resolve() in self.earlier.taken:
            return
        date = re.sub(r"[^0-9]+", "", time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(path.stat().st_mtime)))
        for suffix in (".json", ".md"):
            if self.path(suffix).exists():
                self.path(suffix).rename(self.path(f"-{date}{suffix}"))
        self.say(f"an earlier {path.name} is kept as {self.path(f'-{date}.json').name}")

    def report(self) -> None:
        """Write both files and show the table."""
        self.save()
        sys.path.append(str(gpu_wheels.SITE))
        try:
            from benchmarks import gpu_report

            text = gpu_report.markdown(self.content())
        except Exception as error:
            self.fail("report", f"the table could not be made: {type(error).__name__}: {error}")
            return
        self.path(".md").write_text(text)
        print(f"\n{text}")
        print(self.path(".json"))
        print(self.path(".md"))


class Keeper(threading.Thread):
    """Writes the results again when a worker or a test has left something new: a killed run loses a second or two."""

    def __init__(self, run: Run, every: float = 1.0) -> None:
        super().__init__(daemon=True)
        self.run_, self.every, self.over = run, every, threading.Event()

    def run(self) -> None:
        before = self._state()
        while not self.over.wait(self.every):
            now = self._state()
            if now != before:
                self.run_.save()
                before = now

    def _state(self) -> list[tuple[str, int, int]]:
        files = [*self.run_.folder.glob("part-*.json"), self.run_.folder / OUTCOMES]
        return [(f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.exists()]

    def end(self) -> None:
        """Write no more."""
        self.over.set()
        self.join()


# ---- stages --------------------------------------------------------------------------------------------------


def install(run: Run) -> bool:
    """Packages and the compiled library; False when nothing can run."""
    start = time.monotonic()
    try:
        with _limit(max(run.limit("install"), 60)):
            gpu_wheels.install(run.options.wheels, lambda text: run.say(f"install: {text}"), read_smi("compute_cap"))
    except Exception as error:
        run.stage("install", FAILED, time.monotonic() - start, str(error))
        run.fail("install", str(error))
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
        run.fail("environment", f"no usable PyTorch or GPU here:\n{job.tail()}")
        return False
    run.environment = e = json.loads(job.lines[-1])
    run.identity = gpu_resume.identity(e, run.options)
    if run.options.resume is not None:
        run.earlier = gpu_resume.find(run.options.resume or [run.options.out, RESULTS], run.identity)
        run.notes += run.earlier.why_not
        for line in (*run.earlier.why_not, f"resumed from {', '.join(path.name for path in run.earlier.taken) or 'nothing'}"):
            run.say(line)
        if run.earlier.content.get("choices"):
            (run.folder / CHOICES).write_text(run.earlier.content["choices"])
    run.put_aside()
    run.stage("environment", OK, job.seconds, f"{e['device']}, torch {e['torch']}, CUDA {e['cuda']}, fisnet_cuda {e['commit']}")
    if not e["kernels"] and not run.options.dry_run:
        run.fail("environment", f"the kernels do not load: {e['reason_without_kernels']}")
        return False
    return True


def start_launches(run: Run) -> Job | None:
    """Start what `launches` waits for, beside the look at the machine."""
    if "launches" not in run.options.only:
        return None
    return run.start("launches", [sys.executable, str(SANITIZE), "--device", run.device])


def launches(run: Run, job: Job) -> None:
    """Every kernel once, in every dtype and layout: does anything run at all?"""
    if run.done("launches"):
        job.kill()
        return
    status = job.finish(run.left() if run.options.dry_run else run.limit("launches"))  # emulated, it takes its time
    told = [line for line in job.lines if line]
    if status != OK:
        run.fail("launches", f"{status}\n{job.tail(30)}")
    run.stage("launches", status, job.seconds, told[-1] if told else "")


def tests(run: Run) -> None:
    """The GPU tests, several processes at once; those that have passed before are left out."""
    outcomes, told = run.folder / OUTCOMES, [*run.options.tests, *run.options.test_args]
    if run.done("tests", told):
        return
    outcomes.unlink(missing_ok=True)  # where logs are kept, an earlier run's may lie
    before = run.earlier.content.get("tests", {}).get("outcomes", {})
    passed = run.folder / "passed.json"
    passed.write_text(json.dumps([name for name, (outcome, _) in before.items() if outcome == "passed"]))
    command = [
        sys.executable, "-m", "pytest", *run.options.tests, "-m", "gpu", "-q", "-p", "no:cacheprovider", "--tb=short",
        "-o", "console_output_style=classic", "-p", "benchmarks.gpu_tests", f"--outcomes={outcomes}", f"--passed={passed}",
        *run.options.test_args,
    ]  # fmt: skip
    cores = os.cpu_count() or 1
    if not run.options.dry_run and cores >= 8:
        command += ["-n", str(min(6, cores // 2))]
    job = run.start("tests", command, echo=False, OMP_NUM_THREADS="1")
    status = job.finish(run.limit("tests"))
    found = _outcomes(outcomes, status)
    if status == FAILED and job.process.returncode == NO_TESTS and before:
        status = OK  # all that there are have passed before
    if found:
        detail = f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"
    else:
        detail = "no result was written"
    if before:
        detail += f"; {len(json.loads(passed.read_text()))} had passed before"
    run.tests = found or {"status": status}
    whole = gpu_resume.tests({"outcomes": before} if before else {}, found)
    for name in whole.get("failing", [])[:40]:
        run.fail("tests", name)
    if status == TIMEOUT:
        run.fail("tests", "out of time, the rest is not told")
    elif status == FAILED and not whole.get("failing"):
        run.fail("tests", f"pytest ended with {job.process.returncode}\n{job.tail()}")
    run.stage("tests", status, job.seconds, detail, told)


def _outcomes(path: Path, status: str) -> dict[str, Any]:
    """What `benchmarks.gpu_tests` has written so far; empty when that is nothing."""
    if not path.exists():
        return {}
    found: dict[str, tuple[str, str]] = {}
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # the last one may be half
            name, outcome, message = json.loads(line)
            found[name] = (outcome, message)
    return gpu_resume.counted(status, found) if found else {}


def sanitizer(run: Run) -> None:
    """All four tools of compute-sanitizer on every kernel, at once, and each on a planted bug that it must find."""
    if run.done("sanitizer"):
        return
    start = time.monotonic()
    script = [sys.executable, str(SANITIZE), "--device", run.device]
    tool = shutil.which("compute-sanitizer") or next(
        (str(p) for p in (Path("/usr/local/cuda/bin/compute-sanitizer"),) if p.exists()), None
    )
    if tool is None:
        detail = "compute-sanitizer is not installed here (it comes with the CUDA toolkit)"
        run.notes.append(f"sanitizer: {detail}")
        run.stage("sanitizer", SKIPPED, time.monotonic() - start, detail)
        return
    planted = _planted(run)
    before = {entry["tool"] for entry in run.earlier.content.get("sanitizer", []) if entry["status"] == OK}
    jobs = {}
    for name in TOOLS:
        if name in before:
            continue
        base = [tool, "--tool", name, "--error-exitcode", "99"]
        # only our kernels; but initcheck must see every kernel that writes what ours read
        only_ours = [] if name == "initcheck" else ["--kernel-regex", "kns=fisnet"]
        # every allocation by itself: then an access one element too far is seen
        jobs[name] = run.start(f"sanitizer {name}", [*base, *only_ours, *script], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if planted:
            jobs[f"planted {name}"] = run.start(f"planted {name}", [*base, str(planted), name], echo=False)
    end = run.limit("sanitizer")
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
            run.fail("sanitizer", f"{name}: {status}, {summary or job.tail()}")
    good = len(before) + sum(entry["status"] == OK for entry in run.sanitizer if not entry["tool"].startswith("planted"))
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

    if options.dry_run:
        add("dispatch", "dispatch", "dispatch", 20, "--quick", *options.dispatch_args, first=True)
        add("steps", "small", "gpu_step", 20, "--quick", "--graphs", *options.step_args)
        add("kernels", "kernels", "kernels", 20, "--quick", "--dtypes", "fp32", *options.kernel_args)
        add("classes", "classes", "gpu_turn", 20, "classes", "--models", "small", "--classes", "2", "4", "--batch", "2", "--size",
            "32", "--rounds", "3", "--original-rounds", "2", "--warmup", "1")  # fmt: skip
        add("profile", "profile", "gpu_profile", 5, "--quick")
        add("heatmap", "heatmap", "gpu_turn", 5, "heatmap", "--models", "small", "--batch", "2", "--size", "32", "--rounds", "3",
            "--warmup", "1")  # fmt: skip
        return _weighed(found, options.seconds)
    batch = ["--batch", str(options.batch)]
    add("dispatch", "dispatch", "dispatch", 45, "--precision", "bf16", *batch, *options.dispatch_args, first=True)

    def step(model: str, precision: str, seconds: float, *arguments: str, size: int = 224) -> None:
        more = ["--authors", str(options.authors)] if options.authors and precision == "tf32" else []
        add(
            "steps", f"{model} at {size}, {precision}", "gpu_step", seconds, "--model", model, "--precision", precision,
            "--size", str(size), *batch, *arguments, *more, *options.step_args,
        )  # fmt: skip

    small = 28
    step("resnet50", "bf16", 30, "--compiled", "4")
    step("resnet18", "bf16", 12, "--graphs", size=small)
    for share in range(1, 5):  # each has its part of the most valuable cases, first
        add("kernels", f"kernels {share}/4", "kernels", 18, "--share", f"{share}/4", *options.kernel_args)
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
    return _weighed(found, options.seconds)


def _weighed(workers: list[Worker], told: dict[str, float]) -> list[Worker]:
    """The workers, those of a kind with a time of its own weighed so that they share it."""
    for kind, seconds in told.items():
        mine = [worker for worker in workers if worker.kind == kind]
        whole = sum(worker.seconds for worker in mine)
        for worker in mine:
            worker.seconds = worker.most = seconds * worker.seconds / whole
    return workers


def launch(run: Run, worker: Worker, until: float) -> None:
    """Start a worker; it prepares until that many seconds after the run's start."""
    number = run.workers.index(worker)
    earlier, worker.part = (run.folder / f"{name}-{os.getpid()}-{number}.json" for name in ("earlier", "part"))
    earlier.write_text(json.dumps(run.earlier.content.get(worker.kind, [])))
    moment = time.time() + until - run.elapsed
    command = [sys.executable, "-m", *worker.command, "--part", str(worker.part), "--wait", "--until", f"{moment:.1f}"]
    command += ["--earlier", str(earlier)]
    if worker.first:
        command += ["--first", f"{0.75 * FIRST * run.total:.0f}"]
    choices = str(run.folder / CHOICES)  # what one worker finds to be fastest is the choice of all
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
    seconds = min(worker.most or 2 * worker.seconds, share * (run.left() - REPORTING))
    job.tell(f"go {seconds:.1f}")
    status = job.finish(min(2 * seconds + GRACE, run.left() - REPORTING / 2))
    part = worker.found()
    whole = [row for row in part["rows"] if gpu_resume.is_good(row)]
    detail = f"{len(whole)} rows"
    for what, items in (("cut off", [row for row in part["rows"] if row.get("partial")]), ("left out", part["missing"])):
        if items:
            detail += f", {len(items)} {what}"
    if part["wrong"]:
        run.fail(worker.name, "a result is wrong, its time is withheld; see the notes")
    elif status == FAILED:  # not correctness, but not nothing either
        detail += f", {job.tail(2)}"
        run.fail(worker.name, job.tail())
    run.stage(worker.name, status, time.monotonic() - start, detail, worker.command, part["wrong"])


def fake(run: Run, job: Job) -> None:
    """Wait for every case at its real sizes over fake tensors, which ran beside everything else."""
    status = job.finish(run.left() - REPORTING)
    if job.process.returncode == 2:
        status = SKIPPED
        run.notes.append(f"{FAKE}: {job.lines[-1] if job.lines else job.tail()}")
    elif status != OK:
        run.fail(FAKE, f"{status}\n{job.tail(30)}")
    run.stage(FAKE, status, job.seconds, next((line for line in reversed(job.lines) if line), ""))


# ---- the command ---------------------------------------------------------------------------------------------


def _time_of_part(text: str) -> tuple[str, float]:
    """Parse ``tests=60``."""
    part, _, seconds = text.partition("=")
    if part not in PARTS or not re.fullmatch(r"\d+(\.\d+)?", seconds):
        raise argparse.ArgumentTypeError(f"{text!r} is no PART=SECONDS; the parts are {', '.join(PARTS)}")
    return part, float(seconds)


def _existing(text: str) -> Path:
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"there is no {text}: name a result file of make gpu, or a folder of them")
    return path


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    p.add_argument("--dry-run", action="store_true", help="without a GPU: emulated at tiny sizes, fake at real ones")
    # fmt: off
    p.add_argument("--resume", type=_existing, nargs="*", metavar="PLACE", help="do not do again what these result files have, or "
                   "those of these folders (of --out and benchmarks/results), of the same sources, GPU, versions and settings")
    p.add_argument("--minutes", type=float, default=7.75, help="for everything")
    p.add_argument("--seconds", type=_time_of_part, nargs="+", default=[], metavar="PART=SECONDS",
                   help=f"what a part may take, instead of its share of the minutes; of {', '.join(PARTS)}")
    # fmt: on
    p.add_argument("--only", nargs="+", choices=(*STAGES, FAKE), help="which stages; all of them")
    p.add_argument("--profile", action="store_true", help="also profile Selective ResNet-50")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--zennit", type=Path, nargs="+", default=[], help="folders with zennit or captum: time their heatmaps too")
    p.add_argument("--authors", type=Path, help="folder of the authors' code (PedroRASB/FasterISNet): time its step too")
    p.add_argument("--wheels", type=Path, default=gpu_wheels.WHEELS, help="what 'make gpu-wheels' made (build/gpu_wheels)")
    p.add_argument("--tests", nargs="+", default=["tests/kernels", "tests/gpu"], help="which tests")
    p.add_argument("--test-args", type=shlex.split, default=[], help="more options of pytest: --test-args='-x -k loss'")
    p.add_argument("--kernel-args", type=shlex.split, default=[], help="more options of benchmarks/kernels.py")
    p.add_argument("--dispatch-args", type=shlex.split, default=[], help="more options of benchmarks/dispatch.py")
    p.add_argument("--step-args", type=shlex.split, default=[], help="more options of benchmarks/gpu_step.py")
    p.add_argument("--at-once", type=int, help="how many benchmarks prepare at the same time")
    p.add_argument("--logs", type=Path, help="keep the logs of all stages in this folder")
    return p


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with what hangs on several of them."""
    p = arguments()
    options = p.parse_args(argv)
    if FAKE in (options.only or ()) and not options.dry_run:
        p.error(f"--only {FAKE} needs --dry-run: it stands in for a GPU")
    options.only = options.only or [*STAGES, *[FAKE] * options.dry_run]
    options.seconds = dict(options.seconds)
    options.out, options.wheels = options.out.resolve(), options.wheels.resolve()
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = parse(argv)
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
    if not (options.dry_run or install(run)):
        return 2
    launched = start_launches(run)
    if not environment(run):
        return 2
    run.workers = [worker for worker in workers(options) if not run.done(worker.name, worker.command)]
    faked = run.start(FAKE, [sys.executable, "-m", "benchmarks.gpu_fake"]) if FAKE in options.only else None
    cores = os.cpu_count() or 1
    preparing, keeper = Preparing(run, options.at_once or max(1, cores // 2)), Keeper(run)
    try:
        keeper.start()
        if launched is not None:
            launches(run, launched)
        preparing.start()
        preparing.wait_for_first()
        for name, stage in (("tests", tests), ("sanitizer", sanitizer)):
            if name in options.only:
                stage(run)
        preparing.wait()
        run.say("timing begins")
        measure(run)
        if faked is not None:
            fake(run, faked)
        run.finished = True
    finally:
        preparing.over.set()
        keeper.end()
        run.report()
    run.say(f"{len(run.failures)} failures" if run.failures else "nothing failed")
    content = run.content()
    return int(bool(content["failures"]) or content["wrong"])


def _end_all() -> None:
    for job in list(Job.alive):
        job.kill()


if __name__ == "__main__":
    sys.exit(main())
