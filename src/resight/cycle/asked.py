"""Runs that somebody asks for by RPC: an operation of kind ``adapt`` with the site's name waits on the server.

The cycle takes it, tells how it goes, and tells its end. A server out of reach stops no run: the stages that need it
will say so, and it is told the next time.
"""

from __future__ import annotations

import logging
from typing import Literal

from resight.client import Client, OperationInfo
from resight.cycle.server import connect
from resight.cycle.site_file import SiteFile
from resight.cycle.state import Run, Runs
from resight.errors import ReIDError

log = logging.getLogger(__name__)

MOST_TEXT = 1000  # characters of a text the server takes, with room for what it may count otherwise


def waiting(site: SiteFile, client: Client) -> OperationInfo | None:
    """What was asked for this site and nobody took yet."""
    return next(iter(client.pending_adaptations(site.name)), None)


def is_asked(site: SiteFile) -> bool:
    """Whether a run is asked for; False where the server cannot be reached."""
    try:
        with connect(site) as client:
            return waiting(site, client) is not None
    except ReIDError as error:
        log.debug("no look at what is asked of site %s: %s", site.name, error)
        return False


def claim(site: SiteFile, runs: Runs, run: Run) -> None:
    """Let a run answer what was asked for."""
    if run.operation:
        return
    try:
        with connect(site) as client:
            found = waiting(site, client)
            if found is not None:
                runs.ask(run.run, found.operation_id)
                client.report_adaptation(found.operation_id, "running", result={"run": str(run.run)})
    except ReIDError as error:
        log.warning("run %d: whether somebody asked for it is unknown: %s", run.run, error)


def progress(site: SiteFile, run: Run, stage: str) -> bool:
    """Tell that a stage is done; whether the run was cancelled by who asked for it."""
    found = _tell(site, run, "running", {"run": str(run.run), "stage": stage})
    return found is not None and found.state == "cancelled"


def report(site: SiteFile, run: Run) -> None:
    """Tell how a run ended; of one that goes on, nothing."""
    told = {"run": str(run.run), "state": run.state, "reason": run.reason[:MOST_TEXT]}
    if run.state == "failed":
        _tell(site, run, "failed", told, error=run.reason[:MOST_TEXT] or "see the cycle's history")
    elif run.state != "running":
        _tell(site, run, "succeeded", told)


def _tell(
    site: SiteFile,
    run: Run,
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
        log.warning("run %d: the server was not told of it: %s", run.run, failure)
        return None
