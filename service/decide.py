"""What a similarity is taken for in a collection: a probability, and match, uncertain or unknown.

The curve comes with the collection's space, from the bundle that made its features; the collection may set its own
thresholds on the probability.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resight.calibration import Calibration, Decision
from resight.errors import UncalibratedError
from resight.service.entries import Collection

NEAR_ENOUGH = 1e-6  # of a cosine: a float32's steps there are 6e-8, so nothing is cut that the exact test would keep


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

    def probability(self, similarity: float) -> float | None:
        """That two crops so similar show one person, at even odds; None without calibration."""
        return None if self.calibration is None else float(self.calibration.probability(similarity))

    def decision(self, similarity: float | None) -> Decision | None:
        """What a similarity is taken for; that of a query without a hit, None, is unknown."""
        probability = 0.0 if similarity is None else self.probability(similarity)
        if self.calibration is None or probability is None:
            return None
        if similarity is not None and probability >= self.accept:
            return "match"
        return "uncertain" if similarity is not None and probability >= self.reject else "unknown"

    def reaches(self, similarity: float, least: float | None) -> bool:
        """Whether a similarity is as probable as asked for, in the float32 of the wire."""
        if least is None:
            return True
        probability = self.probability(similarity)
        return probability is not None and bool(np.float32(probability) >= np.float32(least))

    def least_similarity(self, probability: float | None) -> float:
        """A similarity below which none is as probable, -1..1; `reaches` is exact where this is near.

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
