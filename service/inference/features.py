"""Extraction of the feature of a request: from crops of one person, or a feature sent by the caller.

The crops (shots) of a track are combined into one feature. Shots of another person, which tracker errors cause, are
rejected: the medoid is the shot most similar to all others, and a shot is rejected if its similarity to the medoid is

- below the reject threshold of the calibration, if the space has one; or
- an outlier among the shots' similarities to the medoid, and no match by the calibration, if there is one: its modified
  z-score is below -3.5 (Iglewicz and Hoaglin, "How to Detect and Handle Outliers", 1993). The spread is at least
  `MIN_SPREAD`; otherwise the next frame after a series of near-duplicates would be an outlier.

On tracks of Market-1501 (OSNet x0.25 trained on MSMT17, one crop of another person from the same camera added to each)
this rejects 82 % of the foreign crops in tracks of 3, 89 % of 5 and 91 % of 8, and at most 1.5 % of the person's own.
With fewer than three shots there is no majority, and all are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resight.arrays import Feature
from resight.calibration import Calibration
from resight.errors import ImageError, InputError, LimitError, ReIDError, SpaceMismatchError
from resight.service.inference.embedder import Embedded, Timings, combine_crops, require_embedded
from resight.service.inference.models import ModelHost
from resight.service.inference.priority_queue import Priority
from resight.service.records import Collection, Space
from resight.service.settings import Settings

MIN_SHOTS = 3
OUTLIER = 3.5  # modified z-score recommended by Iglewicz and Hoaglin
MAD_TO_SIGMA = 1.4826  # of a normal distribution
MIN_SPREAD = 0.05  # of a cosine; 0.02 rejects twice as many of the person's own shots in tracks of 5 and 12


def same_person_shots(features: Feature, calibration: Calibration | None) -> NDArray[np.bool_]:
    """Select the shots that show the same person as most of them.

    Args:
        features: float32 (N, D), unit rows.
        calibration: of their space; None = it has none.

    Returns:
        bool (N,), at least one of them True.
    """
    if len(features) < MIN_SHOTS:
        return np.ones(len(features), np.bool_)
    similarity = features @ features.T
    medoid = int(similarity.sum(axis=1).argmax())
    to_medoid = similarity[medoid].astype(np.float64)  # (N,)
    others = np.delete(to_medoid, medoid)
    median = float(np.median(others))
    spread = max(MIN_SPREAD, MAD_TO_SIGMA * float(np.median(np.abs(others - median))))
    foreign = median - to_medoid > OUTLIER * spread
    if calibration is not None:
        probability = calibration.probability(to_medoid)
        foreign = (foreign & (probability < calibration.accept)) | (probability < calibration.reject)
    foreign[medoid] = False
    return np.asarray(~foreign, np.bool_)


@dataclass(frozen=True)
class CropSource:
    """One or more crops of one person; with the request's field name of each crop, and of all (``within``)."""

    images: tuple[bytes, ...]
    fields: tuple[str, ...]
    within: str = "shots.images"


@dataclass(frozen=True)
class FeatureSource:
    """A feature sent by the caller, as little-endian float32 bytes."""

    float32_le: bytes
    space_id: str


@dataclass(frozen=True)
class FeatureResult:
    """An extracted feature, float32 (D,) of unit length.

    Attributes:
        quality: 0..1, mean of the crops used; 0 for a `FeatureSource`.
        used: number of crops used.
        rejected: number of crops rejected, as undecodable or of another person.
    """

    feature: Feature
    quality: float
    timings: Timings
    used: int = 0
    rejected: int = 0


