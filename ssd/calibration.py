"""What scores and boxes of detections are worth: thresholds, probabilities, margins.

Functions of plain arrays: `ssd.evaluate.match` makes them of a dataset.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Scores = npt.NDArray[np.float32]
Hits = npt.NDArray[np.bool_]

BINS = 15
"""Of the calibration error, as in Guo et al. 2017."""

_LEAST = 1e-6  # distance of a score from 0 and 1, where its logit is infinite


@dataclass(frozen=True)
class Calibration:
    """What a detector's scores and boxes are worth, as measured on a dataset.

    >>> Calibration(temperature=2.0).probabilities(np.float32([0.9, 0.5]))
    array([0.75, 0.5 ], dtype=float32)
    """

    temperature: float = 1.0
    """What the logit of a score is divided by, above 0."""
    bias: float = 0.0
    """What is added to it then."""
    margin: float | None = None
    """The share of its width and height by which a box is made wider on each side to hold the true one, see
    `conformal_margin`; None where there were too few."""
    coverage: float | None = None
    """For which share of the detections that find an object it does."""
    matched: int = 0
    """How many such it was measured by."""

    def __post_init__(self) -> None:
        got = ", ".join(f"{each!r:.20}" for each in asdict(self).values())
        numbers = (self.temperature, self.bias, self.margin or 0.0, self.coverage or 0.5)
        fine = all(isinstance(each, int | float) and math.isfinite(each) for each in numbers)
        if not fine or self.temperature <= 0 or (self.margin or 0) < 0 or not 0 < numbers[-1] < 1:
            raise ValueError(
                "a calibration has a temperature above 0, a finite bias, a margin of at least 0 and a "
                f"coverage between 0 and 1; got {got}"
            )

    def probabilities(self, scores: npt.ArrayLike) -> Scores:
        """The probability that a detection of a score finds an object, float32 as the scores ``[K]``.

        The order of scores stays.
        """
        return _sigmoid(_logit(np.asarray(scores, np.float32)) / self.temperature + self.bias).astype(
            np.float32
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: object) -> "Calibration":
        """What `to_dict` gave.

        Raises:
            ValueError: it is something else.
        """
        try:
            return cls(**values)  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(f"a calibration has {', '.join(cls.__dataclass_fields__)}; {error}") from None


class Cuts(NamedTuple):
    """What each score would do as the threshold of a class, from the highest on."""

    thresholds: Floats
    """Each half-way between the lowest score that is to be kept and the next one."""
    precision: Floats
    recall: Floats
    f1: Floats


def cuts(scores: Scores, hits: Hits, boxes: int, lowest: float) -> Cuts:
    """What each score of a class would do as its threshold.

    Args:
        scores: of all detections of the class that count, ``[K]``.
        hits: which of them find an object.
        boxes: how many objects there are.
        lowest: the score above which detections were looked at.
    """
    if not len(scores):
        return Cuts(*(np.zeros(0),) * 4)
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], hits[order].cumsum()
    last = np.float32(lowest) if np.float32(lowest) < scores[-1] else scores[-1] / 2
    following = np.append(scores[1:], np.float32(last))
    middle = (scores + following) / np.float32(2)
    thresholds = np.where(middle < scores, middle, following).astype(np.float64)
    number = np.arange(1, len(scores) + 1)
    columns = thresholds, found / number, found / max(boxes, 1), 2 * found / (number + boxes)
    whole = scores > following  # equal scores stay or go together
    return Cuts(*(column[whole] for column in columns))


def best_cut(cut: Cuts, precision: float | None = None, recall: float | None = None) -> tuple[int, bool]:
    """Which of the cuts to take, and whether it is as good as wanted.

    Args:
        cut: at least one.
        precision: the lowest threshold with this precision is taken, or else that of the highest precision.
        recall: the highest threshold with this recall is taken, or else that of the highest recall. With
            neither, that of the highest F1; of equal ones the highest.
    """
    if precision is not None:
        good = np.flatnonzero(cut.precision >= precision)
        return (int(good[-1]), True) if len(good) else (int(cut.precision.argmax()), False)
    if recall is not None:
        good = np.flatnonzero(cut.recall >= recall)
        return (int(good[0]), True) if len(good) else (int(cut.recall.argmax()), False)
    return int(cut.f1.argmax()), True


def fit_scores(scores: Scores, hits: Hits) -> tuple[float, float]:
    """Temperature and bias by which scores become probabilities, of the least negative log-likelihood.

    Logistic calibration of the score's logit: temperature scaling (Guo et al. 2017, arXiv 1706.04599) with a
    bias, without which a score of 0.5 would stay what it is; for detections as in Kueppers et al. 2020 (arXiv
    2004.13546), who call one correct that finds an object. Targets are Platt's (1999), which keep the fit
    finite where all hits score above all others; Newton's steps as in Lin, Lin and Weng 2007.

    Args:
        scores: of all detections that count, of all classes, ``[K]``.
        hits: which of them find an object.

    Returns:
        Temperature and bias; 1 and 0 where scores do not tell hits from others.
    """
    good, bad = int(hits.sum()), int((~hits).sum())
    if not good or not bad:
        return 1.0, 0.0
    target = np.where(hits, (good + 1) / (good + 2), 1 / (bad + 2))
    inputs = np.stack([_logit(scores), np.ones(len(scores))], 1)
    weights = np.array([0.0, math.log((good + 1) / (bad + 1))])

    def loss(weights: Floats) -> float:
        logits = inputs @ weights
        return float((np.logaddexp(0, logits) - target * logits).sum())

    value = loss(weights)
    for _ in range(100):
        p = _sigmoid(inputs @ weights)
        gradient = inputs.T @ (p - target)
        curvature = (inputs * (p * (1 - p))[:, None]).T @ inputs + 1e-9 * np.eye(2)
        step, size = np.linalg.solve(curvature, gradient), 1.0
        while size > 1e-8 and loss(weights - size * step) > value:
            size /= 2
        weights = weights - size * step
        before, value = value, loss(weights)
        if before - value < 1e-10 * len(scores):
            break
    slope, bias = weights.tolist()
    return (1 / slope, bias) if slope > 1e-3 else (1.0, 0.0)


class Reliability(NamedTuple):
    """Detections in bins of equal width by their probability; those with none are left out."""

    probability: Floats
    """Mean of each bin."""
    hits: Floats
    """The share of each that finds an object."""
    counts: npt.NDArray[np.int64]

    @property
    def error(self) -> float:
        """Expected calibration error: how far the two are apart, on average over detections."""
        return float((np.abs(self.probability - self.hits) * self.counts).sum() / max(self.counts.sum(), 1))


def reliability(probabilities: npt.ArrayLike, hits: Hits, bins: int = BINS) -> Reliability:
    """How often detections find an object, by the probability that they claim (Naeini et al. 2015).

    >>> reliability([0.9, 0.9, 0.1, 0.1], np.array([True, False, False, False])).error.__round__(3)
    0.25
    """
    p = np.asarray(probabilities, np.float64)
    which = np.minimum((p * bins).astype(np.int64), bins - 1)
    counts = np.bincount(which, minlength=bins)
    seen = counts > 0
    sums = (np.bincount(which, weights=each, minlength=bins)[seen] for each in (p, hits.astype(np.float64)))
    probability, share = (each / counts[seen] for each in sums)
    return Reliability(probability, share, counts[seen])


def conformal_margin(found: npt.ArrayLike, true: npt.ArrayLike, coverage: float) -> float | None:
    """The margin, as a share of width and height, with which boxes hold the true ones: split conformal.

    Of each detection that found an object: by how much of its own width or height the true box reaches beyond
    it, on the side where that is most. The margin is the ``ceil((n + 1) * coverage)``-th smallest of these n
    (multiplicative scores of de Grancey et al. 2022, "Object detection with probabilistic guarantees", and
    Andeol et al. 2023, arXiv 2304.06052; their largest over the sides, which needs no correction for four).

    If a new detection that finds an object is exchangeable with these n, its box widened by the margin holds
    the true one with a probability of at least `coverage`, on average over what was drawn to calibrate;
    whatever the detector and the distribution. docs/calibration.md says what is not guaranteed.

    Args:
        found: boxes of detections, xyxy in pixels, ``[n, 4]``.
        true: those that they found.
        coverage: between 0 and 1.

    Returns:
        At least 0; None where n is too small for that coverage.
    """
    found, true = np.asarray(found, np.float64), np.asarray(true, np.float64)
    size = found[:, 2:] - found[:, :2]
    beyond = np.hstack([(found[:, :2] - true[:, :2]) / size, (true[:, 2:] - found[:, 2:]) / size])
    worst = np.sort(beyond.max(1, initial=-np.inf))
    rank = math.ceil((len(worst) + 1) * coverage - 1e-9)
    return max(float(worst[rank - 1]), 0.0) if rank <= len(worst) else None


def least_matched(coverage: float) -> int:
    """How many detections with truth `conformal_margin` needs.

    >>> least_matched(0.9), least_matched(0.99)
    (9, 99)
    """
    return math.ceil(coverage / (1 - coverage) - 1e-9)


def _logit(scores: Scores) -> Floats:
    clipped = np.clip(scores.astype(np.float64), _LEAST, 1 - _LEAST)
    return np.asarray(np.log(clipped) - np.log1p(-clipped))


def _sigmoid(logits: Floats) -> Floats:
    return np.asarray(np.exp(-np.logaddexp(0, -logits)))
