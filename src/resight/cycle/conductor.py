"""One cycle of a site: an unfinished run goes on, else a new one begins; stage after stage, each in its own process.

What a stage came to is read from the file it writes as its last act. So whenever the cycle is killed, the next one
finds either the file, and the stage is not done again, or none, and the stage is asked again and goes on.
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Event

from resight.cycle import asked, history, retention
from resight.cycle.alerts import alert
from resight.cycle.layout import Layout, RunFolder
from resight.cycle.lock import Lock
from resight.cycle.outcome import Outcome, read_outcome, until_s
from resight.cycle.site_file import SiteFile, load_site
from resight.cycle.state import Run, Runs, RunState
from resight.cycle.supervise import run_stage, stage_command
from resight.cycle.timing import deadline
from resight.errors import CycleError

log = logging.getLogger(__name__)

STAGES = ("ingest", "collect", "adapt", "judge", "export", "backfill", "shadow", "promote", "watch")
PAUSES_S = (2.0, 15.0, 60.0)  # a restart of the server takes so long
MOST_STARTS = 12  # three nights of four tries; more would never end
ENDS: dict[str, RunState] = {"skipped": "skipped", "refused": "refused", "rolled_back": "rolled_back"}


@dataclass
class Conductor:
    """One call of the cycle.

    Attributes:
        file: of the site.
        stop: ends the stage under way when set; the run goes on the next time.
        ignore_window: work outside the maintenance window too.
        deadline: of `time.monotonic`; None = none.
        pauses_s: before another try of what may pass.
    """

    file: Path
    stop: Event = field(default_factory=Event)
    ignore_window: bool = False
    deadline: float | None = None
    pauses_s: tuple[float, ...] = PAUSES_S

    def once(self) -> Run:
        """Work until the run has ended, or until there is no more time.

        Returns:
            The run; of state ``running`` where it goes on the next time.

        Raises:
            RecipeError: the site's file is wrong.
            CycleBusyError: another cycle of this site is at work.
            CycleError: the maintenance window is closed.
        """
        site = load_site(self.file)
        layout = Layout(site.state)
        self.deadline = deadline(site.schedule, datetime.now(UTC), ignore_window=self.ignore_window)
        if self.deadline is not None and self.deadline <= time.monotonic():
            raise CycleError(
                f"the maintenance window {site.schedule.window} ({site.schedule.timezone}) of {site.name} is closed: "
                "wait for it, or give --now"
            )
        with Lock(layout.lock, f"site {site.name}"), Runs(layout.database) as runs:
            for last in runs.runs(limit=1):
                asked.report(site, last)  # again: a kill may have come before it was told
            run = runs.unfinished() or runs.begin()
            asked.claim(site, runs, run)
            log.info("site %s: run %d", site.name, run.run)
            self._walk(site, layout, runs, run.run)
            ended = runs.run(run.run)
            asked.report(site, ended)
            retention.tidy(site, layout, runs)
            history.write(site, layout, runs)
            return ended

    def _walk(self, site: SiteFile, layout: Layout, runs: Runs, number: int) -> None:
        """Stage after stage, until one ends the run or has to go on the next time."""
        folder = layout.run(number)
        folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for stage in STAGES:
            outcome = self._stage(site, runs, number, folder, stage)
            if outcome is None:
                return
            cancelled = asked.progress(site, runs.run(number), stage)
            if outcome.verdict != "done":
                reason = f"{stage}: {'; '.join(outcome.reasons)}"
                self._finish(layout, runs, number, ENDS[outcome.verdict], reason, used=outcome.used)
                return
            if cancelled and STAGES.index(stage) < STAGES.index("promote"):
                self._finish(layout, runs, number, "failed", "cancelled by who asked for it")
                return
        self._finish(layout, runs, number, "promoted", f"{site.model_id(number)} is active", used=True)

    def _stage(self, site: SiteFile, runs: Runs, number: int, folder: RunFolder, stage: str) -> Outcome | None:
        """What a stage came to; None = the run goes on the next time, or failed."""
        row = runs.stages(number).get(stage)
        if row is not None and row.outcome is not None:
            return row.outcome
        for pause_s in (*self.pauses_s, None):
            found = read_outcome(folder.result(stage))
            if found is None and not self._has_time():
                return None
            if found is None:
                error = self._try(site, runs, number, folder, stage)
                found = read_outcome(folder.result(stage))
            if found is not None:
                runs.end_stage(number, stage, outcome=found)
                log.info("run %d: %s %s %s", number, stage, found.verdict, "; ".join(found.reasons))
                return found
            if error is None or pause_s is None:
                return None
            log.warning("run %d: %s is tried again in %g s: %s", number, stage, pause_s, error)
            self.stop.wait(pause_s)
        raise AssertionError("unreachable")

    def _try(self, site: SiteFile, runs: Runs, number: int, folder: RunFolder, stage: str) -> str | None:
        """Run a stage's process once; returns why another try may help, or None where none is to be made now."""
        layout = Layout(site.state)
        log.info("run %d: %s begins, log %s", number, stage, folder.log(stage))
        ended = run_stage(
            stage_command(stage, self.file, number, idle_io=site.schedule.idle_io),
            stage,
            folder,
            deadline=self.deadline,
            stop=self.stop,
            began=lambda pid: runs.start_stage(number, stage, pid),
        )
        if ended.status == 0 and not ended.interrupted:
            return None
        error = "its time was up" if ended.interrupted else ended.error
        runs.end_stage(number, stage, error=error)
        starts = runs.stages(number)[stage].starts
        if starts >= MOST_STARTS:
            error = f"not done in {starts} tries, the last: {error}"
        elif ended.interrupted:
            log.info("run %d: %s is interrupted and goes on the next time", number, stage)
            return None
        elif ended.passing:
            return error
        if STAGES.index(stage) > STAGES.index("promote"):  # it serves, whatever else went wrong
            reason = f"{site.model_id(number)} is active, but {stage}: {error}"
            alert(layout.alerts, number, reason)
            self._finish(layout, runs, number, "promoted", reason, used=True)
        else:
            self._finish(layout, runs, number, "failed", f"{stage}: {error}")
        return None

    def _has_time(self) -> bool:
        return not self.stop.is_set() and (self.deadline is None or time.monotonic() < self.deadline)

    def _finish(
        self, layout: Layout, runs: Runs, number: int, state: RunState, reason: str, *, used: bool = False
    ) -> None:
        """End the run, and let its crops go: the site's store has them, for as long as they may be kept."""
        folder = layout.run(number)
        until = until_s(read_outcome(folder.result("collect")))
        if state in ("failed", "rolled_back"):
            alert(layout.alerts, number, f"{state}: {reason}")
        runs.end(number, state, reason, used=used or state in ("promoted", "rolled_back"), until_s=until)
        shutil.rmtree(folder.site, ignore_errors=True)
        log.info("run %d: %s, %s", number, state, reason)
