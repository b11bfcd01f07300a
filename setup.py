"""Builds the CUDA kernels when a CUDA toolkit is found; everything else about the package is said in pyproject.toml."""

import os
import shutil
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
TORCH_TARGET = "0x020b000000000000"  # the extension runs on torch >= 2.11


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
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and str(Path(nvcc).resolve().parents[1]), "/usr/local/cuda"]
    for place in filter(None, places):
        if (Path(place) / "bin" / "nvcc").exists() and (Path(place) / "include" / "cuda_runtime.h").exists():
            return place
    return None


def extension():
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = find_toolkit()
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    sources = read_sources()
    define = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    ext = cpp_extension.CppExtension(
        "fisnet_cuda._C",
        sources["host"] + sources["cuda"],
        include_dirs=[f"{cpp_extension.CUDA_HOME}/include"],
        library_dirs=[f"{cpp_extension.CUDA_HOME}/lib64"],
        extra_compile_args={
            "cxx": ["-O2", "-std=c++17", "-Wall", "-fvisibility=hidden", *define],
            "nvcc": ["-O3", "-std=c++17", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden", *define],
        },
        extra_link_args=["-Wl,-O1", "-Wl,--exclude-libs,ALL", "-lcudart_static", "-ldl", "-lrt", "-lpthread"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [ext],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**(extension() if find_toolkit() else {}))
