"""What a request brings, crops of one person or a feature, made into a feature of a collection's space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resight.calibration import Calibration
from resight.errors import ImageError, InputError, LimitError, ReIDError, SpaceMismatchError
from resight.service.embedder import Embedded, Timings, all_embedded, combined
from resight.service.entries import Collection, Space
from resight.service.lanes import Priority
from resight.service.models import ModelHost
from resight.service.runtime import Feature
from resight.service.settings import Settings
from resight.service.tracklet import belonging


@dataclass(frozen=True)
class Crops:
    """A source of a feature: one or more crops of one person, what the request calls each, and all of them."""

    images: tuple[bytes, ...]
    fields: tuple[str, ...]
    within: str = "shots.images"


@dataclass(frozen=True)
class Given:
    """A source of a feature: the caller's own, as little-endian float32 bytes."""

    float32_le: bytes
    space_id: str


@dataclass(frozen=True)
class Made:
    """A feature, float32 (D,) of unit length, and what it was made from.

    Attributes:
        quality: 0..1, the mean of the crops used; 0 where the source was no crop.
        used: crops that made it.
        rejected: crops left out, as of another person or undecodable.
    """

    feature: Feature
    quality: float
    timings: Timings
    used: int = 0
    rejected: int = 0


class FeatureMaker:
    """Makes features with the loaded models.

    Args:
        models: of the server.
        settings: has the limit on shots.
    """

    def __init__(self, models: ModelHost, settings: Settings) -> None:
        self._models, self._settings = models, settings

    async def made(
        self,
        of: Collection,
        source: Crops | Given,
        deadline: float,
        *,
        every: bool,
        space: Space | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> Made:
        """The feature of a source, in a collection's space or another one.

        Args:
            of: the collection.
            source: one crop, some shots of one person, or a feature.
            deadline: in `time.monotonic` seconds.
            every: a shot that cannot be decoded is an error, not left out: what is enrolled should be as it was sent.
            space: None = the collection's.
            priority: who waits for it.

        Raises:
            SpaceMismatchError: no model of the space is loaded, or the given feature is of another one.
            InputError: a bad feature or image.
            LimitError: too many shots.
        """
        if isinstance(source, Given):
            return Made(given_feature(source, of), 0.0, Timings())
        if not 1 <= len(source.images) <= self._settings.max_shots:
            raise LimitError(
                f"1 to {self._settings.max_shots} shots make a feature, found {len(source.images)}: send the best ones",
                field=source.within,
                max_shots=self._settings.max_shots,
            )
        with self._models.lease_space(space or of.space, collection=of.name) as model:
            outcomes = await model.embed(source.images, deadline, priority=priority)
        return joined(outcomes, source.fields, (space or of.space).calibration, every=every)

    async def others(self, into: Collection, source: Crops | Given, deadline: float) -> tuple[tuple[str, Feature], ...]:
        """Features in the collection's other spaces, by space id, as far as their models are loaded.

        What is left out a migration fills in, or the switch back refuses.
        """
        if isinstance(source, Given):
            return ()
        made = []
        for space_id in into.other_space_ids:
            if model := self._models.in_space(space_id):
                one = await self.made(into, source, deadline, every=True, space=model.space, priority=Priority.ENROL)
                made.append((space_id, one.feature))
        return tuple(made)


def joined(
    outcomes: Sequence[Embedded | ReIDError], fields: Sequence[str], calibration: Calibration | None, *, every: bool
) -> Made:
    """One feature of the shots that show the person most of them show: their mean weighted by quality.

    Raises:
        ReIDError: of the first shot, where none can be used or ``every`` must be; one that no other shot's success
            could mend (a deadline, a failed model) always.
    """
    if len(outcomes) == 1:
        (only,) = all_embedded(outcomes, fields)
        return Made(only.feature, only.quality, only.timings, 1)
    good = [outcome for outcome in outcomes if isinstance(outcome, Embedded)]
    if (
        every
        or not good
        or any(isinstance(outcome, ReIDError) and not isinstance(outcome, ImageError) for outcome in outcomes)
    ):
        good = all_embedded(outcomes, fields)
    belongs = belonging(np.stack([shot.feature for shot in good]), calibration)
    kept = [shot for shot, own in zip(good, belongs, strict=True) if own]
    mean = combined(kept)
    timings = sum((shot.timings for shot in good), Timings())
    return Made(mean.feature, mean.quality, timings, len(kept), len(outcomes) - len(kept))


def given_feature(source: Given, of: Collection) -> Feature:
    """Check a caller's feature and bring it to unit length: float32 (D,); raises what `given_features` answers."""
    (found,) = given_features([source], of)
    if isinstance(found, ReIDError):
        raise found
    return found


def given_features(sources: Sequence[Given], of: Collection) -> list[Feature | ReIDError]:
    """Check callers' features and bring them to unit length, all at once: one by one numpy's calls cost the most.

    Returns:
        For each float32 (D,), or SpaceMismatchError (of another space than the collection) or InputError (wrong
        length, not finite, or zero).
    """
    found: list[Feature | ReIDError | None] = [_misfit(source, of) for source in sources]
    fit = [number for number, misfit in enumerate(found) if misfit is None]
    packed = b"".join(sources[number].float32_le for number in fit)
    features = np.frombuffer(packed, "<f4").astype(np.float32).reshape(len(fit), of.space.dim)
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.linalg.norm(features.astype(np.float64), axis=1)
    good = np.isfinite(lengths) & (lengths >= 1e-12)
    units = features / np.where(good, lengths, 1.0).astype(np.float32)[:, None]
    for number, length, usable, unit in zip(fit, lengths.tolist(), good.tolist(), units, strict=True):
        found[number] = (
            unit
            if usable
            else InputError(
                f"a feature needs finite numbers and a length above 0, found length {length}",
                field="embedding.float32_le",
            )
        )
    return [outcome for outcome in found if outcome is not None]


def _misfit(source: Given, of: Collection) -> ReIDError | None:
    """What is wrong with a feature before its numbers are looked at."""
    if source.space_id != of.space.space_id:
        return SpaceMismatchError(
            f"collection {of.name} holds features of space {of.space.space_id}, the given one says "
            f"{source.space_id or 'nothing'}: embed the crop with that model",
            field="embedding.space_id",
            expected_space_id=of.space.space_id,
            found_space_id=source.space_id,
        )
    if len(source.float32_le) != 4 * of.space.dim:
        return InputError(
            f"a feature of this space is {of.space.dim} float32 in {4 * of.space.dim} bytes, found "
            f"{len(source.float32_le)} bytes: send all of it, little-endian",
            field="embedding.float32_le",
            expected_bytes=4 * of.space.dim,
            found_bytes=len(source.float32_le),
        )
    return None
