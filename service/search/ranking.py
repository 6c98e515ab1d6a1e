"""From the nearest entries to an answer: groups, re-ranking, probabilities and decisions.

Groups: the k nearest persons, tracks or cameras instead of the k nearest crops. Entries without a value are groups of
their own. Each round of searching leaves out the groups already found, so a person with a thousand crops costs one
round, not a thousand hits.

Decisions: the calibration of the collection's space turns a similarity into a probability, and thresholds on it into
match, uncertain or unknown; the collection may set its own thresholds.

Re-ranking orders the first candidates by how they lie among one another. Its scores depend on the other candidates, so
they order hits and are never compared with a threshold.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from resight.arrays import Feature, Floats
from resight.calibration import Calibration, Decision
from resight.errors import UncalibratedError
from resight.neighbours.dense_rerank import k_reciprocal_scores
from resight.service import call_events
from resight.service.records import Collection, EntryRecord, Filter, Hit
from resight.service.search.searcher import NearestQuery, Searcher, SearchOutcome

PER_GROUP = 4  # hits fetched for each group still wanted: people are enrolled with a few crops each


class GroupBy(StrEnum):
    """What makes a group; the value is the entry's field."""

    SUBJECT = "subject_id"
    TRACK = "track_id"
    CAMERA = "camera_id"

    def key_of(self, entry: EntryRecord) -> tuple[str, str]:
        """What tells an entry's group from others."""
        name = str(getattr(entry, self.value))
        return (self.value, name) if name else ("entry_id", entry.entry_id)


@dataclass
class Groups:
    """Groups in the order in which their first hits came."""

    by: GroupBy
    members: dict[tuple[str, str], list[Hit]] = field(default_factory=dict)

    def add(self, hits: Iterable[Hit]) -> None:
        """Take in hits, best first."""
        for hit in hits:
            self.members.setdefault(self.by.key_of(hit.entry), []).append(hit)

    def __len__(self) -> int:
        return len(self.members)

    def excluding_known(self, filters: Filter) -> Filter:
        """A filter that in addition leaves out every group known."""
        known: dict[str, list[str]] = {}
        for kind, name in self.members:
            known.setdefault(kind, []).append(name)
        more: dict[str, Any] = {
            f"exclude_{kind}s": (*getattr(filters, f"exclude_{kind}s"), *own) for kind, own in known.items()
        }
        return replace(filters, **more)


FLOAT32_TOLERANCE = (
    1e-6  # of a cosine: a float32's steps there are 6e-8, so nothing is cut that the exact test would keep
)


class MatchDecision(NamedTuple):
    """What a similarity is taken for; both None without a calibration.

    Attributes:
        probability: that two crops so similar show one person, at even odds.
    """

    probability: float | None
    decision: Decision | None

    def is_at_least(self, least: float | None) -> bool:
        """Whether it is as probable as asked for, in the float32 of the wire."""
        if least is None:
            return True
        return self.probability is not None and bool(np.float32(self.probability) >= np.float32(least))


