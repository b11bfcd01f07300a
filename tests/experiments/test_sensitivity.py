"""The rule of the safe range by hand, the grids, and the experiment end to end at its smallest."""

import pytest

pytest.importorskip("matplotlib")

from tiny_mnist import write_mnist

from benchmarks.experiments import sensitivity
from benchmarks.experiments.command import parse, parser
from benchmarks.experiments.jobs import read_rows, write_rows
from benchmarks.experiments.sensitivity import GRIDS, base, changed, results, rows_of, safe, safe_range, settings, tried
from benchmarks.experiments.systems import Setting, as_row


def rows(*pairs):
    return [{"accuracy_biased": biased, "accuracy_confounded": confounded} for biased, confounded in pairs]


class TestSafe:
    recommended = rows((97.0, 96.0), (95.0, 94.0))  # means 96 and 95

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (rows((93.0, 92.0), (93.0, 92.0)), True),  # 3 points below, exactly
            (rows((99.0, 98.0), (99.0, 99.0)), True),  # better is fine
            (rows((96.0, 95.0), (96.0, 91.9)), False),  # one seed's shortcut is back
            (rows((92.9, 95.0), (96.0, 95.0)), False),  # one seed learned less
            ([], False),
            (rows((96.0, float("nan"))), False),
            (rows((96.0, None)), False),
        ],
    )
    def test_every_seed_counts_on_both_sets(self, value, expected):
        assert safe(value, self.recommended) is expected

    def test_a_recommended_setting_that_spreads_too_far_is_not_safe_itself(self):
        spread = rows((97.0, 96.0), (97.0, 86.0))
        assert not safe(spread, spread)


class TestSafeRange:
    texts = ("1", "2", "3", "4", "5")

    @pytest.mark.parametrize(
        ("good", "expected"),
        [
            ((1, 1, 1, 1, 1), ["1", "2", "3", "4", "5"]),
            ((1, 0, 1, 1, 0), ["3", "4"]),  # the run ends at the first value that is not safe
            ((1, 1, 0, 1, 1), []),
            ((0, 0, 1, 0, 0), ["3"]),
        ],
    )
    def test_unbroken_run_around_the_recommended(self, good, expected):
        assert safe_range(self.texts, [bool(g) for g in good], "3", True) == expected

    def test_without_order_or_recommended_value_all_safe_values_are_told(self):
        good = [True, False, True, False, True]
        assert safe_range(self.texts, good, "2", False) == ["1", "3", "5"]
        assert safe_range(self.texts, good, "not tried", True) == ["1", "3", "5"]
        assert safe_range(self.texts, good, None, True) == ["1", "3", "5"]


class TestGrids:
    def test_the_recommended_value_is_the_frames_own(self):
        assert {name: grid.recommended for name, grid in GRIDS.items()} == {
            "eps": "1e-4", "eps_absolute": None, "d": "0.9", "P": "0.7", "C1": "1", "tune": "1, 25", "w": "1:3"
        }  # fmt: skip
        own = Setting("stochastic")
        assert (own.eps, own.relative, own.d, own.P, own.c1, own.c2, own.w1, own.w2) == (1e-4, True, 0.9, 0.7, 1, 25, 1, 3)

    def test_every_value_changes_what_it_says(self):
        start = base(100, "stochastic", 0)
        for name, grid in GRIDS.items():
            for text, change in grid.values.items():
                setting = changed(start, change)
                assert (setting == start) == (text == grid.recommended)
                if name in ("eps", "eps_absolute", "d", "P"):
                    assert getattr(setting, "eps" if name == "eps_absolute" else name) == float(text)
                if name == "eps_absolute":
                    assert not setting.relative
        assert changed(start, GRIDS["tune"].values["tuned"]).tune == 20
        three = changed(start, GRIDS["w"].values["3:3"])
        assert (three.w1, three.w2) == (3, 3)

    def test_small_values_exist_and_each_training_is_done_once(self):
        for grid in GRIDS.values():
            for chosen in grid.small.values():
                assert set(chosen) <= set(grid.values)
        _, run = parse(parser("", seeds=2), [])
        found = settings(run)
        assert len(found) == len(set(found)) == 78  # what the docstring's core-minutes are counted with
        assert all(s == base(s.steps, s.system, s.seed) for s in found[:6])

    def test_the_recommended_value_is_among_those_tried(self):
        assert tried(GRIDS["P"], "selective", "small") == ["0.3", "0.5", "0.7", "0.9"]
        assert tried(GRIDS["C1"], "contrast", "small") == []
        assert tried(GRIDS["w"], "contrast", "full") == list(GRIDS["w"].values)


def test_rows_are_found_again_and_judged(tmp_path):
    """Through the file, whose floats have six digits: a grid on which P = 0.3 fails, for one seed, and P = 0.9 does not."""
    start = base(100, "stochastic", 0)
    written = []
    for text, confounded in (("0.3", 80.0), ("0.7", 95.0), ("0.9", 94.0)):
        for seed in (0, 1):
            setting = changed(base(100, "stochastic", seed), GRIDS["P"].values[text])
            found = {"accuracy_biased": 96.0, "accuracy_unbiased": 95.0, "accuracy_confounded": confounded if seed else 95.0}
            written.append({**as_row(setting), **found, "share": 1.0, "share_own": 1.0})
    write_rows(tmp_path / "x.csv", written)
    back = read_rows(tmp_path / "x.csv")
    assert [row["seed"] for row in rows_of(back, start)] == [0, 1]
    (result,) = results(back)
    assert list(result.rows) == ["0.3", "0.7", "0.9"]
    assert result.safe == ["0.7", "0.9"]
    assert "0.7 to 0.9" in "\n".join(sensitivity.lines([result]))
    assert sensitivity.draw(back, tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_quick(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sensitivity, "SYSTEMS", ("selective",))
    monkeypatch.setattr(sensitivity, "GRIDS", {name: GRIDS[name] for name in ("eps_absolute", "P")})
    data = write_mnist(tmp_path / "mnist.npz")
    arguments = ["--data", str(data), "--quick", "--seeds", "1", "--processes", "1", "--out", str(tmp_path)]
    assert sensitivity.main(arguments) == 0
    found = read_rows(tmp_path / "sensitivity-quick.csv")
    assert [(row["relative"], row["eps"], row["P"]) for row in found] == [(True, 1e-4, 0.7), (False, 1e-2, 0.7), (True, 1e-4, 0.3)]
    assert all(row["steps_done"] == 4 for row in found)
    page = (tmp_path / "sensitivity-quick.md").read_text()
    assert "| Selective ISNet | P " in page
    assert (tmp_path / "sensitivity-quick.png").exists()
    assert sensitivity.main([*arguments, "--draw"]) == 0
    assert (tmp_path / "sensitivity-quick.md").read_text() == page
    assert "Every value" in capsys.readouterr().out
