"""What was met in footage and what became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class Counts:
    """What was met and what became of it.

    Attributes:
        frames: looked at.
        unreadable: damaged ones.
        left_out: of a live stream, that nobody had time for.
        boxes: in the frames.
        tracks: passages.
        crops: kept.
        dropped: reason -> boxes of which no crop was made.
        tracks_without_crops: passages of which none was good enough.
    """

    frames: int = 0
    unreadable: int = 0
    left_out: int = 0
    boxes: int = 0
    tracks: int = 0
    crops: int = 0
    tracks_without_crops: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """A copy of plain values."""
        return {**vars(self), "dropped": dict(self.dropped)}

    @classmethod
    def of(cls, told: Mapping[str, Any] | None) -> Counts:
        """What `to_json` gave."""
        return cls() if told is None else cls(**{**told, "dropped": Counter(told["dropped"])})


@dataclass(frozen=True)
class Outcome:
    """What became of a source.

    Attributes:
        name: of it.
        camera: of it.
        status: "done", or "skipped" because it was done before.
        folder: of its crops in the store.
        counts: of all of it, over all runs.
    """

    name: str
    camera: str
    status: Literal["done", "skipped"]
    folder: str
    counts: Counts