NO_DECISION = MatchDecision(None, None)


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
    def for_collection(cls, collection: Collection) -> Decider:
        """With the collection's own thresholds where it has them."""
        calibration = collection.space.calibration
        if calibration is None:
            return cls(collection.name, None)
        accept = collection.accept_probability or calibration.accept
        reject = collection.reject_probability or calibration.reject
        return cls(collection.name, calibration, accept, min(reject, accept))

    def decide(self, similarities: Sequence[float]) -> list[MatchDecision]:
        """Each of some similarities, all at once: numpy's calls cost more here than the numbers do."""
        if self.calibration is None:
            return [NO_DECISION] * len(similarities)
        return [
            MatchDecision(probability, self._decision(probability))
            for probability in self.calibration.probability(similarities).tolist()
        ]

    @property
    def no_hit_decision(self) -> Decision | None:
        """What a query without a hit is taken for."""
        return None if self.calibration is None else "unknown"

    def _decision(self, probability: float) -> Decision:
        if probability >= self.accept:
            return "match"
        return "uncertain" if probability >= self.reject else "unknown"

    def least_similarity(self, probability: float | None) -> float:
        """A similarity below which none is as probable, -1..1; `MatchDecision.is_at_least` is exact where this is near.

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
        return float(np.clip(self.calibration.similarity(probability) - FLOAT32_TOLERANCE, -1.0, 1.0))


RerankMethod = Literal["k_reciprocal", "query_expansion"]

CANDIDATES, MOST = 200, 1000  # at 512-d 1.5 ms and 57 ms on one core
K1, K2, WEIGHT = 20, 6, 0.3  # Zhong et al. 2017, section 4.2, for Market-1501
JOINED, ALPHA = 5, 3.0  # fast-reid's defaults for AQE; the exponent is that of Radenović et al.


class RerankOptions(NamedTuple):
    """How candidates are ordered anew.

    Attributes:
        method: k-reciprocal neighbours, or query expansion.
        candidates: how many of the nearest take part.
        k1: neighbours that must be mutual; of query expansion the number joined with the query.
        k2: neighbours whose encodings are averaged; unused by query expansion.
        weight: of the original distance, 0..1; unused by query expansion.
        most: candidates that groups beyond the first may bring.
    """

    method: RerankMethod
    candidates: int = CANDIDATES
    k1: int = K1
    k2: int = K2
    weight: float = WEIGHT
    most: int = MOST


def rerank_scores(query: Feature, candidates: Feature, how: RerankOptions) -> Floats:
    """Score candidates anew.

    Args:
        query: float32 (D,), unit length.
        candidates: float32 (N, D), unit rows, nearest first.
        how: the method and its numbers.

    Returns:
        float32 (N,), larger is better: within 0..1 for k-reciprocal, a cosine for query expansion.
    """
    if not len(candidates):
        return np.empty(0, np.float32)
    if how.method == "query_expansion":
        return query_expansion_scores(query, candidates, joined=how.k1)
    return k_reciprocal_scores(np.concatenate((query[None], candidates)), k1=how.k1, k2=how.k2, weight=how.weight)


def query_expansion_scores(query: Feature, candidates: Feature, *, joined: int, alpha: float = ALPHA) -> Floats:
    """Alpha-weighted query expansion: similarity to the query joined with its nearest candidates.

    Radenović, Tolias and Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2019, section 3.4:
    the sum of the query and its neighbours, each weighted by its similarity to the power of alpha, at unit length.
    """
    similarity = (candidates * query).sum(axis=1)  # (N,)
    near = np.argsort(-similarity, kind="stable")[:joined]
    weights = np.clip(similarity[near], 0.0, 1.0) ** np.float32(alpha)
    total = query + (weights[:, None] * candidates[near]).sum(axis=0)  # (D,), at least as long as the query
    return np.asarray((candidates * (total / np.linalg.norm(total))).sum(axis=1), np.float32)


T = TypeVar("T")


async def gather(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What `asyncio.gather` answers. A lone one runs in its caller's task, which saves a turn of the loop."""
    return [await work[0]] if len(work) == 1 else await asyncio.gather(*work)


@dataclass(frozen=True)
class SearchParams:
    """One search.

    Attributes:
        query: ``top_k`` counts groups where there are groups.
        min_probability: of every hit; None = any.
        group_by: None = one hit per entry.
        rerank: None = by similarity.
        exact: compare every entry, whatever the index.
        with_features: hits carry theirs.
    """

    query: NearestQuery
    min_probability: float | None = None
    group_by: GroupBy | None = None
    rerank: RerankOptions | None = None
    exact: bool = False
    with_features: bool = False

    def with_feature(self, feature: Feature, *, without: str = "") -> SearchParams:
        """With its feature, float32 (D,) of unit length, and without the entry it came from."""
        filters = self.query.filters
        if without:
            filters = replace(filters, exclude_entry_ids=(without,))
        return replace(self, query=replace(self.query, feature=feature, filters=filters))

    @property
    def first_fetch(self) -> int:
        """Entries to fetch at first."""
        wanted = self.query.top_k * (PER_GROUP if self.group_by else 1)
        return wanted if self.rerank is None else max(self.query.top_k, self.rerank.candidates)


