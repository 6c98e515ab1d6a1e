"""What a cosine similarity means at a site: the probability that two crops show one person, and two thresholds.

A calibration is part of a bundle: it holds for one embedding space and one site, and is fitted anew with every
model. `resight.training.calibration.fit` fits it without labels; docs/calibration.md says what it means and what not.
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
MAX_SLOPE = 1e4  # from "no" to "yes" within a thousandth of a cosine; half precision resolves no more
MAX_SOURCE = 200  # characters


@dataclass(frozen=True)
class Calibration:
    """A logistic curve from similarity to probability (Platt 1999), two thresholds, and what stands behind them.

        log(p / (1 - p)) = slope * (similarity - midpoint)

    It was fitted with as much weight on pairs of one person as on pairs of two: a probability is that at even odds.
    See `probability` for others.

    Attributes:
        midpoint: the cosine similarity that is as likely of one person as of two, in [-1, 1].
        slope: by how much the natural log-odds rise from one cosine to one more; above 0.
        accept: probability at even odds from which on a pair is a match.
        reject: probability at even odds below which a pair is two persons; not above ``accept``.
        false_accept_share: the share of pairs of two persons that ``accept`` was set to let pass, at most.
        false_reject_share: the share of pairs of one person that ``reject`` was set to turn away, at most.
        positives: pairs of one person it was fitted to.
        negatives: pairs of two persons, likewise.
        positive_source: where those came from, in words.
        negative_source: likewise.
        error: expected calibration error in [0, 1] on such pairs held out of the fit.

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
            if type(value).__name__ != entry.type:  # exactly: no bool for a count, no count for a number
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
        """How probable it is that two crops so similar show one person.

        Args:
            similarity: cosine similarities, any shape; what is no number stays none.
            prior: how probable it is before looking, in (0, 1): the share of pairs of one person among all that are
                compared. By Bayes' rule it adds ``log(prior / (1 - prior))`` to the log-odds; a half adds nothing.

        Returns:
            float64 of the same shape in [0, 1], never falling as similarity rises.

        Raises:
            InputError: a prior outside (0, 1).
        """
        if not 0 < prior < 1:
            raise InputError(f"expected a prior between 0 and 1, found {prior}: give the share of pairs of one person")
        odds = self.slope * (np.asarray(similarity, np.float64) - self.midpoint)
        shifted = odds + (math.log(prior) - math.log1p(-prior))
        small = np.exp(-np.abs(shifted))  # of no positive number: it cannot overflow
        return np.asarray(np.where(shifted >= 0, 1.0, small) / (1.0 + small), np.float64)

    def similarity(self, probability: ArrayLike) -> Doubles:
        """The similarity at which `probability` has a value, at even odds.

        Args:
            probability: in (0, 1), any shape.

        Returns:
            float64 of the same shape; outside [-1, 1] where no pair reaches the probability.

        Raises:
            InputError: a probability outside (0, 1).
        """
        wanted = np.asarray(probability, np.float64)
        if not ((wanted > 0) & (wanted < 1)).all():
            raise InputError(f"expected probabilities between 0 and 1, found {wanted}: 0 and 1 are never reached")
        return np.asarray(self.midpoint + (np.log(wanted) - np.log1p(-wanted)) / self.slope, np.float64)

    def decide(self, similarity: float) -> Decision:
        """What a similarity is taken for; what is no number is unknown."""
        probability = float(self.probability(similarity))
        if probability >= self.accept:
            return "match"
        return "uncertain" if probability >= self.reject else "unknown"

    def to_json(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: object) -> Calibration:
        """Read what `to_json` wrote, and nothing else.

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
