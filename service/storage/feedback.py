"""Human feedback on pairs of entries: do they show the same person or different people?

Functions of a connection; `add` and `remove` run in the writer's transaction. The stored verdicts are consistent:
"same person" verdicts connect entries into groups, and no pair within a group has the verdict "different people". Both
entries of a pair are in one collection, and the pair is deleted with either of them.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, replace

from resight.errors import EntryNotFoundError, FeedbackConflictError, FeedbackNotFoundError, InputError
from resight.service.records import Collection, now_us
from resight.service.storage import audit, reads
from resight.service.storage.audit import AuditEvent
from resight.service.storage.writes import earlier_request

MAX_PATH_SHOWN = 5  # entries that the message of a contradiction names

_LIVING = "JOIN entry {0} ON {0}.key = f.{1} AND ({0}.expire_us IS NULL OR {0}.expire_us > :now) "
_PAIR = (
    "SELECT f.key, a.entry_id, b.entry_id, f.same, f.principal, f.at_us FROM feedback f "
    + _LIVING.format("a", "low")
    + _LIVING.format("b", "high")
)
_OTHERS = " UNION ALL ".join(
    f"SELECT f.{other} FROM feedback f {_LIVING.format('e', other)} WHERE f.{one} = :key AND f.same = :same"
    for one, other in (("low", "high"), ("high", "low"))
)


@dataclass(frozen=True)
class FeedbackRecord:
    """The verdict on one pair.

    Attributes:
        key: orders pairs by the time of their first verdict.
        entry_id: the entry that was enrolled first.
        other_entry_id: the entry that was enrolled later.
        same: both show the same person; False = different people.
        principal: who gave the last verdict.
        at_us: time of the last verdict, microseconds since 1970.
    """

    key: int
    entry_id: str
    other_entry_id: str
    same: bool
    principal: str
    at_us: int


def add(
    connection: sqlite3.Connection,
    collection: Collection,
    pair: tuple[str, str],
    event: AuditEvent,
    *,
    same: bool,
    request_id: str = "",
    digest: bytes = b"",
) -> tuple[FeedbackRecord, bool]:
    """Store a verdict, replacing an earlier one, with an audit row; returns it and whether it is a replay.

    Args:
        connection: the writer's.
        collection: the collection of both entries.
        pair: their ids, in either order.
        event: for the audit log; its principal gave the verdict.
        same: both show the same person; False = different people.
        request_id: makes a repeated request a replay, which changes nothing; empty = none.
        digest: keyed hash of the whole request, to detect a request_id that is reused for another request.

    Raises:
        InputError: both ids are equal, or the request_id was used for another request.
        EntryNotFoundError: one of the entries does not exist.
        FeedbackConflictError: verdicts on other pairs contradict it.
        FeedbackNotFoundError: a replay whose verdict was removed since.
    """
    low, high = _keys(connection, collection, pair)
    if request_id and earlier_request(connection, request_id, digest):
        return _stored(connection, collection, low, high), True
    if same:
        _check_same_person(connection, low, high)
    else:
        _check_different_people(connection, low, high)
    now = now_us()
    connection.execute(
        "INSERT INTO feedback (collection, low, high, same, principal, at_us) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT "
        "(low, high) DO UPDATE SET same = excluded.same, principal = excluded.principal, at_us = excluded.at_us",
        (collection.key, low, high, same, event.principal, now),
    )
    if request_id:
        row = (request_id, digest, collection.key, low, collection.revision, now)
        connection.execute("INSERT INTO request VALUES (?, ?, ?, ?, ?, ?)", row)
    audit.record_event(connection, replace(event, collection=collection.name, affected=2))
    return _stored(connection, collection, low, high), False


def remove(
    connection: sqlite3.Connection,
    collection: Collection,
    pair: tuple[str, str],
    event: AuditEvent,
    *,
    allow_missing: bool,
) -> None:
    """Remove the verdict on a pair, with an audit row.

    Raises:
        InputError: both ids are equal.
        EntryNotFoundError: one of the entries does not exist, and ``allow_missing`` is not set.
        FeedbackNotFoundError: the pair has no verdict, and ``allow_missing`` is not set.
    """
    removed = 0
    try:
        low, high = _keys(connection, collection, pair)
        removed = connection.execute("DELETE FROM feedback WHERE low = ? AND high = ?", (low, high)).rowcount
        if not removed and not allow_missing:
            raise _feedback_not_found(collection, pair)
    except EntryNotFoundError:
        if not allow_missing:
            raise
    audit.record_event(connection, replace(event, collection=collection.name, affected=2 * removed))


def list_records(connection: sqlite3.Connection, key: int, *, after: int, limit: int) -> list[FeedbackRecord]:
    """Verdicts on pairs of unexpired entries of a collection, in order of key, starting after key ``after``."""
    rows = connection.execute(
        _PAIR + "WHERE f.collection = :of AND f.key > :after ORDER BY f.key LIMIT :limit",
        {"now": now_us(), "of": key, "after": after, "limit": limit},
    )
    return [_feedback(row) for row in rows.fetchall()]


def _keys(connection: sqlite3.Connection, collection: Collection, pair: tuple[str, str]) -> tuple[int, int]:
    """The keys of two unexpired entries, ascending."""
    one, other = pair
    if one == other:
        raise InputError(f"expected two different entries, found {one!r} twice", field="other_entry_id")
    first, _ = reads.entry(connection, collection, one)
    try:
        second, _ = reads.entry(connection, collection, other)
    except EntryNotFoundError as error:
        error.field = "other_entry_id"
        raise
    return min(first, second), max(first, second)


def _stored(connection: sqlite3.Connection, collection: Collection, low: int, high: int) -> FeedbackRecord:
    values = {"now": now_us(), "low": low, "high": high}
    row = connection.execute(_PAIR + "WHERE f.low = :low AND f.high = :high", values).fetchone()
    if row is None:
        raise _feedback_not_found(collection, (_name(connection, low), _name(connection, high)))
    return _feedback(row)


def _feedback(row: tuple[int, str, str, int, str, int]) -> FeedbackRecord:
    key, entry_id, other, same, principal, at_us = row
    return FeedbackRecord(key, entry_id, other, bool(same), principal, at_us)


def _feedback_not_found(collection: Collection, pair: tuple[str, str]) -> FeedbackNotFoundError:
    one, other = pair
    return FeedbackNotFoundError(
        f"there is no feedback on entries {one!r} and {other!r} of collection {collection.name}, or it was removed: "
        "see which there is with ListFeedback",
        field="other_entry_id",
        collection=collection.name,
    )


def _check_same_person(connection: sqlite3.Connection, low: int, high: int) -> None:
    """Raise if members of the two entries' groups have the verdict "different people"."""
    ones, others = _group(connection, low, (low, high)), _group(connection, high, (low, high))
    if high in ones:
        return
    smaller, larger = sorted((ones, others), key=len)
    for member in smaller:
        for other in _others(connection, member, same=False):
            if other in larger and {member, other} != {low, high}:
                path = sorted((member, other))
                raise _conflict(connection, (low, high), "the same person", path, "are recorded as different people")


