"""Thresholds, probabilities and margins: against values by hand, known truth, and simulation."""

import numpy as np
import pytest
from scipy import optimize

from ssd.calibration import (
    Calibration,
    best_cut,
    conformal_margin,
    cuts,
    fit_scores,
    least_matched,
    reliability,
)

SCORES = np.float32([0.9, 0.8, 0.8, 0.6, 0.3, 0.2])
HITS = np.array([True, True, False, True, False, True])


def test_cuts_by_hand():
    cut = cuts(SCORES, HITS, 5, 0.05)
    np.testing.assert_allclose(cut.thresholds, [0.85, 0.7, 0.45, 0.25, 0.125], atol=1e-6)
    np.testing.assert_allclose(cut.precision, [1, 2 / 3, 3 / 4, 3 / 5, 4 / 6])
    np.testing.assert_allclose(cut.recall, [1 / 5, 2 / 5, 3 / 5, 3 / 5, 4 / 5])
    np.testing.assert_allclose(cut.f1, [2 / 6, 4 / 8, 6 / 9, 6 / 10, 8 / 11])
    assert len(cuts(SCORES[:0], HITS[:0], 5, 0.05).f1) == 0


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, (4, True)),
        ({"precision": 0.75}, (2, True)),  # the lowest threshold with it
        ({"precision": 0.66}, (4, True)),
        ({"recall": 0.6}, (2, True)),  # the highest with it
        ({"recall": 0.9}, (4, False)),
    ],
)
def test_which_cut_is_taken(wanted, expected):
    assert best_cut(cuts(SCORES, HITS, 5, 0.05), **wanted) == expected


def test_a_precision_that_cannot_be_had_comes_nearest():
    cut = cuts(np.float32([0.9, 0.8, 0.7]), np.array([False, True, True]), 2, 0.05)
    assert best_cut(cut, precision=0.9) == (2, False)
    assert cut.precision[2] == pytest.approx(2 / 3)


