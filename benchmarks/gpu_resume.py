"""What an earlier run of `benchmarks.gpu` has found, and what is left to do: ``make gpu GPU_ARGS=--resume``.

A run takes up the results of earlier ones only where everything agrees that they depend on (`identity`): sources, GPU, driver,
versions, settings. What has ended well is not done again; what failed, ran out of time or was cut off is. Standard library
only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import gpu_wheels

Content = dict[str, Any]  # of a result file
OK = "ok"
# the columns that make a row the same case; none: the rows of a kind are made together, and replaced together
KEYS = {
    "dispatch": ("model", "size", "batch", "classes", "precision", "case", "op", "operands", "mode"),
    "steps": ("model", "size", "batch", "classes", "precision", "layout", "case"),
    "kernels": ("case", "dtype", "sizes"),
    "classes": (),
    "profile": (),
    "heatmap": (),
}
BAD = ("partial", "wrong", "slower", "blacklisted")  # columns of a row that has to be measured again, where they are true
SETTINGS = ("batch", "dry_run", "kernel_args", "dispatch_args", "step_args")  # options of which results hang
MACHINE = ("device", "torch", "cuda", "python", "allocator")
GPU = ("driver_version", "cudnn")
BUILD = ("cuda", "archs", "compiler")


def identity(environment: Mapping[str, Any], options: Any) -> dict[str, str]:
    """What two runs must agree in before their results may stand in one table; the commit's name alone does not matter.

    Args:
        environment: of `benchmarks.gpu_report.describe`.
        options: of `benchmarks.gpu`.
    """
    found = {"sources": gpu_wheels.of_everything()}
    for names, place in ((MACHINE, environment), (GPU, environment.get("gpu", {})), (BUILD, environment.get("build", {}))):
        found |= {f"kernels' {name}" if names is BUILD else name: str(place.get(name)) for name in names}
    found |= {name: str(getattr(options, name)) for name in SETTINGS}
    # of others' code only whether it is there: where it lies differs from machine to machine
    return found | {name: str(bool(getattr(options, name))) for name in ("authors", "zennit")}


@dataclass(frozen=True)
class Earlier:
    """Results of earlier runs.

    Args:
        content: all that is taken up, as the content of one file; empty without any.
        taken: the files that it comes from.
        why_not: a line for each file that is not used.
    """

    content: Content = field(default_factory=dict)
    taken: tuple[Path, ...] = ()
    why_not: tuple[str, ...] = ()


def find(places: Sequence[Path], mine: Mapping[str, str]) -> Earlier:
    """The results of earlier runs that may be taken up.

    Args:
        places: result files, and folders of them.
        mine: `identity` of this run.
    """
    usable: dict[Path, Content] = {}
    why_not = []
    for path in dict.fromkeys(path.resolve() for place in places for path in files(place)):
        try:
            content = json.loads(path.read_text())
            theirs = content["identity"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            if path in [place.resolve() for place in places]:  # in a folder lie the results of other benchmarks too
                why_not.append(f"{path.name} is not used, it is no result of make gpu: {type(error).__name__}")
            continue
        differ = [f"{name}: {theirs.get(name)} there, {mine[name]} here" for name in mine if theirs.get(name) != mine[name]]
        if differ:
            why_not.append(f"{path.name} is not used, it differs in {'; '.join(differ)}")
        else:
            usable[path] = content
    found: Content = {}
    for path in sorted(usable, key=lambda path: usable[path]["environment"]["date"]):
        found = merged(found, usable[path])
    return Earlier(found, tuple(usable), tuple(why_not))


def files(place: Path) -> list[Path]:
    """The file itself, or the JSON files of the folder; none of a folder that does not exist yet."""
    return [place] if place.is_file() else sorted(place.glob("*.json"))


def is_good(row: Mapping[str, Any]) -> bool:
    """Whether a row need not be measured again.

    Example:
        >>> is_good({"case": "phi_scale", "ms": {}}), is_good({"case": "phi_scale", "wrong": "has error 1"})
        (True, False)
    """
    return not any(row.get(name) for name in BAD)


def merged(first: Content, second: Content) -> Content:
    """The results of two runs as those of one; where both have something, the second run's.

    Args:
        first, second: what their files hold; ``first`` may be empty.
    """
    if not first:
        return second
    again = {stage["name"] for stage in second["stages"]}

    def others(items: Iterable[Sequence[str]]) -> list:
        """What was said of stages that were not run again."""
        return [list(item) for item in items if item[0] not in again]

    stages = [stage for stage in first["stages"] if stage["name"] not in again] + second["stages"]
    bars = {bar["name"]: bar for bar in (*first["bars"], *second["bars"])}
    tools = {entry["tool"]: entry for entry in (*first["sanitizer"], *second["sanitizer"])}
    return {
        **second,
        "runs": [*first["runs"], *second["runs"]],
        "seconds": round(first["seconds"] + second["seconds"], 1),
        "stages": stages,
        "wrong": second["wrong"] or any(stage.get("wrong") for stage in stages),
        "failures": others(first["failures"]) + second["failures"],
        "missing": others(first["missing"]) + second["missing"],
        "notes": list(dict.fromkeys([*first["notes"], *second["notes"]])),
        "tests": tests(first["tests"], second["tests"]),
        "sanitizer": list(tools.values()),
        "bars": list(bars.values()),
        "choices": second["choices"] or first["choices"],
        **{kind: rows(kind, first[kind], second[kind]) for kind in KEYS},
    }


def rows(kind: str, first: Sequence[dict], second: Sequence[dict]) -> list[dict]:
    """The rows of two runs, in the order of the first; a case that both have is the second's.

    Example:
        >>> old = [{"case": "a", "dtype": "bf16", "ms": 1}, {"case": "b", "dtype": "bf16", "wrong": "nan"}]
        >>> rows("kernels", old, [{"case": "b", "dtype": "bf16", "ms": 2}])
        [{'case': 'a', 'dtype': 'bf16', 'ms': 1}, {'case': 'b', 'dtype': 'bf16', 'ms': 2}]
    """

    found, new = _grouped(kind, first), _grouped(kind, second)
    for key, group in new.items():
        cut_off = any(row.get("partial") for row in group)
        if not (cut_off and key in found and all(map(is_good, found[key]))):
            found[key] = group
    return [row for group in found.values() for row in group]


def _grouped(kind: str, rows: Sequence[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row.get(name) for name in KEYS[kind]], sort_keys=True), []).append(row)
    return groups


def tests(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The tests of two runs: of each the last outcome."""
    if not first or not second:
        return dict(second or first)
    return counted(second["status"], {**first["outcomes"], **second["outcomes"]})


def counted(status: str, outcomes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What the result file says of the tests.

    Args:
        status: of the stage.
        outcomes: test -> "passed", "failed" or "skipped", and its message.
    """
    by: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for name, (outcome, _) in outcomes.items():
        by[outcome].append(name)
    return {
        "status": status, **{outcome: len(names) for outcome, names in by.items()}, "failing": by["failed"],
        "messages": {name: outcomes[name][1] for name in by["failed"]},
        "why_skipped": sorted({outcomes[name][1] for name in by["skipped"]}),
        "outcomes": {name: list(told) for name, told in outcomes.items()},
    }  # fmt: skip


def is_done(content: Content, stage: str, command: Sequence[str] = ()) -> bool:
    """Whether the stage has ended well, and was told the same.

    Args:
        content: of `find`.
        stage: its name.
        command: what it was told.
    """
    if not content or any(item[0] == stage for item in (*content["missing"], *content["failures"])):
        return False
    return any(entry["name"] == stage and entry["status"] == OK and entry["command"] == list(command) for entry in content["stages"])
