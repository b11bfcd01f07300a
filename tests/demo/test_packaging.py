"""What is shipped, and the commands of the Makefile."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "fisnet_cuda").rglob("*.py"))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy to build in, so that nothing is left in the checkout and nothing stale is picked up from it."""
    copy = tmp_path_factory.mktemp("source") / "copy"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "demo_out")
    return Path(shutil.copytree(ROOT, copy, ignore=ignored))


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> zipfile.ZipFile:
    pytest.importorskip("setuptools")
    pytest.importorskip("wheel")
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(out)]
    _python("-m", "pip", "wheel", *options, str(source), cwd=out)
    return zipfile.ZipFile(next(out.glob("*.whl")))


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> list[str]:
    pytest.importorskip("setuptools")
    out = tmp_path_factory.mktemp("sdist")
    _python("-c", f"import setuptools.build_meta as b; b.build_sdist({str(out)!r})", cwd=source)
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        return [name.partition("/")[2] for name in archive.getnames()]


def _python(*arguments: str, cwd: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["FISNET_CUDA_BUILD"] = "0"  # tests/package builds the kernels
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


class TestPackage:
    def test_wheel_holds_the_package_and_nothing_else(self, wheel):
        files = [name for name in wheel.namelist() if ".dist-info/" not in name]
        assert sorted(name for name in files if name.endswith(".py")) == MODULES
        assert all(name.startswith("fisnet_cuda/") for name in files)

    def test_wheel_carries_the_licence(self, wheel):
        assert any(name.endswith("LICENSE") for name in wheel.namelist())

    def test_wheel_asks_for_torch_by_a_lower_bound_and_for_numpy_only(self, wheel):
        name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
        needs = re.findall(r"^Requires-Dist: (.*)$", wheel.read(name).decode(), re.MULTILINE)
        assert sorted(need for need in needs if "extra ==" not in need) == ["numpy", "torch>=2.11"]
        extras = [need for need in needs if "extra ==" in need]
        assert not any("torchvision" in need or re.match(r"torch\b", need) for need in extras)

    def test_sdist_can_be_tested(self, sdist):
        for name in ("pyproject.toml", "setup.py", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt"):
            assert name in sdist
        assert "tests/demo/test_demo.py" in sdist
        assert set(MODULES) <= set(sdist)
        assert not any("__pycache__" in name or name.endswith(".pyc") for name in sdist)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestMakefile:
    @pytest.mark.parametrize("target", ["help", "demo", "test", "bench", "build", "lint", "clean"])
    def test_target_exists(self, target):
        assert make("--dry-run", target).returncode == 0

    def test_help_is_the_default_and_names_every_command(self):
        done = make()
        assert done.returncode == 0
        for target in ("demo", "test", "bench", "build", "lint", "clean"):
            assert f"make {target}" in done.stdout

    def test_own_environment_is_used_as_it_is(self):
        plan = make("--dry-run", "demo", f"PYTHON={sys.executable}").stdout
        assert "-m venv" not in plan
        assert f"{sys.executable} -m fisnet_cuda.demo" in plan

    @pytest.mark.parametrize("target", ["test", "bench"])
    def test_kernels_are_built_before_they_are_tested(self, target):
        plan = make("--dry-run", target, f"PYTHON={sys.executable}").stdout.splitlines()
        build = next(i for i, line in enumerate(plan) if "build_ext --inplace" in line)
        assert any(f"{sys.executable} -m " in line for line in plan[build + 1 :])

    def test_clean_removes_what_builds_leave(self, tmp_path):
        shutil.copy(ROOT / "Makefile", tmp_path)
        left = ("fisnet_cuda/_C.abi3.so", "fisnet_cuda/_build_note.txt", "build/gates/x.o", "dist/x.whl", "x.egg-info/PKG-INFO")
        kept = ("fisnet_cuda/__init__.py", "csrc/kernels/x.cu")
        for name in left + kept:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        assert make("-C", str(tmp_path), "clean").returncode == 0
        assert not [name for name in left if (tmp_path / name).exists()]
        assert all((tmp_path / name).exists() for name in kept)

    def test_own_environment_without_torch(self, tmp_path):
        venv.create(tmp_path / "bare", with_pip=False)
        done = make("demo", f"PYTHON={tmp_path / 'bare' / 'bin' / 'python'}")
        assert done.returncode != 0
        assert "has no torch" in done.stderr

    def test_own_environment_that_is_none(self, tmp_path):
        done = make("demo", f"PYTHON={tmp_path / 'nothing'}")
        assert done.returncode != 0
        assert "is not a Python interpreter" in done.stderr

    def test_python_too_old(self, tmp_path):
        old = _script(tmp_path / "python3.8", 'case "$1" in --version) echo Python 3.8.20;; *) exit 1;; esac')
        done = make("demo", f"BASE_PYTHON={old}", f"VENV={tmp_path / 'env'}")
        assert done.returncode != 0
        assert "needs Python 3.10 or newer" in done.stderr
        assert "Python 3.8.20" in done.stderr

    def test_venv_module_missing(self, tmp_path):
        bare = _script(tmp_path / "python3", 'case "$2" in *ensurepip*) exit 1;; *) exit 0;; esac')
        done = make("demo", f"BASE_PYTHON={bare}", f"VENV={tmp_path / 'env'}")
        assert done.returncode != 0
        assert "apt install python3-venv" in done.stderr


def _script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path
