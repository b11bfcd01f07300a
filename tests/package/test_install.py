"""Every way to install the package, each built from a copy of the tree and tried in a clean virtual environment.

Nothing is downloaded: torch and the build tools are those that run this test, lent to the new environment by a .pth file.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from package import check_symbols, tools

ROOT = tools.ROOT
OFFLINE = ("--disable-pip-version-check", "--no-build-isolation", "--no-deps", "--no-index", "--quiet")
lacking = tools.lacks("nvcc", "g++")
needs_nvcc = pytest.mark.skipif(bool(lacking), reason=lacking)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the package is built and proven on Linux")

PROBE = """
import json, sys
import torch, fisnet_cuda as fc
from fisnet_cuda import _backend
loaded = fc.info()["kernels"]
print(json.dumps({
    "file": fc.__file__,
    "info": fc.info(),
    "build_info": _backend.build_info(),
    "cuda": loaded and torch._C._dispatch_has_kernel_for_dispatch_key("fisnet::phi_scale", "CUDA"),
    "cpu": loaded and torch._C._dispatch_has_kernel_for_dispatch_key("fisnet::phi_scale", "CPU"),
    "fake": loaded and torch.ops.fisnet.phi_scale(*[torch.empty(2, 3, 4, 4, device="meta")] * 2, 0.1, *[None] * 4, True)[0].shape,
    "logits": fc.ISNet(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)))(torch.rand(2, 3, 2, 2)).shape,
}))
"""


def environment(**changes):
    """This process's environment without what would change a build, plus ``changes`` (None removes)."""
    dropped = ("PYTHONPATH", "FISNET_CUDA_BUILD", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "MAKEFLAGS", "MAKELEVEL")
    kept = {k: v for k, v in os.environ.items() if k not in dropped} | {"PIP_NO_INDEX": "1"}
    return {k: v for k, v in (kept | changes).items() if v is not None}


def run(*command, **options):
    return tools.run(*command, **options)


def copy_of_the_tree(to):
    """The sources, without anything built."""
    ignored = (".*", "__pycache__", "*.egg-info", "*.so", "_build_note.txt", "build", "dist", "demo_out", "results")
    return Path(shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*ignored)))


