"""The servicer of searches: translate, call, translate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import grpc
import numpy as np
from google.rpc import status_pb2

from resight.errors import InputError, ReIDError
from resight.service import translate, watch
from resight.service.audit import Event
from resight.service.auth import current
from resight.service.decide import Decider
from resight.service.embedder import Timings
from resight.service.entries import Collection
from resight.service.features import Crops, Made
from resight.service.gallery import Gallery
from resight.service.guard import check_batch, deadline_of
from resight.service.ranked import Wanted
from resight.service.rpc_stream import as_ready, outcome
from resight.service.settings import Settings
from resight.service.shadows import Shadows
from resight.service.tenants import Tenant, Tenants
from resight.service.together import together
from resight.service.translate_search import search_message, verify_message, wanted
from resight.v1 import search_pb2, search_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class _Prepared(NamedTuple):
    """A query with its feature, what that was made from, and the crops, if it was crops."""

    wanted: Wanted
    made: Made
    crops: Crops | None = None


class SearchServicer(search_pb2_grpc.SearchServiceServicer):
    """Crops, tracks, features and entries to the entries nearest to them."""

    def __init__(self, tenants: Tenants, settings: Settings, shadows: Shadows) -> None:
        self._tenants, self._settings, self._shadows = tenants, settings, shadows

    async def _own(self) -> Tenant:
        """The caller's own."""
        return await self._tenants.tenant(current().tenant)

    async def Search(self, request: search_pb2.SearchRequest, context: Context) -> search_pb2.SearchResponse:
        """Search one collection for one query."""
        deadline = deadline_of(context, self._settings.deadline_s)
        return await self._one(request, deadline, "Search")

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
        answers = await self._answers(request.requests, deadline, "BatchSearch")
        return search_pb2.BatchSearchResponse(
            results=[
                search_pb2.SearchResult(error=watch.told(answer, field=f"requests[{number}]"))
                if isinstance(answer, ReIDError)
                else search_pb2.SearchResult(response=answer)
                for number, answer in enumerate(answers)
            ]
        )

    async def StreamSearch(
        self, request_iterator: AsyncIterator[search_pb2.StreamSearchRequest], context: Context
    ) -> AsyncIterator[search_pb2.StreamSearchResponse]:
        """Search as queries come; each answer has its own status and its request's id."""

        async def answer(request: search_pb2.StreamSearchRequest) -> search_pb2.StreamSearchResponse:
            async def work(deadline: float) -> search_pb2.SearchResponse:
                return await self._one(request.request, deadline, "StreamSearch")

            made = await outcome(work, context, method="StreamSearch", limit_s=self._settings.deadline_s)
            failed = isinstance(made, status_pb2.Status)
            result = search_pb2.SearchResult(error=made) if failed else search_pb2.SearchResult(response=made)
            return search_pb2.StreamSearchResponse(request_id=request.request_id, result=result)

        async for one in as_ready(request_iterator, answer, self._settings.max_stream_items):
            yield one

    async def Verify(self, request: search_pb2.VerifyRequest, context: Context) -> search_pb2.VerifyResponse:
        """Compare two sets of crops, each of one person."""
        deadline = deadline_of(context, self._settings.deadline_s)
        tenant = await self._own()
        gallery = tenant.gallery
        collection = await gallery.collection(request.collection_id)
        left, right = await asyncio.gather(
            gallery.feature(collection, translate.shots(request.left, "left"), deadline),
            gallery.feature(collection, translate.shots(request.right, "right"), deadline),
        )
        similarity = float(np.clip((left.feature * right.feature).sum(), -1.0, 1.0))
        tenant.audit.note(Event(current().name, "SearchService.Verify", collection.name))
        return verify_message(similarity, Decider.of(collection), collection.space, left, right)

    async def _one(self, request: search_pb2.SearchRequest, deadline: float, method: str) -> search_pb2.SearchResponse:
        (answer,) = await self._answers([request], deadline, method)
        if isinstance(answer, ReIDError):
            raise answer
        return answer

    async def _answers(
        self, requests: Sequence[search_pb2.SearchRequest], deadline: float, method: str
    ) -> list[search_pb2.SearchResponse | ReIDError]:
        """Answer queries of one collection, and tell the audit of those that were."""
        tenant = await self._own()
        gallery = tenant.gallery
        collection = await gallery.collection(requests[0].collection_id)
        prepared = await together([self._prepared(gallery, collection, one, deadline) for one in requests])
        good = [one for one in prepared if not isinstance(one, ReIDError)]
        found = iter(await gallery.search(collection, [one.wanted for one in good], deadline) if good else ())
        answers: list[search_pb2.SearchResponse | ReIDError] = []
        shadow = self._shadows.of(tenant, collection)
        for one in prepared:
            if isinstance(one, ReIDError):
                answers.append(one)
                continue
            answer = next(found)
            if shadow is not None and one.crops is not None:
                shadow.offer(collection, one.wanted, one.crops, answer)
            event = Event(current().name, f"SearchService.{method}", collection.name, affected=len(answer.hits))
            tenant.audit.note(event)
            answers.append(search_message(answer, collection.space, one.made))
        return answers

    async def _prepared(
        self, gallery: Gallery, collection: Collection, request: search_pb2.SearchRequest, deadline: float
    ) -> _Prepared | ReIDError:
        """What a request asks, with its feature."""
        try:
            kind = request.WhichOneof("query")
            if kind is None:
                raise InputError("nothing to search for: set image, shots, embedding or entry_id", field="query")
            asked = wanted(request, self._settings)
            Decider.of(collection).least_similarity(asked.min_probability)
            if request.min_revision > collection.revision:
                await gallery.collection_at(collection.name, request.min_revision, deadline)
            if kind == "entry_id":
                _, _, feature = await gallery.entry(collection.name, request.entry_id, with_feature=True)
                assert feature is not None
                return _Prepared(asked.of(feature, without=request.entry_id), Made(feature, 0.0, Timings()))
            source = translate.source(request, kind)
            made = await gallery.feature(collection, source, deadline)
            return _Prepared(asked.of(made.feature), made, source if isinstance(source, Crops) else None)
        except ReIDError as error:
            return error
