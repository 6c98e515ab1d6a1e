"""`resight cycle run`: a run when the site's cron expression says so, when somebody asks for one, and after a kill.

APScheduler keeps the time: a run that was missed by less than an hour is made up for, several missed ones are one, and
none begins while another is at work.
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

from resight.cycle import asked
from resight.cycle.conductor import Conductor
from resight.cycle.layout import Layout
from resight.cycle.site_file import SiteFile, load_site
from resight.cycle.state import Runs
from resight.cycle.timing import left_s
from resight.errors import ReIDError

log = logging.getLogger(__name__)

LATE_S = 3600  # a machine that slept for less makes up for the night
LOOK_S = 15  # between two looks at what is asked for on the server


def next_fire(site: SiteFile, now: datetime) -> datetime | None:
    """When the next run begins by the schedule; None = never again."""
    schedule = site.schedule
    found: datetime | None = CronTrigger.from_crontab(schedule.cron, timezone=schedule.timezone).get_next_fire_time(
        None, now
    )
    return found


class Keeper:
    """The scheduler of one site, until it is told to stop.

    Args:
        file: of the site; read anew by each run, but for the schedule itself.

    Raises:
        RecipeError: the file is wrong.
    """

    def __init__(self, file: Path) -> None:
        self.stop = Event()
        self._file, self._site = file, load_site(file)
        self._first = True
        self._jobs = BackgroundScheduler(
            timezone=self._site.schedule.timezone,
            executors={"default": ThreadPoolExecutor(1)},  # one thing at a time
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": LATE_S},
        )

    def keep(self) -> None:
        """Work until SIGTERM or Ctrl-C; the stage under way is ended then, and goes on the next time."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._told_to_stop)
        logging.getLogger("apscheduler").setLevel(logging.ERROR)  # it tells each look, and each that waits for a run
        schedule = self._site.schedule
        trigger = CronTrigger.from_crontab(schedule.cron, timezone=schedule.timezone)
        self._jobs.add_job(self.work, trigger, name=f"cycle of {self._site.name}")
        self._jobs.add_job(
            self.look, IntervalTrigger(seconds=LOOK_S), name="what is asked for", next_run_time=datetime.now(UTC)
        )
        self._jobs.start()
        log.info("site %s: the next run begins %s", self._site.name, next_fire(self._site, datetime.now(UTC)))
        self.stop.wait()
        self._jobs.shutdown(wait=True)

    def _told_to_stop(self, number: int, frame: FrameType | None) -> None:
        log.info("%s: the stage under way is ended", signal.Signals(number).name)
        self.stop.set()

    def look(self) -> None:
        """Work where a run is asked for and the window is open; the first time also where one was left unfinished.

        Later an unfinished run waits for the schedule: its budget is used up, or the server was away for long.
        """
        if left_s(self._site.schedule, datetime.now(UTC)) == 0.0:
            return
        with Runs(Layout(self._site.state).database) as runs:
            left = self._first and runs.unfinished() is not None
        self._first = False
        if left or asked.is_asked(self._site):
            self.work()

    def work(self) -> None:
        """One cycle; what goes wrong is told and ends nothing."""
        try:
            ended = Conductor(self._file, self.stop).once()
        except ReIDError as error:
            log.error("site %s: %s", self._site.name, error)
        except Exception:
            log.exception("site %s: the cycle failed", self._site.name)
        else:
            log.info("site %s: run %d is %s", self._site.name, ended.run, ended.state)
