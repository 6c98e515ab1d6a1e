"""What leaves the disk by itself: expired entries, old requests, audit and figures, spaces given up, the erased.

It looks at the database alone, so it runs for every tenant, whether anybody uses the gallery or not, and whatever else
is switched off. Answers leave expired entries out from the instant they expire; this is about the disk.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from resight.service import audit, reads, search_counts, spaces, writes
from resight.service.cleansing import cleanse
from resight.service.entries import now_us
from resight.service.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """How long is kept what nobody needs any more, in seconds.

    Attributes:
        audit_s: rows of the audit; a day at least.
        space_s: features of a space that another one has taken the place of, for the way back.
    """

    audit_s: float
    space_s: float


async def purge(store: Store, kept: Kept, *, taken_in: Sequence[tuple[int, int]] = ()) -> None:
    """Remove what has had its time; each step by itself, and in parts, so that enrolments do not wait.

    Args:
        store: whose.
        kept: how long.
        taken_in: (collection key, revision) that indexes have reached: the change log up to there goes.

    Raises:
        StorageFullError: the disk takes nothing, not even a deletion.
        StoreError: the database is damaged.
    """
    while await store.read(reads.any_expired):
        await store.erase(writes.purge)
    retired_us = now_us() - int(kept.space_s * 1e6)
    for name, space_id in await store.read(spaces.retired_before, retired_us):
        dropped = await store.erase(spaces.drop_retired, name, space_id, retired_us)
        log.info("space dropped collection=%s space=%s features=%d", name, space_id, dropped)
    await audit.purge_older(store, kept.audit_s)
    await store.book(search_counts.purge)
    await store.book(writes.forget, taken_in)
    await cleanse(store)
