"""Point values against scikit-learn, intervals against simulated truth."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from fisnet_cuda.evaluate import metrics
from fisnet_cuda.evaluate.metrics import (
    auc,
    auc_scores,
    balanced_accuracy,
    bootstrap_weights,
    classification,
    difference,
    macro_f1,
    mean,
    proportion,
)


@st.composite
def answers(draw):
    classes = draw(st.integers(2, 5))
    n = draw(st.integers(classes, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + np.eye(classes)[labels] * draw(st.sampled_from([0.0, 1.0, 4.0]))
    if draw(st.booleans()):
        logits = np.round(logits)  # ties
    return logits, labels


@given(answers())
@settings(max_examples=60)
def test_point_values_are_those_of_scikit_learn(given_):
    logits, labels = given_
    classes = logits.shape[1]
    got = classification(logits, labels, [str(c) for c in range(classes)], resamples=100)
    predicted = logits.argmax(1)
    assert got.accuracy.value == pytest.approx(sk.accuracy_score(labels, predicted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes that are answered and do not occur
        assert got.balanced_accuracy.value == pytest.approx(sk.balanced_accuracy_score(labels, predicted))
    assert got.macro_f1.value == pytest.approx(sk.f1_score(labels, predicted, average="macro", zero_division=0))
    assert got.confusion.tolist() == sk.confusion_matrix(labels, predicted, labels=range(classes)).tolist()
    scores = auc_scores(logits)
    aucs = []
    for c in range(classes):
        positive = labels == c
        if 0 < positive.sum() < len(labels):
            aucs.append(sk.roc_auc_score(positive, scores[:, c]))
            assert got.auc[c].value == pytest.approx(aucs[-1])
            p = np.exp(logits[:, c]) / np.exp(logits).sum(1)  # the scores sort as the probabilities do
            assert sk.roc_auc_score(positive, np.round(p, 12)) == pytest.approx(aucs[-1], abs=1e-9)
        else:
            assert not got.auc[c].known
    assert got.auc_macro.value == pytest.approx(np.mean(aucs)) if aucs else not got.auc_macro.known


@given(st.integers(0, 2**32), st.integers(2, 40), st.booleans())
@settings(max_examples=40)
def test_weighted_auc_and_f1_are_those_of_scikit_learn(seed, n, ties):
    rng = np.random.default_rng(seed)
    positive = np.r_[True, False, rng.random(n - 2) < 0.5]
    scores = rng.integers(0, 5, n).astype(float) if ties else rng.normal(size=n)
    weights = rng.integers(1, 4, (3, n)).astype(np.float32)
    want = [sk.roc_auc_score(positive, scores, sample_weight=w) for w in weights]
    assert auc(scores, positive, weights) == pytest.approx(want)
    labels, predicted = rng.integers(0, 3, n), rng.integers(0, 3, n)
    for w in weights:
        counts = [np.bincount(a, b, minlength=3) for a, b in ((labels, w * (labels == predicted)), (predicted, w), (labels, w))]
        want_f1 = sk.f1_score(labels, predicted, average="macro", sample_weight=w, zero_division=0)
        assert macro_f1(*counts) == pytest.approx(want_f1)


def test_saturated_probabilities_are_still_sorted():
    logits = np.array([[200.0, 0], [190, 0], [180, 0], [170, 0]])  # P_0 is 1.0 in float64
    assert auc(auc_scores(logits)[:, 0], np.array([True, True, False, False])).item() == 1


def test_wilson_and_newcombe_are_the_published_numbers():
    assert proportion(81, 263)[1:] == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998a, table I
    assert proportion(0, 20)[1:] == pytest.approx((0.0, 0.1611), abs=5e-5)
    got = difference(proportion(48, 80), proportion(56, 70))  # Newcombe 1998b, table II, (a), method 10
    assert got == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_resamples_keep_the_classes_and_hang_on_the_seed_alone(monkeypatch):
    strata = np.random.default_rng(0).integers(0, 4, 50)
    whole = np.concatenate(list(bootstrap_weights(strata, 30, 7)))
    assert whole.shape == (30, 50)
    for s in range(4):
        assert (whole[:, strata == s].sum(1) == (strata == s).sum()).all()
    assert (whole != np.concatenate(list(bootstrap_weights(strata, 30, 8)))).any()
    assert (whole == np.concatenate(list(bootstrap_weights(strata, 30, 7)))).all()
    monkeypatch.setattr(metrics, "_BLOCK", 200)
    assert np.concatenate(list(bootstrap_weights(strata, 30, 7))).shape == (30, 50)
    assert whole.mean() == 1
    assert 0.8 < whole.var() < 1.1  # Poisson, nearly


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    trials, n = 250, 80
    truth = {"accuracy": 0.9, "balanced": (0.95 + 0.85) / 2, "auc": 0.8413447, "mean": 2 / 7}
    # two normal distributions sqrt(2) apart: AUC = Phi(1); macro-F1 of rates 0.95 and 0.85 with equally many of both classes
    truth["f1"] = (2 * 0.95 / (1 + 0.95 + 0.15) + 2 * 0.85 / (1 + 0.85 + 0.05)) / 2
    labels = np.arange(n) % 2
    held = dict.fromkeys(truth, 0)
    for trial in range(trials):
        right = rng.random(n) < np.where(labels == 0, 0.95, 0.85)
        predicted = np.where(right, labels, 1 - labels)
        answered = classification(np.eye(2)[predicted], labels, ("a", "b"), 400, trial)
        scored = rng.normal(size=n) + np.sqrt(2) * labels
        ranked = classification(np.stack([np.zeros(n), scored], 1), labels, ("a", "b"), 400, trial)
        got = {
            "accuracy": answered.accuracy, "balanced": answered.balanced_accuracy, "f1": answered.macro_f1, "auc": ranked.auc[1],
            "mean": mean(rng.beta(2, 5, n), labels, 400, trial),
        }  # fmt: skip
        for key, estimate in got.items():
            held[key] += estimate.low <= truth[key] <= estimate.high
    # 95 %; three standard deviations of 250 trials are 4 points
    assert {key: round(100 * count / trials) for key, count in held.items() if not 0.905 <= count / trials <= 0.99} == {}


def test_what_is_not_defined_is_nan_and_said():
    one = classification(np.random.default_rng(0).normal(size=(30, 3)), np.full(30, 2), ("a", "b", "c"))
    assert not one.auc_macro.known
    assert not any(e.known for e in one.auc)
    assert "AUC is not defined: all images are of one class (c)" in one.notes
    two = classification(np.random.default_rng(0).normal(size=(40, 3)), np.arange(40) % 2, ("a", "b", "c"))
    assert [e.known for e in two.auc] == [True, True, False]
    assert two.auc_macro.known
    assert any("no image of class c" in note for note in two.notes)
    labels = np.r_[np.arange(40) % 2, -1, -1]
    unlabelled = classification(np.random.default_rng(0).normal(size=(42, 2)), labels, ("a", "b"))
    assert (unlabelled.n, unlabelled.unlabelled) == (40, 2)
    assert "2 images without a label are left out" in unlabelled.notes
    nobody = classification(np.zeros((3, 2)), np.full(3, -1), ("a", "b"))
    assert nobody.n == 0
    assert not nobody.accuracy.known


def test_faultless_answers_are_not_called_certain():
    labels = np.arange(60) % 2
    got = classification(5 * np.eye(2)[labels], labels, ("a", "b"))
    assert got.accuracy == pytest.approx((1, 0.940, 1), abs=1e-3)
    assert got.balanced_accuracy.low < 0.95
    assert (got.macro_f1.value, got.auc_macro.value) == (1, 1)
    assert np.isnan([got.macro_f1.low, got.auc_macro.low]).all()
    assert any("without an interval" in note for note in got.notes)


def test_balanced_accuracy_of_one_class_is_wilson():
    assert balanced_accuracy(np.array([[18, 2], [0, 0]])) == pytest.approx(proportion(18, 20))


def test_many_classes_say_that_resamples_were_saved(monkeypatch):
    monkeypatch.setattr(metrics, "_AUC_BUDGET", 150 * 60 * 3)
    rng = np.random.default_rng(0)
    got = classification(rng.normal(size=(60, 3)), np.arange(60) % 3, ("a", "b", "c"), resamples=1000)
    assert any("from 150 resamples instead of 1000" in note for note in got.notes)
    assert got.auc_macro.low < got.auc_macro.high
