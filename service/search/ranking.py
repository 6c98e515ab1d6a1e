"""Ranking of search results: grouping, re-ranking, probabilities and decisions.

Grouping returns the k nearest persons, tracks or cameras instead of the k nearest crops. An entry without a value is a
group of its own. Each round of search excludes the groups already found, so a person with a thousand crops costs one
more round, not a thousand hits.

The calibration of the collection's space maps a similarity to a probability, and thresholds on it decide between match,
uncertain and unknown; a collection may set its own thresholds.

Re-ranking orders the nearest candidates by their neighbourhoods. Its scores depend on the set of candidates, so they
only order hits and are never compared with a threshold.
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

PER_GROUP = 4  # hits fetched per requested group: people are enrolled with a few crops each


class GroupBy(StrEnum):
    """What hits are grouped by; the value is the name of the entry's field."""

    SUBJECT = "subject_id"
    TRACK = "track_id"
    CAMERA = "camera_id"

    def key_of(self, entry: EntryRecord) -> tuple[str, str]:
        """The key of an entry's group: (field, value)."""
        name = str(getattr(entry, self.value))
        return (self.value, name) if name else ("entry_id", entry.entry_id)


@dataclass
class Groups:
    """Groups in the order of their first hits."""

    by: GroupBy
    members: dict[tuple[str, str], list[Hit]] = field(default_factory=dict)

    def add(self, hits: Iterable[Hit]) -> None:
        """Add hits, best first."""
        for hit in hits:
            self.members.setdefault(self.by.key_of(hit.entry), []).append(hit)

    def __len__(self) -> int:
        return len(self.members)

    def excluding_known(self, filters: Filter) -> Filter:
        """A filter that also excludes all groups found so far."""
        known: dict[str, list[str]] = {}
        for kind, name in self.members:
            known.setdefault(kind, []).append(name)
        more: dict[str, Any] = {
            f"exclude_{kind}s": (*getattr(filters, f"exclude_{kind}s"), *own) for kind, own in known.items()
        }
        return replace(filters, **more)


FLOAT32_TOLERANCE = (
    1e-6  # of a cosine, where float32 steps are 6e-8: no hit is cut that the exact comparison would keep
)


class MatchDecision(NamedTuple):
    """The probability and decision for a similarity; both None without a calibration.

    Attributes:
        probability: that two crops of this similarity show the same person, at even prior odds.
    """

    probability: float | None
    decision: Decision | None

    def is_at_least(self, min_probability: float | None) -> bool:
        """Whether the probability reaches a minimum (None = any), compared as float32 like in the API."""
        if min_probability is None:
            return True
        return self.probability is not None and bool(np.float32(self.probability) >= np.float32(min_probability))


NO_DECISION = MatchDecision(None, None)


@dataclass(frozen=True)
class Decider:
    """Maps similarities to probabilities and decisions in one collection.

    Attributes:
        name: of the collection, for errors.
        calibration: of its space; None = there are no probabilities and decisions.
        accept: match at or above this probability.
        reject: unknown below this probability; at most ``accept``.
    """

    name: str
    calibration: Calibration | None
    accept: float = 0.0
    reject: float = 0.0

    @classmethod
    def for_collection(cls, collection: Collection) -> Decider:
        """The decider of a collection, with its own thresholds if it sets them."""
        calibration = collection.space.calibration
        if calibration is None:
            return cls(collection.name, None)
        accept = collection.accept_probability or calibration.accept
        reject = collection.reject_probability or calibration.reject
        return cls(collection.name, calibration, accept, min(reject, accept))

    def decide(self, similarities: Sequence[float]) -> list[MatchDecision]:
        """Decide on several similarities at once, since the overhead of numpy calls dominates."""
        if self.calibration is None:
            return [NO_DECISION] * len(similarities)
        return [
            MatchDecision(probability, self._decision(probability))
            for probability in self.calibration.probability(similarities).tolist()
        ]

    @property
    def no_hit_decision(self) -> Decision | None:
        """The decision for a query without hits."""
        return None if self.calibration is None else "unknown"

    def _decision(self, probability: float) -> Decision:
        if probability >= self.accept:
            return "match"
        return "uncertain" if probability >= self.reject else "unknown"

    def least_similarity(self, probability: float | None) -> float:
        """A lower bound, -1..1, on similarities of a probability; `MatchDecision.is_at_least` is the exact test.

        Raises:
            UncalibratedError: a probability is given, but the space has no calibration.
        """
        if probability is None:
            return -1.0
        if self.calibration is None:
            raise UncalibratedError(
                f"the space of collection {self.name} has no calibration, so min_probability cannot be used: use "
                "min_cosine, or serve a bundle that was exported with a calibration and migrate the collection",
                field="min_probability",
            )
        if not 0.0 < probability < 1.0:
            return -1.0
        return float(np.clip(self.calibration.similarity(probability) - FLOAT32_TOLERANCE, -1.0, 1.0))


RerankMethod = Literal["k_reciprocal", "query_expansion"]

