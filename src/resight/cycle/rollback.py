"""Rollback of a promotion: the previous spaces and the previous model become active again.

Used by the `promote` and `watch` stages, and by `resight cycle rollback`.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from resight.client import Client
from resight.cycle import history
from resight.cycle.runs import CycleLock, RunDatabase
from resight.cycle.server import active_model_info, connect, wait_for_operation
from resight.cycle.site import SiteFile, load_site
from resight.cycle.state_folder import (
    ActiveModel,
    StateFolder,
    newest_crop_s,
    read_active,
    read_outcome,
    write_active,
)
from resight.errors import CollectionNotFoundError, CycleError, MigrationError, SpaceMismatchError

log = logging.getLogger(__name__)


def roll_back(site: SiteFile, layout: StateFolder, client: Client, active: ActiveModel) -> list[str]:
    """Activate the previous space of every collection and the previous model, and record it; safe to repeat.

    Entries enrolled since the promotion are in both spaces, so no entry is lost.

    Returns:
        One line of text for each change.

    Raises:
        CycleError: there is no previous model.
        ReIDError: the server refused a change; earlier changes stay in place, repeat the call.
    """
    previous = active.previous
    if previous is None:
        raise CycleError(
            f"model {active.model_id} is the first of this site, so there is no previous one: activate another with "
            "`resight models activate`"
        )
    changes = switch_back(client, active, dropping=site.migrate.missing_crops == "drop")
    write_active(layout.active, previous)
    return changes


def switch_back(client: Client, active: ActiveModel, *, dropping: bool = False) -> list[str]:
    """Only switch spaces and model on the server; returns one line of text for each change."""
    previous = active.previous
    changes: list[str] = []
    assert previous is not None, active.model_id
    if client.model(previous.model_id).state != "ready":
        wait_for_operation(client, client.load_model(previous.model_id))
    for name, (old, new) in active.spaces.items():
        try:
            found = client.collection(name).space_id
        except CollectionNotFoundError:
            changes.append(f"collection {name} no longer exists")
            continue
        if found == old:
            continue
        if found != new:
            changes.append(f"collection {name} uses space {found}, which this run did not create: not changed")
            continue
        _activate(client, name, old, new, previous.model_id, dropping=dropping)
        changes.append(f"collection {name} uses space {old} again")
    serving = active_model_info(client).model_id
    if serving == active.model_id:
        client.activate_model(previous.model_id, expected=serving)
        changes.append(f"model {previous.model_id} is active again instead of {serving}")
    elif serving != previous.model_id:
        changes.append(f"model {serving} is active, which this run did not create: not changed")
    for line in changes:
        log.info("%s", line)
    return changes


def _activate(client: Client, name: str, old: str, new: str, model_id: str, *, dropping: bool) -> None:
    """Activate a collection's old space; entries that it lacks are embedded into it first."""
    try:
        client.activate_space(name, old, expected=new, allow_incomplete=dropping)
    except SpaceMismatchError:
        with contextlib.suppress(MigrationError):  # its gate compares with the model that is being replaced
            wait_for_operation(client, client.migrate(name, model_id, drop_missing=dropping))
        client.activate_space(name, old, expected=new, allow_incomplete=dropping)


def manual_rollback(file: Path) -> list[str]:
    """Undo the last promotion on request of an operator; returns one line of text for each change.

    If the run is still in its `watch` stage, the run ends.

    Raises:
        RecipeError: the site's file is not valid.
        CycleBusyError: a cycle of the site is running.
        CycleError: nothing was promoted, or there is no previous model.
    """
    site = load_site(file)
    layout = StateFolder(site.state)
    with CycleLock(layout.lock, f"site {site.name}"), RunDatabase(layout.database) as runs, connect(site) as client:
        active = read_active(layout.active)
        if active is None or active.run == 0:
            raise CycleError(f"no cycle of site {site.name} has promoted a model: there is nothing to roll back")
        unfinished = runs.unfinished()
        changes = roll_back(site, layout, client, active)
        if unfinished is not None and unfinished.run == active.run:
            until = newest_crop_s(read_outcome(layout.run(active.run).result("collect")))
            runs.end(active.run, "rolled_back", "by hand", used=True, until_s=until)
        else:
            runs.mark(active.run, "rolled_back", "by hand")
        history.write_pages(site, layout, runs)
    return changes