def logistic(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(("temperature", "bias"), [(0.5, -0.5), (2.0, 1.0), (1.0, 0.0)])
def test_known_miscalibration_is_found(temperature, bias):
    """Scores that claim other odds than those by which objects are found."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 50_000)
    hits = rng.random(50_000) < logistic(logits / temperature + bias)
    scores = logistic(logits).astype(np.float32)
    fitted = fit_scores(scores, hits)
    assert fitted == pytest.approx((temperature, bias), abs=0.05)
    after = reliability(Calibration(*fitted).probabilities(scores), hits).error
    assert after < 0.01
    if temperature != 1:
        assert reliability(scores, hits).error > 5 * after


def test_the_fit_is_the_one_of_least_loss():
    rng = np.random.default_rng(1)
    scores = rng.random(300).astype(np.float32)
    hits = rng.random(300) < scores**2
    good, bad = hits.sum(), (~hits).sum()
    target = np.where(hits, (good + 1) / (good + 2), 1 / (bad + 2))
    logits = np.log(scores.astype(np.float64) / (1 - scores.astype(np.float64)))

    def loss(weights):
        made = logits * weights[0] + weights[1]
        return (target * np.logaddexp(0, -made) + (1 - target) * np.logaddexp(0, made)).sum()

    slope, bias = optimize.minimize(loss, [1.0, 0.0]).x
    assert fit_scores(scores, hits) == pytest.approx((1 / slope, bias), rel=1e-3)


@pytest.mark.parametrize("hits", [[True] * 4, [False] * 4, []])
def test_where_nothing_can_be_learned_scores_stay(hits):
    scores = np.linspace(0.1, 0.9, len(hits)).astype(np.float32)
    assert fit_scores(scores, np.array(hits, bool)) == (1.0, 0.0)


def test_scores_that_tell_nothing_or_all():
    rng = np.random.default_rng(2)
    worse = fit_scores(np.float32([0.1, 0.2, 0.8, 0.9] * 50), np.array([True, True, False, False] * 50))
    assert worse == (1.0, 0.0)
    temperature, bias = fit_scores(
        np.float32([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True])
    )  # apart, and finite all the same
    assert 0.05 < temperature < 5
    assert np.isfinite(bias)
    scores = np.sort(rng.random(1000).astype(np.float32))
    made = Calibration(0.3, -4.0).probabilities(scores)
    assert (np.diff(made) >= 0).all()
    assert made.dtype == np.float32
    ends = Calibration(0.1, 3.0).probabilities([0, 1])
    assert ((ends >= 0) & (ends <= 1)).all()


def test_calibration_error_by_hand():
    p = [0.1, 0.1, 0.5, 0.9, 1.0]
    hits = np.array([True, False, True, True, True])
    found = reliability(p, hits, bins=5)
    np.testing.assert_allclose(found.probability, [0.1, 0.5, 0.95])
    np.testing.assert_allclose(found.hits, [0.5, 1, 1])
    assert found.error == pytest.approx((2 * 0.4 + 1 * 0.5 + 2 * 0.05) / 5)


def test_margin_by_hand():
    """Boxes of 10 x 20; the true ones reach 1 to 9 pixels beyond, on changing sides."""
    found = np.tile([100.0, 100, 110, 120], (9, 1))
    true = found.copy()
    for i in range(9):
        true[i, i % 4] += (i + 1) * (-1 if i % 4 < 2 else 1)
    shares = sorted((i + 1) / (10 if i % 2 == 0 else 20) for i in range(9))
    assert conformal_margin(found, true, 0.5) == pytest.approx(shares[4])  # the fifth of nine: 10 * 0.5
    assert conformal_margin(found, true, 0.9) == pytest.approx(shares[8])
    assert conformal_margin(found, true, 0.91) is None
    assert conformal_margin(found, found + np.array([1, 1, -1, -1]), 0.9) == 0  # the true ones lie within
    assert least_matched(0.9) == 9


@pytest.mark.parametrize(("n", "coverage"), [(19, 0.9), (50, 0.8), (200, 0.95)])
def test_margins_hold_as_often_as_they_promise(n, coverage):
    """Over many draws of calibration and test objects, of heavy tails and other spreads on each side."""
    rng = np.random.default_rng(3)
    draws = 4000

    def boxes(count):
        left, size = rng.random((count, 2)) * 500, 5 + rng.random((count, 2)) * 200
        true = np.hstack([left, left + size])
        noise = rng.standard_t(3, (count, 4)) * [0.02, 0.1, 0.05, 0.01] * np.hstack([size, size])
        found = true + noise
        return np.hstack([np.minimum(found[:, :2], found[:, 2:] - 1), found[:, 2:]]), true

    held = 0
    for _ in range(draws):
        margin = conformal_margin(*boxes(n), coverage)
        (found,), (true,) = boxes(1)
        by = margin * (found[2:] - found[:2])
        held += (found[:2] - by <= true[:2]).all() and (found[2:] + by >= true[2:]).all()
    error = 3 * np.sqrt(coverage * (1 - coverage) / draws)
    # Exactly: ceil((n + 1) coverage) / (n + 1), which is the least that promises it.
    expected = np.ceil((n + 1) * coverage - 1e-9) / (n + 1)
    assert abs(held / draws - expected) < error
    assert expected >= coverage - 1e-12


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": float("nan")},
        {"temperature": "1"},
        {"bias": float("inf")},
        {"margin": -1},
        {"coverage": 1.5},
        {"other": 1},
        [],
        None,
    ],
)
def test_impossible_ones_are_refused(values):
    with pytest.raises(ValueError, match="a calibration has"):
        Calibration.from_dict(values)


def test_plain_data():
    made = Calibration(0.5, -1.0, 0.1, 0.9, 50)
    assert Calibration.from_dict(made.to_dict()) == made
