"""What people who looked said of pairs of entries: functions of a connection; those that write run in the writer's.

What is stored never contradicts itself: entries told to be one person are one group, and no pair within a group was
told to be two. A pair is of one collection and goes with either of its entries.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, replace

from resight.errors import EntryNotFoundError, FeedbackConflictError, FeedbackNotFoundError, InputError
from resight.service.records import Collection, now_us
from resight.service.storage import audit, reads
from resight.service.storage.audit import AuditEvent
from resight.service.storage.writes import earlier_request

MAX_PATH_SHOWN = 5  # entries of a contradiction that its message names

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
    """One verdict.

    Attributes:
        key: orders pairs by when they were first told.
        entry_id: the entry of the two that was enrolled first.
        other_entry_id: the one enrolled later.
        same: they show one person; else two.
        principal: who said so last.
        at_us: when.
    """

    key: int
    entry_id: str
    other_entry_id: str
    same: bool
    principal: str
    at_us: int


def add(
    connection: sqlite3.Connection,
    found_in: Collection,
    pair: tuple[str, str],
    event: AuditEvent,
    *,
    same: bool,
    request_id: str = "",
    digest: bytes = b"",
) -> tuple[FeedbackRecord, bool]:
    """Store a verdict in the place of an earlier one, with its row of the audit; returns it and whether it is a replay.

    Args:
        connection: the writer's.
        found_in: the collection of both entries.
        pair: their ids, in either order.
        event: tells who says so.
        same: they show one person; else two.
        request_id: makes a replay change nothing; empty = none.
        digest: of the whole request, keyed, to notice a request_id used for another one.

    Raises:
        InputError: an entry with itself, or the request_id was used for another request.
        EntryNotFoundError: one of the two is not there.
        FeedbackConflictError: what was said of other pairs contradicts it.
        FeedbackNotFoundError: a replay, whose pair was taken back since.
    """
    low, high = _keys(connection, found_in, pair)
    if request_id and earlier_request(connection, request_id, digest):
        return _stored(connection, found_in, low, high), True
    if same:
        _check_same_person(connection, low, high)
    else:
        _check_different_people(connection, low, high)
    now = now_us()
    connection.execute(
        "INSERT INTO feedback (collection, low, high, same, principal, at_us) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT "
        "(low, high) DO UPDATE SET same = excluded.same, principal = excluded.principal, at_us = excluded.at_us",
        (found_in.key, low, high, same, event.principal, now),
    )
    if request_id:
        row = (request_id, digest, found_in.key, low, found_in.revision, now)
        connection.execute("INSERT INTO request VALUES (?, ?, ?, ?, ?, ?)", row)
    audit.record_event(connection, replace(event, collection=found_in.name, affected=2))
    return _stored(connection, found_in, low, high), False


def remove(
    connection: sqlite3.Connection,
    found_in: Collection,
    pair: tuple[str, str],
    event: AuditEvent,
    *,
    allow_missing: bool,
) -> None:
    """Take back what was said of a pair, with a row of the audit.

    Raises:
        InputError: an entry with itself.
        EntryNotFoundError: one of the two is not there, and ``allow_missing`` is not set.
        FeedbackNotFoundError: nothing was said, and ``allow_missing`` is not set.
    """
    gone = 0
    try:
        low, high = _keys(connection, found_in, pair)
        gone = connection.execute("DELETE FROM feedback WHERE low = ? AND high = ?", (low, high)).rowcount
        if not gone and not allow_missing:
            raise _feedback_not_found(found_in, pair)
    except EntryNotFoundError:
        if not allow_missing:
            raise
    audit.record_event(connection, replace(event, collection=found_in.name, affected=2 * gone))


def listed(connection: sqlite3.Connection, key: int, *, after: int, limit: int) -> list[FeedbackRecord]:
    """Verdicts on living entries of a collection, from the one after key ``after``."""
    rows = connection.execute(
        _PAIR + "WHERE f.collection = :of AND f.key > :after ORDER BY f.key LIMIT :limit",
        {"now": now_us(), "of": key, "after": after, "limit": limit},
    )
    return [_feedback(row) for row in rows.fetchall()]


def _keys(connection: sqlite3.Connection, found_in: Collection, pair: tuple[str, str]) -> tuple[int, int]:
    """The keys of two living entries, ascending."""
    one, other = pair
    if one == other:
        raise InputError(f"a pair is of two entries, found {one!r} twice: name another", field="other_entry_id")
    first, _ = reads.entry(connection, found_in, one)
    try:
        second, _ = reads.entry(connection, found_in, other)
    except EntryNotFoundError as error:
        error.field = "other_entry_id"
        raise
    return min(first, second), max(first, second)


def _stored(connection: sqlite3.Connection, found_in: Collection, low: int, high: int) -> FeedbackRecord:
    values = {"now": now_us(), "low": low, "high": high}
    row = connection.execute(_PAIR + "WHERE f.low = :low AND f.high = :high", values).fetchone()
    if row is None:
        raise _feedback_not_found(found_in, (_name(connection, low), _name(connection, high)))
    return _feedback(row)


def _feedback(row: tuple[int, str, str, int, str, int]) -> FeedbackRecord:
    key, entry_id, other, same, principal, at_us = row
    return FeedbackRecord(key, entry_id, other, bool(same), principal, at_us)


def _feedback_not_found(found_in: Collection, pair: tuple[str, str]) -> FeedbackNotFoundError:
    one, other = pair
    return FeedbackNotFoundError(
        f"nothing is said of entries {one!r} and {other!r} of collection {found_in.name}, or it was taken back: "
        "ListFeedback tells of which pairs something is",
        field="other_entry_id",
        collection=found_in.name,
    )


def _check_same_person(connection: sqlite3.Connection, low: int, high: int) -> None:
    """Refuse to call two entries one person where somebody told apart those they are known to be."""
    ones, others = _group(connection, low, (low, high)), _group(connection, high, (low, high))
    if high in ones:
        return
    few, many = sorted((ones, others), key=len)
    for member in few:
        for apart in _others(connection, member, same=False):
            if apart in many and {member, apart} != {low, high}:
                raise _conflict(connection, (low, high), "one person", sorted((member, apart)), "were told to be two")


def _check_different_people(connection: sqlite3.Connection, low: int, high: int) -> None:
    """Refuse to call two entries two people where what was said makes them one."""
    came_from = _group(connection, low, (low, high))
    if high in came_from:
        path = [high]
        while path[-1] != low:
            path.append(came_from[path[-1]])
        raise _conflict(connection, (low, high), "two people", path, "were told to be one")


def _group(connection: sqlite3.Connection, start: int, without: tuple[int, int]) -> dict[int, int]:
    """Entries known to show the person of ``start``, each with the one it was reached from; one pair left out."""
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
    """The living entries of which this verdict is stored together with one."""
    rows = connection.execute(_OTHERS, {"key": key, "same": same, "now": now_us()}).fetchall()
    return [row[0] for row in rows]


def _conflict(
    connection: sqlite3.Connection, pair: tuple[int, int], wanted: str, path: list[int], told: str
) -> FeedbackConflictError:
    names = [repr(_name(connection, key)) for key in path[:MAX_PATH_SHOWN]] + ["…"] * (len(path) > MAX_PATH_SHOWN)
    one, other = (_name(connection, key) for key in pair)
    return FeedbackConflictError(
        f"entries {one!r} and {other!r} cannot be {wanted}: {', '.join(names)} {told}; look at these again and take "
        "back (RemoveFeedback) or change what is wrong, then say this again",
        field="verdict",
        told=len(path),
    )


def _name(connection: sqlite3.Connection, key: int) -> str:
    return str(connection.execute("SELECT entry_id FROM entry WHERE key = ?", (key,)).fetchone()[0])
