"""Backbones by import path: what is passed on, what is checked, and the one line that says what is wrong."""

import inspect
import sys
import types
import warnings

import pytest
import torch
from torch import nn

from fisnet_cuda import nets
from fisnet_cuda.data.spec import InputSpec
from fisnet_cuda.errors import FisnetWarning, InputError
from fisnet_cuda.train.backbone import build_backbone, load_weights

SPEC = InputSpec((16, 16), 1, ("a", "b", "c"))
RGB = InputSpec((16, 16), 3, ("a", "b", "c"))


def tiny(classes, channels=1):
    return nn.Sequential(nn.Conv2d(channels, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, classes))


@pytest.fixture
def package(monkeypatch):
    """A module "zoo" that tests fill."""
    module = types.ModuleType("zoo")
    monkeypatch.setitem(sys.modules, "zoo", module)
    return module


@pytest.mark.parametrize("name", ["small", "resnet18", "densenet121"])
def test_own_nets(name):
    spec = InputSpec((40, 36), 1, ("a", "b"))
    model = build_backbone(f"fisnet_cuda.nets.{name}", {}, spec)
    assert model(torch.rand(2, 1, 40, 36)).shape == (2, 2)
    assert type(model) is type(getattr(nets, name)(2))
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("classes", ["num_classes", "classes", "n_classes", "num_labels"])
@pytest.mark.parametrize("channels", ["in_channels", "in_chans", "num_channels"])
def test_number_of_classes_and_channels_by_any_name(package, classes, channels):
    def build(a, b):
        return tiny(a, b)

    def net(**given):
        return build(given[classes], given[channels])

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in (classes, channels)]
    net.__signature__ = inspect.Signature(parameters)
    package.net = net
    assert build_backbone("zoo.net", None, SPEC)(torch.rand(1, 1, 16, 16)).shape == (1, 3)


def test_arguments_of_the_user_come_first(package):
    seen = {}

    def net(num_classes=10, in_channels=3, width=1):
        seen.update(num_classes=num_classes, in_channels=in_channels, width=width)
        return tiny(num_classes, in_channels)

    package.net = net
    with pytest.warns(FisnetWarning, match="has 5 logits and there are 3 classes"):
        build_backbone("zoo.net", {"num_classes": 5, "width": 7}, SPEC)
    assert seen == {"num_classes": 5, "in_channels": 1, "width": 7}


def test_a_factory_of_any_keywords_gets_the_classes_unless_it_is_pretrained(package):
    """torchvision's way: num_classes goes through **kwargs, and is refused beside weights."""

    def net(*, weights=None, **kwargs):
        if weights is not None and "num_classes" in kwargs:
            raise ValueError("The parameter 'num_classes' expected value 1000")
        return tiny(kwargs.get("num_classes", 1000), 3)

    package.net = net
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_backbone("zoo.net", {}, RGB)
    with pytest.warns(FisnetWarning, match=r"its last layer \(5\) was replaced"):
        model = build_backbone("zoo.net", {"weights": "DEFAULT"}, RGB)
    assert model[5].out_features == 3


def test_a_factory_that_refuses_the_guess_is_called_without_it(package):
    def inner(width=2):
        return tiny(3, 1)

    package.net = lambda **kwargs: inner(**kwargs)
    build_backbone("zoo.net", {"width": 4}, SPEC)


def test_another_head_of_convolution(package):
    package.net = lambda: nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.warns(FisnetWarning):
        model = build_backbone("zoo.net", {}, SPEC)
    assert model(torch.rand(1, 1, 16, 16)).shape == (1, 3)


def test_files_and_modules_of_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_net_of_this_test.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(256, classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert build_backbone("my_net_of_this_test.Net", {}, SPEC)[1].out_features == 3
    assert build_backbone(str(tmp_path / "my_net_of_this_test.py:Net"), {}, SPEC)[1].out_features == 3
    assert sys.path == before
    sys.modules.pop("my_net_of_this_test")


def test_probe_leaves_statistics_and_randomness_alone(package):
    package.net = lambda: nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(), nn.Flatten(), nn.Linear(256, 3))
    torch.manual_seed(0)
    package.net()
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = build_backbone("zoo.net", {}, SPEC)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model[0].num_batches_tracked == 0


def fails():
    raise OSError("no weights\nhere")


