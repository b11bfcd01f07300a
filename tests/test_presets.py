"""Presets: each is usable as it is, and says what the library and the tool say."""

from __future__ import annotations

import inspect

import pytest
import torch

import fisnet_cuda as fc
from fisnet_cuda.errors import InputError


def model() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3)
    )


@pytest.mark.parametrize("name", fc.PRESETS)
def test_it_trains(name):
    p = fc.preset(name)
    net, loss = fc.ISNet(model(), **p.net), fc.ISNetLoss(**p.loss)
    masks = torch.zeros(4, 1, 8, 8)
    masks[..., 2:6, 2:6] = 1
    total, parts = loss(net(torch.rand(4, 1, 8, 8), relevance=True), torch.tensor([0, 1, 2, 0]), masks)
    total.backward()
    assert total.isfinite()
    assert parts.heatmap > 0


def test_the_papers_preset_is_the_default_but_for_the_variant():
    paper = fc.preset("paper")
    defaults = {name: p.default for name, p in inspect.signature(fc.ISNetLoss).parameters.items()}
    assert dict(paper.loss) == {name: defaults[name] for name in paper.loss}
    assert paper.net["eps"] == fc.rules.Epsilon(inspect.signature(fc.ISNet).parameters["eps"].default)
    assert paper.net["eta_eps"] == inspect.signature(fc.ISNet).parameters["eta_eps"].default


def test_the_tools_settings_are_the_librarys():
    module = pytest.importorskip("fisnet_cuda.train.module")
    known = inspect.signature(module.ISNetModule).parameters
    for p in fc.PRESETS.values():
        assert set(p.module) <= set(known)
    assert all(known[key].default == value for key, value in fc.preset("paper").module.items())


@pytest.mark.parametrize(
    "given",
    [["--preset", "steady", "--variant", "selective"], ["--variant", "selective", "--preset=steady"], ["--preset", "paper", "--variant",
     "selective", "--preset", "steady"]],
)  # fmt: skip
def test_the_command_line_expands_it_and_single_settings_prevail_wherever_they_stand(given):
    expand = pytest.importorskip("fisnet_cuda.cli.settings").expand
    argv = expand(given)
    assert argv[:2] == ["--model.variant", "selective"]
    assert not any(a.startswith("--model.variant=") for a in argv)
    assert {"--model.eps=0.0001", "--model.relative_eps=true"} <= set(argv)
    assert argv.count("--model.eps=0.0001") == len([a for a in argv if a.startswith("--model.eps")]) == 1


def test_it_prevails_over_a_file_of_settings_that_comes_behind_it():
    expand = pytest.importorskip("fisnet_cuda.cli.settings").expand
    argv = expand(["--preset", "steady", "--config", "old.yaml"])
    assert argv.index("old.yaml") < argv.index("--model.eps=0.0001")


@pytest.mark.parametrize(("argv", "words"), [(["--preset", "stedy"], "did you mean steady"), (["--preset"], "paper, steady")])
def test_an_unknown_preset_is_told(argv, words):
    settings = pytest.importorskip("fisnet_cuda.cli.settings")
    with pytest.raises(InputError, match=words):
        settings.expand(argv)


def test_an_unknown_preset_is_told_by_the_library():
    with pytest.raises(ValueError, match="did you mean paper"):
        fc.preset("papers")