class Env:
    """A clean virtual environment that may use this one's torch."""

    def __init__(self, folder):
        self.folder = folder
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.python = folder / "bin" / "python"
        self.site = Path(run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (self.site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def pip(self, *arguments, **changes):
        return run(self.python, "-m", "pip", *arguments, cwd=self.folder, env=environment(**changes))

    def probe(self):
        return json.loads(run(self.python, "-W", "ignore", "-c", PROBE, cwd=self.folder, env=environment()).splitlines()[-1])


@pytest.fixture
def env(tmp_path):
    return Env(tmp_path / "env")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder that the workers of one test run share."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    folder = base / "install"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def sdist(shared):
    """The source archive, made once."""
    with open(shared / "sdist.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "sdist").exists():
            tree = copy_of_the_tree(shared / "tree")
            leave_rubbish(tree)
            code = f"import setuptools.build_meta as b; b.build_sdist({str(shared / 'sdist-new')!r})"
            run(sys.executable, "-c", code, cwd=tree, env=environment(FISNET_CUDA_BUILD="0"))
            (shared / "sdist-new").rename(shared / "sdist")
    return next((shared / "sdist").glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(shared, sdist):
    """The wheel with kernels for all architectures, built from the source archive, once; and what the build took."""
    with open(shared / "wheel.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "wheel").exists():
            code = (
                "import json, resource, subprocess, sys, time\n"
                "start = time.monotonic(); subprocess.run(sys.argv[1:], check=True); u = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
                "print(json.dumps([time.monotonic() - start, u.ru_utime + u.ru_stime, u.ru_maxrss]))"
            )
            pip = [sys.executable, "-m", "pip", "wheel", *OFFLINE, "--wheel-dir", str(shared / "wheel-new"), str(sdist)]
            took = run(sys.executable, "-c", code, *pip, cwd=shared, env=environment(FISNET_CUDA_BUILD="1", MAX_JOBS="2"))
            (shared / "took.json").write_text(took.splitlines()[-1])
            (shared / "wheel-new").rename(shared / "wheel")
    return next((shared / "wheel").glob("*.whl")), json.loads((shared / "took.json").read_text())


def leave_rubbish(tree):
    """What earlier builds and runs leave."""
    (tree / "fisnet_cuda" / "_C.abi3.so").write_text("stale")
    (tree / "fisnet_cuda" / "_build_note.txt").write_text("stale")
    for folder in ("fisnet_cuda/__pycache__", "tests/ops/__pycache__", "csrc/kernels/__pycache__"):
        (tree / folder).mkdir(exist_ok=True)
        (tree / folder / "x.cpython-310.pyc").write_text("stale")
    (tree / "csrc" / "kernels" / "x.o").write_text("stale")


def has_kernels(found, archs):
    assert found["info"]["kernels"], found["info"]
    assert found["cuda"], "registered for CUDA, on a machine without a GPU"
    assert not found["cpu"], "the emulator is no part of the package"
    assert found["fake"] == [2, 3, 4, 4]
    assert (found["info"]["reason"], found["info"]["remedy"]) == ("", "")
    assert found["info"]["kernels_archs"] == archs
    assert re.fullmatch(r"\d+\.\d+\.\d+", found["info"]["kernels_cuda"])
    assert any(name.startswith("phi_scale_kernel<float, 4") for name in found["build_info"]["kernels"])
    assert "/" not in json.dumps(found["build_info"]), "no path of the machine that built it"


# ---- the source archive --------------------------------------------------------------------------------------------------


def test_sdist_holds_what_builds_and_tests_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "emu", "fisnet_cuda", "tests", "benchmarks"):
        ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.is_file()}
        ours = {name for name in ours if not re.search(r"__pycache__|\.py[co]$|\.so$|_build_note|benchmarks/results", name)}
        assert ours <= names, sorted(ours - names)
    assert {"CMakeLists.txt", "Makefile", "constraints.txt", "pyproject.toml", "setup.py", "LICENSE", "README.md"} <= names
    assert not [name for name in names if re.search(r"__pycache__|\.py[cod]$|\.so$|\.o$|_build_note\.txt$", name)]


# ---- with kernels --------------------------------------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.slow
def test_sdist_to_wheel_to_environment(wheel, env, record_property):
    """The source archive builds the wheel; the wheel runs where nothing else of the project is."""
    path, (seconds, cpu_seconds, peak_kb) = wheel
    record_property("build", f"{seconds:.0f} s, {cpu_seconds:.0f} s of CPU, largest process {peak_kb / 2**10:.0f} MB")
    assert path.name.endswith("-cp310-abi3-linux_x86_64.whl") or "-cp310-abi3-" in path.name
    files = zipfile.ZipFile(path).namelist()
    ours = [name for name in files if ".dist-info/" not in name]
    assert [name for name in ours if not name.endswith((".py", "py.typed"))] == ["fisnet_cuda/_C.abi3.so"]
    assert all(name.startswith("fisnet_cuda/") for name in ours)

    env.pip("install", *OFFLINE, path)
    found = env.probe()
    assert Path(found["file"]).is_relative_to(env.site)
    has_kernels(found, "8.0 9.0+PTX")
    assert check_symbols.complaints(Path(found["file"]).with_name("_C.abi3.so")) == {}


@needs_nvcc
@pytest.mark.slow
def test_the_build_fits_a_small_machine(wheel):
    """4 GB on two cores: no compiler process may take half of it. (Time is reported: this machine may be busy.)"""
    _, (seconds, cpu_seconds, peak_kb) = wheel
    print(f"full build: {seconds:.0f} s, {cpu_seconds:.0f} s of CPU, largest process {peak_kb / 2**10:.0f} MB")
    assert 0 < peak_kb * 1024 < 2 * 2**30


@needs_nvcc
@pytest.mark.slow
def test_editable(env, tmp_path):
    """An editable install runs the checkout's own files, with kernels; again with FISNET_CUDA_BUILD=0 they are gone, and back."""
    tree = copy_of_the_tree(tmp_path / "tree")
    leave_rubbish(tree)
    install = ("install", *OFFLINE, "--editable", tree)
    env.pip(*install, FISNET_CUDA_BUILD="1", TORCH_CUDA_ARCH_LIST="9.0")
    found = env.probe()
    assert Path(found["file"]) == tree / "fisnet_cuda" / "__init__.py"
    has_kernels(found, "9.0")
    assert not (tree / "fisnet_cuda" / "_build_note.txt").exists()

    env.pip(*install, FISNET_CUDA_BUILD="0")
    found = env.probe()
    assert not found["info"]["kernels"]
    assert "FISNET_CUDA_BUILD=0" in found["info"]["reason"]
    assert not (tree / "fisnet_cuda" / "_C.abi3.so").exists()


@needs_nvcc
@pytest.mark.slow
def test_in_place_rebuilds_what_has_changed(tmp_path):
    """A header's change rebuilds, which ninja does not notice by itself beside a CPU build of torch; no change builds nothing."""
    tree = tmp_path / "tree"
    copy_of_the_tree(tree)
    for path in (tree / "csrc").glob("*/*"):
        if path.suffix in (".cu", ".cpp") and path.stem not in ("build_info", "module"):
            path.unlink()  # the smallest extension there can be
    (tree / "fisnet_cuda" / "_build_note.txt").write_text("stale")

    def build(archs="9.0"):
        changes = environment(FISNET_CUDA_BUILD="1", TORCH_CUDA_ARCH_LIST=archs)
        return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, env=changes)

    def compiled(text):
        return sorted(set(re.findall(r"-c (?:-c )?\S*/(\w+\.(?:cu|cpp)) -o", text)))

    everything = ["build_info.cu", "module.cpp"]
    assert compiled(build()) == everything
    library = tree / "fisnet_cuda" / "_C.abi3.so"
    assert library.exists()
    assert not (tree / "fisnet_cuda" / "_build_note.txt").exists()
    if shutil.which("ninja") is None:
        pytest.skip("without ninja everything is always built")
    assert compiled(build()) == []
    time.sleep(0.01)
    (tree / "csrc" / "device" / "registry.h").touch()
    assert compiled(build()) == ["build_info.cu"], "the kernel file that includes it"
    assert compiled(build("8.0")) == ["build_info.cu"]


# ---- without kernels -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = copy_of_the_tree(tmp_path_factory.mktemp("pure") / "tree")
    leave_rubbish(folder)
    return folder


def no_torch(folder):
    """An environment in which `import torch` fails, as in pip's build isolation."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    return {"PYTHONPATH": str(folder)}


def test_pure_python_wheel(tree, env, tmp_path):
    """FISNET_CUDA_BUILD=0: a wheel for every platform, that says why it has no kernels; stale leftovers stay out."""
    out = tmp_path / "out"
    run(sys.executable, "-m", "pip", "wheel", *OFFLINE, "-w", out, tree, cwd=tmp_path, env=environment(FISNET_CUDA_BUILD="0"))
    path = next(out.glob("*.whl"))
    assert path.name.endswith("-py3-none-any.whl")
    archive = zipfile.ZipFile(path)
    assert "fisnet_cuda/_C.abi3.so" not in archive.namelist()
    assert archive.read("fisnet_cuda/_build_note.txt").decode().strip() != "stale"

    env.pip("install", *OFFLINE, path)
    found = env.probe()
    assert Path(found["file"]).is_relative_to(env.site)
    assert not found["info"]["kernels"]
    assert found["info"]["reason"] == "this installation has no CUDA kernels: it was built with FISNET_CUDA_BUILD=0"
    assert "FISNET_CUDA_BUILD=1 pip install --no-build-isolation" in found["info"]["remedy"]
    assert found["logits"] == [2, 2]


REASONS = {
    "no toolkit": (lambda at: {"CUDA_HOME": str(at)}, "no CUDA toolkit was found where CUDA_HOME says", "install one or set CUDA_HOME"),
    "no compiler": (lambda at: {"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler)", "install g++ or set CXX"),
    "no torch": (no_torch, "torch could not be imported where it was built", "pip install --no-build-isolation"),
}


@pytest.mark.parametrize("why", REASONS)
def test_a_build_that_cannot_have_kernels(tree, tmp_path, why):
    """auto installs without them and keeps the reason; 1 fails with the same words."""
    if why != "no toolkit" and lacking:
        pytest.skip(lacking)
    make, reason, remedy = REASONS[why]
    changes = make(tmp_path)
    command = (sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", tmp_path / "lib")
    said = run(*command, cwd=tree, env=environment(**changes))
    note = (tmp_path / "lib" / "fisnet_cuda" / "_build_note.txt").read_text()
    for text in (said, note):
        assert reason in text
        assert remedy in text
    assert note.startswith("this installation has no CUDA kernels: ")
    assert "no CUDA kernels are built: " in said

    done = subprocess.run(command, cwd=tree, env=environment(FISNET_CUDA_BUILD="1", **changes), capture_output=True, text=True)
    assert done.returncode != 0
    assert "FISNET_CUDA_BUILD=1, but the CUDA kernels cannot be built: " + reason in done.stderr
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr


@needs_nvcc
def test_a_toolkit_of_another_cuda(tree):
    code = (
        "import setuptools, torch; torch.version.cuda = '11.8'; said = {}\n"
        "setuptools.setup = lambda **k: said.update(k); import setup; assert 'ext_modules' not in said"
    )
    said = run(sys.executable, "-c", code, cwd=tree, env=environment())
    assert re.search(r"beside a torch for CUDA 11\.8 with a toolkit of CUDA \d+: set CUDA_HOME to a toolkit of CUDA 11", said)


@pytest.mark.parametrize("value", ["yes", "", "2", "AUTO"])
def test_an_unknown_choice(tree, value):
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=tree, env=environment(FISNET_CUDA_BUILD=value), capture_output=True, text=True
    )
    assert done.returncode != 0
    assert f"FISNET_CUDA_BUILD must be auto, 1 or 0, got {value!r}" in done.stderr


def test_jobs_fit_the_memory(tree):
    """One compiler a core, and 4 GB of free memory for each; never less than one."""
    code = (
        "import setuptools; setuptools.setup = lambda **k: None; import setup as s\n"
        "s.os.sched_getaffinity = lambda _: range(16)\n"
        "for gb in (1, 8, 9, 40, 400): s.free_memory = lambda: gb * s.GB; print(s.max_jobs(), end=' ')"
    )
    said = run(sys.executable, "-c", code, cwd=tree, env=environment(FISNET_CUDA_BUILD="0"))
    assert said.split() == ["1", "2", "2", "10", "16"]


def test_one_source_list(tree):
    """setup.py takes what csrc/sources.txt says: every binding and every kernel file, by relative paths."""
    code = (
        "import json, setuptools; setuptools.setup = lambda **k: None; import setup as s\n"
        "print(json.dumps([s.read_sources(), s.headers()]))"
    )
    sources, headers = json.loads(run(sys.executable, "-c", code, cwd=tree, env=environment(FISNET_CUDA_BUILD="0")))
    for section, pattern in (("host", "bind/*.cpp"), ("cuda", "kernels/*.cu")):
        assert sources[section] == sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").glob(pattern))
    assert set(headers) >= {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.h")}
