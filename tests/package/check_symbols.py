"""Whether a library keeps to the LibTorch stable ABI of torch 2.11, so that it loads beside every later torch.

    python tests/package/check_symbols.py fisnet_cuda/_C.abi3.so

Everything that the library asks of others must be one of: a C function that torch's headers declare for 2.11 or earlier, Python's
limited API, or the C and C++ run-time libraries. So nothing of c10:: or at::, nothing of the CUDA run time (linked statically, and
hidden: torch brings one of its own), and no function of a newer torch. Exits with 1 and a list where something else is found.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

NEWEST = (2, 11)
OLDEST = (2, 0)  # declared without a version
HEADERS = ("stable/c/shim.h", "inductor/aoti_torch/c/*.h", "inductor/aoti_torch/generated/*.h")
LIBRARIES = r"lib(c10|torch|torch_cpu|stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so(\.\d+)?|ld-linux.*\.so\.\d+"


def torch_functions() -> dict[str, tuple[int, int]]:
    """The C functions that the installed torch's headers declare, and since which release."""
    import torch

    include = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    since: dict[str, tuple[int, int]] = {}
    for header in (path for pattern in HEADERS for path in include.glob(pattern)):
        stack: list[tuple[int, int] | None] = []  # one entry an open #if: the release it asks for, or None
        for line in header.read_text().splitlines():
            if m := re.match(r"\s*#\s*if", line):
                m = re.match(r"\s*#\s*if TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)_", line)
                stack.append((int(m[1]), int(m[2])) if m else None)
            elif re.match(r"\s*#\s*endif", line):
                stack.pop()
            for m in re.finditer(r"\b((?:aoti_)?torch_\w+)\s*\(", line):
                release = max((v for v in stack if v), default=OLDEST)
                since[m[1]] = min(release, since.get(m[1], release))
    return since


def needed(library: Path) -> dict[str, str]:
    """The symbols that ``library`` asks of others, with their version ("GLIBC_2.34", "" without one); weak ones left out."""
    text = subprocess.run(
        ["nm", "-D", "--undefined-only", "--with-symbol-versions", str(library)], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split()[-2:] for line in text.splitlines()]
    return dict(name.partition("@")[::2] for kind, name in rows if kind not in "wv")


def complaints(library: Path) -> dict[str, str]:
    """What is wrong, by symbol or library; empty for a good one."""
    since, wrong = torch_functions(), {}
    for symbol, version in needed(library).items():
        if re.match(r"(aoti_)?torch_", symbol):
            if symbol not in since:
                wrong[symbol] = "torch declares no such C function"
            elif since[symbol] > NEWEST:
                wrong[symbol] = "needs torch {}.{}".format(*since[symbol])
        elif re.match(r"(GLIBC|GLIBCXX|CXXABI|GCC)_", version.lstrip("@")) or re.match(r"_ZN?[VTIS]*St\d|_ZN?K?St", symbol):
            continue
        elif not re.match(r"Py[A-Z]", symbol):
            wrong[symbol] = "not of the stable ABI"
    dynamic = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    for name in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic):
        if not re.fullmatch(LIBRARIES, name):
            wrong[name] = "must not be linked"
    for path in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic):
        wrong[path] = "a search path of the machine that built it"
    defined = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True).stdout
    for name in (line.split()[-1] for line in defined.splitlines()):
        if re.match(r"_*cuda[A-Z_]|cu[A-Z]", name):
            wrong[name] = "the CUDA run time must stay hidden: torch brings its own"
    return wrong


def main(library: str) -> int:
    wrong, since = complaints(Path(library)), torch_functions()
    used = [since[s] for s in needed(Path(library)) if s in since]
    print(f"{len(used)} C functions of torch, the newest since {'.'.join(map(str, max(used, default=OLDEST)))}")
    for name, why in wrong.items():
        print(f"{name}: {why}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
