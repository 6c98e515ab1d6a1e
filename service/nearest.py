"""The nearest entries of some queries, by whatever index a collection has, each hit checked against the store.

Searches whose filter leaves few entries are exact. The others look at more candidates than asked for, since a
filter that only leaves some out passes most of what is near, and search exactly when too few pass.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resight.service import reads
from resight.service.candidates import Near
from resight.service.entries import Entry, Filter, Hit
from resight.service.indexes import Held
from resight.service.ladder import Ladder
from resight.service.runtime import Feature

OVERFETCH, SPARE = 3, 8
SAMPLED = 10  # the recall that is watched is at ten


@dataclass(frozen=True)
class Query:
    """What is searched for: float32 (D,) of unit length; ``min_similarity`` -1..1."""

    feature: Feature
    top_k: int
    filters: Filter
    min_similarity: float = -1.0


@dataclass(frozen=True)
class Answer:
    """Hits of one query, best first, and whether none can be missing."""

    hits: tuple[Hit, ...]
    exact: bool


class Nearest:
    """One collection's index for the time of one search, in the thread that owns it.

    Args:
        connection: of that thread.
        held: the index, with everything committed.
        ladder: says how few candidates are searched exactly.
        exact: every search is, whatever the index.
    """

    def __init__(self, connection: sqlite3.Connection, held: Held, ladder: Ladder, *, exact: bool) -> None:
        self._connection, self._held, self._ladder = connection, held, ladder
        self._exact = exact or not held.index.approximate

    def answers(self, queries: Sequence[Query], *, with_features: bool) -> list[Answer]:
        """Hits of each query; those that look at the same entries are searched together."""
        out: list[Answer | None] = [None] * len(queries)
        open_ones: dict[int, list[int]] = {}  # queries of any filter share one scan, if they want about as many
        chosen: dict[Filter, list[int]] = {}
        for number, query in enumerate(queries):
            if query.filters.selective:
                chosen.setdefault(query.filters, []).append(number)
            else:
                open_ones.setdefault(query.top_k.bit_length(), []).append(number)
        for filters, numbers in chosen.items():
            few = self._ladder.few(len(self._held.index))
            among = self._held.feed.passing(filters, few)
            if among is None:
                open_ones.setdefault(max(queries[number].top_k for number in numbers).bit_length(), []).extend(numbers)
                continue
            for number, answer in self._among(queries, numbers, filters, among, with_features).items():
                out[number] = answer
        for numbers in open_ones.values():
            for number, answer in self._open(queries, numbers, with_features).items():
                out[number] = answer
        return [answer for answer in out if answer is not None]

    def _among(
        self, queries: Sequence[Query], numbers: Sequence[int], filters: Filter, among: reads.Keys, with_features: bool
    ) -> dict[int, Answer]:
        """Exactly, among the keys that passed a moment ago."""
        k = max(queries[number].top_k for number in numbers) + SPARE
        near = self._held.index.search(np.stack([queries[n].feature for n in numbers]), k, among=among)
        living = self._confirmed(near, filters)
        return {
            number: Answer(self._hits(one, living, queries[number], with_features), True)
            for number, one in zip(numbers, near, strict=True)
        }

    def _open(self, queries: Sequence[Query], numbers: Sequence[int], with_features: bool) -> dict[int, Answer]:
        """Among all, and then filtered."""
        plain = all(queries[number].filters == Filter() for number in numbers)
        k = max(queries[number].top_k for number in numbers)
        fetch = k + SPARE if plain else OVERFETCH * k + SPARE
        features = np.stack([queries[number].feature for number in numbers])
        near = self._held.index.search(features, fetch, exact=self._exact)
        if not self._exact:
            self._sample(features[:1])
        groups: dict[Filter, list[int]] = {}
        for place, number in enumerate(numbers):
            groups.setdefault(queries[number].filters, []).append(place)
        out: dict[int, Answer] = {}
        for filters, places in groups.items():
            living = self._confirmed([near[place] for place in places], filters)
            short = []
            for place in places:
                number, (keys, _) = numbers[place], near[place]
                passed = sum(int(key) in living for key in keys)
                if passed < queries[number].top_k and (len(keys) >= fetch or not self._exact):
                    short.append(number)
                else:
                    hits = self._hits(near[place], living, queries[number], with_features)
                    out[number] = Answer(hits, self._exact)
            if short:
                among = reads.candidates(self._connection, self._held.feed.collection.key, filters)
                out.update(self._among(queries, short, filters, among, with_features))
        return out

    def _confirmed(self, near: Sequence[Near], filters: Filter) -> dict[int, Entry]:
        keys = np.unique(np.concatenate([keys for keys, _ in near]))
        return reads.confirmed(self._connection, self._held.feed.collection.key, keys, filters)

    def _hits(self, near: Near, living: dict[int, Entry], query: Query, with_features: bool) -> tuple[Hit, ...]:
        kept = [
            (int(key), float(similarity))
            for key, similarity in zip(*near, strict=True)
            if int(key) in living and similarity >= query.min_similarity
        ][: query.top_k]
        if not with_features:
            return tuple(Hit(living[key], similarity) for key, similarity in kept)
        keys, vectors = self._held.index.vectors(np.sort(np.array([key for key, _ in kept], np.int64)))
        told = dict(zip(keys.tolist(), vectors, strict=True))
        return tuple(Hit(living[key], similarity, told[key]) for key, similarity in kept if key in told)

    def _sample(self, query: Feature) -> None:
        """Repeat one in so many approximate searches exactly, to know what they miss."""
        recall, index = self._held.recall, self._held.index
        recall.searches += 1
        if self._ladder.sample and (recall.searches - 1) % self._ladder.sample == 0:
            ((true, _),), ((found, _),) = index.search(query, SAMPLED, exact=True), index.search(query, SAMPLED)
            recall.add(len(np.intersect1d(true, found)), len(true))
