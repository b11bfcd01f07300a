"""A file as MNIST's, of noise with a class-coded stroke: what an experiment's shortest run needs."""

import numpy as np


def write_mnist(path, train=2_100, test=80):
    """``path``, an npz with x_train, y_train, x_test, y_test."""
    rng = np.random.default_rng(0)

    def part(n):
        y = rng.integers(0, 10, n).astype(np.uint8)
        x = np.zeros((n, 28, 28), np.uint8)
        for i, label in enumerate(y):
            x[i, 6:22, 4 + 2 * label : 6 + 2 * label] = rng.integers(60, 255, (16, 2))
        return x, y

    (x, y), (x_test, y_test) = part(train), part(test)
    np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return path
