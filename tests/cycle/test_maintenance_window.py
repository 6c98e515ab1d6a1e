"""Windows and budgets, at manually chosen times."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from resight.cycle.conductor import run_deadline, window_left_s
from resight.cycle.schedule import next_fire
from resight.cycle.site import ScheduleSection, load_site

HOUR_S = 3600


@pytest.mark.parametrize(
    ("window", "zone", "now", "left"),
    [
        ("", "UTC", "2026-03-10T12:00", None),
        ("02:00-05:00", "UTC", "2026-03-10T01:59", 0.0),
        ("02:00-05:00", "UTC", "2026-03-10T02:00", 3 * HOUR_S),
        ("02:00-05:00", "UTC", "2026-03-10T04:30", 0.5 * HOUR_S),
        ("02:00-05:00", "UTC", "2026-03-10T05:00", 0.0),
        ("22:00-02:00", "UTC", "2026-03-10T23:00", 3 * HOUR_S),
        ("22:00-02:00", "UTC", "2026-03-10T01:00", HOUR_S),
        ("22:00-02:00", "UTC", "2026-03-10T02:00", 0.0),
        ("02:00-05:00", "Asia/Tokyo", "2026-03-10T18:00", 2 * HOUR_S),  # 3 a.m. local time
        ("00:30-04:00", "Europe/Berlin", "2026-03-28T23:30", 2.5 * HOUR_S),  # the hour from two to three is skipped
        ("00:30-04:00", "Europe/Berlin", "2026-10-24T22:30", 4.5 * HOUR_S),  # and repeated
    ],
)
def test_a_window_follows_the_local_time_of_its_zone(window: str, zone: str, now: str, left: float | None) -> None:
    found = window_left_s(
        ScheduleSection(window=window, timezone=zone), datetime.fromisoformat(now).replace(tzinfo=UTC)
    )
    assert found == left


def test_the_earlier_of_window_and_budget_ends_a_call() -> None:
    now = datetime(2026, 3, 10, 4, 30, tzinfo=timezone(timedelta()))
    both = ScheduleSection(window="02:00-05:00", budget_minutes=10)
    began = time.monotonic()
    assert run_deadline(ScheduleSection(), now) is None
    assert 600 <= (run_deadline(both, now) or 0) - began < 660
    assert 1800 <= (run_deadline(ScheduleSection(window="02:00-05:00"), now) or 0) - began < 1860
    assert (run_deadline(ScheduleSection(window="06:00-07:00"), now) or 0) - began < 60
    assert run_deadline(ScheduleSection(window="06:00-07:00"), now, ignore_window=True) is None


def test_the_next_run_follows_the_cron_expression(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(
        'name = "lobby"\n[service]\nmodel_root = "m"\nbundle = "b"\n'
        '[schedule]\ncron = "30 2 * * mon-fri"\ntimezone = "Europe/Berlin"\n'
    )
    found = next_fire(load_site(path), datetime(2026, 11, 20, 12, 0, tzinfo=UTC))  # a Friday
    assert found is not None and found.astimezone(UTC) == datetime(2026, 11, 23, 1, 30, tzinfo=UTC)
