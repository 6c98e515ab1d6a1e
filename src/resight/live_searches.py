"""Searches that go on all the time, as a video analytics program asks them: what a cycle is shadowed and watched by."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from threading import Event, Thread
from types import TracebackType
from typing import Self

from resight.client import Client
from resight.errors import ReIDError


class LiveSearches:
    """A thread that searches a collection with some crops in turn, from its entry in a ``with`` to its exit.

    Args:
        address: of the server.
        collection: where to search.
        crops: JPEGs, one of them a search.
        per_s: searches a second at most.

    Attributes:
        answered: searches with an answer.
        errors: of those without, in words.
    """

    def __init__(self, address: str, collection: str, crops: Sequence[bytes], *, per_s: float) -> None:
        self.answered = 0
        self.errors: list[str] = []
        self._address, self._collection, self._crops, self._pause_s = address, collection, crops, 1 / per_s
        self._stop = Event()
        self._thread = Thread(target=self._search, name="live-searches")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _search(self) -> None:
        with Client(self._address) as client:
            for crop in itertools.cycle(self._crops):
                if self._stop.wait(self._pause_s):
                    return
                try:
                    client.search(self._collection, crop)
                    self.answered += 1
                except ReIDError as error:
                    self.errors.append(str(error))
