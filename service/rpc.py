"""Servicers for embedding, searching and server info: translate, call, translate."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import grpc

from resight.errors import InputError, LimitError, ReIDError
from resight.reasons import to_status
from resight.service import translate
from resight.service.embedder import Embedded, Timings, all_embedded
from resight.service.entries import Collection
from resight.service.gallery import Gallery
from resight.service.guard import check_batch, deadline_of
from resight.service.models import ModelHost
from resight.service.searcher import Query
from resight.service.settings import Settings
from resight.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    embedding_pb2,
    embedding_pb2_grpc,
    search_pb2,
    search_pb2_grpc,
)

Context = grpc.aio.ServicerContext[Any, Any]
DEFAULT_TOP_K = 10


class EmbeddingServicer(embedding_pb2_grpc.EmbeddingServiceServicer):
    """Crops to features."""

    def __init__(self, models: ModelHost, settings: Settings) -> None:
        self._models, self._settings = models, settings

    async def Embed(self, request: embedding_pb2.EmbedRequest, context: Context) -> embedding_pb2.EmbedResponse:
        """Embed one crop."""
        deadline = deadline_of(context, self._settings.deadline_s)
        with self._models.lease(request.model_id) as model:
            outcomes = await model.embed([request.image.data], deadline)
        (embedded,) = all_embedded(outcomes, ["image.data"])
        return embedding_pb2.EmbedResponse(
            embedding=translate.feature_message(embedded.feature, model.space),
            space=translate.space_message(model.space),
            quality=embedded.quality,
            timings=translate.timings_message(embedded.timings),
        )

    async def BatchEmbed(
        self, request: embedding_pb2.BatchEmbedRequest, context: Context
    ) -> embedding_pb2.BatchEmbedResponse:
        """Embed up to 64 crops, each with its own status."""
        check_batch(len(request.images), self._settings, "images")
        deadline = deadline_of(context, self._settings.batch_deadline_s)
        with self._models.lease(request.model_id) as model:
            outcomes = await model.embed([image.data for image in request.images], deadline)
        results, total = [], Timings()
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, ReIDError):
                error = to_status(outcome, field=f"images[{number}].data")
                results.append(embedding_pb2.EmbedResult(error=error))
                continue
            total += outcome.timings
            feature = translate.feature_message(outcome.feature, model.space)
            results.append(embedding_pb2.EmbedResult(embedding=feature, quality=outcome.quality))
        return embedding_pb2.BatchEmbedResponse(
            results=results, space=translate.space_message(model.space), timings=translate.timings_message(total)
        )


class SearchServicer(search_pb2_grpc.SearchServiceServicer):
    """Crops, features and entries to the entries nearest to them."""

    def __init__(self, gallery: Gallery, settings: Settings) -> None:
        self._gallery, self._settings = gallery, settings

    async def Search(self, request: search_pb2.SearchRequest, context: Context) -> search_pb2.SearchResponse:
        """Search one collection for one query."""
        deadline = deadline_of(context, self._settings.deadline_s)
        (answer,) = await self._answers(request.collection_id, [request], deadline)
        if isinstance(answer, ReIDError):
            raise answer
        return answer

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
        answers = await self._answers(names.pop(), request.requests, deadline)
        return search_pb2.BatchSearchResponse(
            results=[
                search_pb2.SearchResult(error=to_status(answer, field=f"requests[{number}]"))
                if isinstance(answer, ReIDError)
                else search_pb2.SearchResult(response=answer)
                for number, answer in enumerate(answers)
            ]
        )

    async def _answers(
        self, name: str, requests: Sequence[search_pb2.SearchRequest], deadline: float
    ) -> list[search_pb2.SearchResponse | ReIDError]:
        """Answer queries of one collection; those that want features of the hits are searched apart."""
        collection = await self._gallery.collection(name)
        prepared = await asyncio.gather(*(self._prepare(collection, request, deadline) for request in requests))
        answers: list[search_pb2.SearchResponse | ReIDError | None] = [None] * len(requests)
        for with_features in (False, True):
            numbers, queries, sources = [], [], []
            for number, (request, outcome) in enumerate(zip(requests, prepared, strict=True)):
                if isinstance(outcome, ReIDError):
                    answers[number] = outcome
                elif request.include_embeddings == with_features:
                    numbers.append(number)
                    queries.append(outcome[0])
                    sources.append(outcome[1])
            if not queries:
                continue
            found = await self._gallery.searcher.search(
                collection, queries, with_features=with_features, deadline=deadline
            )
            for number, source, result in zip(numbers, sources, found, strict=True):
                answers[number] = translate.search_message(
                    result, collection.space, quality=source.quality, timings=source.timings
                )
        return [answer for answer in answers if answer is not None]

    async def _prepare(
        self, collection: Collection, request: search_pb2.SearchRequest, deadline: float
    ) -> tuple[Query, Embedded] | ReIDError:
        """The query of a request, with what it was made from."""
        try:
            kind = request.WhichOneof("query")
            if kind is None:
                raise InputError("nothing to search for: set image, shots, embedding or entry_id", field="query")
            top_k = request.top_k if request.HasField("top_k") else DEFAULT_TOP_K
            if not 1 <= top_k <= self._settings.max_top_k:
                raise LimitError(
                    f"top_k is 1..{self._settings.max_top_k}, found {top_k}: leave it out for {DEFAULT_TOP_K}",
                    field="top_k",
                    max_top_k=self._settings.max_top_k,
                )
            filters = translate.filters(request.filter)
            least = request.min_cosine if request.HasField("min_cosine") else -1.0
            if not -1.0 <= least <= 1.0:
                raise InputError(f"min_cosine is -1..1, found {least}", field="min_cosine")
            if kind == "entry_id":
                _, _, feature = await self._gallery.entry(collection.name, request.entry_id, with_feature=True)
                assert feature is not None
                made = Embedded(feature, 0.0, Timings())
                filters = replace(filters, exclude_entry_ids=(request.entry_id,))
            else:
                made = await self._gallery.feature(collection, translate.source(request, kind), deadline)
        except ReIDError as error:
            return error
        return Query(made.feature, top_k, filters, least), made


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """What this server is and accepts."""

    def __init__(self, models: ModelHost, settings: Settings) -> None:
        self._models, self._settings = models, settings

    async def GetServerInfo(
        self, request: admin_pb2.GetServerInfoRequest, context: Context
    ) -> admin_pb2.GetServerInfoResponse:
        """Version, served model and limits."""
        own = self._settings
        limits = admin_pb2.Limits(
            max_message_bytes=own.max_message_bytes,
            max_image_bytes=own.max_image_bytes,
            max_image_pixels=own.max_image_pixels,
            max_batch_items=own.max_batch_items,
            max_shots=own.max_shots,
            max_top_k=own.max_top_k,
            max_queue_items=own.max_queue,
        )
        return admin_pb2.GetServerInfoResponse(
            server_version=version("resight"),
            active_space=translate.space_message(self._models.active.space),
            limits=limits,
            provider=self._models.active.provider,
        )
