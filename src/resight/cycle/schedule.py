"""`resight cycle run`: starts a run at the times of the site's cron expression, on request, and after a kill.

APScheduler runs the jobs: a run missed by less than an hour is made up for, several missed runs become one, and no run
starts while another is in progress.
"""

from __future__ import annotations

import logging
import signal
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from types import FrameType

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from resight.cycle import requested_runs
from resight.cycle.conductor import Conductor, window_left_s
from resight.cycle.runs import RunDatabase
from resight.cycle.site import SiteFile, load_site
from resight.cycle.state_folder import StateFolder
from resight.errors import ReIDError

log = logging.getLogger(__name__)

MISFIRE_GRACE_S = 3600  # a run missed by less than this is made up for
REQUEST_POLL_S = 15  # interval of polling requests on the server


def next_fire(site: SiteFile, now: datetime) -> datetime | None:
    """When the next scheduled run begins; None = never."""
    schedule = site.schedule
    fire_time: datetime | None = CronTrigger.from_crontab(schedule.cron, timezone=schedule.timezone).get_next_fire_time(
        None, now
    )
    return fire_time


class CycleScheduler:
    """The scheduler of one site.

    Args:
        file: of the site; every run reads it again, except for the schedule itself.

    Raises:
        RecipeError: the file is not valid.
    """

    def __init__(self, file: Path) -> None:
        self.stop = Event()
        self._file, self._site = file, load_site(file)
        self._first = True
        self._jobs = BackgroundScheduler(
            timezone=self._site.schedule.timezone,
            executors={"default": ThreadPoolExecutor(1)},  # one thing at a time
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": MISFIRE_GRACE_S},
        )

    def run(self) -> None:
        """Run until SIGTERM or Ctrl-C; the current stage is then terminated, and resumed at the next start."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        logging.getLogger("apscheduler").setLevel(logging.ERROR)  # it logs every poll, and every poll delayed by a run
        schedule = self._site.schedule
        trigger = CronTrigger.from_crontab(schedule.cron, timezone=schedule.timezone)
        self._jobs.add_job(self.run_cycle, trigger, name=f"cycle of {self._site.name}")
        self._jobs.add_job(
            self.poll_requests,
            IntervalTrigger(seconds=REQUEST_POLL_S),
            name="poll requests",
            next_run_time=datetime.now(UTC),
        )
        self._jobs.start()
        log.info("site %s: the next run begins %s", self._site.name, next_fire(self._site, datetime.now(UTC)))
        self.stop.wait()
        self._jobs.shutdown(wait=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        log.info("%s: terminating the current stage", signal.Signals(number).name)
        self.stop.set()

    def poll_requests(self) -> None:
        """Start a run if one is requested and the window is open; the first poll also resumes an unfinished run.

        Later an unfinished run waits for the schedule: its budget is used up, or the server is unreachable.
        """
        if window_left_s(self._site.schedule, datetime.now(UTC)) == 0.0:
            return
        with RunDatabase(StateFolder(self._site.state).database) as runs:
            left = self._first and runs.unfinished() is not None
        self._first = False
        if left or requested_runs.has_pending_request(self._site):
            self.run_cycle()

    def run_cycle(self) -> None:
        """Run one cycle; errors are logged, and the scheduler continues."""
        try:
            ended = Conductor(self._file, self.stop).run_once()
        except ReIDError as error:
            log.error("site %s: %s", self._site.name, error)
        except Exception:
            log.exception("site %s: the cycle failed", self._site.name)
        else:
            log.info("site %s: run %d is %s", self._site.name, ended.run, ended.state)