@pytest.mark.parametrize(
    ("path", "args", "message"),
    [
        ("resnet18", {}, "must name a module and a callable in it"),
        ("", {}, "backbone must be an import path"),
        ("fisnet_cuda.nets.resnet81", {}, r"fisnet_cuda.nets has no 'resnet81': did you mean resnet18"),
        ("fisnet_cuda.nests.resnet18", {}, "fisnet_cuda has no 'nests': did you mean nets|no module"),
        ("nowhere_at_all.net", {}, "there is no module 'nowhere_at_all' here: check the spelling"),
        ("torchvision.models.resnet18", {}, "there is no module 'torchvision' here: pip install torchvision"),
        ("timm.create_model", {"model_name": "resnet18"}, "there is no module 'timm' here: pip install timm"),
        ("fisnet_cuda.nets.small", {"widht": 3}, r"small\(widht=3, num_classes=3, in_channels=1\) failed: .*widht"),
        ("fisnet_cuda.nets.small", {"in_channels": 3}, "it takes 3 channels, so set the data's channels to 3"),
        ("fisnet_cuda.nets.__doc__", {}, "is a str, not a callable"),
        ("zoo.fails", {}, r"zoo.fails\(\) failed with OSError: no weights here"),
        ("zoo.number", {}, "returned int, not a torch.nn.Module"),
        ("zoo.maps", {}, r"must return logits \[N, classes\], got a tensor \[1, 2, 14, 14\] for one image"),
        ("zoo.headless", {}, "gives 9 logits and there are 3 classes: set its number of classes in backbone_args"),
        ("zoo.small_images", {}, "fails on an image of 1 x 16 x 16 with RuntimeError.*do size and channels fit"),
        ("nowhere/net.py:Net", {}, "there is no file nowhere/net.py"),
    ],
)
def test_errors_are_one_line(package, path, args, message):
    package.fails, package.number = fails, lambda: 3
    package.maps = lambda: nn.Conv2d(1, 2, 3)
    package.headless = lambda: nn.Sequential(nn.Conv2d(1, 1, 14), nn.Flatten())
    package.small_images = lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 3))
    with pytest.raises(InputError, match=message) as caught:
        build_backbone(path, args, SPEC)
    assert "\n" not in str(caught.value)


def test_module_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "broken_net_of_this_test.py").write_text("import surely_not_installed\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="needs the module 'surely_not_installed', which is not here: install"):
        build_backbone("broken_net_of_this_test.Net", {}, SPEC)
    (tmp_path / "wrong_net_of_this_test.py").write_text("1 +\n")
    with pytest.raises(InputError, match="importing wrong_net_of_this_test failed with SyntaxError"):
        build_backbone("wrong_net_of_this_test.Net", {}, SPEC)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": {f"net.{k}": v for k, v in s.items()}, "epoch": 3},
                                  lambda s: {"model": {f"module.{k}": v for k, v in s.items()}}])  # fmt: skip
def test_weights_to_start_from(tmp_path, wrap):
    source, target = tiny(3), tiny(3)
    torch.save(wrap(source.state_dict()), tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))


def test_weights_of_another_number_of_classes_leave_the_last_layer(tmp_path):
    source, target = tiny(7), tiny(3)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    head = target[5].weight.clone()
    with pytest.warns(FisnetWarning, match=r"for 7 classes: the last layer \(5\) starts anew"):
        load_weights(target, tmp_path / "w.pt")
    assert torch.equal(target[0].weight, source[0].weight)
    assert torch.equal(target[5].weight, head)


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "w.pt"
    with pytest.raises(InputError, match="there is no file"):
        load_weights(tiny(3), path)
    path.write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot be read as a state_dict"):
        load_weights(tiny(3), path)
    torch.save([1], path)
    with pytest.raises(InputError, match="hold no state_dict"):
        load_weights(tiny(3), path)
    torch.save({**tiny(3).state_dict(), "extra": torch.ones(1)}, path)
    with pytest.raises(InputError, match="has extra, which the backbone lacks"):
        load_weights(tiny(3), path)
    torch.save({"0.weight": torch.ones(2, 1, 3, 3)}, path)
    with pytest.raises(InputError, match="lacks 0.bias, 1.weight, 1.bias and"):
        load_weights(tiny(3), path)
    torch.save(tiny(3, 3).state_dict(), path)
    with pytest.raises(InputError, match=r"0.weight is \[2, 3, 3, 3\], not \[2, 1, 3, 3\]"):
        load_weights(tiny(3), path)
