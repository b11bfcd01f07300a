"""What the README tells newcomers to type. (The docstrings' examples run by themselves: pytest --doctest-modules.)"""

import ast
import pathlib
import re

import pytest
import torch

import fisnet_cuda as fc

ROOT = pathlib.Path(__file__).parents[1]


def readme():
    return (ROOT / "README.md").read_text()


def section(text, words):
    """The text below the first heading that contains ``words``, whatever their case."""
    parts = re.split(r"(?m)^(#+ .*)$", text)
    for heading, body in zip(parts[1::2], parts[2::2]):
        if words.lower() in heading.lower():
            return body
    raise AssertionError(f"README.md has no heading with {words!r}")


def python_blocks(text):
    return re.findall(r"(?ms)^```python\n(.*?)^```", text)


def test_training_loop(monkeypatch):
    """The ten lines run as they stand, in an empty namespace, and leave a trained network behind."""
    code = python_blocks(section(readme(), "training loop"))[0]
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    names = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    nets = [v for v in names.values() if isinstance(v, fc.ISNet)]
    assert nets, "the loop builds an ISNet"
    assert any(p.grad is not None and p.grad.any() for net in nets for p in net.parameters()), "and trains it"


def test_training_loop_is_about_ten_lines():
    code = python_blocks(section(readme(), "training loop"))[0]
    lines = [v for v in code.splitlines() if v.strip() and not v.strip().startswith(("#", "import", "from"))]
    assert len(lines) <= 16


def test_other_python_in_the_readme_parses_and_names_what_exists():
    for code in python_blocks(readme()):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fc":
                assert hasattr(fc, node.attr), f"README.md: fc.{node.attr}"


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", readme()):
        assert (ROOT / target).exists(), f"README.md: {target}"


PUBLIC = [getattr(fc, n) for n in fc.__all__ if callable(getattr(fc, n))]
PUBLIC += [getattr(fc.ops, n) for n in fc.ops.__all__ if callable(getattr(fc.ops, n))]


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda t: getattr(t, "__qualname__", str(t)))
def test_public_names_have_docstrings(thing):
    assert thing.__doc__, "what it does, in a sentence"
