"""Adaptations that somebody asks for: rows among the long operations, which the cycle of a site carries out elsewhere.

The server starts nothing. A row stays PENDING until that cycle reports that it runs, also over restarts of the server,
and is cancelled at once, for nobody here works on it; the cycle's next report is answered with that, and it ends.
Functions of the writer's connection, in its transaction.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping

from resight.errors import InputError, LimitError, OperationNotFoundError, TrainingError
from resight.service.operations import ADAPT, Operation, State, begin, by_id, by_request, finish, progress

SITE = "site"  # in the operation's result: which site's cycle is asked
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
MAX_RESULTS, MAX_RESULT_NAME, MAX_TEXT = 32, 63, 1024
REPORTED = (State.RUNNING, State.SUCCEEDED, State.FAILED)


def ask(connection: sqlite3.Connection, site: str, *, request_id: str = "") -> Operation:
    """Note that a site is to be adapted; one that is PENDING for it already, or of the same request, is answered.

    Raises:
        InputError: no name of a site.
    """
    if not SITE_NAME.fullmatch(site):
        raise InputError(
            f"a site's name is 1-63 of a-z, A-Z, 0-9, '.', '_' and '-', a letter or digit first; found {site[:80]!r}",
            field="job_spec_id",
        )
    if request_id and (first := by_request(connection, ADAPT, request_id)):
        return first
    row = connection.execute(
        f"SELECT operation_id FROM operation WHERE kind = ? AND state = ? AND json_extract(result, '$.{SITE}') = ?",
        (ADAPT, State.PENDING, site),
    ).fetchone()
    if row is not None:
        return by_id(connection, row[0])
    made = begin(connection, ADAPT, 0, request_id, {}, state=State.PENDING)
    return progress(connection, made.operation_id, {}, {}, {SITE: site})


def report(
    connection: sqlite3.Connection, operation_id: str, state: State, *, result: Mapping[str, str], error: str = ""
) -> Operation:
    """Note how an adaptation goes; one that has ended stays as it is.

    Args:
        connection: the writer's.
        operation_id: of one that was asked for.
        state: of `REPORTED`; RUNNING may be told again and again.
        result: added to what was told before; the site's name stays.
        error: why it failed; with FAILED alone, and then not empty.

    Raises:
        OperationNotFoundError: no such adaptation.
        InputError: another state, or an error without a failure, or the other way round.
        LimitError: too much is told.
    """
    if state not in REPORTED:
        known = ", ".join(one.name for one in REPORTED)
        raise InputError(f"state is one of {known}, found {state.name}: CancelOperation cancels", field="state")
    if bool(error) != (state is State.FAILED):
        raise InputError(
            f"an error is told with FAILED, and only then; found {state.name} with {error[:80]!r}", field="error"
        )
    _check_size(result, error)
    found = by_id(connection, operation_id)
    if found.kind != ADAPT:
        raise OperationNotFoundError(
            f"operation {operation_id} is of kind {found.kind}: only adaptations are reported from outside",
            field="operation_id",
            operation=operation_id,
        )
    if found.state.ended:
        return found
    told = dict(result) | {SITE: found.result[SITE]}
    if state is not State.RUNNING:
        return finish(connection, operation_id, state, TrainingError(error) if error else None, told)
    connection.execute("UPDATE operation SET state = ? WHERE operation_id = ?", (state, operation_id))
    return progress(connection, operation_id, {}, {}, told)


def _check_size(result: Mapping[str, str], error: str) -> None:
    if len(result) > MAX_RESULTS:
        raise LimitError(f"at most {MAX_RESULTS} results, found {len(result)}: tell fewer", field="result")
    for name, value in result.items():
        if not (1 <= len(name) <= MAX_RESULT_NAME and len(value) <= MAX_TEXT):
            raise LimitError(
                f"a result's name has 1-{MAX_RESULT_NAME} characters and its value at most {MAX_TEXT}, found "
                f"{name[:80]!r}: {len(name)} and {len(value)}",
                field="result",
            )
    if len(error) > MAX_TEXT:
        raise LimitError(f"an error has at most {MAX_TEXT} characters, found {len(error)}: shorten it", field="error")
