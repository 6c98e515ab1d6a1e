"""What a cosine similarity means at a site: the probability that two crops show one person, and two thresholds.

A calibration is part of a bundle: it holds for one embedding space and one site, and is fitted anew with every
model. `resight.training.calibrate` fits it without labels; docs/calibration.md says what it means and what not.

Letters: K knots.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from resight.errors import BundleError, InputError

Decision = Literal["match", "uncertain", "unknown"]
Doubles = NDArray[np.float64]

MAX_KNOTS = 64
MAX_LOG_ODDS = 50.0  # 1 in 5e21: more is an overflow in the making, never a measurement
MAX_SOURCE = 200  # characters
EVEN = 0.5


@dataclass(frozen=True)
class Calibration:
    """A rising curve from similarity to probability, with what stands behind it.

    The curve is straight between knots in log-odds, ``log(p / (1 - p))``, and goes on straight beyond the last ones:
    two knots are the logistic curve of Platt (1999), more are a bent one. It was fitted with as much weight on pairs
    of one person as on pairs of two, so a probability is that at even odds; see `probability` for others.

    Attributes:
        similarities: K cosine similarities in [-1, 1], rising.
        log_odds: K natural log-odds that two crops so similar show one person, rising.
        accept: probability at even odds from which on a pair is a match.
        reject: probability at even odds below which a pair is two persons; not above ``accept``.
        false_accept_share: share of ``negatives`` that ``accept`` was set to let pass, at most.
        false_reject_share: share of ``positives`` that ``reject`` was set to turn away, at most.
        positives: pairs of one person it was fitted to.
        negatives: pairs of two persons, likewise.
        positive_source: where those came from, in words.
        negative_source: likewise.
        error: expected calibration error in [0, 1] on such pairs held out of the fit.

    Raises:
        BundleError: a value out of range or of another type, or an order that makes no sense.
    """

    similarities: tuple[float, ...]
    log_odds: tuple[float, ...]
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
        for name in ("similarities", "log_odds"):
            self._check_knots(name, 1.0 if name == "similarities" else MAX_LOG_ODDS)
        if len(self.similarities) != len(self.log_odds):
            found = f"{len(self.similarities)} and {len(self.log_odds)}"
            _refuse("similarities and log_odds", "as many of one as of the other", found)
        for name in ("accept", "reject", "false_accept_share", "false_reject_share"):
            value = getattr(self, name)
            if type(value) is not float or not 0 < value < 1:
                _refuse(name, "a number between 0 and 1", value)
        if self.reject > self.accept:
            _refuse("reject", f"no more than accept, {self.accept}", self.reject)
        if type(self.error) is not float or not 0 <= self.error <= 1:
            _refuse("error", "a number in [0, 1]", self.error)
        for name in ("positives", "negatives"):
            count = getattr(self, name)
            if type(count) is not int or count < 1:
                _refuse(name, "a count of 1 or more", count)
        for name in ("positive_source", "negative_source"):
            words = getattr(self, name)
            if type(words) is not str or not 1 <= len(words) <= MAX_SOURCE:
                _refuse(name, f"1..{MAX_SOURCE} characters", words)

    def _check_knots(self, name: str, most: float) -> None:
        """Refuse a column of knots that is no rising row of finite numbers."""
        knots = getattr(self, name)
        if type(knots) is not tuple or not 2 <= len(knots) <= MAX_KNOTS:
            _refuse(name, f"a tuple of 2..{MAX_KNOTS} numbers", knots)
        if not all(type(knot) is float and abs(knot) <= most for knot in knots):  # NaN is not below anything
            _refuse(name, f"numbers in [-{most:g}, {most:g}]", knots)
        if not all(one < after for one, after in pairwise(knots)):
            _refuse(name, "rising numbers", knots)

    def probability(self, similarity: ArrayLike, *, prior: float = EVEN) -> Doubles:
        """How probable it is that two crops so similar show one person.

        Args:
            similarity: cosine similarities, any shape; what is no number stays none.
            prior: how probable it is before looking, in (0, 1): the share of such pairs among all that are
                compared. By Bayes' rule it adds ``log(prior / (1 - prior))`` to the log-odds; a half adds nothing.

        Returns:
            float64 of the same shape in [0, 1], never falling as similarity rises.

        Raises:
            InputError: a prior outside (0, 1).
        """
        if not 0 < prior < 1:
            raise InputError(f"expected a prior between 0 and 1, found {prior}: give the share of pairs of one person")
        odds = _follow(np.asarray(similarity, np.float64), self.similarities, self.log_odds)
        shifted = odds + (math.log(prior) - math.log1p(-prior))
        # exp of a negative number alone: it cannot overflow.
        small = np.exp(-np.abs(shifted))
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
        return _follow(np.log(wanted) - np.log1p(-wanted), self.log_odds, self.similarities)

    def decide(self, similarity: float) -> Decision:
        """What a similarity is taken for; what is no number is unknown."""
        probability = float(self.probability(similarity))
        if probability >= self.accept:
            return "match"
        return "uncertain" if probability >= self.reject else "unknown"

    def to_json(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        body = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in body.items()}

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
        values: dict[str, Any] = {name: tuple(v) if type(v) is list else v for name, v in body.items()}
        return cls(**values)


def _follow(at: Doubles, xs: tuple[float, ...], ys: tuple[float, ...]) -> Doubles:
    """Straight lines through rising knots, the first and last going on; never falling, not by a rounding either."""
    x, y = np.array(xs), np.array(ys)
    piece = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    slope = np.diff(y) / np.diff(x)
    reached = y[piece] + slope[piece] * (at - x[piece])
    ceiling = np.append(y[1:-1], np.inf)  # where the next line begins
    return np.asarray(np.minimum(reached, ceiling[piece]), np.float64)


def _refuse(what: str, expected: str, found: object) -> NoReturn:
    raise BundleError(f"calibration: {what}: expected {expected}, found {str(found)[:200]!r}: export the bundle anew")
