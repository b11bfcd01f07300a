"""What is judged, and how; the experiment end to end at its smallest. No test looks at how long anything took."""

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("lightning")

from benchmarks.common import NOT_JUDGED, Spread
from benchmarks.experiments import inference
from benchmarks.experiments.inference import AGAIN, CONTIGUOUS, LOADED, ONNX, PLAIN, PROGRAM, WRAPPED, same_logits, verdict, verdicts
from benchmarks.experiments.jobs import read_rows


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        ((0.90, 1.02, 1.30), "PASS"),
        ((0.95, 0.98, 0.99), "PASS"),
        ((1.01, 1.03, 1.05), "FAIL"),
        ((0.90, 0.95, 0.97), "FAIL"),  # faster than itself: something else ran
        ((0.99, 1.03, 1.05), NOT_JUDGED),
    ],
)
def test_verdict(ratio, expected):
    assert verdict(Spread(*ratio)) == expected


def test_logits_must_be_the_same():
    x = torch.tensor([[2.0, -4.0]])
    assert same_logits(x, x.clone(), exact=True) == 0
    assert same_logits(x, x + 4e-4, exact=False) == pytest.approx(1e-4, rel=1e-2)
    for other, exact in ((x + 1e-6, True), (x + 0.1, False), (x * float("nan"), False)):
        with pytest.raises(RuntimeError, match="logits differ"):
            same_logits(x, other, exact)


def rows(ratio, parameters=(10, 10), sizes=(1000, 1000), rounds=60):
    def row(form, spread, count, size):
        percentiles = {f"ratio_{p}": v for p, v in zip(Spread._fields, spread)}
        return {"net": "n", "seed": 0, "rounds": rounds, "form": form, "parameters": count, "file_bytes": size, **percentiles}

    one = (1.0, 1.0, 1.0)
    return [row(PLAIN, one, parameters[0], sizes[0]), row(AGAIN, one, parameters[0], None), row(WRAPPED, ratio, parameters[1], None),
            row(LOADED, one, parameters[1], sizes[1])]  # fmt: skip


def test_verdicts_tell_what_was_left_behind():
    assert [line[2:6] for line in verdicts(rows((1.0, 1.0, 1.0)))] == ["PASS", "PASS", "PASS"]
    assert [line[2:6] for line in verdicts(rows((1.1, 1.2, 1.3)))] == ["FAIL", "PASS", "PASS"]
    assert verdicts(rows((1.0, 1.0, 1.0), parameters=(10, 11)))[2].startswith("- FAIL")
    assert verdicts(rows((1.0, 1.0, 1.0), sizes=(1000, 1100)))[2].startswith("- FAIL")
    assert [line[2:6] for line in verdicts(rows((1.1, 1.2, 1.3), rounds=3))][:2] == [NOT_JUDGED] * 2


def test_quick(tmp_path, capsys):
    arguments = ["--quick", "--no-onnx", "--out", str(tmp_path)]
    assert inference.main(arguments) == 0
    found = {row["form"]: row for row in read_rows(tmp_path / "inference-quick.csv")}
    assert list(found) == [PLAIN, WRAPPED, LOADED, AGAIN, CONTIGUOUS, PROGRAM]
    assert ONNX not in found
    assert found[PLAIN]["ratio_p20"] == found[PLAIN]["ratio_p80"] == 1
    assert all(found[name]["difference"] == 0 for name in (PLAIN, WRAPPED, LOADED, AGAIN))
    assert len({found[name]["parameters"] for name in (PLAIN, WRAPPED, LOADED)}) == 1
    assert (tmp_path / "inference-quick.png").exists()
    out = capsys.readouterr().out
    assert "PASS  convnet: 29,322 parameters in each" in out
    assert f"{NOT_JUDGED}  convnet, ISNet" in out
    assert inference.main([*arguments, "--draw"]) == 0
