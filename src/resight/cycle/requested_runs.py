"""Runs requested by RPC: a pending operation of kind ``adapt`` with the site's name on the server.

The cycle claims the request, and reports progress and end. An unreachable server does not stop a run: the stages that
need the server fail on their own, and the end is reported again by the next run.
"""

from __future__ import annotations

import logging
from typing import Literal

from resight.client import Client, OperationInfo
from resight.cycle.runs import CycleRun, RunDatabase
from resight.cycle.server import connect
from resight.cycle.site import SiteFile
from resight.errors import ReIDError

log = logging.getLogger(__name__)

MAX_REASON_CHARS = 1000  # below the server's limit, which may count characters differently


def pending_request(site: SiteFile, client: Client) -> OperationInfo | None:
    """The oldest pending request for a run of this site, if any."""
    return next(iter(client.pending_adaptations(site.name)), None)


def has_pending_request(site: SiteFile) -> bool:
    """Whether a run is requested; False if the server cannot be reached."""
    try:
        with connect(site) as client:
            return pending_request(site, client) is not None
    except ReIDError as error:
        log.debug("cannot poll requests for site %s: %s", site.name, error)
        return False


def claim_request(site: SiteFile, runs: RunDatabase, run: CycleRun) -> None:
    """Assign the pending request to a run."""
    if run.operation:
        return
    try:
        with connect(site) as client:
            request = pending_request(site, client)
            if request is not None:
                runs.set_operation(run.run, request.operation_id)
                client.report_adaptation(request.operation_id, "running", result={"run": str(run.run)})
    except ReIDError as error:
        log.warning("run %d: cannot poll requests: %s", run.run, error)


def report_progress(site: SiteFile, run: CycleRun, stage: str) -> bool:
    """Report a completed stage to the server; returns whether the run was cancelled by its requester."""
    operation = _report(site, run, "running", {"run": str(run.run), "stage": stage})
    return operation is not None and operation.state == "cancelled"


def report_end(site: SiteFile, run: CycleRun) -> None:
    """Report the end of a run to the server; does nothing for an unfinished run."""
    result = {"run": str(run.run), "state": run.state, "reason": run.reason[:MAX_REASON_CHARS]}
    if run.state == "failed":
        _report(site, run, "failed", result, error=run.reason[:MAX_REASON_CHARS] or "see the cycle's history")
    elif run.state != "running":
        _report(site, run, "succeeded", result)


def _report(
    site: SiteFile,
    run: CycleRun,
    state: Literal["running", "succeeded", "failed"],
    result: dict[str, str],
    *,
    error: str = "",
) -> OperationInfo | None:
    if not run.operation:
        return None
    try:
        with connect(site) as client:
            return client.report_adaptation(run.operation, state, result=result, error=error)
    except ReIDError as failure:
        log.warning("run %d: cannot report to the server: %s", run.run, failure)
        return None