DEFAULT_CANDIDATES, MAX_CANDIDATES = 200, 1000  # at 512-d 1.5 ms and 57 ms on one core
K1, K2, WEIGHT = 20, 6, 0.3  # Zhong et al. 2017, section 4.2, for Market-1501
EXPANSION_NEIGHBOURS, ALPHA = 5, 3.0  # fast-reid's defaults for AQE; the exponent is that of Radenović et al.


class RerankOptions(NamedTuple):
    """Options of re-ranking.

    Attributes:
        method: k-reciprocal neighbours or query expansion.
        candidates: number of nearest entries that are re-ranked.
        k1: size of the k-reciprocal neighbourhood; for query expansion the number of neighbours added to the query.
        k2: neighbours for local query expansion; unused by the method query expansion.
        weight: lambda, the weight of the original distance, 0..1; unused by query expansion.
        max_candidates: limit on the candidates fetched over all rounds of grouping.
    """

    method: RerankMethod
    candidates: int = DEFAULT_CANDIDATES
    k1: int = K1
    k2: int = K2
    weight: float = WEIGHT
    max_candidates: int = MAX_CANDIDATES


def rerank_scores(query: Feature, candidates: Feature, options: RerankOptions) -> Floats:
    """Re-ranking scores of candidates.

    Args:
        query: float32 (D,), unit length.
        candidates: float32 (N, D), unit rows, nearest first.
        options: the method and its parameters.

    Returns:
        float32 (N,), larger is better: within 0..1 for k-reciprocal, a cosine for query expansion.
    """
    if not len(candidates):
        return np.empty(0, np.float32)
    if options.method == "query_expansion":
        return query_expansion_scores(query, candidates, neighbours=options.k1)
    return k_reciprocal_scores(
        np.concatenate((query[None], candidates)), k1=options.k1, k2=options.k2, weight=options.weight
    )


def query_expansion_scores(query: Feature, candidates: Feature, *, neighbours: int, alpha: float = ALPHA) -> Floats:
    """Alpha-weighted query expansion: similarity to the query averaged with its nearest candidates.

    Radenović, Tolias and Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2019, section 3.4:
    the sum of the query and its neighbours, each weighted by its similarity to the power of alpha, at unit length.
    """
    similarity = (candidates * query).sum(axis=1)  # (N,)
    near = np.argsort(-similarity, kind="stable")[:neighbours]
    weights = np.clip(similarity[near], 0.0, 1.0) ** np.float32(alpha)
    total = query + (weights[:, None] * candidates[near]).sum(axis=0)  # (D,), at least as long as the query
    return np.asarray((candidates * (total / np.linalg.norm(total))).sum(axis=1), np.float32)


T = TypeVar("T")


