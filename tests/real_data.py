"""Real data for tests, where this machine has them: $FISNET_TEST_DATA, or ../shared/data beside the repository."""

import os
from pathlib import Path

import pytest

_NAME = "FISNET_TEST_DATA"


def cxr_tb() -> Path:
    """704 chest X-rays 224x224 in images/, 1-bit lung masks of the same names in masks/, labels.csv with columns file, site, label
    (1 = tuberculosis); skips the test where they are not."""
    return _find("cxr_tb", "labels.csv", "chest X-rays")


def mnist() -> Path:
    """mnist.npz with x_train, y_train, x_test, y_test; skips the test where it is not."""
    return _find("mnist", "mnist.npz", "MNIST") / "mnist.npz"


def _find(name: str, file: str, what: str) -> Path:
    given = os.environ.get(_NAME)
    for root in [Path(given)] if given else [folder / "shared" / "data" for folder in Path(__file__).resolve().parents[2:4]]:
        if (root / name / file).is_file():
            return root / name
    pytest.skip(f"the {what} {name} are missing: {_NAME} names the folder that they are in")
