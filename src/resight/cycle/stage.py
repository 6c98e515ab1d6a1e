"""One stage in a process of its own: `python -m resight.cycle.stage NAME SITE_TOML RUN`, started by the cycle.

It dies with the cycle (`leash`), waits until the process of a killed cycle before is gone (`stage.lock`), writes
what it came to as its last act, and ends with 0; or why it failed, and ends with 1.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from resight.atomic import write_atomic
from resight.cycle import leash, stages_look, stages_serve, stages_train
from resight.cycle.layout import Layout
from resight.cycle.lock import Lock
from resight.cycle.outcome import Outcome, write_outcome
from resight.cycle.server import PASSING
from resight.cycle.site_file import load_site
from resight.cycle.state import Runs
from resight.cycle.work import Work

log = logging.getLogger(__name__)

STAGES: dict[str, Callable[[Work], Outcome]] = {
    "ingest": stages_train.ingest,
    "collect": stages_train.collect,
    "adapt": stages_train.adapt,
    "judge": stages_train.judge,
    "export": stages_train.export,
    "backfill": stages_serve.backfill,
    "shadow": stages_look.shadow,
    "promote": stages_serve.promote,
    "watch": stages_look.watch,
}
ORPHAN_S = 30.0  # for the kernel to end the process of a killed cycle


def main() -> None:
    """Do the stage that the command line names."""
    name, file, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    leash.hold()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    site = load_site(file)
    os.nice(site.schedule.nice)
    layout = Layout(site.state)
    folder = layout.run(number)
    folder.error(name).unlink(missing_ok=True)
    with Lock(layout.stage_lock, f"the stage of site {site.name}", wait_s=ORPHAN_S):
        try:
            with Runs(layout.database) as runs:
                since_s = runs.since_s()
            outcome = STAGES[name](Work(site, number, since_s))
        except Exception as error:
            log.exception("stage %s of run %d failed", name, number)
            told = {"error": type(error).__name__, "message": str(error), "passing": isinstance(error, PASSING)}
            folder.error(name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(folder.error(name), json.dumps(told).encode())
            sys.exit(1)
        write_outcome(folder.result(name), outcome)


if __name__ == "__main__":
    main()