async def gather(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """`asyncio.gather`, but a single coroutine runs in the caller's task, which saves an event loop iteration."""
    return [await coroutines[0]] if len(coroutines) == 1 else await asyncio.gather(*coroutines)


@dataclass(frozen=True)
class SearchParams:
    """Parameters of one search.

    Attributes:
        query: its ``top_k`` counts groups if ``group_by`` is set.
        min_probability: of every hit; None = any.
        group_by: None = no grouping.
        rerank: None = order by similarity.
        exact: compare with every entry, whatever the index.
        with_features: return the features of hits.
    """

    query: NearestQuery
    min_probability: float | None = None
    group_by: GroupBy | None = None
    rerank: RerankOptions | None = None
    exact: bool = False
    with_features: bool = False

    def with_feature(self, feature: Feature, *, exclude_entry_id: str = "") -> SearchParams:
        """A copy with a query feature, float32 (D,) of unit length, that excludes the entry the feature is from."""
        filters = self.query.filters
        if exclude_entry_id:
            filters = replace(filters, exclude_entry_ids=(exclude_entry_id,))
        return replace(self, query=replace(self.query, feature=feature, filters=filters))

    @property
    def first_fetch(self) -> int:
        """Entries to fetch in the first round."""
        count = self.query.top_k * (PER_GROUP if self.group_by else 1)
        return count if self.rerank is None else max(self.query.top_k, self.rerank.candidates)


@dataclass(frozen=True)
class ScoredHit:
    """A hit with its probability, decision and ranking score.

    Attributes:
        ranking_score: what hits are sorted by, larger is better: the re-ranking score, or else the similarity.
        group_size: fetched entries of its group; 1 without grouping.
    """

    hit: Hit
    probability: float | None
    decision: Decision | None
    ranking_score: float
    group_size: int = 1


@dataclass(frozen=True)
class RankedResult:
    """Hits, best first, and the decision on the best one (without hits: unknown; without a calibration: None)."""

    hits: tuple[ScoredHit, ...]
    decision: Decision | None
    revision: int
    exact: bool
    search_ns: int
    rerank_ns: int = 0


async def run_search(
    searcher: Searcher, collection: Collection, searches: Sequence[SearchParams], deadline: float
) -> list[RankedResult]:
    """Run searches of one collection; their first rounds are batched.

    Args:
        searcher: of the collection's store.
        collection: as it was just read.
        searches: at least one.
        deadline: in `time.monotonic` seconds.

    Raises:
        UncalibratedError: a search has ``min_probability``, but the space has no calibration.
        ReIDError: as `Searcher.search`.
    """
    decider = Decider.for_collection(collection)
    runs = [_SearchRun(searcher, collection, params, decider, deadline) for params in searches]
    batches: dict[tuple[bool, bool], list[_SearchRun]] = {}
    for run in runs:
        batches.setdefault((run.with_features, run.params.exact), []).append(run)
    await gather([_run_first_rounds(searcher, collection, kind, batch, deadline) for kind, batch in batches.items()])
    results = await gather([run.finish() for run in runs])
    call_events.record_decisions([one.decision for one in results])
    return results


async def _run_first_rounds(
    searcher: Searcher, collection: Collection, kind: tuple[bool, bool], runs: Sequence[_SearchRun], deadline: float
) -> None:
    with_features, exact = kind
    queries = [run.query for run in runs]
    outcomes = await searcher.search(collection, queries, with_features=with_features, exact=exact, deadline=deadline)
    for run, outcome in zip(runs, outcomes, strict=True):
        run.rounds = [outcome]


class _SearchRun:
    """One search: a first round, and further ones if grouping needs them."""

    def __init__(
        self, searcher: Searcher, collection: Collection, params: SearchParams, decider: Decider, deadline: float
    ) -> None:
        self._searcher, self._collection, self._deadline = searcher, collection, deadline
        self.params, self._decider = params, decider
        self.with_features = params.with_features or params.rerank is not None
        # Re-ranking uses all candidates, also dissimilar ones, so their similarity is checked afterwards.
        bound = self._decider.least_similarity(params.min_probability)
        min_similarity = -1.0 if params.rerank else max(params.query.min_similarity, bound)
        self.query = replace(params.query, top_k=params.first_fetch, min_similarity=min_similarity)
        self.rounds: list[SearchOutcome] = []

    async def finish(self) -> RankedResult:
        """Run the remaining rounds, then rank the hits and decide."""
        if self.params.group_by is not None:
            await self._fetch_more_groups(self.params.group_by)
        hits = [hit for one in self.rounds for hit in one.hits]
        started_ns = time.perf_counter_ns()
        scores = [hit.similarity for hit in hits]
        if self.params.rerank is not None and hits:
            with call_events.timed_stage("rerank"):
                scores = await asyncio.to_thread(_ranking_scores, self.params, hits)
        rerank_ns = time.perf_counter_ns() - started_ns if self.params.rerank else 0
        best = self._select(hits, scores)
        return RankedResult(
            hits=tuple(best),
            decision=best[0].decision if best else self._decider.no_hit_decision,
            revision=self.rounds[0].revision,
            exact=all(one.exact for one in self.rounds),
            search_ns=sum(one.search_ns for one in self.rounds),
            rerank_ns=rerank_ns,
        )

    async def _fetch_more_groups(self, by: GroupBy) -> None:
        """Search again, excluding the groups found, until there are enough groups or no more entries."""
        groups = Groups(by)
        query, fetched = self.query, 0
        while True:
            hits = self.rounds[-1].hits
            groups.add(hits)
            fetched += len(hits)
            room = self.params.query.top_k * PER_GROUP
            if self.params.rerank is not None:
                room = min(room, max(self.params.query.top_k, self.params.rerank.max_candidates) - fetched)
            if len(hits) < query.top_k or len(groups) >= self.params.query.top_k or room <= 0:
                return
            query = replace(self.query, top_k=room, filters=groups.excluding_known(self.query.filters))
            self.rounds += await self._searcher.search(
                self._collection,
                [query],
                with_features=self.with_features,
                exact=self.params.exact,
                deadline=self._deadline,
            )

    def _select(self, hits: Sequence[Hit], scores: Sequence[float]) -> list[ScoredHit]:
        """The best hits that pass both thresholds; of each group its best hit, with the size of the group."""
        order = np.argsort(-np.asarray(scores, np.float64), kind="stable") if self.params.rerank else range(len(hits))
        drop_features = self.with_features and not self.params.with_features
        decisions = self._decider.decide([hit.similarity for hit in hits])
        sizes: dict[object, int] = {}
        chosen: dict[object, int] = {}
        for number in order:
            if hits[number].similarity < self.params.query.min_similarity or not decisions[number].is_at_least(
                self.params.min_probability
            ):
                continue
            group = number if self.params.group_by is None else self.params.group_by.key_of(hits[number].entry)
            sizes[group] = sizes.get(group, 0) + 1
            chosen.setdefault(group, number)
        return [
            ScoredHit(
                replace(hits[number], feature=None) if drop_features else hits[number],
                *decisions[number],
                float(scores[number]),
                sizes[group],
            )
            for group, number in list(chosen.items())[: self.params.query.top_k]
        ]


def _ranking_scores(params: SearchParams, hits: Sequence[Hit]) -> list[float]:
    assert params.rerank is not None
    features = np.stack([hit.feature for hit in hits if hit.feature is not None])
    return [float(score) for score in rerank_scores(params.query.feature, features, params.rerank)]
