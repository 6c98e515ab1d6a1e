"""The conductor: starts or resumes one run of a site and executes its stages, each in its own process.

The outcome of a stage is read from the file that the stage writes as its last act. If a cycle is killed, the next one
either finds that file and skips the stage, or finds none and runs the stage again, which resumes its work. A call ends
at the latest when the maintenance window closes or the budget is used up.
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from zoneinfo import ZoneInfo

from resight.cycle import history, requested_runs
from resight.cycle.history import alert
from resight.cycle.process import run_stage, stage_command
from resight.cycle.runs import CycleLock, CycleRun, RunDatabase, RunState
from resight.cycle.site import ScheduleSection, SiteFile, load_site
from resight.cycle.state_folder import RunFolder, StageOutcome, StateFolder, newest_crop_s, read_outcome
from resight.errors import CycleError

MINUTE_S = 60.0


def window_left_s(schedule: ScheduleSection, now: datetime) -> float | None:
    """Seconds until the maintenance window closes; 0 = it is closed, None = the site has none.

    Args:
        schedule: of the site.
        now: time with a zone.
    """
    if not schedule.window:
        return None
    here = now.astimezone(ZoneInfo(schedule.timezone))
    begins, ends = (_minute(text) for text in schedule.window.split("-"))
    minute = here.hour * 60 + here.minute
    is_open = begins <= minute < ends if begins < ends else minute >= begins or minute < ends
    if not is_open:
        return 0.0
    day = here.date() + timedelta(days=int(begins > ends and minute >= begins))
    end = datetime(day.year, day.month, day.day, ends // 60, ends % 60, tzinfo=here.tzinfo)
    return max(0.0, end.timestamp() - now.timestamp())  # elapsed, not local time: a day may have 23 or 25 hours


def _minute(text: str) -> int:
    hours, _, minutes = text.partition(":")
    return 60 * int(hours) + int(minutes)


def run_deadline(schedule: ScheduleSection, now: datetime, *, ignore_window: bool = False) -> float | None:
    """`time.monotonic` at which a call that begins now has to end; None = no limit."""
    limits = [] if schedule.budget_minutes == 0 else [schedule.budget_minutes * MINUTE_S]
    left = None if ignore_window else window_left_s(schedule, now)
    if left is not None:
        limits.append(left)
    return time.monotonic() + min(limits) if limits else None


log = logging.getLogger(__name__)

STAGES = ("ingest", "collect", "adapt", "judge", "export", "backfill", "shadow", "promote", "watch")
RETRY_PAUSES_S = (2.0, 15.0, 60.0)  # together longer than a restart of the server
MAX_STARTS = 12  # three nights of four attempts
RUN_STATE_BY_VERDICT: dict[str, RunState] = {"skipped": "skipped", "refused": "refused", "rolled_back": "rolled_back"}


@dataclass
class Conductor:
    """One call of the cycle.

    Attributes:
        file: of the site.
        stop: when set, terminates the current stage; the run is resumed by the next call.
        ignore_window: run outside the maintenance window too.
        deadline: by `time.monotonic`; None = no deadline.
        pauses_s: before each retry after a transient error.
    """

    file: Path
    stop: Event = field(default_factory=Event)
    ignore_window: bool = False
    deadline: float | None = None
    pauses_s: tuple[float, ...] = RETRY_PAUSES_S

    def run_once(self) -> CycleRun:
        """Start a run or resume the unfinished one, until it ends or the time is up.

        Returns:
            The run; its state is ``running`` if the next call has to resume it.

        Raises:
            RecipeError: the site's file is not valid.
            CycleBusyError: another cycle of this site is running.
            CycleError: the maintenance window is closed.
        """
        site = load_site(self.file)
        layout = StateFolder(site.state)
        self.deadline = run_deadline(site.schedule, datetime.now(UTC), ignore_window=self.ignore_window)
        if self.deadline is not None and self.deadline <= time.monotonic():
            raise CycleError(
                f"the maintenance window {site.schedule.window} ({site.schedule.timezone}) of {site.name} is closed: "
                "wait until it opens, or use --now"
            )
        with CycleLock(layout.lock, f"site {site.name}"), RunDatabase(layout.database) as runs:
            for last in runs.runs(limit=1):
                requested_runs.report_end(site, last)  # again, in case the cycle was killed before it did
            run = runs.unfinished() or runs.begin()
            requested_runs.claim_request(site, runs, run)
            log.info("site %s: run %d", site.name, run.run)
            self._run_stages(site, layout, runs, run.run)
            ended = runs.run(run.run)
            requested_runs.report_end(site, ended)
            history.apply_retention(site, layout, runs)
            history.write_pages(site, layout, runs)
            return ended

    def _run_stages(self, site: SiteFile, layout: StateFolder, runs: RunDatabase, number: int) -> None:
        """Run the stages in order, until one ends the run or has to be resumed by the next call."""
        folder = layout.run(number)
        folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for stage in STAGES:
            outcome = self._stage(site, runs, number, folder, stage)
            if outcome is None:
                return
            cancelled = requested_runs.report_progress(site, runs.run(number), stage)
            if outcome.verdict != "done":
                reason = f"{stage}: {'; '.join(outcome.reasons)}"
                self._finish(layout, runs, number, RUN_STATE_BY_VERDICT[outcome.verdict], reason, used=outcome.used)
                return
            if cancelled and STAGES.index(stage) < STAGES.index("promote"):
                self._finish(layout, runs, number, "failed", "cancelled by the caller who requested it")
                return
        self._finish(layout, runs, number, "promoted", f"{site.model_id(number)} is active", used=True)

    def _stage(
        self, site: SiteFile, runs: RunDatabase, number: int, folder: RunFolder, stage: str
    ) -> StageOutcome | None:
        """The outcome of a stage; None = the next call resumes the run, or the run has failed."""
        row = runs.stages(number).get(stage)
        if row is not None and row.outcome is not None:
            return row.outcome
        for pause_s in (*self.pauses_s, None):
            outcome = read_outcome(folder.result(stage))
            if outcome is None and not self._has_time():
                return None
            if outcome is None:
                error = self._run_stage_once(site, runs, number, folder, stage)
                outcome = read_outcome(folder.result(stage))
            if outcome is not None:
                runs.end_stage(number, stage, outcome=outcome)
                log.info("run %d: %s %s %s", number, stage, outcome.verdict, "; ".join(outcome.reasons))
                return outcome
            if error is None or pause_s is None:
                return None
            log.warning("run %d: retrying %s in %g s: %s", number, stage, pause_s, error)
            self.stop.wait(pause_s)
        raise AssertionError("unreachable")

    def _run_stage_once(
        self, site: SiteFile, runs: RunDatabase, number: int, folder: RunFolder, stage: str
    ) -> str | None:
        """Run the process of a stage once; returns the error if it should be retried, else None."""
        layout = StateFolder(site.state)
        log.info("run %d: starting %s, log %s", number, stage, folder.log(stage))
        ended = run_stage(
            stage_command(stage, self.file, number, idle_io=site.schedule.idle_io),
            stage,
            folder,
            deadline=self.deadline,
            stop=self.stop,
            on_start=lambda pid: runs.start_stage(number, stage, pid),
        )
        if ended.status == 0 and not ended.interrupted:
            return None
        error = "its time is up" if ended.interrupted else ended.error
        runs.end_stage(number, stage, error=error)
        starts = runs.stages(number)[stage].starts
        if starts >= MAX_STARTS:
            error = f"not done after {starts} attempts, last error: {error}"
        elif ended.interrupted:
            log.info("run %d: %s was interrupted; the next call resumes it", number, stage)
            return None
        elif ended.transient:
            return error
        if STAGES.index(stage) > STAGES.index("promote"):  # the model already serves, so the run counts as promoted
            reason = f"{site.model_id(number)} is active, but {stage}: {error}"
            alert(layout.alerts, number, reason)
            self._finish(layout, runs, number, "promoted", reason, used=True)
        else:
            self._finish(layout, runs, number, "failed", f"{stage}: {error}")
        return None

    def _has_time(self) -> bool:
        return not self.stop.is_set() and (self.deadline is None or time.monotonic() < self.deadline)

    def _finish(
        self, layout: StateFolder, runs: RunDatabase, number: int, state: RunState, reason: str, *, used: bool = False
    ) -> None:
        """End the run and delete its copy of the crops; the site's store keeps them for their retention time."""
        folder = layout.run(number)
        until = newest_crop_s(read_outcome(folder.result("collect")))
        if state in ("failed", "rolled_back"):
            alert(layout.alerts, number, f"{state}: {reason}")
        runs.end(number, state, reason, used=used or state in ("promoted", "rolled_back"), until_s=until)
        shutil.rmtree(folder.site, ignore_errors=True)
        log.info("run %d: %s, %s", number, state, reason)
