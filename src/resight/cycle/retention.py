"""What leaves the state folder and the server: crops and pages of old runs, models nobody goes back to.

Figures stay: the database, the results and logs of stages, active.json and the history hold no crop.
"""

from __future__ import annotations

import logging
import re
import shutil
import time

from resight.client import Client
from resight.cycle.active import read_active
from resight.cycle.layout import Layout
from resight.cycle.server import connect
from resight.cycle.site_file import SiteFile
from resight.cycle.state import Run, Runs
from resight.errors import ReIDError

log = logging.getLogger(__name__)

DAY_S = 86_400.0
CHECKPOINTS = ("checkpoint", "checkpoint-teacher", "judged.bundle")


def tidy(site: SiteFile, layout: Layout, runs: Runs) -> None:
    """Remove what is not needed any more; the unfinished run is left alone."""
    chain = read_active(layout.active)
    kept = set() if chain is None else {one.run for one in chain.chain()}
    for run in runs.runs():
        if run.state == "running":
            continue
        _expire(site, layout, run)
        if run.run not in kept:
            for name in CHECKPOINTS:
                shutil.rmtree(layout.run(run.run).path / name, ignore_errors=True)
        else:  # the teacher has taught, and the judge has judged
            for name in CHECKPOINTS[1:]:
                shutil.rmtree(layout.run(run.run).path / name, ignore_errors=True)
    unfinished = runs.unfinished()
    try:
        with connect(site) as client:
            _drop_models(site, client, kept | ({unfinished.run} if unfinished else set()))
    except (ReIDError, OSError) as error:
        log.warning("models that are not needed any more stay for now: %s", error)


def _expire(site: SiteFile, layout: Layout, run: Run) -> None:
    """Pages show crops, so they go in time; and the crops of a run, where a kill left them."""
    folder = layout.run(run.run)
    shutil.rmtree(folder.site, ignore_errors=True)
    if time.time() - run.began_s > site.collect.history_days * DAY_S:
        for page in [*folder.pages, layout.page(run.run)]:
            page.unlink(missing_ok=True)


def _drop_models(site: SiteFile, client: Client, kept: set[int]) -> None:
    """Unload and remove the models of runs that nobody goes back to and no collection is searched with."""
    searched = {one.space_id for one in client.collections()}
    own = re.compile(re.escape(site.name) + r"-(\d{6,})")
    for model in list(client.models()):
        found = own.fullmatch(model.model_id)
        if found is None or int(found[1]) in kept or model.active or model.space_id in searched:
            continue
        if model.state == "ready":
            client.unload_model(model.model_id)
        shutil.rmtree(site.service.model_root / model.model_id, ignore_errors=True)
        log.info("model %s is removed", model.model_id)
