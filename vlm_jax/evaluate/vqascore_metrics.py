"""Numbers that say how well scores of (image, text) pairs agree with the truth or with people.

    text / image / group   Winoground's: each of two texts (images) is preferred by its own image (text); both
    pair                   con | dis: ordered alike or not; a tie of the score, of people, of both
    tau_b                  (con - dis) / sqrt((con + dis + score ties)(con + dis + human ties))
    tau_23, accuracy_23    (con + both - dis - score ties - human ties) / N,  (con + both) / N   (arXiv 2305.14324)
    tie optimisation       score differences up to eps count as ties; eps is what makes the mean over rows largest

Arrays `human` and `score` are [n], or [rows, n] where only pairs within a row are compared and rows are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

VARIANTS = ("b", "23", "acc23")


class Pairs(NamedTuple):
    """How pairs are ordered, counts [rows] or a running count [rows, thresholds]: see the module.

    score_ties and human_ties leave out the pairs that are tied in both.
    """

    con: np.ndarray
    dis: np.ndarray
    score_ties: np.ndarray
    human_ties: np.ndarray
    both: np.ndarray

    @property
    def number(self) -> np.ndarray:
        """All pairs of a row."""
        return self.con + self.dis + self.score_ties + self.human_ties + self.both


class Optimum(NamedTuple):
    """The largest value, and the score difference up to which pairs are ties there."""

    value: float
    threshold: float


def preferences(scores: np.ndarray) -> dict[str, np.ndarray]:
    """Scores [n, 2 images, 2 texts] -> {"text", "image", "group"}: bool [n], whether an item is right. Ties are wrong."""
    s = np.asarray(scores)
    own, other_text, other_image = s[:, [0, 1], [0, 1]], s[:, [0, 1], [1, 0]], s[:, [1, 0], [0, 1]]
    text, image = (own > other_text).all(axis=1), (own > other_image).all(axis=1)
    return {"text": text, "image": image, "group": text & image}


def pearson(human: Sequence[float], score: Sequence[float]) -> float:
    """Pearson's correlation x 100, nan if one side is constant."""
    human, score = np.asarray(human, np.float64), np.asarray(score, np.float64)
    if len(human) < 2 or np.ptp(human) == 0 or np.ptp(score) == 0:
        return float("nan")
    return 100 * float(stats.pearsonr(human, score).statistic)


def kendall(human: Sequence, score: Sequence, variant: str = "b") -> float:
    """Kendall's tau-b or tau-c; the mean of rows where it is defined, nan if it nowhere is."""
    rows = zip(np.atleast_2d(np.asarray(human, np.float64)), np.atleast_2d(np.asarray(score, np.float64)))
    return _mean([stats.kendalltau(h, s, variant=variant, nan_policy="propagate").statistic for h, s in rows])


def kendall_with_ties(human: Sequence, score: Sequence, eps: float, variant: str = "b") -> float:
    """A variant of VARIANTS where score differences up to `eps` count as ties."""
    return _mean(_STATISTICS[variant](count_pairs(human, score, eps)))


def count_pairs(human: Sequence, score: Sequence, eps: float = 0.0) -> Pairs:
    """Pairs [rows] by how they are ordered; score differences up to `eps` are ties."""
    human_sign, difference = _pairs(human, score)
    tied, same = np.abs(difference) <= eps, human_sign == 0
    agree = human_sign * np.sign(difference)
    kinds = (~tied & (agree > 0), ~tied & (agree < 0), tied & ~same, ~tied & same, tied & same)
    return Pairs(*(kind.sum(axis=1) for kind in kinds))


def optimise_ties(human: Sequence, score: Sequence, variant: str = "acc23", sample: int = 0, seed: int = 0) -> Optimum:
    """The first maximum over eps of a statistic: "acc23" is pairwise accuracy with tie optimisation, "23" tau_23.

    sample: look at so many pairs drawn at random where a row has more (0: at all), for millions of items have too many.
    """
    thresholds, values = tie_curve(human, score, variant, sample, seed)
    best = int(np.nanargmax(values)) if np.isfinite(values).any() else 0
    return Optimum(float(values[best]), float(thresholds[best]))


