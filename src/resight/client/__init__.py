"""The Python client of a resight server. Needs no torch, faiss or onnxruntime.

    with Client("127.0.0.1:50051") as client:
        client.create_collection("lobby", ttl=timedelta(days=30))
        client.enrol("lobby", NewEntry(jpeg, camera_id="door", subject_id="anna"))
        for hit in client.search("lobby", other_jpeg).hits:
            ...

The server's errors are raised as the classes of `resight.errors`. Idempotent calls are retried while the server is
overloaded or unavailable; that includes enrolments, which carry a request id. `AsyncClient` has the same methods for
asyncio.
"""

from resight.client.async_client import AsyncClient
from resight.client.client import DEFAULT_ADDRESS as DEFAULT_ADDRESS
from resight.client.client import Client
from resight.client.requests import CollectionChange, EntryId, GivenFeature, NewEntry, Query, Rerank, Where
from resight.client.responses import (
    AuditRow,
    CollectionInfo,
    CollectionStats,
    Comparison,
    EmbeddedCrop,
    Entry,
    Erased,
    Feedback,
    KeptCrops,
    ModelInfo,
    OperationInfo,
    SearchAnswer,
    SearchFigures,
    SearchHit,
    SearchStatistics,
    ServerInfo,
    Shadow,
)

__all__ = [
    "AsyncClient",
    "AuditRow",
    "Client",
    "CollectionChange",
    "CollectionInfo",
    "CollectionStats",
    "Comparison",
    "EmbeddedCrop",
    "Entry",
    "EntryId",
    "Erased",
    "Feedback",
    "GivenFeature",
    "KeptCrops",
    "ModelInfo",
    "NewEntry",
    "OperationInfo",
    "Query",
    "Rerank",
    "SearchAnswer",
    "SearchFigures",
    "SearchHit",
    "SearchStatistics",
    "ServerInfo",
    "Shadow",
    "Where",
]
