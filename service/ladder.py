"""Which index a collection gets, by its size, and when it is built anew."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from resight.service.candidates import VectorIndex
from resight.service.index_gpu import Device
from resight.service.settings import Settings

Kind = Literal["flat", "flat-fp16", "hnsw"]

TOMBSTONES = 0.2  # of all rows; a graph full of holes loses recall, and memory is wasted
MIN_DEAD = 1000  # fewer are not worth a rebuild
SHRUNK = 0.5  # a collection goes down the ladder at half the size at which it came up, so it does not swing
EXACT_CANDIDATES, EXACT_SHARE = 40_000, 0.15  # so few are searched exactly (Weaviate's flatSearchCutoff)


@dataclass(frozen=True)
class Ladder:
    """The rules. Sizes are entries.

    Attributes:
        kind: what every collection gets, or ``auto`` by size.
        flat_max: up to here float32 rows are scanned.
        half_max: up to here float16 rows are scanned; above, a graph is walked.
        tail_max: a graph with so many entries beside it is built anew.
        min_recall: at 10, below which a graph does not go live.
        sample: one in so many approximate searches is repeated exactly.
        folder: where graphs are kept; None = nowhere.
        device: where float16 rows are scanned; ``auto`` = on a GPU when faiss sees one.
        milvus: its address, and then every collection is there; empty = indexes are our own.
        token: Milvus asks for.
    """

    kind: Literal["auto", "flat", "flat-fp16", "hnsw"] = "auto"
    flat_max: int = 100_000
    half_max: int = 1_000_000
    tail_max: int = 50_000
    min_recall: float = 0.95
    sample: int = 1000
    folder: Path | None = None
    device: Device = "auto"
    milvus: str = ""
    token: str = field(default="", repr=False)

    def wanted(self, count: int, *, held: str = "", asked: str = "") -> Kind:
        """The kind for ``count`` entries.

        Args:
            count: of the collection.
            held: what it has, which it keeps while it is not much too large.
            asked: by an operator for this collection; empty or ``auto`` = by the rules.
        """
        chosen = asked if asked not in ("", "auto") else self.kind
        if chosen != "auto":
            return cast(Kind, chosen)
        if count > self.half_max or (held == "hnsw" and count > SHRUNK * self.half_max):
            return "hnsw"
        if count > self.flat_max or (held in ("hnsw", "flat-fp16") and count > SHRUNK * self.flat_max):
            return "flat-fp16"
        return "flat"

    def worn(self, index: VectorIndex) -> str:
        """Why an index should be built anew in its own kind; empty = it is fine."""
        if index.tombstones > max(MIN_DEAD, TOMBSTONES * (len(index) + index.tombstones)):
            return f"{index.tombstones} tombstones"
        if index.tail > self.tail_max:
            return f"{index.tail} entries beside the graph"
        return ""

    def few(self, count: int) -> int:
        """Of ``count`` entries, so many or fewer candidates are searched exactly."""
        return max(EXACT_CANDIDATES, int(EXACT_SHARE * count))


def ladder_of(settings: Settings, folder: Path) -> Ladder:
    """The rules a server was told; graphs are kept beside the database in ``folder``."""
    return Ladder(
        kind=settings.index_type,
        flat_max=settings.index_flat_max,
        half_max=settings.index_half_max,
        tail_max=settings.index_tail_max,
        sample=settings.index_sample,
        folder=folder,
        device=settings.index_device,
        milvus="" if settings.gallery == "embedded" else settings.gallery,
        token=settings.milvus_token.get_secret_value(),
    )
