"""From the nearest entries to an answer one can act on: groups, a new order, probabilities and decisions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from resight.calibration import Decision
from resight.service import watch
from resight.service.decide import Decider
from resight.service.entries import Collection, Hit
from resight.service.grouping import PER_GROUP, GroupBy, Groups
from resight.service.rerank import Rerank, scores
from resight.service.runtime import Feature
from resight.service.searcher import Found, Query, Searcher
from resight.service.together import together


@dataclass(frozen=True)
class Wanted:
    """One search.

    Attributes:
        query: ``top_k`` counts groups where there are groups.
        min_probability: of every hit; None = any.
        group_by: None = one hit per entry.
        rerank: None = by similarity.
        exact: compare every entry, whatever the index.
        with_features: hits carry theirs.
    """

    query: Query
    min_probability: float | None = None
    group_by: GroupBy | None = None
    rerank: Rerank | None = None
    exact: bool = False
    with_features: bool = False

    def of(self, feature: Feature, *, without: str = "") -> Wanted:
        """With its feature, float32 (D,) of unit length, and without the entry it came from."""
        filters = self.query.filters
        if without:
            filters = replace(filters, exclude_entry_ids=(without,))
        return replace(self, query=replace(self.query, feature=feature, filters=filters))

    @property
    def first(self) -> int:
        """Entries to fetch at first."""
        wanted = self.query.top_k * (PER_GROUP if self.group_by else 1)
        return wanted if self.rerank is None else max(self.query.top_k, self.rerank.candidates)


@dataclass(frozen=True)
class Ranked:
    """A hit, judged.

    Attributes:
        ranking_score: what the hits are ordered by, larger is better: after re-ranking its score, else the similarity.
        group_size: entries of its group among those looked at; 1 without groups.
    """

    hit: Hit
    probability: float | None
    decision: Decision | None
    ranking_score: float
    group_size: int = 1


@dataclass(frozen=True)
class RankedAnswer:
    """Hits, best first. ``decision``: of the best hit, unknown without one; None where the space has no calibration."""

    hits: tuple[Ranked, ...]
    decision: Decision | None
    revision: int
    exact: bool
    search_ns: int
    rerank_ns: int = 0


async def ranked(
    searcher: Searcher, collection: Collection, wanted: Sequence[Wanted], deadline: float
) -> list[RankedAnswer]:
    """Answer searches of one collection; their first rounds run together.

    Args:
        searcher: of the collection's store.
        collection: as it was read a moment ago.
        wanted: at least one.
        deadline: in `time.monotonic` seconds.

    Raises:
        UncalibratedError: a probability is asked of a space that knows none.
        ReIDError: as `Searcher.search`.
    """
    decider = Decider.of(collection)
    rounds = [_Rounds(searcher, collection, one, decider, deadline) for one in wanted]
    alike: dict[tuple[bool, bool], list[_Rounds]] = {}
    for one in rounds:
        alike.setdefault((one.with_features, one.wanted.exact), []).append(one)
    await together([_first(searcher, collection, kind, ones, deadline) for kind, ones in alike.items()])
    answers = await together([one.answer() for one in rounds])
    watch.searched([one.decision for one in answers])
    return answers


async def _first(
    searcher: Searcher, collection: Collection, kind: tuple[bool, bool], ones: Sequence[_Rounds], deadline: float
) -> None:
    with_features, exact = kind
    queries = [one.query for one in ones]
    found = await searcher.search(collection, queries, with_features=with_features, exact=exact, deadline=deadline)
    for one, first in zip(ones, found, strict=True):
        one.found = [first]


class _Rounds:
    """One search in as many rounds as its groups take."""

    def __init__(
        self, searcher: Searcher, collection: Collection, wanted: Wanted, decider: Decider, deadline: float
    ) -> None:
        self._searcher, self._collection, self._deadline = searcher, collection, deadline
        self.wanted, self._decider = wanted, decider
        self.with_features = wanted.with_features or wanted.rerank is not None
        # Candidates to be ordered anew are cut afterwards: they tell of each other whatever their own similarity.
        least = -1.0 if wanted.rerank else max(wanted.query.min_similarity, self._least)
        self.query = replace(wanted.query, top_k=wanted.first, min_similarity=least)
        self.found: list[Found] = []

    @property
    def _least(self) -> float:
        return self._decider.least_similarity(self.wanted.min_probability)

    async def answer(self) -> RankedAnswer:
        """All rounds, then order, cut and judge."""
        if self.wanted.group_by is not None:
            await self._more_groups(self.wanted.group_by)
        hits = [hit for found in self.found for hit in found.hits]
        started_ns = time.perf_counter_ns()
        by = [hit.similarity for hit in hits]
        if self.wanted.rerank is not None and hits:
            with watch.timed("rerank"):
                by = await asyncio.to_thread(_scored, self.wanted, hits)
        rerank_ns = time.perf_counter_ns() - started_ns if self.wanted.rerank else 0
        best = self._judged(hits, by)
        return RankedAnswer(
            hits=tuple(best),
            decision=best[0].decision if best else self._decider.nothing,
            revision=self.found[0].revision,
            exact=all(found.exact for found in self.found),
            search_ns=sum(found.search_ns for found in self.found),
            rerank_ns=rerank_ns,
        )

    async def _more_groups(self, by: GroupBy) -> None:
        """Look beyond the groups found until there are enough, or no more entries."""
        groups = Groups(by)
        query, held = self.query, 0
        while True:
            hits = self.found[-1].hits
            groups.add(hits)
            held += len(hits)
            room = self.wanted.query.top_k * PER_GROUP
            if self.wanted.rerank is not None:
                room = min(room, max(self.wanted.query.top_k, self.wanted.rerank.most) - held)
            if len(hits) < query.top_k or len(groups) >= self.wanted.query.top_k or room <= 0:
                return
            query = replace(self.query, top_k=room, filters=groups.beyond(self.query.filters))
            self.found += await self._searcher.search(
                self._collection,
                [query],
                with_features=self.with_features,
                exact=self.wanted.exact,
                deadline=self._deadline,
            )

    def _judged(self, hits: Sequence[Hit], by: Sequence[float]) -> list[Ranked]:
        """The best that are similar and probable enough; of a group its best with the group's size."""
        order = np.argsort(-np.asarray(by, np.float64), kind="stable") if self.wanted.rerank else range(len(hits))
        only_looked_at = self.with_features and not self.wanted.with_features
        judgements = self._decider.judged([hit.similarity for hit in hits])
        sizes: dict[object, int] = {}
        chosen: dict[object, int] = {}
        for number in order:
            if hits[number].similarity < self.wanted.query.min_similarity or not judgements[number].reaches(
                self.wanted.min_probability
            ):
                continue
            group = number if self.wanted.group_by is None else self.wanted.group_by.of(hits[number].entry)
            sizes[group] = sizes.get(group, 0) + 1
            chosen.setdefault(group, number)
        return [
            Ranked(
                replace(hits[number], feature=None) if only_looked_at else hits[number],
                *judgements[number],
                float(by[number]),
                sizes[group],
            )
            for group, number in list(chosen.items())[: self.wanted.query.top_k]
        ]


def _scored(wanted: Wanted, hits: Sequence[Hit]) -> list[float]:
    assert wanted.rerank is not None
    features = np.stack([hit.feature for hit in hits if hit.feature is not None])
    return [float(score) for score in scores(wanted.query.feature, features, wanted.rerank)]