class FeatureExtractor:
    """Extracts features with the loaded models.

    Args:
        models: of the server.
        settings: for the limit on shots.
    """

    def __init__(self, models: ModelHost, settings: Settings) -> None:
        self._models, self._settings = models, settings

    async def extract(
        self,
        collection: Collection,
        source: CropSource | FeatureSource,
        deadline: float,
        *,
        every: bool,
        space: Space | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> FeatureResult:
        """The feature of a source, in the collection's space or another one.

        Args:
            collection: the collection.
            source: one crop, several shots of one person, or a feature.
            deadline: in `time.monotonic` seconds.
            every: an undecodable shot is an error instead of rejected; for enrolment, which must use all crops.
            space: None = the collection's.
            priority: of the call.

        Raises:
            SpaceMismatchError: no model of the space is loaded, or the feature is of another space.
            InputError: an invalid feature or image.
            LimitError: too many shots.
        """
        if isinstance(source, FeatureSource):
            return FeatureResult(check_feature(source, collection), 0.0, Timings())
        if not 1 <= len(source.images) <= self._settings.max_shots:
            raise LimitError(
                f"expected 1 to {self._settings.max_shots} shots, found {len(source.images)}: send the best ones",
                field=source.within,
                max_shots=self._settings.max_shots,
            )
        with self._models.lease_space(space or collection.space, collection=collection.name) as model:
            outcomes = await model.embed(source.images, deadline, priority=priority)
        return combine_shots(outcomes, source.fields, (space or collection.space).calibration, every=every)

    async def extract_other_spaces(
        self, collection: Collection, source: CropSource | FeatureSource, deadline: float
    ) -> tuple[tuple[str, Feature], ...]:
        """Features in the collection's other spaces whose models are loaded, by space id.

        A migration fills in missing ones, and activating a space with missing features is refused.
        """
        if isinstance(source, FeatureSource):
            return ()
        found = []
        for space_id in collection.other_space_ids:
            if model := self._models.model_of_space(space_id):
                one = await self.extract(
                    collection, source, deadline, every=True, space=model.space, priority=Priority.ENROL
                )
                found.append((space_id, one.feature))
        return tuple(found)


def combine_shots(
    outcomes: Sequence[Embedded | ReIDError], fields: Sequence[str], calibration: Calibration | None, *, every: bool
) -> FeatureResult:
    """The quality-weighted mean feature of the shots that show the same person; see `same_person_shots`.

    Raises:
        ReIDError: the first error, if no shot can be used, if ``every`` is set, or if any error is not about an image
            (a deadline, a failed model).
    """
    if len(outcomes) == 1:
        (only,) = require_embedded(outcomes, fields)
        return FeatureResult(only.feature, only.quality, only.timings, 1)
    good = [outcome for outcome in outcomes if isinstance(outcome, Embedded)]
    if (
        every
        or not good
        or any(isinstance(outcome, ReIDError) and not isinstance(outcome, ImageError) for outcome in outcomes)
    ):
        good = require_embedded(outcomes, fields)
    belongs = same_person_shots(np.stack([shot.feature for shot in good]), calibration)
    kept = [shot for shot, own in zip(good, belongs, strict=True) if own]
    mean = combine_crops(kept)
    timings = sum((shot.timings for shot in good), Timings())
    return FeatureResult(mean.feature, mean.quality, timings, len(kept), len(outcomes) - len(kept))


def check_feature(source: FeatureSource, collection: Collection) -> Feature:
    """Check and normalise a caller's feature: float32 (D,); raises the error that `check_features` returns."""
    (found,) = check_features([source], collection)
    if isinstance(found, ReIDError):
        raise found
    return found


def check_features(sources: Sequence[FeatureSource], collection: Collection) -> list[Feature | ReIDError]:
    """Check and normalise callers' features, all at once since the overhead of numpy calls dominates.

    Returns:
        For each: float32 (D,) of unit length, or SpaceMismatchError (another space than the collection's), or
        InputError (wrong length, not finite, or zero).
    """
    found: list[Feature | ReIDError | None] = [_source_error(source, collection) for source in sources]
    valid = [number for number, error in enumerate(found) if error is None]
    packed = b"".join(sources[number].float32_le for number in valid)
    features = np.frombuffer(packed, "<f4").astype(np.float32).reshape(len(valid), collection.space.dim)
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.linalg.norm(features.astype(np.float64), axis=1)
    good = np.isfinite(lengths) & (lengths >= 1e-12)
    units = features / np.where(good, lengths, 1.0).astype(np.float32)[:, None]
    for number, length, usable, unit in zip(valid, lengths.tolist(), good.tolist(), units, strict=True):
        found[number] = (
            unit
            if usable
            else InputError(
                f"a feature must be finite and not zero, found length {length}",
                field="embedding.float32_le",
            )
        )
    return [outcome for outcome in found if outcome is not None]


def _source_error(source: FeatureSource, collection: Collection) -> ReIDError | None:
    """The error of a feature's space or size, if any; does not check its values."""
    if source.space_id != collection.space.space_id:
        return SpaceMismatchError(
            f"collection {collection.name} is searched in space {collection.space.space_id}, the feature is of space "
            f"{source.space_id or '(none)'}: embed the crop with that model",
            field="embedding.space_id",
            expected_space_id=collection.space.space_id,
            found_space_id=source.space_id,
        )
    if len(source.float32_le) != 4 * collection.space.dim:
        return InputError(
            f"a feature of this space has {collection.space.dim} float32 in {4 * collection.space.dim} bytes, found "
            f"{len(source.float32_le)} bytes: send all values, little-endian",
            field="embedding.float32_le",
            expected_bytes=4 * collection.space.dim,
            found_bytes=len(source.float32_le),
        )
    return None
