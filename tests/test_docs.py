"""What the README tells newcomers to type. (The docstrings' examples run by themselves: pytest --doctest-modules.)"""

import ast
import contextlib
import io
import pathlib
import re
import shlex

import pytest
import torch
from data import make

import fisnet_cuda as fc
from fisnet_cuda.nets import small

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


# ---- the tool ----------------------------------------------------------------------------------------------------------

TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "docs/tool.md")}


@pytest.fixture(scope="module")
def options():
    """What each command of the tool accepts: the words that begin with a dash in its help."""
    from fisnet_cuda.cli import COMMANDS, main

    found = {}
    for command in COMMANDS:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main([command, "--help"])
        found[command] = set(re.findall(r"(?<![\w.])--?[a-zA-Z][\w.-]*\w|(?<![\w.-])-\w\b", text.getvalue()))
        assert "--help" in found[command], command
    return found


def command_lines(text):
    for block in re.findall(r"(?ms)^```sh\n(.*?)^```", text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["fisnet-cuda"]:
                yield words


@pytest.mark.parametrize("name", TEXTS)
def test_commands_of_the_texts_exist(options, name):
    lines = list(command_lines(TEXTS[name]))
    assert {words[1] for words in lines} >= {"fit", "evaluate", "heatmap"}
    for _, command, *arguments in lines:
        for word in arguments:
            flag = word.partition("=")[0]
            if flag.startswith("-"):
                assert known(flag, options[command]), f"{name}: fisnet-cuda {command} has no {flag}"


def test_options_of_the_tools_page_exist(options):
    everything = set().union(*options.values())
    flags = {flag.rstrip(".") for flag in re.findall(r"(?<=[`\s])--[a-z][\w.-]*", TEXTS["docs/tool.md"])}
    flags -= {"--nproc_per_node"}  # of torchrun
    assert len(flags) > 20
    for flag in flags:
        assert known(flag, everything), f"docs/tool.md: {flag}"


def known(flag, accepted):
    """A dict's entry (``--data.columns.image``) and a group (``--trainer``) count as the option."""
    return flag in accepted or flag.rpartition(".")[0] in accepted or any(a.startswith(f"{flag}.") for a in accepted)


def test_python_of_the_tools_page(tmp_path, monkeypatch):
    """It runs as it stands, but for size, length and the network."""
    _, code = python_blocks(TEXTS["docs/tool.md"])
    for old, new in (("size=224", "size=32"), ("max_epochs=20", "max_epochs=3, enable_progress_bar=False"),
                     ("nets.resnet18", "nets.small"), ("batch_size=16", "batch_size=4")):  # fmt: skip
        assert old in code
        code = code.replace(old, new)
    make.folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "tool"}
    exec(compile(code, "docs/tool.md", "exec"), names)
    assert isinstance(names["best"].net, fc.ISNet)
    assert (tmp_path / "runs" / "dual" / "best.ckpt").is_file()


def test_background_swap_of_the_tools_page(capsys):
    code, _ = python_blocks(TEXTS["docs/tool.md"])
    masks = torch.zeros(12, 1, 16, 16)
    masks[..., 4:12, 4:12] = 1
    names = {"net": small(2, 1), "images": torch.rand(12, 1, 16, 16), "masks": masks, "labels": torch.arange(12) % 2}
    exec(compile(code, "docs/tool.md", "exec"), names)
    assert names["swap"].n == 12
    assert "background" in capsys.readouterr().out


PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "experiments" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_the_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
