"""What travels to a GPU machine without network: wheels of the project and of what its tests import.

``python -m benchmarks.gpu_wheels`` (``make gpu-wheels``) fills build/gpu_wheels, where there is network: the project's own
wheel, whose kernels serve every torch from 2.11 and every Python from 3.10, and the packages below for the other machine's
Python. `install` uses them there. Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "build" / "gpu_wheels"
SITE = ROOT / "build" / "gpu_site"  # missing packages go here, not into the environment, which is left as it is
RECORD = "build.json"
SUFFIXES = (".py", ".cu", ".cuh", ".h", ".cpp")
# module -> the packages that it takes, none of which brings another torch
NEEDS = {
    "numpy": ["numpy"],
    "pytest": ["pytest", "pluggy", "iniconfig", "packaging", "pygments"],
    "xdist": ["pytest-xdist", "execnet"],
    "hypothesis": ["hypothesis", "sortedcontainers", "attrs"],
    "setuptools": ["setuptools"],
    "ninja": ["ninja"],
}
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")


def digest(*places: str) -> str:
    """A hash of the files in these places of the checkout, names and contents."""
    found = hashlib.sha256()
    for place in places:
        path = ROOT / place
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts and file.suffix in SUFFIXES:
                found.update(str(file.relative_to(ROOT)).encode())
                found.update(file.read_bytes())
    return found.hexdigest()[:16]


def of_kernels() -> str:
    """A hash of what the compiled library depends on."""
    return digest("csrc", "setup.py")


def of_everything() -> str:
    """A hash of what results depend on."""
    return digest("csrc", "setup.py", "fisnet_cuda", "benchmarks", "tests")


def record(folder: Path) -> dict[str, str]:
    """What `make` wrote about the wheels; empty when there is nothing."""
    path = folder / RECORD
    return json.loads(path.read_text()) if path.exists() else {}


def commit(folder: Path) -> str:
    """The commit of a checkout that came without its history: the one that the wheels were made from, if it is that."""
    known = record(folder)
    if not known:
        return "unknown"
    return known["commit"] + ("" if known["everything"] == of_everything() else "-changed")


# ---- where there is network ----------------------------------------------------------------------------------


def make(folder: Path, python: str, own_only: bool) -> None:
    """Fill the folder; what was in it goes.

    Args:
        folder: of the wheels.
        python: version of the other machine's Python, as "3.12".
        own_only: only the project's own wheel.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    # without isolation: an isolated build would fetch a torch of its own
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)], check=True)
    (own,) = folder.glob("fisnet_cuda-*.whl")
    if not has_kernels(own):
        print("The wheel has no kernels, for there is no nvcc here: the other machine will compile them.")
    if not own_only:
        packages = [name for names in NEEDS.values() for name in names]
        platforms = [f"--platform={name}" for name in PLATFORMS]
        command = [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--implementation=cp"]
        subprocess.run([*command, f"--python-version={python}", *platforms, "-d", str(folder), *packages], check=True)
    known = {"commit": _git_commit(), "kernels": of_kernels(), "everything": of_everything()}
    (folder / RECORD).write_text(json.dumps(known, indent=1) + "\n")
    for wheel in sorted(folder.glob("*.whl")):
        print(f"{wheel.stat().st_size / 2**20:6.1f} MiB  {wheel.name}")


def has_kernels(wheel: Path) -> bool:
    """Whether a wheel holds a compiled library."""
    with zipfile.ZipFile(wheel) as content:
        return any(name.endswith(".so") for name in content.namelist())


def _git_commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---- on the other machine ------------------------------------------------------------------------------------


def install(folder: Path, say: Callable[[str], None], capability: str = "") -> None:
    """Make the checkout ready to run: missing packages beside it, the compiled library inside.

    The library comes from the project's wheel when that was made from the same sources, else it is compiled here.

    Args:
        folder: of the wheels; may be missing.
        say: told what is done.
        capability: the GPU's compute capability, as "9.0"; what a compilation is for.

    Raises:
        RuntimeError: a package is neither there nor among the wheels, or the library cannot be had.
    """
    missing = [module for module in NEEDS if importlib.util.find_spec(module) is None]
    if missing:
        _install_packages(folder, missing, say)
    own = next(folder.glob("fisnet_cuda-*.whl"), None)
    library = next((ROOT / "fisnet_cuda").glob("_C*.so"), None)
    if own is not None and has_kernels(own) and record(folder).get("kernels") == of_kernels():
        with zipfile.ZipFile(own) as content:
            for name in content.namelist():
                if name.endswith(".so"):
                    (ROOT / name).write_bytes(content.read(name))
        say(f"kernels: from {own.name}")
    elif library is not None and library.stat().st_mtime > _newest_source():
        say(f"kernels: {library.name}, compiled here before")
    else:
        _compile(say, capability)


def _install_packages(folder: Path, missing: list[str], say: Callable[[str], None]) -> None:
    wanted = [name for module in missing for name in NEEDS[module]]
    wheels, absent = [], []
    for name in wanted:
        found = sorted(folder.glob(f"{name.replace('-', '_')}-*.whl"))
        if found:
            wheels.append(str(found[-1]))
        elif importlib.util.find_spec(name.replace("-", "_")) is None:
            absent.append(name)
    if absent:
        raise RuntimeError(
            f"missing here: {', '.join(absent)}. Run 'make gpu-wheels' where there is network and copy build/gpu_wheels along."
        )
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    run = subprocess.run([*command, "--upgrade", "--target", str(SITE), *wheels], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"installing {', '.join(missing)} failed: {run.stderr.strip()[-500:]}")
    say(f"installed into build/gpu_site: {', '.join(missing)}")


def _newest_source() -> float:
    files = [file for file in (ROOT / "csrc").rglob("*") if file.is_file()] + [ROOT / "setup.py"]
    return max(file.stat().st_mtime for file in files)


def _compile(say: Callable[[str], None], capability: str) -> None:
    """Compile in place, one job a core: a minute or two."""
    say("kernels: compiling them, for there is no wheel of these sources")
    variables = {**os.environ, "MAX_JOBS": str(os.cpu_count() or 1), "FISNET_CUDA_BUILD": "1"}
    if SITE.exists():
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SITE), variables.get("PYTHONPATH")]))
        variables["PATH"] = os.pathsep.join([str(SITE / "bin"), variables.get("PATH", "")])
    if capability:
        variables.setdefault("TORCH_CUDA_ARCH_LIST", capability)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    run = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if run.returncode or next((ROOT / "fisnet_cuda").glob("_C*.so"), None) is None:
        raise RuntimeError(f"compiling the kernels failed:\n{(run.stdout + run.stderr).strip()[-3000:]}")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--out", type=Path, default=WHEELS, help="folder of the wheels (build/gpu_wheels)")
    p.add_argument("--python", default="3.12", help="version of the other machine's Python")
    p.add_argument("--own-only", action="store_true", help="only the project's own wheel")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = arguments().parse_args(argv)
    make(options.out.resolve(), options.python, options.own_only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