@dataclass(frozen=True)
class ScoredHit:
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

    hits: tuple[ScoredHit, ...]
    decision: Decision | None
    revision: int
    exact: bool
    search_ns: int
    rerank_ns: int = 0


async def run_search(
    searcher: Searcher, collection: Collection, wanted: Sequence[SearchParams], deadline: float
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
    decider = Decider.for_collection(collection)
    rounds = [_SearchRun(searcher, collection, one, decider, deadline) for one in wanted]
    alike: dict[tuple[bool, bool], list[_SearchRun]] = {}
    for one in rounds:
        alike.setdefault((one.with_features, one.wanted.exact), []).append(one)
    await gather([_run_first_rounds(searcher, collection, kind, ones, deadline) for kind, ones in alike.items()])
    answers = await gather([one.answer() for one in rounds])
    call_events.record_decisions([one.decision for one in answers])
    return answers


async def _run_first_rounds(
    searcher: Searcher, collection: Collection, kind: tuple[bool, bool], ones: Sequence[_SearchRun], deadline: float
) -> None:
    with_features, exact = kind
    queries = [one.query for one in ones]
    found = await searcher.search(collection, queries, with_features=with_features, exact=exact, deadline=deadline)
    for one, first in zip(ones, found, strict=True):
        one.found = [first]


class _SearchRun:
    """One search in as many rounds as its groups take."""

    def __init__(
        self, searcher: Searcher, collection: Collection, wanted: SearchParams, decider: Decider, deadline: float
    ) -> None:
        self._searcher, self._collection, self._deadline = searcher, collection, deadline
        self.wanted, self._decider = wanted, decider
        self.with_features = wanted.with_features or wanted.rerank is not None
        # Candidates to be ordered anew are cut afterwards: they tell of each other whatever their own similarity.
        least = -1.0 if wanted.rerank else max(wanted.query.min_similarity, self._least)
        self.query = replace(wanted.query, top_k=wanted.first_fetch, min_similarity=least)
        self.found: list[SearchOutcome] = []

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
            with call_events.timed_stage("rerank"):
                by = await asyncio.to_thread(_ranking_scores, self.wanted, hits)
        rerank_ns = time.perf_counter_ns() - started_ns if self.wanted.rerank else 0
        best = self._select(hits, by)
        return RankedAnswer(
            hits=tuple(best),
            decision=best[0].decision if best else self._decider.no_hit_decision,
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
            query = replace(self.query, top_k=room, filters=groups.excluding_known(self.query.filters))
            self.found += await self._searcher.search(
                self._collection,
                [query],
                with_features=self.with_features,
                exact=self.wanted.exact,
                deadline=self._deadline,
            )

    def _select(self, hits: Sequence[Hit], by: Sequence[float]) -> list[ScoredHit]:
        """The best that are similar and probable enough; of a group its best with the group's size."""
        order = np.argsort(-np.asarray(by, np.float64), kind="stable") if self.wanted.rerank else range(len(hits))
        only_looked_at = self.with_features and not self.wanted.with_features
        judgements = self._decider.decide([hit.similarity for hit in hits])
        sizes: dict[object, int] = {}
        chosen: dict[object, int] = {}
        for number in order:
            if hits[number].similarity < self.wanted.query.min_similarity or not judgements[number].is_at_least(
                self.wanted.min_probability
            ):
                continue
            group = number if self.wanted.group_by is None else self.wanted.group_by.key_of(hits[number].entry)
            sizes[group] = sizes.get(group, 0) + 1
            chosen.setdefault(group, number)
        return [
            ScoredHit(
                replace(hits[number], feature=None) if only_looked_at else hits[number],
                *judgements[number],
                float(by[number]),
                sizes[group],
            )
            for group, number in list(chosen.items())[: self.wanted.query.top_k]
        ]


def _ranking_scores(wanted: SearchParams, hits: Sequence[Hit]) -> list[float]:
    assert wanted.rerank is not None
    features = np.stack([hit.feature for hit in hits if hit.feature is not None])
    return [float(score) for score in rerank_scores(wanted.query.feature, features, wanted.rerank)]
