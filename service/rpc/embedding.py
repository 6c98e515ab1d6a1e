"""EmbeddingService: crops to features."""

from __future__ import annotations

from collections.abc import AsyncIterator

from google.rpc import status_pb2

from resight.errors import ReIDError
from resight.service import call_events
from resight.service.access.interceptors import Context, check_batch, deadline_of
from resight.service.inference.embedder import Embedded, Timings, require_embedded
from resight.service.inference.models import ModelHost
from resight.service.records import Space
from resight.service.rpc import convert
from resight.service.rpc.streams import item_outcome, map_as_completed
from resight.service.settings import Settings
from resight.v1 import common_pb2, embedding_pb2, embedding_pb2_grpc


class EmbeddingServicer(embedding_pb2_grpc.EmbeddingServiceServicer):
    """See embedding.proto."""

    def __init__(self, models: ModelHost, settings: Settings) -> None:
        self._models, self._settings = models, settings

    async def Embed(self, request: embedding_pb2.EmbedRequest, context: Context) -> embedding_pb2.EmbedResponse:
        """Embed one crop."""
        convert.check_id(request.image.crop_id, "image.crop_id")
        deadline = deadline_of(context, self._settings.deadline_s)
        with self._models.lease(request.model_id) as model:
            outcomes = await model.embed([request.image.data], deadline)
        (embedded,) = require_embedded(outcomes, ["image.data"])
        return embedding_pb2.EmbedResponse(
            embedding=convert.feature_message(embedded.feature, model.space),
            space=convert.space_message(model.space),
            quality=embedded.quality,
            timings=convert.timings_message(embedded.timings),
        )

    async def BatchEmbed(
        self, request: embedding_pb2.BatchEmbedRequest, context: Context
    ) -> embedding_pb2.BatchEmbedResponse:
        """Embed up to 64 crops, each with its own status."""
        check_batch(len(request.images), self._settings, "images")
        for number, image in enumerate(request.images):
            convert.check_id(image.crop_id, f"images[{number}].crop_id")
        deadline = deadline_of(context, self._settings.batch_deadline_s)
        with self._models.lease(request.model_id) as model:
            outcomes = await model.embed([image.data for image in request.images], deadline)
        results, total = [], Timings()
        for number, (image, outcome) in enumerate(zip(request.images, outcomes, strict=True)):
            if isinstance(outcome, Embedded):
                total += outcome.timings
            results.append(_result(image, outcome, model.space, f"images[{number}].data"))
        return embedding_pb2.BatchEmbedResponse(
            results=results, space=convert.space_message(model.space), timings=convert.timings_message(total)
        )

    async def StreamEmbed(
        self, request_iterator: AsyncIterator[embedding_pb2.StreamEmbedRequest], context: Context
    ) -> AsyncIterator[embedding_pb2.StreamEmbedResponse]:
        """Embed crops as they arrive; each response has its own status and the id of its request."""

        async def respond(request: embedding_pb2.StreamEmbedRequest) -> embedding_pb2.StreamEmbedResponse:
            async def work(deadline: float) -> embedding_pb2.EmbedResult:
                convert.check_id(request.image.crop_id, "image.crop_id")
                with self._models.lease() as model:
                    (outcome,) = await model.embed([request.image.data], deadline)
                return _result(request.image, outcome, model.space, "image.data")

            outcome = await item_outcome(work, context, method="StreamEmbed", limit_s=self._settings.deadline_s)
            if isinstance(outcome, status_pb2.Status):
                outcome = embedding_pb2.EmbedResult(error=outcome, crop_id=request.image.crop_id)
            return embedding_pb2.StreamEmbedResponse(request_id=request.request_id, result=outcome)

        async for response in map_as_completed(request_iterator, respond, self._settings.max_stream_items):
            yield response


def _result(
    image: common_pb2.ImageCrop, outcome: Embedded | ReIDError, space: Space, field: str
) -> embedding_pb2.EmbedResult:
    """The result of one item of a batch or stream."""
    if isinstance(outcome, ReIDError):
        return embedding_pb2.EmbedResult(error=call_events.record_error(outcome, field=field), crop_id=image.crop_id)
    feature = convert.feature_message(outcome.feature, space)
    return embedding_pb2.EmbedResult(embedding=feature, quality=outcome.quality, crop_id=image.crop_id)
