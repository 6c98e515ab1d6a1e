"""Calibration of cosine similarity at a site: the probability that two crops show one person, and two thresholds.

A calibration is part of a bundle: it is valid for one embedding space and one site, and is fitted again for every
model. `resight.training.calibration.fit` fits it without labels; docs/calibration.md explains its meaning and limits.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import ArrayLike

from resight.arrays import Doubles
from resight.errors import BundleError, InputError

Decision = Literal["match", "uncertain", "unknown"]

EVEN_PRIOR = 0.5
MAX_SLOPE = 1e4  # from 0 to 1 within 0.001 of a cosine, the resolution of half precision
MAX_SOURCE = 200  # characters


@dataclass(frozen=True)
class Calibration:
    """A logistic curve from similarity to probability (Platt 1999), two thresholds, and the data they are based on.

        log(p / (1 - p)) = slope * (similarity - midpoint)

    It was fitted with equal total weight on pairs of one person and of two persons, so a probability is that at even
    prior odds. See `probability` for other priors.

    Attributes:
        midpoint: the cosine similarity with a probability of 0.5, in [-1, 1].
        slope: increase of the natural log-odds per unit of cosine similarity; above 0.
        accept: lowest probability, at even odds, of a match.
        reject: pairs of a lower probability, at even odds, are decided as unknown; not above ``accept``.
        false_accept_share: largest share of pairs of two persons above ``accept``, for which it was chosen.
        false_reject_share: largest share of pairs of one person below ``reject``, for which it was chosen.
        positives: number of pairs of one person it was fitted to.
        negatives: number of pairs of two persons, likewise.
        positive_source: description of the origin of the positives.
        negative_source: likewise.
        error: expected calibration error in [0, 1] on held-out pairs.

    Raises:
        BundleError: a value out of range or of another type, or thresholds in the wrong order.
    """

    midpoint: float
    slope: float
    accept: float
    reject: float
    false_accept_share: float
    false_reject_share: float
    positives: int
    negatives: int
    positive_source: str
    negative_source: str
    error: float

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if type(value).__name__ != entry.type:  # exact types: no bool for int, no int for float
                _refuse(entry.name, f"{entry.type}", value)
        self._check("midpoint", "-1..1", -1.0 <= self.midpoint <= 1.0)
        self._check("slope", f"more than 0, up to {MAX_SLOPE:g}", 0.0 < self.slope <= MAX_SLOPE)
        for name in ("accept", "reject", "false_accept_share", "false_reject_share"):
            self._check(name, "between 0 and 1", 0.0 < getattr(self, name) < 1.0)
        self._check("reject", f"no more than accept, {self.accept}", self.reject <= self.accept)
        self._check("error", "0..1", 0.0 <= self.error <= 1.0)
        for name in ("positives", "negatives"):
            self._check(name, "1 or more", getattr(self, name) >= 1)
        for name in ("positive_source", "negative_source"):
            self._check(name, f"1..{MAX_SOURCE} characters", 1 <= len(getattr(self, name)) <= MAX_SOURCE)

    def probability(self, similarity: ArrayLike, *, prior: float = EVEN_PRIOR) -> Doubles:
        """Probability that two crops of a given similarity show one person.

        Args:
            similarity: cosine similarities, any shape; NaN stays NaN.
            prior: prior probability in (0, 1): the share of pairs of one person among all compared pairs. By Bayes'
                rule it adds ``log(prior / (1 - prior))`` to the log-odds; 0.5 adds nothing.

        Returns:
            float64 of the same shape in [0, 1], monotonic in similarity.

        Raises:
            InputError: a prior outside (0, 1).
        """
        if not 0 < prior < 1:
            raise InputError(f"expected a prior between 0 and 1, found {prior}: give the share of pairs of one person")
        odds = self.slope * (np.asarray(similarity, np.float64) - self.midpoint)
        shifted = odds + (math.log(prior) - math.log1p(-prior))
        small = np.exp(-np.abs(shifted))  # the exponent is at most 0, so it cannot overflow
        return np.asarray(np.where(shifted >= 0, 1.0, small) / (1.0 + small), np.float64)

    def similarity(self, probability: ArrayLike) -> Doubles:
        """The inverse of `probability` at even odds.

        Args:
            probability: in (0, 1), any shape.

        Returns:
            float64 of the same shape; outside [-1, 1] if no pair reaches the probability.

        Raises:
            InputError: a probability outside (0, 1).
        """
        p = np.asarray(probability, np.float64)
        if not ((p > 0) & (p < 1)).all():
            raise InputError(f"expected probabilities between 0 and 1 exclusive, found {p}")
        return np.asarray(self.midpoint + (np.log(p) - np.log1p(-p)) / self.slope, np.float64)

    def decide(self, similarity: float) -> Decision:
        """The decision for a similarity; NaN is unknown."""
        probability = float(self.probability(similarity))
        if probability >= self.accept:
            return "match"
        return "uncertain" if probability >= self.reject else "unknown"

    def to_json(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: object) -> Calibration:
        """Parse the output of `to_json`; anything else is rejected.

        Raises:
            BundleError: a key missing or unknown, or a value of another type or out of range.
        """
        if type(body) is not dict:
            _refuse("its value", "an object", body)
        names = {entry.name for entry in fields(cls)}
        if set(body) != names:
            missing, unknown = sorted(names - set(body)), sorted(map(str, set(body) - names))
            _refuse("its keys", ", ".join(sorted(names)), f"missing {missing}, unknown {unknown}")
        return cls(**body)

    def _check(self, name: str, expected: str, sound: bool) -> None:
        if not sound:
            _refuse(name, expected, getattr(self, name))


def _refuse(what: str, expected: str, found: object) -> NoReturn:
    raise BundleError(f"calibration: {what}: expected {expected}, found {str(found)[:200]!r}: export the bundle again")
