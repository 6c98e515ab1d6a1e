"""Stages 6 to 8: the server loads the candidate, embeds the collections anew, lets it answer beside, and switches.

Each is asked again after a kill: the server goes on with a migration, and a switch that was made is seen to be made.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from resight.client import Client
from resight.cycle.active import Active, write_active
from resight.cycle.outcome import Outcome
from resight.cycle.rollback import switch_back
from resight.cycle.server import PASSING, active_model, connect, finished
from resight.cycle.work import Work
from resight.errors import ConflictError, MigrationError, ReIDError

log = logging.getLogger(__name__)


def backfill(work: Work) -> Outcome:
    """Every collection that follows the model is embedded with the candidate, and searched as before."""
    dropping = work.site.migrate.missing_crops == "drop"
    with connect(work.site) as client:
        loaded = finished(client, client.load_model(work.model_id))
        space_id = loaded.result["space_id"]
        spaces: dict[str, str] = {}
        told: dict[str, object] = {}
        for name in _followers(work, client):
            before = client.collection(name)
            spaces[name] = before.space_id
            if before.space_id == space_id:  # weights that did not change make no other space
                continue
            try:
                done = finished(client, client.migrate(name, work.model_id, drop_missing=dropping))
            except MigrationError as error:
                return Outcome("refused", (f"collection {name}: {error}",), used=True)
            told[name] = {"entries": done.total, "embedded": done.succeeded, **done.result}
            log.info("collection %s: %d of %d entries embedded", name, done.succeeded, done.total)
    return Outcome(figures={"space_id": space_id, "spaces": spaces, "collections": told})


def _followers(work: Work, client: Client) -> list[str]:
    """The collections that follow the model."""
    chosen = work.site.migrate.collections
    return list(chosen) or [one.name for one in client.collections() if one.keep_crops]


def promote(work: Work) -> Outcome:
    """Collections are searched in the candidate's space, then it embeds whatever names no model: compare-and-swap."""
    found, before = work.came_to("backfill").figures, work.baseline()
    space_id, was = str(found["space_id"]), dict(found["spaces"])
    dropping = work.site.migrate.missing_crops == "drop"
    with connect(work.site) as client:
        finished(client, client.load_model(work.model_id))  # the server may have been started anew since
        _look(work, client, before, was, space_id)
        entries = {name: client.collection(name).entry_count for name in was}
        spaces = {name: (old, space_id) for name, old in was.items() if old != space_id}
        candidate = Active(work.model_id, str(work.bundle), str(work.folder.checkpoint), work.number, spaces, before)
        try:
            for name, (old, new) in spaces.items():
                if client.collection(name).space_id != new:
                    client.activate_space(name, new, expected=old, allow_incomplete=dropping)
            if active_model(client).model_id != work.model_id:
                client.activate_model(work.model_id, expected=before.model_id)
        except PASSING:  # asked again, it goes on
            raise
        except ReIDError:
            switch_back(client, candidate)
            raise
    write_active(work.layout.active, candidate)
    log.info("%s is active, %s was", work.model_id, before.model_id)
    return Outcome(
        figures={"active": work.model_id, "previous": before.model_id, "entries": entries, "at_s": time.time()}
    )


def _look(work: Work, client: Client, before: Active, was: Mapping[str, str], space_id: str) -> None:
    """Refuse to switch anything where somebody else switched since the run began.

    Raises:
        ConflictError: another model is active, or a collection is searched in another space.
    """
    now = active_model(client).model_id
    if now not in (before.model_id, work.model_id):
        raise ConflictError(
            f"model {now} is active, {before.model_id} was when run {work.number} began: somebody switched it, and the "
            "next run begins from there"
        )
    for name, old in was.items():
        found = client.collection(name).space_id
        if found not in (old, space_id):
            raise ConflictError(
                f"collection {name} is searched in space {found}, and was in {old} when run {work.number} began: "
                "somebody switched it, and the next run begins from there"
            )
