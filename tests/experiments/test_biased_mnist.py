"""Biased MNIST: the square tells what it should and stands outside every mask; the experiment from end to end."""

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from tiny_mnist import write_mnist

from benchmarks.experiments import biased_mnist
from benchmarks.experiments.biased_mnist import CLASSES, DIGIT, MARKS, SIDE, SIZE, load, read_mnist, render, settings
from benchmarks.experiments.command import parse, parser
from benchmarks.experiments.jobs import read_rows, write_rows
from fisnet_cuda.errors import InputError

EDGE = (SIZE - DIGIT) // 2


def place(label: int) -> tuple[int, int]:
    """Upper left corner of a class's square, from the module's text: five heights at the left, five at the right."""
    return 4 + 11 * (label % 5), 2 if label < 5 else SIZE - 2 - SIDE


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_mnist(tmp_path_factory.mktemp("mnist") / "mnist.npz"))


class TestRender:
    def test_no_mask_touches_a_square_even_where_a_digit_fills_its_frame(self):
        labels = torch.arange(CLASSES)
        biased = render(torch.full((CLASSES, DIGIT, DIGIT), 255, dtype=torch.uint8), labels, "biased", seed=0)
        wide = slice(EDGE - 2, EDGE + DIGIT + 2)
        assert (biased.masks[:, 0, wide, wide] == 255).all()
        assert int((biased.masks > 0).sum()) == CLASSES * (DIGIT + 4) ** 2, "dilated by two pixels, and no more"
        for label in range(CLASSES):
            y, x = place(label)
            square = (label, 0, slice(y, y + SIDE), slice(x, x + SIDE))
            assert (biased.images[square] == 255).all()
            assert (biased.masks[square] == 0).all()

    def test_squares_of_two_classes_do_not_overlap(self):
        blank = torch.zeros(CLASSES, DIGIT, DIGIT, dtype=torch.uint8)
        drawn = render(blank, torch.arange(CLASSES), "biased", seed=0).images
        assert (drawn > 0).sum((1, 2, 3)).tolist() == [SIDE**2] * CLASSES
        assert (drawn > 0).sum(0).max() == 1

    def test_the_three_sets_differ_in_the_square_only(self):
        digits = torch.randint(0, 256, (200, DIGIT, DIGIT), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(200) % CLASSES
        sets = {marks: render(digits, labels, marks, seed=1) for marks in MARKS}
        plain = sets["unbiased"].images
        assert torch.equal(plain[:, 0, EDGE:-EDGE, EDGE:-EDGE], digits)
        assert int((plain > 0).sum()) == int((digits > 0).sum()), "nothing stands beside the digit"
        for marks in ("biased", "confounded"):
            images = sets[marks]
            assert torch.equal(images.masks, sets["unbiased"].masks)
            assert torch.equal(images.labels, labels)
            changed = images.images != plain
            assert (changed.sum((1, 2, 3)) == SIDE**2).all()
            corners = [tuple(int(i.min()) for i in torch.nonzero(one[0], as_tuple=True)) for one in changed]
            told = [next(c for c in range(CLASSES) if place(c) == corner) for corner in corners]
            if marks == "biased":
                assert told == labels.tolist()
            else:
                assert not any(t == label for t, label in zip(told, labels.tolist()))
                assert {(t - label) % CLASSES for t, label in zip(told, labels.tolist())} == set(range(1, CLASSES))

    def test_the_draw_is_fixed_by_the_seed(self):
        digits, labels = torch.zeros(50, DIGIT, DIGIT, dtype=torch.uint8), torch.arange(50) % CLASSES
        first, again, other = (render(digits, labels, "confounded", seed).images for seed in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_unknown_marks_are_refused(self):
        with pytest.raises(ValueError, match="biased, unbiased, confounded, got 'none'"):
            render(torch.zeros(1, DIGIT, DIGIT, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), "none", 0)


class TestLoad:
    def test_sizes_and_no_digit_twice(self, data):
        task = load(data, 5_000, 60)  # the file has 2,100 to train on: 2,000 of them are kept to validate
        assert (len(task.train), len(task.val), [len(images) for images in task.tests.values()]) == (100, 2_000, [60] * 3)
        assert list(task.tests) == list(MARKS)
        file = read_mnist(data)
        both = torch.cat([task.train.images, task.val.images])[:, 0, EDGE:-EDGE, EDGE:-EDGE]
        assert sorted(x.numpy().tobytes() for x in both) == sorted(x.tobytes() for x in file["x_train"])

    def test_files_that_are_not_mnist(self, tmp_path):
        np.savez(tmp_path / "half.npz", x_train=np.zeros((1, 28, 28)))
        (tmp_path / "text.npz").write_text("no archive")
        for name, says in (("nothing.npz", "there is no such file"), ("half.npz", "not MNIST's npz"), ("text.npz", "not MNIST's npz")):
            with pytest.raises(InputError, match=says) as error:
                read_mnist(tmp_path / name)
            assert "\n" not in str(error.value)


class TestSettings:
    def test_all_systems_share_everything_but_what_their_loss_does(self):
        found = settings(parse(parser(""), [])[1])
        assert len(found) == 53 + 3
        alike, longer = (lambda s: (s.net, s.batch, s.lr, s.momentum, s.eps, s.relative, s.P, s.d)), found[53:]
        assert len({alike(s) for s in found}) == 1
        assert {s.steps for s in found[:53]} == {2500}
        assert [(s.system, s.deep, s.steps, s.seed) for s in longer] == [("selective", False, 5000, seed) for seed in range(3)]
        assert [s.seed for s in found if (s.system, s.deep) == ("original", False)] == [0, 1], "costly: two seeds"
        assert [s.seed for s in found if (s.system, s.deep) == ("original", True)] == [0], "costlier"
        assert [s.seed for s in found if s.system == "segmented"] == [0, 1], "two trainings each"
        assert [s.seed for s in found if (s.system, s.deep) == ("dual", True)] == [0, 1, 2]

    def test_some_systems(self):
        found = settings(parse(parser(""), ["--full", "--seeds", "3"])[1], ["original", "rrr"])
        assert [(s.system, s.deep, s.seed) for s in found] == [
            (name, deep, seed) for seed in range(3) for name, deep in (("original", False), ("original", True), ("rrr", False))
        ]
        assert {s.strength for s in found if s.system == "rrr"} == {0.1}


def test_quick_run_of_two_systems(data, tmp_path, capsys):
    arguments = ["--data", data, "--quick", "--seeds", "1", "--processes", "1", "--out", str(tmp_path)]
    assert biased_mnist.main([*arguments, "--systems", "standard", "rrr"]) == 0
    path = tmp_path / "biased_mnist-quick.csv"
    rows = read_rows(path)
    assert [(row["system"], row["steps_done"], row["threads"], row["diverged"]) for row in rows] == [
        ("standard", 4, 1, False), ("rrr", 4, 1, False),
    ]  # fmt: skip
    assert all(0 <= row[f"accuracy_{marks}"] <= 100 for row in rows for marks in MARKS)
    assert data not in path.read_text() + path.with_suffix(".md").read_text()
    page = path.with_suffix(".md").read_text()
    assert "`python -m benchmarks.experiments.biased_mnist --data mnist.npz --quick --seeds 1`" in page
    assert "background share | swap gap" in page
    assert "Weights of the attention losses: RRR (input gradients) 0.1; four values" in page
    assert "Not finished: 18 of 20 trainings are missing." in page
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    # a second run trains nothing, and rows of other settings are not drawn
    write_rows(path, [*rows, {**rows[0], "steps": 5}])
    before = path.read_bytes()
    assert biased_mnist.main([*arguments, "--systems", "standard"]) == 0
    assert path.read_bytes() == before
    assert "2 rows in" in path.with_suffix(".md").read_text()
    assert "Traceback" not in capsys.readouterr().err


def test_user_errors_are_one_line(data, tmp_path, capsys):
    common = ["--quick", "--out", str(tmp_path)]
    for arguments, says in (
        (["--data", str(tmp_path / "no.npz")], "there is no such file"),
        (["--data", data, "--draw"], "biased_mnist-quick.csv: there is no such file; run the same command without --draw first"),
    ):
        assert biased_mnist.main([*arguments, *common]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("biased_mnist: ")
        assert says in line
    for arguments, says in (
        (["--systems", "standard", "none"], "invalid choice: 'none'"), (["--systems"], "expected at least one argument"),
        (["--seeds", "0"], "--seeds: at least 1, got 0"), (["--processes", "0"], "--processes: at least 1, got 0"),
        (["--device", "cuda:1"], "invalid choice: 'cuda:1'"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            biased_mnist.main(["--data", data, *common, *arguments])
        assert stop.value.code == 2
        assert says in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_cuda_without_a_gpu(data, capsys):
    with pytest.raises(SystemExit):
        biased_mnist.main(["--data", data, "--device", "cuda"])
    assert "this PyTorch sees no GPU" in capsys.readouterr().err
