"""Requests to enrol become features and go to the writer, each with its own outcome, or all or none."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from uuid import uuid4

from resight.errors import QualityTooLowError, ReIDError
from resight.service import audited
from resight.service.audit import Event
from resight.service.changes import outlives
from resight.service.entries import Collection, Enrolled, Enrolment, Entry, now_us
from resight.service.features import Crops, FeatureMaker, Given, given_features
from resight.service.lanes import Priority
from resight.service.runtime import Feature
from resight.service.store import Store


@dataclass(frozen=True)
class EnrolRequest:
    """One entry to enrol, with what its feature is made from.

    Attributes:
        may_outlive: it may expire later than the collection's time to live.
    """

    entry: Entry
    source: Crops | Given
    replace: bool = False
    request_id: str = ""
    digest: bytes = b""
    may_outlive: bool = True


async def enrolled(
    store: Store,
    maker: FeatureMaker,
    into: Collection,
    requests: Sequence[EnrolRequest],
    deadline: float,
    event: Event,
) -> list[Enrolled | ReIDError]:
    """Enrol entries in the order of the request; each has its own outcome, and one that is answered is on disk.

    Args:
        store: of the collection.
        maker: makes their features.
        into: the collection, as it was read a moment ago.
        requests: at most ``max_batch_items``.
        deadline: in `time.monotonic` seconds.
        event: of the call, for the audit.
    """
    made = await _made(maker, into, requests, deadline)
    ready = [new for new in made if isinstance(new, Enrolment)]
    try:
        stored = iter(await store.write(audited.enrol_each, into, ready, event))
    except ReIDError as error:  # no room, or a damaged database: nothing of this was stored
        return [error if isinstance(new, Enrolment) else new for new in made]
    return [next(stored) if isinstance(new, Enrolment) else new for new in made]


async def enrolled_together(
    store: Store,
    maker: FeatureMaker,
    into: Collection,
    requests: Sequence[EnrolRequest],
    deadline: float,
    event: Event,
) -> list[Enrolled]:
    """Enrol all entries or none, in one transaction; see `enrolled`.

    Raises:
        ReIDError: of the first that cannot be enrolled; its ``item`` fact tells which.
    """
    made = await _made(maker, into, requests, deadline)
    good: list[Enrolment] = []
    for number, new in enumerate(made):
        if isinstance(new, ReIDError):
            new.facts["item"] = str(number)
            raise new
        good.append(new)
    return await store.write(audited.enrol_all, into, good, event)


async def _made(
    maker: FeatureMaker, into: Collection, requests: Sequence[EnrolRequest], deadline: float
) -> list[Enrolment | ReIDError]:
    """What is to be stored, or why it cannot be; given features are checked together, crops embedded at once."""
    given = iter(given_features([one.source for one in requests if isinstance(one.source, Given)], into))
    crops = [_embedded(maker, into, one, one.source, deadline) for one in requests if isinstance(one.source, Crops)]
    embedded = iter(await asyncio.gather(*crops))
    made: list[Enrolment | ReIDError] = []
    for one in requests:
        if isinstance(one.source, Crops):
            made.append(next(embedded))
            continue
        feature = next(given)
        made.append(feature if isinstance(feature, ReIDError) else _enrolment(one, feature, 0))
    now = now_us()
    refused = [None if one.may_outlive else outlives(into, one.entry.expire_us, now) for one in requests]
    return [error or new for error, new in zip(refused, made, strict=True)]


async def _embedded(
    maker: FeatureMaker, into: Collection, request: EnrolRequest, source: Crops, deadline: float
) -> Enrolment | ReIDError:
    try:
        made = await maker.made(into, source, deadline, every=True, priority=Priority.ENROL)
        others = await maker.others(into, source, deadline)
    except ReIDError as error:
        return error
    if made.quality < into.min_quality:
        return QualityTooLowError(
            f"quality {made.quality:.3f} is below the {into.min_quality:.3f} that collection {into.name} asks for: "
            "enrol a larger, sharper or better lit crop",
            field=source.within,
            quality=f"{made.quality:.4f}",
            min_quality=f"{into.min_quality:.4f}",
        )
    new = _enrolment(request, made.feature, made.used)
    return replace(new, entry=replace(new.entry, quality=made.quality), crops=source.images, others=others)


def _enrolment(request: EnrolRequest, feature: Feature, shots: int) -> Enrolment:
    entry = replace(request.entry, entry_id=request.entry.entry_id or uuid4().hex, shot_count=shots)
    return Enrolment(entry, feature, (), request.replace, request.request_id, request.digest)
