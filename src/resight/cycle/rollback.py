"""The way back: the spaces and the model that were active before."""

from __future__ import annotations

import contextlib
import logging

from resight.client import Client
from resight.cycle.active import Active, write_active
from resight.cycle.layout import Layout
from resight.cycle.server import active_model, finished
from resight.cycle.site_file import SiteFile
from resight.errors import CollectionNotFoundError, CycleError, MigrationError, SpaceMismatchError

log = logging.getLogger(__name__)


def roll_back(site: SiteFile, layout: Layout, client: Client, active: Active) -> list[str]:
    """Search every collection in its space before, let the model before embed, and note it; safe to ask again.

    Entries enrolled since are in both spaces, so nobody is lost on the way.

    Returns:
        What was done, in words.

    Raises:
        CycleError: there is nothing to go back to.
        ReIDError: the server's refusal; what was switched until then stays switched, ask again.
    """
    previous = active.previous
    if previous is None:
        raise CycleError(
            f"model {active.model_id} is the first this site knows: there is nothing to go back to; name another with "
            "`resight models activate`"
        )
    told = switch_back(client, active, dropping=site.migrate.missing_crops == "drop")
    write_active(layout.active, previous)
    return told


def switch_back(client: Client, active: Active, *, dropping: bool = False) -> list[str]:
    """The switching alone; returns what was done, in words."""
    previous, told = active.previous, []
    assert previous is not None, active.model_id
    if client.model(previous.model_id).state != "ready":
        finished(client, client.load_model(previous.model_id))
    for name, (was, now) in active.spaces.items():
        try:
            found = client.collection(name).space_id
        except CollectionNotFoundError:
            told.append(f"collection {name} is gone")
            continue
        if found == was:
            continue
        if found != now:
            told.append(f"collection {name} is searched in space {found}, which this run did not make: left alone")
            continue
        _activate(client, name, was, now, previous.model_id, dropping=dropping)
        told.append(f"collection {name} is searched in space {was} again")
    serving = active_model(client).model_id
    if serving == active.model_id:
        client.activate_model(previous.model_id, expected=serving)
        told.append(f"model {previous.model_id} is active again, {serving} was")
    elif serving != previous.model_id:
        told.append(f"model {serving} is active, which this run did not make: left alone")
    for line in told:
        log.info("%s", line)
    return told


def _activate(client: Client, name: str, was: str, now: str, model_id: str, *, dropping: bool) -> None:
    """Switch one collection; where the old space lacks entries, they are embedded into it first."""
    try:
        client.activate_space(name, was, expected=now, allow_incomplete=dropping)
    except SpaceMismatchError:
        with contextlib.suppress(MigrationError):  # its gate compares with the model that is to go
            finished(client, client.migrate(name, model_id, drop_missing=dropping))
        client.activate_space(name, was, expected=now, allow_incomplete=dropping)
