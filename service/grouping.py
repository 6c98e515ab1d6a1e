"""Hits by person, track or camera: the k nearest groups, not k crops of one.

Entries that name none are groups of their own. Rounds of searches find the groups: each leaves out the groups that
are known, so a person with a thousand crops costs one round, not a thousand hits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from resight.service.entries import Entry, Filter, Hit

PER_GROUP = 4  # hits fetched for each group still wanted: people are enrolled with a few crops each


class GroupBy(StrEnum):
    """What makes a group; the value is the entry's field."""

    SUBJECT = "subject_id"
    TRACK = "track_id"
    CAMERA = "camera_id"

    def of(self, entry: Entry) -> tuple[str, str]:
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
            self.members.setdefault(self.by.of(hit.entry), []).append(hit)

    def __len__(self) -> int:
        return len(self.members)

    def beyond(self, filters: Filter) -> Filter:
        """A filter that in addition leaves out every group known."""
        known: dict[str, list[str]] = {}
        for kind, name in self.members:
            known.setdefault(kind, []).append(name)
        more: dict[str, Any] = {
            f"exclude_{kind}s": (*getattr(filters, f"exclude_{kind}s"), *own) for kind, own in known.items()
        }
        return replace(filters, **more)
