"""The two streams of the API: what is sent for each item, and what is made of each answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from resight import replies
from resight.answers import SearchAnswer
from resight.calls import outcome
from resight.errors import ReIDError
from resight.questions import Feature, Query
from resight.v1 import common_pb2, embedding_pb2, search_pb2

Item = TypeVar("Item")
Made = TypeVar("Made")


class Stream(NamedTuple, Generic[Item, Made]):
    """One stream: its method, an item's request by number, and an answer's number and outcome."""

    method: str
    request: Callable[[int, Item], Any]
    outcome: Callable[[Any], tuple[int, Made | ReIDError]]


def embedding() -> Stream[bytes, Feature]:
    """Crops to features."""
    return Stream(
        "embedding.StreamEmbed",
        lambda number, image: embedding_pb2.StreamEmbedRequest(
            request_id=str(number), image=common_pb2.ImageCrop(data=image)
        ),
        lambda reply: (int(reply.request_id), outcome(reply.result, "embedding", replies.feature)),
    )


def searching(collection: str) -> Stream[Query, SearchAnswer]:
    """Queries of one collection to answers."""
    return Stream(
        "search.StreamSearch",
        lambda number, query: search_pb2.StreamSearchRequest(request_id=str(number), request=query.message(collection)),
        lambda reply: (int(reply.request_id), outcome(reply.result, "response", replies.search_answer)),
    )