def tie_curve(
    human: Sequence, score: Sequence, variant: str = "acc23", sample: int = 0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(thresholds [k], values [k]): the statistic where score differences up to each threshold are ties; the first is 0."""
    human_sign, difference = _pairs(human, score, sample, seed)
    if not difference.size:
        return np.zeros(1), np.full(1, np.nan)
    size = np.abs(difference)
    thresholds = np.unique(size)
    if thresholds[0] != 0:
        thresholds = np.concatenate([[0.0], thresholds])
    at = np.searchsorted(thresholds, size)  # the first threshold that makes a tie of each pair
    agree = human_sign * np.sign(difference).astype(np.int8)

    def up_to(which: np.ndarray) -> np.ndarray:
        """[rows, k]: how many of the pairs `which` are ties at each threshold."""
        counts = [np.bincount(row[chosen], minlength=len(thresholds)) for row, chosen in zip(at, which)]
        return np.cumsum(counts, axis=1)

    con, dis, same = agree > 0, agree < 0, human_sign == 0
    joined = up_to(con), up_to(dis)
    both = up_to(same)
    left = [kind.sum(axis=1, keepdims=True) for kind in (con, dis, same)]
    fallen = up_to((difference == 0) & ~same)
    pairs = Pairs(left[0] - joined[0], left[1] - joined[1], sum(joined) + fallen, left[2] - both, both)
    return thresholds, np.mean(_STATISTICS[variant](pairs), axis=0)


def accuracy_without_human_ties(human: Sequence, score: Sequence) -> float:
    """Share of pairs ordered as people order them, among all but those that only people find equal (as published)."""
    pairs = count_pairs(human, score)
    return _mean(_ratio(pairs.con, pairs.number - pairs.human_ties))


def auroc(label: Sequence[float], score: Sequence[float]) -> float:
    """Area under the ROC curve of `score` for labels 0 and 1: P(positive > negative) + P(tie) / 2; nan without both."""
    label, ranks = np.asarray(label) > 0, stats.rankdata(score)
    positive, negative = int(label.sum()), int((~label).sum())
    if not positive or not negative:
        return float("nan")
    return float((ranks[label].sum() - positive * (positive + 1) / 2) / (positive * negative))


def preferred(scores: np.ndarray) -> np.ndarray:
    """Scores [n, candidates] -> int [n], the best candidate; the first of equal ones."""
    return np.argmax(np.asarray(scores), axis=1)


def best_above_worst(human: np.ndarray, score: np.ndarray) -> np.ndarray:
    """bool [rows]: does what people like most score above what they like least? [rows, n]; the first of equals counts."""
    human, score, row = np.asarray(human), np.asarray(score), np.arange(len(human))
    return score[row, human.argmax(axis=1)] > score[row, human.argmin(axis=1)]


def agreement(human: Sequence[float], score: Sequence[float], sample: int = 0) -> dict[str, float]:
    """What benchmarks with human ratings report: Pearson x 100, tau-b, pairwise accuracy and its tie threshold, items.

    Items without a score (nan) are left out. sample: as in `optimise_ties`.
    """
    human, score = np.asarray(human, np.float64), np.asarray(score, np.float64)
    known = np.isfinite(score)
    human, score = human[known], score[known]
    best = optimise_ties(human, score, sample=sample) if len(human) > 1 else Optimum(float("nan"), 0.0)
    return {
        "pearson": pearson(human, score), "kendall_b": kendall(human, score) if len(human) > 1 else float("nan"),
        "pairwise_accuracy": best.value, "tie_threshold": best.threshold, "items": len(human),
    }  # fmt: skip


def _pairs(human: Sequence, score: Sequence, sample: int = 0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(sign of the human difference int8 [rows, pairs], difference of the score float64 [rows, pairs])."""
    human, score = np.atleast_2d(np.asarray(human, np.float64)), np.atleast_2d(np.asarray(score, np.float64))
    n = human.shape[1]
    if 0 < sample < n * (n - 1) // 2:
        rng = np.random.default_rng(seed)
        first, step = rng.integers(0, n, sample), rng.integers(1, n, sample)
        second = (first + step) % n
    else:
        first, second = np.triu_indices(n, 1)
    sign = np.sign(human[:, first] - human[:, second]).astype(np.int8)
    return sign, score[:, first] - score[:, second]


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, nan where there is nothing to divide by."""
    below = np.asarray(below, np.float64)
    return np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0)


def _mean(values: Sequence[float]) -> float:
    """The mean of those that are numbers."""
    values = np.asarray(values, np.float64)
    return float(values[~np.isnan(values)].mean()) if (~np.isnan(values)).any() else float("nan")


def _tau_b(p: Pairs) -> np.ndarray:
    ordered = (p.con + p.dis).astype(np.float64)
    return _ratio(p.con - p.dis, np.sqrt((ordered + p.score_ties) * (ordered + p.human_ties)))


def _tau_23(p: Pairs) -> np.ndarray:
    return _ratio(p.con + p.both - p.dis - p.score_ties - p.human_ties, p.number)


def _accuracy_23(p: Pairs) -> np.ndarray:
    return _ratio(p.con + p.both, p.number)


_STATISTICS: dict[str, Callable[[Pairs], np.ndarray]] = {"b": _tau_b, "23": _tau_23, "acc23": _accuracy_23}
