"""What a similarity is taken for in a collection: a probability, and match, uncertain or unknown.

The curve comes with the collection's space, from the bundle that made its features; the collection may set its own
thresholds on the probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from resight.calibration import Calibration, Decision
from resight.errors import UncalibratedError
from resight.service.entries import Collection

NEAR_ENOUGH = 1e-6  # of a cosine: a float32's steps there are 6e-8, so nothing is cut that the exact test would keep


class Judgement(NamedTuple):
    """What a similarity is taken for; both None without a calibration.

    Attributes:
        probability: that two crops so similar show one person, at even odds.
    """

    probability: float | None
    decision: Decision | None

    def reaches(self, least: float | None) -> bool:
        """Whether it is as probable as asked for, in the float32 of the wire."""
        if least is None:
            return True
        return self.probability is not None and bool(np.float32(self.probability) >= np.float32(least))


UNCALIBRATED = Judgement(None, None)


@dataclass(frozen=True)
class Decider:
    """The meaning of similarities in one collection.

    Attributes:
        name: of the collection, for errors.
        calibration: None = nothing was fitted; then there is neither probability nor decision.
        accept: a match from this probability on.
        reject: unknown below this one; never above ``accept``.
    """

    name: str
    calibration: Calibration | None
    accept: float = 0.0
    reject: float = 0.0

    @classmethod
    def of(cls, collection: Collection) -> Decider:
        """With the collection's own thresholds where it has them."""
        calibration = collection.space.calibration
        if calibration is None:
            return cls(collection.name, None)
        accept = collection.accept_probability or calibration.accept
        reject = collection.reject_probability or calibration.reject
        return cls(collection.name, calibration, accept, min(reject, accept))

    def judged(self, similarities: Sequence[float]) -> list[Judgement]:
        """Each of some similarities, all at once: numpy's calls cost more here than the numbers do."""
        if self.calibration is None:
            return [UNCALIBRATED] * len(similarities)
        return [
            Judgement(probability, self._decision(probability))
            for probability in self.calibration.probability(similarities).tolist()
        ]

    @property
    def nothing(self) -> Decision | None:
        """What a query without a hit is taken for."""
        return None if self.calibration is None else "unknown"

    def _decision(self, probability: float) -> Decision:
        if probability >= self.accept:
            return "match"
        return "uncertain" if probability >= self.reject else "unknown"

    def least_similarity(self, probability: float | None) -> float:
        """A similarity below which none is as probable, -1..1; `Judgement.reaches` is exact where this is near.

        Raises:
            UncalibratedError: a probability is asked of a space that has none.
        """
        if probability is None:
            return -1.0
        if self.calibration is None:
            raise UncalibratedError(
                f"the space of collection {self.name} has no calibration, so it knows no probability: use min_cosine, "
                "or serve a bundle that was exported with a calibration and migrate the collection",
                field="min_probability",
            )
        if not 0.0 < probability < 1.0:
            return -1.0
        return float(np.clip(self.calibration.similarity(probability) - NEAR_ENOUGH, -1.0, 1.0))