def _check_different_people(connection: sqlite3.Connection, low: int, high: int) -> None:
    """Raise if other verdicts connect the two entries as the same person."""
    came_from = _group(connection, low, (low, high))
    if high in came_from:
        path = [high]
        while path[-1] != low:
            path.append(came_from[path[-1]])
        raise _conflict(connection, (low, high), "different people", path, "are recorded as the same person")


def _group(connection: sqlite3.Connection, start: int, without: tuple[int, int]) -> dict[int, int]:
    """Entries connected to ``start`` by "same person" verdicts, each with its predecessor on the path from ``start``.

    The verdict on the pair ``without`` is ignored.
    """
    came_from = {start: start}
    waiting = [start]
    while waiting:
        at = waiting.pop()
        for other in _others(connection, at, same=True):
            if other not in came_from and {at, other} != set(without):
                came_from[other] = at
                waiting.append(other)
    return came_from


def _others(connection: sqlite3.Connection, key: int, *, same: bool) -> list[int]:
    """The unexpired entries that have this verdict together with entry ``key``."""
    rows = connection.execute(_OTHERS, {"key": key, "same": same, "now": now_us()}).fetchall()
    return [row[0] for row in rows]


def _conflict(
    connection: sqlite3.Connection, pair: tuple[int, int], new: str, path: list[int], recorded: str
) -> FeedbackConflictError:
    names = [repr(_name(connection, key)) for key in path[:MAX_PATH_SHOWN]] + ["…"] * (len(path) > MAX_PATH_SHOWN)
    one, other = (_name(connection, key) for key in pair)
    return FeedbackConflictError(
        f"entries {one!r} and {other!r} cannot be {new}: {', '.join(names)} {recorded}; review these, remove "
        "(RemoveFeedback) or change the wrong verdict, then send this one again",
        field="verdict",
        told=len(path),
    )


def _name(connection: sqlite3.Connection, key: int) -> str:
    return str(connection.execute("SELECT entry_id FROM entry WHERE key = ?", (key,)).fetchone()[0])
