"""Images with masks in two classes, and a run on them."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("lightning")
from PIL import Image

from fisnet_cuda.cli import main

SMALL = ["--size", "16", "--data.channels", "1", "--backbone", "small", "-b", "8", "--figures_every", "0"]


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder with ``images/<class>`` and ``masks/<class>``, 20 of each class."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        for folder in ("images", "masks"):
            (root / folder / name).mkdir(parents=True)
        for index in range(20):
            image = generator.integers(0, 80, (20, 20)).astype(np.uint8)
            image[5:15, 5:15] += np.uint8(40 + 100 * label)
            mask = np.zeros((20, 20), np.uint8)
            mask[5:15, 5:15] = 255
            Image.fromarray(image).save(root / "images" / name / f"{label}{index:02}.png")
            Image.fromarray(mask).save(root / "masks" / name / f"{label}{index:02}.png")
    return root


@pytest.fixture(scope="session")
def arguments(images):
    """Of a small ``fit``, without the epochs and the run folder."""
    return ["--path", str(images / "images"), "--masks", str(images / "masks"), *SMALL]


@pytest.fixture(scope="session")
def trained(arguments, tmp_path_factory):
    """A run folder of two epochs; not to be changed."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    assert main(["fit", *arguments, "--epochs", "2", "--run", str(run)]) == 0
    return run
