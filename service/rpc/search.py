"""SearchService, and the conversion of its requests and responses; every field is validated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

import numpy as np
from google.rpc import status_pb2

from resight.arrays import Feature
from resight.calibration import Decision
from resight.errors import InputError, LimitError, ReIDError
from resight.service import call_events
from resight.service.access.auth import current
from resight.service.access.interceptors import Context, check_batch, deadline_of
from resight.service.gallery import Gallery
from resight.service.inference.embedder import Timings
from resight.service.inference.features import CropSource, FeatureResult
from resight.service.jobs.shadow import ShadowManager
from resight.service.records import Collection, Space
from resight.service.rpc import convert
from resight.service.rpc.streams import item_outcome, map_as_completed
from resight.service.search.ranking import (
    DEFAULT_CANDIDATES,
    EXPANSION_NEIGHBOURS,
    K1,
    K2,
    WEIGHT,
    Decider,
    GroupBy,
    RankedResult,
    RerankMethod,
    RerankOptions,
    ScoredHit,
    SearchParams,
    gather,
)
from resight.service.search.searcher import NearestQuery
from resight.service.settings import Settings
from resight.service.storage.audit import AuditEvent
from resight.service.tenants import Tenant, Tenants
from resight.v1 import common_pb2, search_pb2, search_pb2_grpc

DEFAULT_TOP_K = 10
NO_FEATURE: Feature = np.empty(0, np.float32)
GROUPS = {
    search_pb2.GROUP_BY_UNSPECIFIED: None,
    search_pb2.GROUP_BY_SUBJECT: GroupBy.SUBJECT,
    search_pb2.GROUP_BY_TRACK: GroupBy.TRACK,
    search_pb2.GROUP_BY_CAMERA: GroupBy.CAMERA,
}
RERANK_METHODS: dict[int, RerankMethod | None] = {
    search_pb2.RERANKING_METHOD_UNSPECIFIED: None,
    search_pb2.RERANKING_METHOD_K_RECIPROCAL: "k_reciprocal",
    search_pb2.RERANKING_METHOD_QUERY_EXPANSION: "query_expansion",
}
ACCURACIES = frozenset(search_pb2.Accuracy.values())
DECISIONS: dict[Decision | None, common_pb2.Decision.ValueType] = {
    None: common_pb2.DECISION_UNSPECIFIED,
    "match": common_pb2.DECISION_MATCH,
    "uncertain": common_pb2.DECISION_UNCERTAIN,
    "unknown": common_pb2.DECISION_UNKNOWN,
}
UNKNOWN_VALUE = "unknown %s %d: see search.proto"


def search_params(request: search_pb2.SearchRequest, settings: Settings) -> SearchParams:
    """Convert and check the parameters of a search; its feature is set later.

    Raises:
        InputError: a field out of its range.
        LimitError: ``top_k`` or the number of candidates is above its limit.
    """
    top_k = request.top_k if request.HasField("top_k") else DEFAULT_TOP_K
    if not 1 <= top_k <= settings.max_top_k:
        raise LimitError(
            f"top_k is 1..{settings.max_top_k}, found {top_k}: leave it out for {DEFAULT_TOP_K}",
            field="top_k",
            max_top_k=settings.max_top_k,
        )
    min_cosine = request.min_cosine if request.HasField("min_cosine") else -1.0
    if not -1.0 <= min_cosine <= 1.0:
        raise InputError(f"min_cosine is -1..1, found {min_cosine}", field="min_cosine")
    probability = request.min_probability if request.HasField("min_probability") else None
    if probability is not None and not 0.0 <= probability <= 1.0:
        raise InputError(f"min_probability is 0..1, found {probability}", field="min_probability")
    if request.min_revision < 0:
        raise InputError(f"min_revision is 0 (none) or more, found {request.min_revision}", field="min_revision")
    if request.group_by not in GROUPS:
        raise InputError(UNKNOWN_VALUE % ("group_by", request.group_by), field="group_by")
    if request.accuracy not in ACCURACIES:
        raise InputError(UNKNOWN_VALUE % ("accuracy", request.accuracy), field="accuracy")
    return SearchParams(
        NearestQuery(NO_FEATURE, top_k, convert.to_filter(request.filter), min_cosine),
        min_probability=probability,
        group_by=GROUPS[request.group_by],
        rerank=_rerank_options(request.reranking, top_k, settings),
        exact=request.accuracy == search_pb2.ACCURACY_EXACT,
        with_features=request.include_embeddings,
    )


def _rerank_options(message: search_pb2.Reranking, top_k: int, settings: Settings) -> RerankOptions | None:
    """Convert and check the re-ranking options; None = no re-ranking."""
    if message.method not in RERANK_METHODS:
        raise InputError(UNKNOWN_VALUE % ("method", message.method), field="reranking.method")
    method = RERANK_METHODS[message.method]
    if method is None:
        return None
    limit = settings.max_rerank_candidates
    candidates = message.candidates or max(min(DEFAULT_CANDIDATES, limit), top_k)
    if not top_k <= candidates <= limit:
        raise LimitError(
            f"reranking takes {top_k} (top_k) to {limit} candidates, found {candidates}: leave it out for "
            f"{DEFAULT_CANDIDATES}",
            field="reranking.candidates",
            max_rerank_candidates=limit,
        )
    k1 = message.k1 or (EXPANSION_NEIGHBOURS if method == "query_expansion" else K1)
    k2 = message.k2 or K2
    for name, value in (("k1", k1), ("k2", k2)):
        if not 1 <= value <= limit:
            raise InputError(f"{name} is 1..{limit}, or 0 for its default; found {value}", field=f"reranking.{name}")
    weight = float(getattr(message, "lambda")) if message.HasField("lambda") else WEIGHT  # a Python keyword
    if not 0.0 <= weight <= 1.0:
        raise InputError(f"lambda is 0..1, found {weight}", field="reranking.lambda")
    return RerankOptions(method, candidates, k1, k2, weight, limit)


def score_message(similarity: float, probability: float | None) -> common_pb2.Score:
    """Convert a score."""
    return common_pb2.Score(cosine=similarity, probability=probability)


def _hit_message(scored: ScoredHit, space: Space) -> search_pb2.Hit:
    feature: Feature | None = scored.hit.feature
    return search_pb2.Hit(
        entry=convert.entry_message(scored.hit.entry),
        score=score_message(scored.hit.similarity, scored.probability),
        decision=DECISIONS[scored.decision],
        ranking_score=scored.ranking_score,
        group_size=scored.group_size,
        embedding=None if feature is None else convert.feature_message(feature, space),
    )


def search_message(result: RankedResult, space: Space, query: FeatureResult) -> search_pb2.SearchResponse:
    """Convert the result of one search."""
    return search_pb2.SearchResponse(
        hits=[_hit_message(hit, space) for hit in result.hits],
        decision=DECISIONS[result.decision],
        space=convert.space_message(space),
        searched_revision=result.revision,
        exact=result.exact,
        query_quality=query.quality,
        timings=convert.timings_message(query.timings, result.search_ns, result.rerank_ns),
        shots_used=query.used,
        shots_rejected=query.rejected,
    )


def verify_message(
    similarity: float, decider: Decider, space: Space, left: FeatureResult, right: FeatureResult
) -> search_pb2.VerifyResponse:
    """Convert the result of a verification."""
    (decided,) = decider.decide([similarity])
    return search_pb2.VerifyResponse(
        score=score_message(similarity, decided.probability),
        decision=DECISIONS[decided.decision],
        space=convert.space_message(space),
        left_quality=left.quality,
        right_quality=right.quality,
        timings=convert.timings_message(left.timings + right.timings),
    )


class _PreparedQuery(NamedTuple):
    """A search with its query feature, and the crops of the feature if it was extracted from crops."""

    params: SearchParams
    feature: FeatureResult
    crops: CropSource | None = None


class SearchServicer(search_pb2_grpc.SearchServiceServicer):
    """See search.proto."""

    def __init__(self, tenants: Tenants, settings: Settings, shadows: ShadowManager) -> None:
        self._tenants, self._settings, self._shadows = tenants, settings, shadows

    async def _tenant(self) -> Tenant:
        """The caller's tenant."""
        return await self._tenants.tenant(current().tenant)

    async def Search(self, request: search_pb2.SearchRequest, context: Context) -> search_pb2.SearchResponse:
        """Search one collection for one query."""
        deadline = deadline_of(context, self._settings.deadline_s)
        return await self._search_one(request, deadline, "Search")

    async def BatchSearch(
        self, request: search_pb2.BatchSearchRequest, context: Context
    ) -> search_pb2.BatchSearchResponse:
        """Search one collection for up to 64 queries, each with its own status."""
        check_batch(len(request.requests), self._settings, "requests")
        names = {child.collection_id for child in request.requests}
        if len(names) > 1:
            raise InputError(
                f"a batch searches one collection, found {len(names)}: send a batch for each", field="requests"
            )
        deadline = deadline_of(context, self._settings.batch_deadline_s)
        outcomes = await self._search(request.requests, deadline, "BatchSearch")
        return search_pb2.BatchSearchResponse(
            results=[
                search_pb2.SearchResult(error=call_events.record_error(outcome, field=f"requests[{number}]"))
                if isinstance(outcome, ReIDError)
                else search_pb2.SearchResult(response=outcome)
                for number, outcome in enumerate(outcomes)
            ]
        )

    async def StreamSearch(
        self, request_iterator: AsyncIterator[search_pb2.StreamSearchRequest], context: Context
    ) -> AsyncIterator[search_pb2.StreamSearchResponse]:
        """Run searches as they arrive; each response has its own status and the id of its request."""

        async def respond(request: search_pb2.StreamSearchRequest) -> search_pb2.StreamSearchResponse:
            async def work(deadline: float) -> search_pb2.SearchResponse:
                return await self._search_one(request.request, deadline, "StreamSearch")

            outcome = await item_outcome(work, context, method="StreamSearch", limit_s=self._settings.deadline_s)
            failed = isinstance(outcome, status_pb2.Status)
            result = search_pb2.SearchResult(error=outcome) if failed else search_pb2.SearchResult(response=outcome)
            return search_pb2.StreamSearchResponse(request_id=request.request_id, result=result)

        async for response in map_as_completed(request_iterator, respond, self._settings.max_stream_items):
            yield response

    async def Verify(self, request: search_pb2.VerifyRequest, context: Context) -> search_pb2.VerifyResponse:
        """Compare two sets of crops, each of one person."""
        deadline = deadline_of(context, self._settings.deadline_s)
        tenant = await self._tenant()
        gallery = tenant.gallery
        collection = await gallery.collection(request.collection_id)
        left, right = await asyncio.gather(
            gallery.extract_feature(collection, convert.to_crop_source(request.left, "left"), deadline),
            gallery.extract_feature(collection, convert.to_crop_source(request.right, "right"), deadline),
        )
        similarity = float(np.clip((left.feature * right.feature).sum(), -1.0, 1.0))
        tenant.audit.add(AuditEvent(current().name, "SearchService.Verify", collection.name))
        return verify_message(similarity, Decider.for_collection(collection), collection.space, left, right)

    async def _search_one(
        self, request: search_pb2.SearchRequest, deadline: float, method: str
    ) -> search_pb2.SearchResponse:
        (outcome,) = await self._search([request], deadline, method)
        if isinstance(outcome, ReIDError):
            raise outcome
        return outcome

    async def _search(
        self, requests: Sequence[search_pb2.SearchRequest], deadline: float, method: str
    ) -> list[search_pb2.SearchResponse | ReIDError]:
        """Run searches of one collection, each with its own outcome, and add audit events of the successful ones."""
        tenant = await self._tenant()
        gallery = tenant.gallery
        collection = await gallery.collection(requests[0].collection_id)
        prepared = await gather([self._prepare(gallery, collection, one, deadline) for one in requests])
        valid = [one for one in prepared if not isinstance(one, ReIDError)]
        found = iter(await gallery.search(collection, [one.params for one in valid], deadline) if valid else ())
        responses: list[search_pb2.SearchResponse | ReIDError] = []
        shadow = self._shadows.running_shadow(tenant, collection)
        for one in prepared:
            if isinstance(one, ReIDError):
                responses.append(one)
                continue
            result = next(found)
            if shadow is not None and one.crops is not None:
                shadow.offer(collection, one.params, one.crops, result)
            event = AuditEvent(current().name, f"SearchService.{method}", collection.name, affected=len(result.hits))
            tenant.audit.add(event)
            responses.append(search_message(result, collection.space, one.feature))
        return responses

    async def _prepare(
        self, gallery: Gallery, collection: Collection, request: search_pb2.SearchRequest, deadline: float
    ) -> _PreparedQuery | ReIDError:
        """Check a request and get its query feature; returns the error if that fails."""
        try:
            kind = request.WhichOneof("query")
            if kind is None:
                raise InputError("the query is missing: set image, shots, embedding or entry_id", field="query")
            params = search_params(request, self._settings)
            Decider.for_collection(collection).least_similarity(params.min_probability)
            if request.min_revision > collection.revision:
                await gallery.collection_at(collection.name, request.min_revision, deadline)
            if kind == "entry_id":
                _, _, feature = await gallery.entry(collection.name, request.entry_id, with_feature=True)
                assert feature is not None
                return _PreparedQuery(
                    params.with_feature(feature, exclude_entry_id=request.entry_id),
                    FeatureResult(feature, 0.0, Timings()),
                )
            source = convert.to_source(request, kind)
            result = await gallery.extract_feature(collection, source, deadline)
            return _PreparedQuery(
                params.with_feature(result.feature), result, source if isinstance(source, CropSource) else None
            )
        except ReIDError as error:
            return error
