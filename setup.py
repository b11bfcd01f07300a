"""Builds the CUDA kernels when it can, a pure-Python package when it cannot; everything else is said in pyproject.toml.

Environment:
    FISNET_CUDA_BUILD: "auto" (the default) builds the kernels where a CUDA toolkit and torch are found, and otherwise leaves the
        reason for `fisnet_cuda.info()`; "1" fails where they cannot be built; "0" never builds them.
    TORCH_CUDA_ARCH_LIST: architectures, "8.0;9.0+PTX" unless set.
    MAX_JOBS: compilers at a time; unless set, one a core and one for every 4 GB of free memory.
    CUDA_HOME: the toolkit, when it is not where nvcc on PATH is and not /usr/local/cuda.

pip hides torch from the build unless it is called with --no-build-isolation, and torch is no build requirement, because a
build that downloads gigabytes of torch to compile against a version you do not have would be worse than no kernels.
Nothing is downloaded here.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020b000000000000"  # the extension runs on torch >= 2.11
LIBRARY, NOTE = "_C.abi3.so", "_build_note.txt"
GB = 2**30


class CannotBuildError(Exception):
    """Why there will be no kernels, and what to do about it."""


def read_sources():
    """csrc/sources.txt: {section: [path, ...]}, relative paths (absolute ones break sdist and wheel)."""
    sources, section = {}, None
    for line in (ROOT / "csrc" / "sources.txt").read_text().splitlines():
        line = line.strip()
        if line.startswith("["):
            section = sources.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            section += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob(line))
    return sources


def find_toolkit():
    """The root of a CUDA toolkit. nvcc on PATH may be a wrapper script, so only a root that has the headers counts."""
    nvcc, named = shutil.which("nvcc"), os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for place in [named] if named else [nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]:
        if place and (Path(place) / "bin" / "nvcc").exists() and (Path(place) / "include" / "cuda_runtime.h").exists():
            return str(place)
    where = "where CUDA_HOME says" if named else "(beside nvcc on PATH or in /usr/local/cuda)"
    raise CannotBuildError(
        f"no CUDA toolkit was found {where} when it was built (bin/nvcc and include/cuda_runtime.h are needed): "
        "install one or set CUDA_HOME"
    )


def import_cpp_extension(toolkit):
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise CannotBuildError(
            f"torch could not be imported where it was built ({error}): pip hides it unless you say `pip install --no-build-isolation`"
        ) from error
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11):
        raise CannotBuildError(f"the kernels need torch 2.11 or newer, and it was built beside torch {torch.__version__}")
    said = subprocess.run([f"{toolkit}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    found, wanted = re.search(r"release (\d+)", said), (torch.version.cuda or "").partition(".")[0]
    if found and wanted and found[1] != wanted:
        raise CannotBuildError(
            f"it was built beside a torch for CUDA {torch.version.cuda} with a toolkit of CUDA {found[1]}: "
            f"set CUDA_HOME to a toolkit of CUDA {wanted}"
        )
    return cpp_extension


def free_memory():
    """Bytes that a build may take: what the machine has available, or less where a container allows less."""
    free = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        limit, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            free.append(int(limit) - int(used))
    except (OSError, ValueError):
        pass  # not said here
    return min(free, default=4 * GB)


def max_jobs():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, free_memory() // (4 * GB)))


def extension():
    """The arguments of setup() that build the kernels; CannotBuildError where they cannot be built."""
    if sys.platform != "linux":
        raise CannotBuildError(f"the kernels are built on Linux only, and it was built on {sys.platform}")
    toolkit = find_toolkit()
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise CannotBuildError(f"no C++ compiler ({compiler}) was found when it was built: install g++ or set CXX")
    cpp_extension = import_cpp_extension(toolkit)

    cpp_extension.CUDA_HOME = toolkit  # None beside a CPU build of torch, which builds the kernels just as well
    archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX").replace(" ", ";")
    os.environ.setdefault("MAX_JOBS", str(max_jobs()))
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # this environment's ninja
    sources = read_sources()
    define = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    # messages of checks name files: relative to the project, not where it lay when it was built
    no_paths = [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={Path(cpp_extension.__file__).parents[2]}/="]
    ext = cpp_extension.CppExtension(
        "fisnet_cuda._C",
        sources["host"] + sources["cuda"],
        depends=headers(),
        include_dirs=[f"{toolkit}/include"],
        library_dirs=[f"{toolkit}/lib64"],
        extra_compile_args={
            "cxx": ["-O2", "-g0", "-std=c++17", "-Wall", "-fvisibility=hidden", *no_paths, *define],
            "nvcc": [
                "-O3", "-std=c++17", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden",
                f"-DFISNET_ARCHS={archs.replace(';', '/')}", *define,
            ],
        },
        # cudart static and hidden, nothing of torch_cuda or c10_cuda: the library loads beside any build of torch
        extra_link_args=["-Wl,-O1", "-Wl,--as-needed", "-Wl,--exclude-libs,ALL", "-lcudart_static", "-ldl", "-lrt", "-lpthread"],
        py_limited_api=True,
    )  # fmt: skip

    class BuildKernels(cpp_extension.BuildExtension):
        """Also rebuilds after a header or the list of architectures has changed."""

        def build_extensions(self):
            newest = max((ROOT / header).stat().st_mtime for header in headers())
            for made in Path(self.build_temp).rglob("kernels/*.o"):  # beside a CPU build of torch, ninja is not told of their headers
                if made.stat().st_mtime < newest:
                    made.unlink()
            self.force = True  # ninja knows better than setuptools what is up to date: it compares command lines too
            super().build_extensions()

        def copy_extensions_to_source(self):  # --inplace, and editable installs
            super().copy_extensions_to_source()
            leave(ROOT / "fisnet_cuda", "")

    return {
        "ext_modules": [ext],
        "cmdclass": {"build_ext": BuildKernels, "build_py": commands("")["build_py"]},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def headers():
    csrc = ROOT / "csrc"
    return sorted(str(p.relative_to(ROOT)) for kind in ("*.h", "*.cuh", "*.txt") for p in csrc.rglob(kind))


def leave(package, note):
    """Leave ``note`` for `fisnet_cuda.info()`, and neither a library nor a note of an earlier build."""
    if note:
        package.mkdir(parents=True, exist_ok=True)
        (package / NOTE).write_text(note + "\n")
        (package / LIBRARY).unlink(missing_ok=True)
    else:
        (package / NOTE).unlink(missing_ok=True)


def commands(note):
    """The commands of a build without kernels, for the reason ``note``; and build_py of one with them, "" for a reason."""

    class BuildPackage(build_py):
        def run(self):
            super().run()
            leave(ROOT / "fisnet_cuda" if self.editable_mode else Path(self.build_lib) / "fisnet_cuda", note)

    class BuildNothing(build_ext):
        def run(self):
            if self.inplace:
                leave(ROOT / "fisnet_cuda", note)

    return {"build_py": BuildPackage, "build_ext": BuildNothing}


def choose():
    choice = os.environ.get("FISNET_CUDA_BUILD", "auto")
    if choice not in ("auto", "1", "0"):
        sys.exit(f"fisnet_cuda: FISNET_CUDA_BUILD must be auto, 1 or 0, got {choice!r}")
    if choice == "0":
        return {"cmdclass": commands("this installation has no CUDA kernels: it was built with FISNET_CUDA_BUILD=0")}
    try:
        return extension()
    except CannotBuildError as reason:
        if choice == "1":
            sys.exit(f"fisnet_cuda: FISNET_CUDA_BUILD=1, but the CUDA kernels cannot be built: {reason}")
        print(f"fisnet_cuda: no CUDA kernels are built: {reason}", file=sys.stderr)
        return {"cmdclass": commands(f"this installation has no CUDA kernels: {reason}")}


setup(**choose())
