"""What searches came to: decisions and best hits of each collection and space, counted by the minute.

Gathered in memory and written every `FLUSH_S` and at the end of the server, so that a restart loses nothing and a kill
at most the last minute. Nothing of a query, an entry or a person is kept. A space's first best hits stay beside it, as
what later ones are compared with (`resight.service.search_counts`), for as long as the collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from resight.errors import ReIDError
from resight.service import search_counts
from resight.service.entries import Collection, now_us
from resight.service.ranked import RankedAnswer
from resight.service.search_counts import MINUTE_US, Counted, Place, Told, Window
from resight.service.store import Store

log = logging.getLogger(__name__)

FLUSH_S = 60.0
WAITING = 10_000  # minutes that wait for a disk that takes nothing: a week of one collection, 10 MB


class SearchFigures:
    """The figures of one gallery. Used in the event loop's thread; `start` and `stop` it there."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: dict[tuple[Place, int], Counted] = {}
        self._drifts: dict[Place, tuple[float, float]] = {}
        self._turn = asyncio.Lock()
        self._flushing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to write what `note` gathers."""
        self._flushing = asyncio.create_task(self._flush_forever(), name="search-figures")

    async def stop(self) -> None:
        """Write what waits; the store must still be open."""
        if self._flushing is not None:
            self._flushing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._flushing
        await self.flush()

    def note(self, collection: Collection, answers: Sequence[RankedAnswer]) -> None:
        """Count searches of a collection that were answered a moment ago."""
        at_us = now_us()
        place = (collection.key, collection.space.space_id), at_us // MINUTE_US
        counted = self._waiting.setdefault(place, Counted())
        for answer in answers:
            counted.add(answer, at_us)

    def drift(self, collection: Collection) -> tuple[float, float] | None:
        """Index and shift of late best hits in the collection's space, as of the last flush; None before `ENOUGH`."""
        return self._drifts.get((collection.key, collection.space.space_id))

    async def flush(self) -> None:
        """Write what waits; if the disk refuses, it goes on waiting. A caller who leaves does not stop it."""
        await asyncio.shield(self._flush())

    async def _flush(self) -> None:
        async with self._turn:
            taken, self._waiting = self._waiting, {}
            if taken:
                await self._write(taken)

    async def _write(self, taken: dict[tuple[Place, int], Counted]) -> None:
        try:
            self._drifts |= await self._store.book(search_counts.written, taken)
        except ReIDError as error:
            log.error("the figures of %d minutes of searches wait: %s", len(taken), error)
            for place, later in self._waiting.items():
                taken[place] = taken[place] + later if place in taken else later
            self._waiting = dict(list(taken.items())[-WAITING:])

    async def told(
        self,
        collection: Collection,
        *,
        window: Window = (None, None),
        space_id: str = "",
        reference: Window | None = None,
    ) -> list[Told]:
        """What searches of a collection came to in each space, by the first one.

        Args:
            collection: whose.
            window: begin and end, microseconds; widened to whole minutes.
            space_id: of one space; empty = of all.
            reference: another window; None = the space's first best hits.
        """
        await self.flush()
        return await self._store.read(search_counts.told, collection.key, window, space_id, reference)

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            await self.flush()
