"""`resight cycle rollback`: the last promotion is taken back because an operator says so."""

from __future__ import annotations

from pathlib import Path

from resight.cycle import history
from resight.cycle.active import read_active
from resight.cycle.layout import Layout
from resight.cycle.lock import Lock
from resight.cycle.outcome import read_outcome, until_s
from resight.cycle.rollback import roll_back
from resight.cycle.server import connect
from resight.cycle.site_file import load_site
from resight.cycle.state import Runs
from resight.errors import CycleError


def by_hand(file: Path) -> list[str]:
    """Take the last promotion back because an operator says so; returns what was done, in words.

    A run that was still watching its promotion has ended with it.

    Raises:
        RecipeError: the site's file is wrong.
        CycleBusyError: a cycle of the site is at work.
        CycleError: nothing was promoted, or there is nothing to go back to.
    """
    site = load_site(file)
    layout = Layout(site.state)
    with Lock(layout.lock, f"site {site.name}"), Runs(layout.database) as runs, connect(site) as client:
        active = read_active(layout.active)
        if active is None or active.run == 0:
            raise CycleError(f"no cycle of site {site.name} has promoted a model: there is nothing to take back")
        unfinished = runs.unfinished()
        told = roll_back(site, layout, client, active)
        if unfinished is not None and unfinished.run == active.run:
            until = until_s(read_outcome(layout.run(active.run).result("collect")))
            runs.end(active.run, "rolled_back", "by hand", used=True, until_s=until)
        else:
            runs.mark(active.run, "rolled_back", "by hand")
        history.write(site, layout, runs)
    return told
